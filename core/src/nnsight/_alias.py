"""One meta-path finder for modules that live elsewhere: `nnsight.modeling.<name>` and `nnsight.intervention.*`.

It is installed when one of the two packages is imported, never by `import nnsight`. For `nnsight.modeling` the module
in `sys.modules` is the plugin's own one, so nothing is loaded twice and classes keep their real names. The modules of
`nnsight.intervention` are made here; they hold nothing and forward to the table in `nnsight._compat`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from nnsight import plugins
from nnsight._compat import PATHS
from nnsight._registry import nearest
from nnsight.errors import UnknownPluginError

_MODELING = "nnsight.modeling."
_INTERVENTION = "nnsight.intervention."


def install() -> None:
    """Put the finder first on `sys.meta_path`, unless it is there.

    It has to come first: the path finder would load a submodule of an aliased package a second time.
    """
    if not any(type(finder).__qualname__ == AliasFinder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())


class AliasFinder(MetaPathFinder):
    """Finds the two kinds of aliased modules and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an aliased module, None for any other.

        Raises:
            ModuleNotFoundError: the name is under our two packages, but nobody provides it.
            PluginError, ImportError: its plugin is broken, switched off, contested or not installed.
        """
        if fullname.startswith(_MODELING):
            return ModuleSpec(fullname, _Existing(_plugin_module(fullname)))
        if fullname.startswith(_INTERVENTION):
            if fullname not in PATHS:
                near = nearest(fullname, list(PATHS))
                raise ModuleNotFoundError(f"No module named {fullname!r}{near}", name=fullname)
            return ModuleSpec(fullname, _Forwarding(), is_package=any(p.startswith(fullname + ".") for p in PATHS))
        return None


class _Existing(Loader):
    """Loads nothing: puts a module that is already imported in the place of the new one."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def exec_module(self, module: ModuleType) -> None:
        # The import system hands out what is in `sys.modules` after this; `__spec__` of the real module stays its own.
        sys.modules[module.__name__] = self._module


class _Forwarding(Loader):
    """Makes a module whose names come from the table."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__doc__ = f"Where programs of the 0.6 series find: {', '.join(PATHS[name]) or 'its submodules'}."
        module.__getattr__ = partial(attribute_of, name)  # type: ignore[method-assign]
        module.__dir__ = partial(names_in, name)  # type: ignore[method-assign]


def attribute_of(module: str, name: str) -> Any:
    """Return what an old path names: a target of the table, or a submodule.

    Raises:
        AttributeError: the table has no such name.
        ImportError: its target is not there: the message says what is missing.
    """
    target = PATHS[module].get(name)
    if target is None:
        if f"{module}.{name}" in PATHS:
            return import_module(f"{module}.{name}")
        near = "" if name.startswith("_") else nearest(name, names_in(module))
        raise AttributeError(f"module {module!r} has no attribute {name!r}{near}")
    home, _, attribute = target.partition(":")
    try:
        return getattr(import_module(home), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("nnsight"):
            raise
        raise ImportError(
            f"{module}.{name} stands for {attribute!r} of {home!r}, which this version does not have ({error})",
            name=home,
        ) from error


def names_in(module: str) -> list[str]:
    """Return the names and submodules that an old path offers."""
    prefix = module + "."
    children = {path.removeprefix(prefix).partition(".")[0] for path in PATHS if path.startswith(prefix)}
    return sorted({*PATHS[module], *children})


def _plugin_module(fullname: str) -> ModuleType:
    """Return the module behind `nnsight.modeling.<name>`, or behind a submodule of it."""
    name, _, rest = fullname.removeprefix(_MODELING).partition(".")
    try:
        module: ModuleType = plugins.resolve("nnsight.modeling", name)
    except UnknownPluginError as error:
        raise ModuleNotFoundError(f"No module named {fullname!r}: {error}", name=fullname) from None
    return import_module(f"{module.__name__}.{rest}") if rest else module
