"""Payloads that no honest sender makes: each is an error that says what is wrong, and runs nothing."""

# ruff: noqa: F841 - what a block binds is looked up by name

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sent import Sent
from torch import nn

from nnsight import NNsight, NNsightError, PayloadError, payload
from nnsight.payload import container


class Setting:
    def __init__(self):
        self.size = 2

    def get(self):
        return self.size


def plus(value, by=1):
    return value + by


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


@pytest.fixture(scope="module")
def honest(model):
    """A payload with a bit of everything in it."""
    table, flags, setting, layer = torch.arange(6.0), torch.tensor([True, False]), Setting(), model[0]
    array = table.numpy()[::2]
    sent = Sent(model, torch.ones(2, 4))
    with sent as tracer:
        layer.output = plus(layer.output) * setting.get() + table[0] + flags.sum() + float(array.sum())
        result = tracer.result
    return sent.bytes


def receive(data, model):
    """What a receiver does up to the moment when the block would run."""
    run = payload.Run(data, limit=100 << 20)
    run.check(model)
    return run.open(model.get, lambda path: model.get(path)._module, called=lambda name: "<sent>")


@pytest.fixture
def change(honest):
    """A function that returns the payload with its header changed."""

    def change(function):
        header, pieces = container.read(honest)
        header = function(header) or header
        return b"".join(container.write(header, pieces))

    return change


def frame(content, start=b"NNSP\x01\x00"):
    return start + container.zstd().compress(content)


def test_honest_payload_is_received(honest, model):
    assert len(receive(honest, model).blocks) == 1


# --- Bytes


@pytest.mark.parametrize("data", [b"", b"N", b"PK\x03\x04 a zip file", b"\x80\x04\x95 a pickle", b"{}", b"NNS"])
def test_what_is_no_payload(model, data):
    with pytest.raises(PayloadError, match=r"no payload|cut off"):
        receive(data, model)


def test_newer_format_says_which_side_to_update(model, honest):
    newer = honest[:4] + (container.FORMAT + 1).to_bytes(2, "little") + b"\x00 nothing that this version knows"
    with pytest.raises(PayloadError, match=r"format 2, and this side reads up to 1: .*Update .* on the receiving"):
        receive(newer, model)
    with pytest.raises(PayloadError, match="format 0, which no version"):
        receive(honest[:4] + b"\x00\x00" + honest[6:], model)


def test_payload_cut_off_anywhere(model, honest):
    for end in range(len(honest)):
        with pytest.raises(PayloadError):
            receive(honest[:end], model)


def test_bytes_after_the_end(model, honest):
    for more in (b"\x00", honest, b"x" * 1000):
        with pytest.raises(PayloadError, match="bytes after its end"):
            receive(honest + more, model)
    content = container.zstd().decompress(honest[6:])
    with pytest.raises(PayloadError, match="bytes after its end"):
        receive(frame(content + b"\x00"), model)


def test_every_flipped_bit_is_noticed_or_changes_nothing(honest):
    expected, pieces = container.read(honest)
    for at in range(len(honest)):
        damaged = bytearray(honest)
        damaged[at] ^= 1 << at % 8
        try:
            header, others = container.read(bytes(damaged))
        except PayloadError:
            continue
        assert header == expected
        assert all(map(torch.equal, others, pieces))


def test_lengths_that_are_announced_and_not_there(model):
    ten = 10 << 30
    with pytest.raises(PayloadError, match="announces a header of 4294967295 bytes"):
        receive(frame(b"\xff\xff\xff\xff{}"), model)
    with pytest.raises(PayloadError, match="announces 1000 bytes and holds 2"):
        receive(frame((1000).to_bytes(4, "little") + b"{}"), model)
    with pytest.raises(PayloadError, match="announces a table of tensors"):
        receive(frame(b"\x02\x00\x00\x00{}" + ten.to_bytes(8, "little")), model)
    table = json.dumps({"0": {"dtype": "U8", "shape": [ten], "data_offsets": [0, ten]}}).encode()
    with pytest.raises(PayloadError, match=rf"announces {ten} bytes of tensors, and \d+ may be"):
        receive(frame(b"\x02\x00\x00\x00{}" + len(table).to_bytes(8, "little") + table), model)
    table = json.dumps({"0": {"dtype": "U8", "shape": [90 << 20], "data_offsets": [0, 90 << 20]}}).encode()
    with pytest.raises(PayloadError, match=r"of which 3 are there"):
        receive(frame(b"\x02\x00\x00\x00{}" + len(table).to_bytes(8, "little") + table + b"abc"), model)


