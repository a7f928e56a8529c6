"""What a gradient costs above a bare forward and backward, beside hooks written by hand, interleaved in one process.

Run it with `python tests/benchmarks/bench_gradients.py [--rounds N]`. Figures are minimums over the rounds, in
microseconds. On a shared machine read the ratios, not the figures. The last line is what the wrapped `Tensor.backward`
adds to a call of its own, as a program that wraps a model and then trains another pays it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bench_trace import Case, Toy, measure

from nnsight import NNsight


def cases(net: Toy, x: torch.Tensor) -> list[Case]:
    model = NNsight(net)
    layers = list(model.layers)

    def by_hand(indices: list[int], change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[object]:
        """Keep the gradients of some layers, with hooks registered and removed."""
        kept: list[torch.Tensor] = []

        def keep(_module: object, _args: object, output: torch.Tensor) -> None:
            output.retain_grad()
            if change is not None:
                output.register_hook(change)  # type: ignore[no-untyped-call]
            kept.append(output)

        handles = [net.layers[index].register_forward_hook(keep) for index in indices]
        net(x).sum().backward()
        for handle in handles:
            handle.remove()
        return [one.grad for one in kept]

    def one() -> object:
        with model.trace(x):
            hidden = layers[6].output
            with model.output.sum().backward():
                gradient = hidden.grad
        return gradient

    def after() -> object:
        with model.trace(x):
            hidden = layers[6].output
            loss = model.output.sum()
        with loss.backward():
            gradient = hidden.grad
        return gradient

    def every() -> object:
        with model.trace(x):
            hidden = [layer.output for layer in layers]
            with model.output.sum().backward():
                gradients = [value.grad for value in reversed(hidden)]
        return gradients

    def changed() -> None:
        with model.trace(x):
            hidden = layers[6].output
            with model.output.sum().backward():
                hidden.grad = hidden.grad * 2

    def ordinary() -> object:
        with model.trace(x):
            hidden = layers[6].output
            hidden.retain_grad()
            model.output.sum().backward()
        return hidden.grad

    return [
        ("one gradient", one, lambda: by_hand([6])),
        ("one, after the trace", after, lambda: by_hand([6])),
        ("one, plain backward", ordinary, lambda: by_hand([6])),
        ("one, changed", changed, lambda: by_hand([6], lambda gradient: gradient * 2)),
        ("twelve gradients", every, lambda: by_hand(list(range(12)))),
    ]


def plain_backward(plain: Callable[..., object], rounds: int) -> None:
    """Time `t.backward()` of a scalar leaf with what torch has and with what stands there after a wrap."""
    wrapped = torch.Tensor.backward
    leaf = torch.zeros((), requires_grad=True)
    best = {plain: float("inf"), wrapped: float("inf")}
    for _ in range(rounds):
        for function in best:
            torch.Tensor.backward = function  # type: ignore[method-assign, assignment]
            start = time.perf_counter_ns()
            for _ in range(20):
                leaf.backward()
            best[function] = min(best[function], (time.perf_counter_ns() - start) / 20)
    torch.Tensor.backward = wrapped  # type: ignore[method-assign]
    print(f"plain backward: {best[plain] / 1e3:.2f} us; wrapped, {best[wrapped] / 1e3:.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="how often each case is timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = torch.Tensor.backward
    net, x = Toy().eval(), torch.randn(2, 4, 16)
    measure(cases(net, x), lambda: net(x).sum().backward(), options.rounds, "forward and backward")
    plain_backward(plain, options.rounds)


if __name__ == "__main__":
    main()
