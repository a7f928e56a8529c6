"""Turn what the user gives a trace into the keyword arguments of a language model's forward or generate.

Every form ends as `input_ids` and `attention_mask`, rows of a batch padded to one length. Ids are checked against the
vocabulary here: inside the model a wrong one is an index error without a name, and on a GPU the end of the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nnsight import InputError
from nnsight.protocols import Inputs
from nnsight_hf.embeddings import embeddings_of, input_device
from nnsight_hf.errors import MissingTokenizerError
from nnsight_hf.joining import PER_TOKEN, SOURCES, Prompt
from nnsight_hf.padding import Padding, has_left_padding, pad_id, padding_of, positions

_FORMS = (
    "Give a string or a list of strings; token ids as a list, a list of lists or an integer tensor of shape (T,) or "
    "(B, T); chat messages, [{'role': ..., 'content': ...}]; an encoding, a dict with input_ids; or keywords, "
    "input_ids=... or inputs_embeds=..."
)
_NO_TOKENIZER = (
    "Tokenizer not found. If you passed a pre-loaded model, pass its tokenizer as well: "
    "LanguageModel(model, tokenizer=tokenizer). For a name or folder it means that no tokenizer files are there: "
    "tokenizer=AutoTokenizer.from_pretrained(...) takes one from elsewhere. Token ids work without one."
)
_BESIDE_IDS = PER_TOKEN.keys() - {"input_ids"}
_FEW = 512


def prepare(module: nn.Module, tokenizer: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Return the arguments of the call for what the user gave.

    Args:
        module: the model.
        tokenizer: its tokenizer, or None.
        method: `generate`, or another one that runs a single forward.
        args: at most one input.
        kwargs: input keywords, and arguments of the call itself.

    Raises:
        InputError: the input cannot be used, and why.
    """
    value, rest = _single_input(args, dict(kwargs))
    if value is None and not any(rest.get(name) is not None for name in SOURCES):
        return Inputs((), rest, None)
    padding = padding_of(module, tokenizer, method)
    encoding = _encode(value, tokenizer, module, padding) if value is not None else {}
    _refuse_twice(encoding, rest)
    call = {**encoding, **rest}
    embeddings = embeddings_of(module)
    is_plain = call.get("attention_mask") is None and call.get("input_ids") is not None
    if call.get("input_ids") is not None:
        rows = _finish_ids(call, module, embeddings, tokenizer, padding)
    else:
        rows = _check_embeds(call["inputs_embeds"])
    is_padded = not (is_plain and rows == 1) and has_left_padding(call.get("attention_mask"))
    counts_positions = padding.takes_positions and call.get("position_ids") is None
    if counts_positions and is_padded:
        width = next(call[name] for name in SOURCES if call.get(name) is not None).shape[1]
        call["position_ids"] = positions(call["attention_mask"])[:, -width:]  # a mask may cover a cache as well
    device = input_device(module, embeddings)
    if device is not None:
        call = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in call.items()}
    return Prompt((), call, rows, padding, counts_positions, is_padded)


