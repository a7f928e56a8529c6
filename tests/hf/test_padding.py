"""Prompts of different length in one batch, by kind of model: each gives what it gives alone, or is refused."""

import copy

import pytest
import torch
import transformers
import zoo
from torch import nn

from nnsight import BatchError, LanguageModel
from nnsight_hf.padding import kind_of, padding_of

PROMPTS = [5, 17, 99, 3, 42, 8, 77], [7, 120, 64], [31]
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_BART = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, **_IDS,
}  # fmt: skip
_T5 = {
    "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "eos_token_id": 2,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
ROBERTA = {**_BERT, "pad_token_id": 1, "bos_token_id": 0}
ENCODERS = {
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ROBERTA),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_BERT, "embedding_size": 32}),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 128, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "t5 encoder": ("T5EncoderModel", "T5Config", _T5),
}  # fmt: skip
BOTH = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
}
DECODERS_OF_THEIR_OWN_COUNT = {
    "roberta": ("RobertaForCausalLM", "RobertaConfig", {**ROBERTA, "is_decoder": True}),
    "xlm-roberta": ("XLMRobertaForCausalLM", "XLMRobertaConfig", {**ROBERTA, "is_decoder": True}),
}
COUNT_FROM_THE_EDGE = {
    "bart": ("BartForCausalLM", "BartConfig", {**_BART, "is_decoder": True}),
    "roformer": ("RoFormerForCausalLM", "RoFormerConfig", {**_BERT, "is_decoder": True}),
}
_SIZES = {key: value for key, value in _BERT.items() if key != "max_position_embeddings"}
MIX = {
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {
        "vocab_size": 128, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
        "context_length": 64, **_IDS,
    }),
    "convbert": ("ConvBertForMaskedLM", "ConvBertConfig", {**_BERT, "embedding_size": 32}),
    "mobilebert": ("MobileBertForMaskedLM", "MobileBertConfig", {
        **_BERT, "embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32,
    }),
    "nystromformer": ("NystromformerForMaskedLM", "NystromformerConfig", {**_BERT, "segment_means_seq_len": 64}),
    "prophetnet": ("ProphetNetForCausalLM", "ProphetNetConfig", {
        "vocab_size": 128, "hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_layers": 2, "num_encoder_layers": 2,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_encoder_attention_heads": 4,
        "max_position_embeddings": 64, "is_decoder": True, **_IDS,
    }),
}  # fmt: skip
MIX_IN_GENERATE = {
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {
        "vocab_size": 128, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, **_IDS,
    }),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", {
        **_SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "block_size": 8, "layer_types": ["linear_attention", "full_attention"],
    }),
    "git": ("GitForCausalLM", "GitConfig", _BERT),
}  # fmt: skip


def build(entry):
    """Make a model whose every part matters."""
    kind, config, sizes = entry
    torch.manual_seed(0)
    made = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def over(entries):
    return pytest.mark.parametrize("entry", entries.values(), ids=entries.keys())


def value_of(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def in_invokes(model, **kwargs):
    """Return what each prompt gives in an invoke of its own."""
    found = []
    with torch.no_grad(), model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt, **kwargs):
                found.append(value_of(model.output))
    return found


def alone(module, **kwargs):
    with torch.no_grad():
        return [value_of(module(input_ids=torch.tensor([prompt]), **kwargs)) for prompt in PROMPTS]


def generated(module, **kwargs):
    return [module.generate(torch.tensor([prompt]), **kwargs) for prompt in PROMPTS]


def generated_in_invokes(model, **kwargs):
    found = []
    with model.generate(**kwargs) as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                found.append(tracer.result)
    return found


# -- encoders


@over(ENCODERS)
def test_encoders_are_padded_on_the_right(entry):
    module = build(entry)
    model = LanguageModel(module)
    for found, expected in zip(in_invokes(model), alone(module), strict=True):
        assert found.shape == (1, 7, found.shape[2])
        assert torch.allclose(found[:, : expected.shape[1]], expected, atol=1e-4)


@over(ENCODERS)
def test_rows_of_one_list_are_padded_on_the_right_too(entry):
    module = build(entry)
    model = LanguageModel(module)
    with torch.no_grad(), model.trace(list(PROMPTS)):
        found = value_of(model.output)
    for row, expected in zip(found, alone(module), strict=True):
        assert torch.allclose(row[: expected.shape[1]], expected[0], atol=1e-4)


