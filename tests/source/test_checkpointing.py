"""`.source` within a region of `torch.utils.checkpoint`: values and edits are those of the same model without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnsight import NNsight
from nnsight_source import live, place


def scaled(x):
    y = torch.sigmoid(x)
    return y * 2


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        for index in range(2):
            hidden = torch.add(hidden, index)
        hidden = scaled(hidden)
        return self.second(hidden @ hidden.T @ hidden)


class Outer(nn.Module):
    """Calls its part three times, each time in a region of its own, or all in one with regions in it."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(4, 4)
        self.how = how

    def once(self, x):
        if self.how is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")

    def thrice(self, x):
        return self.once(self.once(self.once(x)))

    def forward(self, x):
        x = checkpoint(self.thrice, x, use_reentrant=False) if self.how == "nested" else self.thrice(x)
        return self.head(x)


def gradients(how, block, is_inside):
    """Gradients of a model in which a block edits, with backward in the trace or after it, and what the block read."""
    torch.manual_seed(0)
    net, x = Outer(how), torch.randn(2, 4, requires_grad=True)
    model = NNsight(net)
    forward = Inner.forward
    with model.trace(x) as tracer:
        seen = block(model.inner, tracer)
        loss = model.output.pow(2).sum()
        if is_inside:
            loss.backward()
    if not is_inside:
        loss.backward()
    assert Inner.forward is forward
    assert not live._tables
    assert not place._standing
    return [loss.detach(), x.grad, *(parameter.grad for parameter in net.parameters()), *seen]


def replaces(inner, tracer):
    first = inner.source.torch_tanh_0.output
    inner.source.torch_tanh_0.output = first * 3
    return [first.detach()]


def edits_in_place(inner, tracer):
    inner.source.torch_add_0.output[:, 1] = 0.5
    return []


def edits_an_operator(inner, tracer):
    inner.source.ops.matmul_0.output *= 2
    return []


def edits_what_goes_in(inner, tracer):
    inner.source.scaled_0.input = inner.source.scaled_0.input + 1
    return []


def skips(inner, tracer):
    inner.source.scaled_0.skip(inner.source.scaled_0.input * 3)
    return []


def edits_a_variable_in_every_pass(inner, tracer):
    for step in tracer.iter[:3]:
        inner.source.vars.hidden_2.output *= step + 2
    return []


def edits_a_turn_of_a_loop(inner, tracer):
    for turn in tracer.iter[3]:
        inner.source.torch_add_0.output = inner.source.torch_add_0.output * 2
    return []


def edits_below(inner, tracer):
    inside = inner.source.scaled_0.source
    inside.torch_sigmoid_0.output = inside.torch_sigmoid_0.output * 2
    return []


def edits_first_in_a_later_pass(inner, tracer):
    seen = []
    for step in tracer.iter[:3]:
        inner.input
        if step == 1:
            inner.source.torch_tanh_0.output = inner.source.torch_tanh_0.output * 2
        seen.append(inner.output.detach().clone())
    return seen


def edits_source_and_module(inner, tracer):
    inner.first.output = inner.first.output + 1
    for step in tracer.iter[1]:
        inner.source.torch_tanh_0.output = inner.source.torch_tanh_0.output * 2
        inner.second.output *= 2
    return []


EDITS = [
    replaces, edits_in_place, edits_an_operator, edits_what_goes_in, skips, edits_a_variable_in_every_pass,
    edits_a_turn_of_a_loop, edits_below, edits_first_in_a_later_pass, edits_source_and_module,
]  # fmt: skip


@pytest.mark.parametrize("block", EDITS)
@pytest.mark.parametrize("how", ["plain", "reentrant", "nested"])
@pytest.mark.parametrize("is_inside", [True, False])
def test_edits_are_made_again(block, how, is_inside):
    found, expected = gradients(how, block, is_inside), gradients(None, block, True)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    unedited = gradients(None, lambda inner, tracer: [], True)
    assert not torch.equal(found[0], unedited[0])


@pytest.mark.parametrize("how", ["plain", "reentrant", "nested"])
def test_an_operation_in_a_region_is_read_and_has_its_gradient(how):
    found = []
    for one in (None, how):
        torch.manual_seed(0)
        net, x = Outer(one), torch.randn(2, 4, requires_grad=True)
        model = NNsight(net)
        with model.trace(x):
            hidden = model.inner.source.torch_tanh_0.output
            with model.output.sum().backward():
                gradient = hidden.grad.clone()
        found.append((hidden.detach(), gradient, x.grad, net.inner.first.weight.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_model_freed_after_an_edit_in_a_region():
    """What is kept to compute a region again goes with the graph."""
    import weakref

    torch.manual_seed(0)
    net, x = Outer("plain"), torch.randn(2, 4)
    model = NNsight(net)
    with model.trace(x):
        model.inner.source.torch_add_0.output *= 2
        loss = model.output.sum()
    gone = weakref.ref(net.inner)
    del net, model
    loss.backward()
    del loss
    assert gone() is None
