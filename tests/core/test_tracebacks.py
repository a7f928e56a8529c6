"""What users see of an error: their own frames and the model's, the chain of causes, and where in the model it was."""

from __future__ import annotations

import re
import traceback
import warnings

import pytest
import torch
from modules import Calls, Net, assert_usable, python, rows, seeded
from torch import nn

from nnsight import CONFIG, CacheWarning, NNsight
from nnsight.errors import (
    CaptureError,
    MissedProviderError,
    OutOfOrderError,
    OutsideTraceError,
    ScanError,
    TracerStateError,
)


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def frames(error):
    return traceback.extract_tb(error.__traceback__)


def chain(error):
    """An error and all that it came from."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def assert_none_of_ours(error):
    for one in chain(error):
        assert not [frame for frame in frames(one) if "/nnsight" in frame.filename], "".join(
            traceback.format_exception(one)
        )


def assert_ends_here(error, line):
    """Assert that the last frame is this file's, at a line that holds some text, and that there is none of ours."""
    last = frames(error)[-1]
    assert last.filename == __file__
    assert line in last.line
    assert_none_of_ours(error)


def notes(error):
    return " | ".join(getattr(error, "__notes__", ()))


def line_of(text):
    """The number of the one line of this file that ends with a marker."""
    with open(__file__, encoding="utf-8") as file:
        found = [number for number, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}")]
    assert len(found) == 1
    return found[0]


# -- errors of the user


def test_exception_of_an_inline_block_has_only_the_users_frames(model):
    with pytest.raises(ValueError, match="mine") as caught:
        with model.trace(rows()):
            _ = model.h[0].output
            raise ValueError("mine")  # inline
    assert_ends_here(caught.value, 'raise ValueError("mine")')
    assert len(frames(caught.value)) == 1


def test_exception_of_a_helper_keeps_the_helpers_frame(model):
    def helper():
        return model.h[0].output.no_such_attribute

    with pytest.raises(AttributeError, match="no_such_attribute") as caught:
        with model.trace(rows()):
            helper()
    assert [frame.name for frame in frames(caught.value)][1:] == ["helper"]
    assert_none_of_ours(caught.value)


@pytest.mark.parametrize("is_invoke", [False, True])
def test_explicit_cause_is_kept(model, is_invoke):
    def raising():
        try:
            _ = {}["missing"]
        except KeyError as error:
            raise LookupError("outer") from error

    with pytest.raises(LookupError, match="outer") as caught:
        if is_invoke:
            with model.trace() as tracer:
                with tracer.invoke(rows()):
                    _ = model.h[0].output
                    raising()
        else:
            with model.trace(rows()):
                _ = model.h[0].output
                raising()
    assert type(caught.value.__cause__) is KeyError
    assert caught.value.__suppress_context__
    assert_ends_here(caught.value, "raise LookupError")
    assert_ends_here(caught.value.__cause__, '{}["missing"]')


@pytest.mark.parametrize("is_invoke", [False, True])
def test_exception_raised_while_another_is_handled_keeps_it_as_its_context(model, is_invoke):
    with pytest.raises(LookupError, match="outer") as caught:
        if is_invoke:
            with model.trace() as tracer:
                with tracer.invoke(rows()):
                    try:
                        _ = {}["missing"]
                    except KeyError:
                        raise LookupError("outer")  # noqa: B904  the context is what is tested
        else:
            with model.trace(rows()):
                try:
                    _ = {}["missing"]
                except KeyError:
                    raise LookupError("outer")  # noqa: B904  the context is what is tested
    assert type(caught.value.__context__) is KeyError
    assert caught.value.__cause__ is None
    assert not caught.value.__suppress_context__
    assert_none_of_ours(caught.value)


def test_error_of_ours_that_the_user_wraps_has_no_frames_of_ours_either(model):
    with pytest.raises(RuntimeError, match="wrapped") as caught:
        with model.trace(rows()):
            _ = model.h[1].output
            try:
                _ = model.h[0].output
            except OutOfOrderError as error:
                raise RuntimeError("wrapped") from error
    assert_ends_here(caught.value, 'raise RuntimeError("wrapped") from error')
    assert_ends_here(caught.value.__cause__, "_ = model.h[0].output")


def test_group_of_exceptions_is_filtered_inside(model):
    with pytest.raises(ExceptionGroup) as caught:
        with model.trace(rows()):
            _ = model.h[1].output
            errors = []
            for envoy in (model.h[0], model.emb):
                try:
                    _ = envoy.output
                except OutOfOrderError as error:
                    errors.append(error)
            raise ExceptionGroup("both", errors)
    for error in caught.value.exceptions:
        assert_ends_here(error, "_ = envoy.output")


