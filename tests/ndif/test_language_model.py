"""A user's programs with a language model, here and in a runner: a random Llama, with parts called `model.model`."""

from __future__ import annotations

import copy

import pytest
import torch

from nnsight import LanguageModel, UnsendableError, save

PROMPT = "the tower is in the city of"
WORDS = ["<pad>", "<unk>", *PROMPT.split()[1:], "the", "paris", "berlin", "rome", "hello"]


@pytest.fixture(scope="module")
def llama():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(WORDS))}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>", padding_side="left"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


@pytest.mark.parametrize("remote", [False, "local"])
def test_part_that_is_called_as_the_root_is_found(llama, remote):
    with llama.trace(PROMPT, remote=remote):
        hidden = llama.model.layers[1].output
        llama.model.layers[1].output = hidden * 2
        result = save(llama.lm_head.output)
    plain = llama._module
    handle = plain.model.layers[1].register_forward_hook(lambda _module, _args, output: output * 2)
    expected = plain(**llama.tokenizer(PROMPT, return_tensors="pt")).logits
    handle.remove()
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("remote", [False, "local"])
def test_part_of_that_name_is_traced_on_its_own(llama, remote):
    ids = llama.tokenizer(PROMPT, return_tensors="pt").input_ids
    with llama.model.trace(ids, remote=remote):
        normed = save(llama.model.norm.output)
    torch.testing.assert_close(normed, llama._module.model(ids).last_hidden_state)


@pytest.mark.parametrize("remote", [False, "local"])
def test_tokenizer_is_there_in_a_block(llama, remote):
    with llama.trace(PROMPT, remote=remote):
        words = llama.tokenizer
        logits = llama.lm_head.output
        told = save([
            words.decode(logits[0, -1].argmax(-1)), words.vocab_size, len(words), words.pad_token,
            words("the tower").input_ids, words.batch_decode([[3, 4], [5]]), words.convert_tokens_to_ids("tower"),
        ])  # fmt: skip
        rows = save(words(["the tower", "rome"], padding=True, return_tensors="pt")["input_ids"])
    words = llama.tokenizer
    plain = llama._module(**words(PROMPT, return_tensors="pt")).logits
    assert told == [
        words.decode(plain[0, -1].argmax(-1)), words.vocab_size, len(words), "<pad>", words("the tower").input_ids,
        words.batch_decode([[3, 4], [5]]), words.convert_tokens_to_ids("tower"),
    ]  # fmt: skip
    assert torch.equal(rows, words(["the tower", "rome"], padding=True, return_tensors="pt")["input_ids"])


@pytest.mark.parametrize("remote", [False, "local"])
def test_tokenizer_under_a_name_of_the_users_is_there(llama, remote):
    words = llama.tokenizer
    with llama.trace(PROMPT, remote=remote):
        word = save(words.decode(llama.lm_head.output[0, -1].argmax(-1)))
    assert word == words.decode(llama._module(**words(PROMPT, return_tensors="pt")).logits[0, -1].argmax(-1))


def test_tokenizer_does_nothing_there_but_work_with_tokens(llama, tmp_path):
    folder = str(tmp_path)
    with pytest.raises(NotImplementedError, match=r"tokenizer\.save_pretrained.*can use .*decode"):
        with llama.trace(PROMPT, remote="local"):
            llama.tokenizer.save_pretrained(folder)
    with pytest.raises(AttributeError, match="no_such_thing"):
        with llama.trace(PROMPT, remote="local"):
            llama.tokenizer.no_such_thing()
    with pytest.raises(ValueError, match="16777216 is the most"):
        with llama.trace(PROMPT, remote="local"):
            llama.tokenizer("the", padding="max_length", max_length=10**12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("remote", [False, "local"])
def test_generation_in_a_session_and_without_a_block(llama, remote):
    with llama.session(remote=remote):
        with llama.trace(PROMPT):
            hidden = llama.model.layers[0].output
        with llama.generate("hello", max_new_tokens=3, do_sample=False) as tracer:
            for _ in tracer.iter[0]:
                llama.model.layers[0].output[:, -1] = hidden[:, -1]
            steered = save(tracer.result)
        plainly = save(llama.generate("hello", max_new_tokens=3, do_sample=False))
    words, plain = llama.tokenizer("hello", return_tensors="pt"), llama._module
    assert torch.equal(plainly, plain.generate(**words, max_new_tokens=3, do_sample=False))
    calls = []

    def steer(_module, _args, output):
        calls.append(1)
        if len(calls) == 1:
            output[:, -1] = hidden_at(plain, llama.tokenizer(PROMPT, return_tensors="pt"))[:, -1]

    handle = plain.model.layers[0].register_forward_hook(steer)
    assert torch.equal(steered, plain.generate(**words, max_new_tokens=3, do_sample=False))
    handle.remove()


def hidden_at(plain, inputs):
    with torch.no_grad():
        hidden = plain.model.embed_tokens(inputs["input_ids"])
        positions = plain.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        return plain.model.layers[0](hidden, position_embeddings=positions)


@pytest.mark.parametrize("remote", [False, "local"])
def test_modes_that_a_session_opens_hold_for_its_runs(llama, remote):
    with llama.session(remote=remote):
        with torch.no_grad():
            with llama.trace(PROMPT):
                needs = save(llama.lm_head.output.requires_grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with llama.trace(PROMPT):
                dtype = save(str(llama.lm_head.output.dtype))
    assert (needs, dtype) == (False, "torch.bfloat16")


@pytest.mark.parametrize("remote", [False, "local"])
def test_module_is_called_under_the_modes_of_the_block(llama, remote):
    with llama.trace(PROMPT, remote=remote):
        hidden = llama.model.norm.output
        with torch.autocast("cpu", dtype=torch.bfloat16):
            early = save(llama.lm_head(hidden))
        with torch.no_grad():
            needs = save(llama.lm_head(hidden).requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = llama._module.lm_head(hidden_of(llama))
    assert early.dtype is torch.bfloat16 and torch.equal(early, expected)
    assert needs is False


def hidden_of(llama):
    with torch.autocast("cpu", enabled=False):
        return llama._module.model(**llama.tokenizer(PROMPT, return_tensors="pt")).last_hidden_state


@pytest.mark.parametrize("remote", [False, "local"])
def test_autocast_around_holds_in_block_and_model(llama, remote):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with llama.trace(PROMPT, remote=remote):
            hidden = llama.model.layers[0].mlp.output
            product = save(hidden.float() @ hidden.float().transpose(1, 2))
            logits = save(llama.lm_head.output)
        expected = llama._module(**llama.tokenizer(PROMPT, return_tensors="pt")).logits
    assert product.dtype is torch.bfloat16
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("remote", [False, "local"])
def test_encoding_is_an_input_and_a_variable(llama, remote):
    words = llama.tokenizer(PROMPT, return_tensors="pt")
    with llama.trace(words, remote=remote):
        one = save(llama.lm_head.output)
    with llama.trace(remote=remote) as tracer:
        with tracer.invoke(words):
            two = save(llama.lm_head.output)
            kinds = save([type(words).__name__, list(words), words.input_ids.shape[1]])
    expected = llama._module(**words).logits
    torch.testing.assert_close([one, two], [expected, expected])
    assert kinds == ["BatchEncoding", list(words), words.input_ids.shape[1]]


def test_tokenizer_that_is_not_the_models_points_to_that(llama):
    other = copy.deepcopy(llama.tokenizer)
    with pytest.raises(UnsendableError, match=r"'other'.*of its own\. Use .*: `model\.tokenizer`"):
        with llama.trace(PROMPT, remote="local"):
            other.decode([3])
