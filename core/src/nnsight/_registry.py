"""The registry of names: which plugin serves a name, and the object behind it."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nnsight._discovery import ALLOW, CORE, DISABLE, GROUPS, Entry, Switches, scan
from nnsight._known import KNOWN, extra_for, how_to_install
from nnsight.errors import (
    MissingPluginError,
    PluginConflictError,
    PluginDisabledError,
    PluginError,
    UnknownPluginError,
)

_ABSENT = object()
#: What the objects of a group must be, where that is known: a test, and how it is said.
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "nnsight.modeling": (lambda value: isinstance(value, ModuleType), "a module"),
    "nnsight.envoy": (callable, "a function of the envoy"),
    "nnsight.tracer": (callable, "a function of the tracer"),
}


@dataclass(frozen=True, slots=True)
class Catalog:
    """One scan: every entry, which of them are switched off and by what, and what could not be read."""

    entries: list[Entry]
    problems: list[str]
    switches: Switches
    enabled: dict[tuple[str, str], list[Entry]]
    disabled: dict[Entry, str]

    def claims(self, group: str, name: str) -> list[Entry]:
        """Return the enabled entries that serve a name: more than one is a conflict."""
        return self.enabled.get((group, name), [])


class Registry:
    """Names of the five groups, looked up in the entry points of installed distributions.

    The scan happens at the first look-up, once. Objects are loaded when they are first asked for and kept. All methods
    may be called from any thread; none holds a lock while a plugin is imported, because that import may come back here
    from a thread that waits for the same module.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._catalog: Catalog | None = None
        self._loaded: dict[tuple[str, str], Any] = {}

    @property
    def catalog(self) -> Catalog:
        """What the scan found; the first call scans."""
        if self._catalog is None:
            with self._lock:
                if self._catalog is None:
                    self._catalog = _open_catalog()
        return self._catalog

    def refresh(self) -> None:
        """Forget the scan and every loaded object."""
        with self._lock:
            self._catalog = None
            self._loaded.clear()

    def names(self, group: str) -> tuple[str, ...]:
        """Return the names that installed and enabled plugins serve in a group, sorted."""
        return tuple(sorted(name for held, name in self.catalog.enabled if held == group))

    def serves(self, group: str, name: str) -> bool:
        """Return whether `resolve` has an answer for a name: an object, or an error that says why there is none.

        False only for names that no plugin, installed or known, has anything to do with.
        """
        if (group, name) in self._loaded or (group, name) in self.catalog.enabled:
            return True
        return extra_for(group, name) is not None or self._switched_off(group, name) is not None

    def resolve(self, group: str, name: str) -> Any:
        """Return the object that a plugin serves under a name, importing the plugin at the first use.

        Args:
            group: one of the five entry-point groups.
            name: the name in that group.

        Raises:
            PluginConflictError: several distributions claim the name.
            PluginDisabledError: the environment switches its plugin off.
            MissingPluginError: it is known, but not installed.
            UnknownPluginError: nobody provides it.
            PluginError: its plugin cannot be imported, or serves an object of the wrong kind.
        """
        value = self._loaded.get((group, name), _ABSENT)
        if value is not _ABSENT:
            return value
        return self._loaded.setdefault((group, name), self.load(self.entry(group, name)))

    def entry(self, group: str, name: str) -> Entry:
        """Return the one entry that serves a name; raises as `resolve` does, but imports nothing."""
        if group not in GROUPS:
            raise ValueError(f"{group!r} is not an entry-point group of nnsight; these are: {', '.join(GROUPS)}")
        claims = self.catalog.claims(group, name)
        if len(claims) == 1:
            return claims[0]
        if claims:
            raise PluginConflictError(_conflict(claims))
        off = self._switched_off(group, name)
        if off is not None:
            raise PluginDisabledError(_disabled(off, self.catalog.disabled[off]))
        raise missing(group, name, self.names(group))

    def load(self, entry: Entry) -> Any:
        """Import the object of an entry.

        Raises:
            PluginError: the import failed, for whatever reason, which is its cause; or the object is of the wrong kind.
        """
        try:
            value = entry.load()
        except (Exception, SystemExit) as error:  # a plugin boundary: anything may happen in foreign module code
            raise PluginError(
                f"plugin {entry} could not be loaded: {type(error).__name__}: {error}. Reinstall {entry.distribution}, "
                f"or leave it out with {DISABLE}={entry.distribution}."
            ) from error
        is_right, kind = _KINDS.get(entry.group, (None, ""))
        if is_right is not None and not is_right(value):
            raise PluginError(f"plugin {entry} must be {kind}, not {value!r}.")
        return value

    def _switched_off(self, group: str, name: str) -> Entry | None:
        return next((e for e in self.catalog.disabled if e.group == group and e.name == name), None)


def missing(group: str, name: str, served: tuple[str, ...] = ()) -> MissingPluginError | UnknownPluginError:
    """Return the error for a name that no enabled plugin serves."""
    extra = extra_for(group, name)
    what = f"{name!r}" if group == "nnsight.exports" else f"{name!r} ({group})"
    if extra is None:
        near = nearest(name, [*served, *KNOWN.get(group, {})])
        return UnknownPluginError(f"no plugin provides {what}{near}")
    command = how_to_install(extra)
    try:
        version = importlib.metadata.version(f"nnsight-{extra}")
    except importlib.metadata.PackageNotFoundError:
        text = f"{what} is provided by nnsight-{extra}, which is not installed: {command}"
    else:
        upgrade = command.replace("install", "install --upgrade")
        text = f"nnsight-{extra} {version} is installed but does not provide {what}: {upgrade}"
    return MissingPluginError(text, name=name)


def nearest(name: str, candidates: list[str]) -> str:
    """Return `; did you mean ...?` with the names closest to a misspelt one, or nothing."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(lowered[match] for match in close)}?" if close else ""


def _open_catalog() -> Catalog:
    entries, problems = scan()
    switches = Switches.read(entries)
    enabled: dict[tuple[str, str], list[Entry]] = {}
    disabled = {}
    for entry in entries:
        variable = switches.verdict(entry)
        if variable is not None:
            disabled[entry] = variable
        else:
            enabled.setdefault((entry.group, entry.name), []).append(entry)
    return Catalog(entries, problems, switches, enabled, disabled)


def _conflict(claims: list[Entry]) -> str:
    who = " and ".join(f"{entry.origin} ({entry.value})" for entry in claims)
    one = " or ".join(f"{DISABLE}={entry.distribution}" for entry in claims if entry.distribution != CORE)
    return (
        f"{claims[0].name!r} in group {claims[0].group} is claimed by {who}. "
        f"Uninstall one of them, or choose by setting {one}."
    )


def _disabled(entry: Entry, variable: str) -> str:
    value = os.environ.get(variable, "")
    remedy = f"add {entry.distribution} to it" if variable == ALLOW else f"remove it from {variable}"
    return f"plugin {entry} is switched off by {variable}={value!r}: to use it, {remedy} and start again."
