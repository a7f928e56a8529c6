"""`source.wrapper`: the operations of what a forward, or a function that is called, is wrapped in."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from nnsight import NNsight
from nnsight_source import SourceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def shifted(x):
    return torch.neg(x) + 3


def choosing(function):
    """Calls the function it wraps, or another one: as models choose between implementations."""

    @functools.wraps(function)
    def wrapper(self, x):
        chosen = function if self.is_own else lambda _, x: shifted(x)
        return chosen(self, x) * 2

    return wrapper


def doubling(function):
    @functools.wraps(function)
    def wrapper(*args):
        return torch.mul(function(*args), 2)

    return wrapper


class Chosen(nn.Module):
    def __init__(self, is_own):
        super().__init__()
        self.is_own = is_own

    @choosing
    def forward(self, x):
        return torch.tanh(x)


class Twice(nn.Module):
    @doubling
    @doubling
    def forward(self, x):
        return torch.tanh(x)


@doubling
def activate(x):
    return torch.tanh(x)


class Calls(nn.Module):
    def forward(self, x):
        return activate(x) + 1


class Plain(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def test_operations_of_the_decorator_are_read_and_changed():
    model = NNsight(Chosen(True))
    with model.trace(X) as tracer:
        wrapper = model.source.wrapper
        inside = model.source.torch_tanh_0.output
        chosen = wrapper.chosen_0.output
        wrapper.chosen_0.output = chosen + 1
        product = wrapper.ops.mul_0.output
        result = tracer.result
    assert inside is chosen
    assert torch.equal(chosen, torch.tanh(X))
    assert torch.equal(product, (torch.tanh(X) + 1) * 2)
    assert torch.equal(result, product)


def test_what_is_called_in_the_place_of_a_forward_is_reached_through_the_wrapper():
    net = Chosen(False)
    model = NNsight(net)
    with model.trace(X) as tracer:
        below = model.source.wrapper.chosen_0.output
        result = tracer.result
    assert torch.equal(below, shifted(X))
    assert torch.equal(result, shifted(X) * 2)


def test_a_forward_that_another_one_was_called_in_the_place_of_says_so():
    model = NNsight(Chosen(False))
    with pytest.raises(ValueError, match="was not called: what it is wrapped in called something else") as caught:
        with model.trace(X):
            model.source.torch_tanh_0.output
    assert "`print(model.source.wrapper)` shows them" in str(caught.value)


def test_a_decorator_applied_twice_is_two_wrappers():
    model = NNsight(Twice())
    with model.trace(X) as tracer:
        outer = model.source.wrapper.wrapper
        first = model.source.wrapper.torch_mul_0.output
        model.source.wrapper.torch_mul_0.output = first + 1
        second = outer.torch_mul_0.output
        result = tracer.result
    assert torch.equal(first, torch.tanh(X) * 2)
    assert torch.equal(second, (first + 1) * 2)
    assert torch.equal(result, second)


def test_a_function_that_is_called_has_its_wrapper():
    model = NNsight(Calls())
    with model.trace(X) as tracer:
        inside = model.source.activate_0.source
        around = inside.wrapper
        assert inside.torch_tanh_0.output.equal(torch.tanh(X))
        around.torch_mul_0.output = around.torch_mul_0.output + 5
        result = tracer.result
    assert torch.equal(result, torch.tanh(X) * 2 + 5 + 1)
    assert model.source.activate_0.source.wrapper.names == ["function_0", "torch_mul_0"]


def test_wrapper_is_printed_and_named():
    source = NNsight(Twice()).source
    assert str(source).splitlines()[-1] == " wrapped in: doubling.<locals>.wrapper, which is .wrapper"
    assert "function_0  -> 0     return torch.mul(function(*args), 2)" in str(source.wrapper)
    assert source.wrapper.wrapper.torch_mul_0.path == "model.source.wrapper.wrapper.torch_mul_0"
    assert "wrapped in" not in str(source.wrapper.wrapper)


def test_what_is_wrapped_in_nothing_says_so():
    source = NNsight(Plain()).source
    with pytest.raises(SourceError, match=r"`model.source` is wrapped in nothing that can be looked into"):
        source.wrapper
    assert "wrapper" not in str(source)


def test_cached_and_edited_for_good():
    model = NNsight(Twice())
    with model.edit() as edited:
        model.source.wrapper.torch_mul_0.output *= 3
    with edited.trace(X) as tracer:
        outer = edited.source.wrapper.wrapper
        cache = tracer.cache(modules=[edited.source.torch_tanh_0, outer.torch_mul_0])
    assert torch.equal(cache[edited.source.torch_tanh_0].output, torch.tanh(X))
    assert torch.equal(cache[outer.torch_mul_0].output, torch.tanh(X) * 2 * 3 * 2)
    with model.trace(X) as tracer:
        result = tracer.result
    assert torch.equal(result, torch.tanh(X) * 4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_edit_in_a_checkpointed_region_is_made_again(use_reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.twice = Twice()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(
                lambda x: self.twice(self.linear(x)), x, use_reentrant=use_reentrant
            )

    net = Net()
    model = NNsight(net)
    x = X.clone().requires_grad_()
    with model.trace(x) as tracer:
        wrapper = model.twice.source.wrapper
        wrapper.torch_mul_0.output = wrapper.torch_mul_0.output**2
        result = tracer.result.sum()
    result.backward()
    got = net.linear.weight.grad.clone()
    net.zero_grad()
    (((torch.tanh(net.linear(X)) * 2) ** 2) * 2).sum().backward()
    assert torch.allclose(got, net.linear.weight.grad, atol=1e-6)
