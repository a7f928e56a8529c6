"""Requests that cannot be met and input that cannot be used: which error, when, and what it says."""

import pickle
import traceback

import pytest
import torch
from modules import WIDTH, Calls, Net, assert_usable, plain, rows, seeded
from torch import nn

import nnsight
from nnsight import NNsight, _words
from nnsight.errors import (
    MissedProviderError,
    NoInputError,
    NotInTreeError,
    OutOfOrderError,
    OutsideTraceError,
    TracerStateError,
    WrapError,
)


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    model = NNsight(net)
    yield model
    assert_usable(model, net, rows())


def asking_line(error):
    """Return the last line of this file in an error's traceback."""
    return [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__][-1]


# -- what cannot be wrapped


@pytest.mark.parametrize("thing", ["gpt2", 3, None, [nn.Linear(1, 1)], nn.Linear, lambda x: x])
def test_only_modules_are_wrapped(thing):
    with pytest.raises(WrapError, match="Only a torch.nn.Module can be wrapped, not"):
        NNsight(thing)


def test_wrap_error_is_a_type_error():
    assert issubclass(WrapError, TypeError)
    assert issubclass(WrapError, nnsight.NNsightError)


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda net: torch.jit.trace(net, rows())])
def test_scripted_module_is_refused(compile_):
    with pytest.raises(WrapError, match="was compiled by torch.jit"):
        NNsight(compile_(nn.Linear(WIDTH, WIDTH)))


def test_data_parallel_is_refused(net):
    with pytest.raises(WrapError, match=r"wrap its `.module` instead"):
        NNsight(nn.DataParallel(net))


def test_wrapped_model_is_not_wrapped_again(model):
    with pytest.raises(WrapError, match="`model.h.0` is wrapped already"):
        NNsight(model.h[0])


# -- input that cannot be used


