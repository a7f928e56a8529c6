"""Programs of 0.6 and 0.7 with invokes, barriers, generation and steps: each test is one, as users write it."""

from __future__ import annotations

import pytest
import torch

PROMPTS = ["The Eiffel Tower is in the city of", "The capital of Germany is"]
NEW = 4


@pytest.fixture(scope="module")
def alone(plain, tokenizer):
    """What transformers generates from each prompt alone: new ids, and the logits of each step."""

    def run(prompt, **options):
        encoding = tokenizer(prompt, return_tensors="pt")
        found = plain.generate(
            **encoding, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        return found.sequences[0, encoding.input_ids.shape[1] :], torch.stack(found.logits, 1)[0]

    return {prompt: run(prompt) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def logits(plain, tokenizer):
    with torch.no_grad():
        return {prompt: plain(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in PROMPTS}


def new_ids(ids):
    return ids[..., -NEW:]


# -- invokes


def test_one_input_invoke_and_several_empty_ones(model, logits):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(PROMPTS):
            first = model.transformer.h[0].output.save()
        with tracer.invoke():
            middle = model.transformer.h[6].output.save()
        with tracer.invoke():
            out = model.lm_head.output[:, -1].save()
        with tracer.invoke():
            again = model.transformer.h[0].output.save()
    assert torch.equal(first, again)
    assert middle.shape == first.shape
    for row, prompt in zip(out, PROMPTS, strict=True):
        assert torch.allclose(row, logits[prompt], atol=1e-4)


def test_barrier_of_two_used_round_after_round(model, plain, tokenizer, hooked):
    with torch.no_grad(), model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(PROMPTS[0]):
            for layer in range(3):
                source = model.transformer.h[layer].output[0, -1]
                barrier()
        with tracer.invoke(PROMPTS[1]):
            for layer in range(3):
                barrier()
                model.transformer.h[layer].output[0, -1] = source
            patched = model.lm_head.output[0, -1].save()
    sources = {}

    def keep(layer):
        return lambda module, args, output: sources.update({layer: output[0, -1].clone()})

    def put(layer):
        def hook(module, args, output):
            output[0, -1] = sources[layer]

        return hook

    with torch.no_grad():
        with hooked(plain, {f"transformer.h.{layer}": keep(layer) for layer in range(3)}):
            plain(**tokenizer(PROMPTS[0], return_tensors="pt"))
        with hooked(plain, {f"transformer.h.{layer}": put(layer) for layer in range(3)}):
            expected = plain(**tokenizer(PROMPTS[1], return_tensors="pt")).logits[0, -1]
    assert torch.allclose(patched, expected, atol=1e-4)


def test_pass_bodies(model, logits):
    with torch.no_grad(), model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            out = model.lm_head.output[:, -1].save()
    for row, prompt in zip(out, PROMPTS, strict=True):
        assert torch.allclose(row, logits[prompt], atol=1e-4)


def test_generation_without_input_and_invokes_in_a_loop(model, alone):
    outputs = []
    with model.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                outputs.append(model.generator.output.save())
    for prompt, ids in zip(PROMPTS, outputs, strict=True):
        assert torch.equal(new_ids(ids)[0], alone[prompt][0])


def test_last_empty_invoke_reads_what_is_generated(model, alone):
    with model.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                pass
        with tracer.invoke():
            ids = model.generator.output.save()
    assert torch.equal(new_ids(ids), torch.stack([alone[prompt][0] for prompt in PROMPTS]))


def test_generator_output_of_the_streamer_and_of_the_result_agree(model, alone):
    with model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False) as tracer:
        ids = model.generator.output.save()
        result = tracer.result.save()
    assert torch.equal(ids, result)
    assert torch.equal(new_ids(ids)[0], alone[PROMPTS[0]][0])


# -- steps


def test_loop_over_all_steps(model, alone):
    logits, steps = [], []
    with model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False) as tracer:
        for step in tracer.iter[:]:
            steps.append(step)
            logits.append(model.lm_head.output[0, -1])
    assert steps == list(range(NEW))
    assert torch.allclose(torch.stack(logits), alone[PROMPTS[0]][1], atol=1e-4)


def test_block_form_runs_its_body_once_per_step(model, alone):
    logits, steps = [], []
    with model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.iter[:] as idx:
            assert type(idx) is int
            steps.append(idx)
            logits.append(model.lm_head.output[0, -1].save())
    assert steps == list(range(NEW))
    assert torch.allclose(torch.stack(logits), alone[PROMPTS[0]][1], atol=1e-4)


def test_block_form_of_the_first_step_only(model, alone):
    logits = []
    with model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.iter[:1]:
            logits.append(model.lm_head.output[0, -1].save())
        ids = tracer.result.save()
    assert len(logits) == 1
    assert torch.allclose(logits[0], alone[PROMPTS[0]][1][0], atol=1e-4)
    assert torch.equal(new_ids(ids)[0], alone[PROMPTS[0]][0])


def test_block_form_in_an_invoke(model, alone):
    first = []
    with model.generate(max_new_tokens=NEW, do_sample=False) as tracer:
        with tracer.invoke(PROMPTS[0]):
            with tracer.iter[:] as idx:
                if idx < 2:
                    first.append(model.lm_head.output[0, -1].save())
        with tracer.invoke(PROMPTS[1]):
            pass
    assert torch.allclose(torch.stack(first), alone[PROMPTS[0]][1][:2], atol=1e-3)


def test_all_steps(model, alone):
    logits = []
    with model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False) as tracer:
        for _ in tracer.all():
            logits.append(model.lm_head.output[0, -1])
    assert torch.allclose(torch.stack(logits), alone[PROMPTS[0]][1], atol=1e-4)


def test_edit_without_a_loop_applies_to_the_prefill_only(model, plain, tokenizer):
    vector = torch.linspace(-3, 3, 32)
    with model.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False) as tracer:
        model.transformer.h[3].output[:] += vector
        ids = tracer.result.save()
    calls = []

    def hook(module, args, output):
        calls.append(output.shape)
        if len(calls) == 1:
            output[:] += vector

    handle = plain.transformer.h[3].register_forward_hook(hook)
    expected = plain.generate(
        **tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=NEW, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    handle.remove()
    assert len(calls) == NEW
    assert torch.equal(ids, expected)


def test_stop_under_no_grad_and_in_a_helper(model, plain, tokenizer):
    def collect(tracer, layer, kept):
        kept.append(model.transformer.h[layer].output)
        tracer.stop()

    kept = []
    with torch.no_grad():
        with model.trace(PROMPTS[0]) as tracer:
            collect(tracer, 2, kept)
            kept.append("not reached")
        expected = plain(**tokenizer(PROMPTS[0], return_tensors="pt"), output_hidden_states=True).hidden_states[3]
    assert len(kept) == 1
    assert not kept[0].requires_grad
    assert torch.allclose(kept[0], expected, atol=1e-5)
