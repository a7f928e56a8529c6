"""Regions under `torch.utils.checkpoint`: what backward computes again must be what blocks had made of it.

A checkpointed region runs again during backward, where no run is open and no block takes part. So while a traced run
passes through a region, what blocks change there is noted visit by visit; when the region is computed again, a replay
stands in for the run and makes the same changes at the same visits. It counts for itself: no occurrence of the run is
used up. A change that cannot be made again is an error.

In a traced run a reentrant checkpoint is carried out as a non-reentrant one. It saves the same memory and gives the
same gradients, and what blocks read and compute in it has a graph, which under the reentrant one's `no_grad` it lacks.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.utils.checkpoint

from nnsight.builtin._gradients.record import EDITED, Recorder, Replay, leaves_of
from nnsight.errors import RecomputeError
from nnsight.kernel.controller import current_run

_get_ident = threading.get_ident
_LOST = (
    "A checkpointed region cannot be computed again with the edit that was made at `{location}` (occurrence "
    "{occurrence}): that location was not reached this time, so its gradients would be those of another computation. "
    "Make the edit at the input or output of a module that is still the same at the time of backward, or trace the "
    "model without gradient checkpointing."
)


class Region:
    """One passage of a traced run through a checkpointed region, and how to compute it again.

    Args:
        run: the run, or what stands in for it.
        frame: torch's record of the region. It refers to this, so this must not keep it alive.
        arguments: what the region is called with, as far as torch says.
    """

    def __init__(self, run: Any, frame: Any, arguments: Sequence[Any]) -> None:
        self._plain: Callable[..., None] = frame.recompute_fn
        self._frame = weakref.ref(frame)
        self._tree = run.tree
        self._instrumentation = run.instrumentation
        captured = _captured(self._plain, arguments)
        self._captured = [(weakref.ref(tensor), tensor._version) for tensor in captured]
        self._recorder: Recorder | None = Recorder(run, frame, arguments, captured)
        self._is_lost = False
        self._log: Any = None

    def enter(self) -> None:
        """Note what blocks do from now on."""
        assert self._recorder is not None
        self._recorder.open()

    def leave(self) -> None:
        """Note no more."""
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        self._log, self._is_lost = recorder.close(), recorder.is_lost
        alive = [tensor for reference, _ in self._captured if (tensor := reference()) is not None]
        self._captured = [(weakref.ref(tensor), tensor._version) for tensor in alive]
        if self._log is None:
            self._tree = self._instrumentation = None
            return
        frame = self._frame()
        if frame is not None:
            # Otherwise the computation would end with the last tensor that is needed, and whether every edit was made
            # could not be told.
            frame.early_stop = False

    def recompute(self, *args: Any) -> None:
        """Compute the region again. Called by torch, during backward, in any thread."""
        before, log = current_run.get(), self._log
        for reference, version in self._captured:
            tensor = reference()
            if tensor is not None and (self._is_lost or tensor._version != version):
                when = "in it" if self._is_lost else "since"
                raise RecomputeError(EDITED.format(shape=tuple(tensor.shape), when=when))
        if log is None:
            current_run.set(None)
            try:
                self._plain(*args)
            finally:
                current_run.set(before)
            return
        replay = Replay(log, self._tree, self._instrumentation, self._frame)
        self._instrumentation.acquire(replay)
        current_run.set(cast("Any", replay))
        try:
            for standing in log.standing:
                standing.again(replay)
            self._plain(*replay.inputs(args))
        finally:
            current_run.set(before)
            self._instrumentation.release(replay)
            closing, replay.closing = replay.closing, ()
            for leave in closing:
                leave()
        lost = replay.lost()
        if lost is not None:
            number, occurrence = lost
            raise RecomputeError(_LOST.format(location=self._tree[number], occurrence=occurrence))


def mount() -> None:
    """Watch checkpointed regions from now on. Where no traced run passes through, everything is as it was."""
    hook, function = torch.utils.checkpoint._checkpoint_hook, torch.utils.checkpoint.CheckpointFunction
    init, enter, leave = hook.__init__, hook.__enter__, hook.__exit__
    reentrant = function.apply
    record = torch.utils.checkpoint._CheckpointFrame
    save = getattr(record, "save_inputs", None)

    def watched_save(self: Any, *args: Any) -> None:
        save(self, *args)  # type: ignore[misc]
        if _traced_run() is not None:
            # torch is not asked for them: in a region within a region it would compute the outer one again.
            self._nnsight_arguments = args

    def watched_init(self: Any, frame: Any) -> None:
        init(self, frame)
        run = _traced_run()
        if run is not None:
            self._nnsight_region = region = Region(run, frame, frame.__dict__.pop("_nnsight_arguments", ()))
            frame.recompute_fn = region.recompute

    def watched_enter(self: Any) -> Any:
        region = getattr(self, "_nnsight_region", None)
        if region is not None:
            region.enter()
        return enter(self)

    def watched_exit(self: Any, *raised: Any) -> Any:
        region = getattr(self, "_nnsight_region", None)
        try:
            return leave(self, *raised)
        finally:
            # After torch's hooks are off: what is saved from now on must not be taken for a part of the region.
            if region is not None:
                del self._nnsight_region
                region.leave()

    def apply(run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        if _traced_run() is None or not torch.is_grad_enabled():
            return reentrant(run_function, preserve_rng_state, *args)  # type: ignore[no-untyped-call]
        return torch.utils.checkpoint.checkpoint(
            run_function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )

    hook.__init__, hook.__enter__, hook.__exit__ = watched_init, watched_enter, watched_exit  # type: ignore[method-assign]
    function.apply = staticmethod(apply)  # type: ignore[method-assign]
    if save is not None:
        record.save_inputs = watched_save  # type: ignore[method-assign]


def _traced_run() -> Any:
    """Return the run (or what stands in for it) whose model side the calling code is; None for a scan, too."""
    run = current_run.get()
    if run is None or run.tree is None or run.thread != _get_ident():
        return None
    is_fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return None if is_fake else run


def _captured(recompute: Callable[..., None], arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors of a region that torch does not watch: by keyword, in containers, or closed over.

    Args:
        recompute: torch's function that computes the region again; what it closes over is the region's function and
            its keyword arguments.
        arguments: the region's positional arguments; torch watches those that are tensors themselves.
    """
    names, cells = recompute.__code__.co_freevars, recompute.__closure__ or ()
    closed = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True) if name in ("fn", "kwargs")}
    given: list[Any] = [one for one in arguments if not isinstance(one, torch.Tensor)]
    given.append(closed.get("kwargs", {}))
    function, seen = closed.get("fn"), set[int]()
    functions = [function]
    while functions:
        function = functions.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(function, functools.partial):
            given += [*function.args, function.keywords]
            functions.append(function.func)
        elif isinstance(function, types.FunctionType):
            held = [*_contents(function.__closure__ or ()), *(function.__defaults__ or ())]
            given += held
            functions += [one for one in held if isinstance(one, types.FunctionType | functools.partial)]
    return [leaf for leaf in leaves_of(given) if isinstance(leaf, torch.Tensor) and not leaf.is_inference()]


def _contents(cells: Sequence[Any]) -> Iterator[Any]:
    for cell in cells:
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            yield cell.cell_contents
