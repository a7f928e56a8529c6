"""Every module's output, read in a block, is what a hook put on by hand sees in plain transformers, bit for bit."""

import pytest
import torch
import zoo

from nnsight import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
IDS = torch.tensor([[5, 17, 99, 3, 42, 8], [7, 7, 120, 64, 9, 31]])


def first_calls(calls):
    """Return path -> tensors of the first call, in the order in which first calls ended."""
    found = {}
    for path, values in calls:
        found.setdefault(path, values)
    return found


def read_all(model, paths, tensors, **inputs):
    seen = {}
    with model.trace(**inputs):
        for path in paths:
            seen[path] = tensors(model.get(path).output)
    return seen


def assert_same(seen, expected):
    assert list(seen) == list(expected)
    for path, values in expected.items():
        assert len(seen[path]) == len(values), path
        for ours, theirs in zip(seen[path], values, strict=True):
            assert torch.equal(ours, theirs), path


def assert_every_module_reads_like_a_hook(model, plain, recorded, tensors, **inputs):
    with torch.no_grad():
        expected = first_calls(recorded(plain, lambda: plain(**inputs)))
        seen = read_all(model, expected, tensors, **inputs)
    assert len(expected) > 10
    assert_same(seen, expected)
    assert any(values for values in seen.values())


def decoder(module):
    """Return path and modules of the decoder's layers."""
    return next((path, part) for path, part in module.named_modules() if isinstance(part, torch.nn.ModuleList))


def test_gpt2_from_a_folder(model, plain, tokenizer, recorded, tensors):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert_every_module_reads_like_a_hook(model, plain, recorded, tensors, **inputs)


@pytest.mark.weights
def test_smollm2(smollm2, smollm2_folder, recorded, tensors):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder).eval()
    inputs = smollm2.tokenizer(PROMPT, return_tensors="pt")
    assert_every_module_reads_like_a_hook(smollm2, plain, recorded, tensors, **inputs)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_architecture(name, random_model, recorded, tensors):
    plain = random_model(name)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert_every_module_reads_like_a_hook(LanguageModel(plain), plain, recorded, tensors, **inputs)


def test_arguments_are_those_of_pre_hooks(random_model, tensors):
    plain = random_model("llama")
    expected, handles = {}, []
    for path, module in plain.named_modules():

        def hook(_module, args, kwargs, path=path):
            expected[path] = tensors((args, kwargs))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        plain(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    for handle in handles:
        handle.remove()
    seen = {}
    model = LanguageModel(plain)
    with torch.no_grad(), model.trace(IDS):
        for path in expected:
            seen[path] = tensors(model.get(path).inputs)
    assert_same(seen, expected)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_replacing_a_layer_equals_a_hook(name, random_model, hooked):
    plain = random_model(name)
    path = f"{decoder(plain)[0]}.1"
    torch.manual_seed(1)
    noise = torch.randn(2, 6, 32)

    def hook(_module, _args, output):
        return (noise, *output[1:]) if isinstance(output, tuple) else noise

    model = LanguageModel(plain)
    with torch.no_grad():
        with hooked(plain, {path: hook}):
            expected = plain(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        with model.trace(IDS):
            layer = model.get(path)
            layer.output = (noise, *layer.output[1:]) if isinstance(layer.output, tuple) else noise
            logits = model.output.logits
        untouched = model.trace(IDS, trace=False).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, untouched)


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_zeroing_a_layer_in_place_equals_a_hook(name, random_model, hooked):
    plain = random_model(name)
    path = f"{decoder(plain)[0]}.0"

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def hook(_module, _args, output):
        first(output)[:, 2:4] = 0

    model = LanguageModel(plain)
    with torch.no_grad():
        with hooked(plain, {path: hook}):
            expected = plain(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        with model.trace(IDS):
            first(model.get(path).output)[:, 2:4] = 0
            logits = model.output.logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_prefill_of_generate_reads_like_a_hook(name, random_model, recorded, tensors):
    plain = random_model(name)
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    expected = first_calls(recorded(plain, lambda: plain.generate(**call)))
    model, seen = LanguageModel(plain), {}
    with model.generate(**call):
        for path in expected:
            seen[path] = tensors(model.get(path).output)
    assert_same(seen, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_a_write_in_generate_changes_the_prefill_only(name, random_model, hooked):
    plain = random_model(name)
    path = f"{decoder(plain)[0]}.1"
    calls = []

    def hook(_module, _args, output):
        calls.append(output)
        return output * 0 if len(calls) == 1 else output

    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    with hooked(plain, {path: hook}):
        expected = plain.generate(**call)
    assert len(calls) == 4
    model = LanguageModel(plain)
    with model.generate(**call) as tracer:
        layer = model.get(path)
        layer.output = layer.output * 0
        ids = tracer.result
    assert torch.equal(ids, expected)
    assert not torch.equal(ids, plain.generate(**call))


def test_a_hook_of_the_users_is_seen_in_output(random_model, hooked):
    plain = random_model("llama")
    model = LanguageModel(plain)
    with torch.no_grad(), hooked(plain, {"model.layers.0": lambda _module, _args, output: output + 1}):
        with model.trace(IDS):
            ours = model.model.layers[0].output
            following = model.model.layers[1].input
        theirs = plain(IDS)
    assert ours is following
    with torch.no_grad(), model.trace(IDS):
        assert torch.equal(model.model.layers[0].output + 1, ours)
    assert theirs.logits.shape == (2, 6, 128)
