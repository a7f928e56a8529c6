"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings


def warn_user(text: str, category: type[Warning], also: tuple[str, ...] = ()) -> None:
    """Warn at the innermost frame that is neither ours nor the import system's, nor of the packages in `also`."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", ""), also):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def _is_ours(module: str, also: tuple[str, ...]) -> bool:
    return module.partition(".")[0] in ("nnsight", "importlib", *also) and not module.startswith("nnsight.testing.")
