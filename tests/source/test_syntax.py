"""Forwards with any syntax in them are looked into and compute the same."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight_source import SourceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Mangled(nn.Module):
    __scale = 3

    def __scaled(self, x):
        return x * self.__scale

    def forward(self, x):
        return self.__scaled(torch.tanh(x))


class Inner(nn.Module):
    def forward(self, x):
        scale = 2

        def grow(value, times=3):
            nonlocal scale
            scale += 1
            return torch.mul(value, scale) if times else grow(value, times - 1)

        shrink = lambda value: torch.div(value, scale)
        return shrink(grow(x)) + sum(torch.sum(row) for row in x)


class Rich(nn.Module):
    """Most of the syntax that there is."""

    total = 0.0

    def forward(self, x):
        values = {name: torch.abs(part) for name, part in zip("ab", x, strict=True)}
        first, *others = (torch.neg(row) for row in x)
        with torch.enable_grad() as _, contextlib.nullcontext(1) as one:
            x = x + one
        if (count := len(values)) > 1 and torch.is_tensor(x):
            x = x @ x.T
        try:
            raise KeyError(f"{torch.numel(x)!r:>{count}}")
        except KeyError as error:
            x -= len(error.args)
        finally:
            x **= 2
        match x.shape:
            case (rows, columns) if torch.is_tensor(x):
                x[0] += torch.tensor(rows * columns)
            case _:
                torch.zeros(1)
        while x.sum() > 1e6:
            x = x / 2
        x = torch.clamp(x, -9.0, 9.0) if x.ndim else torch.zeros(2)
        self.total += 1.0
        for index in range(2):
            if index:
                continue
            x = torch.add(x, index)
        assert x.ndim == 2, str(x)
        result: torch.Tensor = x[:, :2] if not 1 < 0 < torch.numel(x) else x
        del one
        return *others, first, result, lambda scale=torch.tensor(2.0): values["a"] * scale  # noqa: B008


class Steps(nn.Module):
    """Its forward is a generator."""

    def forward(self, x):
        for _ in range(3):
            x = torch.add(x, 1)
            yield x


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Mangled, ["torch_tanh_0", "self___scaled_0"]),
        (Inner, ["torch_mul_0", "grow_0", "torch_div_0", "grow_1", "shrink_0", "torch_sum_0", "sum_0"]),
    ],
)
def test_result_is_the_same_and_calls_are_named(kind, names, looked_into):
    result, source = looked_into(kind(), X)
    assert torch.equal(result, kind()(X))
    assert source.names == names


def test_all_of_the_syntax_computes_the_same(looked_into):
    result, source = looked_into(Rich(), X)
    *expected, function = Rich()(X)
    *got, looked_into_function = result
    assert all(map(torch.equal, got, expected))
    assert torch.equal(looked_into_function(), function())
    written = ast.parse(textwrap.dedent(inspect.getsource(Rich.forward)))
    assert len(source.names) == sum(isinstance(node, ast.Call) for node in ast.walk(written))
    assert {"values_0", "first_0", "others_0", "x_0", "count_0", "self_total_0", "result_0"} <= set(source.vars.names)


def test_generator():
    net = Steps()
    model = NNsight(net)
    with model.trace(X, fn=lambda x: list(net(x))) as tracer:
        seen = []
        for _ in tracer.iter[:3]:
            seen.append(model.source.torch_add_0.output)
        result = tracer.result
    expected = [X + 1, X + 2, X + 3]
    assert all(map(torch.equal, seen, expected))
    assert all(map(torch.equal, result, expected))


def test_inner_function_points_to_the_function_around_it():
    model = NNsight(Inner())
    with model.trace(X):
        with pytest.raises(SourceError, match="its operations are among those of that function's `.source`"):
            model.source.grow_1.source
