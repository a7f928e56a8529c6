"""What plain models are fed: how many rows it is, and how what several invokes feed becomes one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from nnsight.errors import BatchError
from nnsight.joint.containers import rebuild_sequence
from nnsight.protocols import Inputs

_WAY_OUT = "Give them alike, or run the invokes one after another: `trace(batched=False)`."


def join_inputs(inputs: Sequence[Inputs]) -> Inputs:
    """Join calls argument by argument: tensors along dim 0, anything else must be the same in all."""
    first = inputs[0]
    if len(inputs) == 1:
        return first
    for one in inputs:
        if len(one.args) != len(first.args) or one.kwargs.keys() != first.kwargs.keys():
            raise BatchError(f"The invokes cannot be joined: {_difference(first, one)}. {_WAY_OUT}")
    args = tuple(_join_values([one.args[i] for one in inputs], f"argument {i + 1}") for i in range(len(first.args)))
    kwargs = {name: _join_values([one.kwargs[name] for one in inputs], f"`{name}`") for name in first.kwargs}
    return Inputs(args, kwargs, sum(one.rows or 0 for one in inputs))


def _difference(left: Inputs, right: Inputs) -> str:
    """Return how the arguments of two invokes differ, for a message."""
    only = [name for name in {**left.kwargs, **right.kwargs} if (name in left.kwargs) != (name in right.kwargs)]
    if only:
        return f"{', '.join(f'`{name}`' for name in only)} was given in some of them and not in others"
    return f"one was given {len(left.args)} positional arguments, another {len(right.args)}"


def _join_values(values: Sequence[Any], name: str) -> Any:
    """Join what several invokes give for one argument: tensors along dim 0, anything else must be the same.

    Raises:
        BatchError: they cannot be joined.
    """
    if all(isinstance(value, torch.Tensor) for value in values):
        return concatenate(values, name)
    if all(value is values[0] or _equal(value, values[0]) for value in values):
        return values[0]
    raise BatchError(
        f"The invokes cannot be joined: they give different values for {name}, and it is no tensor. {_WAY_OUT}"
    )


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and isinstance(left, bool | int | float | str | None) and left == right


def concatenate(values: Sequence[Any], name: str) -> Any:
    """Join tensors along dim 0, through tuples and lists; of anything else return the first."""
    first = values[0]
    if isinstance(first, tuple | list):
        return rebuild_sequence(first, [concatenate(items, name) for items in zip(*values, strict=True)])
    if not isinstance(first, torch.Tensor):
        return first
    shapes = [tuple(value.shape) for value in values]
    if len({shape[1:] for shape in shapes}) > 1 or any(len(shape) == 0 for shape in shapes):
        raise BatchError(
            f"The invokes cannot be joined: {name} has shapes {shapes}, equal only up to dim 0 would do. {_WAY_OUT}"
        )
    if len({(value.dtype, value.device) for value in values}) > 1:
        kinds = [f"{value.dtype} on {value.device}" for value in values]
        raise BatchError(f"The invokes cannot be joined: {name} is {', '.join(kinds)}. {_WAY_OUT}")
    return torch.cat(list(values))


def leading_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the first size of the first tensor given; 1 for other arguments, None for options alone."""
    for value in args if not kwargs else (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]
    return 1 if args else None


def accepts(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a module or function can be called with these arguments."""
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
