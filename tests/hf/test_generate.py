"""`model.generate`, in a block and without one."""

import inspect

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from nnsight import LanguageModel

TEXT = "The Eiffel Tower is in"


@pytest.fixture
def expected(plain, tokenizer):
    """The ids plain transformers generates."""

    def generate(prompts=TEXT, **kwargs):
        inputs = tokenizer(prompts, return_tensors="pt", padding=isinstance(prompts, list))
        return plain.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **kwargs)

    return generate


def test_ids_in_a_block(model, expected):
    ids = expected(max_new_tokens=3)
    with model.generate(TEXT, max_new_tokens=3) as tracer:
        generated = model.generator.output
        result = tracer.result
    assert generated is result
    assert torch.equal(result, ids)
    assert result.shape == (1, 7 + 3)


def test_without_a_with_it_just_runs(model, expected):
    ids = model.generate(TEXT, max_new_tokens=3)
    assert isinstance(ids, torch.Tensor)
    assert torch.equal(ids, expected(max_new_tokens=3))


def test_inside_another_call_it_just_runs(model, expected):
    class Held:
        def __init__(self, value):
            self.value = value

        def __enter__(self):
            return self.value

        def __exit__(self, *_):
            return None

    with Held(model.generate(TEXT, max_new_tokens=2)) as ids:
        assert torch.equal(ids, expected(max_new_tokens=2))


def test_several_prompts(model, expected):
    texts = [TEXT, "Hello", "One two three"]
    assert torch.equal(model.generate(texts, max_new_tokens=4), expected(texts, max_new_tokens=4))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.5},
        {"generation_config": GenerationConfig(max_new_tokens=3, num_beams=2)},
    ],
    ids=str,
)
def test_settings_are_those_of_transformers(settings, model, expected):
    if "generation_config" not in settings:
        settings = {**settings, "max_new_tokens": 3}
    with model.generate(TEXT, **settings) as tracer:
        ids = tracer.result
    assert torch.equal(ids, expected(**settings))


def test_sampling_follows_the_seed(model, expected):
    torch.manual_seed(3)
    ours = model.generate(TEXT, max_new_tokens=5, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(ours, expected(max_new_tokens=5, do_sample=True))


def test_a_dict_of_results(model):
    with model.generate(TEXT, max_new_tokens=2, return_dict_in_generate=True, output_scores=True) as tracer:
        result = tracer.result
    assert result.sequences.shape == (1, 9)
    assert len(result.scores) == 2


def test_ids_can_be_replaced_on_their_way_out(model):
    with model.generate(TEXT, max_new_tokens=2) as tracer:
        model.generator.output = model.generator.output[:, -1]
        result = tracer.result
    assert result.shape == (1,)


def test_the_streamer_is_given_each_steps_ids(model):
    steps, best = [], []
    with model.generate([TEXT, "Hello there"], max_new_tokens=3) as tracer:
        for _ in tracer.iter[:3]:
            best.append(model.lm_head.output[:, -1].argmax(-1))
            steps.append(model.generator.streamer.output)
        ids = tracer.result
    assert torch.equal(torch.stack(steps, dim=1), ids[:, -3:])
    assert torch.equal(steps[0], best[0])


def test_a_streamer_of_the_users_is_used(model, tokenizer, capsys):
    ids = model.generate(TEXT, max_new_tokens=3, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(ids[0]) + "\n"


def test_nothing_requires_grad_and_the_callers_mode_is_kept(model):
    with torch.enable_grad():
        with model.generate(TEXT, max_new_tokens=2):
            hidden = model.transformer.h[0].output
            inside = torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    assert inside
    assert not hidden.requires_grad


def test_values_of_the_prefill(model):
    with model.trace(TEXT):
        expected = model.transformer.h[2].output
    with model.generate(TEXT, max_new_tokens=3):
        hidden = model.transformer.h[2].output
    assert hidden.shape == (1, 7, 32)
    assert torch.allclose(hidden, expected, atol=1e-6)


def test_stop_ends_the_generation(model):
    with model.generate(TEXT, max_new_tokens=500) as tracer:
        hidden = model.transformer.h[0].output
        tracer.stop()
    assert hidden.shape == (1, 7, 32)


def test_padding_token_is_named_where_the_model_names_none(plain, tokenizer, caplog):
    assert plain.generation_config.pad_token_id is None
    LanguageModel(plain, tokenizer=tokenizer).generate(TEXT, max_new_tokens=1)
    assert "pad_token_id" not in caplog.text


def test_signature_and_doc_are_those_of_the_method(model):
    assert list(inspect.signature(model.generate).parameters) == ["args", "kwargs"]
    assert model.generate.__doc__.startswith("Generate text")


@pytest.mark.weights
def test_smollm2_names_the_city(smollm2):
    with smollm2.generate("The Eiffel Tower is in the city of", max_new_tokens=3) as tracer:
        ids = tracer.result
    assert smollm2.tokenizer.decode(ids[0]).startswith("The Eiffel Tower is in the city of Paris.")


@pytest.mark.weights
def test_adding_a_concept_to_the_prefill_changes_the_text(smollm2):
    # The difference of two countries, at the token of the country, as measured with hooks put on by hand.
    states = {}
    for country in ("Italy", "France"):
        with torch.no_grad(), smollm2.trace(f"The capital of {country} is"):
            states[country] = smollm2.model.layers[10].output[:, 3]
    with smollm2.generate("People in France speak", max_new_tokens=6) as tracer:
        smollm2.model.layers[10].output[:, 2] += states["Italy"] - states["France"]
        ids = tracer.result
    assert smollm2.tokenizer.decode(ids[0]).startswith("People in France speak Italiano, which is the")
