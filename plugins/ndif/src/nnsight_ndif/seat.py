"""The model's end of a conversation: an ordinary block of a trace, written by whoever speaks from the runner.

Each message becomes what a block may do: ask for a location, replace its value, call a module. The run cannot tell.
Every message is taken for hostile: what does not fit is an error for the block, or, where no honest runner would send
it, the end of the job.
"""

from __future__ import annotations

import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from nnsight import Mediator, NNsight
from nnsight.protocols import Inputs
from nnsight_ndif.asked import Asked, Reply
from nnsight_ndif.channel import Kind
from nnsight_ndif.errors import FrameError, RunnerError
from nnsight_ndif.guard import Guard
from nnsight_ndif.inside import Inside
from nnsight_ndif.launch import Runner
from nnsight_ndif.parts import Parts
from nnsight_ndif.report import describe, rebuild
from nnsight_ndif.served import describe_tree, merged, modes, moved, served
from nnsight_ndif.shown import Shown, fit, fit_arguments

_MAX_PREPARED = 10_000
_MAX_WANTED = 100_000


class _AbortedError(Exception):
    """The block is over without the run having come to its end."""


class Seat:
    """Serves one job.

    Args:
        root: the model.
        methods: what the block may run, by name: called with prepared arguments on the model side.
        runner: the process that runs the block.
        printed: given the name of a stream, and what the block prints there.
        warned: given message, class (module and name), file and line of its warnings.
        may_print: how many characters of both it may send.
        may_return: how many bytes its results may have in all.

    Attributes:
        shown: the values that the block was shown.
        parts: what has come of its results.
    """

    def __init__(
        self, root: NNsight, methods: dict[str, Callable[..., Any] | None], runner: Runner,
        printed: Callable[[str, str], None], warned: Callable[[str, tuple[str, str], str, int], None],
        may_print: int = 1 << 20, may_return: int = 4 << 30,
    ) -> None:  # fmt: skip
        self._root = root
        self._methods = methods
        self._channel = runner.channel
        self._incoming = runner.incoming
        self.shown = Shown(root, runner.incoming, runner.outgoing)
        self._guard = Guard(root, runner.channel.check_time)
        self._inside = Inside(root)
        self._asked = Asked(root, self.shown, self._guard)
        self._prepared: list[Inputs] = []
        self._blocks: list[Mediator] = []
        self._printed = printed
        self._warned = warned
        self._left = may_print
        self.parts = Parts(may_return)
        self._answers: dict[Kind, Callable[[Any], Reply]] = {
            Kind.PREPARE: self._prepare, Kind.JOIN: self._join, Kind.ROWS: self._rows, Kind.OPEN: self._open,
            Kind.GO: self._go, Kind.HOOKED: self._hooked, Kind.CALL: self._asked.call,
            Kind.ATTRIBUTE: self._asked.attribute, Kind.HELP: self._asked.help, Kind.BACKWARD: self._asked.backward,
            Kind.SOURCE: self._source, Kind.PART: self._part, Kind.GIVEN: self._given,
        }  # fmt: skip

    def serve(self, job: Any) -> Any:
        """Run a job; return what it sends as its result.

        Raises:
            Exception: what the block has raised.
            RunnerError: it did what no block does, or its process has ended.
        """
        self._channel.send(Kind.JOB, [describe_tree(self._root), job])
        return self._converse(Kind.DONE)[1]

    def close(self) -> None:
        """Refer to nothing any more."""
        self.shown.edges.close()
        self._answers.clear()
        self._blocks.clear()

    def _converse(self, *ends: Kind) -> tuple[Kind, Any]:
        """Answer messages until one of these kinds comes."""
        while True:
            kind, content = self._channel.receive()
            if kind is Kind.RAISED:
                raise rebuild(content)
            if kind is Kind.DONE and kind in ends:
                self._incoming.begin()
                return kind, content
            if kind is Kind.PRINT:
                self._print(content)
            elif kind is Kind.WARN:
                self._warn(content)
            elif kind is Kind.DIED:
                raise RunnerError(f"The process that runs the block has ended: {content}. {_LIKELY}")
            else:
                reply = self._answer(kind, content, kind in ends)
                if reply is None:
                    return kind, content[2]
                self._channel.send(*reply)

    def _answer(self, kind: Kind, content: Any, is_end: bool) -> Reply | None:
        match content:
            case [dropped, edits, request] if is_end or kind in self._answers:
                pass
            case _:
                raise FrameError(f"a message of kind {kind.name} is malformed, or comes where none can")
        self._incoming.begin()
        self.shown.forget(dropped)
        if is_end:
            self.shown.apply_edits(edits)
            return None
        return self._attempt(kind, edits, request)

    def _attempt(self, kind: Kind, edits: Any, request: Any) -> Reply:
        """Answer one message. What goes wrong belongs to the block, unless no honest runner would have sent it."""
        try:
            self.shown.apply_edits(edits)
            return self._answers[kind](request)
        except RunnerError:
            raise
        except Exception as error:  # noqa: BLE001 - it belongs to the block
            return Kind.FAILED, describe(error)

    def _print(self, content: Any) -> None:
        match content:
            case [str(stream), str(text)] if stream in ("stdout", "stderr"):
                self._left -= len(text)
                if self._left < 0:
                    raise RunnerError("The block has printed more than it may.")
                self._printed(stream, text)
            case _:
                raise FrameError("a message that prints is malformed")

    def _warn(self, content: Any) -> None:
        match content:
            case [str(message), [str(module), str(name)], str(filename), int(line)]:
                self._left -= len(message) + 100
                if self._left < 0:
                    raise RunnerError("The block has warned more than it may.")
                self._warned(message, (module, name), filename, line)
            case _:
                raise FrameError("a message that warns is malformed")

    def _part(self, request: Any) -> Reply:
        self.parts.take(request, self.shown.unpack)
        return self._asked.value(None)

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _prepare(self, request: Any) -> Reply:
        match request:
            case [str(path), str(method), args, kwargs] if method in self._methods or not method:
                envoy = self._asked.envoy(path)
                args, kwargs = self.shown.unpack(args), self.shown.unpack(kwargs)
            case _:
                raise FrameError("a request to prepare an input is malformed")
        if type(args) is not tuple or type(kwargs) is not dict or not all(type(name) is str for name in kwargs):
            raise FrameError("a request to prepare an input has no arguments")
        if not method:  # a call that a function of the user's makes: it is what it is
            device = self._root.device or torch.device("cpu")
            return self._kept(Inputs(moved(args, device), moved(kwargs, device), 0))
        return self._kept(envoy._prepare(self._root, method, args, kwargs))

    def _given(self, request: Any) -> Reply:
        inputs = merged(self._chosen(request))
        return self._asked.value((inputs.args, inputs.kwargs))

    def _kept(self, inputs: Inputs) -> Reply:
        if len(self._prepared) >= _MAX_PREPARED:
            raise FrameError("a block has prepared more inputs than it may")
        self._prepared.append(inputs)
        return self._asked.value((len(self._prepared) - 1, inputs.rows))

    def _chosen(self, handles: Any) -> list[Inputs]:
        if type(handles) is not list or not all(type(n) is int and 0 <= n < len(self._prepared) for n in handles):
            raise FrameError("a message names an input that was not prepared")
        return [self._prepared[number] for number in handles]

    def _join(self, request: Any) -> Reply:
        match request:
            case [str(path), handles]:
                return self._kept(self._asked.envoy(path)._join(self._chosen(handles)))
            case _:
                raise FrameError("a request to join inputs is malformed")

    def _rows(self, request: Any) -> Reply:
        match request:
            case [list(shape), int(start), int(size), int(total), handles]:
                joined = merged(self._chosen(handles))
            case _:
                raise FrameError("a question about rows is malformed")
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            raise FrameError("a question about rows has no shape")
        tensor = torch.empty(1, device="meta").expand(shape)
        joint = SimpleNamespace(total=total, args=joined.args, kwargs=joined.kwargs)
        return self._asked.value(self._root.rows(tensor, SimpleNamespace(start=start, size=size, joint=joint)))  # type: ignore[arg-type]

    # -- runs --------------------------------------------------------------------------------------------------------

    def _open(self, request: Any) -> Reply:
        match request:
            case [str(path), str(method), handles, wanted, how] if method in self._methods:
                inputs = merged(self._chosen(handles))
            case _:
                raise FrameError("a request to run the model is malformed")
        envoy = self._asked.envoy(path)
        function: Any = self._methods[method] if self._methods[method] is not None else envoy._module
        if inputs.rows is None:
            function = self._without_input(envoy, method, function, inputs)
        depth = len(self._blocks)
        reply = None
        try:
            with (
                modes(how, self._root.device or torch.device("cpu")),
                served(envoy, method, self._guard.around(function), inputs) as tracer,
            ):
                block = tracer.current_block()
                block.step = None
                self._blocks.append(block)
                self._inside.enter_all()
                reply = self._attempt(Kind.GO, [], [wanted, [], []])
                if reply[0] is Kind.FAILED:
                    raise _AbortedError
                self._channel.send(*reply)
                if self._converse(Kind.CLOSE)[1] is not True:
                    raise _AbortedError
        except _AbortedError:
            pass
        finally:
            del self._blocks[depth:]
        return reply if reply is not None and reply[0] is Kind.FAILED else self._asked.value(None)

    def _without_input(
        self, envoy: Any, method: str, function: Callable[..., Any], inputs: Inputs
    ) -> Callable[..., Any]:
        found: Callable[..., Any] = envoy._without_input(method, function, inputs.args, inputs.kwargs)
        return found

    def _go(self, request: Any) -> Reply:
        """Bring in place what the block has left of the value here, and go on to what it wants next."""
        block = self._block()
        run = block.run
        match request:
            case [list(wanted), list(assigned), list(skipped)] if len(assigned) <= 1 and len(skipped) <= 1:
                pass
            case _:
                raise FrameError("a request to go on is malformed")
        if run is None or run.tree is None:
            raise FrameError("a run that is closed was asked to go on")
        for data in assigned + skipped:
            if run.at < 0:
                raise FrameError("a value was assigned where the model stands at no location")
            self._replace(block, run.at, self.shown.unpack(data), bool(skipped))
        result = run.tree.result
        locations = self._locations(block, wanted)
        number = block.wait({result: 0, **locations})
        counts = array.array("i", run.counts).tobytes()
        if number == result and result not in locations:
            return Kind.OVER, self.shown.pack(counts)
        return Kind.VISIT, self.shown.pack([number, counts, run.value])

    def _replace(self, block: Mediator, number: int, value: Any, is_skipped: bool) -> None:
        assert block.run is not None and block.tree is not None
        location = block.tree[number]
        if is_skipped:
            if location.port != "input":
                raise FrameError("a module was skipped where it is not entered")
            path = location.path.partition(".source.")[0]
            device = next((t.device for t in self._asked.module(path).parameters()), torch.device("cpu"))
            block.skip(number, moved(value, device))
        else:
            given = fit_arguments if location.port == "input" else fit
            block.write(number, given(value, block.run.value, str(location)))

    def _locations(self, block: Mediator, wanted: list[Any]) -> dict[int, int]:
        found: dict[int, int] = {}
        assert block.tree is not None
        if len(wanted) > _MAX_WANTED:
            raise FrameError("a message asks for more locations than it may")
        for entry in wanted:
            match entry:
                case [int(number), int(occurrence)] if 0 <= number < len(block.tree) and 0 <= occurrence < 1 << 31:
                    self._inside.enter(number)
                    found[number] = occurrence
                case _:
                    raise FrameError("a message asks for a location that is not there")
        return found

    def _source(self, request: Any) -> Reply:
        return self._asked.value(self._inside.tell(request))

    def _hooked(self, request: Any) -> Reply:
        """Call a module within the run, so that other blocks are served there."""
        module, args, kwargs, modes = self._asked.arguments(request)
        with modes:
            return self._asked.value(self._block().call(module, *args, **kwargs))

    def _block(self) -> Mediator:
        if not self._blocks:
            raise FrameError("a message belongs to a run, and none is open")
        return self._blocks[-1]


_LIKELY = "It may have taken more memory or processor time than it may, or done what it must not."
