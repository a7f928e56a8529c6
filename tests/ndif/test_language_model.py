"""A user's programs with a language model, here and in a runner: a random Llama, with parts called `model.model`."""

from __future__ import annotations

import pytest
import torch

from nnsight import LanguageModel, save

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