@over(BOTH)
def test_encoder_and_decoder_in_one_forward(entry):
    module = build(entry)
    start = torch.tensor([[module.config.decoder_start_token_id, 5, 6]])
    found = in_invokes(LanguageModel(module), decoder_input_ids=start)
    for value, expected in zip(found, alone(module, decoder_input_ids=start), strict=True):
        assert torch.allclose(value, expected, atol=1e-4)


@over(BOTH)
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_and_decoder_generate(entry, beams):
    module = build(entry)
    settings = {
        "max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    found = generated_in_invokes(LanguageModel(module), **settings)
    for result, expected in zip(found, generated(module, **settings), strict=True):
        assert torch.equal(result.sequences, expected.sequences)
        for logits, theirs in zip(result.logits, expected.logits, strict=True):
            assert torch.allclose(logits, theirs, atol=1e-4)


def test_rows_of_beams_in_the_decoder_and_of_prompts_in_the_encoder():
    module = build(BOTH["t5"])
    model = LanguageModel(module)
    settings = {"max_new_tokens": 3, "num_beams": 3, "eos_token_id": None}
    with model.generate(**settings) as tracer:
        with tracer.invoke(PROMPTS[0]):
            encoded = model.encoder.output.last_hidden_state
            decoded = model.decoder.output.last_hidden_state
            model.decoder.next().output.last_hidden_state[:] = 0
        with tracer.invoke(PROMPTS[1]):
            others = model.decoder.next().output.last_hidden_state
            result = tracer.result
    assert encoded.shape == (1, 7, 32)
    assert decoded.shape == others.shape == (3, 1, 32)
    assert others.any()
    assert torch.equal(result, module.generate(torch.tensor([PROMPTS[1]]), **settings))


def test_invokes_see_their_rows_of_both_caches():
    module = build(BOTH["t5"])
    model = LanguageModel(module)
    start = torch.tensor([[0, 5]])
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0], decoder_input_ids=start):
            _ = model.output
        with tracer.invoke([PROMPTS[1], PROMPTS[2]], decoder_input_ids=start.repeat(2, 1)):
            cache = model.output.past_key_values
    with torch.no_grad():
        expected = module(input_ids=torch.tensor([PROMPTS[1]]), decoder_input_ids=start).past_key_values
    own, cross = cache.self_attention_cache.layers[1], cache.cross_attention_cache.layers[1]
    assert own.keys.shape[0] == cross.values.shape[0] == 2
    assert torch.allclose(own.keys[:1], expected.self_attention_cache.layers[1].keys, atol=1e-4)
    assert torch.allclose(cross.values[:1, :, :3], expected.cross_attention_cache.layers[1].values, atol=1e-4)


def test_invokes_see_their_rows_of_states(random_model):
    module = random_model("mamba2")
    model = LanguageModel(module)
    with torch.no_grad(), model.trace(use_cache=True) as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = model.output.cache_params
        with tracer.invoke(PROMPTS[1]):
            second = model.output.cache_params
    with torch.no_grad():
        expected = module(input_ids=torch.tensor([PROMPTS[1]]), use_cache=True).cache_params
    for cache in (first, second):
        assert cache.layers[1].recurrent_states[0].shape[0] == 1
    assert torch.allclose(second.layers[1].recurrent_states[0], expected.layers[1].recurrent_states[0], atol=1e-4)


# -- embeddings


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_embeddings_of_different_length_share_a_batch_as_tokens_do(name, random_model):
    module = random_model(name)
    model = LanguageModel(module)
    with torch.no_grad():
        embedded = [module.get_input_embeddings()(torch.tensor([prompt])) for prompt in PROMPTS]
    found = []
    with torch.no_grad(), model.trace() as tracer:
        for embeds in embedded:
            with tracer.invoke(inputs_embeds=embeds):
                found.append(model.output.logits)
    for ours, expected in zip(found, alone(module), strict=True):
        assert torch.allclose(ours[:, -expected.shape[1] :], expected, atol=1e-4)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = []
    with model.generate(**settings) as tracer:
        for embeds in embedded:
            with tracer.invoke(inputs_embeds=embeds):
                found.append(tracer.result)
    for ours, expected in zip(found, generated(module, **settings), strict=True):
        assert torch.equal(ours, expected[:, -4:])


def test_embeddings_of_encoders_are_padded_on_the_right():
    module = build(ENCODERS["bert"])
    model, found = LanguageModel(module), []
    with torch.no_grad(), model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(inputs_embeds=module.get_input_embeddings()(torch.tensor([prompt]))):
                found.append(model.output.logits)
    for ours, expected in zip(found, alone(module), strict=True):
        assert torch.allclose(ours[:, : expected.shape[1]], expected, atol=1e-4)


