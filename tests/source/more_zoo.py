"""Tiny random models beside the causal ones of `zoo`: encoders, encoders with decoders, and models that see."""

from __future__ import annotations

import functools

import torch
import zoo

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_BOTH = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **_IDS,
}  # fmt: skip

#: name -> the configuration class, the model class, the sizes
ARCHITECTURES = {
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {
            "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**_BOTH, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        {
            **_BOTH, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
            "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _TEXT),
    "modernbert": (
        "ModernBertConfig", "ModernBertForMaskedLM", {**_TEXT, **_IDS, "sep_token_id": 2, "cls_token_id": 1},
    ),
    "vit": ("ViTConfig", "ViTModel", _SIGHT),
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": {**_TEXT, **_IDS}, "vision_config": _SIGHT}),
    "resnet": (
        "ResNetConfig", "ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
}  # fmt: skip


@functools.cache
def build(name, **sizes):
    """Return a tiny random model of an architecture. It is shared: nothing on it may be changed."""
    import transformers

    config, model, own = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**own, **sizes)).eval()
    with torch.no_grad():  # as initialised, many layers hardly change what passes through them
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return zoo.share(name, made)


def inputs_of(name):
    """Return what an architecture is called with."""
    ids = torch.tensor([[5, 17, 33, 2, 90, 41]])
    source = torch.Generator().manual_seed(0)
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16, generator=source)}
    return {
        "t5": {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
        "bart": {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
        "whisper": {"input_features": torch.randn(1, 8, 32, generator=source), "decoder_input_ids": ids},
        "vit": pixels,
        "resnet": pixels,
        "clip": {"input_ids": ids, **pixels},
    }.get(name, {"input_ids": ids})
