"""When hooks of plugins fire while models are wrapped, traced and run: once each, in order, with what they are for."""

from __future__ import annotations

import types

import pytest
from modules import Net, assert_usable, rows, seeded

from nnsight import Interleaver, NNsight, PluginError, Tracer, TracerStateError, plugins


@pytest.fixture
def events():
    """What a plugin was told, in order; runs by number, in the order in which they started."""
    told, runs = [], []

    def started(run):
        assert isinstance(run, Interleaver)
        runs.append(run)
        told.append(f"run {len(runs)}")

    def ended(run, error):
        told.append((f"end {[one is run for one in runs].index(True) + 1}", type(error)))

    plugin = types.SimpleNamespace(
        nnsight_wrapped=lambda envoy: told.append(envoy),
        nnsight_trace_opened=lambda tracer: told.append(tracer),
        nnsight_block_joined=lambda block: told.append(f"block {block.order}"),
        nnsight_run_started=started,
        nnsight_run_ended=ended,
    )
    plugins.register(plugin, "observer")
    yield told
    plugins.unregister("observer")


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net, events):
    made = NNsight(net)
    assert events == [made]
    events.clear()
    return made


NONE = type(None)


def test_a_trace_is_opened_before_its_block_and_the_run_starts_at_the_first_request(model, events):
    with model.trace(rows()) as tracer:
        events.append("block")
        _ = model.h[0].output
        events.append("value")
    assert isinstance(tracer, Tracer)
    assert events == [tracer, "block", "run 1", "value", ("end 1", NONE)]


def test_a_tracer_says_what_is_traced_while_it_is_open(model):
    with model.trace(rows()) as tracer:
        assert tracer.envoy is model
    with model.h[0].trace(rows()) as part:
        assert part.envoy is model.h[0]
    with model.scan(rows()) as scan:
        assert scan.envoy is model
    with model.trace() as joint:
        with joint.invoke(rows()):
            found = joint.envoy
    assert found is model
    for closed in (tracer, part, scan, joint, model.trace(rows())):
        with pytest.raises(TracerStateError, match="This tracer is not open"):
            closed.envoy


def test_a_block_that_fails_before_it_asks_for_anything_has_no_run(model, events):
    with pytest.raises(KeyError):
        with model.trace(rows()) as tracer:
            raise KeyError
    assert events == [tracer]


def test_what_ended_a_run_is_told(model, net, events):
    with pytest.raises(KeyError):
        with model.trace(rows()):
            _ = model.h[0].output
            raise KeyError
    with pytest.raises(RuntimeError, match="shapes"):
        with model.trace(rows(width=5)):
            _ = model.output
    with model.trace(rows()) as tracer:
        _ = model.h[0].output
        tracer.stop()
    assert [event for event in events if isinstance(event, tuple)] == [
        ("end 1", KeyError), ("end 2", RuntimeError), ("end 3", NONE),
    ]  # fmt: skip
    assert_usable(model, net, rows())


def test_runs_that_nest_end_inside_out(model, events):
    with model.trace(rows()) as outer:
        _ = model.h[0].output
        with model.trace(rows()) as inner:
            pass
        events.append("between")
    assert events == [outer, "run 1", inner, "run 2", ("end 2", NONE), "between", ("end 1", NONE)]


def test_joint_invokes_are_one_run(model, events):
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            events.append("first")
        with tracer.invoke(rows()):
            events.append("second")
    assert events == [tracer, "run 1", "block 0", "block 1", "first", "second", ("end 1", NONE)]


def test_invokes_one_after_another_are_runs_that_end_before_the_next_starts(model, events):
    with model.trace(batched=False) as tracer:
        with tracer.invoke(rows()):
            events.append("first")
            _ = model.output
        with tracer.invoke(rows()):
            events.append("second")
            _ = model.output
    started = [event for event in events if event not in ("first", "second", "block 0")]
    assert started == [tracer, "run 1", ("end 1", NONE), "run 2", ("end 2", NONE)]
    assert events.index("first") < events.index(("end 1", NONE)) < events.index("second")


def test_an_error_that_is_being_handled_has_ended_no_run(model, events):
    try:
        raise KeyError
    except KeyError:
        with model.trace(batched=False) as tracer:
            with tracer.invoke(rows()):
                pass
    assert events == [tracer, "block 0", "run 1", ("end 1", NONE)]


def test_an_error_is_that_of_the_run_it_ended(model, events):
    with pytest.raises(KeyError):
        with model.trace(batched=False) as tracer:
            with tracer.invoke(rows()):
                _ = model.output
            with tracer.invoke(rows()):
                _ = model.output
                raise KeyError
    assert events == [tracer, "block 0", "run 1", ("end 1", NONE), "block 0", "run 2", ("end 2", KeyError)]


def test_an_edit_takes_its_seat_when_the_run_is_made(model, events):
    with model.edit() as edited:
        _ = model.h[0].output
    with edited.trace(rows()) as tracer:
        pass
    assert events == ["block -1", tracer, "run 1", ("end 1", NONE)]


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model.trace(rows(), trace=False),
        lambda model: model.scan(rows(), trace=False),
        lambda model: model.h[0].trace(rows(), trace=False),
    ],
    ids=["plain", "scan", "part"],
)
def test_every_kind_of_trace_is_told(model, events, run):
    run(model)
    assert isinstance(events.pop(0), Tracer)
    assert events == ["run 1", ("end 1", NONE)]


def test_calls_edits_and_sessions_are_no_runs(model, events):
    model.h[0](rows())
    model(rows())
    with model.edit():
        _ = model.h[0].output
    with model.session():
        pass
    assert events == []


def test_backward_is_no_run_of_the_model(model, events):
    with model.trace(rows()) as tracer:
        hidden = model.h[0].output
        loss = model.output.sum()
        with loss.backward():
            gradient = hidden.grad
    assert gradient is not None
    assert events == [tracer, "run 1", ("end 1", NONE)]


@pytest.mark.parametrize("hook", ["nnsight_trace_opened", "nnsight_run_started", "nnsight_run_ended"])
def test_a_hook_that_fails_is_named_and_the_model_stays_usable(net, hook):
    model = NNsight(net)
    plugins.register(types.SimpleNamespace(**{hook: lambda: 1 / 0}), "bad")
    try:
        with pytest.raises(PluginError, match=f"plugin 'bad' failed in {hook}: ZeroDivisionError"):
            with model.trace(rows()):
                _ = model.output
    finally:
        plugins.unregister("bad")
    assert_usable(model, net, rows())


def test_saveable_types_are_asked_for_whenever_a_model_is_wrapped(net):
    class Kept:
        pass

    asked = []

    def kinds():
        asked.append(1)
        return [Kept] if len(asked) > 1 else []

    plugins.register(types.SimpleNamespace(nnsight_saveable_types=kinds), "kinds")
    try:
        NNsight(net)
        model = NNsight(net)
        with model.trace(rows()):
            kept = Kept().save()
    finally:
        plugins.unregister("kinds")
    assert len(asked) == 2
    assert isinstance(kept, Kept) and not hasattr(kept, "save")
