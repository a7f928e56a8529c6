"""A runner that sends what no block would: the job ends with an error, the model is untouched, the next job runs."""

from __future__ import annotations

import pytest
import torch

from nnsight_ndif import Limits, Local
from nnsight_ndif.errors import FrameError, RunnerError
from nnsight_ndif.wire import Special, encode


@pytest.fixture(autouse=True)
def _serves_the_next(net, x):
    before = [parameter.detach().clone() for parameter in net._module.parameters()]
    yield
    with net.trace(x, remote="local"):
        result = net.output.save()
    assert torch.equal(result, net._module(x))
    for old, new in zip(before, net._module.parameters(), strict=True):
        assert torch.equal(old, new)


def send(net, x, kind, content):
    """Have a block that stands at `model.0.output` send one frame, and wait for the answer."""
    body = encode(content)
    frame = bytes([kind]) + len(body).to_bytes(4, "little") + body
    with net.trace(x, backend=Local(Limits(window=1 << 20))):
        net[0].output
        net._link.channel._socket.sendall(frame)
        answer, _ = net._link.channel.receive()
        answer = int(answer).save()
    return answer


def new(shape, start=0, dtype="float32"):
    return Special("new", [dtype, shape, start])


MALFORMED = {
    "nothing": (5, None),
    "no_list": (5, [[], []]),
    "too_much": (5, [[], [], [[], [], []], 1]),
    "a_number_for_the_dropped": (5, [7, [], [[], [], []]]),
    "a_kind_of_the_models": (34, [[], [], None]),
    "the_end_of_a_job_in_a_run": (13, {}),
    "an_exception_in_a_run": (14, []),
    "a_location_that_is_not_there": (5, [[], [], [[[10_000, 0]], [], []]]),
    "a_negative_location": (5, [[], [], [[[-1, 0]], [], []]]),
    "a_negative_occurrence": (5, [[], [], [[[1, -1]], [], []]]),
    "a_location_that_is_no_number": (5, [[], [], [[["model.0", 0]], [], []]]),
    "a_location_that_is_true": (5, [[], [], [[[1, 0.5]], [], []]]),
    "two_values": (5, [[], [], [[], [1, 2], []]]),
    "a_value_not_shown": (5, [[], [], [[], [Special("same", 999)], []]]),
    "a_value_of_no_kind": (5, [[], [], [[], [Special("call", "os.system")], []]]),
    "a_tensor_beyond_the_window": (5, [[], [], [[], [new([1 << 30])], []]]),
    "a_tensor_that_starts_beyond": (5, [[], [], [[], [new([3, 8], 1 << 62)], []]]),
    "a_tensor_that_starts_before": (5, [[], [], [[], [new([3, 8], -64)], []]]),
    "a_tensor_not_aligned": (5, [[], [], [[], [new([3, 8], 3)], []]]),
    "a_tensor_of_negative_size": (5, [[], [], [[], [new([-3, -8])], []]]),
    "a_tensor_whose_size_overflows": (5, [[], [], [[], [new([1 << 32, 1 << 32, 1 << 32])], []]]),
    "a_tensor_of_a_million_dimensions": (5, [[], [], [[], [new([1] * 1_000_000)], []]]),
    "a_tensor_of_no_dtype": (5, [[], [], [[], [new([3, 8], 0, "object")], []]]),
    "a_tensor_whose_size_is_text": (5, [[], [], [[], [new(["3", 8])], []]]),
    "tensors_that_take_more_than_was_sent": (5, [[], [], [[], [[new([1 << 16])] * 10], []]]),
    "a_class_not_shown": (5, [[], [], [[], [Special("made", ["os", "_wrap_close", None, {}])], []]]),
    "an_edit_of_what_was_not_shown": (5, [[], [[999, ["float32", [3, 8], 0], True, None]], [[], [], []]]),
    "an_edit_of_another_shape": (5, [[], [[1, ["float32", [3, 9], 0], True, None]], [[], [], []]]),
    "an_edit_of_another_dtype": (5, [[], [[1, ["int64", [3, 8], 0], True, None]], [[], [], []]]),
    "a_module_that_is_not_there": (8, [[], [], ["model.9", (), {}, [True, None]]]),
    "a_call_without_arguments": (8, [[], [], ["model.0", 1, 2, 3]]),
    "a_call_with_names_that_are_none": (8, [[], [], ["model.0", (), {1: 2}, [True, None]]]),
    "a_call_with_modes_that_are_none": (8, [[], [], ["model.0", (), {}, [1, None]]]),
    "a_call_with_autocast_to_text": (8, [[], [], ["model.0", (), {}, [True, "float64"]]]),
    "a_source_of_nothing": (16, [[], [], ["model.9", [], "apart"]]),
    "a_source_with_steps_that_are_none": (16, [[], [], ["model.0", [1], "apart"]]),
    "a_source_asked_for_in_no_way": (16, [[], [], ["model.0", [], "everywhere"]]),
    "a_part_of_a_result_that_is_none": (17, [[], [], [0, 5, 0, 1]]),
    "a_part_of_a_result_without_size": (17, [[], [], [0, 1 << 62, 0, new([4], 0, "uint8")]]),
    "a_part_of_a_result_that_is_not_the_next": (17, [[], [], [0, 9, 4, new([4], 0, "uint8")]]),
    "what_inputs_hold_that_were_not_prepared": (18, [[], [], [77]]),
    "what_nothing_holds": (18, [[], [], None]),
    "a_call_without_a_run": (1, [[], [], ["model.9", "", (), {}]]),
    "a_part_of_what_was_not_shown": (5, [[], [], [[], [Special("part", [99, [1], [1], 0, "none"])], []]]),
    "a_part_beyond_a_tensor": (5, [[], [], [[], [Special("part", [1, [3, 8], [8, 1], 1, "part"])], []]]),
    "a_part_before_a_tensor": (5, [[], [], [[], [Special("part", [1, [3, 8], [8, 1], -1, "part"])], []]]),
    "a_part_with_steps_back": (5, [[], [], [[], [Special("part", [1, [3, 8], [-8, 1], 16, "part"])], []]]),
    "a_part_without_end": (5, [[], [], [[], [Special("part", [1, [1 << 39, 1 << 39], [0, 0], 0, "none"])], []]]),
    "a_part_of_other_dimensions": (5, [[], [], [[], [Special("part", [1, [3], [8, 1], 0, "none"])], []]]),
    "a_part_that_is_empty": (5, [[], [], [[], [Special("part", [1, [0], [1], 0, "none"])], []]]),
    "a_part_of_text": (5, [[], [], [[], [Special("part", [1, ["3"], [1], 0, "none"])], []]]),
    "help_of_nobody": (15, [[], [], ["tokenizer", "decode", (), {}]]),
    "help_that_is_no_request": (15, [[], [], ["tokenizer"]]),
    "an_attribute_of_nothing": (9, [[], [], ["model.x", "weight"]]),
    "a_method_that_may_not_run": (1, [[], [], ["model", "dispatch", (), {}]]),
    "an_input_that_is_none": (1, [[], [], ["model", "trace", 5, {}]]),
    "an_input_that_was_not_prepared": (4, [[], [], ["model", "trace", [77], [], [True, None]]]),
    "a_join_of_what_was_not_prepared": (2, [[], [], ["model", [0, 77]]]),
    "rows_of_nothing": (3, [[], [], [["a"], 0, 1, 2, []]]),
    "gradients_of_what_was_not_shown": (10, [[], [], [99, new([3, 8])]]),
    "gradients_without_a_gradient": (10, [[], [], [1, None]]),
    "a_history_for_indices": (5, [[], [], [[], [Special("tied", [["int64", [3, 8], 0], -1])], []]]),
    "a_history_with_the_models_key": (5, [[], [], [[], [Special("tied", [["float32", [3, 8], 0], 1])], []]]),
    "a_wish_for_gradients_that_are_there": (5, [[], [[1, None, True, -1]], [[], [], []]]),
    "text_to_no_stream": (11, ["/etc/passwd", "text"]),
    "a_warning_without_class": (12, ["text", "UserWarning", "file", 1]),
    "its_own_death_told_wrong": (37, "signal 9"),
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_frame_that_no_block_sends_ends_the_job(net, x, name):
    with pytest.raises(RunnerError):
        send(net, x, *MALFORMED[name])


def done(values, paths=None, lost=(), shared=(), edits=(), error=None):
    tables = {"values": values, "shared": list(shared), "tensors": [[], []]}
    return [list(edits), tables, paths or {}, list(lost), error]


def change(place, kind, *parts):
    return {"#0": ["tuple", ["given", place] if isinstance(place, Special) else place, kind, *parts]}


FOUND, WEIGHT = [["value", "found"], []], [["value", "module"], [["attr", "_parameters"], ["nth", 0]]]
RESULTS = {
    "nothing": None,
    "no_tables": [[], {}, {}, []],
    "a_name_that_the_block_does_not_bind": done({"torch": 1}),
    "a_value_of_no_kind": done({"held": ["pickle", "gASV"]}),
    "code": done({"held": ["function", 99]}),
    "an_import": done({"held": ["import", "os", "system"]}),
    "a_tensor_that_is_not_there": done({"held": ["tensor", 0]}),
    "an_object_without_a_path": done({"held": ["given", Special("outside", 3)]}),
    "a_path_from_no_variable": done({"held": ["given", Special("outside", 3)]}, {3: [["value", "torch"], []]}),
    "a_path_from_a_global": done({"held": ["given", Special("outside", 3)]}, {3: [["global", 0, "__builtins__"], []]}),
    "a_path_that_is_none": done({"held": ["given", Special("outside", 3)]}, {3: 7}),
    "a_path_into_the_model": done(change(3, "data", ["tensor", 0]), {3: WEIGHT}),
    "a_path_to_the_model": done({"held": ["given", Special("outside", 3)]}, {3: [["value", "module"], []]}),
    "a_path_into_a_class": done(change(3, "pairs", ["list"]), {3: [["value", "found"], [["attr", "__class__"]]]}),
    "a_path_into_a_function": done(
        change(3, "pairs", ["list"]), {3: [["global", 0, "done"], [["attr", "__globals__"]]]}
    ),
    "a_path_beyond_the_end": done(change(3, "items", ["list"]), {3: [["value", "found"], [["item", 5]]]}),
    "keys_for_a_list": done(change(3, "pairs", ["list"]), {3: FOUND}),
    "attributes_for_a_list": done(change(3, "fields", ["dict", "append", 1], ["list"]), {3: FOUND}),
    "bytes_for_a_list": done(change(3, "data", ["bytes", ""]), {3: FOUND}),
    "a_gradient_for_a_list": done(change(3, "grad", 1), {3: FOUND}),
    "a_change_of_no_kind": done(change(3, "exec", "1"), {3: FOUND}),
    "a_change_without_content": done(change(3, "items"), {3: FOUND}),
    "a_change_that_is_none": done({"#0": 5}, {3: FOUND}),
    "a_variable_of_the_blocks_own": done(change(["tuple", "value", "found"], "bound", 1)),
    "a_variable_that_is_not_there": done(change(["tuple", "global", 0, "__builtins__"], "bound", 1)),
    "a_variable_that_the_block_does_not_use": done(change(["tuple", "global", 0, "MALFORMED"], "bound", 1)),
    "a_namespace_that_is_not_there": done(change(["tuple", "global", 99, "found"], "bound", 1)),
    "a_cell_before_the_first": done(change(["tuple", "cell", -1], "bound", 1)),
    "an_error_that_is_none": done({}, error=["builtins", "ValueError"]),
    "a_loss_of_nothing": done({}, lost=[[7, "why"]]),
    "a_loss_that_is_none": done({}, lost=["why"]),
    "an_edit_of_what_was_not_shown": done({}, edits=[[999, ["float32", [3, 8], 0], True, None]]),
}


@pytest.mark.parametrize("name", list(RESULTS))
def test_result_that_no_block_has_ends_the_job(net, x, name):
    body = encode(RESULTS[name])
    frame, found, module = b"\x0d" + len(body).to_bytes(4, "little") + body, [1], net._module
    held = None
    with pytest.raises(RunnerError):
        with net.session(remote="local"):
            held = [found, module, torch, done].save()
            net._link.channel._socket.sendall(frame)
            net._link.channel.receive()
    assert found == [1] and held is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x05\xff\xff\xff\xff", b"\x00\x00\x00\x00\x00", b"\xff" * 100, b"\x05\x01\x00\x00\x00?",
        b"\x05\x05\x00\x00\x00l\xff\xff\xff\xff", b"\x05\x04\x00\x00\x00NNNN", b"\x05\x01\x00\x00\x00l",
        b"\x05\x0b\x00\x00\x00" + b"l\x01\x00\x00\x00d\x01\x00\x00\x00l",
    ],
    ids=["length", "kind", "noise", "tag", "count", "too-much", "too-short", "no-key"],
)  # fmt: skip
def test_bytes_that_are_no_frame_end_the_job(net, x, data):
    with pytest.raises(FrameError):
        with net.trace(x, remote="local"):
            net[0].output
            net._link.channel._socket.sendall(data)
            net._link.channel.receive()