def _single_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the positional input, which `generate` also knows as `inputs`, and the keywords without it."""
    if len(args) > 1:
        raise InputError(f"One input is taken, and {len(args)} were given. For several prompts give a list of them.")
    inputs = kwargs.pop("inputs", None)
    if args and args[0] is None:
        raise InputError(f"None is no input. {_FORMS}")
    if args and inputs is not None:
        raise InputError("The input was given twice, positionally and as `inputs=`. Give one of them.")
    return (args[0] if args else inputs), kwargs


def _refuse_twice(encoding: dict[str, Any], kwargs: dict[str, Any]) -> None:
    given = [name for name in SOURCES if kwargs.get(name) is not None]
    if encoding and given:
        raise InputError(f"The input was given twice, positionally and as `{given[0]}=`. Give one of them.")


def _encode(value: Any, tokenizer: Any, module: nn.Module, padding: Padding) -> dict[str, Any]:
    """Return the positional input as keyword arguments."""
    if isinstance(value, str):
        return _tokenize([value], tokenizer, module, padding)
    if isinstance(value, Mapping):
        return _encoding(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return {"input_ids": value}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        items = list(value)
        if not items:
            raise InputError(f"The input is an empty {type(value).__name__}. {_FORMS}")
        if all(isinstance(item, str) for item in items):
            return _tokenize(items, tokenizer, module, padding)
        if _is_chat(items):
            return _tokenize([_render(items, tokenizer)], tokenizer, module, padding, add_special_tokens=False)
        if all(isinstance(item, Sequence) and _is_chat(list(item)) for item in items):
            texts = [_render(list(item), tokenizer) for item in items]
            return _tokenize(texts, tokenizer, module, padding, add_special_tokens=False)
        return {"input_ids": items}
    raise InputError(f"An input of type {type(value).__name__!r} cannot be used. {_FORMS}")


def _encoding(value: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(value)
    if "role" in found and "content" in found:
        raise InputError(
            "One chat message was given; a conversation is a list of them: [{'role': ..., 'content': ...}]."
        )
    if not any(found.get(name) is not None for name in SOURCES):
        raise InputError(f"An encoding needs input_ids or inputs_embeds, and this one has {sorted(map(str, found))}.")
    return found


def _is_chat(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, Mapping) and "role" in item for item in items)


def _render(messages: list[Any], tokenizer: Any) -> str:
    """Return a conversation as text that ends where the next reply begins, or goes on within the last one."""
    if tokenizer is None:
        raise MissingTokenizerError(_NO_TOKENIZER)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "Chat messages were given, and this model's tokenizer has no chat template. Give the text as a string, "
            "or set model.tokenizer.chat_template."
        )
    goes_on = messages[-1]["role"] == "assistant"
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
    )
    return text


def _tokenize(texts: list[str], tokenizer: Any, module: nn.Module, padding: Padding, **options: Any) -> dict[str, Any]:
    if tokenizer is None:
        raise MissingTokenizerError(_NO_TOKENIZER)
    encoding = tokenizer(texts, **options)
    rows = encoding["input_ids"]
    for index, row in enumerate(rows):
        if not row:
            where = f"Prompt {index} of {len(rows)}" if len(rows) > 1 else "The prompt"
            raise InputError(f"{where} is empty: {texts[index]!r} has no tokens. A model needs at least one.")
    fill = {"input_ids": pad_id(tokenizer, module), "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    taken = list(encoding)
    if "attention_mask" in taken and (not padding.takes_mask or _is_full(encoding["attention_mask"])):
        taken.remove("attention_mask")  # as if none were given: that is told more cheaply than found in a tensor
    return {name: padding.pad(encoding[name], fill.get(name, 0)) for name in taken}


def _is_full(mask: list[list[int]]) -> bool:
    """Whether rows are of one length and leave out nothing."""
    width = len(mask[0])
    return all(len(row) == width and 0 not in row for row in mask)


def _finish_ids(
    call: dict[str, Any], module: nn.Module, embeddings: nn.Module | None, tokenizer: Any, padding: Padding
) -> int:
    """Bring `input_ids` and what goes with it into their final shape, in place; return the number of rows."""
    ids, mask = _as_ids(call["input_ids"], tokenizer, module, padding)
    for name in call.keys() & _BESIDE_IDS:
        value = call[name]
        if isinstance(value, list | np.ndarray):
            value = call[name] = torch.as_tensor(value)
        if isinstance(value, torch.Tensor) and ids.ndim == 1 and value.shape == ids.shape:
            call[name] = value.unsqueeze(0)
    if ids.ndim == 1:
        ids = ids.unsqueeze(0)
    _check_ids(ids, embeddings)
    call["input_ids"] = ids
    if call.get("attention_mask") is None:
        if padding.takes_mask:
            call["attention_mask"] = mask if mask is not None else torch.ones_like(ids)
    elif call["attention_mask"].ndim == 2 and call["attention_mask"].shape[0] != ids.shape[0]:
        raise InputError(
            f"attention_mask is of {call['attention_mask'].shape[0]} rows and input_ids of {ids.shape[0]}; both have "
            "one row per prompt."
        )
    rows: int = ids.shape[0]
    return rows


def _as_ids(
    value: Any, tokenizer: Any, module: nn.Module, padding: Padding
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids as a tensor of one or two dimensions, and the mask of what had to be padded."""
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value) if value.dtype.kind in "iufb" else value.tolist()
    if isinstance(value, torch.Tensor):
        return value, None
    items = [item.tolist() if isinstance(item, torch.Tensor | np.ndarray) else item for item in _listed(value)]
    if all(_is_id(item) for item in items):
        return torch.tensor(items, dtype=torch.long), None
    rows = [list(item) if isinstance(item, list | tuple | range) else [item] for item in items]
    for item in (item for row in rows for item in row):
        if not _is_id(item):
            raise InputError(f"A list given as input holds {item!r:.80}, of type {type(item).__name__}. {_FORMS}")
    if any(_is_id(item) for item in items):
        raise InputError(f"A list given as input mixes token ids and lists of token ids. {_FORMS}")
    if not all(rows):
        raise InputError(f"Row {rows.index([])} of the token ids is empty. A model needs at least one.")
    return padding.pad(rows, pad_id(tokenizer, module)), padding.pad([[1] * len(row) for row in rows], 0)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
        raise InputError(f"input_ids are {value!r:.80}, and must be token ids. {_FORMS}")
    return list(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_ids(ids: torch.Tensor, embeddings: nn.Module | None) -> None:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InputError(f"Token ids are integers, and these are {ids.dtype}. Embeddings go in as inputs_embeds=...")
    if ids.ndim != 2:
        raise InputError(f"Token ids have the shape (T,) or (B, T), and these have {tuple(ids.shape)}.")
    if not ids.numel():
        raise InputError(f"The token ids are empty, of shape {tuple(ids.shape)}. A model needs at least one.")
    size = getattr(embeddings, "num_embeddings", None)
    if size is None or ids.device.type == "meta":
        return
    if ids.numel() <= _FEW:  # numbers of Python's own are faster as long as they are few
        few = ids.flatten().tolist()
        low, high = min(few), max(few)
    else:
        low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise InputError(
            f"Token id {wrong} is outside the vocabulary of this model: its ids go from 0 to {size - 1}, a vocabulary "
            f"of {size}. Was the text tokenized for another model?"
        )


def _check_embeds(embeds: Any) -> int:
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or not embeds.dtype.is_floating_point:
        found = f"{embeds.dtype} of shape {tuple(embeds.shape)}" if isinstance(embeds, torch.Tensor) else type(embeds)
        raise InputError(f"inputs_embeds are a floating point tensor of shape (B, T, C), and these are {found}.")
    rows: int = embeds.shape[0]
    return rows
