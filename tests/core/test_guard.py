"""Torch errors inside greenlets do not crash the process (notes on the cause: `nnsight/kernel/guard.py`)."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight.kernel import guard

FUZZ = Path(__file__).with_name("guard_fuzz.py")


def fuzz(*arguments):
    return subprocess.run(
        [sys.executable, str(FUZZ), *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.timeout(600)
def test_errors_in_greenlets_do_not_crash():
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda seed: fuzz(seed, "guarded"), range(20)))
    assert [(r.returncode, r.stdout) for r in results] == [(0, "ok\n")] * 20, [r.stderr[-500:] for r in results]


@pytest.mark.timeout(300)
def test_the_fuzz_crashes_without_the_guard():
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(fuzz, range(4)))
    assert -signal.SIGSEGV in [result.returncode for result in results]


def test_the_guard_changes_no_message():
    assert guard.install()
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied \(2x3 and 2x3\)$"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_error_deep_in_a_traced_model_is_raised_where_the_block_asked():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.inner = Deep(depth - 1) if depth else nn.Linear(3, 3)

        def forward(self, x):
            return sorted([0], key=lambda _: self.inner(x).sum().item())

    model = NNsight(Deep(20))
    for _ in range(10):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), model.trace(torch.ones(2, 4)):
            _ = model.output


def test_asking_for_backtraces_runs_the_model_in_a_thread():
    program = """
import threading, torch
from nnsight import NNsight
from nnsight.kernel import guard
model = NNsight(torch.nn.Linear(3, 3))
seen = []
model._module.register_forward_hook(lambda *_: seen.append(threading.get_ident()))
with model.trace(torch.ones(2, 3)):
    output = model.output
assert seen[0] != threading.get_ident()
assert torch.equal(output, model._module(torch.ones(2, 3)))
print(guard.status())
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=100, check=True, env={**os.environ, "TORCH_SHOW_CPP_STACKTRACES": "1"},
    )  # fmt: skip
    assert result.stdout.startswith("(False, 'TORCH_SHOW_CPP_STACKTRACES is set")
    assert "thread" in result.stdout
