"""Programs of 0.6 and 0.7 that subclass and wrap: each test is one, as its users write it, and what it must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import nnsight
from nnsight import LanguageModel, NNsight
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.tracing.globals import Object

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="session")
def logits(plain, tokenizer):
    with torch.no_grad():
        return plain(**tokenizer(PROMPT, return_tensors="pt")).logits


# -- subclasses


@dataclass
class Layout:
    """What a program knows of a model; it keeps the model itself."""

    model: Any
    n_layers: int


class Accessor:
    """Reads and writes one kind of value of every layer."""

    def __init__(self, model: StandardModel, attribute: str) -> None:
        self.model = model
        self.attribute = attribute

    def __getitem__(self, layer: int) -> Object:
        return getattr(self.model.layers[layer], self.attribute)

    def __setitem__(self, layer: int, value: Object) -> None:
        setattr(self.model.layers[layer], self.attribute, value)


class StandardModel(LanguageModel):
    """A model with names of its own: properties with setters, objects that hold it, attributes set before and after."""

    layers: list[Envoy]

    def __init__(self, name: str, *, heads: int | None = None, **kwargs: Any) -> None:
        rename = {"transformer": "model", "h": "layers", "ln_f": "ln_final", **kwargs.pop("rename", {})}
        kwargs.setdefault("attn_implementation", "eager")
        tokenizer_kwargs = {"add_prefix_space": False, **kwargs.pop("tokenizer_kwargs", {})}
        super().__init__(name, rename=rename, tokenizer_kwargs=tokenizer_kwargs, **kwargs)
        self.heads = heads or self.config.n_head
        self.layout = Layout(self, len(self.model.layers))
        self.layers_output = Accessor(self, "output")
        self._scale = 1.0

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = float(value)

    @property
    def token_embeddings(self) -> Object:
        return self.transformer.wte.output

    @token_embeddings.setter
    def token_embeddings(self, value: Object) -> None:
        self.transformer.wte.output = value

    @property
    def layers(self) -> Any:
        return self.model.layers

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.ln_final(hidden))

    @property
    def ln_final(self) -> Any:
        return self.model.ln_final


@pytest.fixture(scope="session")
def standard(gpt2_folder):
    return StandardModel(str(gpt2_folder), heads=4)


def test_subclass_with_its_own_init_attributes_and_objects_that_hold_it(standard, logits):
    assert isinstance(standard, NNsight)
    assert issubclass(LanguageModel, NNsight)
    assert (standard.heads, standard.layout.n_layers) == (4, 12)
    assert standard.layout.model is standard
    with standard.trace(PROMPT):
        hidden = standard.layers_output[3].save()
        standard.layers_output[3] = hidden
        out = standard.lm_head.output.save()
    assert torch.allclose(out, logits, atol=1e-5)
    assert hidden.shape == (1, 10, 32)


def test_properties_with_setters_on_a_subclass(standard, logits):
    standard.scale = 2
    assert standard.scale == 2.0
    with standard.trace(PROMPT):
        embedded = standard.token_embeddings.save()
        standard.token_embeddings = embedded * standard.scale
        out = standard.lm_head.output.save()
    assert torch.equal(embedded, standard.transformer.wte._module(torch.tensor([standard.tokenizer(PROMPT).input_ids])))
    assert not torch.allclose(out, logits, atol=1e-3)
    standard.scale = 1


def test_envoys_are_called_outside_of_traces(standard, logits):
    with standard.trace(PROMPT):
        last = standard.layers[-1].output.save()
    assert torch.allclose(standard.project(last), logits, atol=1e-5)


class Renamed(LanguageModel):
    """Decides on the class by the name, through `__new__`; a class attribute stands where a method is."""

    scan: str = "a word, not the method"

    def __new__(cls, name_or_module: Any, **kwargs: Any) -> Renamed:
        made = super().__new__(cls)
        made.__dict__["was_made_by_new"] = True
        return made

    def __init__(self, name_or_module: Any, **kwargs: Any) -> None:
        super().__init__(name_or_module, **kwargs)


def test_new_and_a_class_attribute_that_shadows_a_method(gpt2_folder, logits):
    model = Renamed(str(gpt2_folder), device_map="cpu", dispatch=True)
    assert model.scan == "a word, not the method"
    assert model.was_made_by_new
    with model.trace(PROMPT):
        out = model.lm_head.output.save()
    assert torch.allclose(out, logits, atol=1e-5)


def test_new_without_init_then_the_constructor_of_the_base(plain, tokenizer, logits):
    class Loader(LanguageModel):
        @classmethod
        def of(cls, module: nn.Module) -> Loader:
            made = cls.__new__(cls)
            super(Loader, made).__init__(module, tokenizer=tokenizer)
            made.kind = "loaded"
            return made

    model = Loader.of(plain)
    assert (type(model), model.kind) == (Loader, "loaded")
    with model.trace(PROMPT):
        out = model.output.logits.save()
    assert torch.allclose(out, logits, atol=1e-5)


def test_all_the_keywords_of_the_constructor(gpt2_folder, plain, tokenizer):
    model = LanguageModel(
        str(gpt2_folder),
        config=plain.config,
        tokenizer=tokenizer,
        tokenizer_kwargs={"padding_side": "right"},
        attn_implementation="eager",
        trust_remote_code=False,
        device_map="cpu",
        dtype=torch.float64,
        dispatch=True,
        revision="main",
        rename={"transformer": "model"},
    )
    assert model.dtype is torch.float64
    assert model.config._attn_implementation == "eager"
    assert model.tokenizer is tokenizer


# -- lazy


def test_config_tokenizer_tree_and_shapes_are_there_without_weights(gpt2_folder, monkeypatch):
    model = LanguageModel(str(gpt2_folder))
    assert not model.dispatched
    assert model.config.n_layer == 12
    assert model.tokenizer.padding_side == "left"
    assert model.name_or_path == str(gpt2_folder)
    assert model.repo_id == str(gpt2_folder)
    assert model.lm_head.weight.shape == (50257, 32)
    assert model.device == torch.device("meta")
    assert isinstance(model._model, nn.Module)
    assert model._model is model._module
    assert model.transformer.h[2]._module is model._module.transformer.h[2]
    assert [name for name, _ in model.transformer.h[0].named_children()] == ["ln_1", "attn", "ln_2", "mlp"]
    assert not model.dispatched


def test_dispatch_and_what_is_there_after_it(gpt2_folder, plain):
    model = LanguageModel(str(gpt2_folder))
    model.dispatch()
    assert model.dispatched
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.eval() is not None
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert model.generation_config.no_repeat_ngram_size == 4
    model.generation_config.max_new_tokens = 2
    with torch.no_grad():
        assert model.generate("Hello").shape == (1, 3)


def test_tokenizer_kwargs_override_the_padding_side(gpt2_folder):
    assert LanguageModel(str(gpt2_folder)).tokenizer.padding_side == "left"
    other = LanguageModel(str(gpt2_folder), tokenizer_kwargs={"padding_side": "right"})
    assert other.tokenizer.padding_side == "right"


# -- modules that are assigned


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(32, 64)
        self.decoder = nn.Linear(64, 32)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encoder(x))

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.decoder(f)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


def test_module_assigned_to_an_attribute_works_in_and_out_of_traces(gpt2_folder):
    model = LanguageModel(str(gpt2_folder), dispatch=True)
    torch.manual_seed(0)
    dictionary = Dictionary()
    model.transformer.h[5].sae = dictionary
    sae = model.transformer.h[5].sae
    assert isinstance(sae, nnsight.Envoy)
    assert sae._module is dictionary
    x = torch.randn(2, 32)
    assert torch.equal(sae(x), dictionary(x))
    assert torch.equal(sae.encode(x), dictionary.encode(x))
    with model.trace(PROMPT):
        hidden = model.transformer.h[5].output
        features = sae.encode(hidden).save()
        model.transformer.h[5].output = sae(hidden)
        changed = model.transformer.h[6].input.save()
    assert torch.equal(features, dictionary.encode(hidden))
    assert torch.equal(changed, dictionary(hidden))


def test_module_that_an_edit_runs_is_read_by_later_traces(gpt2_folder):
    model = LanguageModel(str(gpt2_folder), dispatch=True)
    torch.manual_seed(0)
    model.sae = Dictionary()
    with model.edit(inplace=True):
        model.transformer.h[2].output = model.sae(model.transformer.h[2].output, hook=True)
    with model.trace(PROMPT):
        before = model.sae.input.save()
        inside = model.sae.encoder.output.save()
        after = model.transformer.h[3].input.save()
    assert torch.equal(inside, model.sae._module.encoder(before))
    assert torch.equal(after, model.sae._module(before))
