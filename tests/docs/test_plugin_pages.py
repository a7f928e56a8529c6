"""The pages for writers of plugins: every hook and group has its place, links lead somewhere, the suites shown pass."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnsight import hookspecs, testing
from nnsight._discovery import GROUPS
from nnsight.testing import ModelConformance, StepsConformance

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "plugins"
PAGES = sorted(FOLDER.rglob("*.md"))
SPECS = sorted(name for name in vars(hookspecs) if name.startswith("nnsight_"))


def text_of(name):
    return (FOLDER / name).read_text("utf-8")


@pytest.mark.parametrize("name", SPECS)
def test_hook_has_a_page_that_says_when_it_fires_as_its_specification_does(name):
    spec = getattr(hookspecs, name)
    page = text_of(f"hooks/{name}.md")
    parameters = list(inspect.signature(spec).parameters)
    assert page.startswith(f"# `{name}({', '.join(parameters)})`\n")
    fires = re.split(r"[,;:.]", inspect.getdoc(spec))[0]
    assert " ".join(fires.split()) in " ".join(page.split())
    assert all(f"- `{parameter}`: " in page for parameter in parameters)
    assert "```python" in page and f"def {name}(" in page
    assert f"[`{name}`]({name}.md)" in text_of("hooks/index.md")


def test_there_is_no_page_for_a_hook_that_does_not_exist():
    assert {path.stem for path in (FOLDER / "hooks").iterdir()} == {"index", *SPECS}


def test_every_group_of_entry_points_is_explained():
    page = text_of("entry-points.md")
    assert all(f"| `{group}` |" in page for group in GROUPS)


def test_everything_of_nnsight_testing_is_mentioned():
    page = text_of("testing.md")
    unmentioned = {name for name in testing._MODULE_OF if name not in page}
    assert unmentioned == {"CAPTURED", "INLINE", "Given", "LoadedPlugin"}
    said = set(re.findall(r"^\| `(\w+)", page, re.MULTILINE))
    suite = {name for name in dir(ModelConformance) if not name.startswith(("_", "test"))}
    settings = {"run_plainly", "joins_invokes", "padding", "tolerance", "bad_inputs", "loss"}
    assert settings <= said & suite
    for name in ("make_module", "make_model", "inputs", "step_method", "step_options", "run_steps_plainly"):
        assert name in page and hasattr(StepsConformance, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_suites_that_the_page_shows_pass(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", text_of("testing.md"), re.MULTILINE | re.DOTALL)
    file = tmp_path / "test_shown.py"
    file.write_text("\n\n".join(blocks), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not Local", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1\d\d passed, \d+ deselected, 1 xfailed", done.stdout), done.stdout
