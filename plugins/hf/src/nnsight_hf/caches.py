"""Key-value caches in joint batches: an invoke sees its own rows of every layer's keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

from nnsight import register_container


@cache
def register() -> None:
    """Teach joint batches to look into the caches of transformers, once."""
    from transformers.cache_utils import Cache  # lazy: heavy

    register_container(Cache, _transform)


def _transform(found: Any, function: Callable[[Any], Any]) -> Any:
    """Return a cache of the same kind whose keys and values, (B, heads, T, head size), are what `function` gives."""
    new = copy.copy(found)
    if not hasattr(found, "layers"):  # that of an encoder with a decoder is two
        for name in ("self_attention_cache", "cross_attention_cache"):
            setattr(new, name, _transform(getattr(found, name), function))
        return new
    new.layers = [_transform_layer(layer, function) for layer in found.layers]
    return new


def _transform_layer(layer: Any, function: Callable[[Any], Any]) -> Any:
    new = copy.copy(layer)
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            setattr(new, name, function(tensor))
    return new
