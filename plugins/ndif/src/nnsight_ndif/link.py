"""The runner's end of the conversation: requests and their answers, and runs that follow those of the model.

A run here visits the locations that somebody waits for, when the real run does; so tracers, invokes, steps, barriers
and caches need nothing of their own. Where a function of the user's drives the model, each of its calls is a run there.
"""

from __future__ import annotations

import array
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nnsight import Interleaver, current_run
from nnsight_ndif.channel import Channel, Kind
from nnsight_ndif.errors import NotInRunnerError
from nnsight_ndif.held import Held, contents
from nnsight_ndif.report import rebuild
from nnsight_ndif.served import modes_here
from nnsight_ndif.window import Window


class Link:
    """The runner's end of the conversation.

    Args:
        channel: to the model's process.
        incoming: the window that the model's end fills; `outgoing` the one it reads.
    """

    def __init__(self, channel: Channel, incoming: Window, outgoing: Window) -> None:
        self.channel = channel
        self.incoming, self.outgoing = incoming, outgoing
        #: The stand-ins of the modules, by path.
        self.modules: dict[str, Any] = {}
        self.held = Held(incoming, outgoing, lambda path: self.modules[path], self._pull)
        #: The model's numbers of locations, by those of the tree here, and the other way round.
        self.theirs: dict[int, int] = {}
        self.ours: dict[int, int] = {}
        #: The last number of the model's that is known.
        self.result = -1
        #: The runs that follow one of the model's at the time.
        self._driven: dict[Interleaver, None] = {}

    def ask(self, kind: Kind, content: Any) -> tuple[Kind, Any]:
        """Ask the model's process and wait for its answer.

        Raises:
            Exception: what the model, or answering, has raised there.
        """
        was_enabled = gc.isenabled()
        gc.disable()  # what is collected now would be taken there for held
        try:
            dropped, edits = self.held.begin()
            self.channel.send(kind, [dropped, edits, self.held.pack(content)])
            answer, data = self.channel.receive()
            self.incoming.begin()
            if answer is Kind.FAILED:
                raise rebuild(data)
            refreshed, content = data
            self.held.unpack(refreshed)
            return answer, self.held.unpack(content)
        finally:
            if was_enabled:
                gc.enable()

    def look_inside(self, path: str, steps: list[str], how: str) -> Any:
        """Return what the model's process tells of a function inside a forward."""
        return self.ask(Kind.SOURCE, [path, steps, how])[1]

    def place(self, theirs: int, size: int, ours: int) -> None:
        """Learn the numbers of locations, there and here."""
        for number in range(size):
            self.theirs[ours + number], self.ours[theirs + number] = theirs + number, ours + number

    def _pull(self, key: int, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        with torch.no_grad():
            found: list[torch.Tensor | None] = self.ask(Kind.BACKWARD, [key, gradient])[1]
        return found

    def drive(self, path: str, method: str, *prepared: Any) -> Any:
        """Run the model there, and visit here what it visits. Called on the model side of a run."""
        run = current_run.get()
        assert run is not None
        handles = [item.handle for item in prepared if isinstance(item, Prepared)]
        opened = self.ask(Kind.OPEN, [path, method, handles, self._wanted(run, ()), modes_here()])
        # Whatever becomes of the run here, the one there is closed with it.
        progress = [False]  # whether it has come to its end
        self._driven[run] = None
        run.closing = [*run.closing, partial(self._close, run, progress)]
        value = self._follow(run, opened, ())
        progress[0] = True
        return value

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module. Where a function of the user's drives the model, it is a run there and a part of the one here.

        Called on the model side of a run. Within a run that is driven already it is a call with `hook=True`.
        """
        run = current_run.get()
        if run is None or run in self._driven:
            kind = Kind.CALL if run is None else Kind.HOOKED
            return self.ask(kind, [path, args, kwargs, modes_here()])[1]
        handle, _ = self.ask(Kind.PREPARE, [path, "", args, kwargs])[1]
        before = tuple(run.counts)
        wanted = [*self._wanted(run, before), [self.result, 0]]
        opened = self.ask(Kind.OPEN, [path, "trace", [handle], wanted, modes_here()])
        progress = [False]
        self._driven[run] = None
        try:
            value = self._follow(run, opened, before)
            progress[0] = True
        finally:
            self._close(run, progress)
        return value

    def given(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is called with prepared inputs, and calls one of the user's with what they hold."""

        def drive(*prepared: Any) -> Any:
            handles = [item.handle for item in prepared if isinstance(item, Prepared)]
            args, kwargs = self.ask(Kind.GIVEN, handles)[1]
            return function(*args, **kwargs)

        return drive

    def _follow(self, run: Interleaver, answered: tuple[Kind, Any], before: Sequence[int]) -> Any:
        """Visit here what a run visits there, to its end; return its result where that was wanted.

        Args:
            run: the run here.
            answered: what was answered when the one there was opened.
            before: the counts of the run here before that, where it is only a part of the run; empty where it is all.
        """
        answer, content = answered
        while answer is Kind.VISIT:
            their_number, counts, value = content
            self._count(run, counts, before)
            number = self.ours[their_number]
            if their_number == self.result:
                run.counts[number] -= not before  # it counts its result itself
                return value
            new, skipped = self._pass(run, number, value)
            wanted = [*self._wanted(run, before), *([[self.result, 0]] if before else [])]
            answer, content = self.ask(Kind.GO, [wanted, new, skipped])
        self._count(run, content, before)
        return None

    def _close(self, run: Interleaver, progress: list[bool]) -> None:
        self._driven.pop(run, None)
        self.ask(Kind.CLOSE, progress[0])

    def _count(self, run: Interleaver, counts: bytes, before: Sequence[int]) -> None:
        """Let the counts of the run say what they say there."""
        for theirs, count in enumerate(array.array("i", counts)):
            ours = self.ours.get(theirs)
            if ours is not None and not (before and theirs == self.result):
                run.count(ours)
                run.counts[ours] = count + (before[ours] if ours < len(before) else 0)

    def _pass(self, run: Interleaver, number: int, value: Any) -> tuple[list[Any], list[Any]]:
        """Visit a location; return what has become of its value, and what the module is skipped with."""
        before = contents(value, [])
        run.counts[number] -= 1  # the visit counts itself
        new = run.visit(number, value)
        skipped = [] if run.skipped is None else [run.take_skipped(number)]
        after = contents(new, [])
        is_same = len(before) == len(after) and all(old is now for old, now in zip(before, after, strict=True))
        return [] if is_same or skipped else [new], skipped

    def _wanted(self, run: Interleaver, before: Sequence[int]) -> list[list[int]]:
        """Return the locations that blocks wait for, each with the next occurrence that anybody wants."""
        found: dict[int, int] = {}
        for number, entry in run.waiting.items():
            for mediator in entry if isinstance(entry, list) else [entry]:
                occurrence = mediator.occurrence if mediator.wanted is None else mediator.wanted[number]
                if number not in self.theirs:
                    raise NotInRunnerError(f"`{run.tree[number]}` is not a location that a block in a runner can read.")  # type: ignore[index]
                theirs = self.theirs[number]
                if before and theirs == self.result:
                    continue  # that is the function's, not the model's
                occurrence = max(occurrence, run.count(number))  # who takes every visit waits for the next
                occurrence -= before[number] if number < len(before) else 0
                found[theirs] = min(occurrence, found.get(theirs, occurrence))
        return [[number, occurrence] for number, occurrence in found.items()]


class Prepared:
    """An input that the model's process has prepared and keeps."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
