"""The source that is read is what is running; where there is none, or another, an error says so."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import sys
import traceback

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight_source import SourceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def forward(self, x):
        return torch.relu(x) + 1


def failing(x):
    y = torch.relu(x)
    return torch.matmul(y, x)  # this line of a function


class Fails(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        x = torch.relu(x)
        return self.function(x, x)  # this line of the forward


def test_last_line_of_a_traceback_is_the_models():
    model = NNsight(Fails(torch.matmul))
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        with model.trace(X):
            model.source.torch_relu_0.output
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (last.name, last.filename) == ("forward", __file__)
    assert last.line.endswith("# this line of the forward")


def test_last_lines_of_a_traceback_in_a_function_below_are_the_models():
    net = Fails(None)
    net.forward = functools.partial(below, failing)
    model = NNsight(net)
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        with model.trace(X):
            model.source.function_0.source.torch_relu_0.output
    lines = [entry.line for entry in traceback.extract_tb(raised.value.__traceback__)[-2:]]
    assert lines == ["return function(x)  # this line below", "return torch.matmul(y, x)  # this line of a function"]


def below(function, x):
    return function(x)  # this line below


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


def test_source_taken_before_the_forward_was_replaced_is_an_error(monkeypatch):
    model = NNsight(Base())
    old = model.source

    def forward(self, x):
        return torch.sin(torch.relu(x))

    monkeypatch.setattr(Base, "forward", forward)
    with model.trace(X):
        with pytest.raises(SourceError, match="the module has another forward by now. Take the source again"):
            old.torch_relu_0.output
        sine = model.source.torch_sin_0.output
    assert torch.equal(sine, torch.sin(torch.relu(X)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("return torch.relu(x)", "return torch.sigmoid(x)  # longer than it was"),
        ("return 1", "return 2  # longer"),
        ("return x", "return"),
        ("return", "pass; return 1"),
        ("x + 1; return", "x + 2; return  # longer"),
        ("for y in x: x = x + y", "for y in x: x + y"),
        ("if x: return 1", "if x: return 1, 2"),
        ("assert x; return 1", "assert x; return 1, 2"),
        ("assert x\n        return 1", "assert x\n        return True"),
    ],
)  # fmt: skip
def test_file_edited_since_is_an_error(tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "reloaded_forward.py"
    old = module_from(path, f"{HEAD}        {before}\n")
    path.write_text(f"{HEAD}        {after}\n")
    with pytest.raises(SourceError, match=r"`Net.forward` .* is not what is running"):
        NNsight(old.Net()).source
