"""How rows of different length share a batch, so that each gives what it gives alone: by what a model can be told.

Decoders are padded on the left, where generation wants it, and are told positions that count from each row's first
token. Encoders are padded on the right, and so are decoders that count positions from the edge and cannot be told any.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nnsight import BatchError

_POSITIONS = re.compile(r"(?<!Segment)Position(al)?Embeddings?$")
#: Models that mix padding into other tokens, whatever the mask says: they carry a state from token to token, look at
#: their neighbours, or gather tokens into groups that are counted from the edge.
_MIXES = frozenset({
    "convbert", "deepseek_v4", "funnel", "mobilebert", "nystromformer", "prophetnet", "recurrent_gemma", "rwkv",
    "xlstm", "yoso",
})  # fmt: skip
#: Models that do so, or lose count of positions, in `generate` only.
_MIXES_IN_GENERATE = frozenset({"git", "minimax", "reformer", "xlnet"})
#: Models that mix the rows of a batch in `generate`: going on from its state, RWKV shifts in the tokens of all rows.
_MIXES_ROWS = frozenset({"rwkv"})
_ROWS_REFUSED = (
    "Invokes cannot share a batch in `generate` of {model}: it mixes the rows of a batch when it goes on from a state. "
    "Run them one after another: `batched=False`."
)
_REFUSED = (
    "Prompts of different length cannot share a batch in {model}: {reason}. Give them one length, or run them one "
    "after another: `batched=False`, with an invoke for each."
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a model.

    Attributes:
        name: its class.
        is_encoder: whether tokens see those after them, so that it is padded on the right.
        takes_mask: whether it can be told which tokens are padding.
        takes_positions: whether it can be told the position of each token.
        counts_from_edge: whether it counts positions from the first column, padding or not.
        fill: the token that it takes for padding by itself, when it counts positions; None for any.
        mixes: whether padding reaches other tokens; `mixes_in_generate` for generation.
        mixes_rows: whether generation gives other values to a row that has others beside it.
    """

    name: str
    is_encoder: bool
    takes_mask: bool
    takes_positions: bool
    counts_from_edge: bool
    fill: int | None
    mixes: bool
    mixes_in_generate: bool
    mixes_rows: bool


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows are padded for one call.

    Attributes:
        side: "left" or "right".
        takes_mask: whether the call is given an `attention_mask`.
        takes_positions: whether the call is given `position_ids` where rows are padded on the left.
        refusal: why rows cannot be padded; empty when they can.
        rows_refusal: why invokes cannot share a batch at all; empty when they can.
    """

    side: str = "left"
    takes_mask: bool = True
    takes_positions: bool = False
    refusal: str = ""
    rows_refusal: str = ""

    def pad(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        """Return rows as one tensor.

        Args:
            rows: B lists, each with at least one number.
            value: what shorter rows are filled up with.

        Returns:
            (B, longest) int64.

        Raises:
            BatchError: they are of different length, and the model cannot be padded.
        """
        width = max(map(len, rows))
        if any(len(row) != width for row in rows):
            self.check()
        fill = [[value] * (width - len(row)) for row in rows]
        is_left = self.side == "left"
        joined = [[*f, *row] if is_left else [*row, *f] for f, row in zip(fill, rows, strict=True)]
        return torch.tensor(joined, dtype=torch.long)

    def check(self) -> None:
        """Raise when rows cannot be padded.

        Raises:
            BatchError: the values of a padded row would not be those of the row alone.
        """
        if self.refusal:
            raise BatchError(self.refusal)


_kinds: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()


def padding_of(module: nn.Module, tokenizer: Any, method: str) -> Padding:
    """Return how rows are padded for a call of a model.

    Args:
        module: the model.
        tokenizer: its tokenizer, which may want decoders padded on the right in a single forward; or None.
        method: `generate`, or another one that runs a single forward.
    """
    return _padding(kind_of(module), method == "generate", getattr(tokenizer, "padding_side", "left"))


@lru_cache(maxsize=64)
def _padding(kind: Kind, is_generation: bool, wanted: str) -> Padding:
    is_right = kind.is_encoder or (not is_generation and (kind.counts_from_edge or wanted == "right"))
    reason = ""
    if not kind.takes_mask or kind.mixes or (is_generation and kind.mixes_in_generate):
        reason = "padding would change what it computes for the other tokens"
    elif is_generation and kind.counts_from_edge and not is_right:
        reason = "it counts positions from the first column, so padding on the left, which generation needs, moves them"
    refusal = _REFUSED.format(model=kind.name, reason=reason) if reason else ""
    return Padding(
        side="right" if is_right else "left", takes_mask=kind.takes_mask or is_generation,
        takes_positions=kind.takes_positions and not is_generation, refusal=refusal,
        rows_refusal=_ROWS_REFUSED.format(model=kind.name) if is_generation and kind.mixes_rows else "",
    )  # fmt: skip


def default_side(module: nn.Module) -> str:
    """Return on which side a tokenizer pads for a model, unless somebody says otherwise."""
    return "right" if kind_of(module).is_encoder else "left"


def kind_of(module: nn.Module) -> Kind:
    """Return what is known of a model."""
    found = _kinds.get(module)
    if found is None:
        found = _kinds[module] = _look_at(module)
    return found


def pad_id(tokenizer: Any, module: nn.Module) -> int:
    """Return what padding is filled with. It is masked, so in most models any id will do where none is named."""
    own = kind_of(module).fill
    if own is not None:
        return own
    config = getattr(module, "config", None)
    for owner, name in ((tokenizer, "pad_token_id"), (tokenizer, "eos_token_id"), (config, "pad_token_id")):
        found = getattr(owner, name, None)
        if isinstance(found, int):
            return found
    return 0


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token, counted from its row's first one: (B, T) int64, 0 for padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def has_left_padding(mask: Any) -> bool:
    """Whether a mask, (B, T), leaves out the first token of any row."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all())


def _look_at(module: nn.Module) -> Kind:
    config = getattr(module, "config", None)
    model_type = getattr(config, "model_type", "")
    parameters = inspect.signature(type(module).forward).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    tables = [part for part in module.modules() if _POSITIONS.search(type(part).__name__)]
    # An embedding with a padding token: Roberta and its kin count positions of their own, from the tokens they see.
    own = next(
        (part.padding_idx for name, part in module.named_modules()
         if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None),
        None,
    )  # fmt: skip
    return Kind(
        name=type(module).__name__,
        is_encoder=bool(getattr(config, "is_encoder_decoder", False)) or _is_encoder(module, config, model_type),
        takes_mask="attention_mask" in parameters or takes_any,
        takes_positions="position_ids" in parameters and own is None,
        counts_from_edge="position_ids" not in parameters and bool(tables),
        fill=own,
        # One of transformers' own that takes a mask without naming it drops it.
        mixes=model_type in _MIXES
        or (type(module).__module__.startswith("transformers.") and "attention_mask" not in parameters),
        mixes_in_generate=model_type in _MIXES_IN_GENERATE,
        mixes_rows=model_type in _MIXES_ROWS,
    )


def _is_encoder(module: nn.Module, config: Any, model_type: str) -> bool:
    if not model_type or getattr(config, "is_decoder", False):
        return False
    from transformers.models.auto.modeling_auto import (  # lazy: heavy
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or type(module).__name__.endswith("EncoderModel")
