"""Tiny random models of many architectures, and a recorder of what a function's operations give that is not ours."""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections import namedtuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nnsight import NNsight

BASE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FULL = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
GPT = {
    "vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Zoo = namedtuple("Zoo", "config model sizes part")
#: name -> configuration class, model class, sizes, the part whose modules are looked into
ARCHITECTURES = {
    "gpt2": Zoo("GPT2Config", "GPT2LMHeadModel", GPT, "transformer.h.1"),
    "gpt_neox": Zoo("GPTNeoXConfig", "GPTNeoXForCausalLM", FULL, "gpt_neox.layers.1"),
    "gptj": Zoo("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, "transformer.h.1"),
    "opt": Zoo("OPTConfig", "OPTForCausalLM", {**FULL, "ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers.1"),  # noqa: E501
    "bloom": Zoo("BloomConfig", "BloomForCausalLM", {**FULL, "n_layer": 2, "n_head": 4}, "transformer.h.1"),
    "llama": Zoo("LlamaConfig", "LlamaForCausalLM", BASE, "model.layers.1"),
    "mistral": Zoo("MistralConfig", "MistralForCausalLM", BASE, "model.layers.1"),
    "qwen2": Zoo("Qwen2Config", "Qwen2ForCausalLM", BASE, "model.layers.1"),
    "qwen3": Zoo("Qwen3Config", "Qwen3ForCausalLM", {**BASE, "head_dim": 8}, "model.layers.1"),
    "gemma2": Zoo("Gemma2Config", "Gemma2ForCausalLM", {**BASE, "head_dim": 8}, "model.layers.1"),
    "gemma3": Zoo("Gemma3TextConfig", "Gemma3ForCausalLM", {**BASE, "head_dim": 8}, "model.layers.1"),
    "phi3": Zoo("Phi3Config", "Phi3ForCausalLM", BASE, "model.layers.1"),
    "olmo2": Zoo("Olmo2Config", "Olmo2ForCausalLM", BASE, "model.layers.1"),
    "mixtral": Zoo(
        "MixtralConfig", "MixtralForCausalLM", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers.1"  # noqa: E501
    ),
    "qwen3_moe": Zoo(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**BASE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, "model.layers.1",  # noqa: E501
    ),
    "gpt_oss": Zoo(
        "GptOssConfig", "GptOssForCausalLM",
        {**BASE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers.1",
    ),
    "deepseek_v3": Zoo(
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {
            **BASE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
        },
        "model.layers.1",
    ),
    "mamba": Zoo(
        "MambaConfig", "MambaForCausalLM",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **SPECIAL}, "backbone.layers.1",
    ),
    "t5": Zoo(
        "T5Config", "T5ForConditionalGeneration",
        {
            "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        },
        "decoder.block.1",
    ),
    "bart": Zoo(
        "BartConfig", "BartForConditionalGeneration",
        {
            "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
            "forced_eos_token_id": 2, **SPECIAL,
        },
        "model.decoder.layers.1",
    ),
    "bert": Zoo("BertConfig", "BertForMaskedLM", FULL, "bert.encoder.layer.1"),
    "modernbert": Zoo(
        "ModernBertConfig", "ModernBertForMaskedLM",
        {**FULL, "sep_token_id": 2, "cls_token_id": 1}, "model.layers.1",
    ),
    "vit": Zoo(
        "ViTConfig", "ViTModel",
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8,
        },
        "layers.1",
    ),
}  # fmt: skip


@functools.cache
def build(name, **options):
    """Return a tiny random model of an architecture."""
    import transformers

    zoo = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, zoo.config)(**zoo.sizes, **options)
    return getattr(transformers, zoo.model)(config).eval()


@pytest.fixture(scope="session")
def random_model():
    return build


@pytest.fixture(scope="session")
def architectures():
    return ARCHITECTURES


@pytest.fixture
def gpt2():
    return build("gpt2")


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def ids():
    return torch.tensor([[5, 17, 33, 2, 90, 41]])


class _Passing(TorchFunctionMode):
    """Makes every torch function and tensor method that Python calls go through a Python function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def copied(value):
    """Return a value with its tensors copied, so that in-place changes made later do not reach it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    return value


def recorded(code, call, module):
    """Run `call` and return what each operation in a function's code gave on `module`: {(kind, line, column): value}.

    Of an operation that is run several times it is the first value. The interpreter's profiling hook tells what
    every Python function returns, and the bytecode where in the source its
    caller stands; under the mode above torch's functions are Python functions too. The key is where the operation ends.
    """
    positions = list(code.co_positions())
    opcodes = code.co_code
    found = {}
    kinds = {dis.opmap["CALL"]: "call", dis.opmap["CALL_FUNCTION_EX"]: "call", dis.opmap["BINARY_OP"]: "operator"}

    def profile(frame, event, value):
        caller = frame.f_back
        if event == "return" and caller is not None and caller.f_code is code and caller.f_locals.get("self") is module:
            at = caller.f_lasti
            while opcodes[at] == dis.opmap["CACHE"]:  # a call of a Python function has moved on to its caches
                at -= 2
            kind = kinds.get(opcodes[at])
            if kind is not None:
                _, line, _, column = positions[at // 2]
                found.setdefault((kind, line, column), copied(value))

    before = sys.getprofile()
    with _Passing():
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(before)
    return found


@pytest.fixture(scope="session")
def recorder():
    return recorded


@pytest.fixture(scope="session")
def copies():
    return copied


@pytest.fixture(scope="session")
def smollm2_folder():
    from nnsight_hf import LoadError, smollm2_path

    try:
        return smollm2_path()
    except LoadError as error:
        pytest.skip(str(error))


def _looked_into(net, *args, **kwargs):
    """Run a module with all of its operations passing through visits; return its result and its source."""
    model = NNsight(net)
    source = model.source
    with model.trace(*args, **kwargs) as tracer:
        with contextlib.suppress(ValueError):  # whether or not it is reached
            source.returns[0].output
        result = tracer.result
    return result, source


@pytest.fixture(scope="session")
def looked_into():
    return _looked_into
