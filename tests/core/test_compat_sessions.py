"""Programs of 0.6 and 0.7 with sessions, helpers that trace, and settings: each test is one, as users write it."""

from __future__ import annotations

import functools

import pytest
import torch
from modules import Net, plain, rows, seeded

import nnsight
from nnsight import CONFIG, NNsight
from nnsight.errors import MissedProviderError, OutOfOrderError
from nnsight.intervention.interleaver import Mediator


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def test_session_and_trace_take_remote_and_backend(model, net):
    with model.session(remote=False, backend=None):
        with model.trace(rows(), remote=False, backend=None):
            out = model.output.save()
    assert torch.equal(out, net(rows()))


def test_values_of_earlier_traces_in_later_traces_and_invokes(model, net):
    with torch.no_grad(), model.session():
        with model.trace(rows(0)):
            hidden = model.h[0].output  # not saved
        with model.trace(rows(1)):
            model.h[0].output = hidden
            one = model.output.save()
        with model.trace() as tracer:
            with tracer.invoke(rows(2)):
                model.h[0].output = hidden * 2
                two = model.output.save()
            with tracer.invoke(rows(3)):
                three = model.output.save()
    first = plain(net, rows(0)).outputs["h.0"][0]
    with torch.no_grad():
        after = lambda value: net.lm_head(net.h[2](net.h[1](value)))
        assert torch.equal(one, after(first))
        assert torch.allclose(two, after(first * 2))
        assert torch.allclose(three, net(rows(3)))


def test_save_of_containers_and_numbers(model):
    with model.session():
        results = dict().save()  # noqa: C408  as the programs do
        hidden = list().save()  # noqa: C408
        with model.trace(rows()):
            count = model.h[0].output.shape[-1].save()
            for index, block in enumerate(model.h):
                hidden.append(block.output)
                results[index] = block.output.norm().item()
    assert count == 8
    assert list(results) == [0, 1, 2]
    assert len(hidden) == 3


def test_list_of_unsaved_tensors_read_after_the_trace(model, net):
    hidden = []
    with model.trace(rows()):
        for block in model.h:
            hidden.append(block.output)
    expected = plain(net, rows()).outputs
    assert all(torch.equal(one, expected[f"h.{index}"][0]) for index, one in enumerate(hidden))


def test_return_and_appends_from_enclosing_functions(model, net):
    collected = []

    def run(x):
        with model.trace(x):
            collected.append(model.h[1].output.save())
            return model.output.save()

    outer = [run(rows(seed)) for seed in range(3)]
    for seed, out in enumerate(outer):
        assert torch.equal(out, net(rows(seed)))
        assert torch.equal(collected[seed], plain(net, rows(seed)).outputs["h.1"][0])


def test_decorated_functions(model, net):
    @torch.no_grad()
    def inner(x):
        with model.trace() as tracer:
            with tracer.invoke(x):
                hidden = model.h[2].output.save()
            with tracer.invoke():
                out = model.output.save()
        return hidden, out

    @functools.cache
    def cached():
        return inner(rows())

    hidden, out = cached()
    assert not hidden.requires_grad
    assert torch.equal(out, net(rows()))


def test_generators_and_partials_in_saved_values(model):
    with model.trace(rows()):
        lazy = nnsight.save(value for value in (1, 2))
        bound = nnsight.save(functools.partial(torch.add, model.h[0].output))
        norms = nnsight.save([block.output.norm() for block in model.h[1:]])
    assert list(lazy) == [1, 2]
    assert torch.equal(bound(1), bound.args[0] + 1)
    assert len(norms) == 2


# -- settings


def test_pymount_turns_the_method_off_and_leaves_the_function(model, net, monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "PYMOUNT", False)
    with model.trace(rows()):
        with pytest.raises(AttributeError, match="no attribute 'save'"):
            model.h[0].output.shape[0].save()
        out = nnsight.save(model.output)
    assert torch.equal(out, net(rows()))


def test_cross_invoker_stops_sharing_names_but_not_objects(model, monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "CROSS_INVOKER", False)
    shared = {}
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            shared["hidden"] = model.h[0].output
        with tracer.invoke(rows(1)):
            mine = model.h[0].output
            model.h[1].output = shared["hidden"]
            patched = model.h[1].output.save()
    assert torch.equal(patched, shared["hidden"])
    assert not torch.equal(patched, mine)
    with pytest.raises(NameError, match="hidden"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                hidden = model.h[0].output
            with tracer.invoke(rows()):
                model.h[1].output = hidden
    monkeypatch.setattr(CONFIG.APP, "CROSS_INVOKER", True)
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            other = model.h[0].output
        with tracer.invoke(rows()):
            model.h[1].output = other


def test_errors_are_caught_through_the_mediator(model):
    assert (Mediator.OutOfOrderError, Mediator.MissedProviderError) == (OutOfOrderError, MissedProviderError)
    with pytest.raises(Mediator.OutOfOrderError):
        with model.trace(rows()):
            _ = model.h[1].output
            _ = model.h[0].output
    with pytest.raises(Mediator.MissedProviderError, match="was not provided"):
        with model.trace(rows()):
            _ = model.h.output