def test_exception_of_an_invoke_shows_the_with_of_the_trace_and_the_line(model):
    with pytest.raises(ZeroDivisionError) as caught:
        with model.trace() as tracer:  # the trace
            with tracer.invoke(rows()):
                _ = model.h[0].output
                _ = 1 / 0
            with tracer.invoke(rows()):
                pass
    assert_ends_here(caught.value, "_ = 1 / 0")
    assert frames(caught.value)[0].line.startswith("with model.trace() as tracer:")
    assert len(frames(caught.value)) == 2


def test_exception_of_an_edit_ends_at_its_line(model, net):
    with model.edit() as edited:
        _ = edited.h[0].output
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        with edited.trace(rows()):
            pass
    assert_ends_here(caught.value, "_ = 1 / 0")
    assert_usable(model, net, rows())


# -- errors of ours


def test_request_out_of_order_ends_at_the_users_line(model):
    with pytest.raises(OutOfOrderError) as caught:
        with model.trace(rows()):
            _ = model.h[1].output
            _ = model.h[0].output  # too late
    assert_ends_here(caught.value, "# too late")
    assert len(frames(caught.value)) == 1


@pytest.mark.parametrize("request_of", ["output", "inputs", "input"])
def test_error_that_a_block_catches_is_filtered_when_it_is_caught(model, request_of):
    with model.trace(rows()):
        _ = model.h[1].output
        try:
            getattr(model.h[0], request_of)
        except OutOfOrderError as error:
            caught = error
    assert len(frames(caught)) == 1
    assert_none_of_ours(caught)


def test_location_never_reached_ends_at_the_users_line(model):
    with pytest.raises(MissedProviderError) as caught:
        with model.trace(rows()):
            _ = model.h.output
    assert_ends_here(caught.value, "_ = model.h.output")


def test_request_out_of_order_in_an_invoke_ends_at_its_line(model):
    with pytest.raises(OutOfOrderError) as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                _ = model.h[1].output
                _ = model.h[0].output  # late in the invoke
            with tracer.invoke(rows()):
                pass
    assert_ends_here(caught.value, "# late in the invoke")


def test_request_outside_of_a_trace_ends_at_the_users_line(model):
    with pytest.raises(OutsideTraceError) as caught:
        _ = model.h[0].output  # outside
    assert_ends_here(caught.value, "# outside")


@pytest.fixture
def cached(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache(modules=[model.h[0]])
    return cache


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, cache: model.transformre,
        lambda model, cache: model.h[9],
        lambda model, cache: model.export_edits("name"),
        lambda model, cache: model.import_edits("name", "/nowhere"),
        lambda model, cache: NNsight(3),
        lambda model, cache: NNsight(model._module, rename={"h": "emb"}),
        lambda model, cache: NNsight(model._module, envoys={"h": 3}),
        lambda model, cache: cache["h.1"],
        lambda model, cache: cache.model.h[2],
        lambda model, cache: cache["h.0"].inputs,
        lambda model, cache: cache.step(3),
        lambda model, cache: cache.save("/nowhere/at/all"),
        lambda model, cache: type(cache).load("/nowhere/at/all"),
    ],
)
def test_what_is_asked_outside_of_blocks_ends_at_the_users_line(model, cached, ask):
    with pytest.raises(Exception) as caught:
        ask(model, cached)
    assert type(caught.value).__module__ in ("nnsight.errors", "builtins")
    assert_ends_here(caught.value, "lambda model, cache:")


def test_warning_of_a_cache_that_cannot_be_saved_whole_is_at_the_users_line(tmp_path):
    class Holding(nn.Module):
        def forward(self, x):
            return x, len

    with NNsight(Holding()).trace(rows()) as tracer:
        cache = tracer.cache()
    with pytest.warns(CacheWarning, match="without pickle") as caught:
        cache.save(tmp_path / "file")  # saved in part
    assert (caught[0].filename, caught[0].lineno) == (__file__, line_of("saved in part"))


def test_unusable_input_and_a_tracer_used_twice_end_at_the_with(model):
    tracer = model.trace(rows())
    with tracer:
        with pytest.raises(TracerStateError) as caught:
            with tracer:  # again
                pass
        assert_ends_here(caught.value, "# again")
        _ = model.h[0].output  # the run that is open goes on
    with pytest.raises(TracerStateError) as caught:
        with tracer:  # once more
            pass
    assert_ends_here(caught.value, "# once more")


def test_block_that_cannot_be_captured_ends_at_the_users_line(model):
    def returning():
        with model.edit() as edited:
            _ = edited.h[0].output
            return 1

    with pytest.raises(CaptureError) as caught:
        returning()
    assert_ends_here(caught.value, "with model.edit() as edited")


