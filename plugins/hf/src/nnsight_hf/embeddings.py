"""Where a model looks up its tokens: the size of the vocabulary, and the device that inputs must be on."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Where the embeddings of a model were found. Asking transformers takes longer than all else that an input needs.
_paths: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def embeddings_of(module: nn.Module) -> nn.Module | None:
    """Return the module that a model looks its tokens up in; None where it does not say."""
    path = _paths.get(module)
    found = _walk(module, path) if path is not None else None
    return _ask(module) if found is None else found


def input_device(module: nn.Module, embeddings: nn.Module | None) -> torch.device | None:
    """Return the device that inputs must be on; None when it cannot be told."""
    execution = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
    if execution is not None:  # accelerate: the weights may be offloaded, on the meta device
        return torch.device(execution)
    weight = None if embeddings is None else embeddings._parameters.get("weight")
    if weight is None:
        weight = next((embeddings if embeddings is not None else module).parameters(), None)
    return weight.device if weight is not None and weight.device.type != "meta" else None


def _walk(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def _ask(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_input_embeddings", None)
    try:
        found = find() if find is not None else None
    except (AttributeError, NotImplementedError):  # a model of another kind: audio, or parts only
        return None
    if not isinstance(found, nn.Module):
        return None
    path = next((path for path, part in module.named_modules() if part is found), None)
    if path:
        _paths[module] = tuple(path.split("."))
    return found
