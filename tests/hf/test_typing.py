"""Programs of our README and of the 0.6.2 README under mypy --strict and pyright, and the stub of a real model."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import checkers
import pytest
import zoo

from nnsight import LanguageModel
from nnsight.builtin.stubs import write_stub

ROOT = Path(__file__).parents[2]
PRELUDE = """
import nnsight
import torch
from nnsight import LanguageModel

model = LanguageModel("openai-community/gpt2", device_map="auto", dispatch=True)
"""
#: `list().save()`: no checker knows that lists can be saved in a block. `nnsight.save([])` says the same, and is clean.
SAVED_LIST = re.compile(r'"list\[\w+\]" has no attribute "save"|Cannot access attribute "save" for class "list\[\w+\]"')
USE = """
from typing import TYPE_CHECKING, cast

from nnsight import LanguageModel

if TYPE_CHECKING:
    from gpt2_tree import Model

model = cast("Model", LanguageModel("openai-community/gpt2"))
with model.trace("Hello"):
    model.transformer.h[0].mlp.output[:] = 0
    hidden = model.transformer.h[-1].attn.c_proj.output
    logits = model.lm_head.output
with model.generate("Hello", max_new_tokens=2) as tracer:
    ids = model.generator.output
    steps = model.generator.streamer.output
print(hidden.shape, logits, ids, steps, model.tokenizer.decode(ids[0]), model.config.n_layer)
reveal_type(model.transformer.h[0].attn)
reveal_type(model.lm_head.in_features)
model.transformer.h[0].atn
model.transfromer
"""


def programs():
    """Yield name and text of the programs of 0.6.2 that the tests run word for word."""
    for file in ("test_readme.py", "test_readme_blocks.py"):
        for node in ast.parse((ROOT / "tests/hf" / file).read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                text = node.value.value
                if isinstance(text, str) and "model" in text and "\n" in text:
                    needs = PRELUDE if "LanguageModel(" not in text else "import nnsight\nimport torch\n"
                    yield f"old_{node.targets[0].id.lower()}.py", needs + text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gpt2_root):
    folder = tmp_path_factory.mktemp("typed")
    old = dict(programs())
    assert len(old) >= 15
    pages = [ROOT / "README.md", ROOT / "docs/naming.md", ROOT / "plugins/hf/README.md"]
    ours = {}
    for page in pages:
        snippets = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        if snippets:
            ours[f"our_{page.parent.name}_{page.stem}.py".replace("-", "_").lower()] = "\n".join(snippets)
    assert ours
    done = subprocess.run(
        [sys.executable, "-m", "nnsight", "stubs", "openai-community/gpt2", "-o", folder / "gpt2_tree.pyi"],
        cwd=gpt2_root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, text in {**old, **ours, "use_gpt2.py": USE}.items():
        (folder / name).write_text(text, "utf-8")
    return folder, tuple(sorted([*old, *ours, "use_gpt2.py"]))


@pytest.mark.slow
@pytest.mark.parametrize("check", [checkers.mypy, checkers.pyright])
def test_programs_are_clean(folder, check):
    report, errors = check(folder[0], *folder[1])
    theirs = [error for error in errors if error[0].startswith("our_")]
    assert theirs == [], report
    old = [(file, text) for file, _, text in errors if file.startswith("old_") and not SAVED_LIST.search(text)]
    assert old == [], report
    listed = {file for file, _, _ in errors if file.startswith("old_")}
    assert listed == {name for name, text in programs() if "list().save()" in text}


@pytest.mark.slow
@pytest.mark.parametrize("check", [checkers.mypy, checkers.pyright])
def test_the_stub_of_a_repository_knows_its_parts(folder, check):
    report, errors = check(folder[0], *folder[1])
    lines = USE.splitlines()
    wrong = {lines[line - 1] for file, line, _ in errors if file == "use_gpt2.py"}
    assert wrong == {"model.transformer.h[0].atn", "model.transfromer"}
    revealed = re.findall(r'use_gpt2.*(?:Revealed type is|Type of ".*" is) "(?:[\w.]+\.)?(\w+)"', report)
    assert revealed == ["GPT2Attention", "int"]
    assert [error for error in errors if error[0] == "gpt2_tree.pyi"] == []


def test_standard_names_are_in_the_stub(gpt2_root, tmp_path):
    command = ["stubs", "openai-community/gpt2", "--standard-names", "-o", tmp_path / "standard.pyi"]
    done = subprocess.run([sys.executable, "-m", "nnsight", *command], cwd=gpt2_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "standard.pyi").read_text("utf-8")
    for line in ("layers: ModuleList", "self_attn: GPT2Attention", "ln_final: LayerNorm", "num_layers: int"):
        assert f"    {line}\n" in text
    assert "standard_names=True" in done.stdout


def test_a_repository_that_is_not_there_is_told_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nnsight", "stubs", "nobody/nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Nothing to load at 'nobody/nothing'" in done.stderr
    assert "Traceback" not in done.stderr and not [*tmp_path.iterdir()]


def test_modules_read_like_one_are_in_the_stub():
    text = write_stub(LanguageModel(zoo.build("opt"), standard_names=True))
    layer = text[text.index("class OPTDecoderLayer(") :].split("\nclass ")[0]
    assert "    mlp: Any\n" in layer and "    self_attn: OPTAttention\n" in layer
