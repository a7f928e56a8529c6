"""What programs reach as `nnsight.ndif`, provided by the plugin nnsight-ndif; `nnsight._compat` has the table."""

from __future__ import annotations

from typing import Any

from nnsight._alias import attribute_of, names_in


def __getattr__(name: str) -> Any:
    return attribute_of(__name__, name)


def __dir__() -> list[str]:
    return names_in(__name__)
