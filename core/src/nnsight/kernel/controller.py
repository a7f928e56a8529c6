"""What stands in a module's place while runs are open, and how it is put there and taken away.

`nn.Module.__call__` first looks for `_compiled_call_impl` on the instance. A controller in that slot counts the visit,
serves whoever waits for it, and otherwise runs what would have run. torch drops the slot from copies and pickles, so
they are clean at any time. Controllers are installed when the first run of a tree starts and removed when the last one
ends; compiled code is held to eager meanwhile, because it would not call them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from nnsight.errors import TracerStateError

if TYPE_CHECKING:
    from torch import nn

    from nnsight.kernel.interleaver import Interleaver
    from nnsight.kernel.location import Tree

SLOT = "_compiled_call_impl"
Controller = Callable[..., Any]

#: The run of the model side that is executing; set only in the context of a model side.
current_run: ContextVar[Interleaver | None] = ContextVar("nnsight_run", default=None)

_lock = threading.RLock()
_get_ident = threading.get_ident


def make_controller(tree: Tree, number: int, call: Callable[..., Any]) -> Controller:
    """Return what runs in place of `call` for the module whose input has `number` (its output the next)."""
    output = number + 1
    get_run = current_run.get
    get_ident = _get_ident

    def controller(*args: Any, **kwargs: Any) -> Any:
        run = get_run()
        if run is None or run.tree is not tree or run.thread != get_ident():
            return call(*args, **kwargs)
        counts, waiting = run.counts, run.waiting
        counts[number] += 1
        if number in waiting:
            args, kwargs = run.serve(number, (args, kwargs))
            value = call(*args, **kwargs) if run.skipped is None else run.take_skipped(number)
        else:
            value = call(*args, **kwargs)
        counts[output] += 1
        if output in waiting:
            return run.serve(output, value)
        return value

    return controller


class Instrumentation:
    """The controllers of one tree, and how many open runs need them."""

    __slots__ = ("_chained", "_count", "_modules", "_slots", "tree")

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._modules: list[tuple[nn.Module, int]] = []
        self._slots: list[tuple[dict[str, Any], Controller]] = []
        self._chained: dict[int, _Link] = {}
        self._count = 0

    def add(self, module: nn.Module, number: int) -> None:
        """Let `module` be seen by runs, also by those that are open now."""
        with _lock:
            self._modules.append((module, number))
            if self._count:
                self._install_new()

    def has(self, module: nn.Module, number: int) -> bool:
        """Return whether a location is the input or the output of this module, or belongs to no module."""
        owners = [known for known, first in self._modules if first in (number, number - 1)]
        return not owners or module in owners

    def remove(self, modules: set[int]) -> None:
        """Forget the modules with these `id`s."""
        with _lock:
            kept = []
            for index, entry in enumerate(self._modules):
                slot = self._slots[index] if index < len(self._slots) else None
                if id(entry[0]) not in modules:
                    kept.append((entry, slot))
                elif slot is not None and slot[0].get(SLOT) is slot[1]:
                    del slot[0][SLOT]
            self._modules = [entry for entry, _ in kept]
            self._slots = [slot for _, slot in kept if slot is not None]

    def replace(self, modules: list[tuple[nn.Module, int]]) -> None:
        """Let runs see these modules and no others."""
        with _lock:
            if self._count:
                raise TracerStateError("A model cannot be loaded or replaced while a trace of it is open.")
            self._modules = modules
            self._slots = []

    def acquire(self) -> None:
        """Count one more run; install for the first."""
        with _lock:
            if self._count == 0:
                _hold_eager()
                for index, (slot, controller) in enumerate(self._slots):
                    if SLOT in slot:
                        self._chain(index, slot)
                    else:
                        slot[SLOT] = controller
                if len(self._slots) != len(self._modules):
                    self._install_new()
            self._count += 1

    def release(self) -> None:
        """Count one run less; put everything back after the last."""
        with _lock:
            self._count -= 1
            if self._count:
                return
            for slot, controller in self._slots:
                if slot.get(SLOT) is controller:
                    del slot[SLOT]
            for link in self._chained.values():
                link.undo()
            self._chained.clear()
            _release_eager()

    def _install_new(self) -> None:
        for index in range(len(self._slots), len(self._modules)):
            module, number = self._modules[index]
            slot = module.__dict__
            controller = make_controller(self.tree, number, module._call_impl)
            self._slots.append((slot, controller))
            if SLOT in slot:
                self._chain(index, slot)
            else:
                slot[SLOT] = controller

    def _chain(self, index: int, slot: dict[str, Any]) -> None:
        """Stand in front of what the slot holds: the module's own compiled call, or another tree's controller."""
        if slot[SLOT] is None:
            slot[SLOT] = self._slots[index][1]
            return
        link = self._chained[index] = _Link(slot)
        link.controller = slot[SLOT] = make_controller(self.tree, self._modules[index][1], link.call_previous)
        link.controller.link = link  # type: ignore[attr-defined]


class _Link:
    """What a chained controller runs inside. Links come out in any order, as in a linked list."""

    __slots__ = ("controller", "previous", "slot")

    def __init__(self, slot: dict[str, Any]) -> None:
        self.slot = slot
        self.previous: Controller = slot[SLOT]
        self.controller: Controller | None = None

    def call_previous(self, *args: Any, **kwargs: Any) -> Any:
        return self.previous(*args, **kwargs)

    def undo(self) -> None:
        found = self.slot.get(SLOT)
        if found is self.controller:
            self.slot[SLOT] = self.previous
        else:
            while (link := getattr(found, "link", None)) is not None:
                if link.previous is self.controller:
                    link.previous = self.previous
                    break
                found = link.previous
        self.controller = None


_eager_count = 0
_stance: Any = None


def _hold_eager() -> None:
    """Count one more tree that needs compiled code to run eagerly; set torch's stance for the first."""
    global _eager_count, _stance
    _eager_count += 1
    if _stance is None and "torch._dynamo" in sys.modules:
        import torch  # lazy: already loaded whenever this line is reached

        _stance = torch.compiler.set_stance("force_eager")


def _release_eager() -> None:
    global _eager_count, _stance
    _eager_count -= 1
    if not _eager_count and _stance is not None:
        stance, _stance = _stance, None
        stance.__exit__(None, None, None)
