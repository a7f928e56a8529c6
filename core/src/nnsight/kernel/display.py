"""How a tree of envoys is shown: as torch shows modules, with repeated blocks folded into one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight.kernel.envoy import Envoy


def show(envoy: Envoy) -> str:
    """Return the envoy's module as text, children indented, runs of equal children folded."""
    module = envoy._module
    extra = module.extra_repr().split("\n") if module.extra_repr() else []
    lines = _children(envoy)
    name = type(module).__name__
    if not lines:
        if len(extra) <= 1:
            return f"{name}({extra[0] if extra else ''})"
        return f"{name}(\n" + "\n".join(f"  {line}" for line in extra) + "\n)"
    body = "\n".join(f"  {line}" for line in [*extra, *lines])
    return f"{name}(\n{body}\n)"


def _children(envoy: Envoy) -> list[str]:
    shown: list[tuple[str, str, int]] = []  # label of the first, text, how many
    labels: list[tuple[str, str]] = [(envoy._label(name), show(child)) for name, child in envoy._children.items()]
    ends: list[str] = []
    for label, text in labels:
        if shown and shown[-1][1] == text and label.isdigit() and ends[-1].isdigit():
            first, _, count = shown[-1]
            shown[-1] = (first, text, count + 1)
            ends[-1] = label
        else:
            shown.append((label, text, 1))
            ends.append(label)
    lines: list[str] = []
    for (first, text, count), last in zip(shown, ends, strict=True):
        head = f"({first}): " if count == 1 else f"({first}-{last}): {count} x "
        lines += (head + text).split("\n")
    return lines
