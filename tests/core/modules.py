"""Small torch modules that tests trace, and what plain torch says about them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import nn

from nnsight.kernel import blocks
from nnsight.kernel.controller import SLOT
from nnsight.testing.tiny import WIDTH as WIDTH
from nnsight.testing.tiny import Answer as Answer
from nnsight.testing.tiny import Answering as Answering
from nnsight.testing.tiny import Block as Block
from nnsight.testing.tiny import Mapping as Mapping
from nnsight.testing.tiny import Net as Net
from nnsight.testing.tiny import Pair as Pair
from nnsight.testing.tiny import Structured as Structured
from nnsight.testing.tiny import rows as rows
from nnsight.testing.tiny import seeded as seeded


class Calls(nn.Module):
    """Runs the function it is given, with itself and the input. Its parts are `a`, `b` and `c`."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def plain(module, *args, edit=None, **kwargs):
    """Run a copy of a module with torch's own hooks.

    `edit` is a function from (path, output) to a new output, or None to leave it. Returns the result, and the inputs
    and outputs of every module by its path below the root ("" for the root), one entry per call.
    """
    module = copy.deepcopy(module)
    inputs, outputs = defaultdict(list), defaultdict(list)

    def before(path):
        return lambda _, args, kwargs: inputs[path].append((args, kwargs))

    def after(path):
        def hook(_, args, kwargs, output):
            changed = None if edit is None else edit(path, output)
            outputs[path].append(output if changed is None else changed)
            return changed

        return hook

    for path, part in module.named_modules():
        part.register_forward_pre_hook(before(path), with_kwargs=True)
        part.register_forward_hook(after(path), with_kwargs=True)
    result = module(*args, **kwargs)
    return SimpleNamespace(result=result, inputs=inputs, outputs=outputs)


def same(left, right):
    """Compare values by structure and exact numbers."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if hasattr(left, "__dataclass_fields__"):
        return same(vars(left), vars(right))
    return left == right


def assert_idle(net):
    """Assert that nothing of ours stands on a module and that no block is open."""
    for path, module in net.named_modules():
        assert not callable(module.__dict__.get(SLOT)), f"{path} still has a controller"
    assert not blocks.open_blocks
    assert blocks._hint.get() is None


def assert_usable(model, net, x):
    """Assert that a model can be run and traced like any other."""
    assert_idle(net)
    expected = net(x)
    with model.trace(x) as tracer:
        given = model.input
        result = tracer.result
    assert given is x
    assert same(result, expected)
    assert_idle(net)


def python(*arguments, stdin=None, **environment):
    """Run an interpreter with this environment and the tests' folder to import from."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH")))),
            **environment,
        },
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def run(source, **environment):
    """Run a program in a fresh interpreter; return what it printed, which must be all that it had to say."""
    done = python("-W", "error", "-c", textwrap.dedent(source), **environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout.strip()


HERE = os.path.dirname(os.path.abspath(__file__))
