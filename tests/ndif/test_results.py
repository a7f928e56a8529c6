"""What a block in a runner has saved is in the caller's frame as it is for a block that runs there."""

from __future__ import annotations

import collections
import dataclasses
import enum
import typing

import numpy as np
import pytest
import torch
from torch import nn

from nnsight import PayloadWarning, save


class Mode(enum.Enum):
    ADD = "add"


@dataclasses.dataclass(frozen=True)
class Found:
    layer: int
    hidden: torch.Tensor
    mode: Mode = Mode.ADD


class Notes:
    def __init__(self, first):
        self.all = [first]

    def last(self):
        return self.all[-1]


class Scores(typing.NamedTuple):
    best: torch.Tensor
    name: str


Pair = collections.namedtuple("Pair", "left right")


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture(params=[False, "local"], ids=["here", "local"])
def remote(request):
    return request.param


SAVED = {
    "array": lambda hidden: hidden.detach().numpy(), "number": lambda hidden: np.float32(hidden.sum().item()),
    "scores": lambda hidden: Scores(hidden[0], "a"), "pair": lambda hidden: Pair(hidden, 1),
    "topk": lambda hidden: hidden.topk(2), "max": lambda hidden: hidden.max(0), "shape": lambda hidden: hidden.shape,
    "ordered": lambda hidden: collections.OrderedDict(b=hidden, a=1),
    "default": lambda hidden: collections.defaultdict(list, {"a": [hidden]}),
    "counter": lambda hidden: collections.Counter("aab"), "deque": lambda hidden: collections.deque([hidden], 3),
    "bytes": lambda hidden: bytearray(b"ab"), "parameter": lambda hidden: nn.Parameter(hidden.detach()),
    "dtype": lambda hidden: hidden.dtype, "member": lambda hidden: Mode.ADD,
    "nested": lambda hidden: {"a": [(hidden, {1, 2}), None], 3: ("é", 2 - 1j, frozenset({1.5}))},
    "infinite": lambda hidden: [float("inf"), hidden.new_full((2,), float("-inf"))],
    "turned": lambda hidden: hidden.t(), "half": lambda hidden: hidden.bfloat16(), "empty": lambda hidden: hidden[:0],
    "range": lambda hidden: range(3),
}  # fmt: skip


@pytest.mark.parametrize("what", SAVED)
def test_value_comes_back_with_its_type_and_content(net, x, remote, what):
    with torch.no_grad():
        expected = SAVED[what](net._module[0](x))
    make = SAVED[what]
    with torch.no_grad(), net.trace(x, remote=remote):
        found = save(make(net[0].output))
    check(found, expected)


def check(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    elif isinstance(expected, list | tuple | collections.deque):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check(one, other)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        check(list(found.values()), list(expected.values()))
    else:
        assert found == expected


def test_instances_are_of_the_callers_own_classes(net, x, remote):
    with net.trace(x, remote=remote):
        found = save(Found(0, net[0].output))
        notes = save(Notes(found))
        kinds = save([Found, Mode.ADD, Notes])
    assert type(found) is Found and type(notes) is Notes and kinds == [Found, Mode.ADD, Notes]
    assert notes.last() is found and found.mode is Mode.ADD
    assert torch.equal(found.hidden, net._module[0](x))


def test_probe_trained_in_the_block_comes_back(net, x, remote):
    torch.manual_seed(0)
    probe = Probe()
    before = probe.linear.weight.detach().clone()
    with net.trace(x, remote=remote):
        hidden = net[0].output.detach()
        optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
        probe(hidden).sum().backward()
        optimizer.step()
        trained = save(probe)
    hidden = net._module[0](x).detach()
    assert type(trained) is Probe
    expected = before - 0.1 * hidden.sum(0).expand(2, 8)
    torch.testing.assert_close(trained.linear.weight.detach(), expected)
    assert torch.equal(trained(hidden), hidden @ trained.linear.weight.t() + trained.linear.bias)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in trained.parameters())


