"""Tiny random models of every causal architecture that the tests go through, three layers each, ready offline.

Import it as `zoo`: its folder is on the path of every test. A model that `build` returned is shared: nothing on it
may be changed, and `changed` says whether something was. Another number of layers, or any other size, is a keyword of
`build`, and another model.
"""

from __future__ import annotations

import functools

import torch

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **_IDS}
_FULL = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_MAMBA = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, **_IDS}

#: name, which is the `model_type` of the configuration -> the configuration class, the model class, the sizes
ARCHITECTURES: dict[str, tuple[str, str, dict[str, int | bool]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _FULL),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_FULL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 128, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_IDS}),  # noqa: E501
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _LLAMA),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        # the default scaling of positions belongs to the real model's context
        {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 131072},
    ),
    "deepseek_v3": (
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {
            **_LLAMA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
        },
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", _MAMBA),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "rwkv": (
        "RwkvConfig", "RwkvForCausalLM",
        {"vocab_size": 128, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 3, "context_length": 64, **_IDS},  # noqa: E501
    ),
    "jamba": (
        "JambaConfig", "JambaForCausalLM",
        {
            **_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
            "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
    ),
}  # fmt: skip
CAUSAL = tuple(ARCHITECTURES)
#: Those in which no layer attends: they carry a state from token to token.
RECURRENT = ("mamba", "mamba2", "rwkv")


_shared: list[tuple[str, torch.nn.Module, list[object]]] = []


@functools.cache
def build(name: str, **sizes: int | bool | str):
    """Return a tiny random model of an architecture: the same one each time."""
    made = make(name, **sizes)
    if name == "rwkv":  # its first call scales its weights: that of no test is the first
        with torch.no_grad():
            made(torch.tensor([[1]]))
    return share(name, made)


def share(name: str, model: torch.nn.Module):
    """Return a model that tests share, after noting what it is like."""
    _shared.append((name, model, _state(model)))
    return model


def changed() -> list[str]:
    """Return the names of the shared models that are not as they were any more."""
    found = [(index, name, _state(model)) for index, (name, model, _) in enumerate(_shared)]
    others = [(index, name, state) for index, name, state in found if state != _shared[index][2]]
    for index, name, state in others:  # said once, not after every test from now on
        _shared[index] = (name, _shared[index][1], state)
    return [name for _, name, _ in others]


def _state(model: torch.nn.Module) -> list[object]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        {name: value for name, value in vars(model.config).items() if not isinstance(value, dict | list)},
        [module.training for module in model.modules()],
        [(id(tensor), tensor._version, tensor.requires_grad, tensor.grad is None) for tensor in tensors],
    ]


def make(name: str, **sizes: int | bool | str):
    """Return a tiny random model of an architecture that nobody has called yet."""
    import transformers

    config, model, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**own, **sizes})).eval()
    with torch.no_grad():  # as initialised, many layers hardly change what passes through them
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made
