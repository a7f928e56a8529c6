"""What a trace takes as input, in every form, and what it refuses."""

import copy
import re

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from nnsight import InputError, LanguageModel, NoInputError
from nnsight_hf import MissingTokenizerError

TEXT = "The Eiffel Tower is in the city of"
TEXTS = [TEXT, "Hello", "One two three"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last or add_generation_prompt %}"
    "</>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(model, tokenizer):
    """The model with a tokenizer that has a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return LanguageModel(model._module, tokenizer=own)


def arguments(model, *args, **kwargs):
    """Return what the model is called with."""
    with model.trace(*args, **kwargs):
        positional, keywords = model.inputs
    assert positional == ()
    return keywords


def logits_of(model, *args, **kwargs):
    with torch.no_grad(), model.trace(*args, **kwargs):
        logits = model.output.logits
    return logits


def expected_logits(plain, **inputs):
    with torch.no_grad():
        return plain(**inputs).logits


# -- forms


def one_prompt(tokenizer):
    """Return the forms in which one prompt can be given."""
    ids = tokenizer(TEXT)["input_ids"]
    encoding = tokenizer(TEXT, return_tensors="pt")
    return {
        "string": TEXT,
        "list of one string": [TEXT],
        "list of ids": ids,
        "tuple of ids": tuple(ids),
        "list of lists": [ids],
        "tensor (T,)": torch.tensor(ids),
        "tensor (B, T)": torch.tensor([ids]),
        "int32 tensor": torch.tensor([ids], dtype=torch.int32),
        "array (T,)": np.array(ids),
        "array (B, T)": np.array([ids], dtype=np.int32),
        "list of numpy numbers": list(np.array(ids)),
        "list of tensors": [torch.tensor(ids)],
        "encoding": encoding,
        "dict": dict(encoding),
        "encoding of lists": tokenizer(TEXT),
        "encoding of flat tensors": BatchEncoding({name: value[0] for name, value in encoding.items()}),
    }


FORMS = (
    "string", "list of one string", "list of ids", "tuple of ids", "list of lists", "tensor (T,)", "tensor (B, T)",
    "int32 tensor", "array (T,)", "array (B, T)", "list of numpy numbers", "list of tensors", "encoding", "dict",
    "encoding of lists", "encoding of flat tensors",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_one_prompt_in_any_form_gives_what_plain_transformers_gives(form, model, plain, tokenizer):
    value = one_prompt(tokenizer)[form]
    expected = expected_logits(plain, **tokenizer(TEXT, return_tensors="pt"))
    assert torch.equal(logits_of(model, value), expected)


def test_all_forms_are_tried(tokenizer):
    assert set(one_prompt(tokenizer)) == set(FORMS)


def test_a_prompt_is_passed_as_plain_transformers_would(model, tokenizer):
    found = arguments(model, TEXT)
    expected = tokenizer(TEXT, return_tensors="pt")
    assert set(found) == set(expected) == {"input_ids", "attention_mask"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_keywords(model, plain, tokenizer):
    encoding = tokenizer(TEXT, return_tensors="pt")
    expected = expected_logits(plain, **encoding)
    assert torch.equal(logits_of(model, **encoding), expected)
    assert torch.equal(logits_of(model, input_ids=encoding["input_ids"]), expected)
    assert torch.equal(logits_of(model, input_ids=encoding["input_ids"].tolist()), expected)
    assert torch.equal(logits_of(model, encoding["input_ids"], attention_mask=encoding["attention_mask"]), expected)


def test_embeddings(model, plain, tokenizer):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embeddings = plain.transformer.wte(ids)
    found = logits_of(model, inputs_embeds=embeddings)
    assert torch.equal(found, expected_logits(plain, inputs_embeds=embeddings))


def test_other_keywords_reach_the_forward(model, tokenizer):
    labels = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with model.trace(TEXT, labels=labels, output_hidden_states=True):
        output = model.output
    assert output.loss.ndim == 0
    assert len(output.hidden_states) == 13


def test_keywords_per_token_follow_the_form_of_the_ids(model):
    found = arguments(model, [5, 6, 7], attention_mask=[0, 1, 1], labels=[5, 6, 7])
    assert found["attention_mask"].tolist() == [[0, 1, 1]]
    assert found["labels"].tolist() == [[5, 6, 7]]
    assert found["position_ids"].tolist() == [[0, 0, 1]]


def test_lists_that_are_no_values_per_token_are_left_alone(model):
    ids = model.generate([5, 6, 7], max_new_tokens=1, bad_words_ids=[[8], [9, 10]], eos_token_id=[1, 2])
    assert ids.shape == (1, 4)


def test_ragged_rows_of_ids_are_padded_as_text_is(model, tokenizer):
    found = arguments(model, tokenizer(TEXTS)["input_ids"])
    expected = arguments(model, TEXTS)
    assert found.keys() == expected.keys() == {"input_ids", "attention_mask", "position_ids"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_prompts_are_padded_on_the_left_with_a_mask(model, tokenizer):
    found = arguments(model, TEXTS)
    expected = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert found["position_ids"][1].tolist() == [0] * 10
    assert found["position_ids"][2].tolist() == [0] * 7 + [0, 1, 2]


def test_position_ids_of_the_user_are_kept(model):
    given = torch.arange(10).repeat(3, 1)
    assert torch.equal(arguments(model, TEXTS, position_ids=given)["position_ids"], given)


def test_padding_side_of_the_tokenizer_is_followed(gpt2_folder, model):
    right = LanguageModel(model._module, tokenizer=_with_side(gpt2_folder, "right"))
    found = arguments(right, TEXTS)
    assert found["attention_mask"][1].tolist() == [1] + [0] * 9
    assert "position_ids" not in found


def _with_side(folder, side):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, padding_side=side)  # without a pad token, too


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom", "gpt_neox", "gptj", "mistral", "qwen3", "gemma2"])
def test_a_padded_row_equals_its_prompt_alone(name, random_model):
    plain = random_model(name)
    model = LanguageModel(plain)
    rows = [[5, 17, 99, 3, 42, 8, 77], [7, 120, 64], [31]]
    batch = logits_of(model, rows)
    for index, row in enumerate(rows):
        alone = expected_logits(plain, input_ids=torch.tensor([row]))
        assert torch.allclose(batch[index, -len(row) :], alone[0], atol=1e-4), index


def test_generate_with_padding_equals_plain_generate(model, plain, tokenizer):
    encoding = tokenizer(TEXTS, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(model.generate(TEXTS, **settings), plain.generate(**encoding, **settings))


# -- chat


def ids_seen(model, messages):
    return model.tokenizer.decode(arguments(model, messages)["input_ids"][0])


def test_chat_messages_go_through_the_template(chatty):
    assert ids_seen(chatty, [{"role": "user", "content": "Hi"}]) == "<user>Hi</><assistant>"


def test_chat_that_ends_with_the_assistant_goes_on(chatty):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    assert ids_seen(chatty, messages) == "<user>Hi</><assistant>Well,"


def test_several_conversations_are_a_batch(chatty):
    first, second = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "What is the time?"}]
    found = arguments(chatty, [first, second])
    assert found["input_ids"].shape[0] == 2
    texts = chatty.tokenizer.batch_decode(found["input_ids"], skip_special_tokens=True)
    assert texts == ["<user>Hi</><assistant>", "<user>What is the time?</><assistant>"]


def test_chat_with_generate(chatty):
    ids = chatty.generate([{"role": "user", "content": "Hi"}], max_new_tokens=2)
    assert chatty.tokenizer.decode(ids[0]).startswith("<user>Hi</><assistant>")


@pytest.mark.weights
def test_chat_with_smollm2(smollm2):
    ids = smollm2.generate([{"role": "user", "content": "What is the capital of Japan?"}], max_new_tokens=8)
    assert smollm2.tokenizer.decode(ids[0]).endswith("<|im_start|>assistant\nThe capital of Japan is Tokyo.<|im_end|>")


# -- refusals


REFUSED = {
    "empty string": ("", "The prompt is empty: '' has no tokens"),
    "empty among others": (["Hello", ""], "Prompt 1 of 2 is empty"),
    "empty list": ([], "The input is an empty list"),
    "empty row": ([[1, 2], []], "Row 1 of the token ids is empty"),
    "empty tensor": (torch.zeros(1, 0, dtype=torch.long), re.escape("The token ids are empty, of shape (1, 0)")),
    "number": (3, "An input of type 'int' cannot be used. Give a string"),
    "bytes": (b"Hello", "An input of type 'bytes' cannot be used"),
    "object": (object(), "An input of type 'object' cannot be used"),
    "none": (None, "None is no input"),
    "list of none": ([None], "holds None, of type NoneType"),
    "list of floats": ([1.0, 2.0], "holds 1.0, of type float"),
    "list of booleans": ([True], "holds True, of type bool"),
    "strings and numbers": (["Hello", 3], "holds 'Hello', of type str"),
    "ids and lists of ids": ([1, [2]], "mixes token ids and lists of token ids"),
    "float tensor": (torch.rand(1, 4), "Token ids are integers, and these are torch.float32.*inputs_embeds"),
    "boolean tensor": (torch.ones(1, 4, dtype=torch.bool), "Token ids are integers, and these are torch.bool"),
    "float array": (np.ones((1, 4)), "Token ids are integers, and these are torch.float64"),
    "scalar tensor": (torch.tensor(3), re.escape("shape (T,) or (B, T), and these have ()")),
    "three dimensions": (torch.ones(1, 1, 4).long(), re.escape("shape (T,) or (B, T), and these have (1, 1, 4)")),
    "id too large": ([5, 50257], "Token id 50257 is outside the vocabulary.*0 to 50256, a vocabulary of 50257"),
    "negative id": (torch.tensor([[5, -100]]), "Token id -100 is outside the vocabulary"),
    "dict without ids": ({"text": "Hello"}, "An encoding needs input_ids or inputs_embeds, and this one has .'text'."),
    "one message": ({"role": "user", "content": "Hi"}, "One chat message was given; a conversation is a list"),
    "chat without template": ([{"role": "user", "content": "Hi"}], "tokenizer has no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["trace", "generate"])
def test_refused_and_usable_afterwards(case, method, model, plain, tokenizer):
    value, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        with getattr(model, method)(value):
            pass
    assert torch.equal(logits_of(model, "Hello"), expected_logits(plain, **tokenizer("Hello", return_tensors="pt")))


def test_input_given_twice(model, tokenizer):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for kwargs in ({"input_ids": ids}, {"inputs_embeds": torch.rand(1, 2, 32)}, {"inputs": ids}):
        with pytest.raises(InputError, match=f"given twice, positionally and as `{next(iter(kwargs))}=`"):
            with model.trace(TEXT, **kwargs):
                pass
    with pytest.raises(InputError, match="One input is taken, and 2 were given"):
        with model.trace(TEXT, TEXT):
            pass


@pytest.mark.parametrize("wrong", [torch.rand(2, 32), torch.ones(1, 2, 32).long(), [[0.5]]])
def test_wrong_embeddings(wrong, model):
    with pytest.raises(InputError, match=re.escape("floating point tensor of shape (B, T, C)")):
        with model.trace(inputs_embeds=wrong):
            pass


def test_mask_of_another_batch(model, tokenizer):
    with pytest.raises(InputError, match="attention_mask is of 2 rows and input_ids of 1"):
        with model.trace(tokenizer(TEXT)["input_ids"], attention_mask=torch.ones(2, 10)):
            pass


@pytest.mark.parametrize("method", ["trace", "generate"])
def test_no_input(method, model):
    with pytest.raises(NoInputError, match=rf"Cannot return output of Envoy.*model\.{method}\(input\)"):
        with getattr(model, method)(use_cache=False):
            model.lm_head.output
    assert logits_of(model, "Hello").shape == (1, 1, 50257)


def test_text_without_tokenizer(plain):
    bare = LanguageModel(plain)
    for given in ("Hello", ["Hello"], [{"role": "user", "content": "Hi"}]):
        with pytest.raises(MissingTokenizerError, match=r"^Tokenizer not found\. If you passed a pre-loaded model"):
            with bare.trace(given):
                pass
    with pytest.raises(AttributeError):  # what 0.6 raised
        bare.generate("Hello")
    assert logits_of(bare, [5, 6]).shape == (1, 2, 50257)


def test_an_error_of_the_model_leaves_it_usable(model):
    with pytest.raises(IndexError, match="index out of range"):
        with model.trace("Hello", position_ids=torch.tensor([[5000]])):
            model.output
    assert logits_of(model, "Hello").shape == (1, 1, 50257)
