"""Programs of 0.6 and 0.7 that cache with envoys in the list, under renamed and original names."""

from __future__ import annotations

import pytest
import torch

from nnsight import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def renamed(gpt2_folder):
    return LanguageModel(
        str(gpt2_folder),
        rename={"transformer": "model", "h": "layers", "mlp": "feed", "transformer.ln_f": "ln_final"},
        dispatch=True,
    )


@pytest.fixture(scope="module")
def states(plain, tokenizer):
    with torch.no_grad():
        return plain(**tokenizer(PROMPT, return_tensors="pt"), output_hidden_states=True).hidden_states


def test_envoys_in_the_list_read_by_attribute_and_path_under_both_names(renamed, states):
    with torch.no_grad(), renamed.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[renamed.model.layers[0], renamed.transformer.h[4]]).save()
    for layer in (0, 4):
        found = [
            cache.model.layers[layer].output,
            cache.transformer.h[layer].output,
            cache.model.transformer.h[layer].output,
            cache.model.model.layers[layer].output,
            cache[f"model.transformer.h.{layer}"].output,
            cache[f"model.model.layers.{layer}"].output,
            cache[f"transformer.h.{layer}"].output,
            cache[renamed.model.layers[layer]].output,
        ]
        assert all(torch.equal(one, found[0]) for one in found)
        assert torch.allclose(found[0], states[layer + 1], atol=1e-5)
    assert len(cache) == 2
    assert "model.transformer.h.0" in cache
    assert "model.transformer.h.1" not in cache


def test_cache_of_everything_under_renamed_names(renamed, states):
    with torch.no_grad(), renamed.trace(PROMPT) as tracer:
        cache = tracer.cache(include_inputs=True).save()
    assert torch.allclose(cache.model.layers[3].input, states[3], atol=1e-5)
    assert torch.equal(cache.model.layers[3].feed.output, cache["model.transformer.h.3.mlp"].output)
    assert torch.equal(cache.ln_final.output, cache["model.transformer.ln_f"].output)
    assert "model.model.layers.3.feed" in cache.keys(alias=True)
    assert "model.transformer.h.3.mlp" in cache


def test_cache_in_an_invoke_and_in_a_generation(renamed, plain, tokenizer):
    with renamed.generate(max_new_tokens=3, do_sample=False) as tracer:
        with tracer.invoke(PROMPT):
            cache = tracer.cache(modules=[renamed.model.layers[2]]).save()
    steps = cache["model.transformer.h.2"].steps
    assert [tuple(step.output.shape) for step in steps] == [(1, 10, 32), (1, 1, 32), (1, 1, 32)]
