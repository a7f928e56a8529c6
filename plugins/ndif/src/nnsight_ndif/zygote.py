"""The warm process that runners are forked from: torch and this library are imported, nothing else has happened.

It takes orders over a socket, one per job. For each it forks a keeper, which enters the namespaces and forks the runner
itself (the first process of its own process namespace: when it ends, all in it do). The keeper reports how the runner
ended. Started with `python -m nnsight_ndif.zygote DESCRIPTOR WAIVED PRELOAD`.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from typing import Any

from nnsight_ndif import isolation
from nnsight_ndif.channel import Channel, Kind

_MAX_ORDER = 1 << 16


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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    gc.collect()
    gc.freeze()  # else the collector would write to, and so copy, every page
    orders.send(json.dumps(lost).encode())
    while True:
        data, descriptors = _receive(orders)
        if not data:
            return
        keeper = os.fork()
        if not keeper:
            orders.close()
            _keep(json.loads(data), descriptors, waived)
        watched = os.pidfd_open(keeper)
        socket.send_fds(orders, [b"started"], [watched])
        for descriptor in (watched, *descriptors):
            os.close(descriptor)


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


def _keep(order: dict[str, Any], descriptors: list[int], waived: list[str]) -> None:
    """Isolate and start the runner, wait for its end, and say how it ended. Does not return."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        _leave_surroundings(descriptors)
        if "namespaces" not in waived:
            isolation.enter_namespaces()
        runner = os.fork()
        if not runner:
            _run(order, descriptors, waived)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        _, result = os.waitpid(runner, 0)
        status = 0 if result == 0 else 1
        if result:
            told = f"signal {os.WTERMSIG(result)}" if os.WIFSIGNALED(result) else f"status {os.WEXITSTATUS(result)}"
            Channel(socket.socket(fileno=descriptors[0])).send(Kind.DIED, told)
    except BaseException as error:  # noqa: BLE001 - the end of a process: all it can do is say so
        with contextlib.suppress(BaseException):
            Channel(socket.socket(fileno=descriptors[0])).send(Kind.DIED, f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


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


def _run(order: dict[str, Any], descriptors: list[int], waived: list[str]) -> None:
    """Be the runner. Does not return."""
    status = 1
    try:
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
