"""One visit of a module, as a cache keeps it."""

from __future__ import annotations

from typing import Any

from nnsight._words import describe
from nnsight.errors import CacheError


class Visit:
    """One visit of a module.

    Attributes:
        occurrence: the how-many-eth visit it was, from 0. In a generation that is the step.
    """

    __slots__ = ("_path", "_values", "occurrence")

    def __init__(self, path: str, occurrence: int) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        self.occurrence = occurrence

    @property
    def output(self) -> Any:
        """What the module's caller got."""
        return self._get("output", "output")

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module's caller passed: `(args, kwargs)`."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = self._get("input", "inputs")
        return found

    @property
    def input(self) -> Any:
        """The first argument passed, positional or by keyword."""
        args, kwargs = self.inputs
        if not args and not kwargs:
            raise CacheError(f"`{self._path}` was called without arguments, so it has no `.input`.")
        return args[0] if args else next(iter(kwargs.values()))

    def _get(self, port: str, name: str) -> Any:
        if port not in self._values:
            option = "include_inputs=True" if port == "input" else "include_output=True"
            raise CacheError(
                f"The cache holds no `.{name}` of `{self._path}`, visit {self.occurrence}. Ask for it with "
                f"tracer.cache({option}); if you did, the module did not get so far."
            )
        return self._values[port]

    def _as_dict(self) -> dict[str, Any]:
        named = {"input": "inputs", "output": "output"}
        return {named[port]: value for port, value in sorted(self._values.items())}

    def __repr__(self) -> str:
        ports = (f"{name}={describe(value)}" for name, value in self._as_dict().items())
        return f"Visit({self.occurrence}: {', '.join(ports)})"
