"""`with model.edit() as edited:`: a block that takes part in every later run of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnsight.capture.cells import bind
from nnsight.tracing.captured import CapturedBlock
from nnsight.tracing.invoker import Capture

if TYPE_CHECKING:
    from nnsight.tracing.model import Envoy


class Edit(Capture):
    """Captures a block as an edit.

    Args:
        envoy: what is edited.
        inplace: add the edit to the model itself; otherwise a copy of the wrapper gets it (the weights are shared).
    """

    what = "edit"

    def __init__(self, envoy: Envoy, inplace: bool) -> None:
        self._edited = envoy if inplace else envoy.copy_wrapper()

    def _entered(self) -> Any:
        return self._edited

    def _bind(self, target: Any, entered: Any) -> Any:
        # Up to 0.7 `as edited`, in 0.8 `as (tracer, edited)`: both are written, so both are served.
        return (self, entered) if isinstance(target, list) else entered

    def _captured(self, block: CapturedBlock) -> None:
        self._edited.root.edits.append(block)
        bind(block.scope, block.entered)

    def clear(self) -> None:
        """Drop all edits of the edited model."""
        self._edited.root.edits.clear()


def edit(envoy: Envoy) -> Callable[..., Edit]:
    """Return the method `model.edit(inplace=False)`."""

    def open_edit(*, inplace: bool = False) -> Edit:
        """Make a block take part in every later run: `with model.edit() as edited:`.

        Args:
            inplace: edit this wrapper instead of a copy of it.
        """
        return Edit(envoy, inplace)

    return open_edit


def clear_edits(envoy: Envoy) -> Callable[[], None]:
    """Return the method `model.clear_edits()`, which drops all edits of a model."""
    return envoy.root.edits.clear
