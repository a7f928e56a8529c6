"""Throwaway distributions on a path of their own, and fresh interpreters that see them and no other plugin."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pluggy
import pytest
import torch
from modules import Net, seeded

import nnsight
from nnsight.builtin._gradients import thread

CORE_SOURCE = Path(nnsight.__file__).parents[1]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """A folder with everything that is installed, except plugins of nnsight: discovery there is real but known."""
    folder = tmp_path_factory.mktemp("libraries")
    for installed in Path(pluggy.__file__).parents[1].iterdir():
        name = installed.name
        is_plugin = name.startswith(("nnsight", "__editable__", "_nnsight")) or name.endswith(".pth")
        if not is_plugin or name.startswith("nnsight_core-"):
            (folder / name).symlink_to(installed)
    return folder


class Site:
    """A folder on `sys.path` that distributions are put in, and interpreters that start with it."""

    def __init__(self, folder: Path, libraries: Path) -> None:
        self.folder = folder / "site"
        self.folder.mkdir()
        self.home = folder / "home"
        self.home.mkdir()
        self._libraries = libraries

    def add(self, name, entry_points=None, modules=None, version="1.0"):
        """Install a distribution: `entry_points` is group -> name -> value, `modules` is module -> source."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, points in (entry_points or {}).items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in (modules or {}).items():
            self.module(module, source)
        return info

    def module(self, name, source):
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))

    def environment(self, **variables):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("NNSIGHT_", "NDIF_", "PYTHON"))}
        path = os.pathsep.join(map(str, (self.folder, CORE_SOURCE, self._libraries)))
        home = {"HOME": str(self.home), "XDG_CONFIG_HOME": str(self.home / "config")}
        return {**kept, **home, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **variables}

    def python(self, *arguments, **variables):
        # -S: the real site-packages, with the plugins installed there, stays out of sight.
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, source, **variables):
        """Run a program and return what it printed; fail with its traceback if it fails."""
        done = self.python("-c", textwrap.dedent(source), **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fail(self, source, **variables):
        """Run a program that must fail and return its traceback."""
        done = self.python("-c", textwrap.dedent(source), **variables)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr.strip()

    def nnsight(self, *arguments, **variables):
        """Run `python -m nnsight`."""
        return self.python("-m", "nnsight", *arguments, **variables)


@pytest.fixture
def site(tmp_path, libraries):
    return Site(tmp_path, libraries)


@pytest.fixture
def core_version():
    return importlib.metadata.version("nnsight-core")


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return nnsight.NNsight(net)


@pytest.fixture
def nothing_remains_of_gradients():
    """Assert after a test that no traced backward has left anything in torch, and few threads."""
    yield
    assert "grad" not in torch.Tensor.__dict__
    assert torch.Tensor.grad is torch._C.TensorBase.grad
    assert sum(one.name == "nnsight-backward" for one in threading.enumerate()) <= 2 * thread._KEPT
