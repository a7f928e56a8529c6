"""A wrapped model is the bare model: before, during and after a trace, for everything torch does with it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import warnings

import pytest
import torch
from modules import WIDTH, Net, assert_idle, rows, seeded
from torch import nn

from nnsight import NNsight

BACKEND = "eager"


@pytest.fixture
def net():
    return seeded(Net).eval()


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def attributes(net):
    return [sorted(vars(module)) for module in net.modules()]


def moments(net):
    """Yield before, during and after a trace of a wrapped model."""
    model = NNsight(net)
    yield "before"
    with model.trace(rows()):
        _ = model.h[1].output
        yield "during"
    yield "after"
    assert_idle(net)


def test_wrapping_and_tracing_leave_no_attribute(net):
    before = attributes(net)
    kinds = [type(module) for module in net.modules()]
    model = NNsight(net)
    assert attributes(net) == before
    with model.trace(rows()):
        _ = model.h[1].output
    assert attributes(net) == before
    assert [type(module) for module in net.modules()] == kinds


def test_state_dict_is_the_same(net):
    expected = list(net.state_dict())
    for _ in moments(net):
        assert list(net.state_dict()) == expected


def test_signature_is_the_same(net):
    expected = inspect.signature(seeded(Net).forward)
    for _ in moments(net):
        assert inspect.signature(net.forward) == expected


def test_pickle(net):
    expected = net(rows())
    for _ in moments(net):
        copied = pickle.loads(pickle.dumps(net))
        assert torch.equal(copied(rows()), expected)
        assert_idle(copied) if not is_open() else None
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(rows()), expected)


def is_open():
    from nnsight.kernel import blocks

    return bool(blocks.open_blocks)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copies_are_clean(net, how):
    for _ in moments(net):
        copied = how(net)
        for module in copied.modules() if how is copy.deepcopy else [copied]:
            assert "_compiled_call_impl" not in vars(module)
        if how is copy.deepcopy:
            with torch.no_grad():
                copied.lm_head.weight.zero_()
            assert torch.equal(copied(rows()), torch.zeros(2, 2 * WIDTH))
    assert net(rows()).abs().sum() > 0


def test_script(net):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * 2

    small = seeded(Small)
    model = NNsight(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        before = torch.jit.script(small)
        with model.trace(rows()):
            _ = model.first.output
            during = torch.jit.script(small)
        after = torch.jit.script(small)
        traced = torch.jit.trace(small, rows())
    for compiled in (before, during, after, traced):
        assert torch.equal(compiled(rows()), small(rows()))


def test_export(net):
    expected = net(rows())
    for _ in moments(net):
        program = torch.export.export(net, (rows(),))
        assert torch.allclose(program.module()(rows()), expected)


def test_compiled_model_is_the_same_when_idle(net):
    expected = net(rows())
    model = NNsight(net)
    compiled = torch.compile(net, backend=BACKEND, fullgraph=True)
    assert torch.allclose(compiled(rows()), expected)
    with model.trace(rows()):
        hidden = model.h[1].output
        during = compiled(rows())
    assert torch.allclose(during, expected)
    assert hidden.shape == (2, WIDTH)
    torch._dynamo.utils.counters.clear()
    assert torch.allclose(compiled(rows()), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # what was compiled before is used again


def test_wrapped_compiled_model_is_seen_through(net):
    plain = seeded(Net).eval()
    compiled = torch.compile(net, backend=BACKEND)
    compiled(rows())
    model = NNsight(compiled)
    with model.trace(rows()):
        hidden = model._orig_mod.h[1].output
        model._orig_mod.h[1].output = hidden * 0
        output = model.output
    assert torch.allclose(output, plain.lm_head(plain.h[2](torch.zeros(2, WIDTH))))
    assert torch.allclose(compiled(rows()), plain(rows()))


@torch.no_grad()  # torch warns of the compiler looking at gradients
def test_child_with_its_own_compile_is_reached(net):
    expected = net(rows())
    net.h[1].compile(backend=BACKEND)
    slot = net.h[1]._compiled_call_impl
    model = NNsight(net)
    assert torch.allclose(net(rows()), expected)
    with model.trace(rows()):
        model.h[1].output[:] = 0
        output = model.output
    assert torch.allclose(output, net.lm_head(net.h[2](torch.zeros(2, WIDTH))))
    assert net.h[1]._compiled_call_impl is slot
    assert torch.allclose(net(rows()), expected)


def test_first_compile_in_another_thread_during_a_run(net):
    model = NNsight(net)
    other = seeded(Net, seed=1).eval()
    expected = other(rows())
    compiled = torch.compile(other, backend=BACKEND)
    results = []
    with model.trace(rows()):
        _ = model.h[0].output
        thread = threading.Thread(target=lambda: results.append(compiled(rows())))
        thread.start()
        thread.join()
        output = model.output
    assert torch.allclose(results[0], expected)  # eagerly: the run holds compiled code to that
    assert torch.allclose(output, net(rows()))
    torch._dynamo.utils.counters.clear()
    assert torch.allclose(compiled(rows()), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # it compiles once no run is open


def test_the_stance_of_the_user_is_put_back(net):
    from torch._dynamo.eval_frame import _stance as first

    model = NNsight(net)
    with torch.compiler.set_stance("eager_on_recompile"):
        with model.trace(rows()):
            _ = model.output
            with NNsight(seeded(Net)).trace(rows()):
                pass
        from torch._dynamo import eval_frame

        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance == first


@pytest.mark.parametrize("order", ["first in first out", "last in first out"])
def test_overlapping_runs_of_two_wrappers(net, order):
    one, two = NNsight(net), NNsight(net)
    before = attributes(net)

    def run(model):
        with model.trace(rows()):
            hidden = model.h[1].output
            yield hidden
        yield None

    first, second = run(one), run(two)
    assert torch.equal(next(first), next(second))
    for generator in (first, second) if order.startswith("first") else (second, first):
        next(generator)
    assert attributes(net) == before
    for generator in (first, second):
        generator.close()


def test_forward_replaced_on_the_instance(net):
    model = NNsight(net)
    original = net.h[1].forward
    net.h[1].forward = lambda x: original(x) * 2
    expected = net(rows())
    with model.trace(rows()):
        hidden = model.h[1].output
        output = model.output
    assert torch.equal(output, expected)
    assert torch.equal(hidden, original(net.h[0](net.emb(rows()))) * 2)
    del net.h[1].forward