def test_frame_nested_without_end_ends_the_job(net, x):
    data = b"l\x01\x00\x00\x00" * 100_000 + b"N"
    with pytest.raises(FrameError, match="nested"):
        with net.trace(x, remote="local"):
            net[0].output
            net._link.channel._socket.sendall(b"\x05" + len(data).to_bytes(4, "little") + data)
            net._link.channel.receive()


def test_private_attributes_of_modules_are_not_given(net, x):
    with net.trace(x, remote="local"):
        link = net._link
        from nnsight_ndif.channel import Kind

        found = [].save()
        for name in ("__class__", "__dict__", "_modules", "_parameters", "__init__"):
            found.append(link.ask(Kind.ATTRIBUTE, ["model.0", name])[1][0])
    assert found == [False] * 5


def test_methods_of_modules_are_not_run(net, x):
    with pytest.raises(NotImplementedError, match="can call modules only"):
        with net.trace(x, remote="local"):
            net[0].reset_parameters()
    with pytest.raises(NotImplementedError):
        with net.trace(x, remote="local"):
            net[0].to(torch.float64)


def test_window_cannot_be_shrunk_under_the_model(net, x):
    with net.trace(x, remote="local"):
        import os

        hidden = net[0].output
        refused = 0
        for descriptor in range(3, 64):
            try:
                os.ftruncate(descriptor, 0)
            except OSError:
                refused += 1
        refused = refused.save()
        net[0].output = hidden * 2
        result = net.output.save()
    assert refused == 61
    assert torch.equal(result, net._module[2](torch.relu(net._module[0](x) * 2)))


def test_value_larger_than_the_window_is_an_error(net):
    place = Local(Limits(window=1 << 18))
    with pytest.raises(ValueError, match=r"takes 512000 bytes.*larger window"):
        with net.trace(torch.ones(3, 4), backend=place):
            net[0].output = torch.ones(8000, 16)
            net.output
    with pytest.raises(ValueError, match=r"takes 320000 bytes.*larger window"):
        with net.trace(torch.ones(3, 4), backend=place):
            net[0](torch.ones(10_000, 4)).shape
