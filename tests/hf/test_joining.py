"""Prompts of several invokes in one batch: each gets what it gets alone, and touches nobody else's rows."""

import pytest
import torch

from nnsight import LanguageModel
from nnsight_hf.joining import copies_per_prompt, rows_of

FIRST, SECOND, THIRD = [5, 17, 99, 3, 42, 8, 77], [7, 120, 64], [31]


def alone(model, prompt, path="lm_head"):
    with torch.no_grad(), model.trace(prompt):
        value = model.get(path).output
    return value


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom", "gptj", "qwen3", "mixtral"])
def test_invokes_of_different_length_equal_their_prompts_alone(name, random_model):
    model = LanguageModel(random_model(name))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(FIRST):
            first = model.lm_head.output.save()
        with tracer.invoke([SECOND, THIRD]):
            rest = model.lm_head.output.save()
        with tracer.invoke():
            everything = model.lm_head.output.save()
    assert first.shape == (1, 7, 128)
    assert rest.shape == (2, 7, 128)
    assert torch.equal(everything, torch.cat([first, rest]))
    assert torch.allclose(first, alone(model, FIRST), atol=1e-4)
    assert torch.allclose(rest[0, -3:], alone(model, SECOND)[0], atol=1e-4)
    assert torch.allclose(rest[1, -1:], alone(model, THIRD)[0], atol=1e-4)


def test_an_edit_stays_with_its_invoke(random_model):
    model = LanguageModel(random_model("llama"))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(FIRST):
            model.model.layers[0].output[:] = 0
            edited = model.lm_head.output.save()
        with tracer.invoke(SECOND):
            kept = model.lm_head.output.save()
    assert torch.allclose(kept[0, -3:], alone(model, SECOND)[0], atol=1e-4)
    assert not torch.allclose(edited, alone(model, FIRST), atol=1e-2)


def test_prompts_of_equal_length_are_not_given_positions(model):
    with model.trace() as tracer:
        with tracer.invoke("One two"):
            pass
        with tracer.invoke("Three four"):
            pass
        with tracer.invoke():
            keywords = model.inputs[1].save()
    assert set(keywords) == {"input_ids", "attention_mask"}


def test_rows_of_experts_are_an_invokes_tokens(random_model):
    model = LanguageModel(random_model("mixtral"))
    gate = "model.layers.0.mlp.gate"
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(FIRST):
            first = model.model.layers[0].mlp.gate.output[0].save()
        with tracer.invoke(FIRST[::-1]):
            second = model.model.layers[0].mlp.gate.output[0].save()
    assert first.shape == second.shape == (7, 4)
    assert torch.allclose(first, alone(model, FIRST, gate)[0], atol=1e-4)
    assert torch.allclose(second, alone(model, FIRST[::-1], gate)[0], atol=1e-4)


def test_generation_of_invokes(random_model):
    model = LanguageModel(random_model("llama"))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with model.generate(**settings) as tracer:
        with tracer.invoke(FIRST):
            first = tracer.result.save()
        with tracer.invoke(SECOND):
            second = model.generator.output.save()
    assert torch.equal(first, model.generate(FIRST, **settings))
    assert torch.equal(second[:, 4:], model.generate(SECOND, **settings))


def test_beams_belong_to_their_invoke(random_model):
    model = LanguageModel(random_model("llama"))
    settings = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
    with model.generate(**settings) as tracer:
        with tracer.invoke(FIRST):
            hidden = model.model.layers[0].output.save()
            model.model.layers[1].output[:] = 0
            first = tracer.result.save()
        with tracer.invoke(FIRST[::-1]):
            others = model.model.layers[1].output.save()
            second = tracer.result.save()
    assert hidden.shape == others.shape == (3, 7, 32)
    assert others.any()
    assert first.shape == (2, 10)
    assert torch.equal(second, model.generate(FIRST[::-1], **settings))


def test_labels_are_padded_so_that_they_do_not_count(random_model):
    model = LanguageModel(random_model("llama"))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(FIRST, labels=FIRST):
            pass
        with tracer.invoke(SECOND, labels=SECOND):
            pass
        with tracer.invoke():
            labels = model.inputs[1]["labels"].save()
    assert labels.tolist() == [FIRST, [-100] * 4 + SECOND]


@pytest.mark.parametrize(
    ("size", "factors", "expected"),
    [
        (4, {1}, slice(1, 3)),
        (12, {1, 3}, slice(3, 9)),
        (8, {1, 3}, None),
        (5, {1, 3}, None),
        (1, {1}, None),
    ],
)
def test_rows_of(size, factors, expected):
    assert rows_of(size, 4, 1, 2, factors) == expected


def test_copies_are_those_of_the_call_then_of_the_configuration():
    from transformers import GenerationConfig

    assert copies_per_prompt({}, None) == {1}
    assert copies_per_prompt({}, GenerationConfig(num_beams=4)) == {1, 4}
    assert copies_per_prompt({"num_beams": 2, "num_return_sequences": 2}, GenerationConfig(num_beams=4)) == {1, 2}
    assert copies_per_prompt({"generation_config": GenerationConfig(num_beams=5)}, None) == {1, 5}


def test_an_invoke_sees_its_rows_of_the_cache(model, plain, tokenizer):
    with model.trace(use_cache=True) as tracer:
        with tracer.invoke("Hello there"):
            first = model.output.past_key_values
        with tracer.invoke(["Hello again", "Goodbye now"]):
            second = model.output.past_key_values
        with tracer.invoke():
            whole = model.output.past_key_values
    with torch.no_grad():
        expected = plain(**tokenizer("Hello there", return_tensors="pt"), use_cache=True).past_key_values
    length = expected.layers[3].keys.shape[2]  # the rest is padding, on the left
    assert torch.allclose(first.layers[3].keys[:, :, -length:], expected.layers[3].keys, atol=1e-4)
    assert second.layers[3].values.shape[0] == 2
    assert whole.layers[3].values.shape[0] == 3
    assert torch.equal(whole.layers[3].values[1:], second.layers[3].values)
