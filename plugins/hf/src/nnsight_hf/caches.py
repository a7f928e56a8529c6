"""Caches in joint batches: an invoke sees its own rows of every layer's keys, values and states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from nnsight import register_container

Transform = Callable[[Any], Any]


@cache
def register() -> None:
    """Teach joint batches to look into the caches of transformers, once."""
    from transformers.cache_utils import Cache  # lazy: heavy

    register_container(Cache, _transform)


def _transform(found: Any, function: Transform) -> Any:
    """Return a cache of the same kind, whose tensors and inner caches are what `function` gives.

    In its layers that are keys and values, (B, heads, T, head size), and what layers without attention carry along.
    """
    new = _with_tensors(found, function)
    if "layers" in vars(found):
        new.layers = [_with_tensors(layer, function) for layer in found.layers]
    return new


def _with_tensors(found: Any, function: Transform) -> Any:
    new = copy.copy(found)
    for name, value in vars(found).items():
        if isinstance(value, torch.Tensor | dict) or name.endswith("_cache"):
            vars(new)[name] = function(value)
    return new