def test_embeddings_whose_mask_leaves_out_tokens_beside_some_without_a_mask(random_model):
    module = random_model("llama")
    model = LanguageModel(module)
    embed = module.get_input_embeddings()
    with torch.no_grad():
        first, second = embed(torch.tensor([PROMPTS[0]])), embed(torch.tensor([PROMPTS[1]]))
        expected = module(torch.tensor([PROMPTS[0][2:]])).logits
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(inputs_embeds=first, attention_mask=mask):
            ours = model.output.logits
        with tracer.invoke(inputs_embeds=second):
            others = model.output.logits
    assert torch.allclose(ours[:, 2:], expected, atol=1e-4)
    assert torch.allclose(others[:, -3:], alone(module)[1], atol=1e-4)


# -- decoders


@pytest.mark.parametrize("name", [name for name in zoo.CAUSAL if name not in MIX])
def test_every_decoder_gives_each_prompt_what_it_gives_alone(name, random_model):
    module = random_model(name)
    model = LanguageModel(module)
    for found, expected in zip(in_invokes(model), alone(module), strict=True):
        assert torch.allclose(found[:, -expected.shape[1] :], expected, atol=1e-4)
    settings = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    for found, expected in zip(generated_in_invokes(model, **settings), generated(module, **settings), strict=True):
        assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])
        for logits, theirs in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(logits, theirs, atol=1e-4)


@over(DECODERS_OF_THEIR_OWN_COUNT)
def test_models_that_count_from_the_first_token_by_themselves_are_told_no_positions(entry):
    module = build(entry)
    model = LanguageModel(module)
    for found, expected in zip(in_invokes(model), alone(module), strict=True):
        assert torch.allclose(found[:, -expected.shape[1] :], expected, atol=1e-4)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    for found, expected in zip(generated_in_invokes(model, **settings), generated(module, **settings), strict=True):
        assert torch.equal(found[:, -expected.shape[1] :], expected)


@over(COUNT_FROM_THE_EDGE)
def test_models_that_count_from_the_edge_are_padded_on_the_right_in_a_forward(entry):
    module = build(entry)
    for found, expected in zip(in_invokes(LanguageModel(module)), alone(module), strict=True):
        assert torch.allclose(found[:, : expected.shape[1]], expected, atol=1e-4)


@over(COUNT_FROM_THE_EDGE)
def test_models_that_count_from_the_edge_do_not_generate_padded(entry):
    module = build(entry)
    model = LanguageModel(module)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with pytest.raises(BatchError, match=r"cannot share a batch in \w+: it counts positions.*batched=False"):
        generated_in_invokes(model, **settings)
    with pytest.raises(BatchError, match="counts positions"):
        model.generate(list(PROMPTS), **settings)
    expected = generated(module, **settings)
    for found, theirs in zip(generated_in_invokes(model, batched=False, **settings), expected, strict=True):
        assert torch.equal(found, theirs)


def apart_when_padded(module):
    """Return how far the values of two prompts, padded by hand on the side that suits best, are from theirs alone."""
    short, width = PROMPTS[1], len(PROMPTS[0])
    rest = [0] * (width - len(short))
    sides = [([*rest, *short], slice(-3, None))]
    if "MaskedLM" in type(module).__name__:  # a decoder is padded where it can go on
        sides.append(([*short, *rest], slice(3)))
    expected = alone(module)
    apart = []
    for ids, rows in sides:
        mask = torch.tensor([[1] * width, [int(token > 0) for token in ids]])
        with torch.no_grad():
            found = value_of(module(input_ids=torch.tensor([PROMPTS[0], ids]), attention_mask=mask))
        apart.append(float((found[1, rows] - expected[1][0]).abs().max()))
    return min(apart)


@over(MIX)
def test_models_that_mix_padding_into_other_tokens_are_not_padded(entry):
    module = build(entry)
    assert apart_when_padded(module) > 1e-3
    model = LanguageModel(module)
    with pytest.raises(BatchError, match="padding would change what it computes"):
        in_invokes(model)
    with pytest.raises(BatchError, match="padding would change what it computes"), model.trace(list(PROMPTS)):
        pass
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = value_of(model.output)
        with tracer.invoke(PROMPTS[0][::-1]):
            second = value_of(model.output)
    with torch.no_grad():
        assert torch.allclose(first, value_of(module(torch.tensor([PROMPTS[0]]))), atol=1e-4)
        assert torch.allclose(second, value_of(module(torch.tensor([PROMPTS[0][::-1]]))), atol=1e-4)


