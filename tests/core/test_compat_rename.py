"""The mappings that programs of 0.6 and 0.7 give as `rename=`: each test is one, as users write it."""

from __future__ import annotations

import torch
from modules import rows, seeded
from torch import nn

from nnsight import NNsight


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mlp(self.attn(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Linear(8, 8)
        self.h = nn.ModuleList(Layer() for _ in range(2))
        self.ln_f = nn.LayerNorm(8)

    def forward(self, x):
        x = self.wte(x)
        for layer in self.h:
            x = layer(x)
        return self.ln_f(x)


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = Transformer()
        self.lm_head = nn.Linear(8, 12)

    def forward(self, x):
        return self.lm_head(self.transformer(x))


def wrapped(rename):
    return NNsight(seeded(Causal), rename=rename)


def test_single_names_wherever_they_occur():
    model = wrapped({"attn": "self_attn", "h": "layers"})
    assert model.transformer.layers[0].self_attn is model.transformer.h[0].attn
    with model.trace(rows()):
        one = model.transformer.layers[1].self_attn.output.save()
    with model.trace(rows()):
        two = model.transformer.h[1].attn.output.save()
    assert torch.equal(one, two)


def test_dotted_path_to_an_alias_of_the_root():
    model = wrapped({"transformer.h": "layers", ".transformer.ln_f": "ln_final", "transformer.wte": "embed_tokens"})
    assert model.layers is model.transformer.h
    assert model.ln_final is model.transformer.ln_f
    assert model.embed_tokens is model.transformer.wte


def test_several_sources_for_one_alias_and_keys_that_match_nothing():
    model = wrapped({name: "self_attn" for name in ("attn", "attention", "self_attention", "norm_attn_norm", "mixer")})
    assert model.transformer.h[0].self_attn is model.transformer.h[0].attn


def test_chain_of_names_that_are_renamed_themselves():
    model = wrapped({
        "transformer": "model",
        "gpt_neox": "model",
        "h": "layers",
        "blocks": "layers",
        "model.layers": "layers",
        "model.ln_f": "ln_final",
        "final_layernorm": "ln_final",
    })  # fmt: skip
    assert model.model is model.transformer
    assert model.layers is model.transformer.h
    assert model.layers[1] is model.model.layers[1]
    assert model.ln_final is model.transformer.ln_f
    with model.trace(rows()):
        hidden = model.layers[1].output.save()
        final = model.ln_final.output.save()
    assert torch.equal(final, model.transformer.ln_f._module(hidden))


def test_original_names_stay_valid_and_absent_ones_are_absent():
    model = wrapped({"transformer": "model", "mixer": "self_attn", "router": "gate"})
    assert hasattr(model, "transformer")
    assert hasattr(model, "model")
    assert hasattr(model.transformer, "h")
    assert not hasattr(model.transformer.h[0], "self_attn")
    assert not hasattr(model.transformer.h[0], "gate")
    assert not hasattr(model, "layers")


def test_values_are_set_and_modules_called_under_new_names():
    net = seeded(Causal)
    model = NNsight(net, rename={"transformer.h": "layers", "lm_head": "unembed"})
    with model.trace(rows()):
        model.layers[0].output = torch.zeros(2, 8)
        out = model.unembed.output.save()
    with torch.no_grad():
        expected = net.lm_head(net.transformer.ln_f(net.transformer.h[1](torch.zeros(2, 8))))
    assert torch.allclose(out, expected)
    assert torch.equal(model.unembed(torch.ones(1, 8)), net.lm_head(torch.ones(1, 8)))
