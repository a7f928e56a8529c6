"""Inherited, decorated, wrapped and closure-carrying forwards are looked into and compute the same."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnsight import NNsight

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def passing_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


def passing_on_unnamed(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


class Base(nn.Module):
    def forward(self, x):
        return torch.relu(x) + 1


class Inherits(Base):
    pass


class CallsSuper(Base):
    def forward(self, x):
        return super().forward(torch.neg(x)) * 2


class CallsSuperTwice(CallsSuper):
    def forward(self, x):
        return super().forward(torch.tanh(x))


class Decorated(nn.Module):
    @torch.no_grad()
    @passing_on
    def forward(self, x):
        return torch.tanh(x)


class DecoratedUnnamed(nn.Module):
    @passing_on_unnamed
    def forward(self, x):
        return torch.tanh(x)


class Partial(nn.Module):
    def scaled(self, scale, x):
        return torch.mul(x, scale)

    forward = functools.partialmethod(scaled, 2)


class Callable:
    def __call__(self, x):
        return torch.tanh(x)


class CallableObject(nn.Module):
    forward = Callable()


class Static(nn.Module):
    @staticmethod
    def forward(x):
        return torch.tanh(x)


class Defaults(nn.Module):
    def forward(self, x, scale=2, *rest, bias=torch.ones(()), **options):  # noqa: B008
        return torch.add(x * scale, bias) + len(rest) + len(options)


def closing_over(scale):
    class Closing(nn.Module):
        def forward(self, x):
            nonlocal scale
            scale += 1
            return torch.mul(x, scale)

    return Closing(), lambda: scale


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Base, ["torch_relu_0"]),
        (Inherits, ["torch_relu_0"]),
        (CallsSuper, ["super_0", "torch_neg_0", "forward_0"]),
        (CallsSuperTwice, ["super_0", "torch_tanh_0", "forward_0"]),
        (Decorated, ["torch_tanh_0"]),
        (DecoratedUnnamed, ["torch_tanh_0"]),
        (Partial, ["torch_mul_0"]),
        (CallableObject, ["torch_tanh_0"]),
        (Static, ["torch_tanh_0"]),
        (Defaults, ["torch_add_0", "len_0", "len_1"]),
    ],
)
def test_result_is_the_same_and_calls_are_named(kind, names, looked_into):
    result, source = looked_into(kind(), X)
    assert torch.equal(result, kind()(X))
    assert source.names == names


def test_arguments_of_every_kind(looked_into):
    arguments = (X, 3, 4, 5), {"bias": torch.zeros(()), "other": 1}
    result, _ = looked_into(Defaults(), *arguments[0], **arguments[1])
    assert torch.equal(result, Defaults()(*arguments[0], **arguments[1]))


def test_closure_is_shared(looked_into):
    net, scale = closing_over(2)
    result, _ = looked_into(net, X)
    assert torch.equal(result, X * 3)
    assert scale() == 3
    assert torch.equal(net(X), X * 4)
    assert scale() == 4


def test_super_inside_is_looked_into():
    model = NNsight(CallsSuper())
    with model.trace(X):
        inner = model.source.forward_0.source
        assert inner.names == ["torch_relu_0"]
        got = inner.torch_relu_0.output
    assert torch.equal(got, torch.relu(-X))


def test_super_of_a_class_that_is_looked_into_as_well():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.child = Base(), CallsSuper()

        def forward(self, x):
            return self.child(self.base(x))

    model = NNsight(Both())
    with model.trace(X) as tracer:
        first = model.base.source.torch_relu_0.output
        second = model.child.source.torch_neg_0.output
        result = tracer.result
    assert torch.equal(first, torch.relu(X))
    assert torch.equal(second, -(torch.relu(X) + 1))
    assert torch.equal(result, CallsSuper()(Base()(X)))


def test_decorators_still_do_their_work():
    x = X.clone().requires_grad_()
    model = NNsight(Decorated())
    with model.trace(x) as tracer:
        inside = model.source.torch_tanh_0.output
        result = tracer.result
    assert not inside.requires_grad
    assert torch.equal(result, torch.tanh(X) + 1)


def test_forward_hooked_by_accelerate():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubling(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2,), kwargs

    net = nn.Sequential(Base())
    add_hook_to_module(net[0], Doubling())
    kept = dict(net[0].__dict__)
    model = NNsight(net)
    assert model[0].source.names == ["torch_relu_0"]
    with model.trace(X) as tracer:
        got = model[0].source.torch_relu_0.output
        model[0].source.torch_relu_0.output = got + 5
        result = tracer.result
    assert torch.equal(got, torch.relu(X * 2))
    assert torch.equal(result, torch.relu(X * 2) + 6)
    assert net[0].__dict__ == kept
    assert type(net[0]._old_forward) is type(kept["_old_forward"])
    assert torch.equal(net(X), torch.relu(X * 2) + 1)
    remove_hook_from_module(net[0])
    assert torch.equal(net(X), torch.relu(X) + 1)


def test_forward_set_on_the_instance():
    net = Base()

    def forward(x):
        return torch.sigmoid(x)

    net.forward = forward
    model = NNsight(net)
    with model.trace(X):
        got = model.source.torch_sigmoid_0.output
    assert torch.equal(got, torch.sigmoid(X))
    assert net.__dict__["forward"] is forward


def test_class_replaced_on_the_module_is_seen():
    net = nn.Sequential(Base())
    model = NNsight(net)
    assert model[0].source.names == ["torch_relu_0"]
    net[0].__class__ = CallsSuper
    assert model[0].source.names == ["super_0", "torch_neg_0", "forward_0"]


def test_functional_call_and_vmap_drive_it():
    net = Base()
    model = NNsight(net)
    with model.trace(X, fn=lambda x: torch.func.functional_call(net, {}, (x,))):
        got = model.source.torch_relu_0.output
    assert torch.equal(got, F.relu(X))
