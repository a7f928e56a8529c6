"""Large results come in parts: more than the window holds, once in memory; only the next part is ever taken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nnsight_ndif import Limits, Local
from nnsight_ndif.errors import FrameError
from nnsight_ndif.parts import Parts

MEMORY = """
import json, torch
from nnsight import NNsight

SIZE = 192 << 20

def status(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1]) << 10

torch.set_num_threads(1)
net = NNsight(torch.nn.Linear(2, 2))
x = torch.ones(1, 2)
with net.trace(x, remote="local"):
    small = torch.ones(9 << 20, dtype=torch.uint8).save()
del small
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
with net.trace(x, remote="local"):
    large = torch.arange(SIZE // 4, dtype=torch.int32).save()
taken = status("VmHWM") - before
assert torch.equal(large, torch.arange(SIZE // 4, dtype=torch.int32))
print(json.dumps([SIZE, taken]))
"""


def test_large_result_is_in_memory_once(tmp_path):
    (tmp_path / "program.py").write_text(MEMORY)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    size, taken = json.loads(done.stdout)
    assert size <= taken < size + (48 << 20)


def test_result_may_be_larger_than_the_window(net, x):
    limits = Limits(window=4 << 20)
    with net.trace(x, backend=Local(limits)):
        large = torch.arange(5 << 20, dtype=torch.int32).save()
        views = [large[7:9], large.view(5, -1)[:, 3]].save()
        many = [torch.full((1 << 18,), float(number)) for number in range(20)].save()
        hidden = net[0].output.save()
    assert torch.equal(large, torch.arange(5 << 20, dtype=torch.int32))
    assert torch.equal(views[1], large.view(5, -1)[:, 3])
    views[0].zero_()
    assert large[6:10].tolist() == [6, 0, 0, 9]
    assert all(bool(part.eq(number).all()) for number, part in enumerate(many))
    assert torch.equal(hidden, net._module[0](x))


def test_edit_in_place_and_large_result_come_together(net, x):
    with torch.no_grad(), net.session(remote="local"):
        with net.trace(x):
            hidden = net[0].output
        hidden[:, 0] = 7
        hidden.save()
        large = torch.ones(12 << 20, dtype=torch.uint8).save()
    expected = net._module[0](x).detach()
    expected[:, 0] = 7
    assert torch.equal(hidden, expected)
    assert bool(large.eq(1).all()) and len(large) == 12 << 20


def part(count, dtype=torch.uint8):
    return torch.ones(count, dtype=dtype)


def test_parts_become_one():
    parts = Parts(100)
    for request in ([0, 5, 0, part(2)], [3, 4, 0, part(4)], [0, 5, 2, part(3)]):
        parts.take(request, lambda data: data)
    assert parts.get(0).tolist() == [1] * 5 and len(parts.get(3)) == 4
    assert parts.get(1) is None and parts.get("0") is None


@pytest.mark.parametrize(
    "requests",
    [
        [None], [[]], [[0, 5, 1, part(2)]], [[0, 0, 0, part(1)]], [[0, -3, 0, part(1)]], [["0", 5, 0, part(1)]],
        [[0, 5, 0, part(6)]], [[0, 5, 0, part(2)], [0, 5, 0, part(2)]], [[0, 5, 0, part(2)], [0, 50, 2, part(20)]],
        [[0, 5, 0, part(5)], [0, 5, 5, part(1)]], [[0, 5, 0, part(0)]], [[0, 5, 0, part(2, torch.int32)]],
        [[0, 5, 0, part(4).view(2, 2)]], [[0, 5, 0, 3]], [[0, 101, 0, part(1)]], [[0, 1 << 62, 0, part(1)]],
        [[0, 60, 0, part(1)], [1, 60, 0, part(1)]],
    ],
    ids=lambda requests: str([[str(item)[:20] for item in request or ()] for request in requests]),
)  # fmt: skip
def test_part_that_is_not_the_next_one_is_refused(requests):
    parts = Parts(100)
    with pytest.raises(FrameError):
        for request in requests:
            parts.take(request, lambda data: data)


def test_missing_part_is_noticed():
    parts = Parts(100)
    parts.take([0, 5, 0, part(2)], lambda data: data)
    with pytest.raises(FrameError, match="missing"):
        parts.get(0)
