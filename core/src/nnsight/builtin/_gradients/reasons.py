"""Why a gradient cannot be had: the errors of a traced backward, with the likely cause and the way out."""

from __future__ import annotations

import itertools
import linecache
import sys
from types import FrameType
from typing import Any

import torch

from nnsight.errors import MissedProviderError, NoGraphError, OutOfOrderError
from nnsight.kernel.blocks import open_here

_NO_GRAPH = "This tensor does not require grad, so a backward session cannot produce gradients: {why}"
_SET_ON_OUTPUT = (
    "set it on the whole value, `model.layer.output.requires_grad_(True)`, before the model goes on (on a view such as "
    "`.output[0]` it reaches the view only, and the model goes on with the value)"
)
_OWN = "nnsight.builtin."


def no_graph(loss: torch.Tensor) -> NoGraphError:
    """Return the error for a tensor without a graph, saying which cause it has."""
    if loss.is_inference():
        why = "it was made in inference mode. Run the trace without `torch.inference_mode()`."
    elif not (loss.is_floating_point() or loss.is_complex()):
        why = f"it holds {loss.dtype}, and only floating-point tensors have gradients."
    elif not torch.is_grad_enabled():
        why = "gradients are off here, as under `torch.no_grad()`. Open the trace and its backward without it."
    elif _is_frozen():
        why = (
            "the model is frozen: none of its parameters requires grad. Call `requires_grad_(True)` on what you want "
            f"the gradient of; for an activation {_SET_ON_OUTPUT}."
        )
    else:
        why = (
            "the model ran without gradients (under `torch.no_grad()`, as `generate` does), none of its parameters "
            "requires grad, or it was detached. Use `trace`, without `no_grad`, and keep the graph: neither "
            "`.detach()` nor `.item()` or `.data`."
        )
    return NoGraphError(_NO_GRAPH.format(why=why))


def passed(name: str) -> OutOfOrderError:
    """Return the error for a gradient that the pass has gone by."""
    return OutOfOrderError(
        f"Value was missed for the gradient of {name}: backward has already passed it. Gradients come in the reverse "
        "order of the forward pass: ask for those of later values first, or keep a gradient when you will need it "
        "later."
    )


def not_in_graph(tensor: torch.Tensor, name: str) -> MissedProviderError:
    """Return the error for a tensor that the loss was not computed from."""
    base = tensor._base
    if tensor.is_leaf and tensor.requires_grad and base is not None and not base.requires_grad:
        why = (
            "`requires_grad_(True)` was set on a view, and the value that it is a view of has no graph; "
            f"{_SET_ON_OUTPUT}."
        )
    elif not tensor.requires_grad and (base is None or not base.requires_grad):
        why = (
            "it has no graph: it was computed under `torch.no_grad()` (as a reentrant checkpoint or `generate` runs "
            "the model), was detached, or nothing before it requires grad. To have the gradient of an activation "
            f"anyway, {_SET_ON_OUTPUT}."
        )
    else:
        why = (
            "the tensor whose backward this is was not computed from it. Perhaps it is a copy, comes from another run, "
            "or the model goes on with another value (one that was assigned to the location later)."
        )
    return MissedProviderError(f"The gradient of {name} is not a part of this backward pass: {why}")


def no_gradient(name: str, has_failed: bool) -> MissedProviderError:
    """Return the error for a tensor that may be in the graph, but that no gradient has reached."""
    why = "backward has failed, with the error raised above" if has_failed else "no gradient flowed to it"
    return MissedProviderError(f"Execution complete but the gradient of {name} was not provided: {why}.")


def name_of(tensor: torch.Tensor) -> str:
    """Return how messages call a tensor: as the line that asked wrote it, with its shape."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_OWN):
        frame = frame.f_back
    text = _asked_for(frame) if frame is not None else ""
    shape = f"shape {tuple(tensor.shape)}"
    return f"`{text}` ({shape})" if text else f"a tensor of {shape}"


def _asked_for(frame: FrameType) -> str:
    """Return the source of what stands before `.grad` in the expression that a frame is at."""
    position = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), None)
    if position is None or None in position:
        return ""
    line, last, start, end = position
    if line != last:
        return ""
    source = linecache.getline(frame.f_code.co_filename, line or 0, frame.f_globals).encode()
    text = source[start:end].decode(errors="ignore")  # positions count bytes
    return text.removesuffix(".grad") if text.endswith(".grad") else ""


def _is_frozen() -> bool:
    """Return whether the model of the trace that the calling code is in has no parameter that could be trained."""
    for block in open_here():
        run: Any = getattr(block, "run", None)
        module = run.module if run is not None else None
        if module is not None:
            return not any(parameter.requires_grad for parameter in module.parameters())
    return False
