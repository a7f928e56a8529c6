"""Key-value caches are looked into: their tensors are copied, narrowed to rows and written like others."""

from __future__ import annotations

import more_zoo
import pytest
import torch

from nnsight import NNsight
from nnsight_hf.caches import register


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_cache_of_an_encoder_with_a_decoder_is_two(name):
    register()
    net, inputs = more_zoo.build(name), more_zoo.inputs_of(name)
    model = NNsight(net)
    path = "decoder" if name == "t5" else "model.decoder"
    with torch.no_grad():
        expected = net(**inputs)
        with model.trace(**inputs) as tracer:
            cache = tracer.cache(modules=[path])
            result = tracer.result
    kept = next(value for value in vars(cache[path].output).values() if hasattr(value, "self_attention_cache"))
    given = next(value for value in vars(expected).values() if hasattr(value, "self_attention_cache"))
    assert type(kept) is type(given)
    for part in ("self_attention_cache", "cross_attention_cache"):
        for layer, other in zip(getattr(kept, part).layers, getattr(given, part).layers, strict=True):
            assert torch.equal(layer.keys, other.keys)
            assert torch.equal(layer.values, other.values)
    assert torch.equal(result[0], expected[0])
