"""How sources and operations are printed: the code with the names beside it, or one place in it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from nnsight_source.spots import Rewritten, Spot

_AROUND = 5


def show_function(rewritten: Rewritten, kind: str, wrapped_in: str = "") -> str:
    """Return the code of a function with the names of its operations of one kind beside it.

    Lines are counted from the one after the `def`; a + stands for one more operation in the line above. What the
    function is wrapped in is named below it.
    """
    by_line: dict[int, list[str]] = {}
    for spot in rewritten.spots[kind].values():
        by_line.setdefault(spot.line, []).append(spot.name)
    width = max((len(name) for names in by_line.values() for name in names), default=0)
    number_width = len(str(len(rewritten.lines)))
    shown = []
    for index, line in enumerate(textwrap.dedent("\n".join(rewritten.lines)).split("\n")):
        names = by_line.get(rewritten.first + index, [])
        number = "*" if index == 0 else str(index - 1)
        arrow = "->" if names else "  "
        shown.append(f" {names[0] if names else '':{width}} {arrow} {number:>{number_width}} {line}".rstrip())
        indent = line[: len(line) - len(line.lstrip())]
        shown += [f" {name:{width}} -> {'+':>{number_width}} {indent}..." for name in names[1:]]
    others = [
        f"{len(spots)} in .{_GROUPS[other]}" for other, spots in rewritten.spots.items() if other != kind and spots
    ]
    if kind == "call":
        shown += [f" also: {', '.join(others)}"] * bool(others)
        shown += [f" wrapped in: {wrapped_in}, which is .wrapper"] * bool(wrapped_in)
    return "\n".join(shown)


_GROUPS = {"call": "names", "variable": "vars", "operator": "ops", "return": "returns"}


def show_spot(rewritten: Rewritten, spot: Spot, path: str) -> str:
    """Return an operation between `-->` and `<--`, in the lines around it."""
    first, start, last, end = spot.span
    low = max(first - _AROUND, rewritten.first)
    high = min(last + _AROUND, rewritten.first + len(rewritten.lines) - 1)
    shown = [f"{path} ({rewritten.file}:{first}):", ""]
    if low > rewritten.first:
        shown.append("    ....")
    lines = enumerate(rewritten.lines[low - rewritten.first : high - rewritten.first + 1], low)
    shown += ["    " + _marked(line, number, (first, start, last, end)) for number, line in lines]
    if high < rewritten.first + len(rewritten.lines) - 1:
        shown.append("    ....")
    return "\n".join(shown)


def _marked(line: str, number: int, span: tuple[int, int, int, int]) -> str:
    first, start, last, end = span
    raw = line.encode()  # columns are counted in bytes
    if number == last:
        raw = raw[:end] + b" <--" + raw[end:]
    if number == first:
        raw = raw[:start] + b"--> " + raw[start:]
    return raw.decode(errors="replace")


def listed(names: Iterable[str]) -> str:
    """Return names for a message."""
    return ", ".join(names) or "none"
