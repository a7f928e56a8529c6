"""Data as bytes and back: everything that may cross, and nothing else, whatever the bytes."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_ndif.errors import FrameError
from nnsight_ndif.report import describe, rebuild
from nnsight_ndif.window import DTYPES, Window, make
from nnsight_ndif.wire import Special, decode, encode

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.complex_numbers(allow_nan=False),
    st.text(), st.binary(),
)  # fmt: skip
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none())
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner),
        st.builds(Special, st.sampled_from(["tensor", "same"]), inner),
    ),
    max_leaves=30,
)  # fmt: skip


def kinds(value):
    """The types of a value and all that is in it: 1, True and 1.0 are equal."""
    if isinstance(value, list | tuple):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, dict):
        return dict, [(kinds(key), kinds(item)) for key, item in value.items()]
    return (Special, kinds(value.content)) if isinstance(value, Special) else type(value)


@given(values)
def test_value_comes_back_as_it_was(value):
    found = decode(encode(value))
    assert found == value
    assert kinds(found) == kinds(value)


def test_numbers_that_are_none_and_negative_zero_come_back():
    assert math.isnan(decode(encode(math.nan)))
    assert math.copysign(1, decode(encode(-0.0))) == -1
    assert decode(encode("\ud800")) == "\ud800"


@settings(max_examples=3000)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error(data):
    try:
        decode(data)
    except FrameError:
        pass


@settings(max_examples=3000)
@given(values, st.data())
def test_damaged_bytes_are_a_value_or_an_error(value, data):
    whole = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        decode(bytes(whole[:cut]))
    except FrameError:
        pass


def test_announced_sizes_take_no_memory():
    tracemalloc.start()
    for tag in (b"l", b"t", b"d", b"s", b"b", b"I", b"x"):
        with pytest.raises(FrameError):
            decode(tag + b"\xff\xff\xff\xff" + b"N" * 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_is_no_data_is_refused():
    loop = []
    loop.append(loop)
    for value in (object(), {1, 2}, range(3), loop, torch.ones(1), 10**5000):
        with pytest.raises(FrameError):
            encode([value])


# --- Tensors


@pytest.fixture
def window():
    import os

    descriptor = make(1 << 16)
    made = Window(descriptor)
    os.close(descriptor)
    yield made
    made.close()


@pytest.mark.parametrize("name", list(DTYPES))
def test_tensor_comes_back_bit_for_bit(window, name):
    for shape in ((), (0,), (3, 0, 2), (5,), (2, 3, 4)):
        tensor = torch.randint(0, 2, shape).to(DTYPES[name])
        found = window.get(window.put(tensor))
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(
            found.float() if name.startswith("float8") else found,
            tensor.float() if name.startswith("float8") else tensor,
        )


def test_views_and_conjugates_are_laid_down_as_they_read(window):
    base = torch.randn(4, 6)
    for tensor in (base.T, base[::2, 1::3], base[0].expand(3, 6), torch.randn(3, dtype=torch.complex64).conj()):
        assert torch.equal(window.get(window.put(tensor)), tensor)


def test_byte_that_is_no_bool_is_true(window):
    place = window.put(torch.zeros(2, dtype=torch.bool))
    window._bytes[place[2]] = 7
    assert window.get(place).view(torch.uint8).tolist() == [1, 0]


def test_sparse_tensors_and_what_is_too_large_are_refused(window):
    with pytest.raises(FrameError, match="sparse"):
        window.put(torch.eye(3).to_sparse())
    with pytest.raises(FrameError, match="larger window"):
        window.put(torch.ones(1 << 15))


# --- Exceptions


class OwnError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.first = first


@pytest.mark.parametrize(
    "error",
    [ValueError("a"), KeyError("b"), OSError(2, "No such file", "name"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
     StopIteration(3), OwnError("one", "two"), AssertionError(), ZeroDivisionError("x", 1)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_exception_comes_back_with_class_arguments_and_text(error):
    error.add_note("a note")
    found = rebuild(decode(encode(describe(error))))
    assert type(found) is type(error)
    assert str(found) == str(error) and found.args == error.args
    assert found.__notes__ == ["a note"]


def test_exception_whose_message_is_an_object_keeps_class_and_text():
    class Told:
        def __str__(self):
            return "made when it is read"

    found = rebuild(decode(encode(describe(AttributeError(Told())))))
    assert type(found) is AttributeError and str(found) == "made when it is read"


def test_exception_of_an_unknown_class_says_what_it_was():
    kind = type("GoneError", (Exception,), {"__module__": "not.there"})
    found = rebuild(describe(kind("lost")))
    assert isinstance(found, RuntimeError)
    assert str(found) == "not.there.GoneError: lost"


@settings(max_examples=500)
@given(values)
def test_any_data_is_an_exception_or_an_error(value):
    with pytest.raises(FrameError):
        rebuild(value)


def test_exit_of_the_caller_cannot_be_raised():
    assert not isinstance(rebuild(describe(SystemExit(0))), SystemExit)
    assert not isinstance(rebuild(["builtins", "KeyboardInterrupt", [], "", [], [], False, None]), KeyboardInterrupt)
    assert not isinstance(rebuild(["os", "system", [], "", [], [], False, None]), OSError)
