"""Every Python snippet of the documentation runs, in order, in a folder where the tiny GPT-2 is found."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]
    if "```python" in path.read_text("utf-8")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_snippets_run(page, gpt2_root, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(gpt2_root)
    text = page.read_text("utf-8")
    # Line numbers stay those of the page, so that a failure points into it.
    lines = []
    is_code = False
    for line in text.splitlines():
        if re.fullmatch(r"```(python)?\s*", line):
            is_code = line.strip() == "```python"
            lines.append("")
        else:
            lines.append(line if is_code else "")
    path = tmp_path / "page.py"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("page", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    capsys.readouterr()
