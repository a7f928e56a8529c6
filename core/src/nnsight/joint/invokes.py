"""The invokes of a trace: joined into one call, or run one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnsight.capture.cells import write_back
from nnsight.errors import InvokeError
from nnsight.joint.batching import Batch, Joint
from nnsight.joint.captured import CapturedBlock
from nnsight.joint.invoker import Invoker
from nnsight.kernel.interleaver import Interleaver
from nnsight.protocols import Inputs

if TYPE_CHECKING:
    Envoy = Any  # nnsight.tracing.model.Envoy, which stands above

_NO_WHOLE = (
    "The invoke at {where} has no input, so it would see the whole batch; with batched=False there is none. Give it an "
    "input, or leave out batched=False."
)


class Invokes:
    """What the invokes of one trace bring, in the order they were written.

    Args:
        envoy: what is traced.
        method: the method that opened the trace.
        function: runs the model.
        batched: whether they are one batch.
    """

    def __init__(self, envoy: Envoy, method: str, function: Callable[..., Any], batched: bool) -> None:
        self._envoy: Envoy | None = envoy
        self._root: Envoy | None = envoy._traced_root()
        self._method = method
        self._function: Callable[..., Any] | None = function
        self._batched = batched
        self._run: Interleaver | None = None
        self.owner: object = None
        self.entries: list[tuple[CapturedBlock, Inputs | None]] = []

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Invoker:
        """Return what captures the block of one more invoke."""
        inputs = None
        if args or kwargs:
            assert self._envoy is not None
            inputs = self._envoy._prepare(self._root, self._method, args, kwargs)
            if inputs.rows is None:
                raise InvokeError(
                    f"This invoke was given {', '.join(kwargs) or 'nothing'} but no input. Give the input first, or no "
                    "arguments at all for a block over the whole batch."
                )
        return Invoker(self, inputs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the joint batch. Called on the model side, with the trace's own arguments."""
        from nnsight.kernel.controller import current_run

        run, envoy, function = current_run.get(), self._envoy, self._function
        assert run is not None and envoy is not None and function is not None
        fed = [inputs for _, inputs in self.entries if inputs is not None]
        if not fed:
            call = envoy._without_input(self._method, function, args, kwargs)
            self._take_part(run, None)
            return call(*args, **kwargs)
        joint = envoy._join(fed)
        kwargs = {**kwargs, **joint.kwargs}
        args = (*args, *joint.args)
        shared = None
        if len(fed) > 1:
            shared = Joint(joint.rows or 0, args, kwargs, envoy._rows(), envoy._tables())
        self._take_part(run, shared)
        return function(*args, **kwargs)

    def _take_part(self, run: Interleaver, shared: Joint | None) -> None:
        """Let every block take its seat, and run up to its first request."""
        start = 0
        blocks = []
        for order, (block, inputs) in enumerate(self.entries):
            batch = None
            if inputs is not None and shared is not None:
                batch = Batch(start, inputs.rows or 0, shared)
                start += batch.size
            mediator = block.join(run, order, batch)
            mediator.owner = self.owner
            blocks.append(mediator)
        run.mediators = [*run.mediators, *blocks]
        run.start_blocks(blocks)

    def run_apart(
        self, make_run: Callable[[Envoy, Callable[..., Any]], Interleaver], template: Interleaver,
        tell_ended: Callable[[BaseException | None], None],
    ) -> None:  # fmt: skip
        """Run the invokes one after another, each as if it were alone; tell of each when it is over, and why."""
        envoy = self._envoy
        assert envoy is not None and self._function is not None
        for block, inputs in self.entries:
            if inputs is None:
                raise InvokeError(_NO_WHOLE.format(where=block.where))
        for block, inputs in self.entries:
            assert inputs is not None
            run = make_run(self._root, self._function)
            run.args, run.kwargs = (*template.args, *inputs.args), {**template.kwargs, **inputs.kwargs}
            mediator = block.join(run, 0)
            mediator.owner = self.owner
            run.mediators = [*run.mediators, mediator]
            ended_by: BaseException | None = None
            try:
                run.finish()
                for seat in run.mediators:
                    if seat.error is not None:
                        raise seat.error
                run.raise_error(again=False)
            except BaseException as error:
                ended_by = error
                raise
            finally:
                run.close()
                self.write_back()
                tell_ended(ended_by)
                ended_by = None

    def write_back(self) -> None:
        """Write what the blocks have bound to the frames they are written in."""
        write_back([block.scope for block, _ in self.entries])

    def close(self) -> None:
        """Refer to nothing any more."""
        for block, _ in self.entries:
            block.scope.close()
        self.entries = []
        self._envoy = self._root = self._function = self.owner = None