def test_envoys_and_modules_come_back_as_the_callers(net, x, remote):
    with net.trace(x, remote=remote):
        net.output
        layers = save({"first": net[0], "all": [net]})
    assert layers["first"] is net[0] and layers["all"][0] is net


def test_what_two_names_share_they_share_here(net, x, remote):
    with torch.no_grad(), net.trace(x, remote=remote):
        hidden = (net[0].output + 1).save()
        row = hidden[1].save()
        again = hidden.save()
        entries = [hidden, hidden].save()
        table = {"entries": entries}.save()
    assert again is hidden and entries[0] is hidden and entries[1] is hidden
    assert table["entries"] is entries
    row.zero_()
    assert hidden[1].eq(0).all() and not hidden[0].eq(0).all()


def test_computed_tensor_can_be_edited_in_place_afterwards(net, x, remote):
    with net.trace(x, remote=remote):
        doubled = (net[0].output * 2).save()
    assert doubled.requires_grad and not doubled.is_leaf
    doubled += 1
    assert torch.equal(doubled, net._module[0](x) * 2 + 1)


def test_value_is_saved_between_the_traces_of_a_session(net, x, remote):
    with net.session(remote=remote):
        before = [1].save()
        with net.trace(x):
            first = net[0].output
        total = (first * 2).save()
        with net.trace(x * 2):
            second = net[0].output
        difference = save(second - first)
    expected = net._module[0](x)
    assert before == [1]
    torch.testing.assert_close(total, expected * 2)
    torch.testing.assert_close(difference, net._module[0](x * 2) - expected)


def test_edit_in_place_after_the_last_trace_of_a_session_counts(net, x, remote):
    with torch.no_grad(), net.session(remote=remote):
        with net.trace(x):
            hidden = net[0].output
        hidden[:, 0] = 7
        hidden.save()
    expected = net._module[0](x).detach()
    expected[:, 0] = 7
    assert torch.equal(hidden, expected)


def test_output_that_the_block_has_changed_comes_back_changed(gpt, ids, remote):
    with torch.no_grad(), gpt.trace(ids, remote=remote) as tracer:
        output = tracer.result
        logits = output.logits
        output.logits = logits * 2
        output.save()
        logits.save()
    plain = gpt._module(ids)
    assert type(output) is type(plain)
    assert torch.equal(output.logits, plain.logits * 2) and torch.equal(logits, plain.logits)
    assert torch.equal(output["logits"], plain.logits * 2)
    assert torch.equal(output.past_key_values.layers[0].keys, plain.past_key_values.layers[0].keys)


def test_many_values_of_a_loop_come_back(gpt, ids, remote):
    with gpt.trace(ids, remote=remote):
        hidden = [block.output.save() for block in gpt.transformer.h].save()
        by_layer = {n: h.norm() for n, h in enumerate(hidden)}.save()
    outputs = gpt._module(ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], outputs[1]) and len(hidden) == len(gpt.transformer.h)
    assert by_layer[0] == hidden[0].norm()


def test_container_of_saved_values_needs_no_mark(gpt, ids, remote):
    with gpt.trace(ids, remote=remote):
        hidden = [block.output.save() for block in gpt.transformer.h]
        named = {"logits": gpt.lm_head.output.save(), "pairs": [(0, hidden[0])], "n": 3}
    outputs = gpt._module(ids, output_hidden_states=True)
    assert torch.equal(hidden[0], outputs.hidden_states[1])
    assert torch.equal(named["logits"], outputs.logits)
    assert named["pairs"][0][1] is hidden[0] and named["n"] == 3


