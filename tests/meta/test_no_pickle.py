"""No part of the library makes objects of pickles: a file or a message that it reads runs nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in (ROOT / "core" / "src", *(ROOT / "plugins").glob("*/src"))
    for path in folder.rglob("*.py")
    if "testing" not in path.parts  # a suite that asks whether models can be pickled
)
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "copyreg"}
CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "torch.package", "torch.jit.load"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_uses_no_pickle(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not MODULES & {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in MODULES
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in CALLS


def test_source_files_are_found():
    assert len(FILES) > 100
