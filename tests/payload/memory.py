"""How much memory a large tensor takes on its way, as JSON: `python memory.py folder`.

Of each step, how many bytes more than before it were in use at the most, as the system counts them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from nnsight import Capture, NNsight, payload

SIZE = 96 << 20


def status(name):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) << 10


def taken(step, *args):
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest number so far begins anew
    result = step(*args)
    return status("VmHWM") - before, result


def save(parts, path):
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)


def read(kind, path):
    with open(path, "rb") as file:
        return kind(file)


class Sent(Capture):
    what = "trace"

    def __init__(self, envoy, path, *args):
        self.envoy, self.path, self.arguments = envoy, path, (args, {})

    def _captured(self, block):
        parts = payload.write_run(self.envoy, "trace", self.arguments, block.scope)
        self.taken, _ = taken(save, parts, self.path)


def main(folder):
    torch.set_num_threads(1)
    model = NNsight(nn.Linear(4, 4))
    # Bytes that cannot be compressed: what is sent is as large as what it is made of.
    large = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    save(payload.write_results({"small": large[:10]}), folder / "small")
    read(payload.Results, folder / "small")  # whatever is done once, is done
    found = {}
    found["write results"], _ = taken(lambda: save(payload.write_results({"large": large}), folder / "results"))
    turned = large.view(-1, 2)[:, 0]
    found["write a strided part"], _ = taken(lambda: save(payload.write_results({"part": turned}), folder / "part"))
    sent = Sent(model, folder / "run", large)
    with sent:
        total = model.output + large.sum()  # noqa: F841
    found["write a run"] = sent.taken
    found["read results"], results = taken(read, payload.Results, folder / "results")
    assert torch.equal(results.values["large"], large)
    del results
    found["read a run"], run = taken(read, payload.Run, folder / "run")
    found["open a run"], opened = taken(lambda: run.open(model.get, None, called=lambda name: "<sent>"))
    assert torch.equal(opened.values["arguments"][0][0], large)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
