"""Gradients of a block in a runner: its own maths there, the model's here, as if there were one graph."""

from __future__ import annotations

import pytest
import torch


def assert_close(program):
    here, there = program(False), program("local")
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.abs().sum() > 0


def test_gradients_of_served_values_are_those_of_plain_torch(net, x):
    with net.trace(x, remote="local"):
        hidden = net[0].output
        result = net.output
        with (result * result).sum().backward():
            last = result.grad.save()
            first = hidden.grad.save()
    plain = net._module[0](x)
    plain.retain_grad()
    output = net._module[2](torch.relu(plain))
    output.retain_grad()
    (output * output).sum().backward()
    net._module.zero_grad()
    torch.testing.assert_close(last, output.grad)
    torch.testing.assert_close(first, plain.grad)


def test_value_that_is_read_and_computed_with_counts_both_ways(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            early = gpt.transformer.h[0].output
            middle = gpt.transformer.h[1].output
            late = gpt.transformer.h[2].output
            loss = gpt.output.logits.sin().sum() + (early * middle).sum() + late.mean()
            with loss.backward():
                found = [late.grad.save(), middle.grad.save(), early.grad.save()]
                found = found.save()
        return found

    assert_close(program)


def test_gradients_pass_through_what_the_block_has_written(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            early = gpt.transformer.h[0].output
            middle = gpt.transformer.h[1].output
            gpt.transformer.h[1].output = middle * 2 + early.sin()
            late = gpt.transformer.h[2].output
            loss = gpt.lm_head(late).logsumexp(-1).mean() + gpt.output.logits[0].sum() * 0.1
            found = torch.autograd.grad(loss, [late, middle, early]).save()
        return found

    assert_close(program)


def test_gradients_pass_through_an_edit_in_place(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            embedded = gpt.transformer.wte.output
            hidden = gpt.transformer.h[0].output
            hidden[:, 1] = hidden[:, 0] * 3
            hidden.mul_(0.5)
            loss = gpt.output.logits.sin().sum()
            found = torch.autograd.grad(loss, [embedded]).save()
        return found

    assert_close(program)


def test_gradient_that_is_replaced_flows_on(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            embedded = gpt.transformer.wte.output
            hidden = gpt.transformer.h[1].output
            with gpt.output.logits.sin().sum().backward():
                hidden.grad = hidden.grad * 0.5
                found = embedded.grad.save()
        return [found]

    assert_close(program)


def test_gradient_of_a_value_that_the_block_wants_it_of(gpt, ids):
    parameters = list(gpt._module.parameters())

    def program(remote):
        with gpt.trace(ids, remote=remote):
            embedded = gpt.transformer.wte.output
            embedded.requires_grad_()
            with gpt.output.logits.sin().sum().backward():
                found = embedded.grad.save()
        return [found]

    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        assert_close(program)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def test_gradient_of_a_weight_that_was_shown(net, x):
    with net.trace(x, remote="local"):
        weight = net[2].weight
        result = net.output
        found = torch.autograd.grad(result.sum(), [weight])[0].save()
    expected = torch.autograd.grad(net._module(x).sum(), [net._module[2].weight])[0]
    torch.testing.assert_close(found, expected)


def test_gradients_in_invokes_keep_to_their_rows(net, x):
    def program(remote):
        with net.trace(remote=remote) as tracer:
            with tracer.invoke(x[:1]):
                first = net[0].output
                with net.output.sum().backward(retain_graph=True):
                    one = first.grad.save()
            with tracer.invoke(x[1:]):
                second = net[0].output
                with (net.output**2).sum().backward():
                    other = second.grad.save()
        return one, other

    assert_close(program)


def test_weights_keep_the_gradients_they_have(net, x):
    net._module.zero_grad()
    with net.trace(x, remote="local"):
        with net.output.sum().backward():
            pass
    assert all(parameter.grad is None for parameter in net._module.parameters())


def test_without_gradients_at_the_with_there_are_none_in_the_block(net, x):
    with torch.no_grad():
        with net.trace(x, remote="local"):
            needs = net[0].output.requires_grad.save()
            is_enabled = torch.is_grad_enabled().save()
    assert needs is False and is_enabled is False
    with pytest.raises(RuntimeError, match="does not require grad|no gradient"):
        with torch.no_grad():
            with net.trace(x, remote="local"):
                net.output.sum().backward()


def test_saved_value_keeps_its_history_here(net, x):
    with net.trace(x, remote="local"):
        hidden = net[0].output.save()
        result = net.output.save()
    assert hidden.requires_grad and not hidden.is_leaf
    found = torch.autograd.grad(result.sum(), [hidden])[0]
    plain = net._module[0](x)
    expected = torch.autograd.grad(net._module[2](torch.relu(plain)).sum(), [plain])[0]
    torch.testing.assert_close(found, expected)


def test_second_derivatives_through_the_model_are_refused(net, x):
    with pytest.raises(NotImplementedError, match="Second derivatives"):
        with net.trace(x, remote="local"):
            hidden = net[0].output
            (first,) = torch.autograd.grad((net.output**2).sum(), [hidden], create_graph=True)
            torch.autograd.grad(first.sum(), [hidden])
