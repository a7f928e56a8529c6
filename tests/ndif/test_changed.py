"""What a block does to what it found outside of itself: the same with the block here and in a runner."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import threading

import numpy as np
import pytest
import torch
from torch import nn

from nnsight import save
from nnsight_ndif.errors import RunnerWarning

both = pytest.mark.parametrize("remote", [False, "local"])
COUNT = 0
SEEN = {}


def count():
    global COUNT
    COUNT += 1


@both
def test_containers_of_the_caller_are_changed(net, x, remote):
    found, table, order, seen, last = (
        [0],
        {"a": 1, "b": 2},
        collections.OrderedDict(a=1),
        {1},
        collections.deque(maxlen=2),
    )
    same, raw = found, bytearray(b"abc")
    with net.trace(x, remote=remote):
        hidden = net[0].output
        found.append(hidden)
        found[0] = "first"
        table["c"] = [hidden.shape[1], {"in": hidden.detach() + 1}]
        del table["a"]
        order.move_to_end("a")
        order["b"] = 2
        seen.add(2)
        last.extend([1, 2, 3])
        raw[1] = 0
    expected = net._module[0](x)
    assert same is found and found[0] == "first" and torch.equal(found[1], expected)
    assert list(table) == ["b", "c"] and table["c"][0] == 8 and torch.equal(table["c"][1]["in"], expected.detach() + 1)
    assert list(order.items()) == [("a", 1), ("b", 2)] and seen == {1, 2} and list(last) == [2, 3] and raw == b"a\0c"


class Experiment:
    def __init__(self, model):
        self.model, self.hidden, self.log, self.gone = model, None, [], 1
        self.settings = {"deep": [{"list": []}]}

    def run(self, x, remote):
        with self.model.trace(x, remote=remote):
            self.hidden = self.model[0].output
            self.log.append(self.hidden.shape[0])
            self.settings["deep"][0]["list"].append(self)
            self.new = save(self.hidden + 1)
            del self.gone


@both
def test_attributes_of_the_caller_are_set(net, x, remote):
    experiment = Experiment(net)
    experiment.run(x, remote)
    expected = net._module[0](x)
    assert torch.equal(experiment.hidden, expected) and torch.equal(experiment.new, expected + 1)
    assert experiment.log == [3] and experiment.settings["deep"][0]["list"] == [experiment]
    assert not hasattr(experiment, "gone")


@both
def test_tensors_and_arrays_of_the_caller_are_edited(net, x, remote):
    buffer, array, part = torch.zeros(3, 8), np.zeros((3, 8), dtype=np.float32), torch.zeros(4, 8)
    untouched = torch.zeros(2)
    view, version = part[1:], untouched._version
    with torch.no_grad():
        with net.trace(x, remote=remote):
            for row in range(3):
                buffer[row] = net[0].output[row]
            array[:] = net[0].output.numpy()
            view += net[0].output
            part.numpy()[0] = 5
            _ = untouched + untouched.numpy().sum()  # looked at in a way that could change it
    expected = net._module[0](x).detach()
    assert torch.equal(buffer, expected) and np.array_equal(array, expected.numpy())
    assert torch.equal(part, torch.cat([torch.full((1, 8), 5.0), expected]))
    assert untouched._version == version


@both
def test_parameters_of_the_caller_get_gradients_and_are_trained(net, x, remote):
    probe, scale = nn.Linear(8, 1), torch.ones(8, requires_grad=True)
    with torch.no_grad():
        probe.weight.fill_(0.5)
        probe.bias.fill_(0.25)
    plain, factor = copy.deepcopy(probe), torch.ones(8, requires_grad=True)
    for _ in range(2):
        with net.trace(x, remote=remote):
            loss = probe(net[0].output.detach() * scale).pow(2).sum()
            loss.backward()
            with torch.no_grad():
                probe.weight.sub_(0.01 * probe.weight.grad)
                probe.weight.grad = None
        loss = plain(net._module[0](x).detach() * factor).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            plain.weight.sub_(0.01 * plain.weight.grad)
            plain.weight.grad = None
    torch.testing.assert_close(scale.grad, factor.grad)
    torch.testing.assert_close(probe.weight, plain.weight)
    torch.testing.assert_close(probe.bias.grad, plain.bias.grad)
    assert probe.weight.grad is None


@both
def test_functions_of_the_caller_bind_variables_of_the_caller(net, x, remote):
    global COUNT
    COUNT, total = 0, 0

    def add(number):
        nonlocal total
        total += number
        SEEN[number] = total

    SEEN.clear()
    with net.trace(x, remote=remote):
        for layer in net:
            add(layer.output.shape[1])
            count()
    assert (total, COUNT, SEEN) == (18, 3, {8: 16, 2: 18})


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor
    colour: Colour
    number: object = None
    other: object = None


Pair = collections.namedtuple("Pair", "left right")


@both
def test_objects_of_the_users_classes_come_back(net, x, remote):
    records = []
    with net.trace(x, remote=remote):
        hidden = net[0].output
        record = save(Record(hidden, Colour.RED, np.float32(2.5)))
        record.other = record
        records.append(record)
        pair = save(Pair(hidden, [np.arange(3)]))
    assert type(record) is Record and record.other is record and record.colour is Colour.RED and records == [record]
    assert type(record.number) is np.float32 and record.number == 2.5
    assert torch.equal(record.hidden, net._module[0](x))
    assert type(pair) is Pair and np.array_equal(pair.right[0], np.arange(3)) and torch.equal(pair.left, record.hidden)


def test_change_that_cannot_come_back_is_told_at_the_block(net, x):
    found = {"kept": []}

    def program():
        with net.trace(x, remote="local"):
            found["kept"].append(number for number in [1])
            result = save(net.output)
        return result

    with pytest.warns(RunnerWarning, match=r"changed `found\['kept'\]`.*it is a generator") as caught:
        result = program()
    assert caught[0].filename == __file__
    assert found == {"kept": []} and torch.equal(result, net._module(x))


def test_what_a_block_binds_itself_comes_back_only_if_it_is_saved(net, x):
    kept = lost = 1
    with net.trace(x, remote="local"):
        lost = 2
        kept = save(net[0].output.shape[0])
    assert (kept, lost) == (3, 1)


@both
def test_lock_of_the_users_object_stays(net, x, remote):
    class Holder:
        def __init__(self):
            self.values = []

    holder = Holder()
    lock = threading.Lock()
    with lock, net.trace(x, remote=remote):
        holder.values.append(net[0].output.shape[0])
    assert holder.values == [3]


@both
def test_what_was_changed_before_an_error_is_changed(net, x, remote):
    found, hidden = [], None
    with pytest.raises(KeyError, match="no more") as caught:
        with net.trace(x, remote=remote):
            hidden = save(net[0].output)
            found.append(hidden.shape[0])
            raise KeyError("no more")
    assert found == [3] and torch.equal(hidden, net._module[0](x))
    assert caught.traceback[-1].path.name == "test_changed.py"


def test_error_is_told_although_what_was_saved_cannot_come_back(net, x):
    with pytest.raises(KeyError, match="no more"):
        with net.trace(x, remote="local"):
            lost = save([iter([])])
            raise KeyError("no more")
    with pytest.raises(UnboundLocalError):
        _ = lost


class Counter:
    count = 0


def test_attributes_of_envoys_and_classes_stay_and_are_told(net, x):
    def program(remote):
        with net.trace(x, remote=remote):
            net[0].note = "seen"
            Counter.count += 1
            result = save(net.output)
        return result

    program(False)
    assert (net[0].note, Counter.count) == ("seen", 1)
    del net[0].note
    with pytest.warns(RunnerWarning) as caught:
        program("local")
    told = sorted(str(warning.message) for warning in caught)
    assert [text.split("`")[1] for text in told] == ["Counter.count", "model.0.note"]
    assert not hasattr(net[0], "note") and Counter.count == 1
