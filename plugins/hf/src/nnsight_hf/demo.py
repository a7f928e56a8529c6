"""`python -m nnsight demo`: read a real language model from the inside, then change its mind.

Everything between the two lines below is what a user would write; the rest prints it and draws a picture.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnsight_hf.errors import LoadError
from nnsight_hf.language import LanguageModel
from nnsight_hf.packaged import smollm2_path

LAYER, POSITION = 10, 3  # "The capital of Germany is": the country is token 3

# ---------------------------------------------------------------------------------------------------------------------


def predict(model: LanguageModel, prompt: str) -> torch.Tensor:
    """Return the probability of every token to come next, (V,)."""
    with model.trace(prompt):
        logits = model.lm_head.output[0, -1]
    return torch.softmax(logits, dim=-1)


def logit_lens(model: LanguageModel, prompt: str) -> torch.Tensor:
    """Return what each layer would predict if it were the last, (layers, V)."""
    guesses = []
    with model.trace(prompt):
        for layer in model.model.layers:
            hidden = layer.output[0, -1]
            guesses.append(model.lm_head(model.model.norm(hidden)))
    return torch.softmax(torch.stack(guesses), dim=-1)


def transplant(model: LanguageModel, source: str, target: str) -> torch.Tensor:
    """Return what comes after `target` when one hidden state is taken from `source`, (V,)."""
    with model.trace(source):
        hidden = model.model.layers[LAYER].output[:, POSITION]
    with model.trace(target):
        model.model.layers[LAYER].output[:, POSITION] = hidden
        logits = model.lm_head.output[0, -1]
    return torch.softmax(logits, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------

EIFFEL = "The Eiffel Tower is in the city of"
FRANCE, GERMANY = "The capital of France is", "The capital of Germany is"


@dataclass
class Findings:
    """What the picture shows."""

    paris_by_layer: list[float]
    before: dict[str, float]
    after: dict[str, float]


def main(arguments: list[str]) -> int:
    """Run the demo; return the exit code."""
    options = _parse(arguments)
    started = time.perf_counter()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # more only wait for each other on a busy machine
    try:
        folder = smollm2_path(report=lambda text: print(text, flush=True))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    with torch.no_grad():
        findings = _show(LanguageModel(folder, dispatch=True))
    if not options.fast:
        _draw_if_possible(findings, options.out)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Try next:\n")
    print(f'    from nnsight import LanguageModel\n    model = LanguageModel("{folder}")')
    print(f'    with model.generate("{EIFFEL}", max_new_tokens=5) as tracer:\n        ids = tracer.result')
    print("    print(model.tokenizer.decode(ids[0]))\n")
    print(f"and change LAYER and POSITION in {__file__}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nnsight demo", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument(
        "--out", type=Path, default=Path("nnsight-demo.png"), help="where the picture goes (%(default)s)"
    )
    parser.add_argument("--fast", action="store_true", help="draw no picture")
    options = parser.parse_args(arguments)
    if options.out.is_dir():
        options.out /= "nnsight-demo.png"
    return options


def _show(model: LanguageModel) -> Findings:
    """Print the model, then each experiment: the code that is run, and what comes of it."""
    _title("The model: SmolLM2-135M")
    print(model)

    _title(f"What comes next: {EIFFEL!r}", predict)
    best = predict(model, EIFFEL).topk(5)
    for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"  {model.tokenizer.decode(token)!r:<12} {probability:.3f}")

    _title(f"The logit lens: {EIFFEL!r}", logit_lens)
    guesses = logit_lens(model, EIFFEL)
    paris = _token(model, " Paris")
    print(f"  {'layer':>5}  {'top token':<16} {'P(top)':>6}  {'P( Paris)':>9}  {'rank of Paris':>13}")
    for layer, guess in enumerate(guesses):
        top = int(guess.argmax())
        rank = int((guess > guess[paris]).sum())
        print(f"  {layer:>5}  {model.tokenizer.decode(top)!r:<16} {guess[top]:>6.3f}  {guess[paris]:>9.3f}  {rank:>13}")

    _title(f"Patching layer {LAYER}, token {POSITION}, from {GERMANY!r} into {FRANCE!r}", transplant)
    before = _of_interest(model, predict(model, FRANCE))
    after = _of_interest(model, transplant(model, GERMANY, FRANCE))
    print(f"  {'':<8} {'before':>7} {'after':>7}")
    for word in before:
        print(f"  {word:<8} {before[word]:>7.3f} {after[word]:>7.3f}")
    print(f"\n  {FRANCE}{max(before, key=before.__getitem__)}  ->  {FRANCE}{max(after, key=after.__getitem__)}")
    return Findings(guesses[:, paris].tolist(), before, after)


def _title(text: str, code: Callable[..., Any] | None = None) -> None:
    print(f"\n=== {text}\n", flush=True)
    if code is not None:
        lines = inspect.getsource(code).rstrip().split("\n")
        print("\n".join(f"  | {line}" for line in lines) + "\n")


def _token(model: LanguageModel, word: str) -> int:
    (token,) = model.tokenizer.encode(word, add_special_tokens=False)
    return int(token)


def _of_interest(model: LanguageModel, probabilities: torch.Tensor) -> dict[str, float]:
    return {word: float(probabilities[_token(model, word)]) for word in (" Paris", " Berlin")}


def _draw_if_possible(findings: Findings, path: Path) -> None:
    try:
        from nnsight_hf.picture import draw  # lazy: matplotlib is optional, and slow to import
    except ImportError:
        print("\nNo picture: it needs matplotlib (`pip install matplotlib`).")
        return
    draw(findings, path)
    print(f"\nPicture: {path.absolute()}")
