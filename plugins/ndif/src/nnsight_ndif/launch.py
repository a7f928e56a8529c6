"""Starting runners: one zygote per process and kind of order, one runner per job."""

from __future__ import annotations

import array
import atexit
import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from typing import Any

from nnsight_ndif import window
from nnsight_ndif.channel import Channel
from nnsight_ndif.errors import IsolationError, RunnerError
from nnsight_ndif.isolation import MEASURES, Limits

_START_SECONDS = 120.0
_lock = threading.Lock()
_zygotes: dict[tuple[str, ...], Zygote] = {}


class Runner:
    """A process that runs one job: its channel, its two windows, and a hold on it.

    Attributes:
        channel: what is said to it, and by it.
        incoming: the values it sends; `outgoing` those sent to it.
    """

    def __init__(self, channel: Channel, incoming: window.Window, outgoing: window.Window, watched: int) -> None:
        self.channel = channel
        self.incoming = incoming
        self.outgoing = outgoing
        self._watched = watched

    def close(self) -> None:
        """Kill the process, whatever it is doing, and let go of everything."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._watched, signal.SIGKILL)
        os.close(self._watched)
        self.channel.close()
        self.incoming.close()
        self.outgoing.close()


class Zygote:
    """The warm process, seen from the process of the model.

    Args:
        waived: measures of isolation that may be missing.
        preload: modules that it imports, if they are there.

    Raises:
        IsolationError: the system cannot give a measure that is not waived.
        RunnerError: it does not start.
    """

    def __init__(self, waived: Collection[str] = (), preload: Collection[str] = ()) -> None:
        unknown = sorted(set(waived) - set(MEASURES))
        if unknown:
            raise IsolationError(f"There is no measure {', '.join(unknown)}; there are: {', '.join(MEASURES)}.")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders = ours
        self._lock = threading.Lock()
        self._owner = os.getpid()
        with tempfile.TemporaryFile() as said, theirs:
            command = [
                sys.executable, "-I", "-m", "nnsight_ndif.zygote",
                str(theirs.fileno()), ",".join(waived), ",".join(preload),
            ]  # fmt: skip
            environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], cwd="/", stdin=subprocess.DEVNULL,
                stdout=said, stderr=said,
            )  # fmt: skip
            theirs.close()
            lost = self._first_word(said)
        if lost:
            self.close()
            told = "; ".join(f"{name} ({reason})" for name, reason in lost.items())
            raise IsolationError(
                f"This system cannot isolate a block: {told}. Run it on a Linux that can, or, where every block comes "
                f"from somebody you trust, waive it with NNSIGHT_ALLOW_MISSING={','.join(lost)}."
            )

    def _first_word(self, said: Any) -> dict[str, str]:
        """Wait until the process is warm; return which measures of isolation it has found missing."""
        ready, _, _ = select.select([self._orders], [], [], _START_SECONDS)
        word = self._orders.recv(1 << 16) if ready else b""
        if not word:
            self.close()
            said.seek(0)
            raise RunnerError(f"The process that runners are forked from did not start: {said.read().decode()[-2000:]}")
        lost: dict[str, str] = json.loads(word)
        return lost

    @property
    def is_alive(self) -> bool:
        """Whether it can be given orders by this process."""
        return self._owner == os.getpid() and self._process.poll() is None

    def start(self, limits: Limits) -> Runner:
        """Start a runner.

        Raises:
            RunnerError: it cannot be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        windows = [window.make(limits.window), window.make(limits.window)]
        try:
            order = json.dumps({"limits": dataclasses.asdict(limits)}).encode()
            with self._lock:
                socket.send_fds(self._orders, [order], [theirs.fileno(), *windows])
                watched = self._answer()
            channel = Channel(ours, time.monotonic() + limits.seconds, limits.turns)
            return Runner(channel, window.Window(windows[0]), window.Window(windows[1]), watched)
        except OSError as error:
            ours.close()
            raise RunnerError(f"No runner could be started: {error}") from error
        finally:
            theirs.close()
            for descriptor in windows:
                os.close(descriptor)

    def _answer(self) -> int:
        room = socket.CMSG_SPACE(array.array("i").itemsize)
        word, control, _, _ = self._orders.recvmsg(1 << 12, room, socket.MSG_CMSG_CLOEXEC)
        if not control:
            raise OSError(word.decode(errors="replace") or "it has ended")
        found = array.array("i")
        found.frombytes(control[0][2])
        return found[0]

    def close(self) -> None:
        """End it, and with it the runners that it has started."""
        self._orders.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()


def zygote(preload: Collection[str] = ()) -> Zygote:
    """Return the zygote of this process, starting it for the first order."""
    waived = [name for name in os.environ.get("NNSIGHT_ALLOW_MISSING", "").split(",") if name]
    key = (",".join(waived), *sorted(preload))
    with _lock:
        found = _zygotes.get(key)
        if found is None or not found.is_alive:
            if not _zygotes:
                atexit.register(_close_all)
            found = _zygotes[key] = Zygote(waived, preload)
        return found


def _close_all() -> None:
    while _zygotes:
        _, found = _zygotes.popitem()
        found.close()
