"""`nnsight.explain()`: what the last trace asked for, in order, with what it got; and nothing of it when it is off."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from modules import WIDTH, Calls, Net, assert_usable, python, rows, seeded

import nnsight
from nnsight import NNsight, explain
from nnsight.builtin._gradients.session import Backward
from nnsight.errors import OutOfOrderError
from nnsight.joint.captured import CapturedMediator
from nnsight.kernel.interleaver import Interleaver
from nnsight.kernel.mediator import Mediator
from nnsight.plugins import hooks


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def recording():
    explain.on()
    try:
        yield
    finally:
        explain.off()


pytestmark = pytest.mark.usefixtures("_forgotten")


@pytest.fixture
def _forgotten():
    explain._last.__dict__.clear()
    yield
    explain._last.__dict__.clear()


def told():
    """What is printed, and the object."""
    file = io.StringIO()
    found = explain(file)
    return file.getvalue(), found


def line_of(text):
    with open(__file__, encoding="utf-8") as file:
        (found,) = [number for number, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}")]
    return found


def asked(explanation):
    return [(request.kind, request.location, request.occurrence, request.got) for request in explanation.requests]


@pytest.mark.usefixtures("recording")
def test_requests_of_a_finished_trace_in_order_with_what_they_got(model, net):
    with model.trace(rows()) as tracer:  # opened here
        hidden = model.h[0].output  # asked here
        model.h[1].output = hidden * 2
        _ = tracer.result
    text, found = told()
    assert (found.method, found.where) == ("trace", f"{__file__}:{line_of('opened here')}")
    assert asked(found) == [
        ("read", "model.h.0.output", 0, "float32[2, 8]"),
        ("write", "model.h.1.output", 0, "float32[2, 8]"),
        ("read", "model.result", 0, "float32[2, 16]"),
    ]
    first = found.requests[0]
    assert (first.shape, first.dtype, first.block) == ((2, 8), torch.float32, "block")
    assert first.where == f"{__file__}:{line_of('asked here')}"
    times = [request.at for request in found.requests]
    assert times == sorted(times)
    assert all(request.seconds > 0 for request in found.requests)
    assert found.error == ""
    assert found.seconds > times[-1]
    assert "3 requests, finished after" in text
    assert "read" in text.splitlines()[1]
    assert "model.h.0.output (occurrence 0)  float32[2, 8]" in text
    assert_usable(model, net, rows())


@pytest.mark.usefixtures("recording")
def test_request_that_failed_says_what_was_raised_and_the_trace_what_ended_it(model):
    with pytest.raises(OutOfOrderError):
        with model.trace(rows()):
            _ = model.h[1].output
            _ = model.h[0].output
    text, found = told()
    assert [request.error.split(":")[0] for request in found.requests] == ["", "OutOfOrderError"]
    assert found.error.startswith("OutOfOrderError: Value was missed for `model.h.0.output`")
    assert "2 requests, failed after" in text
    assert "raised OutOfOrderError" in text
    assert text.splitlines()[-1].startswith("  ended by OutOfOrderError: Value was missed")


@pytest.mark.usefixtures("recording")
def test_rows_stay_short_and_a_block_that_others_ended_got_no_answer(model):
    with pytest.raises(OutOfOrderError):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                _ = model.h[1].output
                _ = model.h[0].output
            with tracer.invoke(rows()):
                _ = model.lm_head.output
    text, found = told()
    assert [(request.location, request.got, request.error.split(":")[0]) for request in found.requests] == [
        ("model.h.1.output", f"float32[2, {WIDTH}]", ""),
        ("model.lm_head.output", "no answer: the run ended first", ""),
        ("model.h.0.output", "", "OutOfOrderError"),
    ]
    table = text.splitlines()[1:-1]
    assert len({line.rindex(__file__) for line in table}) == 1
    assert "raised OutOfOrderError: Value was missed for `model.h.0.output`: " in table[2]
    assert all("Ask for locations" not in line for line in table)
    assert "Ask for locations" in found.requests[2].error


@pytest.mark.usefixtures("recording")
def test_error_of_the_model_is_what_ended_the_trace(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with model.trace(rows()):
            model.h[0].output = torch.zeros(3, 5)
    _, found = told()
    assert asked(found) == [("write", "model.h.0.output", 0, "float32[3, 5]")]
    assert found.error.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.usefixtures("recording")
def test_change_in_place_is_told_and_an_error_of_the_model_names_its_line():
    def forward(module, x):
        if (module.a(x) == 7).all():
            raise LookupError("seven")
        return x

    model = NNsight(seeded(Calls, forward))
    with torch.no_grad(), pytest.raises(LookupError, match="seven") as caught:
        with model.trace(rows()):
            model.a.output[:] = 7  # in place
    text, found = told()
    assert found.requests[0].is_edited
    assert "edited in place" in text
    assert caught.value.__notes__ == [
        f"in `model` (occurrence 0), after `model.a.output` was changed at {__file__}:{line_of('in place')}"
    ]


@pytest.mark.usefixtures("recording")
def test_value_that_was_only_read_is_not_told_to_be_edited(model):
    with model.trace(rows()):
        one = model.h[0].output
        two = model.h[1].output
        _ = one + two
        three = model.h[2].output
        three[:] = 0
    assert [request.is_edited for request in told()[1].requests] == [False, False, True]


@pytest.mark.usefixtures("recording")
def test_changes_in_place_by_the_model_are_not_the_blocks():
    model = NNsight(seeded(Calls, lambda self, x: self.b(self.a(x).relu_())))
    with torch.no_grad(), model.trace(rows()):
        _ = model.a.output
        _ = model.b.output
    assert [request.is_edited for request in told()[1].requests] == [False, False]


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("batched", [True, False])
def test_invokes_say_which_block_asked(model, batched):
    with model.trace(batched=batched) as tracer:
        with tracer.invoke(rows()):  # first invoke
            _ = model.h[0].output
        with tracer.invoke(rows(1)):  # second invoke
            model.h[0].output = model.h[0].output * 2
    _, found = told()
    first, second = (f"invoke at {__file__}:{line_of(f'{which} invoke')}" for which in ("first", "second"))
    assert [(request.block, request.kind) for request in found.requests] == [
        (first, "read"),
        (second, "read"),
        (second, "write"),
    ]
    assert [request.shape for request in found.requests] == [(2, 8)] * 3
    assert found.where.startswith(__file__)


@pytest.mark.usefixtures("recording")
def test_changes_in_place_by_invokes(model):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(rows()):
            model.h[0].output[:] = 0
        with tracer.invoke(rows(1)):
            _ = model.h[0].output
    assert [request.is_edited for request in told()[1].requests] == [True, False]


@pytest.mark.usefixtures("recording")
def test_edits_are_told_with_the_traces_they_take_part_in(model):
    with model.edit() as edited:  # the edit
        edited.h[0].output = edited.h[0].output * 2
    with edited.trace(rows()):
        _ = edited.h[1].output
    _, found = told()
    assert [(request.kind, request.location) for request in found.requests if request.block == "block"] == [
        ("read", "model.h.1.output")
    ]
    of_edit = [request for request in found.requests if request.block != "block"]
    assert {request.block for request in of_edit} == {f"edit at {__file__}:{line_of('the edit')}"}
    assert [request.kind for request in of_edit] == ["read", "write"]


@pytest.mark.usefixtures("recording")
def test_steps_skips_calls_waits_and_stops(net):
    calls = NNsight(seeded(Calls, lambda self, x: self.b(self.a(self.a(self.a(x))))))
    with calls.trace(rows()) as tracer:
        for _ in tracer.iter[:2]:
            value = calls.a.output
        calls.a(value, hook=True)
        calls.b.skip(value)
        tracer.stop()
    text, found = told()
    kinds = [(request.kind, request.location, request.occurrence) for request in found.requests]
    assert [kind for kind in kinds if kind[0] != "wait"] == [
        ("read", "model.a.output", 0),
        ("read", "model.a.output", 1),
        ("call", "Linear", None),
        ("skip", "model.b.input", 0),
        ("stop", "", None),
    ]
    assert (
        "wait",
        "model.result (occurrence 0) or model.input (occurrence 1) or model.a.output (occurrence 1)",
        None,
    ) in (kinds)
    assert found.error == ""
    assert "finished" in text


@pytest.mark.usefixtures("recording")
def test_nested_traces_each_tell_their_own_and_the_last_to_end_is_last(model):
    inner = NNsight(seeded(Net))
    with model.trace(rows()):
        hidden = model.h[0].output
        with inner.trace(hidden):
            _ = inner.h[2].output
        assert asked(told()[1]) == [("read", "model.h.2.output", 0, "float32[2, 8]")]
        _ = model.h[1].output
    assert [request.location for request in told()[1].requests] == ["model.h.0.output", "model.h.1.output"]


@pytest.mark.usefixtures("recording")
def test_scan_is_told_as_well(model):
    with model.scan(rows()):
        _ = model.h[0].output
    _, found = told()
    assert found.method == "scan"
    assert asked(found) == [("read", "model.h.0.output", 0, "float32[2, 8]")]


@pytest.mark.usefixtures("recording")
def test_gradients_and_cache_go_on_working(model, net):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
        hidden = model.h[0].output
        with model.output.sum().backward():
            gradient = hidden.grad.clone()
    assert gradient.shape == (2, 8)
    assert len(cache) == len(list(net.modules())) - 1
    assert_usable(model, net, rows())


@pytest.mark.usefixtures("recording")
def test_gradients_are_told_by_the_names_of_their_tensors(model):
    with model.trace(rows()):
        hidden = model.h[0].output
        later = model.h[1].output
        with model.output.sum().backward():
            late = later.grad
            hidden.grad = late * 2
            with pytest.raises(OutOfOrderError):
                _ = later.grad
    text, found = told()
    assert asked(found)[2:] == [
        ("read", "model.output", 0, f"float32[2, {2 * WIDTH}]"),
        ("read", "gradient of `later`", None, f"float32[2, {WIDTH}]"),
        ("write", "gradient of `hidden`", None, f"float32[2, {WIDTH}]"),
        ("read", "gradient of `later`", None, ""),
    ]
    assert found.requests[3].shape == (2, WIDTH)
    assert found.requests[3].dtype == torch.float32
    assert found.requests[-1].error.startswith("OutOfOrderError: Value was missed for the gradient of `later`")
    assert "gradient of `hidden`" in text


@pytest.mark.usefixtures("recording")
def test_gradients_outside_of_any_trace_are_told_nowhere(model):
    with model.trace(rows()):
        hidden = model.h[0].output
        loss = model.output.sum()
    with loss.backward():
        assert hidden.grad.shape == (2, WIDTH)
    _, found = told()
    assert [request.location for request in found.requests] == ["model.h.0.output", "model.output"]


@pytest.mark.usefixtures("recording")
def test_threads_are_told_of_their_own_traces(model):
    texts = {}

    def work(name, layer):
        with model.trace(rows()):
            _ = model.h[layer].output
        texts[name] = asked(explain(io.StringIO()))

    threads = [threading.Thread(target=work, args=(name, layer)) for layer, name in enumerate("abc")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0][1] for _, found in sorted(texts.items())] == [f"model.h.{layer}.output" for layer in range(3)]
    assert explain(io.StringIO()).requests == []


@pytest.mark.usefixtures("recording")
def test_trace_that_never_ran_is_told_too(model):
    with pytest.raises(ValueError, match="mine"):
        with model.trace(rows()):
            raise ValueError("mine")
    text, found = told()
    assert found.requests == []
    assert text.startswith(f"trace at {__file__}:")


@pytest.mark.usefixtures("recording")
def test_nothing_of_the_model_is_kept():
    import weakref

    net = seeded(Net)
    model = NNsight(net)
    with model.trace(rows()):
        hidden = model.h[0].output
        model.h[1].output = hidden * 2
    watched = [weakref.ref(net), weakref.ref(hidden), weakref.ref(net.lm_head.weight)]
    del net, model, hidden
    assert [reference() for reference in watched] == [None] * 3
    assert len(told()[1].requests) == 2


# -- off


def test_nothing_recorded_says_how_to_record(model):
    with model.trace(rows()):
        _ = model.h[0].output
    text, found = told()
    assert found.requests == []
    assert "Nothing was recorded" in text
    assert "nnsight.explain.on()" in text
    assert "NNSIGHT_EXPLAIN=1" in text


def test_off_leaves_no_hook_and_no_other_class_behind(model, monkeypatch):
    before = (hooks.trace_opened, hooks.block_joined, hooks.run_started, hooks.run_ended)
    assert not explain.is_on
    explain.on()
    explain.on()  # once is enough
    assert explain.is_on
    with model.trace(rows()):
        _ = model.h[0].output
    explain.off()
    explain.off()
    assert not explain.is_on
    assert (hooks.trace_opened, hooks.block_joined, hooks.run_started, hooks.run_ended) == before
    with model.trace() as tracer:
        assert type(tracer.current_block()) is Mediator
        assert type(tracer.current_block().run) is Interleaver
        with tracer.invoke(rows()):
            kind = type(tracer.current_block())
            _ = model.h[1].output
    assert kind is CapturedMediator
    with torch.ones(2, requires_grad=True).sum().backward() as opened:
        assert type(opened) is Backward
    assert [request.location for request in told()[1].requests] == ["model.h.0.output"]  # the last that was recorded


PROGRAM = """
import torch, nnsight
model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))
with model.trace(torch.ones(1, 2)):
    _ = model[0].output
nnsight.explain()
"""


def test_environment_switches_it_on():
    done = python("-c", PROGRAM, NNSIGHT_EXPLAIN="1")
    assert done.returncode == 0, done.stderr
    assert "read  model.0.output (occurrence 0)  float32[1, 2]" in done.stdout
    assert "Nothing was recorded" in python("-c", PROGRAM).stdout


def test_it_is_a_public_name():
    assert nnsight.explain is explain
    assert type(explain(io.StringIO())) is nnsight.Explanation