def test_wrong_shape_raises_torchs_error_where_it_is_asked(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        with model.trace(rows(width=WIDTH + 1)):
            _ = model.h[0].output
    assert asking_line(caught.value) == "_ = model.h[0].output"


def test_wrong_shape_raises_torchs_error_at_the_end_when_nothing_is_asked(model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with model.trace(rows(width=WIDTH + 1)):
            pass


def test_wrong_dtype_raises_torchs_error(net, model):
    with pytest.raises(RuntimeError, match="dtype") as expected:
        net(rows().double())
    with pytest.raises(RuntimeError) as caught:
        with model.trace(rows().double()):
            _ = model.output
    assert str(caught.value) == str(expected.value)


def test_unknown_argument_raises_what_the_module_raises(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_mask'"):
        with model.trace(rows(), attention_mask=None):
            _ = model.output


def test_no_input_is_an_error_where_a_value_is_asked(model):
    with pytest.raises(NoInputError, match="Cannot return output of Envoy `model`: this trace has no input") as caught:
        with model.trace():
            _ = model.h[0].output
    assert isinstance(caught.value, ValueError)
    assert asking_line(caught.value) == "_ = model.h[0].output"


def test_no_input_is_an_error_at_the_end(model):
    with pytest.raises(NoInputError, match="Give it one"):
        with model.trace():
            pass


# -- out of order


def test_location_already_passed_raises_at_once(model):
    after = []
    with pytest.raises(OutOfOrderError) as caught:
        with model.trace(rows()):
            _ = model.h[2].output
            _ = model.h[0].output
            after.append("went on")
    assert after == []
    assert asking_line(caught.value) == "_ = model.h[0].output"
    message = str(caught.value)
    assert message.startswith("Value was missed for `model.h.0.output`: occurrence 0 of it was asked for")
    assert "now it stands at `model.h.2.output` (occurrence 0)" in message
    assert "in the order in which the model runs them" in message


def test_out_of_order_is_a_missed_provider_and_a_value_error():
    assert issubclass(OutOfOrderError, MissedProviderError)
    assert issubclass(MissedProviderError, ValueError)


@pytest.mark.parametrize("port", ["output", "input", "inputs"])
def test_caught_order_error_lets_the_block_go_on_with_right_values(net, model, port):
    x = rows()
    with model.trace(x) as tracer:
        second = model.h[1].output
        with pytest.raises(OutOfOrderError):
            getattr(model.h[0], port)
        assert model.h[1].output is second
        model.h[1].output = second * 2
        third = model.h[2].output
        result = tracer.result
    expected = plain(net, x, edit=lambda path, output: output * 2 if path == "h.1" else None)
    assert torch.equal(third, expected.outputs["h.2"][0])
    assert torch.equal(result, expected.result)


def test_writing_and_skipping_too_late_is_out_of_order(net, model):
    x = rows()
    with model.trace(x) as tracer:
        _ = model.h[1].output
        with pytest.raises(OutOfOrderError, match=r"`model.h.0.output`"):
            model.h[0].output = torch.zeros(2, WIDTH)
        with pytest.raises(OutOfOrderError, match=r"`model.h.1.input`"):
            model.h[1].skip(torch.zeros(2, WIDTH))
        with pytest.raises(OutOfOrderError, match=r"`model.input`"):
            model.input = x
        result = tracer.result
    assert torch.equal(result, net(x))


def test_input_after_output_of_one_module_is_out_of_order(model):
    with model.trace(rows()):
        _ = model.h[0].output
        with pytest.raises(OutOfOrderError, match="`model.h.0.input`"):
            _ = model.h[0].input


def test_after_the_result_everything_has_passed(model):
    with model.trace(rows()) as tracer:
        _ = tracer.result
        with pytest.raises(OutOfOrderError, match="`model.lm_head.output`"):
            _ = model.lm_head.output


def test_second_request_after_the_model_went_on_is_out_of_order():
    net = seeded(Calls, lambda self, x: self.a(self.b(self.a(x))))
    model = NNsight(net)
    with model.trace(rows()):
        _ = model.b.output
        with pytest.raises(OutOfOrderError, match=r"already passed it \(1 so far\)"):
            _ = model.a.output


# -- never reached


def never_reached(forward, ask, match):
    """Trace a module that does not call what is asked; the block goes on after the error."""
    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    went_on = []
    with pytest.raises(MissedProviderError, match=match) as caught:
        with model.trace(x):
            _ = ask(model)
    assert not isinstance(caught.value, OutOfOrderError)
    assert str(caught.value).startswith("Execution complete but `model.")
    assert "was not provided" in str(caught.value)
    with model.trace(x):
        with pytest.raises(MissedProviderError, match=match):
            _ = ask(model)
        went_on.append(True)
    assert went_on
    assert_usable(model, net, x)


def test_module_that_is_not_called():
    never_reached(lambda self, x: self.a(x), lambda model: model.b.output, "Linear was not called in this run although")


def test_branch_that_is_not_taken():
    def forward(self, x):
        return self.a(x) if x.sum() > 1e9 else self.b(x)

    never_reached(forward, lambda model: model.a.input, "perhaps the branch that calls it was not taken")


def test_module_of_which_only_the_weights_are_used():
    def forward(self, x):
        return nn.functional.linear(self.a(x), self.b.weight)

    never_reached(forward, lambda model: model.b.output, "its parent uses its weights without calling it")


def test_forward_called_directly():
    never_reached(
        lambda self, x: self.b.forward(self.a(x)), lambda model: model.b.output, r"calls its `.forward` directly"
    )


def test_more_passes_than_the_model_makes():
    def forward(self, x):
        return self.a(x)

    def ask(model):
        from nnsight.kernel.blocks import find

        block = find(model._tree, 2)
        return block.wait({model.a._number: 3})

    never_reached(forward, ask, "The model made fewer passes over it than the block asked for")


def test_module_inside_a_skipped_one(model):
    with pytest.raises(MissedProviderError, match="It lies inside `model.h.1`, which was skipped"):
        with model.trace(rows()):
            model.h[1].skip(torch.zeros(2, WIDTH))
            _ = model.h[1].attn.output


def test_module_list_is_never_called(model):
    with pytest.raises(
        MissedProviderError, match="ModuleList only holds modules and is never called; ask for one of its"
    ):
        with model.trace(rows()):
            _ = model.h.output


def test_result_of_a_stopped_model_is_not_there(model):
    with model.trace(rows()) as tracer:
        _ = model.h[0].output
        tracer.stop()
    with pytest.raises(TracerStateError, match="This tracer is not open"):
        _ = tracer.result


def test_fused_encoder_layer_names_its_fast_path():
    layer = seeded(nn.TransformerEncoderLayer, WIDTH, 2, 16, batch_first=True).eval()
    model, x = NNsight(layer), torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        with pytest.raises(MissedProviderError, match="as one fused C\\+\\+ operation that calls none of its parts"):
            with model.trace(x):
                _ = model.linear1.output
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with model.trace(x):
                hidden = model.linear1.output
            assert torch.equal(hidden, plain(layer, x).outputs["linear1"][0])
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_attention_projection_is_used_without_being_called():
    attention = seeded(nn.MultiheadAttention, WIDTH, 2, batch_first=True)
    model, x = NNsight(attention), torch.randn(1, 3, WIDTH)
    with pytest.raises(MissedProviderError, match="MultiheadAttention uses the weights of this module in a fused"):
        with model.trace(x, x, x):
            _ = model.out_proj.output


def test_part_of_a_layer_that_was_not_called_at_all_does_not_blame_the_fast_path():
    net = seeded(Calls, lambda self, x: self.a(x))
    net.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16)
    model = NNsight(net)
    with model.trace(rows()), pytest.raises(MissedProviderError, match="was not called in this run") as caught:
        _ = model.encoder.linear1.output
    assert "fused" not in str(caught.value)


def test_module_that_was_replaced_on_the_torch_side(net):
    model = NNsight(net)
    old = model.lm_head
    net.lm_head = nn.Linear(WIDTH, 3)
    with model.trace(rows()), pytest.raises(MissedProviderError, match="replaced or removed after wrapping"):
        _ = old.output


# -- no block here


@pytest.mark.parametrize("port", ["output", "input", "inputs"])
def test_value_outside_a_trace(model, port):
    with pytest.raises(OutsideTraceError, match=f"Cannot return {port} of Envoy `model.h.0`") as caught:
        getattr(model.h[0], port)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(OutsideTraceError):
        setattr(model.h[0], port, ((), {}) if port == "inputs" else 0)


def test_skip_and_hooked_call_outside_a_trace(model):
    with pytest.raises(OutsideTraceError):
        model.h[0].skip(0)
    with pytest.raises(OutsideTraceError):
        model.h[0](rows(), hook=True)


def test_value_of_another_model_than_the_traced(net, model):
    other = NNsight(seeded(Net))
    with model.trace(rows()):
        with pytest.raises(OutsideTraceError, match="no block of this model is open here"):
            _ = other.h[0].output


def test_hasattr_does_not_hide_that_no_block_is_open(model):
    with pytest.raises(OutsideTraceError):
        hasattr(model, "output")


# -- names and tracers


def test_unknown_name_gives_the_nearest(model):
    with pytest.raises(
        NotInTreeError, match=r"`model` \(Net\) has neither a module nor an attribute 'lm_haed'. Nearest: lm_head"
    ):
        _ = model.lm_haed
    with pytest.raises(NotInTreeError, match="Nearest: attn"):
        model.get("h.0.atn")
    with pytest.raises(KeyError, match="has no child 'lm_hed'. Nearest: lm_head"):
        _ = model["lm_hed"]
    with pytest.raises(IndexError, match="`model.h` has 3 children, so there is no 3"):
        _ = model.h[3]
    assert not hasattr(model, "lm_haed")


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("tracee", "trace"), ("outptu", "output"), ("sesion", "session"), ("scna", "scan")]
)
def test_misspelt_method_of_the_library_or_of_a_plugin_names_the_nearest(model, misspelt, meant):
    with pytest.raises(NotInTreeError, match=rf"{misspelt!r}\. Nearest: .*\b{meant}\b"):
        getattr(model, misspelt)


