"""Modules of plugins under one roof: `nnsight.modeling.<name>` is the module a plugin registers under that name.

The names come from the entry-point group `nnsight.modeling`. The alias is the plugin's own module, not a copy:
`nnsight.modeling.vllm is nnsight_vllm`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from nnsight._alias import install

install()


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'nnsight.modeling' has no attribute {name!r}")
    try:
        return import_module(f"nnsight.modeling.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"nnsight.modeling.{name}":
            raise
        raise AttributeError(str(error)) from None


def __dir__() -> list[str]:
    from nnsight.plugins import names

    return sorted(names("nnsight.modeling"))
