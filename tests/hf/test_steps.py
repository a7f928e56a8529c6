"""Steps of a generation, however it picks its tokens, and of several prompts at once: each is what hooks see."""

import pytest
import torch

from nnsight import BatchError, LanguageModel

FIRST, SECOND, THIRD = [5, 17, 99, 3, 42, 8, 77], [7, 120, 64], [31]
NEW = 5
HOW = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}
EXACT = {key: value for key, value in HOW.items() if not value["do_sample"]}


def over(cases):
    return pytest.mark.parametrize("how", cases.values(), ids=cases.keys())


def settings(how):
    return {"max_new_tokens": NEW, "eos_token_id": None, **how}


def generate(module, prompt, how):
    torch.manual_seed(1)
    return module.generate(torch.tensor([prompt]), **settings(how))


@over(HOW)
def test_every_step_gives_what_a_hook_sees(how, random_model, hooked):
    module = random_model("llama")
    model, seen = LanguageModel(module), []
    with hooked(module, {"lm_head": lambda _module, _args, output: seen.append(output)}):
        expected = generate(module, FIRST, how)
    torch.manual_seed(1)
    with model.generate(FIRST, **settings(how)) as tracer:
        found = [model.lm_head.output for _ in tracer.iter[:]]
        ids = tracer.result
    assert torch.equal(ids, expected)
    assert len(found) == len(seen) == NEW
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, seen, strict=True))


@over(HOW)
def test_an_edit_of_one_step_is_that_of_a_hook(how, random_model, hooked):
    module = random_model("llama")
    model, calls = LanguageModel(module), []

    def zero(_module, _args, output):
        calls.append(0)
        return output * 0 if len(calls) == 3 else None

    with hooked(module, {"model.layers.1": zero}):
        expected = generate(module, FIRST, how)
    torch.manual_seed(1)
    with model.generate(FIRST, **settings(how)) as tracer:
        for step in tracer.iter[1:4]:
            if step == 2:
                model.model.layers[1].output[:] = 0
        ids = tracer.result
    assert torch.equal(ids, expected)
    assert not torch.equal(ids, generate(module, FIRST, how))


@over(EXACT)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom", "qwen3", "mamba"])
def test_every_step_of_an_invoke_is_that_of_its_prompt_alone(name, how, random_model, hooked):
    module = random_model(name)
    model, found = LanguageModel(module), {}
    head = "lm_head"
    with model.generate(**settings(how)) as tracer:
        for index, prompt in enumerate((FIRST, SECOND, THIRD)):
            with tracer.invoke(prompt):
                logits = []
                for _ in tracer.iter[:]:
                    logits.append(model.get(head).output[:, -1])
                found[index] = logits, tracer.result
    for index, prompt in enumerate((FIRST, SECOND, THIRD)):
        seen = []
        with hooked(module, {head: lambda _module, _args, output, seen=seen: seen.append(output[:, -1])}):
            expected = generate(module, prompt, how)
        logits, ids = found[index]
        assert torch.equal(ids[:, -NEW:], expected[:, -NEW:])
        assert len(logits) == len(seen) == NEW
        for step, theirs in zip(logits, seen, strict=True):
            assert step.shape == theirs.shape
            assert torch.allclose(step, theirs, atol=1e-4)


@over(EXACT)
def test_an_edit_of_one_step_stays_in_its_invoke(how, random_model, hooked):
    module = random_model("llama")
    model, calls = LanguageModel(module), []

    def zero(_module, _args, output):
        calls.append(0)
        return output * 0 if len(calls) == 2 else None

    with hooked(module, {"model.layers.1": zero}):
        edited = generate(module, SECOND, how)
    with model.generate(**settings(how)) as tracer:
        with tracer.invoke(FIRST):
            first = tracer.result
        with tracer.invoke(SECOND):
            for _ in tracer.iter[1]:
                model.model.layers[1].output[:] = 0
            second = tracer.result
    assert torch.equal(first, generate(module, FIRST, how))
    assert torch.equal(second[:, -NEW:], edited[:, -NEW:])
    assert not torch.equal(edited, generate(module, SECOND, how))


def test_rows_that_end_early_do_not_end_the_steps_of_others(random_model):
    module = random_model("llama")
    model = LanguageModel(module)
    plain = module.generate(torch.tensor([SECOND]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    end = int(plain[0, len(SECOND) + 1])  # what the second prompt says at its second step
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    alone = [module.generate(torch.tensor([prompt]), **options) for prompt in (FIRST, SECOND)]
    assert alone[0].shape[1] - len(FIRST) > alone[1].shape[1] - len(SECOND)
    with model.generate(**options) as tracer:
        with tracer.invoke(FIRST):
            steps = 0
            for _ in tracer.iter[:]:
                model.lm_head.output
                steps += 1
            first = tracer.result
        with tracer.invoke(SECOND):
            second = tracer.result
    assert steps == alone[0].shape[1] - len(FIRST)
    assert torch.equal(first, alone[0])
    new = alone[1].shape[1] - len(SECOND)
    assert torch.equal(second[0, len(FIRST) :][:new], alone[1][0, -new:])
    assert not second[0, len(FIRST) + new :].any()


def test_arguments_that_differ_between_invokes_are_refused(random_model):
    model = LanguageModel(random_model("llama"))
    with pytest.raises(BatchError, match="max_new_tokens"), model.generate(do_sample=False) as tracer:
        with tracer.invoke(FIRST, max_new_tokens=2):
            pass
        with tracer.invoke(SECOND, max_new_tokens=3):
            pass
    with model.generate(do_sample=False, eos_token_id=None) as tracer:
        with tracer.invoke(FIRST, max_new_tokens=2):
            first = tracer.result
        with tracer.invoke(SECOND, max_new_tokens=2):
            pass
    assert first.shape == (1, 9)
