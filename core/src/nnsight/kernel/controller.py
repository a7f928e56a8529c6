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
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._C import _get_tracing_state
from torch.nn.modules import module as torch_module

from nnsight.errors import TracerStateError

if TYPE_CHECKING:
    from nnsight.kernel.interleaver import Interleaver
    from nnsight.kernel.location import Tree

SLOT = "_compiled_call_impl"
Controller = Callable[..., Any]

#: The run of the model side that is executing; set only in the context of a model side.
current_run: ContextVar[Interleaver | None] = ContextVar("nnsight_run", default=None)

_lock = threading.RLock()
_get_ident = threading.get_ident


def make_controller(tree: Tree, number: int, call: Callable[..., Any], module: nn.Module | None = None) -> Controller:
    """Return what runs in place of `call` for the module whose input has `number` (its output the next).

    Args:
        tree: the numbering of the model that the module is a part of.
        number: the location of its input.
        call: what would run.
        module: the module, where `call` does no more than torch's own `_call_impl`; without hooks its `forward` is
            then called straight, which costs less than the visit adds.
    """
    output = number + 1
    get_run = current_run.get
    get_ident = _get_ident
    values = _ALWAYS_HOOKED if module is None or not _is_call_known(type(module)) else module.__dict__  # type: ignore[arg-type]

    def controller(*args: Any, **kwargs: Any) -> Any:
        run = get_run()
        if run is None or run.tree is not tree or run.thread != get_ident():
            return call(*args, **kwargs)
        counts, waiting = run.counts, run.waiting
        try:
            counts[number] += 1
        except IndexError:  # the module was attached while the run was open
            counts[number] = run.count(number) + 1
        if number in waiting:
            args, kwargs = run.serve(number, (args, kwargs))
            value = call(*args, **kwargs) if run.skipped is None else run.take_skipped(number)
        elif (
            values["_forward_hooks"]
            or values["_forward_pre_hooks"]
            or values["_backward_hooks"]
            or values["_backward_pre_hooks"]
            or _forward
            or _forward_pre
            or _backward
            or _backward_pre
            or _get_tracing_state() is not None
        ):
            value = call(*args, **kwargs)
        else:
            value = module.forward(*args, **kwargs)  # type: ignore[union-attr]
        counts[output] += 1
        if output in waiting:
            return run.serve(output, value)
        return value

    return controller


_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_forward, _forward_pre, _backward, _backward_pre = (getattr(torch_module, f"_global{kind}") for kind in _KINDS)
_ALWAYS_HOOKED: dict[str, Any] = {"_forward_hooks": True}


@cache
def _is_call_known(cls: type[nn.Module]) -> bool:
    """Return whether a module of this class runs torch's own call, with no kinds of hooks but those known here."""
    kinds = {name for name in nn.Module._call_impl.__code__.co_names if name.endswith("_hooks")}
    return cls._call_impl is nn.Module._call_impl and kinds == {*_KINDS, *(f"_global{kind}" for kind in _KINDS)}


class Instrumentation:
    """The controllers of one tree, and how many open runs need them."""

    __slots__ = ("_holders", "_is_installed", "_links", "_modules", "_slots", "tree")

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._modules: list[tuple[nn.Module, int]] = []
        self._slots: list[tuple[dict[str, Any], Controller]] = []
        self._links: list[_Link] = []
        self._holders: set[object] = set()
        self._is_installed = False

    def add(self, module: nn.Module, number: int) -> None:
        """Let `module` be seen by runs, also by those that are open now."""
        with _lock:
            self._modules.append((module, number))
            if self._holders:
                self._install_new()

    def number_of(self, module: nn.Module) -> int | None:
        """Return the number of a module's input; None for a module that runs do not see."""
        return next((number for known, number in self._modules if known is module), None)

    def remove(self, modules: set[int]) -> None:
        """Forget the modules with these `id`s."""
        with _lock:
            kept = []
            for index, entry in enumerate(self._modules):
                slot = self._slots[index] if index < len(self._slots) else None
                if id(entry[0]) not in modules:
                    kept.append((entry, slot))
                elif slot is not None:
                    _take_out(*slot)
            self._modules = [entry for entry, _ in kept]
            self._slots = [slot for _, slot in kept if slot is not None]

    def replace(self, modules: list[tuple[nn.Module, int]]) -> None:
        """Let runs see these modules and no others."""
        with _lock:
            if self._holders:
                raise TracerStateError("A model cannot be loaded or replaced while a trace of it is open.")
            self._modules = modules
            self._slots = []

    def acquire(self, run: object) -> None:
        """Hold the controllers in place for a run; install them for the first."""
        with _lock:
            self._holders.add(run)  # first: a run that is interrupted in what follows still releases
            if len(self._holders) == 1:
                if self._is_installed:  # the last to release was interrupted
                    self._take_all_out()
                self._is_installed = True
                _hold_eager()
                for index, (slot, controller) in enumerate(self._slots):
                    if SLOT in slot:
                        self._chain(*self._modules[index])
                    else:
                        slot[SLOT] = controller
                if len(self._slots) != len(self._modules):
                    self._install_new()

    def release(self, run: object) -> None:
        """Hold them for a run no more; put everything back after the last."""
        with _lock:
            if run not in self._holders:
                return
            self._holders.discard(run)
            if self._holders:
                return
            try:
                self._take_all_out()
            except BaseException:  # an interrupt
                self._take_all_out()
                raise

    def _take_all_out(self) -> None:
        for slot, controller in self._slots:
            if slot.get(SLOT) is controller:
                del slot[SLOT]
            else:
                _take_out(slot, controller)
        while self._links:
            link = self._links[-1]
            assert link.controller is not None
            _take_out(link.slot, link.controller, link.previous)
            self._links.pop().controller = None
        if self._is_installed:
            self._is_installed = False
            _release_eager()

    def _install_new(self) -> None:
        for index in range(len(self._slots), len(self._modules)):
            module, number = self._modules[index]
            slot = module.__dict__
            controller = make_controller(self.tree, number, module._call_impl, module)
            self._slots.append((slot, controller))
            if SLOT in slot:
                self._chain(module, number)
            else:
                slot[SLOT] = controller

    def _chain(self, module: nn.Module, number: int) -> None:
        """Stand in front of what the slot holds: the module's own compiled call, or another tree's controller."""
        link = _Link(module)
        link.controller = link.slot[SLOT] = make_controller(self.tree, number, link.call_previous)
        link.controller.link = link  # type: ignore[attr-defined]
        self._links.append(link)


_NOTHING: Any = object()


class _Link:
    """What a chained controller runs inside. Links come out in any order, as in a linked list."""

    __slots__ = ("_call", "controller", "previous", "slot")

    def __init__(self, module: nn.Module) -> None:
        self._call = module._call_impl
        self.slot = module.__dict__
        self.previous: Controller | None = self.slot[SLOT]
        self.controller: Controller | None = None

    def call_previous(self, *args: Any, **kwargs: Any) -> Any:
        previous = self.previous
        if previous is None or previous is _NOTHING:
            return self._call(*args, **kwargs)  # type: ignore[no-untyped-call]
        return previous(*args, **kwargs)


def _take_out(slot: dict[str, Any], controller: Controller, previous: Any = _NOTHING) -> None:
    """Take a controller out of a slot, or out of the chain that it holds; what was there before takes its place."""
    found = slot.get(SLOT)
    if found is controller:
        if previous is _NOTHING:
            del slot[SLOT]
        else:
            slot[SLOT] = previous
    while (link := getattr(found, "link", None)) is not None:
        if link.previous is controller:
            link.previous = previous
        found = link.previous


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
