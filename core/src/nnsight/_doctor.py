"""What `python -m nnsight doctor` checks, and the state of every plugin for `python -m nnsight plugins`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import stat
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import nnsight
from nnsight._discovery import ALLOW, CORE, DISABLE, Entry
from nnsight._known import how_to_install
from nnsight.errors import ConfigError, ConfigWarning, PluginError, PluginWarning
from nnsight.plugins import hooks, registry

Line = tuple[str, bool | None, str]  # what was checked, whether it is well (None: a remark), a sentence


@dataclass(frozen=True, slots=True)
class State:
    """What became of one entry point.

    Attributes:
        entry: the entry point.
        text: `ok`, `disabled by ...`, `conflict with ...` or `broken: ...`.
        is_well: False for a conflict and for a broken plugin.
        hooks: the hooks it implements, if it is in group `nnsight`.
    """

    entry: Entry
    text: str
    is_well: bool
    hooks: tuple[str, ...] = ()


def states() -> list[State]:
    """Load every plugin and return what became of each entry point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # what would be warned about is in the states
        implemented = hooks.implemented()
        return [_state(entry, implemented) for entry in registry.catalog.entries]


def _state(entry: Entry, implemented: dict[str, list[str]]) -> State:
    catalog = registry.catalog
    if entry in catalog.disabled:
        return State(entry, f"disabled by {catalog.disabled[entry]}", True)
    rivals = [
        f"{other.distribution} ({other.value})" for other in catalog.claims(entry.group, entry.name) if other != entry
    ]
    if rivals:
        return State(entry, f"conflict with {', '.join(rivals)}", False)
    if entry.distribution != CORE and _is_core_name(entry):
        return State(entry, f"conflict with {CORE}, whose own name comes first", False)
    if entry.group == "nnsight":
        broken = hooks.broken.get(entry.name)
        if broken is not None:
            return State(entry, f"broken: {_first_line(broken.__cause__ or broken)}", False)
        return State(entry, "ok", True, tuple(implemented.get(entry.name, ())))
    try:
        registry.resolve(entry.group, entry.name)
    except PluginError as error:
        return State(entry, f"broken: {_first_line(error.__cause__ or error)}", False)
    return State(entry, "ok", True)


def _is_core_name(entry: Entry) -> bool:
    """Return whether a name can never be reached, because the core has it itself."""
    match entry.group:
        case "nnsight.exports":
            return entry.name in nnsight._MODULE_OF or entry.name in nnsight._SUBMODULES
        case "nnsight.envoy":
            return hasattr(nnsight.NNsight, entry.name)
        case "nnsight.tracer":
            return hasattr(nnsight.Tracer, entry.name) or entry.name.startswith("_")
    return False


def check() -> Iterator[Line]:
    """Check one thing after the other."""
    yield _check_python()
    for name in ("torch", "greenlet", "pluggy", "pydantic"):
        yield _check_library(name)
    yield _check_guard()
    yield from _check_config()
    yield from _check_plugins()
    yield from hooks.doctor()


def _check_python() -> Line:
    text = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    return "python", sys.version_info >= (3, 11), text


def _check_library(name: str) -> Line:
    try:
        importlib.import_module(name)
        return name, True, importlib.metadata.version(name)
    except Exception as error:  # noqa: BLE001 - a damaged installation may raise anything, and is what is looked for
        return name, False, f"{_first_line(error)}; reinstall it: pip install --force-reinstall {name}"


def _check_guard() -> Line:
    try:
        from nnsight.kernel import guard

        is_in_place, text = guard.status()
    except ImportError as error:
        return "guard", False, f"cannot be checked: {_first_line(error)}"
    return "guard", True if is_in_place else None, text


def _check_config() -> Iterator[Line]:
    try:
        from nnsight.config import CONFIG

        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            CONFIG.reload()
        path = CONFIG.path
    except (ConfigError, ImportError) as error:
        yield "config", False, str(error)
        return
    yield "config", True, f"{path}" if path.exists() else f"{path} (not there: defaults and the environment)"
    for remark in remarks:
        if issubclass(remark.category, ConfigWarning):
            yield "config", None, str(remark.message)
    is_readable = path.exists() and sys.platform != "win32" and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    if is_readable and CONFIG.API.APIKEY:
        yield "config", None, f"others may read {path}, which may hold your key: chmod 600 {path}"


def _check_plugins() -> Iterator[Line]:
    found = states()
    for state in found:
        if not state.is_well:
            yield "plugins", False, f"{state.entry}: {state.text}"
    if all(state.is_well for state in found):
        names = sorted({state.entry.origin for state in found})
        yield "plugins", True, ", ".join(names) or f"none is installed; for Hugging Face models: {how_to_install('hf')}"
    for problem in registry.catalog.problems:
        yield "plugins", False, problem
    for word in registry.catalog.switches.strays(registry.catalog.entries):
        yield "plugins", None, f"{DISABLE} or {ALLOW} says {word!r}, which names no installed plugin"
    try:
        importlib.metadata.version(CORE)
    except importlib.metadata.PackageNotFoundError:
        yield "plugins", False, f"{CORE} is not installed as a distribution, so its own plugins are not found"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
