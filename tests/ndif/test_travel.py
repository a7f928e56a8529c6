"""What a block uses and binds outside of itself: with the block here and in a runner it is the same."""

from __future__ import annotations

import dataclasses
import functools
import linecache
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnsight import NNsight, UnsendableError

TOTAL = 0
KEPT = None


def add(value):
    global TOTAL
    TOTAL += value


def doubling(function):
    @functools.wraps(function)
    def inner(value):
        return 2 * function(value)

    return inner


@doubling
@torch.no_grad()
def plus_one(value):
    return value + 1


# --- Variables outside of the block


@pytest.mark.parametrize("remote", [False, "local"])
def test_global_variable_that_the_block_binds(net, x, remote):
    global KEPT
    KEPT = None
    with net.trace(x, remote=remote):
        KEPT = net[0].output.save()
    assert torch.equal(KEPT, net._module[0](x))


@pytest.mark.parametrize("remote", [False, "local"])
def test_variable_of_a_function_around_that_the_block_binds(net, x, remote):
    found = other = None

    def program():
        nonlocal found, other
        with net.trace(x, remote=remote):
            found = net[0].output.save()
            other = 3

    program()
    assert torch.equal(found, net._module[0](x))
    assert other == (None if remote else 3)  # not saved


@pytest.mark.parametrize("remote", [False, "local"])
def test_helpers_and_block_share_variables(net, x, remote):
    count = 0

    def bump():
        nonlocal count
        count += 1

    with net.trace(x, remote=remote):
        bump()
        first = count
        count += 10
        bump()
        found = (first, count).save()
    assert found == (1, 12)


@pytest.mark.parametrize("remote", [False, "local"])
def test_helpers_and_block_share_globals(net, x, remote):
    global TOTAL
    TOTAL = 1
    with net.trace(x, remote=remote):
        add(5)
        found = TOTAL.save()
    assert found == 6


@pytest.mark.parametrize("remote", [False, "local"])
def test_variable_that_is_read_and_then_bound(net, x, remote):
    factor, untouched = 2, 1
    with net.trace(x, remote=remote):
        factor = factor + 1
        if factor > 100:
            untouched = 5
        found = (factor, untouched, [factor for factor in range(2)], (lambda: factor)()).save()
        factor = factor.save()
    assert found == (3, 1, [0, 1], 3)
    assert (factor, untouched) == (3, 1)


@pytest.mark.parametrize("remote", [False, "local"])
def test_list_that_two_names_share(net, x, remote):
    one = []
    two = [one, one]
    with net.trace(x, remote=remote):
        two[0].append(net[0].output)
        found = [len(one), len(two[1])].save()
    assert found == [1, 1]


@pytest.mark.parametrize("remote", [False, "local"])
def test_tensors_that_share_memory(net, x, remote):
    table = torch.zeros(3, 8)
    row, array = table[1], table.numpy()
    with net.trace(x, remote=remote):
        row += 1
        net[0].output = net[0].output + table
        array[2] = 2
        net[1].output = net[1].output + table
        result = net.output.save()
    expected = torch.zeros(3, 8)
    expected[1] = 1
    hidden = net._module[0](x) + expected
    expected[2] = 2
    assert torch.equal(result, net._module[2](torch.relu(hidden) + expected))


# --- Where the block is written


class Experiment:
    """Traces from a method, as most programs do."""

    def __init__(self, model, scale):
        self.model, self.__scale = model, scale
        self.seen = []

    def scaled(self, value):
        return value * self.__scale

    def run(self, x, remote):
        with self.model.trace(x, remote=remote):
            self.model[0].output = self.scaled(self.model[0].output) + self.__scale
            result = self.model.output.save()
        return result


class Louder(Experiment):
    def scaled(self, value):
        return super().scaled(value) * 10

    def run_again(self, x, remote):
        with self.model.trace(x, remote=remote):
            self.model[0].output = super().scaled(self.model[0].output)
            result = self.model.output.save()
        return result

    def run_without_self(self, model, x, remote):
        with model.trace(x, remote=remote):
            model[0].output = super().scaled(model[0].output)
            result = model.output.save()
        return result


@pytest.mark.parametrize("remote", [False, "local"])
def test_block_in_a_method(net, x, remote):
    def expected(factor, plus):
        return net._module[2](torch.relu(net._module[0](x) * factor + plus))

    assert torch.allclose(Experiment(net, 3).run(x, remote), expected(3, 3))
    assert torch.allclose(Louder(net, 3).run(x, remote), expected(30, 3))
    assert torch.allclose(Louder(net, 3).run_again(x, remote), expected(3, 0))
    assert torch.allclose(Louder(net, 3).run_without_self(net, x, remote), expected(3, 0))


@pytest.mark.parametrize("remote", [False, "local"])
def test_block_in_a_class_body(net, x, remote):
    class Results:
        scale = 2
        with net.trace(x, remote=remote):
            hidden = (net[0].output * scale).save()

    assert torch.allclose(Results.hidden, net._module[0](x) * 2)


@pytest.mark.parametrize("remote", [False, "local"])
def test_block_whose_target_is_no_name(net, x, remote):
    held = {}
    with net.trace(x, remote=remote) as held["tracer"]:
        result = held["tracer"].result.save()
    assert torch.allclose(result, net._module(x))