@over(MIX_IN_GENERATE)
def test_models_that_mix_padding_when_they_generate_are_not_padded_then(entry):
    module = build(entry)
    settings = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    width = len(PROMPTS[0])
    ids = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in PROMPTS[:2]])
    by_hand = module.generate(ids, attention_mask=(ids > 0).long(), **settings).logits
    expected = generated(module, **settings)
    assert max(float((a[1] - b[0]).abs().max()) for a, b in zip(by_hand, expected[1].logits, strict=True)) > 1e-3
    model = LanguageModel(module)
    with pytest.raises(BatchError, match="padding would change what it computes"):
        generated_in_invokes(model, **settings)
    for found, theirs in zip(generated_in_invokes(model, batched=False, **settings), expected, strict=True):
        assert torch.equal(found.sequences, theirs.sequences)
    for found, theirs in zip(in_invokes(model), alone(module), strict=True):
        assert torch.allclose(found[:, -theirs.shape[1] :], theirs, atol=1e-4)


def test_models_that_drop_the_mask_are_not_padded(tokenizer):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, **_IDS}
    module = build(("FNetForMaskedLM", "FNetConfig", {**sizes, "max_position_embeddings": 64}))
    model = LanguageModel(module)
    with torch.no_grad(), model.trace(PROMPTS[1]):
        found = model.output.logits
    assert torch.allclose(found, module(torch.tensor([PROMPTS[1]])).logits, atol=1e-5)
    with pytest.raises(BatchError, match="padding would change"):
        in_invokes(model)


def test_models_without_a_mask_are_given_none(tokenizer):
    class Own(nn.Module):
        def forward(self, input_ids):
            return input_ids

    model = LanguageModel(Own(), tokenizer=tokenizer)
    for prompt, ids in (("Hello there", tokenizer("Hello there")["input_ids"]), (PROMPTS[1], PROMPTS[1])):
        with model.trace(prompt):
            found = model.output
        assert found.tolist() == [ids]
    with pytest.raises(BatchError, match="padding would change"), model.trace(["Hello there", "Hello"]):
        pass


def test_a_tokenizer_may_want_decoders_on_the_right_but_not_when_they_generate(plain, tokenizer):
    right = copy.deepcopy(tokenizer)
    right.padding_side = "right"
    model = LanguageModel(plain, tokenizer=right)
    texts = ["The Eiffel Tower is in", "Hello"]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(texts[0]):
            pass
        with tracer.invoke(texts[1]):
            short = model.lm_head.output
    with torch.no_grad():
        expected = plain(**tokenizer(texts[1], return_tensors="pt")).logits
    assert torch.allclose(short[:, : expected.shape[1]], expected, atol=1e-4)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with model.generate(**settings) as tracer:
        for text in texts:
            with tracer.invoke(text):
                result = tracer.result
    alone = plain.generate(**tokenizer(texts[1], return_tensors="pt"), pad_token_id=tokenizer.pad_token_id, **settings)
    assert torch.equal(result[:, -4:], alone[:, -4:])


def test_module_of_the_users_own_is_padded_on_the_left():
    class Own(nn.Module):
        def forward(self, input_ids, **kwargs):
            return input_ids

    padding = padding_of(Own(), None, "trace")
    assert (padding.side, padding.refusal, padding.takes_mask) == ("left", "", True)
    assert not kind_of(Own()).is_encoder


def test_models_that_mix_rows_when_they_generate_share_no_batch_then():
    module = build(MIX["rwkv"])
    model = LanguageModel(module)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = torch.tensor([[5, 17, 99], [7, 120, 64], [31, 2, 8]])
    expected = [module.generate(prompt[None], **settings)[0] for prompt in prompts]
    assert not torch.equal(module.generate(prompts, **settings), torch.stack(expected))
    with pytest.raises(BatchError, match="mixes the rows"), model.generate(**settings) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                pass
    found = []
    with model.generate(**settings, batched=False) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append(tracer.result[0])
    assert torch.equal(torch.stack(found), torch.stack(expected))
    logits = []
    with model.trace() as tracer:  # a single forward has no state to go on from
        for prompt in prompts:
            with tracer.invoke(prompt):
                logits.append(value_of(model.output)[0])
    assert torch.allclose(torch.stack(logits), value_of(module(prompts)), atol=1e-4)
