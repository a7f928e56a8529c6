"""What a trace of a 12-layer GPT-2 is as a payload: its size, and the time to write and to read it.

Writing is from the captured block to bytes; reading from bytes to a block that can be run, the model checked. Minima
over rounds in one process.
"""

# ruff: noqa: F841 - what a block binds is looked up by name

from __future__ import annotations

import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight import Capture, LanguageModel, payload

ROUNDS = 200


class Writing(Capture):
    """A `with` item that makes its body a payload, again and again."""

    what = "trace"

    def __init__(self, envoy, *args):
        self.envoy, self.arguments = envoy, (args, {})

    def _captured(self, block):
        self.times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            self.bytes = b"".join(payload.write_run(self.envoy, "trace", self.arguments, block.scope))
            self.times.append(time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(1)
    config = GPT2Config(n_layer=12, n_embd=48, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2)
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    ids = torch.tensor([[5, 6, 7, 8]])
    steering = torch.randn(48)
    writing = Writing(model, ids)
    with writing as tracer:
        hidden = model.transformer.h[5].output.save()
        model.transformer.h[6].output[:, -1] += steering
        logits = model.lm_head.output[:, -1].save()
        result = tracer.result.save()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run = payload.Run(writing.bytes)
        run.check(model)
        run.open(model.get, None, called=lambda name: "<sent>")
        times.append(time.perf_counter() - start)
    print(f"size     {len(writing.bytes):8d} bytes  (at most 2048)")
    print(f"writing  {min(writing.times) * 1e3:8.2f} ms     (at most 1; the first {writing.times[0] * 1e3:.2f})")
    print(f"reading  {min(times) * 1e3:8.2f} ms     (at most 1; the first {times[0] * 1e3:.2f})")


if __name__ == "__main__":
    main()
