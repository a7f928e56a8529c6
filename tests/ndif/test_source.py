"""`envoy.source` in a block that has no forwards to look into: as it is where the model is."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from nnsight import NNsight, OutOfOrderError, save

both = pytest.mark.parametrize("remote", [False, "local"])


def scaled(value):
    twice = torch.mul(value, 2)
    return twice + 1


def doubling(function):
    @functools.wraps(function)
    def wrapper(*args):
        return torch.mul(function(*args), 2)

    return wrapper


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @doubling
    def forward(self, x):
        hidden = scaled(self.linear(x))
        for _ in range(2):
            hidden = torch.tanh(hidden)
        if x.shape[0] > 100:
            hidden = torch.relu(hidden)
        return hidden @ self.linear.weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.part = nn.Linear(4, 4), Part()

    def forward(self, x):
        return self.part(self.first(x)) - 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NNsight(Net())


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


def parts(net, x, twice=lambda value: value, rounds=lambda value: value):
    """The values inside the part, worked out by hand, and the result."""
    given = net.part.linear(net.first(x))
    double = twice(given * 2)
    first = rounds(torch.tanh(double + 1))
    product = torch.tanh(first) @ net.part.linear.weight
    return given, double, first, product, product * 2 - 1


@both
def test_operations_are_read(model, x, remote):
    with model.trace(x, remote=remote):
        inside = model.part.source
        around = inside.wrapper
        given = save(inside.scaled_0.input)
        first = save(inside.torch_tanh_0.output)
        product = save(inside.ops.matmul_0.output)
        returned = save(inside.returns[0].output)
        outer = save(around.torch_mul_0.output)
        names = save([inside.names, inside.vars.names, inside.torch_tanh_0.line, str(inside), str(inside.scaled_0)])
        result = save(model.output)
    expected = parts(model._module, x)
    torch.testing.assert_close([given, first, product, result], [expected[0], *expected[2:]])
    torch.testing.assert_close([returned, outer], [expected[3], expected[3] * 2])
    inside = model.part.source
    assert names == [inside.names, inside.vars.names, inside.torch_tanh_0.line, str(inside), str(inside.scaled_0)]


@both
def test_operations_are_changed_and_skipped(model, x, remote):
    with model.trace(x, remote=remote):
        model.part.source.torch_tanh_0.output = model.part.source.torch_tanh_0.output * 3
        result = save(model.output)
    torch.testing.assert_close(result, parts(model._module, x, rounds=lambda value: value * 3)[4])
    with torch.no_grad(), model.trace(x, remote=remote):
        model.part.source.torch_tanh_0.output[0] = 1
        edited = save(model.output)

    def fill(value):
        return torch.cat([torch.ones_like(value[:1]), value[1:]])

    torch.testing.assert_close(edited, parts(model._module, x, rounds=fill)[4].detach())
    with model.trace(x, remote=remote):
        model.part.source.scaled_0.skip(torch.ones(3, 4))
        skipped = save(model.output)
    expected = torch.tanh(torch.tanh(torch.ones(3, 4))) @ model._module.part.linear.weight * 2 - 1
    torch.testing.assert_close(skipped, expected)
    with model.trace(x, remote=remote):
        args, kwargs = model.part.source.scaled_0.inputs
        model.part.source.scaled_0.inputs = (args[0] * 0,), kwargs
        zeroed = save(model.output)
    expected = torch.tanh(torch.tanh(torch.ones(3, 4))) @ model._module.part.linear.weight * 2 - 1
    torch.testing.assert_close(zeroed, expected)


@both
def test_operations_inside_of_what_is_called(model, x, remote):
    with model.trace(x, remote=remote):
        twice = model.part.source.scaled_0.source.torch_mul_0.output
        model.part.source.scaled_0.source.vars.twice_0.output = twice * 0
        result = save(model.output)
        twice = save(twice)
    expected = parts(model._module, x, twice=lambda value: value * 0)
    torch.testing.assert_close(result, expected[4])
    torch.testing.assert_close(twice, parts(model._module, x)[1])


@both
def test_source_of_a_submodule_by_its_call(model, x, remote):
    with model.trace(x, remote=remote):
        product = save(model.source.self_part_0.source.ops.matmul_0.output)
    torch.testing.assert_close(product, parts(model._module, x)[3])


@both
def test_rounds_of_a_loop_are_steps(model, x, remote):
    with model.trace(x, remote=remote) as tracer:
        inside = model.part.source
        found = save([])
        for _ in tracer.iter[0:2]:
            found.append(inside.torch_tanh_0.output)
    first = parts(model._module, x)[2]
    torch.testing.assert_close(found, [first, torch.tanh(first)])


@both
def test_invokes_see_their_rows_inside(model, x, remote):
    with torch.no_grad(), model.trace(remote=remote) as tracer:
        with tracer.invoke(x[:1]):
            first = save(model.part.source.torch_tanh_0.output)
            model.part.source.ops.matmul_0.output = model.part.source.ops.matmul_0.output * 0
            one = save(model.output)
        with tracer.invoke(x[1:]):
            second = save(model.part.source.torch_tanh_0.output)
            two = save(model.output)
    expected = parts(model._module, x)
    torch.testing.assert_close(torch.cat([first, second]), expected[2].detach())
    assert torch.equal(one, -torch.ones(1, 4))
    torch.testing.assert_close(two, expected[4][1:].detach())


@both
def test_source_is_taken_in_each_trace_of_a_session(model, x, remote):
    with model.session(remote=remote):
        with model.trace(x):
            first = model.part.source.torch_tanh_0.output
        with model.trace(x * 2):
            model.part.source.torch_tanh_0.output = first
            result = save(model.output)
    expected = torch.tanh(parts(model._module, x)[2]) @ model._module.part.linear.weight * 2 - 1
    torch.testing.assert_close(result, expected)


@both
def test_operations_are_cached(model, x, remote):
    with model.trace(x, remote=remote) as tracer:
        cache = tracer.cache(modules=[model.part.source.ops.matmul_0])
    (key,) = cache.keys()
    assert key == "model.part.source.ops.matmul_0"
    torch.testing.assert_close(cache[key].output, parts(model._module, x)[3].detach())


@both
def test_misspelt_operation_and_branch_not_taken_are_errors(model, x, remote):
    with pytest.raises(AttributeError, match=r"no operation 'torch_tanhh_0' \(perhaps torch_tanh_0"):
        with model.trace(x, remote=remote):
            _ = model.part.source.torch_tanhh_0
    with pytest.raises(ValueError, match=r"torch_relu_0.*\n?.*under `if x.shape\[0\] > 100:`"):
        with model.trace(x, remote=remote):
            _ = model.part.source.torch_relu_0.output
    with pytest.raises(OutOfOrderError, match="scaled_0"):
        with model.trace(x, remote=remote):
            inside = model.part.source
            _ = inside.ops.matmul_0.output
            _ = inside.scaled_0.output
    with model.trace(x, remote=remote):
        result = save(model.output)
    assert torch.equal(result, model._module(x))


@both
def test_pattern_of_an_attention_is_read(gpt, ids, remote):
    with gpt.trace(ids, remote=remote):
        attention = gpt.transformer.h[1].attn.source
        mixed = save(attention.attention_interface_0.output[0])
        attention.attention_interface_0.output[0][:, 0] = 0
        logits = save(gpt.output.logits)
    plain, seen = gpt._module, []
    handle = plain.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    plain(ids)
    handle.remove()
    torch.testing.assert_close(mixed.flatten(2)[:, 1:], seen[0][:, 1:])
    handle = plain.transformer.h[1].attn.c_proj.register_forward_pre_hook(
        lambda m, a: (torch.cat([torch.zeros_like(a[0][:, :1]), a[0][:, 1:]], 1),)
    )
    expected = plain(ids).logits
    handle.remove()
    torch.testing.assert_close(logits, expected)