def test_bomb_is_not_inflated(model):
    """Two gigabytes of zeros in some kilobytes: what the frame says of its size is not believed either."""
    compressor = container.zstd().ZstdCompressor()
    bomb = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(128)) + compressor.flush()
    assert len(bomb) < 1 << 20
    with pytest.raises(PayloadError):
        receive(b"NNSP\x01\x00" + bomb, model)
    table = json.dumps({"0": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    head = b"\x02\x00\x00\x00{}" + len(table).to_bytes(8, "little") + table
    compressor = container.zstd().ZstdCompressor()
    bomb = compressor.compress(head) + b"".join(compressor.compress(bytes(1 << 24)) for _ in range(128))
    with pytest.raises(PayloadError, match="bytes after its end"):
        receive(b"NNSP\x01\x00" + bomb + compressor.flush(), model)


def test_window_that_would_take_much_memory(model):
    module = container.zstd()
    data = module.compress(b"{}" * 100, options={module.CompressionParameter.window_log: 27})
    compressor = module.ZstdCompressor(options={module.CompressionParameter.window_log: 27})
    data = compressor.compress(b"\x02\x00\x00\x00{}") + compressor.flush()
    with pytest.raises(PayloadError, match="damaged"):
        receive(b"NNSP\x01\x00" + data, model)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[" * 100_000, "nested more than"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested more than"),
        (b"[" + b"0," * 2_000_000 + b"0]", "more than 1000000 values"),
        (b"{}", "malformed"),
        (b"[]", "malformed"),
        (b"7", "malformed"),
        (b"", "damaged"),
        (b"\xff\xfe{\x00}\x00", "damaged"),
        (b"NaN", "damaged"),
        (b"9" * 5000, "damaged"),
        (b'{"kind":"run"', "damaged"),
        (b'"' + b'\\"' * 100_000, "damaged"),
        (b'{"kind":"results"}', "kind 'results', and a run was expected"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_headers_that_are_none(model, text, told):
    with pytest.raises(PayloadError, match=told):
        receive(frame(len(text).to_bytes(4, "little") + text), model)


TABLES = [
    [], 1, {}, {"1": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
    {"0": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    {"0": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}},
    {"0": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}},
    {"0": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}},
    {"0": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}},
    {"0": {"dtype": "U8", "shape": [1, 1], "data_offsets": [0, 1]}},
]  # fmt: skip


@pytest.mark.parametrize("table", TABLES, ids=json.dumps)
def test_tables_of_tensors_that_are_none(model, table):
    text = json.dumps(table).encode()
    with pytest.raises(PayloadError, match="tensors in this payload"):
        receive(frame(b"\x02\x00\x00\x00{}" + len(text).to_bytes(8, "little") + text + bytes(100)), model)


# --- Tensors


def views_of(header):
    return header["sent"]["tensors"][1]


@pytest.mark.parametrize(
    ("index", "new"),
    [
        (0, 99), (0, -1), (0, "x"), (1, "float128"), (1, "object"), (1, 3), (2, [1 << 30]), (2, [-1]), (2, [1.5]),
        (2, [1] * 70), (2, "6"), (2, [1 << 60, 1 << 60]), (3, [1 << 40]), (3, [-4]), (3, [3]), (3, [4, 4]), (4, 1),
        (4, 1 << 62), (4, -4), (5, 7),
    ],
    ids=repr,
)  # fmt: skip
def test_tensor_outside_of_its_memory(model, change, index, new):
    def tamper(header):
        (view,) = [view for view in views_of(header) if view[1] == "float32" and view[2] == [6]]
        view[index] = new

    with pytest.raises(PayloadError, match="payload"):
        receive(change(tamper), model)


@pytest.mark.parametrize(
    ("index", "new"),
    [(1, "|O8"), (1, "O"), (1, "<f3"), (1, "f4,f4"), (1, "<U99999999"), (3, [-8]), (3, [1 << 40]), (4, 20), (4, -1),
     (2, [1 << 40])],
    ids=repr,
)  # fmt: skip
def test_array_outside_of_its_memory(model, change, index, new):
    def tamper(header):
        (view,) = [view for view in views_of(header) if "a" in view[5]]
        view[index] = new

    with pytest.raises(PayloadError, match="payload"):
        receive(change(tamper), model)


def test_bools_that_are_none(model, change):
    def tamper(header):
        (view,) = [view for view in views_of(header) if view[1] == "bool"]
        (other,) = [view for view in views_of(header) if view[1] == "float32" and view[2] == [6]]
        view[:5] = [other[0], "bool", [24], None, 0]

    with pytest.raises(PayloadError, match="bools in this payload holds something else"):
        receive(change(tamper), model)


def test_integers_do_not_want_gradients(model, change):
    def tamper(header):
        (view,) = [view for view in views_of(header) if view[1] == "bool"]
        view[5] = "g"

    with pytest.raises(PayloadError, match="wants gradients"):
        receive(change(tamper), model)


# --- Names, paths and sources


def of_block(key, value):
    def tamper(header):
        header["sent"]["blocks"][0][key] = value

    return tamper


def of_function(key, value):
    def tamper(header):
        header["sent"]["definitions"][0][0][key] = value

    return tamper


def of_class(key, value):
    def tamper(header):
        header["sent"]["definitions"][1][0][key] = value

    return tamper


def text_of(record, text):
    def tamper(header):
        tables = header["sent"]["definitions"]
        tables[record][0]["source"][3] = text

    return tamper


CHANGES = {
    "a name that is no identifier": of_block("local", ["a b"]),
    "a name that is no text": of_block("local", [3]),
    "a name that closes a string": of_block("first", "x); import os; ("),
    "variables that are not there": of_block("live", {"result": 7}),
    "a namespace that is not there": of_block("module", 12),
    "a line that is no line": of_block("line", -5),
    "a line far away": of_block("line", 1 << 40),
    "a future that is none": of_block("futures", [["x"]]),
    "a file with a null in it": of_block("filename", "a\0b"),
    "a block of no kind": of_block("kind", "lambda"),
    "a text that does not parse": of_block("text", "with _:\n    1 +"),
    "a text that is no block": of_block("text", "import os\n"),
    "a text of two statements": of_block("text", "with _:\n    pass\nimport os\n"),
    "a text that leaves its block": of_block("text", "with _:\n    return 1\n"),
    "a text with nulls": of_block("text", "with _:\n    '\0'\n"),
    "a text nested too deeply": of_block("text", "with _:\n    " + "(" * 5000 + ")" * 5000 + "\n"),
    "a function that does not parse": text_of(0, "def plus(:\n"),
    "a function that is none": text_of(0, "import os\n"),
    "a function that is a class": text_of(0, "class plus: pass\n"),
    "a function with a name that is none": of_function("free", {"a b": 0}),
    "a function over other variables": of_function("free", {"other": 0}),
    "a function of a module that is not there": of_function("module", -1),
    "a function without a source": of_function("source", None),
    "a class that does not parse": text_of(1, "class Setting(:\n"),
    "a class that is a function": text_of(1, "def Setting(): pass\n"),
    "a class that raises": text_of(1, "class Setting:\n    1 / 0\n"),
    "a class of other names": of_class("free", {"x y": 0}),
    "no definitions": lambda header: header["sent"].update(definitions=None),
    "a namespace that is none": lambda header: header["sent"]["definitions"].__setitem__(3, [3]),
    "a name of a namespace that is none": lambda header: header["sent"]["definitions"][3].append(["m", {"a b": 1}]),
    "a path that is not in the tree": lambda header: header.update(path="model.9.attn"),
    "a path that is no path": lambda header: header.update(path=["model"]),
    "a path to what is no module": lambda header: header.update(path="model.0.weight"),
    "a path to what is read in a run": lambda header: header.update(path="model.0.output"),
    "a path to a method": lambda header: header.update(path="model.0.trace"),
    "a path with a hole": lambda header: header.update(path="model..0"),
    "an edit of what is not there": lambda header: header.update(edits=["model.x"]),
    "more edits than blocks": lambda header: header.update(edits=["model"]),
    "names that are none": lambda header: header.update(names=[["model", 3, "model.0"]]),
    "a method that is no name": lambda header: header.update(method="trace; import os"),
    "options that are none": lambda header: header.update(options=[1]),
    "no model": lambda header: header.pop("model") and None,
    "a model without a tree": lambda header: header["model"].pop("tree") and None,
    "no blocks": lambda header: header["sent"].update(blocks=[]),
    "arguments that are none": lambda header: header["sent"]["values"].update(arguments=7),
    "no arguments": lambda header: header["sent"]["values"].clear(),
    "tensors that are none": lambda header: header["sent"].update(tensors=[[1.5], []]),
    "shared objects that are none": lambda header: header["sent"].update(shared={}),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_said_in_a_header_is_checked(model, change, what):
    with pytest.raises(PayloadError):
        receive(change(CHANGES[what]), model)


@pytest.mark.parametrize(
    "value",
    [
        {}, [], [1], ["list", {}], ["nothing"], ["dict", 1], ["dict", ["list"], 1], ["set", ["list"]], ["float", "1"],
        ["complex", "a", 0], ["bytes", "%"], ["range", 1, 2, 0], ["range", 1], ["slice"], ["size", "a"],
        ["torch", "load"], ["torch", "nothing"], ["device", "moon"], ["device", 3], ["tensor", 99], ["tensor", -1],
        ["tensor"], ["array", "x"], ["scalar", 99], ["envoy", "model.9"], ["envoy", 3], ["envoy", "model.0.weight.x"],
        ["submodule", "model.9"], ["shared", 99], ["shared", -1], ["shared", []], ["function", 99], ["class", -1],
        ["namespace", 99], ["import", "no_such_module_at_all", ""], ["import", "torch", "no_such_name"],
        ["import", "..", "x"], ["import", 3, 4], ["instance", ["import", "builtins", "int"], {}, None],
        ["instance", 3, {}, None], ["instance", ["import", "types", "SimpleNamespace"], {"__class__": 3}, None],
        ["instance", ["import", "io", "StringIO"], {}, None], ["named", ["import", "builtins", "tuple"], 1],
        ["member", ["import", "re", "RegexFlag"], "NONE", None], ["member", ["import", "builtins", "int"], "a", 1],
        ["partial", 3, ["tuple"], ["dict"]], ["attribute", 3, "nothing"], ["cached", 3, 4, False],
        ["pattern", "(", 0], ["deque", "a"], ["defaultdict", 3], ["logger", 3], ["date", "x"], ["datetime", 3],
        ["timedelta", 10**20], ["timedelta", "1"], ["decimal", "x"], ["decimal"], ["fraction", 1, 0],
        ["fraction", "1e999999999"], ["uuid", "x"], ["uuid", 3], ["path", 3], ["path", ["list"]], ["itemgetter"],
        ["attrgetter", 3], ["numpy_dtype", "O"], ["finfo", "load"], ["finfo", "int8"], ["iinfo", "float32"],
    ],
    ids=json.dumps,
)  # fmt: skip
def test_values_that_are_none(model, change, value):
    def tamper(header):
        header["sent"]["values"]["extra"] = value

    with pytest.raises(PayloadError):
        receive(change(tamper), model)


def test_shared_object_in_itself(model, change):
    def tamper(header):
        number = len(header["sent"]["shared"])
        header["sent"]["shared"].append(["list", ["shared", number]])
        header["sent"]["values"]["extra"] = ["shared", number]

    with pytest.raises(PayloadError, match="contains itself"):
        receive(change(tamper), model)


def test_deep_value_is_an_error_and_no_overflow(model, change):
    def tamper(header):
        value = 1
        for _ in range(150):
            value = ["list", value]
        for _ in range(1000):
            header["sent"]["shared"].append(value)
            value = ["list", ["shared", len(header["sent"]["shared"]) - 1]]
        header["sent"]["values"]["extra"] = value

    with pytest.raises(PayloadError):
        receive(change(tamper), model)


def test_nothing_of_the_sender_runs_before_the_payload_is_opened(model, change, tmp_path):
    mark = tmp_path / "ran"
    evil = f"class Setting:\n    open({str(mark)!r}, 'w').close()\n    def get(self): pass\n"
    data = change(text_of(1, evil))
    run = payload.Run(data)
    run.check(model)
    run.laid(lambda piece: 0)
    assert not mark.exists()
    receive(data, model)
    assert mark.exists()  # so the test can tell


def test_model_is_usable_after_bad_payloads(model, honest, change):
    for data in (honest[:50], change(CHANGES["a text that does not parse"])):
        with pytest.raises(NNsightError):
            receive(data, model)
    x = torch.ones(2, 4)
    with model.trace(x):
        result = model.output
    assert torch.equal(result, model._module(x))


@pytest.mark.timeout(300)
def test_ten_thousand_fuzzed_payloads():
    """In a process of its own, whose memory is limited: `fuzz.py` says what is tried."""
    program = Path(__file__).with_name("fuzz.py")
    done = subprocess.run([sys.executable, str(program), "10000"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "10000 payloads" in done.stdout
