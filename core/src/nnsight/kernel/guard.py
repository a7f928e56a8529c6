"""Keep torch errors from crashing the process when they are raised inside a greenlet.

`c10::Error` records a C++ backtrace when it is made. Below a greenlet's base the machine stack holds bytes that are
no frames; the unwinder follows them and the process dies of SIGSEGV. libc10 exports the setter of the function that
takes the backtrace, so it is given one that returns a short constant string. Python messages and tracebacks do not
change. Where this cannot be done, `install` says why and the model side runs in a thread (`sides.py`).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

_SETTER = "_ZN3c1020SetStackTraceFetcherESt8functionIFNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEEvEE"
_CONSTANT = "_ZN2at18get_cpu_capabilityB5cxx11Ev"  # std::string at::get_cpu_capability()

_lock = threading.Lock()
_status: tuple[bool, str] | None = None
_keep_alive: list[object] = []


class _StdFunction(ctypes.Structure):
    """libstdc++'s `std::function<std::string()>`: two words of state, a manager, an invoker."""

    _fields_ = (
        ("state", ctypes.c_void_p * 2),
        ("manager", ctypes.c_void_p),
        ("invoker", ctypes.c_void_p),
    )


def install() -> bool:
    """Install the guard once per process; return whether greenlets are safe to use."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _install()
    return _status[0]


def status() -> tuple[bool, str]:
    """Return whether the guard is in place, and one line that says so or says why not."""
    install()
    assert _status is not None
    return _status


def _install() -> tuple[bool, str]:
    if os.environ.get("TORCH_SHOW_CPP_STACKTRACES", "0") not in ("", "0"):
        return False, "TORCH_SHOW_CPP_STACKTRACES is set: backtraces are left on, the model side runs in a thread"
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False, f"not available on {sys.platform}: the model side runs in a thread"
    import torch  # lazy: heavy, and the kernel may be imported without it

    folder = Path(torch.__file__).parent / "lib"
    try:
        c10 = ctypes.CDLL(str(folder / "libc10.so"))
        cpu = ctypes.CDLL(str(folder / "libtorch_cpu.so"))
        libc = ctypes.CDLL(None)
        setter = getattr(c10, _SETTER)
        function = _StdFunction()
        function.invoker = ctypes.cast(getattr(cpu, _CONSTANT), ctypes.c_void_p)
        function.manager = ctypes.cast(libc.labs, ctypes.c_void_p)
    except (OSError, AttributeError) as error:
        return False, f"this torch does not export what the guard needs ({error}): the model side runs in a thread"
    setter.argtypes = [ctypes.c_void_p]
    setter.restype = None
    setter(ctypes.addressof(function))
    _keep_alive.extend((c10, cpu, libc, function))
    return True, "in place: torch takes no C++ backtraces, the model side runs in a greenlet"
