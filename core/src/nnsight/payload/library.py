"""What installed packages define travels by its name: the other end imports it. What is the user's own does not."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
import sysconfig
import types
from importlib import metadata
from typing import Any

from nnsight.errors import InputError

#: Installed packages and modules that the other end does not have: they travel as the user's own.
_registered: set[str] = set()


def register(module: types.ModuleType | str) -> None:
    """Let what an installed package defines travel as source, because the other end does not have the package.

    Files of yours that are not installed travel so without it.

    Args:
        module: the package or module, or its name; what is below it is meant, too.

    Raises:
        InputError: there is no such module here.
    """
    name: object = module.__name__ if isinstance(module, types.ModuleType) else module
    if not isinstance(name, str) or not (name in sys.modules or _is_found(name)):
        raise InputError(f"register({module!r}): there is no such module here. Give a module, or its name.")
    _registered.add(name)


def _is_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def is_registered(name: object) -> bool:
    """Return whether a module was registered by its name, or what it is a part of."""
    return isinstance(name, str) and any(name == one or name.startswith(f"{one}.") for one in _registered)


def reference(value: Any) -> list[str] | None:
    """Return module and qualified name ('' for the module itself) of what an installed package defines.

    None where the value has no such name, or is of the user's own files.
    """
    if isinstance(value, types.ModuleType):
        return [value.__name__, ""] if sys.modules.get(value.__name__) is value and is_installed(value) else None
    if not callable(value):
        return None
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(name, str):
        return None
    module = getattr(value, "__module__", None) or (
        "builtins" if isinstance(value, types.BuiltinFunctionType) else None
    )
    short = getattr(value, "__name__", None)
    loaded = sys.modules.get(module) if isinstance(module, str) else None
    if loaded is None or not is_installed(loaded):
        return None
    paths = (path for path in dict.fromkeys((name, short)) if isinstance(path, str))
    return next(([loaded.__name__, path] for path in paths if at(loaded, path) is value), None)


def is_installed(module: types.ModuleType) -> bool:
    """Return whether another process can import a module by its name: Python's own, or an installed package's."""
    if module.__name__ == "__main__" or is_registered(module.__name__):
        return False
    top, _, below = module.__name__.partition(".")
    file: str | None = getattr(module, "__file__", None)
    if file is not None and os.path.isabs(file):
        return file.startswith(_roots()) or _is_ours(top)
    if below:  # a part of a package that has no file of its own, such as one in C
        return top in sys.modules and is_installed(sys.modules[top])
    places = [*getattr(module, "__path__", ())]
    return top in sys.builtin_module_names or any(place.startswith(_roots()) for place in places)


@functools.cache
def _is_ours(package: str) -> bool:
    """Return whether a package is this one or a plugin of it, wherever it is: it may be installed from its sources."""
    if package == "nnsight" or not package.startswith("nnsight_"):
        return package == "nnsight"
    try:
        metadata.distribution(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return False  # a file of the user's that is called so
    return True


@functools.cache
def _roots() -> tuple[str, ...]:
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    return tuple(root + os.sep for root in roots)


def at(value: Any, path: str) -> Any:
    """Return what a dotted name leads to, None for nothing."""
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def is_within(function: types.FunctionType) -> bool:
    """Return whether the code of a function is an installed package's."""
    is_own = is_registered(function.__globals__.get("__name__"))
    return function.__code__.co_filename.startswith(_roots()) and not is_own


def code_reference(function: types.FunctionType) -> list[str] | None:
    """Return module and qualified name of the code of a function that an installed package's function has made.

    Such as what `torch.no_grad()` makes of the function it decorates. None for any other function.
    """
    module, name = function.__globals__.get("__name__"), function.__code__.co_qualname
    if isinstance(module, str) and is_within(function) and find_code(module, name) is function.__code__:
        return [module, name]
    return None


def find_code(module: str, name: str) -> types.CodeType | None:
    """Return the code of an installed package that has a qualified name, None for nothing.

    Args:
        module: the module, which must be loaded.
        name: such as `outer.<locals>.inner`.
    """
    first, *inner = name.split(".<locals>.")
    found = inspect.unwrap(function) if callable(function := at(sys.modules.get(module), first)) else None
    code: Any = getattr(found, "__code__", None)
    for part in inner:
        constants = getattr(code, "co_consts", ())
        code = next((c for c in constants if isinstance(c, types.CodeType) and c.co_name == part), None)
    return code if isinstance(code, types.CodeType) else None
