"""Ctrl-C at any moment of a trace: it arrives as what it is, nothing hangs, and the model is as it was.

What cannot be prevented in Python is an interrupt at the first instruction of an `__exit__`: a block is then left open
until the next one is opened.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modules import Net, rows, seeded

from nnsight import NNsight
from nnsight.kernel.blocks import open_blocks
from nnsight.tracing.tracer import Tracer

SWEEP = Path(__file__).with_name("interrupt_sweep.py")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.skipif(
    os.environ.get("NNSIGHT_MODEL_SIDE") == "thread",
    reason="starting a thread cannot be interrupted safely: Python's own threading then raises a RuntimeError",
)
@pytest.mark.parametrize("program", ["inline", "early", "invokes", "steps", "edited", "gradient"])
def test_an_interrupt_at_any_moment_leaves_the_model_usable(program):
    ran = subprocess.run([sys.executable, str(SWEEP), program, "4"], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    hits, weights = ran.stdout.split()
    assert int(hits) > 50
    if program != "gradient":  # the thread of an interrupted pass may keep what it was given
        assert weights == "freed"


def test_a_block_left_open_is_closed_when_the_next_one_is_opened(monkeypatch):
    model, x = NNsight(seeded(Net)), rows()

    def interrupt(*_):  # at the first instruction of `__exit__`
        raise KeyboardInterrupt

    def leave_open():
        with model.trace(x):
            _ = model.h[0].output

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tracer, "__exit__", interrupt)
        leave_open()
    assert len(open_blocks) == 1
    with model.trace(x):
        _ = model.h[1].output
    assert not open_blocks
    assert "_compiled_call_impl" not in vars(model._module.lm_head)


def test_blocks_entered_through_an_exit_stack_stay_open():
    model, other, x = NNsight(seeded(Net)), NNsight(seeded(Net)), rows()
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(model.trace(x))
        first = model.h[0].output
        with other.trace(x):
            assert torch.equal(other.h[0].output, first)
        assert torch.equal(tracer.result, model._module(x))


def test_blocks_that_are_only_suspended_stay_open():
    model, x = NNsight(seeded(Net)), rows()
    expected = model._module(x)

    def generator():
        with model.trace(x) as tracer:
            _ = model.h[0].output
            yield
            yield tracer.result

    async def task():
        with model.trace(x) as tracer:
            _ = model.h[0].output
            await asyncio.sleep(0)
            return tracer.result

    async def two():
        return await asyncio.gather(task(), task())

    first = generator()
    next(first)
    results = asyncio.run(two())
    assert all(torch.equal(result, expected) for result in (*results, next(first)))
    first.close()
    assert not open_blocks
