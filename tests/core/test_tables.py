"""Which tensors are a model's parameters and buffers."""

import pytest
import torch
from modules import WIDTH, Net, rows, seeded
from torch import nn

from nnsight import NNsight
from nnsight.joint.tables import storage_of, tables_of


def test_all_parameters_and_buffers_are_found_and_nothing_else():
    net = seeded(Net)
    net.h[1].register_buffer("mean", torch.zeros(3))
    net.h[2].register_buffer("none", None)
    net.h[0].attn.bias = None
    net.again = net.h[0]  # a module in two places
    net.h[2].around = net  # and one that holds what holds it
    expected = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    assert tables_of(net) == expected
    assert storage_of(net.emb.weight[1:]) in expected
    assert storage_of(net.emb.weight.detach()) in expected
    assert storage_of(net.emb.weight.clone()) not in expected


class Odd(nn.Module):
    """Has a sparse buffer and a part without weights yet, and gives a sparse tensor to its part."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.eye(WIDTH).to_sparse())
        self.later = nn.LazyLinear(3)
        self.passes = nn.Identity()

    def forward(self, x):
        return self.later(torch.sparse.mm(self.passes(self.mask), x.T).T)


def test_tensors_without_storage_are_no_obstacle():
    net = Odd()
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            mask = model.passes.output
            first = model.output
        with tracer.invoke(rows(1)):
            second = model.output
    assert mask.is_sparse
    assert torch.allclose(first, net.later(rows(0)), atol=1e-6)
    assert torch.allclose(second, net.later(rows(1)), atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_sparse_tensor_of_the_batch_is_given_whole(count):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.passes = nn.Identity()

        def forward(self, x):
            return self.passes(x.to_sparse()).to_dense()

    model = NNsight(Sparse())
    with model.trace() as tracer:
        got = []
        for number in range(count):
            with tracer.invoke(rows(number)):
                got.append(model.passes.output)
    assert [value.shape[0] for value in got] == [2 * count] * count
