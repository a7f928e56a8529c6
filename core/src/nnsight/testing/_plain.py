"""What plain torch says: runs of a bare module with torch's own hooks, and exact comparison of values.

Nothing here takes part in a run of ours: what the suites expect comes from these functions alone.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nnsight.joint.containers import transform

#: From the value that passes a location to the one that goes on.
Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Visit:
    """One value that passed a module.

    Attributes:
        path: the module's path below the root; "" for the root.
        port: "inputs", whose value is `(args, kwargs)`, or "output".
        occurrence: the how-manieth call of the module, from 0.
        value: the value, its tensors copied as they were then.
    """

    path: str
    port: str
    occurrence: int
    value: Any = field(compare=False)

    @property
    def name(self) -> str:
        """The location, for messages."""
        return f"`{self.path or 'model'}.{self.port}`" + (f", call {self.occurrence}" if self.occurrence else "")


@dataclass
class Recording:
    """What a run of a bare module did: what it returned, and every value that passed a module, in order."""

    result: Any = None
    visits: list[Visit] = field(default_factory=list)

    def first(self, port: str | None = None) -> list[Visit]:
        """Return the visits of first calls, of one port or of both."""
        return [visit for visit in self.visits if visit.occurrence == 0 and port in (None, visit.port)]

    def calls(self, path: str) -> int:
        """Return how often a module was called."""
        return sum(visit.path == path and visit.port == "output" for visit in self.visits)

    @property
    def passed(self) -> list[tuple[str, str, int]]:
        """The locations passed, in order."""
        return [(visit.path, visit.port, visit.occurrence) for visit in self.visits]


@contextlib.contextmanager
def recording(module: nn.Module, changes: Mapping[tuple[str, str, int], Change] | None = None) -> Iterator[Recording]:
    """Note with torch's hooks what passes the modules, and change some of it.

    Args:
        module: the bare module.
        changes: (path, port, occurrence) -> what to put in the place of the value.
    """
    changes = changes or {}
    found, counts = Recording(), Counter[tuple[str, str]]()

    def pass_by(path: str, port: str, value: Any) -> Any:
        occurrence = counts[path, port]
        counts[path, port] += 1
        change = changes.get((path, port, occurrence))
        new = value if change is None else change(value)
        found.visits.append(Visit(path, port, occurrence, copied(new)))
        return new

    def before(path: str) -> Any:
        return lambda _module, args, kwargs: pass_by(path, "inputs", (args, kwargs))

    def after(path: str) -> Any:
        return lambda _module, _args, output: pass_by(path, "output", output)

    handles = []
    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(part.register_forward_hook(after(path)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def record(
    module: nn.Module, call: Callable[[], Any], changes: Mapping[tuple[str, str, int], Change] | None = None
) -> Recording:
    """Run a bare module and return what it did; arguments as `recording`."""
    with recording(module, changes) as found:
        found.result = copied(call())
    return found


def leaves(value: Any) -> list[Any]:
    """Return what is in a value, through tuples, lists, dicts, dataclasses and containers that a plugin registered."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    transform(value, note)
    return found


def copied(value: Any) -> Any:
    """Return a value with its tensors as they are now."""
    return transform(value, lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)


def floats(value: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in a value that have numbers in them."""
    return [
        leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel()
    ]


def moved(value: Any) -> Any:
    """Return a value with other numbers in its floating-point tensors; a function of the numbers alone."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            return leaf * 0.5 + 0.25
        return leaf

    return transform(value, move)


def move_(value: Any) -> Any:
    """Change the numbers in a value's floating-point tensors in place, each tensor once, and return the value.

    Expanded tensors, whose numbers share memory, stay as they are: torch refuses to write them.
    """
    seen: set[int] = set()
    for tensor in floats(value):
        is_expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        if id(tensor) not in seen and not is_expanded:
            seen.add(id(tensor))
            tensor.mul_(0.5)
    return value


def difference(ours: Any, theirs: Any, tolerance: float = 0.0) -> str | None:
    """Return in what the first value differs from the second, or None.

    Args:
        ours: the value looked at.
        theirs: what it should be.
        tolerance: how far numbers may be apart, absolutely and relatively; 0 is every bit.
    """
    if type(ours) is not type(theirs):
        return f"is a {type(ours).__name__}, not a {type(theirs).__name__}"
    if isinstance(theirs, torch.Tensor):
        return _tensor_difference(ours, theirs, tolerance)
    mine, other = leaves(ours), leaves(theirs)
    if len(mine) != len(other):
        return f"holds {len(mine)} values, not {len(other)}"
    if len(other) == 1 and other[0] is theirs:
        return None if _is_equal(ours, theirs) else f"is {ours!r}, not {theirs!r}"
    for index, (one, two) in enumerate(zip(mine, other, strict=True)):
        found = difference(one, two, tolerance)
        if found:
            return f"differs at item {index}, which {found}"
    return None


def _tensor_difference(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> str | None:
    try:
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=tolerance, atol=tolerance, equal_nan=True, check_stride=False
        )
    except AssertionError as error:
        return "has other numbers: " + " ".join(str(error).split())
    return None


def _is_equal(ours: Any, theirs: Any) -> bool:
    """Compare what is no container; objects that are only equal to themselves count as equal by their class."""
    if getattr(type(theirs), "__eq__", None) is object.__eq__:
        return True
    answer = ours == theirs
    return bool(answer.all() if hasattr(answer, "all") else answer)  # an array answers for each of its numbers
