"""What `generate` passes its ids through: modules of our own, so that blocks can read and change them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PassThrough(nn.Module):
    """Returns what it is given."""

    def forward(self, value: Any) -> Any:
        return value


class Generator(nn.Module):
    """Is given what `generate` returns: the ids, (B, prompt + new).

    Its child `streamer` is given the ids of each step, (B,), on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.streamer = PassThrough()

    def forward(self, ids: Any) -> Any:
        return ids


class StepStreamer:
    """Hands the new ids of each step to a module; the prompt is left out, so that call k is step k."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        """Take what transformers streams: the prompt first, then each step's ids."""
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._module(ids)

    def end(self) -> None:
        """Take the end of the stream."""


def can_stream(kwargs: dict[str, Any], default: Any) -> bool:
    """Whether a call of `generate` takes a streamer of ours.

    Args:
        kwargs: the call's.
        default: the generation config that holds where the call says nothing.
    """
    if "streamer" in kwargs or kwargs.get("custom_generate") is not None:
        return False
    config = kwargs.get("generation_config") or default
    num_beams = kwargs.get("num_beams")
    if num_beams is None:
        num_beams = getattr(config, "num_beams", None)
    return (num_beams or 1) == 1
