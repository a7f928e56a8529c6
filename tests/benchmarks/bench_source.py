"""What `.source` costs: a first look into GPT-2's attention, a second module of the class, a read, and idle.

Run it with `make bench`, or `python tests/benchmarks/bench_source.py [--rounds N]`. Costs of a look are given as times
and as multiples of compiling the same function's source once, reads as multiples of hooks written by hand, in one
process and interleaved; the figures are minimums over the rounds. On a shared machine read the ratios.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from torch import nn

from nnsight import NNsight

COLD = """
import time
from {here} import make
model = make()
attention = model.transformer.h[0].attn
import nnsight_source
start = time.perf_counter(), time.process_time()
attention.source.names
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""


def make(layers: int = 12) -> NNsight:
    """A random GPT-2 of twelve narrow layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_embd": 32, "n_head": 4, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
    return NNsight(GPT2LMHeadModel(GPT2Config(**sizes)).eval())


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def looks(rounds: int) -> None:
    """The first look into a function, and the first into another module of the class."""
    model = make()
    attentions = [block.attn for block in model.transformer.h]
    forward = inspect.unwrap(type(attentions[0]._module).forward)
    source = textwrap.dedent(inspect.getsource(forward))
    first, second, again, compiled = [], [], [], []
    for _ in range(rounds):
        # Code of its own: what is known is known by the code object.
        forward.__code__ = forward.__code__.replace()
        first.append(timed(lambda: attentions[0].source))
        compiled.append(timed(lambda: compile(ast.parse(source), "<string>", "exec")))
        for attention in attentions[1:]:
            second.append(timed(lambda module=attention: module.source))
        again.append(timed(lambda: attentions[0].source.self_c_proj_0))
    print(
        f"first look                 {min(first) * 1e3:8.2f} ms   {min(first) / min(compiled):5.1f} x compiling it once"
    )
    print(f"second module of the class {min(second) * 1e6:8.1f} us")
    print(f"an operation, again        {min(again) * 1e6:8.1f} us")


def cold(processes: int) -> None:
    """The first look that a process takes, the plugin being imported."""
    folder, name = os.path.split(os.path.abspath(__file__))
    code = COLD.format(here=name.removesuffix(".py"))
    found = []
    for _ in range(processes):
        run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        found.append([float(part) for part in run.stdout.split()[-2:]])
    wall, processor = (min(one[index] for one in found) for index in (0, 1))
    print(f"first look of a process    {wall * 1e3:8.2f} ms   {processor * 1e3:5.2f} ms of processor time")


class Block(nn.Module):
    """A forward of ten operations, hardly any arithmetic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y = scaled(y) + x
        return torch.tanh(y * 2) - y


def scaled(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 3)


def reads(rounds: int) -> None:
    """Traces that read operations, beside hooks on modules."""
    torch.manual_seed(0)
    net, x = nn.Sequential(*[Block(16) for _ in range(12)]).eval(), torch.randn(1, 16)
    model = NNsight(net)

    def hooks(count: int) -> None:
        seen: list[object] = []
        handles = [
            block.linear.register_forward_hook(lambda _module, _args, output: seen.append(output))
            for block in list(net)[:count]
        ]
        net(x)
        for handle in handles:
            handle.remove()

    def modules(count: int) -> None:
        with model.trace(x):
            for index in range(count):
                model[index].linear.output

    def operations(count: int) -> None:
        with model.trace(x):
            for index in range(count):
                model[index].source.torch_tanh_0.output

    def below(count: int) -> None:
        with model.trace(x):
            for index in range(count):
                model[index].source.scaled_0.source.torch_mul_0.output

    cases = {
        "hooks by hand": hooks, "modules in a trace": modules, "operations": operations, "operations of a call": below,
    }  # fmt: skip
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(rounds):
            times.setdefault("bare", []).append(timed(lambda: net(x)))
            for count in (1, 12):
                for name, case in cases.items():
                    times.setdefault(f"{count:2} {name}", []).append(timed(lambda case=case, count=count: case(count)))
    base = min(times.pop("bare"))
    print(f"bare forward               {base * 1e6:8.1f} us")
    for name, found in times.items():
        hand = min(times[f"{name[:2]} hooks by hand"]) - base
        above = min(found) - base
        print(f"{name:26} {above * 1e6:8.1f} us above it   {above / hand:6.1f} x the hooks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--processes", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    looks(given.rounds)
    cold(given.processes)
    reads(given.rounds)


if __name__ == "__main__":
    main()
