"""Frames over a socket: a kind, a length, and a body (`wire`). Both ends of a runner's conversation use it.

Frames from a runner are counted and bounded here, before anything looks into them; a deadline holds for every wait.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from enum import IntEnum, unique
from typing import Any

from nnsight_ndif import wire
from nnsight_ndif.errors import FrameError, RunnerError, RunnerTimeoutError

_HEADER = struct.Struct("<BI")
_MAX_BODY = 64 << 20
_CHUNK = 1 << 20
_TOO_LONG = "The block took longer than it may; its process was killed."


@unique
class Kind(IntEnum):
    """What a frame asks for or answers. The first group comes from the runner, the second from the model."""

    PREPARE = 1  # an input, as the model class takes it
    JOIN = 2  # inputs of several invokes, into one call
    ROWS = 3  # which rows of a tensor are an invoke's
    OPEN = 4  # begin a run
    GO = 5  # go on to any of these locations, with what has become of this one's value
    HOOKED = 6  # as CALL, within the run
    CLOSE = 7  # the run's block is over
    CALL = 8  # call a module
    ATTRIBUTE = 9  # of a module: parameter, buffer, config
    BACKWARD = 10  # gradients for what was served
    PRINT = 11
    WARN = 12
    DONE = 13  # the job is over: what was saved
    RAISED = 14  # the job is over: an exception
    HELP = 15  # call a method of what stands beside the model, a tokenizer
    SOURCE = 16  # tell of a function inside a module's forward
    PART = 17  # of a result that is too large to cross at once
    GIVEN = 18  # what prepared inputs hold

    JOB = 32  # the first frame: what to run
    VALUE = 33
    VISIT = 34  # the model stands at a location
    OVER = 35  # the run has no more of what was asked for
    FAILED = 36  # the model, or the request, raised
    DIED = 37  # from whoever watches the runner: how it ended


_KINDS = {int(kind): kind for kind in Kind}


class Channel:
    """One end of a conversation.

    Args:
        connection: a stream socket.
        deadline: when waiting ends, on the monotonic clock; None for never.
        turns: how many frames may come in all.
    """

    def __init__(self, connection: socket.socket, deadline: float | None = None, turns: int | None = None) -> None:
        self._socket = connection
        self._deadline = deadline
        self._turns = turns
        connection.setblocking(deadline is None)

    def send(self, kind: Kind, content: Any = None) -> None:
        """Send a frame.

        Raises:
            FrameError: the content cannot be sent.
            RunnerError: the other end is gone.
            RunnerTimeoutError: it does not read.
        """
        body = wire.encode(content)
        if len(body) > _MAX_BODY:
            raise FrameError(f"a message of {len(body)} bytes is too large: {_MAX_BODY} is the most")
        view = memoryview(_HEADER.pack(kind, len(body)) + body)
        while view:
            try:
                view = view[self._socket.send(view[:_CHUNK]) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise RunnerError(f"The other end of a runner is gone: {error}") from None

    def receive(self) -> tuple[Kind, Any]:
        """Wait for the next frame.

        Raises:
            FrameError: what came is no frame, or one too many.
            RunnerError: the other end is gone.
            RunnerTimeoutError: the deadline has passed.
        """
        if self._turns is not None:
            self._turns -= 1
            if self._turns < 0:
                raise FrameError("a block has sent more messages than it may")
        number, length = _HEADER.unpack(self._take(_HEADER.size))
        if number not in _KINDS:
            raise FrameError(f"a message is of the unknown kind {number}")
        if length > _MAX_BODY:
            raise FrameError(f"a message announces {length} bytes: {_MAX_BODY} is the most")
        return _KINDS[number], wire.decode(self._take(length))

    def check_time(self) -> None:
        """Raise when the deadline has passed.

        Raises:
            RunnerTimeoutError: it has.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise RunnerTimeoutError(_TOO_LONG)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = self._socket.recv(min(count - len(data), _CHUNK))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise RunnerError(f"The other end of a runner is gone: {error}") from None
            if not part:
                raise RunnerError("The process that runs the block has ended without a word.")
            data += part
        return bytes(data)

    def _wait(self, event: int) -> None:
        assert self._deadline is not None
        poll = select.poll()
        poll.register(self._socket, event)
        left = self._deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise RunnerTimeoutError(_TOO_LONG)