def test_scan_ends_at_the_users_line(model):
    with pytest.raises(ScanError) as caught:
        with model.scan(rows()):
            model.h[0].output.sum().item()
    assert_none_of_ours(caught.value)
    assert ".item()" in [frame.line for frame in frames(caught.value) if frame.filename == __file__][-1]


# -- errors of the model


def failing(module, x):
    try:
        _ = {}["missing"]
    except KeyError as error:
        raise LookupError("of the model") from error


def test_model_error_keeps_its_frames_its_line_and_its_chain():
    model = NNsight(seeded(Calls, failing))
    with pytest.raises(LookupError, match="of the model") as caught:
        with model.trace(rows()):
            _ = model.a.output
    assert_ends_here(caught.value, 'raise LookupError("of the model") from error')
    assert "_ = model.a.output" in [frame.line for frame in frames(caught.value)]
    assert type(caught.value.__cause__) is KeyError


def test_attribute_error_of_the_model_keeps_its_cause_at_the_request():
    def failing(module, x):
        try:
            _ = {}["missing"]
        except KeyError as error:
            raise AttributeError("of the model") from error

    model = NNsight(seeded(Calls, failing))
    with pytest.raises(AttributeError, match="of the model") as caught:
        with model.trace(rows()):
            _ = model.a.output
    assert type(caught.value.__cause__) is KeyError


@pytest.mark.parametrize("call", ["trace", "scan"])
def test_model_error_without_a_with_has_no_frames_of_ours(call):
    model = NNsight(seeded(Calls, failing))
    with pytest.raises(LookupError, match="of the model") as caught:
        getattr(model, call)(rows(), trace=False)
    assert_ends_here(caught.value, 'raise LookupError("of the model") from error')


def test_model_error_says_where_the_model_was():
    def fail(module, x):
        raise LookupError("in b")

    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    net.b = seeded(Calls, fail)
    model = NNsight(net)
    with pytest.raises(LookupError, match="in b") as caught:
        with model.trace(rows()):
            _ = model.a.output
    assert notes(caught.value) == "in `model.b` (occurrence 0)"


def test_model_error_says_at_which_visit_the_model_was():
    seen = []

    def fail_at_the_third(module, x):
        seen.append(x)
        if len(seen) == 3:
            raise LookupError("third")
        return x

    net = seeded(Calls, lambda self, x: [self.b(x) for _ in range(5)][-1])
    net.b = Calls(fail_at_the_third)
    model = NNsight(net)
    with pytest.raises(LookupError, match="third") as caught:
        with model.trace(rows()):
            pass
    assert notes(caught.value) == "in `model.b` (occurrence 2)"


def test_model_error_names_the_line_of_the_edit_before_it(model, net):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            model.h[0].output = torch.zeros(3, 5)  # inline edit
            _ = model.lm_head.output
    where, how = f"{__file__}:{line_of('inline edit')}", "from float32[2, 8] to float32[3, 5]"
    assert (
        notes(caught.value)
        == f"in `model.h.1.attn` (occurrence 0), after `model.h.0.output` was changed {how} at {where}"
    )
    assert_usable(model, net, rows())