def test_misspelt_method_of_a_tracer_names_the_nearest(model):
    for misspelt, meant in (("cahce", "cache"), ("invok", "invoke"), ("barier", "barrier")):
        with model.trace(rows()) as tracer, pytest.raises(NotInTreeError, match=rf"Nearest: .*\b{meant}\b"):
            getattr(tracer, misspelt)


def test_names_of_plugins_are_among_the_attributes(model):
    assert {"scan", "edit", "session", "trace", "h", "output"} <= set(dir(model))
    with model.trace(rows()) as tracer:
        assert {"cache", "barrier", "invoke", "stop"} <= set(dir(tracer))


def test_asking_for_an_absent_name_looks_for_no_other(model, monkeypatch):
    looked = []
    monkeypatch.setattr(_words, "nearest", lambda name, names: looked.append(name) or "")
    assert not hasattr(model, "transfromer") and not hasattr(model.h[0], "mpl")
    assert looked == []


def test_error_of_a_misspelt_name_travels_with_its_whole_message(model):
    with pytest.raises(NotInTreeError) as raised:
        _ = model.outptu
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is NotInTreeError and again.args == (str(raised.value),)
    assert type(again.args[0]) is str and "Nearest: " in again.args[0]


def test_unknown_name_inside_a_block_is_the_same_error(model):
    with model.trace(rows()), pytest.raises(NotInTreeError, match="Nearest: attn"):
        _ = model.h[0].atn.output


def test_tracer_is_entered_once(model):
    tracer = model.trace(rows())
    with tracer:
        with pytest.raises(TracerStateError, match="entered already"):
            with tracer:
                pass
        _ = model.output
    with pytest.raises(TracerStateError, match=r"Call `model.trace\(...\)` again"):
        with tracer:
            pass


def test_tracer_works_only_inside_its_with(model):
    tracer = model.trace(rows())
    with pytest.raises(TracerStateError, match="needs its `with`"):
        _ = tracer.result
    with pytest.raises(TracerStateError, match="needs its `with`"):
        tracer.stop()


def test_tracer_has_no_unknown_names(model):
    with model.trace(rows()) as tracer:
        with pytest.raises(NotInTreeError, match="A tracer has no 'reslut'"):
            _ = tracer.reslut
