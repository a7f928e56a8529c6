"""What captured blocks cost: invokes, blocks seen for the first time, steps of a generation, writes of many invokes.

Run it with `make bench`, or `python tests/benchmarks/bench_captured.py [--rounds N] [--only NAME]`. What is compared is
timed in turn, in one process; the figures are minimums over the rounds, in microseconds of the processor's time, which
other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_trace import Toy, hooked
from torch import nn

from nnsight import NNsight

COUNTS = (1, 4, 16, 64)
NEW_TOKENS = 64
_BLOCK = """
def seen_{number}(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            hidden = model.{first}.output
            scale = hidden.abs().mean()
            model.{second}.output = hidden / scale
    return scale

"""


def minimums(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the least time that each function took, in microseconds; they are called in turn."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start = time.process_time_ns()
            function()
            best[index] = min(best[index], (time.process_time_ns() - start) / 1e3)
    return best


def per_further(costs: Sequence[float]) -> str:
    """Return what each further invoke costs, from the costs of `COUNTS` invokes."""
    further = [(b - a) / (n - m) for a, b, m, n in zip(costs, costs[1:], COUNTS, COUNTS[1:], strict=False)]
    return f"{(costs[-1] - costs[0]) / (COUNTS[-1] - 1):8.1f}   (" + " ".join(f"{one:.1f}" for one in further) + ")"


def invokes(model: Any, layer: Any, x: torch.Tensor, *, inputs: bool, write: bool) -> list[Callable[[], object]]:
    """Return traces of so many invokes; without `inputs` all but the first see the whole batch."""

    def trace(count: int) -> Callable[[], object]:
        def run() -> object:
            with model.trace() as tracer:
                outputs = []
                for turn in range(count):
                    given = (x,) if inputs or not turn else ()
                    with tracer.invoke(*given):
                        output = layer.output
                        outputs.append(output)
                        if write:
                            layer.output = output * 2
            return outputs

        return run

    return [trace(count) for count in COUNTS]


def by_hand(net: nn.Module, layer: nn.Module, x: torch.Tensor, *, write: bool) -> list[Callable[[], object]]:
    """Return the same work with one hook on the joint batch."""

    def forward(count: int) -> Callable[[], object]:
        batch = x.repeat(count, *[1] * (x.ndim - 1))

        def hook(seen: list[object], output: torch.Tensor) -> torch.Tensor | None:
            seen.extend(output[i : i + 1] for i in range(count))
            return output * 2 if write else None

        return lambda: hooked(net, batch, [layer], hook)

    return [forward(count) for count in COUNTS]


def bench_invokes(models: dict[str, tuple[Any, Any, torch.Tensor]], rounds: int) -> None:
    print("us per further invoke, above the same with hooks: 1 to 64 invokes (and 1 to 4, 4 to 16, 16 to 64)")
    for name, (model, layer, x) in models.items():
        for what, options in (
            ("read", {"inputs": True, "write": False}),
            ("read, whole batch", {"inputs": False, "write": False}),
            ("read and write", {"inputs": True, "write": True}),
        ):
            ours = invokes(model, layer, x, **options)
            rows = x if options["inputs"] else x[:1]
            hooks = by_hand(model._module, layer._module, rows, write=options["write"])
            if not options["inputs"]:
                hooks = hooks[:1] * len(COUNTS)
            best = minimums([function for pair in zip(ours, hooks, strict=True) for function in pair], rounds)
            print(f"{name + ', ' + what:40}{per_further([a - b for a, b in zip(best[::2], best[1::2], strict=True)])}")


def bench_blocks(models: dict[str, tuple[Any, Any, torch.Tensor]], names: dict[str, tuple[str, str]]) -> None:
    print("us of a block with one invoke: the first time (in a file of its own, in one file of 24), above a seen one")
    for name, (model, _, x) in models.items():
        first, second = names[name]
        for what, sizes in (("own file", [1] * 24), ("one file", [24])):
            with tempfile.TemporaryDirectory() as folder:
                cold, seen = [], []
                for number, size in enumerate(sizes):
                    path = Path(folder) / f"blocks_{number}.py"
                    path.write_text("".join(_BLOCK.format(number=i, first=first, second=second) for i in range(size)))
                    for function in _functions(path):
                        call = partial(function, model, x)
                        cold += minimums([call], 1)
                        seen += minimums([call], 5)
                least, middle = min(cold) - min(seen), sorted(cold)[len(cold) // 2] - sorted(seen)[len(seen) // 2]
                print(f"{name + ', ' + what:40}{least:8.1f}   (median {middle:.1f})")


def _functions(path: Path) -> list[Callable[..., object]]:
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [value for name, value in vars(module).items() if name.startswith("seen_")]


def bench_seen(models: dict[str, tuple[Any, Any, torch.Tensor]], rounds: int) -> None:
    print("us of one invoke above an inline trace that reads the same")
    for name, (model, layer, x) in models.items():

        def inline(model: Any = model, layer: Any = layer, x: torch.Tensor = x) -> object:
            with model.trace(x):
                output = layer.output
            return output

        one = invokes(model, layer, x, inputs=True, write=False)[0]
        best = minimums([inline, one], rounds)
        print(f"{name:40}{best[1] - best[0]:8.1f}")


def bench_generate(model: Any, layers: Sequence[Any], ids: torch.Tensor, rounds: int) -> None:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    module = model._module

    def read() -> object:
        with model.generate(ids, **options) as tracer:
            found = []
            for _ in tracer.iter[:NEW_TOKENS]:
                for layer in layers:
                    found.append(layer.output)
        return found

    def read_in_an_invoke() -> object:
        with model.generate(**options) as tracer:
            with tracer.invoke(ids):
                found = []
                for _ in tracer.iter[:NEW_TOKENS]:
                    for layer in layers:
                        found.append(layer.output)
        return found

    def hooks() -> object:
        found: list[object] = []
        handles = [part._module.register_forward_hook(lambda _m, _a, output: found.append(output)) for part in layers]
        try:
            module.generate(ids, **options)
        finally:
            for handle in handles:
                handle.remove()
        return found

    plain, *others = minimums([lambda: module.generate(ids, **options), hooks, read, read_in_an_invoke], rounds)
    print(f"generate {NEW_TOKENS} tokens: {plain / 1e3:.1f} ms; beside it, reading {len(layers)} layers each step")
    for name, cost in zip(("hooks", "nnsight", "nnsight, in an invoke"), others, strict=True):
        print(f"{name:40}{cost / plain:8.3f}")


def gpt2(width: int, vocabulary: int = 512) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12, n_embd=width, n_head=4, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="how often each case is timed")
    parser.add_argument("--only", default="", help="invokes, seen, blocks or generate")
    parser.add_argument("--toy", action="store_true", help="without models of Hugging Face transformers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    toy = NNsight(Toy().eval())
    models = {"toy": (toy, toy.layers[6], torch.randn(1, 4, 16))}
    names = {"toy": ("layers[6]", "layers[7]"), "gpt2": ("transformer.h[6]", "transformer.h[7]")}
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    with torch.no_grad():
        if not options.toy:
            from nnsight import LanguageModel

            language = LanguageModel(gpt2(64))
            models["gpt2"] = (language, language.transformer.h[6], torch.randint(2, 512, (1, 8)))
        if options.only in ("", "invokes"):
            bench_invokes(models, options.rounds)
        if options.only in ("", "seen"):
            bench_seen(models, options.rounds * 5)
        if options.only in ("", "blocks"):
            bench_blocks(models, names)
        if options.only in ("", "generate") and not options.toy:
            bench_generate(language, list(language.transformer.h), models["gpt2"][2], max(3, options.rounds // 20))


if __name__ == "__main__":
    main()
