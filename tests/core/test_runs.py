"""What a run is of: parts, methods, modules called several times, users' hooks, and runs inside runs."""

import pytest
import torch
from modules import WIDTH, Calls, Net, plain, rows, seeded
from torch import nn

from nnsight import NNsight


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


# -- what is traced


def test_trace_on_a_part_of_the_model(net, model):
    x = rows()
    with model.h[1].trace(x) as tracer:
        attention = model.h[1].attn.output
        result = tracer.result
    assert torch.equal(attention, net.h[1].attn(x))
    assert torch.equal(result, net.h[1](x))


def test_trace_false_returns_the_output(net, model):
    x = rows()
    assert torch.equal(model.trace(x, trace=False), net(x))
    assert torch.equal(model.h[0].trace(x, trace=False), net.h[0](x))


def test_fn_names_a_method_or_is_a_callable():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def encode(self, x, times=1):
            for _ in range(times):
                x = self.inner(x)
            return x

    net = seeded(Encoder)
    model, x = NNsight(net), rows()
    with model.trace(x, fn="encode", times=1) as tracer:
        hidden, result = model.inner.output, tracer.result
    assert torch.equal(hidden, net.inner(x))
    assert torch.equal(result, net.encode(x))
    with model.trace(x, fn=lambda x: net.encode(net.encode(x)) + 1) as tracer:
        model.inner.output = torch.zeros(2, WIDTH)
        result = tracer.result
    assert torch.equal(result, net.encode(torch.zeros(2, WIDTH)) + 1)


# -- hooks of the user


def test_user_hooks_are_seen_in_values(net, model):
    x = rows()
    net.h[1].register_forward_hook(lambda _, __, output: output * 10)
    net.h[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with model.trace(x) as tracer:
        hidden = model.h[1].output
        given = model.h[2].input
        attention_input = model.h[2].attn.input
        result = tracer.result
    h1 = net.h[1](net.h[0](net.emb(x)))
    assert torch.equal(hidden, h1)
    # the caller passes it before the pre-hook of the module changes it
    assert torch.equal(given, h1)
    assert torch.equal(attention_input, h1 + 1)
    assert torch.equal(result, net(x))


def test_user_hooks_run_once_and_see_edits_of_other_places(net, model):
    x, seen = rows(), []
    net.h[1].register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with model.trace(x):
        model.h[0].output = model.h[0].output * 0
        hidden = model.h[1].output
    assert len(seen) == 1
    assert torch.equal(seen[0][0], torch.zeros(2, WIDTH))
    assert seen[0][1] is hidden


def test_global_hooks_are_seen(net, model):
    x = rows()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: output + 1 if isinstance(module, nn.Linear) else None
    )
    try:
        expected = net(x)
        with model.trace(x):
            hidden = model.h[0].mlp.output
            result = model.output
        assert torch.equal(result, expected)
        assert torch.equal(hidden, net.h[0].mlp(torch.relu(net.h[0].attn(net.emb(x)))))
    finally:
        handle.remove()


def test_hook_registered_inside_the_block_is_called(net, model):
    x, seen = rows(), []
    with model.trace(x):
        hidden = model.h[0].output
        handle = net.h[1].register_forward_hook(lambda _, args, __: seen.append(args[0]))
        _ = model.h[2].output
        handle.remove()
    assert len(seen) == 1
    assert seen[0] is hidden


# -- several calls of one module


def test_first_call_is_meant_when_a_module_is_called_several_times():
    net = seeded(Calls, lambda self, x: self.a(self.a(self.a(x))))
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        given, hidden = model.a.input, model.a.output
        result = tracer.result
    assert given is x
    assert torch.equal(hidden, net.a(x))
    assert torch.equal(result, net(x))
    with model.trace(x) as tracer:
        model.a.output = model.a.output * 0
        result = tracer.result
    assert torch.equal(result, net.a(net.a(torch.zeros(2, WIDTH))))


def test_recursive_module_is_met_at_its_outermost_input_and_innermost_output():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, depth=2):
            x = self.linear(x)
            return self(x, depth - 1) * 2 if depth else x

    net = seeded(Recursive)
    model, x = NNsight(net), rows()
    expected = plain(net, x)
    with model.trace(x) as tracer:
        given = model.input
        first = model.output
        result = tracer.result
    assert given is x
    assert torch.equal(first, expected.outputs[""][0])
    assert torch.equal(result, net(x))


def test_shared_module_is_one_location(net):
    net.tied = net.h[0].attn
    model, x = NNsight(net), rows()
    with model.trace(x):
        hidden = model.tied.output
    assert torch.equal(hidden, plain(net, x).outputs["h.0.attn"][0])