def test_container_with_something_that_was_not_saved_stays(net, x):
    with net.trace(x, remote="local"):
        first = net[0].output
        both, constants, empty = [first, net.output.save()], [1, 2], []
    assert not {"both", "constants", "empty", "first"} & locals().keys()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda hidden: lambda: hidden, "it is a function"),
        (lambda hidden: [1, (n for n in "ab")], "item 1: it is a generator"),
        (lambda hidden: {"a": hidden.to_sparse()}, r"item 'a': .*torch\.Tensor, of .*sparse_coo.* can come back\.$"),
    ],
    ids=["function", "generator", "sparse"],
)  # fmt: skip
def test_what_cannot_come_back_is_named(net, x, make, told):
    with pytest.raises(NotImplementedError, match=rf"^What was saved as 'found' cannot come back.*{told}"):
        with torch.no_grad(), net.trace(x, remote="local"):
            found = save(make(net[0].output))
    with net.trace(x, remote="local"):
        found = net[0].output.save()
    assert torch.equal(found, net._module[0](x))


def test_part_of_a_value_shares_its_memory_and_its_history(net, x, remote):
    with net.trace(x, remote=remote):
        hidden = net[0].output.save()
        row = net[0].output[1].save()
        column = hidden.t()[3].save()
        apart = hidden.detach()[2].save()
        wanted = hidden.detach()[0].requires_grad_().save()
    assert row.requires_grad and not row.is_leaf and not apart.requires_grad
    assert wanted.requires_grad and wanted.is_leaf
    plain = net._module[0](x)
    assert torch.equal(row, plain[1]) and torch.equal(column, plain[:, 3]) and torch.equal(apart, plain[2])
    (found,) = torch.autograd.grad(row.sum() + 2 * column.sum(), net._module[0].weight)
    (expected,) = torch.autograd.grad(plain[1].sum() + 2 * plain[:, 3].sum(), net._module[0].weight)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        hidden.zero_()
    assert all(bool(part.eq(0).all()) for part in (row, column, apart, wanted))


def test_part_of_a_value_is_as_that_was_edited(net, x, remote):
    with torch.no_grad(), net.trace(x, remote=remote):
        row = net[0].output[1].save()
        net[0].output[:, 7] = 0
        row[2:4] *= 5
        result = net.output.save()
    hidden = net._module[0](x).detach()
    hidden[:, 7] = 0
    hidden[1, 2:4] *= 5
    assert torch.equal(row, hidden[1])
    assert torch.equal(result, net._module[2](torch.relu(hidden)))


@pytest.mark.parametrize("is_edited", [False, True])
def test_gradients_that_end_at_what_the_block_has_made_are_told(net, x, is_edited):
    with net.trace(x, remote="local"):
        hidden = net[0].output
        if is_edited:
            hidden[:, 7] = 0
        else:
            hidden = hidden * 2
        hidden = hidden.save()
    with pytest.warns(PayloadWarning, match=r"Gradients end at a value .* Call backward inside of the block") as told:
        hidden.sum().backward()
    assert told[0].filename == __file__
    hidden.detach().requires_grad_().sum().backward()


def test_leaf_of_the_callers_gets_its_gradient_after_the_block(net):
    given = torch.ones(2, 4)
    with net.trace(given, remote="local"):
        given_there = net.input.requires_grad_().save()
        result = net.output.save()
    result.sum().backward()
    expected = torch.ones(2, 4, requires_grad=True)
    net._module(expected).sum().backward()
    torch.testing.assert_close(given_there.grad, expected.grad)


def test_rows_of_invokes_have_their_history(net, x, remote):
    with net.trace(remote=remote) as tracer:
        with tracer.invoke(x[:1]):
            first = net[0].output.save()
        with tracer.invoke(x[1:]):
            second = net[0].output.save()
    assert first.shape == (1, 8) and second.shape == (2, 8)
    (found,) = torch.autograd.grad(second.sum(), net._module[0].weight)
    (expected,) = torch.autograd.grad(net._module[0](x[1:]).sum(), net._module[0].weight)
    torch.testing.assert_close(found, expected)
