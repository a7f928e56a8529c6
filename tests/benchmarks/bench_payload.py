"""What a trace of a 12-layer GPT-2 is as a payload: its size, and the time to write and to read it.

Writing is from the captured block to bytes; reading from bytes to a block that can be run, the model checked. Each turn
has code of its own, as each program that is run has: nothing is remembered of the one before. Beside it, what one
would write by hand for this very block: its source, the values that it names, and the arguments, as JSON and
safetensors, compressed; read, parsed and compiled. And all of it as cloudpickle has it, where that is installed.

Minima and medians over turns in one process, taken in turns.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import linecache
import statistics
import textwrap
import time

import torch
from safetensors.torch import load, save
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight import Capture, LanguageModel, payload
from nnsight.payload.container import zstd

TURNS = 200
BODY = """
        hidden = model.transformer.h[5].output.save()
        model.transformer.h[6].output[:, -1] += steering
        logits = model.lm_head.output[:, -1].save()
        result = tracer.result.save()
"""
PROGRAM = f"""
def program(model, ids, steering, writing):
    with writing as tracer:
{BODY.strip(chr(10))}
"""


class Writing(Capture):
    """A `with` item that makes its body a payload."""

    what = "trace"

    def __init__(self, envoy, *args):
        self.envoy, self.arguments = envoy, (args, {})

    def _captured(self, block):
        start = time.perf_counter()
        self.bytes = b"".join(payload.write_run(self.envoy, "trace", self.arguments, block.scope))
        self.time = time.perf_counter() - start


def fresh(turn):
    """The program, as a file of its own."""
    name = f"<program {turn}>"
    linecache.cache[name] = (len(PROGRAM), None, PROGRAM.splitlines(keepends=True), name)
    namespace = {}
    exec(compile(PROGRAM, name, "exec"), namespace)
    return namespace["program"]


def write_by_hand(ids, steering):
    start = time.perf_counter()
    header = json.dumps({"source": BODY, "names": ["steering"], "method": "trace", "arguments": ["ids"]}).encode()
    content = len(header).to_bytes(4, "little") + header + save({"ids": ids, "steering": steering})
    sent = zstd().compress(content)
    return sent, time.perf_counter() - start


def read_by_hand(sent):
    start = time.perf_counter()
    content = zstd().decompress(sent)
    size = int.from_bytes(content[:4], "little")
    header, tensors = json.loads(content[4 : 4 + size]), load(content[4 + size :])
    code = compile(ast.parse(textwrap.dedent(header["source"])), "<sent>", "exec")
    assert code and tensors
    return time.perf_counter() - start


def read(sent, model):
    start = time.perf_counter()
    run = payload.Run(sent)
    run.check(model)
    run.open(model.get, None, called=lambda name: "<sent>")
    return time.perf_counter() - start


def told(what, times, limit=""):
    low, middle = min(times) * 1e3, statistics.median(times) * 1e3
    print(f"{what:26} {low:7.2f} ms   median {middle:.2f}, the first {times[0] * 1e3:.2f}   {limit}")


def main() -> None:
    torch.set_num_threads(1)
    config = GPT2Config(n_layer=12, n_embd=48, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2)
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    ids, steering = torch.tensor([[5, 6, 7, 8]]), torch.randn(48)
    ways = {"write": [], "write by hand": [], "read": [], "read by hand": []}
    for turn in range(TURNS):
        writing = Writing(model, ids)
        fresh(turn)(model, ids, steering, writing)
        ways["write"].append(writing.time)
        by_hand, taken = write_by_hand(ids, steering)
        ways["write by hand"].append(taken)
        ways["read"].append(read(writing.bytes, model))
        ways["read by hand"].append(read_by_hand(by_hand))
    print(f"size {len(writing.bytes)} bytes (at most 2048), by hand {len(by_hand)}")
    if importlib.util.find_spec("cloudpickle") is not None:
        import cloudpickle

        print(f"     {len(cloudpickle.dumps([fresh(TURNS), ids, steering]))} as cloudpickle, without the model")
    for way, times in ways.items():
        told(way, times, "(at most 1)" if "hand" not in way else "")


if __name__ == "__main__":
    main()
