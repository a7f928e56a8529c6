"""What `tracer.cache()` costs above the bare forward, beside hooks that keep copies by name, in one process.

Run it with `make bench`, or `python tests/benchmarks/bench_cache.py [--rounds N]`. The model is the toy of
`bench_trace.py`: 38 modules, 37 of them called. Figures are minimums over the rounds, in microseconds above the bare
forward; on a shared machine read the ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench_trace import Case, Toy, measure
from torch import nn

from nnsight import NNsight


def hooked(net: nn.Module, x: torch.Tensor, with_inputs: bool, dtype: torch.dtype | None) -> dict[str, object]:
    """Run a forward with a hook on each module that keeps a copy of what it gives, by name."""
    kept: dict[str, object] = {}

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if dtype is None else tensor.detach().to("cpu", dtype, copy=True)

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if with_inputs:
                kept[f"{name}.input"] = tuple(copy_of(arg) for arg in args)
            kept[name] = copy_of(output)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in net.named_modules()]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def cases(net: Toy, x: torch.Tensor) -> list[Case]:
    model = NNsight(net)

    def cached(**options: object) -> Callable[[], object]:
        def run() -> object:
            with model.trace(x) as tracer:
                cache = tracer.cache(**options)
            return cache

        return run

    return [
        ("outputs of all modules", cached(), lambda: hooked(net, x, False, None)),
        ("and their inputs", cached(include_inputs=True), lambda: hooked(net, x, True, None)),
        ("as bfloat16", cached(dtype=torch.bfloat16), lambda: hooked(net, x, False, torch.bfloat16)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="how often each case is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = Toy().eval(), torch.randn(2, 4, 16)
    for context, name in ((torch.no_grad(), "without gradients"), (torch.enable_grad(), "with gradients")):
        with context:
            print(name)
            measure(cases(net, x), lambda: net(x), options.rounds)


if __name__ == "__main__":
    main()
