"""What a scan of a 12-layer GPT-2 takes, beside a forward of it under torch's own fake tensors, in one process.

Run it with `make bench`, or `python tests/benchmarks/bench_scan.py [--rounds N]`. The model has the size of the real
one and no weights. Figures are minimums over the rounds, in milliseconds, by the clock and by the process's own time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight import NNsight, save


def cases(net: nn.Module, ids: torch.Tensor) -> list[tuple[str, Callable[[], object]]]:
    model = NNsight(net)

    def scan() -> object:
        with model.scan(input_ids=ids):
            shape = save(model.transformer.h[5].output.shape)
            result = save(model.output.logits.shape)
        return shape, result

    def by_hand() -> object:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return net(input_ids=mode.from_tensor(ids)).logits.shape

    return [("scan", scan), ("torch's fake tensors", by_hand)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="how often each case is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.device("meta"):
        net = GPT2LMHeadModel(GPT2Config())
    ids = torch.arange(10)[None]
    print(f"{'case':32}{'first, ms':>12}{'ms':>8}{'own time':>10}")
    for is_training in (False, True):
        net.train(is_training)
        for name, function in cases(net, ids):
            clock, own = [], []
            for _ in range(options.rounds):
                start, start_own = time.perf_counter(), time.process_time()
                function()
                clock.append((time.perf_counter() - start) * 1e3)
                own.append((time.process_time() - start_own) * 1e3)
            shown = f"{name}, {'train' if is_training else 'eval'}"
            print(f"{shown:32}{clock[0]:12.0f}{min(clock):8.0f}{min(own):10.0f}")


if __name__ == "__main__":
    main()
