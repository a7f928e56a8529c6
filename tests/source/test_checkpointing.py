"""`.source` within a region of `torch.utils.checkpoint`: values can be had; an edit there is never lost silently."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nnsight
from nnsight.errors import RecomputeError


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden)


class Outer(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(4, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        if self.use_reentrant is not None:
            x = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        else:
            x = self.inner(x)
        return self.head(x)


def net_of(use_reentrant):
    torch.manual_seed(0)
    return Outer(use_reentrant), torch.randn(2, 4, requires_grad=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_operation_in_a_region_is_read_and_has_its_gradient(use_reentrant):
    found = []
    for how in (None, use_reentrant):
        net, x = net_of(how)
        model = nnsight.NNsight(net)
        with model.trace(x):
            hidden = model.inner.source.torch_tanh_0.output
            with model.output.sum().backward():
                gradient = hidden.grad.clone()
        found.append((hidden.detach(), gradient, x.grad, net.inner.first.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_edit_of_an_operation_in_a_region_is_an_error_of_backward(use_reentrant):
    net, x = net_of(use_reentrant)
    model = nnsight.NNsight(net)
    with model.trace(x):
        model.inner.source.torch_tanh_0.output *= 2
        loss = model.output.sum()
    with pytest.raises(
        RecomputeError, match=r"`model\.inner\.source\.torch_tanh_0\.output`.*input or output of a module"
    ):
        loss.backward()
    plain, y = net_of(use_reentrant)
    plain(y).sum().backward()
    for parameter in net.parameters():
        parameter.grad = None
    x.grad = None
    net(x).sum().backward()
    assert torch.equal(x.grad, y.grad)
