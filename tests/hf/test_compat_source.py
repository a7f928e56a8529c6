"""Programs of 0.6 and 0.7 that read inside of forwards: each test is one, as users write it."""

from __future__ import annotations

import pytest
import torch

import nnsight
from nnsight import LanguageModel


@pytest.fixture(scope="module")
def ids():
    return torch.arange(1, 8)[None]


@pytest.fixture(scope="module")
def llama(random_model):
    return LanguageModel(random_model("llama", attn_implementation="eager"))


def test_attention_pattern_below_the_attention_interface(llama, ids, random_model):
    with torch.no_grad():
        with llama.trace(ids):
            attention = llama.model.layers[1].self_attn
            pattern = attention.source.attention_interface_0.source.nn_functional_dropout_0.output.save()
            same = attention.output[1].save()
        expected = llama._module(ids, output_attentions=True).attentions[1]
    assert torch.equal(pattern, same)
    assert torch.equal(pattern, expected)


def test_pattern_edited_in_place_and_assigned(llama, ids):
    results = []
    for how in ("in place", "assigned"):
        with torch.no_grad(), llama.trace(ids):
            dropout = llama.model.layers[0].self_attn.source.attention_interface_0.source.nn_functional_dropout_0
            if how == "in place":
                dropout.output[:, 2] = 0
            else:
                new = dropout.output.clone()
                new[:, 2] = 0
                dropout.output = new
            heads = llama.model.layers[0].self_attn.o_proj.input.save()
            results.append(llama.output.logits.save())
        assert not heads.unflatten(-1, (4, 8))[:, :, 2].any()
        assert heads.unflatten(-1, (4, 8))[:, :, 1].any()
    assert torch.equal(*results)
    with torch.no_grad():
        assert not torch.allclose(results[0], llama._module(ids).logits, atol=1e-4)


def test_method_of_the_attention_three_levels_deep(ids):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=128, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    model = LanguageModel(GPTNeoForCausalLM(config).eval())
    attention = model.transformer.h[0].attn.attention
    with torch.no_grad():
        with model.trace(ids):
            pattern = attention.source.self__attn_0.source.self_attn_dropout_0.output.save()
        expected = model._module(ids, output_attentions=True).attentions[0]
    assert torch.equal(pattern, expected)


def test_inside_of_a_norm(random_model, ids):
    model = LanguageModel(random_model("gemma2"))
    with torch.no_grad(), model.trace(ids):
        norm = model.model.layers[1].input_layernorm
        x = norm.input.save()
        rsqrt = norm.source.self__norm_0.source.torch_rsqrt_0.output.save()
    assert torch.allclose(rsqrt, torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm._module.eps))


def test_names_count_calls_only(llama, ids):
    text = str(llama.model.layers[0].mlp.source)
    assert "self_down_proj_0" in text
    assert "self_act_fn_0" in text
    with llama.trace(ids):
        # three calls and a product: the product has no number among them
        gate = llama.model.layers[0].mlp.source.self_act_fn_0.output.save()
        up = llama.model.layers[0].mlp.source.self_up_proj_0.output.save()
        down = llama.model.layers[0].mlp.source.self_down_proj_0.inputs[0][0].save()
    assert torch.equal(gate * up, down)


def test_source_in_a_scan(random_model, ids):
    model = LanguageModel(random_model("llama", attn_implementation="eager"))
    with model.scan(ids) as tracer:
        attention = model.model.layers[0].self_attn.source.attention_interface_0
        shape = nnsight.save(attention.source.nn_functional_dropout_0.output.shape)
        tracer.stop()
    assert shape == (1, 4, 7, 7)


def test_str_of_a_source_and_of_an_operation_prints_code(llama, ids):
    source = llama.model.layers[0].self_attn.source
    assert "attn_output = self.o_proj(attn_output)" in str(source)
    operation = source.attention_interface_0
    assert "attention_interface(" in str(operation)
    assert "query_states," in str(operation)
    with llama.trace(ids):
        inside = str(llama.model.layers[0].self_attn.source.attention_interface_0.source)
    assert "nn.functional.dropout(" in inside
    assert "nn_functional_dropout_0" in inside


class Patterns:
    """Where a program keeps how to find the attention pattern of a layer."""

    def __init__(self, model):
        self.model = model

    @property
    def source(self):
        return self.model.model.layers[0].self_attn.source.attention_interface_0.source

    @property
    def first(self):
        return self.source.nn_functional_dropout_0.output

    @first.setter
    def first(self, value):
        self.source.nn_functional_dropout_0.output = value

    def every(self):
        for layer in self.model.model.layers:
            yield layer.self_attn.source.attention_interface_0.source.nn_functional_dropout_0.output


def test_resolved_in_properties_generators_and_helpers(llama, ids):
    patterns = Patterns(llama)

    def uniform(pattern):
        return torch.ones_like(pattern) / pattern.shape[-1]

    with torch.no_grad():
        with llama.trace(ids):
            found = nnsight.save(list(patterns.every()))
        expected = llama._module(ids, output_attentions=True).attentions
        with llama.trace(ids):
            patterns.first = uniform(patterns.first)
            heads = llama.model.layers[0].self_attn.o_proj.input.save()
    assert len(found) == 3
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert torch.allclose(heads[:, 0], heads[:, -1])
