"""The block of a traced backward pass, and the pass that it steers."""

from __future__ import annotations

import sys
import threading
from contextvars import copy_context
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import torch

from nnsight.builtin._gradients import carrying, interception, reasons
from nnsight.builtin._gradients.lineage import Edge, edge_of, edges_of, is_reachable
from nnsight.builtin._gradients.order import Order
from nnsight.builtin._gradients.stand import Gradients, Stand
from nnsight.errors import TracerStateError
from nnsight.kernel import ambient
from nnsight.kernel.blocks import close_block, line_at, open_block, open_here, wrong_thread
from nnsight.kernel.location import Tree
from nnsight.kernel.sides import Unwind


class Wanted(NamedTuple):
    """A request of the block: the gradient of a tensor, or (`is_sum`) that a parameter's has been accumulated."""

    tensor: torch.Tensor
    edges: list[Edge]
    is_sum: bool = False


#: What came of a request: which of its edges the pass stands at, or one of these.
_PASSED, _NOT_IN_GRAPH, _NOWHERE, _FAILED = -1, -2, -3, -4


class Backward:
    """One traced backward pass, to be entered with `with`.

    Args:
        loss: what backward is called on.
        plain: torch's own `Tensor.backward`.
        args: for it.
        kwargs: for it.
    """

    #: Marks the blocks of this kind, as a tree marks those of one model.
    tree: Tree | None = interception.GRADIENTS
    outer: Any = None
    owner: object = None

    def __init__(self, loss: torch.Tensor, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._loss: torch.Tensor | None = loss
        self._call: Any = partial(plain, loss, *args, **kwargs)
        self._has_inputs = kwargs.get("inputs") is not None or len(args) > 3
        self._frame: FrameType | None = None
        self.position = 0
        self._pass: _Pass | None = None
        self.thread = threading.get_ident()

    @property
    def where(self) -> str:
        """The user's file and line at which the block was opened."""
        frame = self._frame
        return f"opened at {line_at(frame.f_code, self.position)}" if frame is not None else "(closed)"

    @property
    def is_open(self) -> bool:
        return self._frame is not None

    def save(self, value: Any) -> None:
        """Mark a value as one that must come back from the block around this one."""
        enclosing = next((block for block in open_here() if not isinstance(block, Backward)), None)
        if enclosing is not None:
            enclosing.save(value)

    def __enter__(self) -> Self:
        loss = self._loss
        if loss is None or self._frame is not None:
            raise TracerStateError("This backward pass has been entered already. Call `.backward()` again for another.")
        if not loss.requires_grad:
            raise reasons.no_graph(loss)
        root = edge_of(loss)
        if root is None:
            raise reasons.no_graph(loss)
        frame = sys._getframe(1)
        self.thread = threading.get_ident()
        self.position = frame.f_lasti
        self._pass = _Pass(root.node, self._call, self._has_inputs)
        self._frame = frame
        try:
            open_block(frame, self)
            interception.begin(self)
        except BaseException:  # there will be no `__exit__`
            self.abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running, call = self._pass, self._call
        assert running is not None
        failure = None
        if error is None and not running.can_end_here():
            failure = wrong_thread("The end of a backward pass", self)
        try:
            self._close()
            if error is not None or failure is not None:
                running.unwind()
            elif running.is_new:
                call()
            else:
                running.finish()
        finally:
            try:
                running.close()
            except KeyboardInterrupt:  # in ours: nothing must remain all the same
                running.close()
                raise
        if failure is not None:
            raise failure

    def abandon(self) -> None:
        """Take the pass down: nobody will leave the block any more."""
        running = self._pass
        self._close()
        if running is not None:
            running.close()

    def _close(self) -> None:
        """Be open no more."""
        if self._frame is not None:
            interception.end(self)
            close_block(self._frame, self)
        self._frame = self._pass = self._loss = self._call = None

    # -- requests, from `Tensor.grad` ----------------------------------------------------------------------------

    def read(self, tensor: torch.Tensor) -> Any:
        """Return the gradient of a tensor, running the pass to where it arrives."""
        if not self._waits_for(tensor):
            return interception.plain_get(tensor)
        wanted, index = self._reach(tensor)
        assert self._pass is not None and self._pass.stand is not None
        return self._pass.stand.read(tensor, wanted.edges, index)

    def write(self, tensor: torch.Tensor, value: Any) -> None:
        """Replace the gradient of a tensor in this pass."""
        is_cleared = value is None and _is_parameter(tensor)  # `optimizer.zero_grad()`
        if is_cleared or not self._waits_for(tensor):
            interception.plain_set(tensor, value)
        else:
            wanted, index = self._reach(tensor)
            assert self._pass is not None and self._pass.stand is not None
            self._pass.stand.write(tensor, wanted.edges, index, value)

    def _waits_for(self, tensor: torch.Tensor) -> bool:
        """Return False for a parameter, after waiting until this pass has added to its gradient."""
        if not _is_parameter(tensor):
            return True
        own = edge_of(tensor) if tensor.requires_grad else None
        if own is not None and tensor.is_leaf and self._pass is not None:
            self._pass.reach(Wanted(tensor, [own], is_sum=True))
        return False

    def _reach(self, tensor: torch.Tensor) -> tuple[Wanted, int]:
        running = self._pass
        assert running is not None
        wanted = Wanted(tensor, edges_of(tensor))
        index = running.reach(wanted) if wanted.edges else _NOT_IN_GRAPH
        if index < 0:
            raise self._refusal(index, tensor, reasons.name_of(tensor))
        return wanted, index

    def _refusal(self, outcome: int, tensor: torch.Tensor, name: str) -> Exception:
        if outcome == _PASSED:
            return reasons.passed(name)
        if outcome == _NOT_IN_GRAPH:
            return reasons.not_in_graph(tensor, name)
        return reasons.no_gradient(name, has_failed=outcome == _FAILED)


def _is_parameter(tensor: torch.Tensor) -> bool:
    # A parameter is a leaf; to ask any other tensor for its class costs what a switch does, by torch's metaclass.
    return tensor.is_leaf and isinstance(tensor, torch.nn.Parameter)


class _Pass:
    """A backward pass that stops where the block wants it to. What has an underscore runs on its own stack."""

    stand: Stand | None = None
    worker: carrying.Carrier | None = None
    wanted: Wanted | None = None
    outcome = _NOWHERE
    error: BaseException | None = None
    has_failed = False
    _order: Order | None = None

    def __init__(self, root: Any, call: Any, has_inputs: bool) -> None:
        self.root = root
        self.call = call
        self.has_inputs = has_inputs
        self.context = copy_context()
        self.state = ambient.probe()
        self._lowest = sys.maxsize
        self._handles: list[Any] = []

    @property
    def is_new(self) -> bool:
        return self.worker is None and not self.has_failed

    def reach(self, wanted: Wanted) -> int:
        """Run to where a gradient arrives; return at which edge of the tensor that is, or a negative number."""
        worker = self.worker
        if worker is not None and not worker.is_running:
            return self._after_the_end(wanted)
        self.wanted, self.outcome = wanted, _NOWHERE
        if worker is None:
            self.worker = worker = carrying.make(self.has_inputs)
            worker.start(self._run, self.context, self.state)
        else:
            worker.resume()
        self.wanted = None
        if self.error is not None:
            self.raise_error()
        return self.outcome

    def finish(self) -> None:
        """Run to the end."""
        assert self.worker is not None
        if self.worker.is_running:
            self.worker.resume()
        self.raise_error()

    def unwind(self) -> None:
        """Take the pass down where it stands."""
        if self.worker is not None:
            self.worker.unwind()
            self.error = None

    def close(self) -> None:
        """Take the pass down if it still stands somewhere, give back what carries it, and refer to nothing any more."""
        worker = self.worker
        if worker is not None:
            worker.unwind()
            self.worker = None
            worker.give_back()
        self.root = self.call = self.stand = self.wanted = self.error = None

    def raise_error(self) -> None:
        """Raise what the pass has raised, once."""
        error, self.error = self.error, None
        if error is not None:
            self.has_failed = True
            try:
                raise error
            finally:
                del error

    def _after_the_end(self, wanted: Wanted) -> int:
        if self.has_failed:
            return _FAILED
        return _PASSED if is_reachable(self.root, wanted.edges) else _NOT_IN_GRAPH

    def can_end_here(self) -> bool:
        """Return whether the calling thread may let the pass go on."""
        return self.worker is None or self.worker.can_end_here()

    # -- on the pass's own stack -----------------------------------------------------------------------------------

    def _run(self) -> None:
        handle = self.root.register_prehook(self._begin)
        try:
            self.call()
        except Unwind:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the block
            self.error = error
        finally:
            handle.remove()
            for left in self._handles:
                left.remove()
            self._handles.clear()
            self.stand = None
            if self._order is not None:
                self._order.close()

    def _begin(self, gradients: Gradients) -> Gradients | None:
        """Stop before the first node runs, unless what is wanted first lies ahead."""
        stand = Stand(self.root, gradients)
        self._lowest = self.root._sequence_nr()
        assert self.wanted is not None
        if self._lies_ahead(self.wanted, stand):
            return None
        return self._arrive(stand)

    def _arrive(self, stand: Stand) -> Gradients | None:
        """Let the block go on here until it wants something that lies ahead; return what it made of the gradients."""
        self.stand = stand
        worker = self.worker
        assert worker is not None
        while True:
            worker.pause()
            wanted = self.wanted
            if wanted is None or self._lies_ahead(wanted, stand):
                break
        self.stand = None
        return stand.leave()

    def _lies_ahead(self, wanted: Wanted, stand: Stand) -> bool:
        """Have the pass stop where a request is met; set its outcome and return False when that needs no going on."""
        for index, edge in enumerate(wanted.edges):  # noqa: B007 - used below
            # Whoever asks the engine about the very first node is told that it does not run.
            if torch._C._will_engine_execute_node(edge.node) or edge.node is self.root:
                break
        else:
            self.outcome = _NOT_IN_GRAPH
            return False
        node = edge.node
        if node is stand.node and not wanted.is_sum and not stand.is_after:
            self.outcome = index if stand.gradients[edge.output] is not None else _NOWHERE
            return False
        if (node is stand.node and stand.is_after) or self._is_passed(wanted, node, stand):
            self.outcome = _PASSED
            return False
        self._stop_at(wanted, index, edge)
        return True

    def _is_passed(self, wanted: Wanted, node: Any, stand: Stand) -> bool:
        # Of the nodes that are ready the engine takes the one with the highest number, so a lower one lies ahead. A
        # graph may come from several threads, which number apart: a higher one is looked up in the order of this pass.
        if node is stand.node or node._sequence_nr() < self._lowest:
            return False
        if stand.node is self.root and not stand.is_after:
            return False
        if self._order is None:
            self._order = Order(self.root, stand.node)
        return self._order.is_passed(node, stand.node)

    def _stop_at(self, wanted: Wanted, index: int, edge: Edge) -> None:
        """Have the pass stop at an edge, before its node runs or (for a sum) after."""
        stop = _Stop(self, wanted.tensor, index, edge)
        if wanted.is_sum:
            stop.handle = edge.node.register_hook(stop.after)
        elif self.has_inputs and edge.is_own:
            # A node whose gradient is captured for `inputs=` may not run: only the tensor's own hooks do.
            stop.handle = wanted.tensor.register_hook(stop.captured)  # type: ignore[no-untyped-call]
        else:
            stop.handle = edge.node.register_prehook(stop.before)
        self._handles.append(stop.handle)

    def _at(self, stand: Stand, index: int, output: int) -> Gradients | None:
        if not stand.is_after:
            self._lowest = min(self._lowest, stand.node._sequence_nr())
        self.outcome = index if stand.gradients[output] is not None or stand.is_after else _NOWHERE
        return self._arrive(stand)


class _Stop:
    """What the engine calls where a pass is to stop."""

    __slots__ = ("_edge", "_index", "_pass", "_tensor", "handle")

    def __init__(self, running: _Pass, tensor: torch.Tensor, index: int, edge: Edge) -> None:
        self._pass = running
        self._tensor = tensor
        self._index = index
        self._edge = edge
        self.handle: Any = None

    def before(self, gradients: Gradients) -> Gradients | None:
        self.handle.remove()
        return self._pass._at(Stand(self._edge.node, gradients), self._index, self._edge.output)

    def captured(self, gradient: torch.Tensor) -> torch.Tensor | None:
        output = self._edge.output
        changed = self.before((*[None] * output, gradient))
        if not self._tensor._backward_hooks:
            self._tensor._backward_hooks = None  # as it was before ours
        return None if changed is None else changed[output]

    def after(self, _: Gradients, gradients: Gradients) -> None:
        self.handle.remove()
        self._pass._at(Stand(self._edge.node, gradients, is_after=True), self._index, 0)
