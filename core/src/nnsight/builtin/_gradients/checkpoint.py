"""Regions under `torch.utils.checkpoint`: what backward computes again must be what blocks had made of it.

A checkpointed region runs again during backward, where no run is open and no block takes part. So while a traced run
passes through a region, what blocks change there is noted visit by visit; when the region is computed again, a replay
stands in for the run and makes the same changes at the same visits. It counts for itself: no occurrence of the run is
used up. A change that cannot be made again is an error.

In a traced run a reentrant checkpoint is carried out as a non-reentrant one. It saves the same memory and gives the
same gradients, and what blocks read and compute in it has a graph, which under the reentrant one's `no_grad` it lacks.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.utils.checkpoint

from nnsight.builtin._gradients.record import Recorder, Replay
from nnsight.errors import RecomputeError
from nnsight.kernel.controller import current_run

_get_ident = threading.get_ident
_EDITED = (
    "A checkpointed region cannot be computed again: a tensor of shape {shape} that it was given by keyword has been "
    "edited in place {when}, so its gradients would be those of another computation. Replace the value instead of "
    "editing it in place (`x.output = new`), or trace the model without gradient checkpointing."
)
_LOST = (
    "A checkpointed region cannot be computed again with the edit that was made at `{location}` (occurrence "
    "{occurrence}): that location was not reached this time, so its gradients would be those of another computation. "
    "Call backward while the trace is open, or trace the model without gradient checkpointing."
)


class Region:
    """One passage of a traced run through a checkpointed region, and how to compute it again.

    Args:
        run: the run, or what stands in for it.
        frame: torch's record of the region. It refers to this, so this must not keep it alive.
    """

    def __init__(self, run: Any, frame: Any) -> None:
        self._plain: Callable[..., None] = frame.recompute_fn
        self._frame = weakref.ref(frame)
        self._tree = run.tree
        self._instrumentation = run.instrumentation
        self._captured = [(weakref.ref(tensor), -1) for tensor in _captured(self._plain)]
        alive = [tensor for reference, _ in self._captured if (tensor := reference()) is not None]
        self._recorder: Recorder | None = Recorder(run, frame, alive)
        self._is_lost = False
        self._log: Any = None

    def enter(self) -> Any:
        """Note what blocks do from now on; return what was the current run."""
        before = current_run.get()
        current_run.set(cast("Any", self._recorder))
        return before

    def leave(self, before: Any) -> None:
        """Note no more."""
        current_run.set(before)
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        self._log, self._is_lost = recorder.close(), recorder.is_lost
        self._captured = [(tensor, tensor()._version) for tensor, _ in self._captured]  # type: ignore[union-attr]
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
                raise RecomputeError(_EDITED.format(shape=tuple(tensor.shape), when=when))
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
            self._plain(*replay.inputs(args))
        finally:
            current_run.set(before)
            self._instrumentation.release(replay)
            for leave in replay.closing:
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

    def watched_init(self: Any, frame: Any) -> None:
        init(self, frame)
        run = _traced_run()
        if run is not None:
            self._nnsight_region = region = Region(run, frame)
            frame.recompute_fn = region.recompute

    def watched_enter(self: Any) -> Any:
        region = getattr(self, "_nnsight_region", None)
        if region is not None:
            self._nnsight_before = region.enter()
        return enter(self)

    def watched_exit(self: Any, *raised: Any) -> Any:
        region = getattr(self, "_nnsight_region", None)
        if region is not None:
            del self._nnsight_region
            region.leave(self.__dict__.pop("_nnsight_before"))
        return leave(self, *raised)

    def apply(run_function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        if _traced_run() is None or not torch.is_grad_enabled():
            return reentrant(run_function, preserve_rng_state, *args)  # type: ignore[no-untyped-call]
        return torch.utils.checkpoint.checkpoint(
            run_function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )

    hook.__init__, hook.__enter__, hook.__exit__ = watched_init, watched_enter, watched_exit  # type: ignore[method-assign]
    function.apply = staticmethod(apply)  # type: ignore[method-assign]


def _traced_run() -> Any:
    """Return the run (or what stands in for it) whose model side the calling code is."""
    run = current_run.get()
    return run if run is not None and run.tree is not None and run.thread == _get_ident() else None


def _captured(recompute: Callable[..., None]) -> list[torch.Tensor]:
    """Return the tensors that torch keeps for a region without watching them: those given by keyword.

    Args:
        recompute: torch's function that computes the region again; what it closes over is the region's function and
            its keyword arguments.
    """
    names, cells = recompute.__code__.co_freevars, recompute.__closure__ or ()
    closed = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True) if name in ("fn", "kwargs")}
    function = closed.get("fn")
    given = [*closed.get("kwargs", {}).values()]
    while isinstance(function, functools.partial):
        given += [*function.args, *function.keywords.values()]
        function = function.func
    found = []
    for value in given:
        items = value if isinstance(value, tuple | list) else [value]
        found += [item for item in items if isinstance(item, torch.Tensor) and not item.is_inference()]
    return found
