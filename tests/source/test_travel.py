"""Blocks that use a source travel: edits in files, and blocks that run in another process."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from nnsight import NNsight

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def scaled(x):
    y = torch.mul(x, 3)
    return y + 1


def doubling(function):
    @functools.wraps(function)
    def wrapper(*args):
        return torch.mul(function(*args), 2)

    return wrapper


class Part(nn.Module):
    @doubling
    def forward(self, x):
        y = scaled(x)
        return torch.tanh(y) @ x.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(x) - 1


def sources(model):
    source = model.part.source
    return {
        "source": source,
        "call": source.torch_tanh_0,
        "variable": source.vars.y_0,
        "operators": source.ops,
        "return": source.returns[0],
        "inside a call": source.scaled_0.source.vars.y_0,
        "of a call": source.scaled_0.source,
        "around": source.wrapper.torch_mul_0,
        "submodule": model.source.self_part_0.source.torch_tanh_0,
    }


def operation_of(name, held):
    match name:
        case "source":
            return held.torch_tanh_0
        case "operators":
            return held.matmul_0
        case "of a call":
            return held.ops.add_0
    return held


NAMES = list(sources(NNsight(Net())))


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_with_a_source_from_outside_is_written_and_read(name, tmp_path):
    model, other = NNsight(Net()), NNsight(Net())
    operation = operation_of(name, sources(model)[name])
    held = sources(model)[name]
    pick = functools.partial(operation_of, name)
    with model.edit() as edited:
        pick(held).output = pick(held).output + 1
    edited.export_edits("shift", export_dir=tmp_path)
    other.import_edits("shift", export_dir=tmp_path)
    with model.trace(X) as tracer:
        value = operation.output + 1
        operation.output = value
        expected = tracer.result
    with other.trace(X) as tracer:
        again = operation_of(name, sources(other)[name]).output
        result = tracer.result
    assert torch.equal(again, value)
    assert torch.equal(result, expected)
    assert not torch.equal(result, Net()(X))


@pytest.mark.parametrize("name", NAMES)
def test_a_runner_is_given_a_source_from_outside(name):
    model = NNsight(Net())
    held, pick = sources(model)[name], functools.partial(operation_of, name)
    with model.trace(X) as tracer:
        value = pick(held).output
        pick(held).output = value + 1
        expected = tracer.result
    with model.trace(X, remote="local") as tracer:
        seen = pick(held).output.save()
        pick(held).output = seen + 1
        result = tracer.result.save()
    assert torch.equal(seen, value) and torch.equal(result, expected)
    assert not torch.equal(result, Net()(X))
