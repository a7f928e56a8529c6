"""Loops over steps at random: each does at its steps what it says, and reads what plain Python computes there."""

import random

import pytest
import torch
from modules import WIDTH
from test_programs_property import ByHand, Leaf, Part, changed
from test_steps import Generating
from torch import nn

ACTIONS = ["read", "assign", "in place"]


class Once(Part):
    """Calls each of its children once, so that an occurrence is a step."""

    def __init__(self, choose, depth):
        nn.Module.__init__(self)
        deeper = [Once(choose, depth - 1) for _ in range(choose.randrange(2))] if depth else []
        self.children_ = nn.ModuleList([*deeper, *(Leaf() for _ in range(choose.randrange(1, 3)))])
        self.order = choose.sample(range(len(self.children_)), len(self.children_))
        self.is_residual = choose.random() < 0.5
        self.form = "tensor"


class Loop:
    """A loop as a program has it: which steps, and what is done in one; some of it is left out at some steps."""

    def __init__(self, choose, steps, count, locations):
        self.steps = steps
        self.numbers = {*range(*steps.indices(count))} if isinstance(steps, slice) else {*steps}
        chosen = sorted(choose.sample(range(len(locations)), choose.randrange(min(6, len(locations)))))
        self.requests = [(*locations[index], choose.choice(ACTIONS)) for index in chosen]
        self.left_out = {(step, i) for step in self.numbers for i in range(len(chosen)) if choose.random() < 0.2}

    def at(self, step):
        return [request for index, request in enumerate(self.requests) if (step, index) not in self.left_out]


class StepByStep(ByHand):
    """Runs a model for some steps and does what loops say."""

    def __init__(self, loops):
        self.loops, self.found = loops, []

    def generate(self, net, x, count):
        for step in range(count):
            self.step = step
            x = self.run(net, x)
        return x

    def at(self, path, port, value):
        for index, loop in enumerate(self.loops):
            requests = loop.at(self.step) if self.step in loop.numbers else []
            for action in [action for *where, action in requests if where == [path, port]]:
                self.found.append((index, self.step, value.clone()))
                if action == "assign":
                    value = changed(value)
                elif action == "in place":
                    value.mul_(0.5)
        return None, value


def locations_of(net):
    class Look(ByHand):
        def at(self, path, port, value):
            self.program.append((path, port))
            return None, value

    look = Look(random.Random(0), [])
    look.run(net, torch.rand(1, WIDTH))
    return look.program


def loops_at_random(choose, count, locations):
    """Return loops one after another, each over steps that come after those of the one before."""
    loops, start = [], 0
    while start < count and choose.random() < 0.8:
        stop = choose.randrange(start, count) + 1
        some = sorted(choose.sample(range(start, stop), choose.randrange(1, stop - start + 1)))
        steps = choose.choice(
            [some, slice(start, stop), slice(start, stop, choose.randrange(1, 4)), slice(start, None)]
        )
        loops.append(Loop(choose, steps, count, locations))
        start = count if isinstance(steps, slice) and steps.stop is None else stop
    return loops


def follow(model, tracer, loops):
    found = []
    for index, loop in enumerate(loops):
        for step in tracer.iter[loop.steps]:
            for path, port, action in loop.at(step):
                envoy = model.get(path) if path else model
                value = getattr(envoy, port)
                found.append((index, step, value.clone()))
                if action == "assign":
                    setattr(envoy, port, changed(value))
                elif action == "in place":
                    value.mul_(0.5)
    return found, tracer.result


def assert_same(got, expected):
    (found, result), (other, by_hand) = got, expected
    assert [where for *where, _ in found] == [where for *where, _ in other]
    for (*_, value), (*_, plain) in zip(found, other, strict=True):
        assert torch.allclose(value, plain, atol=1e-5)
    assert torch.allclose(result, by_hand, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(100))
def test_loops_do_at_their_steps_what_they_say_alone_and_in_invokes(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    net, count = Once(choose, 2).eval(), choose.randrange(1, 7)
    model, locations = Generating(net), locations_of(net)
    with torch.no_grad():
        plans = [loops_at_random(choose, count, locations) for _ in range(2)]
        inputs = [torch.rand(choose.randrange(1, 3), WIDTH) for _ in plans]
        expected, joint = [], {}
        for x, loops in zip(inputs, plans, strict=True):
            by_hand = StepByStep(loops)
            result = by_hand.generate(net, x.clone(), count)
            expected.append((by_hand.found, result))
            with model.generate(x.clone(), steps=count) as tracer:
                alone = follow(model, tracer, loops)
            assert_same(alone, expected[-1])
        with model.generate(steps=count) as tracer:
            for index, (x, loops) in enumerate(zip(inputs, plans, strict=True)):
                with tracer.invoke(x.clone()):
                    joint[index] = follow(model, tracer, loops)
    for index, plain in enumerate(expected):
        assert_same(joint[index], plain)
