"""The hooks a plugin may implement.

A plugin is a module (or any object) whose functions are named like the hooks below; `hookimpl` is only needed for its
options (`tryfirst`, `trylast`, `optionalhook`). An implementation may take any part of the arguments. No hook fires at
a location: they are for what happens once per model, trace or run. What a hook raises surfaces as a `PluginError` that
names the plugin.

A plugin may state the version it was written for, `nnsight_hookspec_version = 1`; a newer one than ours is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from nnsight.kernel.interleaver import Interleaver
    from nnsight.kernel.mediator import Mediator
    from nnsight.tracing.model import Envoy
    from nnsight.tracing.tracer import Tracer

HOOKSPEC_VERSION = 1

hookspec = pluggy.HookspecMarker("nnsight")
hookimpl = pluggy.HookimplMarker("nnsight")


# --- Observers: called for what they do; what they return is ignored


@hookspec
def nnsight_wrapped(envoy: Envoy) -> None:
    """Fires after a model was wrapped, once per model, before the constructor returns.

    Args:
        envoy: the root envoy; its tree is complete, its weights may not be loaded yet.
    """


@hookspec
def nnsight_trace_opened(tracer: Tracer) -> None:
    """Fires when the `with` of a trace was entered, before its block runs and before the model starts.

    Args:
        tracer: the tracer that the `with` binds.
    """


@hookspec
def nnsight_block_joined(block: Mediator) -> None:
    """Fires when a captured block (an invoke, an edit) takes its seat in a run, before its body runs.

    The seat of an inline block is `tracer.current_block()` when `nnsight_trace_opened` fires. To see what a block asks
    for, give its seat a subclass of its class that has no slots of its own: `block.__class__ = Watching`.

    Args:
        block: the seat; its run may not have started.
    """


@hookspec
def nnsight_run_started(run: Interleaver) -> None:
    """Fires when a run of a model begins: the instrumentation is in place, no module was called yet.

    One trace may need several runs (or none), and runs may nest and overlap in threads.

    Args:
        run: the interleaver, which lives as long as this run.
    """


@hookspec
def nnsight_run_ended(run: Interleaver, error: BaseException | None) -> None:
    """Fires when a run is over, however it ended; exactly once for every `nnsight_run_started`.

    Args:
        run: the interleaver that `nnsight_run_started` was given.
        error: what ended it, or None. It is raised to the user after the hook, unchanged: what this hook raises while
            there is one is added to it as a note.
    """


# --- Collections: called for what they return; all answers are put together


@hookspec
def nnsight_saveable_types() -> list[type]:  # type: ignore[empty-body]
    """Fires whenever a model is wrapped, after `nnsight_wrapped`: the answer may change when more has been imported.

    Returns:
        Types whose instances get a `.save()` while a block is open. They must accept a new class attribute.
    """


@hookspec
def nnsight_commands() -> dict[str, Callable[[list[str]], int]]:  # type: ignore[empty-body]
    """Fires when `python -m nnsight <name>` is not one of the core's own commands, and for its help.

    Returns:
        The name of each command, and a function from the remaining arguments to the exit code. The first line of the
        function's docstring is its help.
    """


@hookspec
def nnsight_doctor() -> list[tuple[str, bool | None, str]]:  # type: ignore[empty-body]
    """Fires when `python -m nnsight doctor` runs.

    Returns:
        One line per thing checked: what it is, whether it is well (None when it is only a remark), and a sentence.
    """
