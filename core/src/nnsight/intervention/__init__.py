"""The import paths of the 0.6 series, for programs written for it; `nnsight._compat` has the table.

New programs import from `nnsight` itself.
"""

from __future__ import annotations

from typing import Any

from nnsight._alias import attribute_of, install, names_in

install()


def __getattr__(name: str) -> Any:
    return attribute_of(__name__, name)


def __dir__() -> list[str]:
    return names_in(__name__)
