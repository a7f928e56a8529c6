"""Which tensors are parameters and buffers of a model: they hold no rows of a batch, however long they are."""

from __future__ import annotations

import torch
from torch import nn

_storage_of = torch.Tensor.untyped_storage


def tables_of(module: nn.Module) -> set[int]:
    """Return the storages of a module's parameters and buffers, and of all modules below it.

    `module.parameters()` makes the name of each on its way, which takes most of its time: this runs in every trace
    of several invokes.
    """
    tensors: list[torch.Tensor | None] = []
    modules: list[nn.Module | None] = [module]
    known = {id(None)}
    while modules:
        found = modules.pop()
        if found is None or id(found) in known:
            continue
        known.add(id(found))
        tensors += found._parameters.values()
        tensors += found._buffers.values()
        modules += found._modules.values()
    return {key for tensor in tensors if tensor is not None and (key := storage_of(tensor)) is not None}


def storage_of(tensor: torch.Tensor) -> int | None:
    """Return what identifies the memory of a tensor; None where it has none: sparse, or of a lazy module."""
    try:
        key: int = _storage_of(tensor)._cdata
    except (NotImplementedError, ValueError):
        return None
    return key
