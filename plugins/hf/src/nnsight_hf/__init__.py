"""Hugging Face models for nnsight: `from nnsight import LanguageModel`.

Names are fetched when first used: whatever wraps a model looks at every plugin, and need not wait for this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnsight_hf.errors import LoadError as LoadError
    from nnsight_hf.errors import MissingTokenizerError as MissingTokenizerError
    from nnsight_hf.language import LanguageModel as LanguageModel
    from nnsight_hf.packaged import smollm2_path as smollm2_path

_MODULE_OF = {
    "LanguageModel": "nnsight_hf.language",
    "LoadError": "nnsight_hf.errors",
    "MissingTokenizerError": "nnsight_hf.errors",
    "smollm2_path": "nnsight_hf.packaged",
}
__all__ = ["LanguageModel", "LoadError", "MissingTokenizerError", "smollm2_path"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nnsight_hf' has no attribute {name!r}")
    from importlib import import_module  # lazy: needed once per name

    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
