"""What the parts of the library, and plugins, promise each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one block feeds the model, as a model class has prepared it.

    Attributes:
        args: positional arguments of the traced call.
        kwargs: keyword arguments of the traced call.
        rows: how many rows of the batch these are; None when there is no input at all.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
