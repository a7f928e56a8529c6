"""What a trace costs above the bare forward, beside hooks written by hand, in one process and interleaved.

Run it with `make bench`, or `python tests/benchmarks/bench_trace.py [--rounds N]`. Each case is timed in
turn with the bare forward of the same model; the figures are minimums over the rounds, in microseconds. On a shared
machine read the ratios, not the figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from nnsight import NNsight

Case = tuple[str, Callable[[], object], Callable[[], object]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.relu(self.attn(x)))


class Toy(nn.Module):
    """12 blocks of two 16-wide linears: 38 modules, hardly any arithmetic."""

    def __init__(self, width: int = 16, count: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def hooked(net: nn.Module, x: torch.Tensor, modules: list[nn.Module], hook: Callable[..., object]) -> list[object]:
    """Run a forward with a hook on each module, registered and removed."""
    seen: list[object] = []
    handles = [module.register_forward_hook(lambda _m, _a, output: hook(seen, output)) for module in modules]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def inline_cases(net: Toy, x: torch.Tensor) -> list[Case]:
    model = NNsight(net)
    envoys = [part for layer in model.layers for part in (layer.attn, layer.mlp, layer)]
    modules = [envoy._module for envoy in envoys]
    zero = torch.zeros_like(net(x))

    def read_output() -> object:
        with model.trace(x):
            output = model.output
        return output

    def read_all() -> object:
        with model.trace(x):
            outputs = [envoy.output for envoy in envoys]
        return outputs

    def replace() -> None:
        with model.trace(x):
            for layer in model.layers:
                layer.output = zero

    def keep(seen: list[object], output: object) -> None:
        seen.append(output)

    return [
        ("read the output", read_output, lambda: hooked(net, x, [net], keep)),
        ("read 36 locations", read_all, lambda: hooked(net, x, modules, keep)),
        ("replace 12 outputs", replace, lambda: hooked(net, x, list(net.layers), lambda _seen, _output: zero)),
        ("idle, wrapped", lambda: net(x), lambda: net(x)),
    ]


def invoke_cases(net: Toy, x: torch.Tensor) -> list[Case]:
    model = NNsight(net)

    def invokes(count: int) -> Callable[[], object]:
        def run() -> object:
            with model.trace() as tracer:
                outputs = []
                for _ in range(count):
                    with tracer.invoke(x[:1]):
                        outputs.append(model.layers[6].output)
            return outputs

        return run

    def by_hand(count: int) -> Callable[[], object]:
        rows = x[:1].repeat(count, 1, 1)

        def split(seen: list[object], output: torch.Tensor) -> None:
            seen.extend(output[i : i + 1] for i in range(count))

        return lambda: hooked(net, rows, [net.layers[6]], split)

    return [(f"{count} invokes", invokes(count), by_hand(count)) for count in (1, 4, 64)]


def minima(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the least time of each function, called in turn, in nanoseconds."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start = time.perf_counter_ns()
            function()
            best[index] = min(best[index], time.perf_counter_ns() - start)
    return best


def measure(cases: list[Case], bare: Callable[[], object], rounds: int, what: str = "forward") -> None:
    """Print what each case costs above the bare function, beside hooks that do the same, and the ratio of the two."""
    best = minima([bare, *(function for _, ours, hooks in cases for function in (ours, hooks))], rounds)
    print(f"bare {what} {best[0] / 1e3:.0f} us; above it, in us:")
    print(f"{'case':26}{'nnsight':>10}{'hooks':>10}{'ratio':>8}")
    for number, (name, _, _) in enumerate(cases):
        ours, hooks = (best[i] - best[0] for i in (1 + 2 * number, 2 + 2 * number))
        ratio = f"{ours / hooks:8.2f}" if hooks > 0 else ""
        print(f"{name:26}{ours / 1e3:10.1f}{hooks / 1e3:10.1f}{ratio}")


def wrapping() -> None:
    big = nn.ModuleList([nn.Sequential(*[nn.Identity() for _ in range(9)]) for _ in range(500)])
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter_ns()
        NNsight(big)
        best = min(best, time.perf_counter_ns() - start)
    print(f"wrap 5,001 modules: {best / 1e6:.1f} ms")


def importing() -> None:
    program = "import time; start = time.perf_counter(); import nnsight; print(time.perf_counter() - start)"
    seconds = min(
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )
    print(f"import nnsight: {seconds * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="how often each case is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = Toy().eval(), torch.randn(2, 4, 16)
    with torch.no_grad():
        measure(inline_cases(net, x), lambda: net(x), options.rounds)
        measure(invoke_cases(net, x), lambda: net(x), max(1, options.rounds // 10))
    wrapping()
    importing()


if __name__ == "__main__":
    main()
