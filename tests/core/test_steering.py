"""Steering a run from its block: skipping modules, stopping, and calling modules by hand."""

import pytest
import torch
from modules import WIDTH, Calls, Net, Structured, plain, rows, seeded

from nnsight import NNsight


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


# -- skipping


def test_skip_gives_the_value_and_does_not_run_the_module():
    ran = []
    net = seeded(Calls, lambda self, x: self.c(self.b(self.a(x))))
    net.b.register_forward_hook(lambda *_: ran.append("b"))
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        model.b.skip(model.a.output * 2)
        skipped = model.b.output
        result = tracer.result
    assert ran == []
    assert torch.equal(skipped, net.a(x) * 2)
    assert torch.equal(result, net.c(net.a(x) * 2))


def test_skip_uses_the_module_own_input(net, model):
    x = rows()
    with model.trace(x) as tracer:
        model.h[1].skip(model.h[1].input)
        result = tracer.result
    assert torch.equal(result, edited_skip(net, x, {1}))


def test_consecutive_modules_are_skipped(net, model):
    x = rows()
    with model.trace(x) as tracer:
        for block in model.h:
            block.skip(block.input)
        result = tracer.result
    assert torch.equal(result, edited_skip(net, x, {0, 1, 2}))


def edited_skip(net, x, indices):
    x = net.emb(x)
    for index, block in enumerate(net.h):
        x = x if index in indices else block(x)
    return net.lm_head(x)


def test_skipped_output_can_be_changed_again(net, model):
    x = rows()
    with model.trace(x) as tracer:
        model.h[0].skip(torch.zeros(2, WIDTH))
        model.h[0].output = model.h[0].output + 1
        result = tracer.result
    assert torch.equal(result, net.lm_head(net.h[2](net.h[1](torch.ones(2, WIDTH)))))


def test_skip_with_a_tuple():
    net = seeded(Structured)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        model.pair.skip((x, x))
        result = tracer.result
    expected = plain(net, x, edit=lambda path, output: (x, x) if path == "pair" else None)
    assert torch.equal(result, expected.result)


# -- stopping


def test_stop_ends_block_and_run():
    ran, after = [], []
    net = seeded(Calls, lambda self, x: self.c(self.b(self.a(x))))
    net.b.register_forward_hook(lambda *_: ran.append("b"))
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        hidden = model.a.output
        tracer.stop()
        after.append("ran")
    assert torch.equal(hidden, net.a(x))
    assert (ran, after) == ([], [])


def test_stop_runs_finally_blocks_of_both_sides():
    log = []

    def forward(self, x):
        try:
            return self.b(self.a(x))
        finally:
            log.append("model")

    model = NNsight(seeded(Calls, forward))
    with model.trace(rows()) as tracer:
        try:
            _ = model.a.output
            tracer.stop()
        finally:
            log.append("block")
    assert log == ["block", "model"]


def test_stop_before_the_first_request_runs_nothing():
    ran = []
    model = NNsight(seeded(Calls, lambda self, x: ran.append("model")))
    with model.trace(rows()) as tracer:
        tracer.stop()
    assert ran == []


def test_stop_from_a_helper_under_no_grad(net, model):
    x = rows()

    def helper(tracer):
        tracer.stop()

    with model.trace(x) as tracer:
        with torch.no_grad():
            hidden = model.h[0].output
            helper(tracer)
    assert torch.is_grad_enabled()
    assert torch.equal(hidden, plain(net, x).outputs["h.0"][0])


# -- calling modules from the block


def test_ad_hoc_call_of_a_module_does_not_count_as_a_visit(net, model):
    x = rows()
    expected = plain(net, x)
    with model.trace(x):
        hidden = model.h[0].output
        early = model.lm_head(hidden)
        twice = model.h[0](model.h[0](hidden))
        late = model.lm_head.output
    assert torch.equal(early, net.lm_head(expected.outputs["h.0"][0]))
    assert torch.equal(twice, net.h[0](net.h[0](expected.outputs["h.0"][0])))
    assert torch.equal(late, expected.result)


def test_whole_model_can_be_called_from_its_block(net, model):
    x, other = rows(), rows(1)
    with model.trace(x) as tracer:
        hidden = model.h[0].output
        elsewhere = model(other)
        result = tracer.result
    assert torch.equal(hidden, plain(net, x).outputs["h.0"][0])
    assert torch.equal(elsewhere, net(other))
    assert torch.equal(result, net(x))


def test_envoy_is_callable_outside_traces(net, model):
    x = rows()
    assert torch.equal(model(x), net(x))
    assert torch.equal(model.h[1](x), net.h[1](x))
    assert torch.equal(model.h[1].attn(x), net.h[1].attn(x))


def test_hooked_call_visits_the_module():
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))  # `c` is not called by the model
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        hidden = model.a.output
        outer = model.c(hidden, hook=True)
        result = tracer.result
    assert torch.equal(outer, net.c(net.a(x)))
    assert torch.equal(result, net(x))


def test_hooked_call_raises_in_the_block_and_the_run_goes_on(net, model):
    x = rows()
    with model.trace(x) as tracer:
        _ = model.h[0].output
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.lm_head(torch.ones(2, WIDTH + 1), hook=True)
        result = tracer.result
    assert torch.equal(result, net(x))
