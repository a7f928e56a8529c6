"""Prompts of several invokes in one batch: padded to one width, and which rows of a value are whose."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from nnsight import BatchError
from nnsight.protocols import Inputs
from nnsight_hf.padding import Padding, positions

_LEFT = Padding()

#: Keywords with one value per token, and what padding is filled with; `input_ids` with the padding token.
PER_TOKEN = {
    "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "special_tokens_mask": 1,
    "labels": -100,
}  # fmt: skip


#: Keywords that say what the tokens are.
SOURCES = ("input_ids", "inputs_embeds")


@dataclass(frozen=True, slots=True)
class Prompt(Inputs):
    """What one invoke feeds a language model.

    Attributes:
        padding: how rows are padded for this call.
        counts_positions: whether the call is given `position_ids` where rows are padded on the left.
        has_left_padding: whether its own mask leaves out the first token of any row.
    """

    padding: Padding = _LEFT
    counts_positions: bool = False
    has_left_padding: bool = False


def align(prompts: Sequence[Prompt], fill: int) -> list[Prompt]:
    """Return the prompts padded to the width of the widest, so that each row gives what it gives alone.

    Args:
        prompts: what each invoke feeds, as it would be run alone.
        fill: the padding token.

    Raises:
        BatchError: they are of different width, and the model cannot be padded, or its rows cannot share a call.
    """
    if len(prompts) > 1 and prompts[0].padding.rows_refusal:
        raise BatchError(prompts[0].padding.rows_refusal)
    found = (name for name in SOURCES if all(prompt.kwargs.get(name) is not None for prompt in prompts))
    source = next(found, None)
    if len(prompts) < 2 or source is None:
        return list(prompts)
    widths = {prompt.kwargs[source].shape[1] for prompt in prompts}
    padding, padded = prompts[0].padding, list(prompts)
    if len(widths) > 1:
        padding.check()
        padded = [_widen(prompt, source, max(widths), padding.side, fill) for prompt in prompts]
    is_padded = len(widths) > 1 and padding.side == "left"
    if not is_padded and not any(prompt.has_left_padding for prompt in prompts):
        return padded
    return [_with_positions(one) for one in padded]


def rows_of(size: int, total: int, start: int, count: int, factors: Collection[int]) -> slice | None:
    """Return the rows of one invoke in a value of `size` rows; None when these are not the batch's.

    Args:
        size: the first size of the value.
        total: how many prompts the batch has.
        start: the invoke's first prompt.
        count: how many it has.
        factors: how many rows a prompt may have: 1, a beam each, a token each, ...
    """
    factor, rest = divmod(size, total)
    if rest or factor not in factors:
        return None
    return slice(start * factor, (start + count) * factor)


def copies_per_prompt(kwargs: dict[str, Any], default: Any) -> set[int]:
    """Return how many rows a prompt may have in a call: one, one per beam, or one per answer asked for.

    Args:
        kwargs: the call's.
        default: the generation config that holds where the call says nothing.
    """
    config = kwargs.get("generation_config") or default
    given = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return {1, *map(int, given)}


def _widen(prompt: Prompt, source: str, width: int, side: str, fill: int) -> Prompt:
    rows, own = prompt.kwargs[source].shape[:2]
    missing = (width - own, 0) if side == "left" else (0, width - own)
    kwargs = dict(prompt.kwargs)
    if source == "inputs_embeds":
        embeds = kwargs[source]
        kwargs[source] = pad(embeds, (0, 0, *missing))
        kwargs.setdefault("attention_mask", torch.ones(rows, own, dtype=torch.long, device=embeds.device))
    for name, value in kwargs.items():
        if name in PER_TOKEN and isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == own:
            kwargs[name] = pad(value, missing, value=fill if name == "input_ids" else PER_TOKEN[name])
    return replace(prompt, kwargs=kwargs)


def _with_positions(prompt: Prompt) -> Prompt:
    if not prompt.counts_positions or "attention_mask" not in prompt.kwargs:
        return prompt
    return replace(prompt, kwargs={**prompt.kwargs, "position_ids": positions(prompt.kwargs["attention_mask"])})
