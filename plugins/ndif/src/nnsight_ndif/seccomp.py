"""A filter of system calls for the process that runs a user's block: a BPF program given to the kernel with prctl.

Denied calls fail with EPERM, so the block gets an ordinary PermissionError. A process may make threads, and no
processes: `clone` must say CLONE_THREAD, and `clone3`, whose flags a filter cannot see, does not exist as far as the
block can tell (glibc then uses `clone`). Calls in another numbering (x32, 32 bit) kill the process. See seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct

_LOAD, _EQUAL, _AT_LEAST, _ALL_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

#: machine -> the AUDIT_ARCH_* value, the column of `_CALLS`.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_CLONE, _CLONE3 = (56, 220), (435, 435)

#: What a block has no use for, with the numbers for x86_64 and aarch64 (-1: not there).
_CALLS: dict[str, tuple[int, int]] = {
    # other processes
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "setpgid": (109, 154), "setsid": (112, 157), "prlimit64": (302, 261),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # sockets
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # namespaces, mounts, files by handle
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mknod": (133, -1), "mknodat": (259, 33),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "swapon": (167, 224), "swapoff": (168, 225), "memfd_secret": (447, 447),
    # the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116),
    "acct": (163, 89), "personality": (135, 92), "lookup_dcookie": (212, 18), "vhangup": (153, 58), "iopl": (172, -1),
    "ioperm": (173, -1), "modify_ldt": (154, -1), "uselib": (134, -1), "vmsplice": (278, 75),
    # the clock, names, identity
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "setuid": (105, 146), "setgid": (106, 144),
    "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149),
    "setgroups": (116, 159), "setfsuid": (122, 151), "setfsgid": (123, 152), "capset": (126, 91),
    # System V and POSIX queues, shared between processes
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip


def is_known_machine() -> bool:
    """Return whether there is a filter for this machine."""
    return platform.machine() in _MACHINES


@functools.cache
def program() -> bytes:
    """Return the filter for this machine, as BPF instructions."""
    arch, column = _MACHINES[platform.machine()]
    denied = sorted(numbers[column] for numbers in _CALLS.values() if numbers[column] >= 0)
    refuse = _statement(_RETURN, _ERRNO | errno.EPERM)
    allow = _statement(_RETURN, _ALLOW)
    kill = _statement(_RETURN, _KILL)
    code = [
        _statement(_LOAD, _ARCH), _jump(_EQUAL, arch, 1, 0), kill,
        _statement(_LOAD, _NUMBER), _jump(_AT_LEAST, _X32, 0, 1), kill,
        _jump(_EQUAL, _CLONE3[column], 0, 1), _statement(_RETURN, _ERRNO | errno.ENOSYS),
        _jump(_EQUAL, _CLONE[column], 0, 4),
        _statement(_LOAD, _FIRST_ARGUMENT), _jump(_ALL_SET, _CLONE_THREAD, 0, 1), allow, refuse,
    ]  # fmt: skip
    for number in denied:
        code += [_jump(_EQUAL, number, 0, 1), refuse]
    return b"".join([*code, allow])


def install() -> None:
    """Put the filter in place, for good, for the calling thread and what it starts. Needs no_new_privs.

    Raises:
        OSError: the kernel refused.
    """
    code = program()

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    buffer = ctypes.create_string_buffer(code, len(code))
    filled = Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(filled), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _statement(code: int, value: int) -> bytes:
    return struct.pack("HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
