"""Models and programs at random: what blocks read, and what the run returns, is what plain Python computes by hand."""

import random

import pytest
import torch
from modules import WIDTH
from torch import nn

from nnsight import NNsight


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Part(nn.Module):
    """Calls its children in a random order, some of them twice, and gives a tensor, a tuple or a dict."""

    def __init__(self, choose, depth):
        super().__init__()
        deeper = [Part(choose, depth - 1) for _ in range(choose.randrange(2))] if depth else []
        self.children_ = nn.ModuleList([*deeper, *(Leaf() for _ in range(choose.randrange(1, 3)))])
        self.order = [choose.randrange(len(self.children_)) for _ in range(choose.randrange(1, 5))]
        self.is_residual = choose.random() < 0.5
        self.form = choose.choice(["tensor", "tuple", "dict"])

    def forward(self, x):
        for index in self.order:
            x = self.after(x, self.children_[index](x))
        return self.given(x)

    def after(self, x, value):
        return x + tensor_in(value) if self.is_residual else tensor_in(value)

    def given(self, x):
        return {"tensor": x, "tuple": (x, x * 0.5), "dict": {"x": x, "n": 3}}[self.form]


def tensor_in(value):
    return value[0] if isinstance(value, tuple) else value["x"] if isinstance(value, dict) else value


def mapped(value, function):
    if isinstance(value, tuple):
        return tuple(mapped(item, function) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value


def changed(tensor):
    return tensor * 1.5 + 0.1


class ByHand:
    """Runs a model call by call, decides at random what a program does at each location, and does it."""

    def __init__(self, choose, actions):
        self.choose, self.actions = choose, actions
        self.program, self.found, self.counts = [], [], {}

    def run(self, module, x, path=""):
        action, x = self.at(path, "input", x)
        if action == "skip":
            value = torch.sin(x)
        elif isinstance(module, Part):
            for index in module.order:
                x = module.after(x, self.run(module.children_[index], x, f"{path}.children_.{index}".lstrip(".")))
            value = module.given(x)
        elif isinstance(module, Leaf):
            value = torch.tanh(self.run(module.linear, x, f"{path}.linear"))
        else:
            value = module(x)
        return self.at(path, "output", value)[1]

    def at(self, path, port, value):
        occurrence = self.counts[path, port] = self.counts.get((path, port), -1) + 1
        can_skip = port == "input" and path
        chosen = [action for action in self.actions if action != "skip" or can_skip]
        if self.choose.random() < 0.6:
            return None, value
        action = self.choose.choice(chosen)
        self.program.append((path, port, occurrence, action))
        self.found.append(mapped(value, torch.clone))
        if action in ("assign", "assign and change"):
            value = mapped(value, changed)
        if action in ("in place", "assign and change"):
            tensor_in(value).mul_(0.5)
        if action == "assign and change":
            self.found.append(mapped(value, torch.clone))
            tensor_in(value).add_(0.25)
        return action, value


def follow(model, tracer, program):
    """Do in a block what a program says; return what was read."""
    found = []
    for path, port, occurrence, action in program:
        envoy = model.get(path) if path else model
        for _ in tracer.iter[occurrence]:
            value = getattr(envoy, port)
            found.append(mapped(value, torch.clone))
            if action in ("assign", "assign and change"):
                value = mapped(value, changed)
                setattr(envoy, port, value)
            if action == "assign and change":
                tensor_in(value).mul_(0.5)
                assert getattr(envoy, port) is value
                found.append(mapped(value, torch.clone))
                setattr(envoy, port, value)
                tensor_in(value).add_(0.25)
            elif action == "in place":
                tensor_in(value).mul_(0.5)
            elif action == "skip":
                envoy.skip(torch.sin(value))
    return found


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(other, torch.Tensor):
            assert one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
        elif isinstance(other, (tuple, list)):
            assert_same(list(one), list(other))
        elif isinstance(other, dict):
            assert one.keys() == other.keys()
            assert_same(list(one.values()), list(other.values()))
        else:
            assert one == other


def made(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    return choose, Part(choose, 2).eval()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("seed", range(100))
def test_a_program_reads_and_does_what_it_says(seed):
    choose, net = made(seed)
    model, x = NNsight(net), torch.rand(2, WIDTH)
    by_hand = ByHand(choose, ["read", "assign", "assign and change", "in place", "skip"])
    expected = by_hand.run(net, x.clone())
    with model.trace(x.clone()) as tracer:
        found = follow(model, tracer, by_hand.program)
        result = tracer.result
    assert_same(found, by_hand.found)
    assert_same([result], [expected])


@pytest.mark.parametrize("seed", range(100))
def test_programs_that_share_a_forward_do_what_each_does_alone(seed):
    choose, net = made(seed)
    model = NNsight(net)
    inputs = [torch.rand(choose.randrange(1, 4), WIDTH) for _ in range(3)]
    alone = [ByHand(choose, ["read", "assign", "assign and change", "in place"]) for _ in inputs]
    expected = [one.run(net, x.clone()) for one, x in zip(alone, inputs, strict=True)]
    found, results = {}, {}
    with model.trace() as tracer:
        for index, (x, one) in enumerate(zip(inputs, alone, strict=True)):
            with tracer.invoke(x.clone()):
                found[index] = follow(model, tracer, one.program)
                results[index] = tracer.result
    for index, one in enumerate(alone):
        assert_same(found[index], one.found)
        assert_same([results[index]], [expected[index]])
