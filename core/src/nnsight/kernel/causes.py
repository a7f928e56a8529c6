"""Why a request cannot be met: the errors of a run, with the likely cause and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight._words import SKIPPED
from nnsight.errors import DeadlockError, MissedProviderError, OutOfOrderError
from nnsight.kernel.blocks import open_blocks
from nnsight.kernel.controller import make_controller

if TYPE_CHECKING:
    from torch import nn

    from nnsight.kernel.interleaver import Interleaver
    from nnsight.kernel.mediator import Mediator

_SHOWN = 3  # changes that a note names
_FUSED = ("TransformerEncoderLayer", "TransformerEncoder", "MultiheadAttention")


def out_of_order(run: Interleaver, number: int, occurrence: int) -> OutOfOrderError:
    """Return the error for a location that the run has passed."""
    assert run.tree is not None
    if run.at >= 0:
        now = f"it stands at `{run.tree[run.at]}` (occurrence {run.counts[run.at] - 1})"
    else:
        now = f"it is {run.state}"
    return OutOfOrderError(
        f"Value was missed for {run.tree.show(number)}: occurrence {occurrence} of it was asked for, but the run has "
        f"already passed it ({run.counts[number]} so far); now {now}. Ask for locations in the order in which the "
        "model runs them, keep a value when you will need it later, or ask in an invoke of its own."
    )


def missed(run: Interleaver, wanted: dict[int, int]) -> MissedProviderError:
    """Return the error for locations that the run has not reached and will not reach."""
    assert run.tree is not None
    names = " or ".join(map(run.tree.show, wanted))
    number, occurrence = next(iter(wanted.items()))
    return MissedProviderError(
        f"Execution complete but {names} was not provided (occurrence {occurrence}; the run reached it "
        f"{run.count(number)} times). Did you call an Envoy out of order? {_cause(run, number)}"
    )


def deadlock(run: Interleaver, mediator: Mediator, what: object) -> DeadlockError:
    """Return the error for a block that waits for something no other block can do any more."""
    others = "".join(f" The block {other.where} waits for {theirs}." for other, _, theirs in run.conditions)
    return DeadlockError(
        f"The block {mediator.where} waits for {what}, which cannot happen any more: the run is over.{others} Let the "
        "blocks that it waits for do it, or do not wait."
    )


def block_is_over(mediator: Mediator) -> MissedProviderError:
    """Return the error for a request made through a block that has ended."""
    return MissedProviderError(
        "Execution complete but a value was requested: the block that it belongs to has ended. Values can only be "
        "asked for inside the `with` block; keep what you need in a variable there."
    )


def annotate(run: Interleaver, error: BaseException) -> None:
    """Add a note to what the model raised: where in the model that was, and which changes by blocks came before."""
    number = _failed_in(run, error)
    if number is None or run.tree is None:
        return
    inline = [block for blocks in list(open_blocks.values()) for block in blocks if getattr(block, "run", None) is run]
    edits = [edit for block in (*run.mediators, *inline) for edit in block.edits()]
    after = ", ".join(
        f"{run.tree.show(edited, with_port=not how.startswith(SKIPPED))} was {how} at {where}"
        for edited, where, how in edits[-_SHOWN:]
    )
    earlier = f" (and {len(edits) - _SHOWN} changes before)" if len(edits) > _SHOWN else ""
    note = f"in {run.tree.show(number, with_port=False)} (occurrence {run.count(number) - 1})"
    note += f", after {after}{earlier}" if edits else ""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _failed_in(run: Interleaver, error: BaseException) -> int | None:
    """Return the number of the input of the innermost module that an error came through; None for none of this run."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "controller" and frame.f_globals.get("make_controller") is make_controller:
            values = frame.f_locals
            found = values["number"] if values.get("run") is run else found
        traceback = traceback.tb_next
    return found


def _cause(run: Interleaver, number: int) -> str:
    """Explain why a location was not reached."""
    assert run.tree is not None
    location = run.tree[number]
    if run.count(number):
        return "The model made fewer passes over it than the block asked for."
    for path in run.skipped_paths:
        if location.path.startswith(f"{path}."):
            return f"It lies inside `{path}`, which was skipped, so nothing inside ran."
    if location.port == "result":
        return "The model was stopped before it returned."
    above_it = location.path.rpartition(".")[0]
    inside = run.tree.reservation(number)
    if inside is not None:
        around, explain = inside
        return (explain(run, number) if run.counts[around] else "") or _cause(run, around)
    module, parent = _module(run, location.path), _module(run, above_it)
    if module is None or run.number_of(module) is None:
        return f"There is no module `{location.path}` in the model any more: it was replaced or removed after wrapping."
    kind = type(module).__name__
    if kind in ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict"):
        return f"A {kind} only holds modules and is never called; ask for one of its items."
    above = _ancestor_that_ran(run, location.path)
    if parent is not None and type(parent).__name__ in _FUSED and above == above_it:
        return _fused(type(parent).__name__, location.path)
    return (
        f"The {kind} was not called in this run"
        + (f" although `{above}` was" if above else "")
        + ": perhaps the branch that calls it was not taken, its parent uses its weights without calling it (or calls "
        "its `.forward` directly), or it was called from another thread."
    )


def _fused(parent: str, path: str) -> str:
    if parent == "MultiheadAttention":
        return (
            "MultiheadAttention uses the weights of this module in a fused function and never calls it; read the "
            "attention module's own `.output`."
        )
    return (
        f"In eval mode without gradients torch runs a {parent} as one fused C++ operation that calls none of its "
        f"parts. Call `torch.backends.mha.set_fastpath_enabled(False)` before the trace to have `{path}` called."
    )


def _module(run: Interleaver, path: str) -> nn.Module | None:
    """Return the module at a path as the model is now; None for a path that has none."""
    module = run.module
    for name in path.split(".")[1:]:
        module = getattr(module, "_modules", {}).get(name)
        if module is None:
            return None
    return module  # type: ignore[no-any-return]


def _ancestor_that_ran(run: Interleaver, path: str) -> str:
    assert run.tree is not None
    called = {location.path for location, count in zip(run.tree.locations, run.counts, strict=False) if count}
    while path:
        path = path.rpartition(".")[0]
        if path in called:
            return path
    return ""
