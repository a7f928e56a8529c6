"""Models for blocks in another process: a random GPT-2, a network of three layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import LanguageModel, NNsight


@pytest.fixture(scope="session")
def gpt():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=128, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    module = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return LanguageModel(module)


@pytest.fixture(scope="session")
def net():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


@pytest.fixture(scope="session")
def ids():
    return torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
