"""Blocks of several invokes on a model of Hugging Face: names, loops, edits and rows are each block's own."""

import pytest
import torch

from nnsight import LanguageModel

TEXTS = ["The Eiffel Tower is in the city of", "Hello", "Madison Square Garden"]


@pytest.fixture
def hidden(plain, tokenizer):
    """A function that gives the outputs of the layers for one prompt alone: [(T, C)], as transformers computes them."""

    def compute(text):
        with torch.no_grad():
            found = plain(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        return [one[0] for one in found]

    return compute


@pytest.fixture
def logits(plain, tokenizer):
    def compute(text):
        with torch.no_grad():
            return plain(**tokenizer(text, return_tensors="pt")).logits[0, -1]

    return compute


def close(ours, theirs):
    """Whether the rows of a padded prompt end as those of the prompt alone do."""
    return torch.allclose(ours[-theirs.shape[0] :], theirs, atol=1e-4)


def test_invokes_that_bind_the_same_names_never_see_each_others(model, hidden):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            hs = model.transformer.h[0].output
            h1 = model.transformer.h[1].output
            got = hs + h1
            first = got[0]
        with tracer.invoke(TEXTS[1]):
            hs = model.transformer.h[0].output
            h1 = model.transformer.h[1].output
            got = hs + h1
            second = got[0]
    assert close(first, hidden(TEXTS[0])[1] + hidden(TEXTS[0])[2])
    assert close(second, hidden(TEXTS[1])[1] + hidden(TEXTS[1])[2])
    assert torch.equal(got[0], second)


def test_a_cell_that_is_run_again_takes_the_new_runs_value(model, hidden):
    embeddings = None
    for text in TEXTS:
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(text):
                embeddings = model.transformer.wte.output
            with tracer.invoke(" ".join("_" * tokens_of(model, text))):
                model.transformer.wte.output = embeddings
                hs = model.transformer.h[0].output
        assert close(hs[0], hidden(text)[1])


def tokens_of(model, text):
    return len(model.tokenizer(text)["input_ids"])


def test_variables_of_a_loop_are_each_invokes_own(model, hidden):
    found = {}
    with torch.no_grad(), model.trace() as tracer:
        for layer, text in enumerate(TEXTS):
            with tracer.invoke(text):
                found[text] = model.transformer.h[layer].output[0]
    assert layer == 2
    for layer, text in enumerate(TEXTS):
        assert close(found[text], hidden(text)[layer + 1])


def test_generators_comprehensions_and_lambdas(model, hidden):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            last = lambda value: value[0, -1]
            listed = [last(model.transformer.h[index].output) for index in range(3)]
            drawn = list(last(layer.output) for layer in model.transformer.h[3:5])  # noqa: C400
        with tracer.invoke(TEXTS[1]):
            named = {index: model.transformer.h[index].output[0, -1] for index in range(3)}
    for index, one in enumerate([*listed, *drawn]):
        assert torch.allclose(one, hidden(TEXTS[0])[index + 1][-1], atol=1e-4)
    for index, one in named.items():
        assert torch.allclose(one, hidden(TEXTS[1])[index + 1][-1], atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "opt"])
def test_values_whose_leading_size_only_looks_like_the_batch_are_nobodys_rows(name, random_model):
    """As many tokens as prompts: positions, masks and tables then have the batch's size, and are no rows of it."""
    module = random_model(name)
    model = LanguageModel(module)
    prompts = [[5, 17, 99], [7, 120, 64], [31, 2, 9]]
    with torch.no_grad():
        alone = [module(torch.tensor([prompt])).logits[0] for prompt in prompts]
    layer = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "bloom": "transformer.h.1"}.get(name)
    layer = layer or "model.decoder.layers.1"
    found = []
    with torch.no_grad(), model.trace() as tracer:
        for index, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                if index == 1:
                    output = model.get(layer).output
                    (output[0] if isinstance(output, tuple) else output)[:] = 0
                found.append(model.lm_head.output[0])
    for index in (0, 2):
        assert torch.allclose(found[index], alone[index], atol=1e-4)
    assert not torch.allclose(found[1], alone[1], atol=1e-2)


def test_tokens_of_positions_that_all_prompts_share_are_whole_and_not_edited_by_one(model, plain, tokenizer):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke("Hello there"):
            shared = model.transformer.wpe.output
        with tracer.invoke("Hello again"):
            also = model.transformer.wpe.output
    with torch.no_grad():
        expected = plain.transformer.wpe(torch.arange(2)[None])
    assert shared.shape == also.shape == (1, 2, 32)
    assert torch.equal(shared, expected)
    with pytest.raises(ValueError, match="wpe"), torch.no_grad(), model.trace() as tracer:
        with tracer.invoke("Hello there"):
            model.transformer.wpe.output[:] = 0
        with tracer.invoke("Hello again"):
            pass


def test_an_edit_in_steps_reaches_every_invoke_and_no_other_model(model, plain, tokenizer, hooked):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    calls = []

    def zero(_module, _args, output):
        calls.append(0)
        return output * 0 if len(calls) in (2, 3) else None

    with model.edit() as edited, edited.iter[1:3]:
        edited_layer = model.transformer.h[4]
        edited_layer.output[:] = 0
    with edited.generate(**options) as tracer:
        found = []
        for text in TEXTS[:2]:
            with tracer.invoke(text):
                found.append(tracer.result[0, -4:])
    for text, ours in zip(TEXTS, found, strict=False):
        calls.clear()
        with hooked(plain, {"transformer.h.4": zero}):
            theirs = plain.generate(**tokenizer(text, return_tensors="pt"), **options)[0, -4:]
        assert torch.equal(ours, theirs)
    with model.generate(TEXTS[0], **options) as tracer:
        untouched = tracer.result
    assert torch.equal(untouched, plain.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **options))


def test_edits_come_back_from_a_file(model, lazy, logits, plain, tokenizer, hooked, tmp_path):
    direction = torch.randn(32)
    with model.edit() as edited:
        model.transformer.h[2].output[:] += direction
    edited.export_edits("steered", export_dir=tmp_path)
    lazy.import_edits("steered", export_dir=tmp_path)
    with torch.no_grad(), lazy.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            first = lazy.lm_head.output[0, -1]
        with tracer.invoke(TEXTS[1]):
            second = lazy.lm_head.output[0, -1]
    with hooked(plain, {"transformer.h.2": lambda _module, _args, output: output + direction}):
        assert torch.allclose(first, logits(TEXTS[0]), atol=1e-4)
        assert torch.allclose(second, logits(TEXTS[1]), atol=1e-4)


def test_unbatched_invokes_are_bit_identical_to_the_prompts_alone(model, logits):
    with torch.no_grad(), model.trace(batched=False) as tracer:
        with tracer.invoke(TEXTS[0]):
            first = model.lm_head.output[0, -1]
        with tracer.invoke(TEXTS[1]):
            second = model.lm_head.output[0, -1]
    assert torch.equal(first, logits(TEXTS[0]))
    assert torch.equal(second, logits(TEXTS[1]))
