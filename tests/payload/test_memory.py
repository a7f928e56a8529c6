"""A large tensor is in memory once on its way: it is written as it goes, and read to where it will be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZE, ROOM = 96 << 20, 12 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """Bytes in use at the most, beyond those before, by step: in a process of its own."""
    folder = tmp_path_factory.mktemp("sent")
    program = Path(__file__).with_name("memory.py")
    done = subprocess.run([sys.executable, str(program), str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert min((folder / name).stat().st_size for name in ("results", "run")) > SIZE  # it does travel
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", ["write results", "write a run", "open a run"])
def test_step_takes_no_second_copy(taken, step):
    assert taken[step] < ROOM


@pytest.mark.parametrize("step", ["read results", "read a run"])
def test_reading_takes_the_tensor_and_nothing_more(taken, step):
    assert SIZE <= taken[step] < SIZE + ROOM


def test_part_with_gaps_takes_what_is_in_it(taken):
    assert taken["write a strided part"] < SIZE // 2 + ROOM
