"""Operations over the passes of a run: steps, branches, loops, and what was not looked into from the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import NNsight, OutOfOrderError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if x.ndim == 2:
            x = torch.mul(x, 2)
        for index in range(2):
            x = torch.add(x, index)
        return self.second(x)


class Passes(nn.Module):
    """Calls its part five times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.part = Part()

    def forward(self, x):
        for _ in range(5):
            x = self.part(x)
        return x


def by_hand():
    """What each pass computes: of the call that always happens, of that under the branch, of both in the loop."""
    net, x = Passes().part, X
    tanhs, muls, adds = [], [], []
    for _ in range(5):
        tanhs.append(torch.tanh(net.first(x)))
        muls.append(tanhs[-1] * 2)
        adds += [muls[-1] + 0, muls[-1] + 1]
        x = net.second(adds[-1])
    return tanhs, muls, adds


@pytest.mark.parametrize("name", ["torch_tanh_0", "torch_mul_0"])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [0, 3], [2], [1, 4]])
def test_loop_over_steps_gives_the_pass_whenever_first_asked(name, chosen):
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        seen = []
        for step in tracer.iter[:5]:
            model.part.input
            if step in chosen:
                seen.append(getattr(model.part.source, name).output)
    expected = by_hand()[0 if name == "torch_tanh_0" else 1]
    assert len(seen) == len(chosen)
    assert all(torch.equal(got, expected[step]) for got, step in zip(seen, chosen, strict=True))


def test_pass_before_the_source_was_asked_for_is_out_of_order():
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        for _ in tracer.iter[2]:
            model.part.output
        with tracer.iter[1]:
            with pytest.raises(OutOfOrderError, match="has already passed it"):
                model.part.source.torch_tanh_0.output
            with pytest.raises(OutOfOrderError, match=r"had already made 3 passes over `Part.forward`"):
                model.part.source.torch_mul_0.output
        with tracer.iter[3]:
            third = model.part.source.torch_mul_0.output
    assert torch.equal(third, by_hand()[1][3])


def test_turn_of_a_loop_first_asked_for_in_a_later_step_is_an_error_that_says_how():
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        for step in tracer.iter[:3]:
            model.part.input
            if step == 2:
                with pytest.raises(OutOfOrderError, match=r"inside = model.part.source"):
                    model.part.source.torch_add_0.output


def test_source_taken_first_counts_the_turns_of_every_pass():
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        inside = model.part.source
        for step in tracer.iter[:3]:
            model.part.input
        with tracer.iter[7]:
            turn = inside.torch_add_0.output
    assert torch.equal(turn, by_hand()[2][7])


def test_after_a_loop_the_next_turn_is_meant():
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        for _ in tracer.iter[:2]:
            model.part.output
        turn = model.part.source.torch_add_0.output
        branch = model.part.source.torch_mul_0.output
    assert torch.equal(turn, by_hand()[2][4])
    assert torch.equal(branch, by_hand()[1][3])


def test_source_first_asked_for_inside_the_call_is_an_error_that_says_how():
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        model.part.first.output
        for name in ("torch_tanh_0", "torch_mul_0", "torch_add_0"):
            with pytest.raises(OutOfOrderError, match="inside `Part.forward` already .it stands at `model.part.first"):
                getattr(model.part.source, name).output
        tracer.next()
        second = model.part.source.torch_mul_0.output
    assert torch.equal(second, by_hand()[1][1])


def test_source_taken_first_is_looked_into_from_the_start():
    model = NNsight(Passes())
    with model.trace(X):
        inside = model.part.source
        model.part.first.output
        mul = inside.torch_mul_0.output
        turn = inside.torch_add_0.output
    assert torch.equal(mul, by_hand()[1][0])
    assert torch.equal(turn, by_hand()[2][0])


def test_turns_of_a_loop_are_counted_over_all_passes():
    model = NNsight(Passes())
    with model.trace(X) as tracer:
        turns = [model.part.source.torch_add_0.output for _ in tracer.iter[:]]
    expected = by_hand()[2]
    assert len(turns) == 10
    assert all(map(torch.equal, turns, expected))
