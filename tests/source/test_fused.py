"""What torch runs as one fused operation: the error says how to reach what is inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import MissedProviderError, NNsight

X = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
HOW = r"one fused C\+\+ operation, which never passes through Python. Call `torch.backends.mha.set_fastpath"


@pytest.fixture
def slow():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True).eval()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


def test_fused_attention_says_how_to_reach_it(attention):
    model = NNsight(attention)
    with torch.no_grad(), model.trace(X, X, X):
        with pytest.raises(MissedProviderError, match=HOW):
            model.source.F_multi_head_attention_forward_1.output
    with torch.no_grad(), model.trace(X, X, X):
        fused = model.source.torch__native_multi_head_attention_0.output
    with torch.no_grad():
        assert torch.equal(fused[0], attention(X, X, X)[0])


@pytest.mark.usefixtures("slow")
def test_attention_is_reached_without_the_fast_path(attention):
    model = NNsight(attention)
    with torch.no_grad(), model.trace(X, X, X):
        inner = model.source.F_multi_head_attention_forward_1.source
        pattern = inner.softmax_0.output
        got = model.source.F_multi_head_attention_forward_1.output
    expected, weights = attention(X, X, X, average_attn_weights=False)
    assert torch.allclose(got[0].transpose(0, 1), expected.detach(), atol=1e-6)
    assert torch.allclose(pattern.view(1, 2, 3, 3), weights.detach(), atol=1e-6)


@pytest.mark.usefixtures("slow")
def test_untaken_branch_is_not_taken_for_the_fast_path(attention):
    model = NNsight(attention)
    with torch.no_grad(), model.trace(X, X, X):
        with pytest.raises(MissedProviderError, match="this branch was not taken"):
            model.source.F_multi_head_attention_forward_0.output
    with torch.no_grad(), model.trace(X, X, X):
        with pytest.raises(MissedProviderError, match="this branch was not taken"):
            model.source.torch__native_multi_head_attention_0.output


def test_fused_layer_says_how_to_reach_it(layer):
    model = NNsight(layer)
    with torch.no_grad(), model.trace(X):
        with pytest.raises(MissedProviderError, match=HOW):
            model.source.self__sa_block_0.output
    encoder = NNsight(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval())
    with torch.no_grad(), encoder.trace(X):
        with pytest.raises(MissedProviderError, match=HOW):
            encoder.layers[0].source.self__sa_block_1.output


@pytest.mark.usefixtures("slow")
def test_layer_is_reached_without_the_fast_path(layer):
    model = NNsight(layer)
    with torch.no_grad(), model.trace(X) as tracer:
        attended = model.source.self__sa_block_1.output
        model.source.self__ff_block_1.output = torch.zeros(1, 3, 8)
        result = tracer.result
    with torch.no_grad():
        assert torch.allclose(attended, layer.self_attn(X, X, X)[0], atol=1e-6)
        assert torch.equal(result, layer.norm2(layer.norm1(X + attended)))
