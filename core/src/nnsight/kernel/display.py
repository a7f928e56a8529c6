"""How a tree of envoys is shown: as torch shows modules, with repeated blocks folded into one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nnsight.kernel import growth

if TYPE_CHECKING:
    from nnsight.kernel.envoy import Envoy


def show(envoy: Envoy) -> str:
    """Return the envoy's module as text, children indented, runs of equal children folded."""
    module = envoy._module
    draws_itself = type(module).__repr__ not in (nn.Module.__repr__, nn.ModuleList.__repr__)
    if draws_itself or not (module._modules or envoy._aliases):
        return repr(module)
    extra = module.extra_repr().split("\n") if module.extra_repr() else []
    lines = _children(envoy)
    name = module._get_name()  # type: ignore[no-untyped-call]
    body = "\n".join(f"  {line}" for line in [*extra, *lines])
    return f"{name}(\n{body}\n)"


def _children(envoy: Envoy) -> list[str]:
    shown: list[tuple[str, str, int]] = []  # label of the first, text, how many
    children, folds = growth.children(envoy), isinstance(envoy._module, nn.ModuleList)
    labels = [
        (name, "None") if module is None else (_label(envoy, name), show(children[name]))
        for name, module in envoy._module._modules.items()
    ]
    ends: list[str] = []
    for label, text in labels:
        if folds and shown and shown[-1][1] == text and label.isdigit() and ends[-1].isdigit():
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
    shown_here = envoy._children.values()
    return lines + [f"({alias}) = {far._path}" for alias, far in envoy._aliases.items() if far not in shown_here]


def _label(envoy: Envoy, name: str) -> str:
    """Return how a child is shown: its names, and how to reach it where that is not its name."""
    child = envoy._children[name]
    names = "/".join([*(alias for alias, found in envoy._aliases.items() if found is child), name])
    label = names if name not in envoy._own else f"{names} -> .E_{name}"
    return label if child._path == f"{envoy._path}.{name}" else f"{label} = {child._path}"
