"""What blocks change in a checkpointed region, and making the same changes again."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from nnsight.errors import RecomputeError
from nnsight.joint.containers import transform
from nnsight.protocols import Standing

Visit = tuple[int, int]  # the number of a location, its occurrence
_INPUTS: Visit = (-1, 0)  # stands for the arguments that the region was called with
EDITED = (
    "A checkpointed region cannot be computed again: a tensor of shape {shape} that it uses but does not compute has "
    "been edited in place {when}, so its gradients would be those of another computation. Replace the value instead of "
    "editing it in place (`x.output = new`), or trace the model without gradient checkpointing."
)


class Snapshot:
    """A tensor as it was: a copy, and whether it required grad."""

    __slots__ = ("requires_grad", "value")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.value = tensor.detach().clone()
        self.requires_grad = tensor.requires_grad

    def restored(self) -> torch.Tensor:
        return self.value.clone().requires_grad_(self.requires_grad)

    def copy_to(self, target: torch.Tensor) -> None:
        """Make a tensor this one, in place."""
        with torch.set_grad_enabled(self.requires_grad and not target.requires_grad):
            target.copy_(self.restored())


class Origin:
    """A tensor that passed at a visit: the n-th leaf of the value there."""

    __slots__ = ("index", "visit")

    def __init__(self, visit: Visit, index: int) -> None:
        self.visit = visit
        self.index = index


class Change:
    """What blocks did at one visit.

    Attributes:
        edits: tensors that were edited in place, with what they were then.
        value: what the value was replaced by, with snapshots and origins for its tensors, as a one-tuple; or None.
        skipped: likewise what the module was to return instead of running.
        counts: the visit counts afterwards, where a block had the model side call modules.
        random: the state of the random number generators afterwards, where a block drew numbers.
    """

    __slots__ = ("counts", "edits", "random", "skipped", "value")

    def __init__(self) -> None:
        self.edits: list[tuple[Origin, Snapshot]] = []
        self.value: tuple[Any] | None = None
        self.skipped: tuple[Any] | None = None
        self.counts: list[int] | None = None
        self.random: Any = None

    def __bool__(self) -> bool:
        return bool(self.edits or self.value or self.skipped or self.counts is not None or self.random is not None)


class Log(NamedTuple):
    """What blocks did in a region.

    Attributes:
        changes: by visit.
        counts: the visit counts that the region began with.
        arguments: what the region's arguments were before; None for those that no block has edited in place.
        storages: the memory that blocks have edited.
        standing: what plugins have put in place for the run.
    """

    changes: dict[Visit, Change]
    counts: list[int]
    arguments: list[Snapshot | None]
    storages: list[StorageWeakRef]
    standing: list[Standing]


_innermost: dict[Any, Recorder] = {}  # run -> what notes for the region that it passes through


@functools.cache
def _watched(kind: Any) -> Any:
    """Return the class of runs (or of what stands in for one) while they pass through a region."""

    class Watched(kind):  # type: ignore[misc]
        __slots__ = ()

        def serve(self, number: int, value: Any) -> Any:
            return _innermost[self].serve(number, value)

        def take_skipped(self, number: int) -> Any:
            return _innermost[self].take_skipped(number)

    return Watched


class Recorder:
    """Stands before what serves a run's blocks while it passes through a region, and notes what they change."""

    def __init__(self, run: Any, frame: Any, arguments: Sequence[Any], captured: Sequence[torch.Tensor]) -> None:
        self._run = run
        self._outer: Recorder | None = _innermost.get(run)
        around = run if self._outer is None else self._outer
        self._serve, self._take_skipped = around.serve, around.take_skipped
        self._frame = weakref.ref(frame)
        self._captured = {_memory_of(tensor) for tensor in captured}
        self.is_lost = False
        self._log = Log({}, list(run.counts), [], [], [])
        self._arguments = arguments
        self._before: list[Snapshot | None] = []
        self._edited: dict[int, StorageWeakRef] = {}
        self._origins: dict[int, tuple[torch.Tensor, Origin]] = {}
        self._note(_INPUTS, self._arguments)

    def open(self) -> None:
        """Have requests served through this. The run stays the current one, which plugins know it by."""
        if self._outer is None:
            self._run.__class__ = _watched(self._run.__class__)
        _innermost[self._run] = self

    def serve(self, number: int, value: Any) -> Any:
        """Let the run serve, and note the difference."""
        run = self._run
        visit = number, run.counts[number] - 1
        if not self._before:
            self._before = [Snapshot(a) if isinstance(a, torch.Tensor) else None for a in self._arguments]
        leaves = leaves_of(value)
        self._note(visit, leaves)
        counts, random = list(run.counts), _random_state()
        origins = list(self._origins.values())
        versions = [tensor._version for tensor, _ in origins]
        # An edit past autograd, as of `.data` or of an array, leaves the version as it was.
        copies = [(one, one.detach().clone()) for one in leaves if id(one) in self._origins and _is_dense(one)]
        new = self._serve(number, value)
        change = Change()
        edited = {_memory_of(leaf) for leaf, copy in copies if not torch.equal(leaf, copy)}
        edited |= {_memory_of(one) for (one, _), was in zip(origins, versions, strict=True) if one._version != was}
        for tensor, origin in origins:
            if _memory_of(tensor) in edited:
                change.edits.append((origin, Snapshot(tensor)))
                if _is_dense(tensor):
                    weak = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                    self._edited.setdefault(weak.cdata, weak)
        after = leaves_of(new)
        if new is not value or len(after) != len(leaves) or any(a is not b for a, b in zip(after, leaves, strict=True)):
            change.value = (self._described(new),)
        if counts != run.counts:
            change.counts = list(run.counts)
        if not _same_random(random, now := _random_state()):
            change.random = now
        if change:
            self._log.changes[visit] = change
        return new

    def take_skipped(self, number: int) -> Any:
        """Note what a module was to return without running."""
        value = self._take_skipped(number)
        visit = number, self._run.counts[number] - 1
        self._log.changes.setdefault(visit, Change()).skipped = (self._described(value),)
        return value

    def close(self) -> Log | None:
        """Return what was noted, None for nothing; refer to nothing any more."""
        log, self._origins = self._log, {}
        if self._outer is None:
            del _innermost[self._run]
            self._run.__class__ = type(self._run).__base__
        else:
            _innermost[self._run] = self._outer
        self.is_lost = not self._captured.isdisjoint(self._edited)
        if log.changes:
            log.storages.extend(self._edited.values())
            log.arguments.extend(self._take_over())
            log.standing.extend(entry for entry in self._run.closing if isinstance(entry, Standing))
        self._arguments, self._before = [], []
        self._run = self._outer = self._serve = self._take_skipped = None
        return log if log.changes else None

    def _take_over(self) -> Iterator[Snapshot | None]:
        """Keep what edited arguments were before, in torch's place, which refuses those that were edited since."""
        saved = getattr(self._frame(), "saved_args", None)
        for index, (argument, before) in enumerate(zip(self._arguments, self._before, strict=True)):
            is_edited = isinstance(argument, torch.Tensor) and _memory_of(argument) in self._edited
            if is_edited and saved is not None:
                saved[index] = None
                yield before
            else:
                yield None

    def _note(self, visit: Visit, leaves: Iterable[Any]) -> None:
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and not leaf.is_inference():
                self._origins[id(leaf)] = leaf, Origin(visit, index)

    def _described(self, value: Any) -> Any:
        """Return a value with origins and snapshots in the place of its tensors."""

        def describe(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            known = self._origins.get(id(leaf))
            return known[1] if known is not None else Snapshot(leaf)

        return transform(value, describe)


class Replay:
    """Stands in for the run while a region is computed again, and makes the changes that were noted.

    It has what a controller, or a plugin that visits locations of its own, uses of an `Interleaver`.
    """

    skipped: tuple[Any] | None = None
    closing: Sequence[Callable[[], None]] = ()

    def __init__(self, log: Log, tree: Any, instrumentation: Any, frame: weakref.ref[Any]) -> None:
        self.tree = tree
        self.instrumentation = instrumentation
        self.thread = threading.get_ident()
        self.counts = list(log.counts)
        self._log = log
        self._frame = frame
        self._done: set[Visit] = set()
        self._kept = {origin.visit for change in log.changes.values() for origin in _origins_in(change)}
        self.waiting = {number for number, _ in (*log.changes, *self._kept)}
        self._leaves: dict[Visit, list[Any]] = {}

    def count(self, number: int) -> int:
        if number >= len(self.counts):
            self.counts.extend([0] * (len(self.tree) - len(self.counts)))
        return self.counts[number]

    def visit(self, number: int, value: Any) -> Any:
        self.counts[number] = self.count(number) + 1
        return self.serve(number, value) if number in self.waiting else value

    def inputs(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments to compute with; those that will be edited in place must not be the originals."""
        known = self._log.arguments or [None] * len(args)
        own = [arg if before is None else before.restored() for arg, before in zip(args, known, strict=True)]
        self._leaves[_INPUTS] = own
        return own

    def serve(self, number: int, value: Any) -> Any:
        """Make the changes of this visit."""
        visit = number, self.counts[number] - 1
        if visit in self._kept:
            self._leaves[visit] = leaves_of(value)
        change = self._log.changes.get(visit)
        if change is None:
            return value
        self._done.add(visit)
        for origin, snapshot in change.edits:
            target = self._find(origin)
            if any(_memory_of(target) == storage.cdata for storage in self._log.storages):
                raise RecomputeError(EDITED.format(shape=tuple(target.shape), when="in it"))
            _keep_saved(self._frame(), target)
            snapshot.copy_to(target)
        if change.counts is not None:
            self.counts[:] = change.counts
        if change.random is not None:
            _set_random_state(change.random)
        if change.skipped is not None:
            self.skipped = change.skipped
        return value if change.value is None else self._build(change.value[0])

    def take_skipped(self, number: int) -> Any:
        assert self.skipped is not None
        (value,), self.skipped = self.skipped, None
        return self._build(value)

    def lost(self) -> Visit | None:
        """Return a visit that was not made again, although something was changed there."""
        return next((visit for visit in self._log.changes if visit not in self._done), None)

    def _build(self, described: Any) -> Any:
        def build(leaf: Any) -> Any:
            if isinstance(leaf, Origin):
                return self._find(leaf)
            return leaf.restored() if isinstance(leaf, Snapshot) else leaf

        return transform(described, build)

    def _find(self, origin: Origin) -> torch.Tensor:
        leaves = self._leaves.get(origin.visit, [])
        found = leaves[origin.index] if origin.index < len(leaves) else None
        if not isinstance(found, torch.Tensor):
            where = "its arguments" if origin.visit == _INPUTS else f"`{self.tree[origin.visit[0]]}`"
            raise RecomputeError(
                "A checkpointed region cannot be computed again with the edits that were made in it: a tensor of "
                f"{where} was edited, and it is not there this time. Trace the model without gradient checkpointing."
            )
        return found


def leaves_of(value: Any) -> list[Any]:
    """Return everything in a value that is no container, in order."""
    leaves: list[Any] = []
    transform(value, lambda leaf: leaves.append(leaf) or leaf)  # type: ignore[func-returns-value, redundant-expr]
    return leaves


def _origins_in(change: Change) -> Iterator[Origin]:
    yield from (origin for origin, _ in change.edits)
    for described in (change.value, change.skipped):
        yield from (leaf for leaf in leaves_of(described) if isinstance(leaf, Origin))


def _keep_saved(frame: Any, edited: torch.Tensor) -> None:
    """Give what torch has saved of this tensor a copy of its own: it was saved before the edit, and stays as it was."""
    memory = _memory_of(edited)
    for saved in frame.recomputed.values() if frame is not None else ():
        for handle, tensor in list(saved.items()):
            if _memory_of(tensor) == memory:
                saved[handle] = tensor.clone()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has memory of its own that can be looked at."""
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def _memory_of(tensor: torch.Tensor) -> int:
    """Return what tells the memory of a tensor from that of others."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else -id(tensor)


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return states


def _same_random(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> bool:
    return len(before) == len(now) and all(map(torch.equal, before, now))


def _set_random_state(states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
