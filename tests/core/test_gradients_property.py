"""Graphs at random: gradients that a block reads and changes are those that hooks on the tensors see and change."""

import copy
import random

import pytest
import torch
from modules import WIDTH, assert_idle, rows
from torch import nn

import nnsight

pytestmark = pytest.mark.usefixtures("nothing_remains_of_gradients")

OPERATIONS = [
    lambda linear, left, right: linear(left),
    lambda linear, left, right: linear(left) + right,
    lambda linear, left, right: torch.relu(linear(left)) * right,
    lambda linear, left, right: torch.cat([linear(left)[:1], right[1:]]),
    lambda linear, left, right: linear(left).T.contiguous().T + right.sin(),
]


class Graph(nn.Module):
    """Each value is computed from two earlier ones, chosen at random, and passes a module of its own."""

    def __init__(self, choose):
        super().__init__()
        count = choose.randrange(4, 9)
        self.choices = [
            (choose.choice(OPERATIONS), choose.randrange(i + 1), choose.randrange(i + 1)) for i in range(count)
        ]
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        self.values = nn.ModuleList(nn.Identity() for _ in range(count))

    def forward(self, x):
        known = [x]
        for (operation, left, right), linear, value in zip(self.choices, self.linears, self.values, strict=True):
            known.append(value(operation(linear, known[left], known[right]) * 1))
        return sum(known[1:])


def with_hooks(net, x, wanted, changed):
    """Return what hooks on the outputs see, in the order in which they are called, and the parameters' gradients."""
    net, seen = copy.deepcopy(net), {}

    def watch(index):
        def arrived(gradient):
            seen[index] = gradient.clone()
            return gradient * 2 if index in changed else None

        return lambda module, args, output: output.register_hook(arrived) and None

    for index in wanted:
        net.values[index].register_forward_hook(watch(index))
    (net(x) ** 2).sum().backward()
    return seen, {name: one.grad for name, one in net.named_parameters()}


@pytest.mark.parametrize("seed", range(60))
def test_a_block_sees_and_changes_what_hooks_do(seed):
    choose = random.Random(seed)
    net, x = seeded_graph(choose, seed)
    wanted = [index for index in range(len(net.values)) if choose.random() < 0.7]
    changed = {index for index in wanted if choose.random() < 0.4}
    expected, parameters = with_hooks(net, x, wanted, changed)
    model, found = nnsight.NNsight(net), {}
    with model.trace(x):
        values = [value.output for value in model.values]
        with (model.output**2).sum().backward():
            for index in expected:
                found[index] = values[index].grad.clone()
                if index in changed and choose.random() < 0.5:
                    values[index].grad = values[index].grad * 2
                elif index in changed:
                    values[index].grad.mul_(2)
    assert all(torch.equal(found[index], gradient) for index, gradient in expected.items())
    for name, one in net.named_parameters():
        assert (one.grad is None) == (parameters[name] is None)
        assert one.grad is None or torch.allclose(one.grad, parameters[name], atol=1e-5), name
    assert_idle(net)


@pytest.mark.parametrize("seed", range(60))
def test_in_any_order_a_gradient_is_right_or_an_error(seed):
    choose = random.Random(seed)
    net, x = seeded_graph(choose, seed)
    everything = range(len(net.values))
    expected, parameters = with_hooks(net, x, everything, ())
    model, missed = nnsight.NNsight(net), 0
    with model.trace(x):
        values = [value.output for value in model.values]
        with (model.output**2).sum().backward():
            for index in choose.sample([*expected], len(expected)):
                try:
                    found = values[index].grad
                except nnsight.OutOfOrderError:
                    missed += 1
                else:
                    assert torch.equal(found, expected[index])
    assert missed < len(expected)
    for name, one in net.named_parameters():
        assert one.grad is None or torch.allclose(one.grad, parameters[name], atol=1e-5), name


def seeded_graph(choose, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Graph(choose), rows(seed=seed)
