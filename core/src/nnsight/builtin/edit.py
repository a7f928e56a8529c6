"""`with model.edit() as edited:`: a block that takes part in every later run of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from nnsight.builtin.steps import iter_steps
from nnsight.capture.cells import bind
from nnsight.joint.captured import CapturedBlock
from nnsight.joint.invoker import Capture
from nnsight.kernel.envoy import Envoy as AnyEnvoy
from nnsight.kernel.growth import in_tree

if TYPE_CHECKING:
    from nnsight.joint.iteration import Iteration, Steps
    from nnsight.tracing.model import Envoy


class KeptBlock(CapturedBlock):
    """The block of an edit: it outlives the function it is written in, and does not keep the model that holds it.

    Args:
        block: what was captured.
        edited: the envoy that was edited.

    Attributes:
        path: where that is.
    """

    def __init__(self, block: CapturedBlock, edited: Envoy) -> None:
        super().__init__(block.scope, None, block.what)
        edited, root = in_tree(edited), edited.root
        self.scope.outlive(
            root, lambda value: in_tree(value) if isinstance(value, AnyEnvoy) and value._root() is root else value
        )
        self._unpacks = isinstance(block.entered, tuple)
        self._edited = weakref.ref(edited)
        self.path = edited.path

    def again(self) -> CapturedBlock:
        edited = self._edited()
        assert edited is not None
        entered = (Edit(edited, inplace=True), edited) if self._unpacks else edited
        return CapturedBlock(self.scope.again(), entered, self.what)


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
        bind(block.scope, block.entered)
        self._edited.root.edits.append(KeptBlock(block, self._edited))

    # What a tracer has, for the block itself: `with model.edit() as (tracer, edited):`.

    @property
    def iter(self) -> Steps:
        """The steps of the run that the edit takes part in: `for step in tracer.iter[:3]:`."""
        return iter_steps(self._edited)

    def all(self) -> Iteration:
        """Every step of the run, as `tracer.iter[:]`."""
        return self.iter[:]

    def next(self, step: int = 1) -> Self:
        """Let the requests that follow mean a step that is so many later."""
        self._edited._seat("next")[0].advance(step)
        return self

    def stop(self) -> None:
        """End the run here."""
        self._edited._seat("stop")[0].stop()

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
