"""The tutorial's plugin: what the page shows is what is installed and tested, and it stays under 50 lines."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import nnsight

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "nnsight-glyphnet"
PAGE = (ROOT / "docs" / "plugins" / "tutorial.md").read_text("utf-8")
SHOWN = dict(re.findall(r"^\*\*`([^`]+)`\*\*\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def files(folder):
    """The files of a distribution as they would be in a repository."""
    skipped = {"__pycache__", ".pytest_cache"}
    found = (path for path in folder.rglob("*") if path.is_file() and not skipped & set(path.parts))
    return {path.relative_to(folder).as_posix(): path for path in found}


def test_the_page_shows_every_file_of_the_plugin():
    empty = {name for name, path in files(EXAMPLE).items() if not path.read_bytes()}
    assert empty == {"src/nnsight_glyphnet/py.typed"}
    assert set(SHOWN) == set(files(EXAMPLE)) - empty


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_the_page_shows_a_file_as_it_is(name):
    assert SHOWN[name] == (EXAMPLE / name).read_text("utf-8")


def test_the_plugin_has_under_50_lines():
    counts = {name: len(path.read_text("utf-8").splitlines()) for name, path in files(EXAMPLE / "src").items()}
    assert sum(counts.values()) < 50, counts


def test_the_plugin_uses_public_names_alone():
    public = {*nnsight._MODULE_OF, *nnsight._SUBMODULES}
    for path in (EXAMPLE / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "nnsight":
                assert node.module in ("nnsight", "nnsight.protocols")
                assert {alias.name for alias in node.names} <= public | {"Inputs"}
            elif isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_") or node.attr.startswith("__"), f"uses {node.attr}"


def test_the_plugin_is_installed_as_a_user_would():
    found = metadata.distribution("nnsight-glyphnet")
    assert not Path(str(found.locate_file("nnsight_glyphnet/model.py"))).is_relative_to(ROOT / "docs")
    for name, path in files(EXAMPLE / "src").items():
        assert Path(str(found.locate_file(name))).read_bytes() == path.read_bytes(), f"{name} is out of date: make venv"
    listed = subprocess.run(
        [sys.executable, "-m", "nnsight", "plugins"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    lines = [line.split() for line in listed.splitlines() if "nnsight-glyphnet" in line]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        ("nnsight", "glyphnet", "ok"), ("nnsight.exports", "GlyphClassifier", "ok"),
        ("nnsight.modeling", "glyphnet", "ok"), ("nnsight.tracer", "labels", "ok"),
    ]  # fmt: skip


def test_its_hooks_bring_nothing_heavy():
    program = (
        "import sys, nnsight_glyphnet.hooks as hooks; hooks.nnsight_doctor()\n"
        "print({'torch', 'numpy', 'nnsight', 'glyphnet'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_the_tutorial_followed_to_the_letter_gives_a_plugin_whose_tests_pass(tmp_path):
    """In a folder of its own, loaded from there instead of from where it is installed."""
    folder = tmp_path / "nnsight-glyphnet"
    for name, text in {**SHOWN, "src/nnsight_glyphnet/py.typed": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    (folder / "conftest.py").write_text(
        "import pathlib, nnsight.testing\n"
        "folder = pathlib.Path(__file__).parent\n"
        "loaded = nnsight.testing.loaded_plugin(folder)\n"
        "loaded.__enter__()\n"
        "import nnsight_glyphnet\n"
        "assert pathlib.Path(nnsight_glyphnet.__file__).is_relative_to(folder)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", str(folder)],
        capture_output=True, text=True, timeout=110, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[5-9]\d passed", done.stdout), done.stdout
