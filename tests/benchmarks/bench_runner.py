"""What a block in a runner costs: a job in all, the memory of its process, a round trip, a large activation.

Times are minima over jobs in one process; the memory is what the kernel counts as private to the runner.
"""

from __future__ import annotations

import os
import threading
import time

import psutil
import torch
from torch import nn

from nnsight import NNsight

JOBS = 20


def private_memory() -> int:
    """Return the bytes private to the innermost process below this one."""
    found = [process for process in psutil.Process().children(recursive=True) if not process.children()]
    runner = max(found, key=lambda process: process.create_time())
    with open(f"/proc/{runner.pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private"))


def main() -> None:
    net = NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    large, activation = NNsight(nn.Sequential(nn.Identity())), torch.zeros(2048, 4096, dtype=torch.bfloat16)
    jobs, trips, reads, memory = [], [], [], []
    for _ in range(JOBS):
        start = time.perf_counter()
        with net.trace(x, remote="local"):
            hidden = net[0].output
            result = (hidden + 1).save()
        jobs.append(time.perf_counter() - start)
        assert result.shape == (3, 8)
    for _ in range(3):
        with net.trace(x, remote="local"):
            import time as clock

            begin = clock.perf_counter()
            for _ in range(200):
                net[0].in_features
            trip = ((clock.perf_counter() - begin) / 200).save()
        trips.append(trip)
        with large.trace(activation, remote="local"):
            import time as clock

            begin = clock.perf_counter()
            large[0].output
            read = (clock.perf_counter() - begin).save()
        reads.append(read)
    watch = threading.Timer(0.5, lambda: memory.append(private_memory()))
    watch.start()
    with net.trace(x, remote="local"):
        import time as clock

        net[0].output
        clock.sleep(1)
    watch.join()
    print(f"a job in all            {min(jobs) * 1e3:8.1f} ms   (at most 60)")
    print(f"private memory          {memory[0] / (1 << 20):8.1f} MB   (at most 5)")
    print(f"a message and its answer{min(trips) * 1e6:8.1f} us")
    print(f"16 MB of activations    {min(reads) * 1e3:8.1f} ms")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main()
