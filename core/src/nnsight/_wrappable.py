"""What can be wrapped: any `nn.Module` whose parts are called from Python."""

from __future__ import annotations

import torch
from torch import nn

from nnsight.errors import WrapError


def check_module(module: object) -> None:
    """Raise `WrapError` for what cannot be wrapped, saying what to wrap instead."""
    if not isinstance(module, nn.Module):
        raise WrapError(
            f"Only a torch.nn.Module can be wrapped, not {type(module).__name__!r}. nnsight.LanguageModel also "
            "takes the name of a repository on the Hugging Face hub, a folder or a .gguf file."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise WrapError(
            f"{type(module).__name__} was compiled by torch.jit: its parts never pass through Python, so they cannot "
            "be seen. Wrap the module that it was made from."
        )
    if isinstance(module, nn.DataParallel):
        raise WrapError("nn.DataParallel copies the model for every call; wrap its `.module` instead.")
