"""Sessions: traces that belong together. Here they cost nothing and change nothing."""

import pytest
import torch
from modules import WIDTH, Net, assert_idle, plain, rows, seeded

from nnsight import NNsight, save
from nnsight.errors import SaveError, TracerStateError


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def test_values_flow_between_traces(net, model):
    a, b = rows(0), rows(1)
    with model.session() as session:
        with model.trace(a):
            hidden = model.h[0].output
        with model.trace(b) as tracer:
            model.h[0].output = hidden
            result = tracer.result
    assert session is not None
    assert torch.equal(result, plain(net, a).result)
    assert_idle(net)


def test_unsaved_values_reach_invokes_of_later_traces(net, model):
    a, b = rows(0), rows(1)
    with model.session():
        with model.trace(a):
            hidden = model.h[0].output
        with model.trace() as tracer:
            with tracer.invoke(b):
                model.h[0].output = hidden
                first = tracer.result
            with tracer.invoke(b):
                second = tracer.result
    assert torch.allclose(first, plain(net, a).result, atol=1e-6)
    assert torch.allclose(second, plain(net, b).result, atol=1e-6)


def test_save_works_everywhere_in_a_session(model):
    with model.session():
        before = list().save()  # noqa: C408
        with model.trace(rows()):
            before.append(model.h[0].output.save())
        after = {"n": len(before)}.save()
        number = save(3)
    assert len(before) == 1
    assert after == {"n": 1}
    assert number == 3
    assert not hasattr([], "save")
    with pytest.raises(SaveError):
        save(1)


def test_return_and_appends_of_enclosing_functions(net, model):
    x = rows()

    def run():
        got = []
        with model.session():
            for i in range(3):
                with model.trace(x):
                    got.append(model.h[i].output)
            return got

    for i, value in enumerate(run()):
        assert torch.equal(value, plain(net, x).outputs[f"h.{i}"][0])
    assert_idle(net)


def test_edits_made_in_a_session_stay(net, model):
    x = rows()
    with model.session():
        with model.edit() as edited:
            model.h[0].output[:] = 0
        with edited.trace(x):
            inside = model.h[0].output
    with edited.trace(x):
        outside = model.h[0].output
    assert torch.equal(inside, torch.zeros(2, WIDTH))
    assert torch.equal(outside, inside)


def test_error_leaves_nothing_open(net, model):
    with pytest.raises(KeyError):
        with model.session():
            with model.trace(rows()):
                raise KeyError
    assert_idle(net)
    assert not hasattr([], "save")


def test_stop_in_a_trace_ends_that_trace_only(net, model):
    x = rows()
    with model.session():
        with model.trace(x) as tracer:
            first = model.h[0].output
            tracer.stop()
        with model.trace(x):
            second = model.h[0].output
    assert torch.equal(first, second)


def test_sessions_nest_and_are_made_anew(net, model):
    x = rows()
    with model.session():
        with model.session():
            with model.trace(x):
                hidden = model.h[0].output
        saved = [1].save()
    assert saved == [1]
    assert torch.equal(hidden, plain(net, x).outputs["h.0"][0])


def test_session_of_a_part(net, model):
    x = rows()
    with model.h[0].session():
        with model.h[0].trace(x) as tracer:
            result = tracer.result
    assert torch.equal(result, net.h[0](x))


def test_session_can_be_entered_again_after_it_has_ended(model):
    session = model.session()
    for _ in range(2):
        with session:
            assert [1].save() == [1]


def test_session_that_is_open_cannot_be_entered_again(net, model):
    session = model.session()
    with pytest.raises(TracerStateError, match="open already"):
        with session, session:
            pass
    assert_idle(net)
