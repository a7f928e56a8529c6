"""What ships with the library can be switched off, each piece by its name: its use says so, and all else works."""

import importlib.metadata
import json

import pytest
from modules import python

# A file, because edits are exported as source.
PROGRAM = """
import json, os, sys, tempfile
import torch
from torch import nn
from nnsight import NNsight, plugins
from nnsight.errors import PluginDisabledError

x = torch.ones(1, 4)
USES = {}


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def use(function):
    USES[function.__name__] = function


@use
def rename(model):
    assert NNsight(net(), rename={"0": "first"}).first.path == "model.0"


@use
def session(model):
    with model.session():
        with model.trace(x):
            assert model[0].output.shape == (1, 4)


@use
def scan(model):
    with model.scan(x):
        assert model[0].output.shape == (1, 4)


@use
def edit(model):
    with model.edit(inplace=True):
        model[0].output[:] = 0
    with model.trace(x):
        assert not model[0].output.any()


@use
def clear_edits(model):
    model.clear_edits()


@use
def export_edits(model):
    edited.export_edits("again", folder)


@use
def import_edits(model):
    model.import_edits("edits", folder)
    with model.trace(x):
        assert not model[0].output.any()


@use
def iter(model):
    with model.trace(x):
        assert [tuple(model[0].output.shape) for step in model.iter[:1]] == [(1, 4)]


@use
def all(model):
    with model.trace(x):
        seen = []
        for step in model.all():
            seen.append(tuple(model[0].output.shape))
    assert seen == [(1, 4)]


@use
def barrier(model):
    with model.trace() as tracer:
        meet = tracer.barrier(2)
        for _ in range(2):
            with tracer.invoke(x):
                meet()


@use
def cache(model):
    with model.trace(x) as tracer:
        cached = tracer.cache()
    assert cached["model.0"].output.shape == (1, 4)


@use
def backward(model):
    with model.trace(x) as tracer:
        hidden = model[0].output
        with tracer.backward(model.output.sum()):
            assert hidden.grad.shape == (1, 4)


edited = NNsight(net())
with edited.edit(inplace=True):
    edited[0].output[:] = 0
with tempfile.TemporaryDirectory() as folder:
    edited.export_edits("edits", folder)
    refused = {}
    for off in ("", *USES):
        os.environ["NNSIGHT_PLUGINS_DISABLE"] = off
        plugins.refresh()
        refused[off] = {}
        for name, function in USES.items():
            try:
                function(NNsight(net()))
            except PluginDisabledError as error:
                refused[off][name] = str(error)
print(json.dumps(refused))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What is refused, and with which words, for each name that is switched off; "" for none."""
    file = tmp_path_factory.mktemp("disabling") / "program.py"
    file.write_text(PROGRAM)
    done = python(str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names():
    points = importlib.metadata.distribution("nnsight-core").entry_points
    return sorted({point.name for point in points if point.group.startswith("nnsight")})


def test_nothing_is_refused_where_nothing_is_switched_off(refused):
    assert refused[""] == {}
    assert sorted(refused) == ["", *names()]


@pytest.mark.parametrize("name", names())
def test_what_is_switched_off_says_so_and_all_else_works(refused, name):
    assert list(refused[name]) == [name]
    told = refused[name][name]
    assert told.startswith(f"plugin '{name}' (nnsight-core ")
    assert told.endswith(
        f"is switched off by NNSIGHT_PLUGINS_DISABLE='{name}': to use it, remove it from NNSIGHT_PLUGINS_DISABLE "
        "and start again."
    )
