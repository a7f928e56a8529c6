"""Scans of every architecture: what each module gives has the shape and the dtype that it has in a trace."""

from __future__ import annotations

import more_zoo
import pytest
import torch
import zoo

from nnsight import NNsight


def shapes_of(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, tuple | list):
        return [shapes_of(item) for item in value]
    return None


def shapes_in(cache):
    return {path: [shapes_of(step.output) for step in cache[path].steps] for path in cache.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", [*zoo.CAUSAL, *more_zoo.ARCHITECTURES])
def test_a_scan_gives_the_shapes_of_a_trace(name):
    if name in zoo.CAUSAL:
        net, inputs = zoo.build(name), {"input_ids": torch.tensor([[5, 17, 33, 2, 90]])}
    else:
        net, inputs = more_zoo.build(name), more_zoo.inputs_of(name)
    model = NNsight(net)
    with torch.no_grad():
        with model.trace(**inputs) as tracer:
            computed = tracer.cache()
        with model.scan(**inputs) as tracer:
            scanned = tracer.cache(device=None)
    expected = shapes_in(computed)
    assert len(expected) > 20
    assert shapes_in(scanned) == expected


def test_products_of_groups_have_the_shapes_that_torch_computes():
    class Groups(torch.nn.Module):
        def forward(self, rows, experts, ends):
            grouped = torch.nn.functional.grouped_mm
            return (
                grouped(rows, experts, offs=ends), grouped(experts, experts.transpose(1, 2)),
                grouped(rows.T, rows, offs=ends),
            )  # fmt: skip

    rows, experts, ends = torch.rand(8, 16), torch.rand(2, 16, 16), torch.tensor([4, 8], dtype=torch.int32)
    model = NNsight(Groups())
    with model.trace(rows, experts, ends):
        computed = shapes_of(model.output)
    with model.scan(rows, experts, ends):
        scanned = shapes_of(model.output)
    assert scanned == computed
