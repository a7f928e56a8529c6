"""Edits that torch does not count arrive, whichever way they are made; looking alone changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnsight import save


def by_slot(value):
    value.data = torch.zeros_like(value)


def by_dlpack(value):
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(value)).fill_(1)


def by_pointer(value):
    import ctypes

    ctypes.memset(value.data_ptr(), 0, 12)


def by_view_of_the_storage(value):
    torch.empty(0).set_(value.untyped_storage()).fill_(2)


def by_inference_mode(value):
    with torch.inference_mode():
        value.mul_(3)


WAYS = {
    "numpy": lambda value: value.numpy().fill(1), "asarray": lambda value: np.asarray(value).fill(1),
    "numpy of a view": lambda value: value[1].numpy().fill(1),
    "from_dlpack": lambda value: torch.from_dlpack(value).fill_(1),
    "to_dlpack": by_dlpack, "data": lambda value: value.data.fill_(1), "data is set": by_slot, "pointer": by_pointer,
    "storage": lambda value: value.untyped_storage().fill_(0), "set_": by_view_of_the_storage,
    "set_ of it": lambda value: value.set_(torch.ones_like(value)),
    "unsafe_chunk": lambda value: value.unsafe_chunk(2, 1)[0].fill_(1),
    "unsafe_split": lambda value: torch.unsafe_split(value, 2, 1)[1].fill_(1),
    "detached": lambda value: value.detach().fill_(1), "inference mode": by_inference_mode,
    "only looked at": lambda value: (value.numpy().sum(), value.data.sum(), value.data_ptr(), value.unsafe_chunk(2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_edit_behind_the_back_of_torch_flows_on(net, x, way):
    edit = WAYS[way]
    with torch.no_grad():
        with net.trace(x, remote="local"):
            edit(net[0].output)
            result = save(net.output)
        hidden = net._module[0](x)
        edit(hidden)
        assert torch.equal(result, net._module[2](torch.relu(hidden)))


def test_values_read_and_edited_in_inference_mode(net, x):
    with torch.no_grad():
        with net.trace(x, remote="local"):
            with torch.inference_mode():
                hidden = net[0].output
                hidden.mul_(2)
                second = net[1].output
                second[0] = 1
            result = save(net.output)
        hidden = torch.relu(net._module[0](x) * 2)
        hidden[0] = 1
        assert torch.equal(result, net._module[2](hidden))
