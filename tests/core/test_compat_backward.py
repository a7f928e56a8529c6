"""Programs of 0.6 and 0.7 that trace a backward outside of any trace: each test is one, as users write it."""

from __future__ import annotations

import torch
from modules import Net, rows, seeded

from nnsight import NNsight


def forward():
    """Tensors that have left a trace, and the same from plain torch: embedded, first, second layer, result."""
    net = seeded(Net)
    model = NNsight(net)
    with model.trace(rows()):
        traced = [model.emb.output.save()]
        traced += [block.output.save() for block in model.h]
        traced.append(model.output.save())
    other = seeded(Net)
    x = other.emb(rows())
    plain = [x]
    for block in other.h:
        x = block(x)
        plain.append(x)
    plain.append(other.lm_head(x))
    return traced, plain


def gradients(result, values, gradient=None):
    return torch.autograd.grad(result, values, grad_outputs=gradient, retain_graph=True)


def test_gradients_of_tensors_that_left_a_trace_in_reverse_order():
    traced, plain = forward()
    with traced[-1].sum().backward():
        found = [value.grad.clone() for value in reversed(traced[:-1])]
    expected = gradients(plain[-1].sum(), plain[:-1])
    assert all(torch.allclose(one, two) for one, two in zip(reversed(found), expected, strict=True))


def test_gradient_and_retain_graph_are_passed_on():
    traced, plain = forward()
    weights = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    with traced[-1].backward(gradient=weights, retain_graph=True):
        found = traced[1].grad.clone()
    assert torch.allclose(found, gradients(plain[-1], plain[1], weights)[0])
    with traced[-1].backward(gradient=2 * weights):
        again = traced[1].grad.clone()
    assert torch.allclose(again, 2 * found)


def test_assigned_gradient_propagates():
    traced, plain = forward()
    with traced[-1].sum().backward():
        traced[2].grad = torch.zeros_like(traced[2])
        found = traced[1].grad.clone()
    assert torch.equal(found, torch.zeros_like(found))
    traced, plain = forward()
    new = torch.randn(2, 8, generator=torch.Generator().manual_seed(4))
    with traced[-1].sum().backward():
        traced[2].grad = new
        found = traced[1].grad.clone()
    assert torch.allclose(found, gradients(plain[2], plain[1], new)[0])


def test_repeated_on_one_graph_with_plain_code_between():
    traced, plain = forward()
    scores = []
    for index in range(3):
        with traced[-1][:, index].sum().backward(retain_graph=True):
            gradient = traced[1].grad
            scores.append((gradient * traced[1].detach()).sum().item())
        total = sum(scores)
        assert isinstance(total, float)
    for index, score in enumerate(scores):
        (expected,) = gradients(plain[-1][:, index].sum(), [plain[1]])
        assert abs(score - (expected * plain[1]).sum().item()) < 1e-5
