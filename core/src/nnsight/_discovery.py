"""Find what installed distributions offer to this library, and what the environment switches off.

One scan reads the entry points of all distributions on `sys.path`; it imports none of them. A distribution whose
metadata cannot be read never stops the others.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

GROUPS = ("nnsight", "nnsight.exports", "nnsight.modeling", "nnsight.envoy", "nnsight.tracer")
CORE = "nnsight-core"
DISABLE = "NNSIGHT_PLUGINS_DISABLE"
ALLOW = "NNSIGHT_PLUGINS_ALLOW"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry point of one distribution.

    Attributes:
        group: one of `GROUPS`.
        name: the name it serves there.
        value: where the object is, as `module` or `module:attribute`.
        distribution: the name of the distribution, normalised.
        version: the version of that distribution.
    """

    group: str
    name: str
    value: str
    distribution: str
    version: str
    _point: importlib.metadata.EntryPoint = field(repr=False, compare=False)

    def load(self) -> object:
        """Import the module and return the object."""
        loaded: object = self._point.load()
        return loaded

    @property
    def origin(self) -> str:
        """The distribution and its version, for messages."""
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        return f"{self.name!r} ({self.origin}, entry point `{self.name} = {self.value}` in group {self.group})"


def normalise(name: str) -> str:
    """Return a distribution or plugin name in the one spelling that is compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).strip("-").lower()


def scan() -> tuple[list[Entry], list[str]]:
    """Read the entry points of every installed distribution.

    Returns:
        The entries in a stable order, and a sentence for each distribution that means this library but cannot be read.
    """
    found: dict[Entry, None] = {}
    problems = []
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        text = _entry_points_text(distribution)
        if "nnsight" not in text:
            continue  # reading the names of all distributions would cost most of the scan
        try:
            name = normalise(distribution.metadata["Name"])
            if name not in seen and not _is_shadowed(name, text):
                found.update(dict.fromkeys(_entries_of(distribution, name)))
            seen.add(name)
        except Exception as error:  # noqa: BLE001 - one damaged installation must not take the others with it
            why = f"{type(error).__name__}: {error}"
            problems.append(f"a distribution cannot be read ({why}), its entry points being {text!r:.200}.")
    return sorted(found, key=lambda entry: (entry.group, entry.name, entry.distribution, entry.value)), problems


def _entry_points_text(distribution: importlib.metadata.Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except Exception:  # noqa: BLE001 - any distribution of the machine, and most have nothing to do with us
        return ""


def _entries_of(distribution: importlib.metadata.Distribution, name: str) -> Iterator[Entry]:
    version = distribution.version
    for point in distribution.entry_points:
        if point.group in GROUPS:
            yield Entry(point.group, point.name, point.value, name, version, point)


def _is_shadowed(name: str, text: str) -> bool:
    """Whether another copy of the distribution comes first on the path; that copy is what gets imported."""
    return importlib.metadata.distribution(name).read_text("entry_points.txt") != text


@dataclass(frozen=True, slots=True)
class Switches:
    """The environment variables that leave plugins out.

    A word in either variable is the name of a distribution, with or without its `nnsight-`, the name of a plugin in
    group `nnsight` (which then means its distribution) or the name of a single entry point. What ships with the core is
    only ever disabled by such a name. An empty variable counts as unset; what both name is disabled.
    """

    disabled: frozenset[str]
    allowed: frozenset[str] | None
    plugin_names: Mapping[str, frozenset[str]]

    @classmethod
    def read(cls, entries: list[Entry]) -> Switches:
        """Read the variables as they are now."""
        names: dict[str, set[str]] = {}
        for entry in entries:
            words = names.setdefault(entry.distribution, {entry.distribution})
            if entry.distribution != CORE:
                words.add(entry.distribution.removeprefix("nnsight-"))
                if entry.group == "nnsight":
                    words.add(normalise(entry.name))
        return cls(_words(DISABLE) or frozenset(), _words(ALLOW), {key: frozenset(v) for key, v in names.items()})

    def verdict(self, entry: Entry) -> str | None:
        """Return the variable that leaves an entry out, or None."""
        mine = self.plugin_names[entry.distribution] | {normalise(entry.name)}
        is_core = entry.distribution == CORE
        if mine & self.disabled or ("*" in self.disabled and not is_core):
            return DISABLE
        if self.allowed is not None and not is_core and not mine & self.allowed and "*" not in self.allowed:
            return ALLOW
        return None

    def strays(self, entries: list[Entry]) -> list[str]:
        """Return the words in either variable that name nothing that is installed."""
        known = {normalise(entry.name) for entry in entries}.union(*self.plugin_names.values())
        return sorted((self.disabled | (self.allowed or frozenset())) - known - {"*"})


def _words(variable: str) -> frozenset[str] | None:
    words = frozenset(normalise(word) for word in os.environ.get(variable, "").split(",") if word.strip())
    return words or None