def test_module_called_inside_another_modules_hook():
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    net.a.register_forward_hook(lambda module, _, output: net.c(output))
    model, x = NNsight(net), rows()
    with model.trace(x):
        inside = model.c.output
        hidden = model.a.output
    assert inside is hidden
    assert torch.equal(hidden, net.a(x))


# -- runs inside runs


def edited(net, x, path, change):
    return plain(net, x, edit=lambda at, output: change(output) if at == path else None)


def test_trace_of_another_model_inside_a_block(net, model):
    other_net = seeded(Net, seed=1)
    other, x = NNsight(other_net), rows()
    with model.trace(x) as tracer:
        hidden = model.h[0].output
        with other.trace(hidden) as inner:
            other.h[0].output = other.h[0].output + 1
            changed = inner.result
        model.h[1].input = changed[:, :WIDTH]
        result = tracer.result
    h0 = plain(net, x).outputs["h.0"][0]
    expected = edited(other_net, h0, "h.0", lambda output: output + 1).result
    assert torch.equal(changed, expected)
    assert torch.equal(result, net.lm_head(net.h[2](net.h[1](expected[:, :WIDTH]))))


def test_outer_location_is_read_from_the_inner_block(net, model):
    other_net = seeded(Net, seed=1)
    other, x = NNsight(other_net), rows()
    with model.trace(x) as tracer:
        with other.trace(x):
            inner_first = other.h[0].output
            outer_first = model.h[0].output
            other.h[1].output = outer_first
            inner_last = other.h[2].output
            model.h[1].output = inner_last
        result = tracer.result
    expected = plain(net, x)
    assert torch.equal(inner_first, plain(other_net, x).outputs["h.0"][0])
    assert torch.equal(outer_first, expected.outputs["h.0"][0])
    assert torch.equal(inner_last, other_net.h[2](outer_first))
    assert torch.equal(result, net.lm_head(net.h[2](inner_last)))


def test_trace_of_the_same_model_inside_a_block(net, model):
    x, other = rows(), rows(1)
    with model.trace(x) as outer:
        first = model.h[0].output
        with model.trace(other) as inner:
            nested = model.h[0].output
            model.h[1].output = first
            nested_result = inner.result
        last = model.h[2].output
        result = outer.result
    expected = plain(net, x)
    assert torch.equal(nested, plain(net, other).outputs["h.0"][0])
    assert torch.equal(nested_result, net.lm_head(net.h[2](first)))
    assert torch.equal(last, expected.outputs["h.2"][0])
    assert torch.equal(result, expected.result)


def test_tracer_means_its_own_run_from_an_inner_block_of_the_same_model(net, model):
    x, other = rows(), rows(1)
    with model.trace(x) as outer:
        with model.trace(other) as inner:
            outer_result, inner_result = outer.result, inner.result
    assert torch.equal(outer_result, net(x))
    assert torch.equal(inner_result, net(other))


def test_outer_tracer_stops_both_blocks(model):
    after = []
    with model.trace(rows()) as outer:
        with model.trace(rows(1)):
            _ = model.h[0].output
            outer.stop()
        after.append("inner")
    assert after == []


def test_trace_inside_the_forward_of_another_model(net, model):
    def forward(self, x):
        with model.trace(self.a(x)):
            hidden = model.h[0].output
            model.h[1].output = torch.zeros_like(hidden)
            changed = model.output
        return self.b(hidden) + changed[:, :WIDTH]

    outer_net = seeded(Calls, forward)
    outer, x = NNsight(outer_net), rows()
    with outer.trace(x) as tracer:
        a = outer.a.output
        b = outer.b.output
        result = tracer.result
    h0 = plain(net, outer_net.a(x)).outputs["h.0"][0]
    tail = net.lm_head(net.h[2](torch.zeros(2, WIDTH)))
    assert torch.equal(a, outer_net.a(x))
    assert torch.equal(b, outer_net.b(h0))
    assert torch.equal(result, outer_net.b(h0) + tail[:, :WIDTH])


def test_values_are_kept_apart_over_many_runs(net, model):
    inputs = [rows(seed) for seed in range(20)]
    got = []
    for x in inputs:
        with model.trace(x) as tracer:
            got.append((model.h[1].output, tracer.result))
    for x, (hidden, result) in zip(inputs, got, strict=True):
        expected = plain(net, x)
        assert torch.equal(hidden, expected.outputs["h.1"][0])
        assert torch.equal(result, expected.result)
