"""The warm process that runners are forked from: torch and this library are imported, nothing else has happened.

It takes orders over a socket, one per job. For each it forks a process that enters the namespaces, forks the runner
itself (the first process of its own process namespace: when it ends, all in it do) and ends; so the runner becomes a
child of this process, which says how it ended. Started with `python -m nnsight_ndif.zygote DESCRIPTOR WAIVED PRELOAD`.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import select
import socket
import sys
import time
from typing import Any

from nnsight_ndif import isolation
from nnsight_ndif.channel import Channel, Kind
from nnsight_ndif.errors import RunnerError

_MAX_ORDER = 1 << 16
_TELL_SECONDS = 0.1


def main(arguments: list[str]) -> None:
    """Serve orders until the other end is gone."""
    orders = socket.socket(fileno=int(arguments[0]))
    waived = [name for name in arguments[1].split(",") if name]
    for name in filter(None, arguments[2].split(",")):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _warm()
    isolation.prepare()
    lost = isolation.missing(waived)
    isolation.adopt_orphans()
    gc.collect()
    gc.freeze()  # else the collector would write to, and so copy, every page
    orders.send(json.dumps(lost).encode())
    _serve(orders, waived)


def _serve(orders: socket.socket, waived: list[str]) -> None:
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    running: dict[int, tuple[int, int]] = {}  # what watches a runner -> its number, and its socket
    while True:
        for ready, _ in poll.poll():
            if ready in running:
                poll.unregister(ready)
                _tell_end(*running.pop(ready))
                os.close(ready)
                continue
            data, descriptors = _receive(orders)
            if not data:
                return
            started = _start(orders, json.loads(data), descriptors, waived)
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            if started is None:
                os.close(descriptors[0])
            else:
                running[started[0]] = started[1], descriptors[0]
                poll.register(started[0], select.POLLIN)


def _start(
    orders: socket.socket, order: dict[str, Any], descriptors: list[int], waived: list[str]
) -> tuple[int, int] | None:
    """Start a runner; return what watches it, and its number; None when it could not be started."""
    read, write = os.pipe()
    go, give = os.pipe()
    starter = os.fork()
    if not starter:
        for descriptor in (read, give):
            os.close(descriptor)
        _enter(order, descriptors, waived, write, go)
    for descriptor in (write, go):
        os.close(descriptor)
    with open(read, "rb") as said, open(give, "wb", buffering=0) as allowed:
        word = said.read()
        os.waitpid(starter, 0)
        if not word.isdigit():
            orders.send(word or b"it has ended")
            return None
        watched = os.pidfd_open(int(word))
        allowed.write(b"1")  # it is a child of this process now
    socket.send_fds(orders, [b"started"], [watched])
    return watched, int(word)


def _tell_end(runner: int, connection: int) -> None:
    """Say how a runner has ended that did not say so itself."""
    _, result = os.waitpid(runner, 0)
    with socket.socket(fileno=connection) as connected:
        if result:
            told = f"signal {os.WTERMSIG(result)}" if os.WIFSIGNALED(result) else f"status {os.WEXITSTATUS(result)}"
            with contextlib.suppress(RunnerError):
                Channel(connected, time.monotonic() + _TELL_SECONDS).send(Kind.DIED, told)


def _warm() -> None:
    """Import and set up what every runner needs."""
    import torch  # lazy: not before the arguments are known to be good

    torch.set_num_threads(1)  # the pools of OpenMP do not survive a fork
    importlib.import_module("nnsight_ndif.runner").warm()


def _receive(orders: socket.socket) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    data, control, _, _ = orders.recvmsg(_MAX_ORDER, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for _, _, content in control:
        descriptors.frombytes(content)
    return data, list(descriptors)


def _enter(order: dict[str, Any], descriptors: list[int], waived: list[str], write: int, go: int) -> None:
    """Isolate and start the runner, and say its number, or what went wrong. Does not return."""
    word = b""
    try:
        os.setsid()
        _leave_surroundings([*descriptors, write, go])
        if "namespaces" not in waived:
            isolation.enter_namespaces()
        runner = os.fork()
        if not runner:
            os.close(write)
            _run(order, descriptors, waived, go)
        word = str(runner).encode()
    except BaseException as error:  # noqa: BLE001 - the end of a process: all it can do is say so
        word = f"{type(error).__name__}: {error}".encode()
    finally:
        os.write(write, word)
        os._exit(0)


def _leave_surroundings(descriptors: list[int]) -> None:
    """Keep no file but these, no environment, no folder."""
    os.environ.clear()
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    kept = {0, 1, 2, *descriptors}
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _run(order: dict[str, Any], descriptors: list[int], waived: list[str], go: int) -> None:
    """Be the runner. Does not return."""
    status = 1
    try:
        if not os.read(go, 1):
            return  # the parent is gone already
        os.close(go)
        isolation.die_with_parent()
        os.setsid()
        from nnsight_ndif import runner  # lazy: imported already, by `_warm`

        limits = isolation.Limits(**order["limits"])
        prepared = runner.Prepared(descriptors)
        isolation.confine(limits, waived)
        prepared.run()
        status = 0
    except BaseException as error:  # noqa: BLE001 - the end of a process: all it can do is say so
        with contextlib.suppress(BaseException):
            Channel(socket.socket(fileno=descriptors[0])).send(Kind.DIED, f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
