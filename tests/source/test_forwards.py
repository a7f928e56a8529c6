"""Forwards of every kind are looked into, and compute what they compute otherwise."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import linecache
import sys
import textwrap
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnsight import NNsight
from nnsight_source import SourceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def looked_into(net, *args, **kwargs):
    """Run a module with all of its operations passing through visits; return its result and its source."""
    model = NNsight(net)
    source = model.source
    with model.trace(*args, **kwargs) as tracer:
        with contextlib.suppress(ValueError):  # whether or not it is reached
            source.returns[0].output
        result = tracer.result
    return result, source


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


class Mangled(nn.Module):
    __scale = 3

    def __scaled(self, x):
        return x * self.__scale

    def forward(self, x):
        return self.__scaled(torch.tanh(x))


class Defaults(nn.Module):
    def forward(self, x, scale=2, *rest, bias=torch.ones(()), **options):  # noqa: B008
        return torch.add(x * scale, bias) + len(rest) + len(options)


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
        (Mangled, ["torch_tanh_0", "self___scaled_0"]),
        (Defaults, ["torch_add_0", "len_0", "len_1"]),
        (Inner, ["torch_mul_0", "grow_0", "torch_div_0", "grow_1", "shrink_0", "torch_sum_0", "sum_0"]),
    ],
)
def test_result_is_the_same_and_calls_are_named(kind, names):
    result, source = looked_into(kind(), X)
    assert torch.equal(result, kind()(X))
    assert source.names == names


def test_all_of_the_syntax_computes_the_same():
    result, source = looked_into(Rich(), X)
    *expected, function = Rich()(X)
    *got, looked_into_function = result
    assert all(map(torch.equal, got, expected))
    assert torch.equal(looked_into_function(), function())
    written = ast.parse(textwrap.dedent(inspect.getsource(Rich.forward)))
    assert len(source.names) == sum(isinstance(node, ast.Call) for node in ast.walk(written))
    assert {"values_0", "first_0", "others_0", "x_0", "count_0", "self_total_0", "result_0"} <= set(source.vars.names)


def test_arguments_of_every_kind():
    arguments = (X, 3, 4, 5), {"bias": torch.zeros(()), "other": 1}
    result, _ = looked_into(Defaults(), *arguments[0], **arguments[1])
    assert torch.equal(result, Defaults()(*arguments[0], **arguments[1]))


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


def test_closure_is_shared():
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


def test_traceback_shows_the_users_line():
    class Fails(nn.Module):
        def forward(self, x):
            x = torch.relu(x)
            return torch.matmul(x, x)  # this line

    model = NNsight(Fails())
    with pytest.raises(RuntimeError) as raised:
        with model.trace(X):
            model.source.torch_relu_0.output
    frames = traceback.extract_tb(raised.value.__traceback__)
    (frame,) = [frame for frame in frames if frame.name == "forward" and frame.filename == __file__]
    assert frame.line.endswith("# this line")


def test_code_without_source_says_so():
    scope = {"nn": nn, "torch": torch}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return torch.relu(x)", scope)
    model = NNsight(scope["Made"]())
    with pytest.raises(SourceError, match=r"source of `Made.forward` is unavailable: no source is kept for <string>"):
        model.source
    model = NNsight(Base())
    with model.trace(X):
        with pytest.raises(SourceError, match="source of .*relu.* is unavailable: it is not written in Python"):
            model.source.torch_relu_0.source
    lone = Base()
    lone.forward = lambda x: x
    with pytest.raises(SourceError, match="it is a lambda"):
        NNsight(lone).source


def module_from(path, source):
    path.write_text(source)
    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location("reloaded_forward", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEAD = "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n"


def test_reload_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "reloaded_forward.py"
    old = module_from(path, HEAD + "        return torch.relu(x)\n")
    assert NNsight(old.Net()).source.names == ["torch_relu_0"]
    new = module_from(path, HEAD + "        x = torch.sigmoid(x)\n        return torch.tanh(x)\n")
    assert NNsight(new.Net()).source.names == ["torch_sigmoid_0", "torch_tanh_0"]
    assert NNsight(old.Net()).source.names == ["torch_relu_0"]
    model = NNsight(new.Net())
    with model.trace(X):
        got = model.source.torch_tanh_0.output
    assert torch.equal(got, torch.tanh(torch.sigmoid(X)))


def test_file_edited_since_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "reloaded_forward.py"
    old = module_from(path, HEAD + "        return torch.relu(x)\n")
    path.write_text(HEAD + "        return torch.sigmoid(x)  # longer than it was\n")
    with pytest.raises(SourceError, match=r"`Net.forward` .* is not what is running"):
        NNsight(old.Net()).source


def test_class_replaced_on_the_module_is_seen():
    net = nn.Sequential(Base())
    model = NNsight(net)
    assert model[0].source.names == ["torch_relu_0"]
    net[0].__class__ = CallsSuper
    assert model[0].source.names == ["super_0", "torch_neg_0", "forward_0"]


def test_fast_path_of_multihead_attention_says_how_to_reach_it():
    net = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    model = NNsight(net)
    with torch.no_grad(), model.trace(x, x, x):
        with pytest.raises(ValueError, match=r"torch.backends.mha.set_fastpath_enabled\(False\)"):
            model.source.F_multi_head_attention_forward_0.output
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), model.trace(x, x, x):
            inner = model.source.F_multi_head_attention_forward_1.source
            pattern = inner.softmax_0.output
            got = model.source.F_multi_head_attention_forward_1.output
        expected, weights = net(x, x, x, average_attn_weights=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(got[0].transpose(0, 1), expected.detach(), atol=1e-6)
    assert torch.allclose(pattern.view(1, 2, 3, 3), weights.detach(), atol=1e-6)


def test_inner_function_points_to_the_function_around_it():
    model = NNsight(Inner())
    with model.trace(X):
        with pytest.raises(SourceError, match="its operations are among those of that function's `.source`"):
            model.source.grow_1.source


def test_functional_call_and_vmap_drive_it():
    net = Base()
    model = NNsight(net)
    with model.trace(X, fn=lambda x: torch.func.functional_call(net, {}, (x,))):
        got = model.source.torch_relu_0.output
    assert torch.equal(got, F.relu(X))
