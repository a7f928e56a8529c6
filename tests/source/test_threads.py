"""Threads that look into one model at once: nobody sees what another one's run has put in place."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight_source import rewrite

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def make_net():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.tanh(self.linear(x)) + 1

    torch.manual_seed(0)
    return nn.Sequential(Part(), Part()).requires_grad_(False)


def by_hand(net, x, edit):
    for index, part in enumerate(net):
        x = torch.tanh(nn.functional.linear(x, part.linear.weight, part.linear.bias))
        x = (edit(x) if index == 1 else x) + 1
    return x


@pytest.fixture
def net():
    return make_net()


def test_two_threads_take_the_first_look_together(net, monkeypatch):
    together, rewrite_ = threading.Barrier(2), rewrite._rewrite

    def wait_and_rewrite(function):
        together.wait(timeout=60)
        return rewrite_(function)

    monkeypatch.setattr(rewrite, "_rewrite", wait_and_rewrite)
    model = NNsight(net)

    def look(x):
        with model.trace(x):
            model[1].source.torch_tanh_0.output = model[1].source.torch_tanh_0.output * 2
            result = model.output
        return result

    with ThreadPoolExecutor(2) as pool:
        results = [future.result() for future in [pool.submit(look, X), pool.submit(look, X + 1)]]
    for x, result in zip((X, X + 1), results, strict=True):
        assert torch.allclose(result, by_hand(net, x, lambda tanh: tanh * 2))


def test_plain_calls_are_the_same_to_the_last_bit_while_others_edit(net):
    model, expected, forward = NNsight(net), net(X), type(net[1]).forward
    is_over, others = threading.Event(), []

    def call():
        while not is_over.is_set():
            others.append(net(X))
        others.append(net(X))

    def trace(factor):
        results = []
        for _ in range(60):
            with model.trace(X):
                tanh = model[1].source.torch_tanh_0
                tanh.output = tanh.output * factor
                results.append(model.output)
        return results

    with ThreadPoolExecutor(4) as pool:
        calling = pool.submit(call)
        tracing = {factor: pool.submit(trace, factor) for factor in (2, 3, 4)}
        found = {factor: future.result() for factor, future in tracing.items()}
        is_over.set()
        calling.result()
    assert all(torch.equal(other, expected) for other in others)
    for factor, results in found.items():
        edited = by_hand(net, X, lambda tanh, factor=factor: tanh * factor)
        assert len(results) == 60
        assert all(torch.allclose(result, edited) for result in results)
    assert type(net[1]).forward is forward
