"""Loading a plugin that is not installed, for its tests: its entry points hold as if it were, and only meanwhile."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnsight import plugins
from nnsight._discovery import GROUPS, normalise
from nnsight.errors import PluginError, PluginWarning

#: group -> name -> where the object is, `module` or `module:attribute`
EntryPoints = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin under test.

    Attributes:
        name: the name of its distribution.
        entry_points: what it serves, group -> name -> where the object is.
    """

    name: str
    entry_points: EntryPoints

    def object_of(self, group: str, name: str) -> Any:
        """Return the object that it serves under a name, as the library would find it."""
        return plugins.resolve(group, name)


@contextlib.contextmanager
def loaded_plugin(
    folder: str | Path, *, name: str | None = None, entry_points: EntryPoints | None = None
) -> Iterator[LoadedPlugin]:
    """Load a plugin for the time of a `with`, without installing it.

    Args:
        folder: its folder: with a `pyproject.toml`, and the code in `src` or beside it. A plugin of that name which is
            installed stands back meanwhile.
        name: the name of its distribution; by default what `pyproject.toml` says.
        entry_points: what it serves, instead of what `pyproject.toml` says.

    Raises:
        PluginError: an entry point cannot be loaded, or another plugin serves its name, too.
        FileNotFoundError: there is no such folder, or no `pyproject.toml` in it where one is needed.
    """
    root = Path(folder).resolve(strict=True)
    if name is None or entry_points is None:
        said_name, said_points = _read_project(root)
        name, entry_points = name or said_name, said_points if entry_points is None else entry_points
    code = root / "src" if (root / "src").is_dir() else root
    own = {value.partition(":")[0].partition(".")[0] for group in entry_points.values() for value in group.values()}
    with tempfile.TemporaryDirectory() as metadata:
        _write_metadata(Path(metadata), name, entry_points)
        path, modules = list(sys.path), _take_out(own)
        sys.path[:0] = [metadata, str(code)]
        try:
            _start_again()
            _check(entry_points)
            yield LoadedPlugin(name, entry_points)
        finally:
            sys.path[:] = path
            _take_out(own)
            sys.modules.update(modules)
            _start_again()


def _read_project(root: Path) -> tuple[str, EntryPoints]:
    file = root / "pyproject.toml"
    if not file.exists():
        raise FileNotFoundError(
            f"{root} has no pyproject.toml, so what the plugin serves is not known: give its folder, or "
            "name= and entry_points= as well."
        )
    project = tomllib.loads(file.read_text("utf-8")).get("project", {})
    points = {group: found for group, found in project.get("entry-points", {}).items() if group in GROUPS}
    if not points:
        raise PluginError(f"{file} has no entry points in any of the groups of nnsight: {', '.join(GROUPS)}")
    return project.get("name", root.name), points


def _write_metadata(folder: Path, name: str, entry_points: EntryPoints) -> None:
    info = folder / f"{normalise(name).replace('-', '_')}-0+test.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0+test\n", "utf-8")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _take_out(packages: set[str]) -> dict[str, Any]:
    """Remove the modules of some packages from those that are imported; return them."""
    found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    for name in found:
        del sys.modules[name]
    return found


def _start_again() -> None:
    importlib.invalidate_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # what does not load raises, if it is the one under test
        plugins.refresh()


def _check(entry_points: EntryPoints) -> None:
    """Load every object and hook, so that a plugin which does not load fails here and not where it is used."""
    for group, points in entry_points.items():
        for name in points:
            plugins.resolve(group, name)
    for name in entry_points.get("nnsight", {}):
        if name in plugins.hooks.broken:
            raise plugins.hooks.broken[name]