def test_model_error_at_the_end_of_the_with_names_the_edit_too(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            model.h[0].input = torch.zeros(3, 5)  # edit of an input
    where, how = f"{__file__}:{line_of('edit of an input')}", "from float32[2, 8] to float32[3, 5]"
    assert f"`model.h.0.input` was changed {how} at {where}" in notes(caught.value)


def test_skip_counts_as_an_edit(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            model.h[0].skip(torch.zeros(3, 5))  # skipped
    where = f"{__file__}:{line_of('skipped')}"
    assert f"`model.h.0` was skipped with float32[3, 5] at {where}" in notes(caught.value)


def test_note_names_both_shapes_also_inside_of_what_holds_them():
    def forward(module, x):
        parts = module.a(x)
        return module.b(parts[0]) + parts[1]["scale"]

    net = seeded(Calls, forward)
    net.a, net.b = Calls(lambda self, x: (x, {"scale": x.sum(), "left": None})), nn.Linear(8, 8)
    model = NNsight(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            old = model.a.output
            model.a.output = (torch.zeros(3, 5), *old[1:])
    assert "`model.a.output` was changed from float32[2, 8] to float32[3, 5] at" in notes(caught.value)
    with pytest.raises(IndexError) as caught:
        with model.trace(rows()):
            model.a.output = model.a.output[0]  # forgets that it is a tuple
            _ = model.b.output
    assert (
        "`model.a.output` was changed from (float32[2, 8], {scale: float32[], left: None}) to float32[2, 8]"
        in notes(caught.value)
    )


def test_note_names_both_shapes_where_an_invoke_changes_the_whole_batch(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                model.h[0].output = torch.zeros(2, 5)
    assert "`model.h.0.output` was changed from float32[2, 8] to float32[2, 5] at" in notes(caught.value)


def test_values_without_a_shape_can_be_assigned_all_the_same():
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    net.a, net.b = Calls(lambda self, x: x), Calls(lambda self, x: "nothing" if x is None else x)
    model = NNsight(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for value in (nested, None, [1], {"a": rows()}, "text"):
        with model.trace(rows()) as tracer:
            model.a.output = value
            result = tracer.result
        assert result is ("nothing" if value is None else value)


def test_edit_made_by_a_helper_is_named_by_the_line_of_the_block(model):
    def spoil(envoy):
        envoy.output = torch.zeros(3, 5)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            spoil(model.h[0])  # calls the helper
    assert f"{__file__}:{line_of('calls the helper')}" in notes(caught.value)


def test_edits_of_invokes_and_of_edited_models_are_named(model):
    with model.edit() as edited:
        edited.emb.output = edited.emb.output * 2  # of the model
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with edited.trace() as tracer:
            with tracer.invoke(rows()):
                edited.h[0].output = torch.zeros(2, 5)  # of the invoke
    assert f"in `model.h.1.attn` (occurrence 0), after `model.emb.output` was changed at {__file__}:" in notes(
        caught.value
    )
    for where in ("of the model", "of the invoke"):
        assert f"{__file__}:{line_of(where)}" in notes(caught.value)


def test_rows_changed_by_one_invoke_of_several_are_named(model):
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))

    def fail(module, x):
        raise LookupError("after the edit")

    net.b = Calls(fail)
    model = NNsight(net)
    with pytest.raises(LookupError) as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                model.a.output = model.a.output * 2  # rows of one
            with tracer.invoke(rows()):
                pass
    assert f"`model.a.output` was changed at {__file__}:{line_of('rows of one')}" in notes(caught.value)


def test_note_names_the_last_edits_and_counts_the_others(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            model.emb.output = model.emb.output * 2
            for block in model.h:
                block.attn.output = block.attn.output * 2
                block.output = block.output * 2
            model.lm_head.input = torch.zeros(3, 5)
    found = re.findall(r"`([^`]*)` was changed", notes(caught.value))
    assert found == ["model.h.2.attn.output", "model.h.2.output", "model.lm_head.input"]
    assert "(and 5 changes before)" in notes(caught.value)


def test_error_of_the_block_gets_no_note_about_the_model(model):
    with pytest.raises(ValueError, match="mine") as caught:
        with model.trace(rows()):
            model.h[0].output = model.h[0].output * 2
            raise ValueError("mine")
    assert notes(caught.value) == ""


def test_model_called_on_the_model_side_says_where_it_was(model):
    with model.trace(rows()):
        _ = model.h[0].output
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
            model.lm_head(torch.zeros(3, 5), hook=True)
    assert notes(caught.value) == "in `model.lm_head` (occurrence 0)"


def test_note_is_added_once_to_an_error_that_is_raised_again():
    error = LookupError("the same")

    def fail(module, x):
        raise error

    model = NNsight(seeded(Calls, fail))
    for _ in range(3):
        with pytest.raises(LookupError):
            with model.trace(rows()):
                pass
    assert error.__notes__ == ["in `model` (occurrence 0)"]


def test_nested_traces_say_where_each_model_was(model):
    inner = NNsight(seeded(Net))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows()):
            hidden = model.h[0].output
            with inner.trace(hidden):
                inner.h[0].output = torch.zeros(3, 5)
    assert notes(caught.value).startswith(
        "in `model.h.1.attn` (occurrence 0), after `model.h.0.output` was changed from"
    )
    assert notes(caught.value).count("in `") == 1


# -- asked for


def test_debug_shows_every_frame(model, monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "DEBUG", True)
    with pytest.raises(OutOfOrderError) as caught:
        with model.trace(rows()):
            _ = model.h[1].output
            _ = model.h[0].output
    assert [frame.name for frame in frames(caught.value)][-2:] == ["output", "read"]


PROGRAM = """
import torch
from torch import nn
from nnsight import NNsight
model = NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
with model.trace(torch.ones(1, 2)):
    _ = model[1].output
    _ = model[0].output
"""


@pytest.mark.parametrize(("environment", "is_shown"), [({}, False), ({"NNSIGHT_DEBUG": "1"}, True)])
def test_environment_asks_for_our_frames(tmp_path, environment, is_shown):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = python(str(program), **environment)
    assert done.returncode == 1
    shown = re.findall(r'File "([^"]*)", line (\d+)', done.stderr)
    assert (len(shown) > 1) is is_shown
    assert shown[0] == (str(program), "8")
    assert "OutOfOrderError: Value was missed for `model.0.output`" in done.stderr
