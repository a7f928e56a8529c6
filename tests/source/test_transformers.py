"""`.source` in models of transformers, beside the same done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import NNsight


def test_gpt2_attention_equals_a_copy_of_it_written_by_hand(gpt2, ids):
    attn = gpt2.transformer.h[0].attn
    model = NNsight(gpt2)
    source = model.transformer.h[0].attn.source
    with torch.no_grad():
        with model.trace(input_ids=ids):
            hidden = model.transformer.h[0].attn.inputs[0][0]
            fused = source.self_c_attn_1.output
            split = source.split_1.output
            query = source.vars.query_states_2.output
            heads, weights = source.attention_interface_0.output
            merged = source.contiguous_0.output
            projected = source.self_c_proj_0.output
            returned = source.returns[0].output
        by_hand = torch.addmm(attn.c_attn.bias, hidden.view(-1, 32), attn.c_attn.weight).view(1, 6, 96)
        assert torch.equal(fused, by_hand)
        q, k, v = by_hand.split(32, dim=2)
        assert all(map(torch.equal, split, (q, k, v)))
        q, k, v = (part.view(1, 6, 4, 8).transpose(1, 2) for part in (q, k, v))
        assert torch.equal(query, q)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.allclose(heads, mixed.transpose(1, 2), atol=1e-6)
        assert weights is None
        assert torch.equal(merged, heads.reshape(1, 6, 32))
        assert torch.equal(projected, torch.addmm(attn.c_proj.bias, merged.view(-1, 32), attn.c_proj.weight)[None])
        assert torch.equal(returned[0], projected)


def test_edit_of_an_attention_call_equals_the_same_edit_by_monkeypatching(llama, ids, monkeypatch):
    from transformers.models.llama import modeling_llama

    model = NNsight(llama)
    attn = model.model.layers[1].self_attn
    with torch.no_grad(), model.trace(input_ids=ids) as tracer:
        mixed, weights = attn.source.attention_interface_0.output
        attn.source.attention_interface_0.output = (mixed * 2, weights)
        edited = tracer.result.logits

    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
    name = llama.config._attn_implementation
    original = functions[name]

    def doubled(module, *args, **kwargs):
        mixed, weights = original(module, *args, **kwargs)
        return (mixed * 2, weights) if module is llama.model.layers[1].self_attn else (mixed, weights)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setitem(functions._global_mapping, name, doubled)
        expected = llama(ids).logits
    with torch.no_grad():
        unedited = llama(ids).logits
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, unedited)


def test_input_of_a_call_edited_equals_the_same_edit_by_monkeypatching(llama, ids, monkeypatch):
    from transformers.models.llama import modeling_llama

    model = NNsight(llama)
    with torch.no_grad(), model.trace(input_ids=ids) as tracer:
        call = model.model.layers[0].self_attn.source.apply_rotary_pos_emb_0
        (query, key, *rest), kwargs = call.inputs
        call.inputs = ((query + 1, key, *rest), kwargs)
        edited = tracer.result.logits
    original, calls = modeling_llama.apply_rotary_pos_emb, []

    def shifted(query, *args, **kwargs):
        calls.append(1)
        return original(query + 1 if len(calls) == 1 else query, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", shifted)
    with torch.no_grad():
        assert torch.equal(edited, llama(ids).logits)


def test_levels_below_a_call_equal_what_the_model_itself_gives_out(random_model, ids):
    eager = random_model("gpt2", attn_implementation="eager")
    model = NNsight(eager)
    with torch.no_grad():
        expected = eager(ids, output_attentions=True).attentions
        with model.trace(input_ids=ids):
            inner = model.transformer.h[0].attn.source.attention_interface_0.source
            scores = inner.vars.attn_weights_1.output.clone()
            deepest = inner.nn_functional_softmax_0.source.input_softmax_0.output.clone()
            pattern = inner.nn_functional_softmax_0.output.clone()
            dropped = inner.nn_functional_dropout_0.output.clone()
            second = model.transformer.h[1].attn.source.attention_interface_0.source.nn_functional_softmax_0.output
    assert torch.equal(scores.softmax(-1), pattern)
    assert torch.equal(deepest, pattern)
    assert torch.equal(pattern, expected[0])
    assert torch.equal(dropped, expected[0])
    assert torch.equal(second, expected[1])


def test_methods_of_a_module_are_looked_into(random_model, ids):
    gemma = random_model("gemma2")
    model = NNsight(gemma)
    norm = gemma.model.layers[0].input_layernorm
    with torch.no_grad():
        with model.trace(input_ids=ids):
            hidden = model.model.layers[0].input_layernorm.input
            scale = model.model.layers[0].input_layernorm.source.self__norm_0.source.torch_rsqrt_0.output
    assert torch.equal(scale, torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + norm.eps))


def test_experts_that_are_computed_together_are_reached_through_the_wrapper(random_model, ids, monkeypatch):
    from transformers.integrations import moe

    mixtral = random_model("mixtral")
    model = NNsight(mixtral)
    assert mixtral.config._experts_implementation == "grouped_mm"
    source = model.model.layers[1].mlp.experts.source
    with torch.no_grad(), model.trace(input_ids=ids) as tracer:
        inside = source.wrapper.experts_forward_0.source
        inside._grouped_linear_1.output = inside._grouped_linear_1.output * 2
        edited = tracer.result.logits
    with pytest.raises(ValueError, match="was not called: what it is wrapped in called something else"):
        with model.trace(input_ids=ids):
            source.nn_functional_linear_0.output
    linear, calls = moe._grouped_linear, []

    def doubled(*args, **kwargs):
        calls.append(1)
        return linear(*args, **kwargs) * (2 if len(calls) == 4 else 1)

    monkeypatch.setattr(moe, "_grouped_linear", doubled)
    with torch.no_grad():
        assert torch.equal(edited, mixtral(ids).logits)
    assert len(calls) == 6


def test_edit_three_levels_deep_reaches_the_result(random_model, ids, monkeypatch):
    eager = random_model("gpt2", attn_implementation="eager")
    model = NNsight(eager)
    with torch.no_grad(), model.trace(input_ids=ids) as tracer:
        inner = model.transformer.h[1].attn.source.attention_interface_0.source
        inner.nn_functional_softmax_0.source.input_softmax_0.output[:, :, :, 0] = 0
        edited = tracer.result.logits
    softmax, calls = nn.functional.softmax, []

    def without_first(*args, **kwargs):
        calls.append(1)
        pattern = softmax(*args, **kwargs)
        if len(calls) == 2:
            pattern[:, :, :, 0] = 0
        return pattern

    monkeypatch.setattr(nn.functional, "softmax", without_first)
    with torch.no_grad():
        assert torch.equal(edited, eager(ids).logits)
    assert len(calls) == 3


def test_steps_of_a_generation(gpt2, ids):
    model = NNsight(gpt2)
    hidden = []
    handle = gpt2.transformer.h[1].attn.c_proj.register_forward_hook(lambda *call: hidden.append(call[2].clone()))
    expected = gpt2.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    seen = []
    with model.trace(ids, max_new_tokens=4, do_sample=False, fn="generate") as tracer:
        for _ in tracer.iter[:]:
            seen.append(model.transformer.h[1].attn.source.self_c_proj_0.output)
        result = tracer.result
    assert torch.equal(result, expected)
    assert len(seen) == 4
    assert all(map(torch.equal, seen, hidden))


def test_first_asked_for_in_a_later_step_means_that_step(gpt2, ids):
    model = NNsight(gpt2)
    hidden = []
    handle = gpt2.transformer.h[1].attn.c_proj.register_forward_hook(lambda *call: hidden.append(call[2].clone()))
    gpt2.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    with model.trace(ids, max_new_tokens=4, do_sample=False, fn="generate") as tracer:
        for step in tracer.iter[:]:
            model.transformer.h[0].output
            if step == 2:
                late = model.transformer.h[1].attn.source.self_c_proj_0.output
    assert torch.equal(late, hidden[2])


@pytest.mark.weights
def test_pattern_of_smollm2_looks_from_is_to_france(smollm2_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(smollm2_folder, attn_implementation="eager").eval()
    prompt = AutoTokenizer.from_pretrained(smollm2_folder)("The capital of France is", return_tensors="pt")
    words = prompt["input_ids"][0].tolist()
    assert len(words) == 5  # The, capital, of, France, is
    model = NNsight(net)
    patterns = []
    with torch.no_grad():
        expected = net(**prompt, output_attentions=True).attentions
        with model.trace(**prompt):
            for layer in model.model.layers:
                inner = layer.self_attn.source.attention_interface_0.source
                patterns.append(inner.nn_functional_softmax_0.output)
    assert len(patterns) == len(expected) == 30
    assert all(map(torch.equal, patterns, expected))
    stacked = torch.stack(patterns)[:, 0]  # (L, H, T, T)
    assert torch.allclose(stacked.sum(-1), torch.ones(stacked.shape[:-1]), atol=1e-5)
    looks = stacked[:, :, 4, 3]  # (L, H): from " is" to " France"
    assert divmod(looks.argmax().item(), looks.shape[1]) == (23, 4)  # where the country becomes the answer
    assert looks[23, 4] > 0.85
