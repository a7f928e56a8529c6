"""What keeps a user's block inside its process: namespaces, Landlock, limits, and a filter of system calls.

Every measure has a name. What the kernel cannot give is named and refused, unless the operator waives it by that name
(`NNSIGHT_ALLOW_MISSING=landlock,seccomp`). The order matters: each step still needs what the next one takes away.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from nnsight_ndif import seccomp
from nnsight_ndif.errors import IsolationError

#: The measures, in the order in which they are taken. `namespaces` come first, in the parent of the process.
MEASURES = ("namespaces", "no_new_privs", "limits", "landlock", "seccomp")

_NEW_USER, _NEW_MOUNT, _NEW_NET, _NEW_PID, _NEW_IPC, _NEW_UTS = (
    0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000, 0x04000000,
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 38, 4, 36
_CAPABILITY_VERSION = 0x20080522
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR, _PATH_BENEATH, _VERSION = 0x4, 0x8, 1, 1
#: How many kinds of access to files each Landlock ABI knows of, from ABI 1 on.
_FILE_RIGHTS = (13, 14, 15, 15, 16)


@dataclass(frozen=True)
class Limits:
    """What one block may use.

    Attributes:
        seconds: how long it may take in all; then its process is killed.
        memory: bytes of memory beyond what the process starts with.
        window: bytes of the values that may cross at once in one direction.
        turns: how many messages it may send.
        printed: bytes of what it may print.
        files: how many files may be open.
    """

    seconds: float = 600.0
    memory: int = 4 << 30
    window: int = 1 << 30
    turns: int = 1_000_000
    printed: int = 1 << 20
    files: int = 64


@functools.cache
def readable_paths() -> list[str]:
    """Return the folders that a block must be able to read: Python, its packages and the system's libraries."""
    found = {sys.prefix, sys.base_prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/dev/urandom", "/dev/null"}
    found |= {path for path in sys.path if path and os.path.isdir(path)}
    return sorted(path for path in found if os.path.exists(path))


def missing(allowed: Collection[str] = ()) -> dict[str, str]:
    """Return which measures this system cannot give, with the reason, apart from those that are waived.

    It tries each in a process of its own.
    """
    unknown = sorted(set(allowed) - set(MEASURES))
    if unknown:
        raise IsolationError(f"There is no measure {', '.join(unknown)}; there are: {', '.join(MEASURES)}.")
    trials: dict[str, Callable[[], None]] = {
        "namespaces": enter_namespaces,
        "no_new_privs": _renounce,
        "landlock": _try_landlock,
        "limits": lambda: _limit(Limits()),
        "seccomp": _try_filter,
    }
    found = {name: _try(trials[name]) for name in MEASURES if name not in allowed}
    return {name: reason for name, reason in found.items() if reason}


def prepare() -> None:
    """Work out, in the process that runners are forked from, what would be the same in each."""
    readable_paths()
    if seccomp.is_known_machine():
        seccomp.program()
    _libc()


def enter_namespaces() -> None:
    """Give what the calling process starts its own users, mounts, network, processes, queues and host name."""
    if sys.platform != "linux":
        raise OSError("not Linux")
    user, group = os.getuid(), os.getgid()
    _check(_libc().unshare(_NEW_USER | _NEW_MOUNT | _NEW_NET | _NEW_PID | _NEW_IPC | _NEW_UTS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check(_libc().mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))


def confine(limits: Limits, allowed: Collection[str] = ()) -> None:
    """Take every measure but the namespaces, in the process that will run the block. There is no way back.

    Raises:
        OSError: one of them failed, and it is not waived.
    """
    steps: Sequence[tuple[str, Callable[[], None]]] = (
        ("no_new_privs", _renounce),
        ("limits", lambda: _limit(limits)),
        ("landlock", lambda: _landlock(readable_paths())),
        ("seccomp", _filter),
    )
    for name, take in steps:
        if name in allowed:
            with contextlib.suppress(OSError):
                take()
        else:
            take()


def adopt_orphans() -> None:
    """Let what the calling process has started, and its parent has left, become its child (prctl(2), subreaper)."""
    _check(_libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def die_with_parent() -> None:
    """Have the calling process killed when its parent ends."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0))


def _renounce() -> None:
    """Gain no privileges any more, keep no capabilities, and be opaque to other processes of the same user."""
    libc = _libc()
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()))
    _check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def _landlock(paths: Sequence[str]) -> None:
    """Deny every access to files but reading `paths`, TCP, abstract sockets and signals outside (landlock(7))."""
    libc = _libc()
    abi = _check(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION))
    words = [(1 << _FILE_RIGHTS[min(abi, len(_FILE_RIGHTS)) - 1]) - 1]
    words += [0x3] if abi >= 4 else []  # bind and connect of TCP
    words += [0x3] if abi >= 6 else []  # abstract unix sockets, signals
    attributes = (ctypes.c_uint64 * len(words))(*words)
    ruleset = _check(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)), 0))

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]

    try:
        for path in paths:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
                rule = Beneath(rights, opened)
                _check(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0))
            finally:
                os.close(opened)
        _check(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _limit(limits: Limits) -> None:
    """Limit memory, processor time, files and their sizes; no core dumps."""
    used = _virtual_memory()
    seconds = max(1, int(limits.seconds) + 5)
    for kind, value in (
        (resource.RLIMIT_AS, used + limits.memory + 2 * limits.window),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))


def _virtual_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _filter() -> None:
    if not seccomp.is_known_machine():
        raise OSError("there is no filter for this machine")
    seccomp.install()


def _try_landlock() -> None:
    _renounce()
    _landlock(readable_paths())


def _try_filter() -> None:
    _renounce()
    _filter()


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _try(take: Callable[[], None]) -> str:
    """Take a measure in a process of its own; return why it failed, "" when it did not."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = b""
        try:
            take()
        except BaseException as error:  # noqa: BLE001 - a process of its own: all it has to say is why
            status = str(error).encode() or type(error).__name__.encode()
        os.write(write, status)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        reason = file.read().decode()
    os.waitpid(child, 0)
    return reason