@pytest.mark.parametrize("remote", [False, "local"])
def test_invokes_in_a_method(net, x, remote):
    class Runner:
        def __init__(self):
            self.__by = 5

        def run(self):
            with net.trace(remote=remote) as tracer:
                with tracer.invoke(x[:1]):
                    hidden = net[0].output * self.__by
                    first = hidden.save()
                with tracer.invoke(x[1:]):
                    hidden = net[0].output
                    second = hidden.save()
            return first, second

    first, second = Runner().run()
    assert torch.allclose(first, net._module[0](x[:1]) * 5)
    assert torch.allclose(second, net._module[0](x[1:]))


PROGRAM = """
import torch
from nnsight import NNsight

model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
x = torch.ones(1, 4)
scale = 2
seen = []

def scaled(value):
    return value * scale

class Kind:
    def method(self, value):
        seen.append(1)
        return scaled(value)

with model.trace(x, remote="local"):
    scale = 3
    model[0].output = Kind().method(model[0].output)
    first = model.output.save()
    number = len(seen).save()

with model.trace(remote="local") as tracer:
    with tracer.invoke(x):
        hidden = model[0].output
        second = (hidden * 1).save()
    with tracer.invoke(x * 2):
        hidden = model[0].output
        third = (hidden * 1).save()

net = model._module
print(torch.equal(first, torch.relu(net[0](x) * 3)), number, scale, len(seen))
print(torch.allclose(second, net[0](x)), torch.allclose(third, net[0](x * 2)))
"""


@pytest.mark.parametrize("how", ["file", "command", "notebook"])
def test_block_at_the_top_of_a_program(tmp_path, how):
    if how == "file":
        (tmp_path / "program.py").write_text(PROGRAM)
        command, given = [str(tmp_path / "program.py")], None
    elif how == "command":
        command, given = ["-c", PROGRAM], None
    else:
        cells = PROGRAM.split("\n\n")
        command, given = ["-"], textwrap.dedent(f"""
            import linecache, sys, types
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            for number, cell in enumerate({cells!r}):
                name = f"<ipython-input-{{number}}>"
                linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
                exec(compile(cell, name, "exec"), main.__dict__)
        """)  # fmt: skip
    done = subprocess.run([sys.executable, *command], input=given, capture_output=True, text=True, timeout=100)
    # `scale` was bound by the block, and not saved; `seen` is a list that was there.
    assert done.stdout.split() == ["True", "1", "2", "1", "True", "True"], done.stderr


def test_block_in_code_that_is_run_with_variables_of_its_own(net, x):
    """`exec` with two dicts: neither a function nor the top of a file."""
    text = "with net.trace(x, remote='local'):\n    found = (net[0].output * scale).save()\n"
    linecache.cache["<run>"] = (len(text), None, text.splitlines(keepends=True), "<run>")
    values, variables = {"__name__": "run", "scale": 1}, {"net": net, "x": x, "scale": 3}
    exec(compile(text, "<run>", "exec"), values, variables)
    assert torch.equal(variables["found"], net._module[0](x) * 3)
    assert "found" not in values


# --- What travels


def test_decorated_function_does_there_what_it_does_here(net, x):
    with net.trace(x, remote="local"):
        found = plus_one(net[0].output).save()
    assert torch.equal(found, 2 * (net._module[0](x) + 1))


def test_lambda_and_async_function(net, x):
    add = lambda value, by=2: value + by

    async def later(value):
        return value * 3

    with net.trace(x, remote="local"):
        try:
            later(add(net[0].output)).send(None)
        except StopIteration as done:
            found = done.value.save()
    assert torch.equal(found, (net._module[0](x) + 2) * 3)


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, hidden):
        return torch.sigmoid(self.linear(hidden))


@dataclasses.dataclass
class Setting:
    layer: object
    by: torch.Tensor
    probe: nn.Module


def test_probe_and_envoys_in_a_setting(net, x):
    setting = Setting(net[0], torch.arange(8.0), Probe())
    with net.trace(x, remote="local"):
        setting.layer.output = setting.layer.output + setting.by
        found = setting.probe(net[0].output).save()
    assert torch.equal(found, setting.probe(net._module[0](x) + torch.arange(8.0)))


def test_argument_and_variable_are_one_tensor(net):
    given = torch.zeros(3, 4)
    with net.trace(given, remote="local"):
        given += 1
        seen = net.inputs[0][0].save()
    assert torch.equal(seen, torch.ones(3, 4)) or torch.equal(seen, torch.zeros(3, 4))
    assert torch.equal(given, torch.ones(3, 4))


def test_structured_values_arrive(net, x):
    names, when = np.array(["a", "bc"]), np.datetime64("2020-01-01")
    ways = {"slice": slice(1, None), "range": range(3), "none": None, "deep": [{1: (2.5, {"x"})}]}
    with net.trace(x, remote="local"):
        found = [str(names), str(when), repr(sorted(ways["deep"][0][1][1])), list(ways["range"])].save()
        part = net[0].output[ways["slice"]].save()
    assert found == [str(names), str(when), "['x']", [0, 1, 2]]
    assert torch.equal(part, net._module[0](x)[1:])


def test_other_model_is_refused_and_says_what_to_do(net, x):
    other = NNsight(nn.Linear(4, 4))
    with pytest.raises(UnsendableError, match=r"'other'.*another model.*one model at a time"):
        with net.trace(x, remote="local"):
            net[0].output = other.output


def test_model_can_be_traced_after_a_refusal(net, x):
    told = r"'handle' of the block at .*test_travel\.py:\d+ .*TextIOWrapper"
    with Path(__file__).open() as handle, pytest.raises(UnsendableError, match=told):
        with net.trace(x, remote="local"):
            handle.read()
    with net.trace(x, remote="local"):
        result = net.output.save()
    assert torch.equal(result, net._module(x))
