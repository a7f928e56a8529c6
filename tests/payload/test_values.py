"""Values as data and back: what arrives is what was sent, and what cannot be is refused by name."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import io
import logging
import math
import operator
import pathlib
import re
import threading
import types
import uuid

import numpy as np
import pytest
import torch
from torch import nn

from nnsight import NNsight, PayloadWarning, UnsendableError
from nnsight.payload.packing import MAX_DEPTH


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Way(enum.Flag):
    UP = 1
    LEFT = 2


Point = collections.namedtuple("Point", ["x", "y"], defaults=[5])


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    first: int
    rest: tuple = ()


@dataclasses.dataclass
class Node:
    name: str
    next: object = None


class Plain:
    def __init__(self, value):
        self.value = value
        self.__hidden = value * 2

    def hidden(self):
        return self.__hidden


class Slotted:
    __slots__ = ("__own", "value")

    def __init__(self, value):
        self.value = value
        self.__own = value + 1

    def own(self):
        return self.__own


class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        return self.linear(x) * self.scale


SAME = [
    None, True, 0, -7, 1 << 80, 0.1, -0.0, math.inf, "é\n\ud800\0", "", b"\x00\xff", 2 - 3j, complex(0.0, -0.0),
    [], [1, [2.5, None]], (), (1,), {1, 2}, frozenset({3}), {"a": {1: (2,)}, None: "b", (1, 2): 3}, slice(1, None, 2),
    range(1, 9, 3), Ellipsis, NotImplemented, bytearray(b"ab"), collections.OrderedDict(b=1, a=2),
    collections.Counter("aab"), collections.deque([1, 2], 3), collections.defaultdict(list, {"a": [1]}),
    types.SimpleNamespace(a=1, b=[2]), torch.float16, torch.device("cpu"), torch.Size([2, 3]), torch.strided,
    torch.channels_last, re.compile("a+", re.I), np.float32(0.5), np.int64(7), np.datetime64("2020-01-02"),
    np.float64(np.inf), np.dtype("int16"), dt.date(2020, 1, 2), dt.datetime(2020, 1, 2, 3, 4, 5, 6),
    dt.datetime(2020, 1, 2, tzinfo=dt.UTC), dt.time(1, 2), dt.timedelta(2, 3, 4),
    decimal.Decimal("1.50"), fractions.Fraction(1, 3), uuid.UUID(int=3), pathlib.Path("a/b"), torch.finfo(torch.half),
    torch.iinfo(torch.int8),
]  # fmt: skip


@pytest.mark.parametrize("value", SAME, ids=repr)
def test_value_arrives_as_it_was(send, value):
    arrived = send(value)
    assert type(arrived) is type(value)
    assert arrived == value
    assert repr(arrived) == repr(value)


def test_what_operator_makes_arrives(send):
    first, shape, many = send(operator.itemgetter(0), operator.attrgetter("shape"), operator.itemgetter("a", 1))
    assert first([3, 4]) == 3 and shape(torch.ones(2)) == (2,) and many({"a": 1, 1: 2}) == (1, 2)


def test_not_a_number_arrives(send):
    assert math.isnan(send(math.nan))
    assert math.isnan(send([complex(math.nan, 1)])[0].real)


def test_dict_keeps_its_order(send):
    assert list(send({"b": 1, "a": 2, 3: 4})) == ["b", "a", 3]


def test_missing_keys_of_a_defaultdict_are_made(send):
    assert send(collections.defaultdict(list))["new"] == []


def test_members_of_enums(send):
    colour, both, width = send(Colour.BLUE, Way.UP | Way.LEFT, re.RegexFlag.IGNORECASE)
    assert (colour.name, colour.value, type(colour).RED.value) == ("BLUE", "b", "r")
    assert both.value == 3 and type(both).UP in both
    assert width is re.RegexFlag.IGNORECASE


def test_tuples_with_names(send):
    point, size = send(Point(1, 2), torch.return_types.max((torch.ones(1), torch.zeros(1)))[0])
    assert (point.x, point.y, type(point).__name__, type(point)(3).y) == (1, 2, "Point", 5)
    assert torch.equal(size, torch.ones(1))


def test_dataclasses_and_other_instances(send):
    frozen, plain, slotted = send(Frozen(1, (2,)), Plain(3), Slotted(4))
    assert (frozen.first, frozen.rest) == (1, (2,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.first = 2
    assert (plain.value, plain.hidden()) == (3, 6)
    assert (slotted.value, slotted.own()) == (4, 5)


class Watched:
    calls = 0

    @property
    def value(self):
        return vars(self)["value"]

    @value.setter
    def value(self, value):
        vars(self)["value"] = value
        Watched.calls += 1


def test_setter_of_an_attribute_is_not_called(send):
    made = Watched()
    made.value = 3
    arrived = send(made)
    assert (arrived.value, type(arrived).calls) == (3, 1)


def test_instances_may_refer_to_themselves(send):
    node = Node("a", Node("b"))
    node.next.next = node
    arrived = send(node)
    assert arrived.next.name == "b"
    assert arrived.next.next is arrived


def test_module_of_the_users_computes_the_same(send):
    probe, x = Probe(), torch.randn(2, 4)
    arrived = send(probe)
    assert torch.equal(arrived(x), probe(x))
    assert [name for name, _ in arrived.named_parameters()] == ["linear.weight", "linear.bias"]
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in arrived.parameters())
    assert "scale" in dict(arrived.named_buffers())


def test_parts_of_installed_packages_arrive_by_name(send):
    values = [
        torch, torch.relu, torch.nn.functional.gelu, math.sqrt, np.exp, str.upper, nn.Linear, dict.fromkeys, len,
        np.linalg.norm, torch.Tensor.sum, collections.OrderedDict, int, logging.getLogger("a.b"),
    ]  # fmt: skip
    arrived = send(*values)
    assert all(one is other or one == other for one, other in zip(arrived, values, strict=True))


def test_mark_that_is_only_compared_by_identity_keeps_it(send):
    mark = object()
    arrived, items = send(mark, [1, mark])
    assert items[1] is arrived and arrived is not mark


def test_partial_bound_method_and_cached_function(send):
    plain, add = send(Plain(2).hidden, functools.partial(max, 3, key=abs))
    assert plain() == 4
    assert add(-5) == -5
    assert send([1, 2].index)(2) == 1


# --- Objects that are met twice


def test_object_met_twice_is_one_object(send):
    inner, tensor, array = [1], torch.ones(2), np.ones(2)
    node = Node("a")
    outer = [inner, {"again": inner}, (tensor, tensor), array, array, node, node]
    first, second = send(outer, inner)
    assert first[0] is first[1]["again"] is second
    assert first[2][0] is first[2][1]
    assert first[3] is first[4]
    assert first[5] is first[6]


@pytest.mark.parametrize("kind", ["list", "dict", "deep"])
def test_container_in_itself_is_refused(send, kind):
    value = {"list": [1], "dict": {}, "deep": [[], [{}]]}[kind]
    if kind == "list":
        value.append(value)
    elif kind == "dict":
        value["me"] = (1, value)
    else:
        value[1][0]["top"] = value
    with pytest.raises(UnsendableError, match=r"The variable 'x' of the block at prog\.py:7 .*contains itself"):
        send(value)


def test_too_deep_is_refused_and_less_is_not(send):
    deep = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    arrived, depth = send(deep), 0
    while arrived:
        arrived, depth = arrived[0], depth + 1
    assert depth == MAX_DEPTH - 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UnsendableError, match=f"nested more than {MAX_DEPTH} deep"):
        send(deep)


# --- Tensors


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "int16", "int8", "uint8",
     "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2"],
)  # fmt: skip
def test_tensors_of_all_dtypes(send, dtype):
    value = torch.arange(-3, 3).to(getattr(torch, dtype)).reshape(2, 3)
    arrived = send(value)
    assert arrived.dtype == value.dtype and arrived.shape == value.shape
    assert torch.equal(arrived.view(torch.uint8), value.view(torch.uint8))


def test_shapes_and_strides(send):
    base = torch.arange(24.0).reshape(2, 3, 4)
    values = [base, base.transpose(0, 2), base[:, 1], base[0, 0, 0], torch.empty(0, 3), base.expand(5, 2, 3, 4)]
    for value in values:
        (arrived,) = [send(value)]
        assert torch.equal(arrived, value)
    assert send(base.transpose(0, 2)).stride() == base.transpose(0, 2).stride()
    assert send(base.expand(5, 2, 3, 4)).stride()[0] == 0


def test_gradients_and_parameters(send):
    leaf, plain, parameter = send(torch.ones(2, requires_grad=True), torch.ones(2), nn.Parameter(torch.ones(2)))
    assert leaf.requires_grad and leaf.is_leaf and not plain.requires_grad
    assert type(parameter) is nn.Parameter and parameter.requires_grad
    assert not send(nn.Parameter(torch.ones(2), requires_grad=False)).requires_grad


def test_computed_tensor_can_be_edited_in_place_as_it_could(send):
    whole = torch.ones(2, 3, requires_grad=True) * 2
    computed, row = send(whole, whole[0])
    assert computed.requires_grad and not computed.is_leaf
    row *= 5
    computed += 1
    assert computed.tolist() == [[11.0] * 3, [3.0] * 3] and row.tolist() == [11.0] * 3
    with pytest.warns(PayloadWarning, match="Gradients end at a value") as told:
        computed.sum().backward()
    assert told[0].filename == __file__


def test_conjugated_and_negated_views(send):
    value = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(send(value.conj()), value.conj().resolve_conj())
    assert torch.equal(send(value.conj().imag), -value.imag)


def test_views_of_one_tensor_share_their_memory_and_travel_once(send):
    base = torch.arange(1000.0).reshape(10, 100)
    whole, row, column, flat = send(base, base[3], base[:, 7], base.view(-1))
    assert send.bytes == 4000
    row.fill_(-1)
    assert torch.equal(whole[3], torch.full((100,), -1.0))
    assert column[3] == -1 and flat[300] == -1
    column.zero_()
    assert whole[:, 7].eq(0).all()


def test_views_as_other_dtypes_share_their_memory(send):
    base = torch.zeros(4, dtype=torch.int32)
    whole, low = send(base, base.view(torch.uint8)[1::4])
    low.fill_(1)
    assert whole.tolist() == [256] * 4


def test_array_and_tensor_of_one_memory_share_it(send):
    array = np.zeros((3, 4), dtype=np.float32)
    tensor, arrived, turned, twice = send(torch.from_numpy(array), array, array[::-1, ::2], array.T)
    tensor[0, 0] = 5
    assert arrived[0, 0] == turned[2, 0] == twice[0, 0] == 5


def test_small_part_of_a_large_tensor_travels_alone(send):
    large = torch.arange(1_000_000.0)
    assert torch.equal(send(large[500:510]), large[500:510])
    assert send.bytes == 40
    assert torch.equal(send(large.view(1000, 1000)[:, 3]), large.view(1000, 1000)[:, 3])
    assert send.bytes == 4000


def test_parts_that_do_not_overlap_are_sent_without_what_is_between(send):
    large = torch.arange(1_000_000.0)
    first, last = send(large[:5], large[-5:])
    assert send.bytes == 40
    assert torch.equal(torch.cat([first, last]), torch.cat([large[:5], large[-5:]]))


def test_memory_that_does_not_begin_at_an_element(send):
    base = torch.arange(64, dtype=torch.uint8)
    odd = torch.frombuffer(bytearray(range(64)), dtype=torch.uint8)[3:]
    first, second = send(base[3:], base[8:24].view(torch.float64))
    assert torch.equal(second, base[8:24].view(torch.float64))
    assert torch.equal(first, odd)


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3), np.arange(6.0)[::-1], np.asfortranarray(np.ones((2, 3), np.float16)),
     np.array(["a", "bcd"]), np.array([b"x"]), np.array(["2020-01-02"], "M8[D]"), np.array(3), np.zeros((0, 2)),
     np.arange(3, dtype=">i4"), np.array([True, False]), np.zeros(3, np.complex64)],
    ids=lambda array: f"{array.dtype} {array.shape}",
)  # fmt: skip
def test_arrays(send, array):
    arrived = send(array)
    assert type(arrived) is np.ndarray
    assert (arrived.dtype, arrived.shape, arrived.strides) == (array.dtype, array.shape, array.strides)
    assert np.array_equal(arrived, array)


def test_array_that_cannot_be_written_still_cannot(send):
    array = np.ones(2)
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        send(array)[0] = 1


# --- The model


def test_envoys_and_modules_of_the_model_arrive_as_those_of_the_other_end(send, model):
    layer, whole, some, module = send(model[0], model, [model[2], model[2]], model[2]._module, root=model)
    assert layer is model[0] and whole is model
    assert some == [model[2], model[2]]
    assert module is model[2]._module


def test_envoy_of_another_model_is_refused(send, model):
    other = NNsight(nn.Sequential(nn.Linear(1, 1)))
    with pytest.raises(UnsendableError, match=r"'x'.*`model\.0` of another model.*one model at a time"):
        send([other[0]], root=model)


# --- What cannot travel


class Own(list):
    pass


class Guarded:
    def __init__(self):
        self.lock = threading.Lock()


class Zone(dt.tzinfo):
    def utcoffset(self, moment):
        return None


class Closing:
    def __del__(self):
        pass


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (io.StringIO(), r"cannot be sent: it is a _io\.StringIO\. .*make anything else inside of the block"),
        ({"a": [1, io.BytesIO()]}, r"cannot be sent, item 'a', item 1: it is a _io\.BytesIO"),
        ((letter for letter in "ab"), "generator"),
        (Guarded(), r"its attribute 'lock': it is a _thread\.lock"),
        (threading.Lock(), r"_thread\.lock"),
        (Own(), r"\.Own"),
        (Closing(), r"\.Closing"),
        (1 << 20_000, "integer of 20001 bits"),
        (
            torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), check_invariants=True),
            "sparse_coo",
        ),
        (torch.empty(2, device="meta"), "on meta"),
        (np.array([object()]), "numpy.ndarray, of object"),
        (np.ma.masked_array([1]), r"MaskedArray"),
        (np.vectorize(lambda value: value), r"numpy\.vectorize"),
        (operator.itemgetter(slice(1)), r"operator\.itemgetter"),
        (dt.datetime(2020, 1, 2, tzinfo=Zone()), r"datetime\.datetime"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_travel_is_refused_by_name(send, value, told):
    with pytest.raises(UnsendableError, match=rf"^The variable 'x' of the block at prog\.py:7 .*{told}"):
        send(value)


def test_attribute_of_an_object_that_cannot_travel_has_its_own_remedy(send):
    with pytest.raises(UnsendableError, match=r"its attribute 'lock': .* Or bind what the block needs of the object"):
        send(Guarded())


def test_refused_value_is_no_trace_in_what_is_sent_later(send):
    from nnsight.payload.packing import Packer

    packer, inner = Packer(None), [1]
    with pytest.raises(UnsendableError):
        packer.named("The variable 'x'", [inner, io.StringIO()])
    assert packer.named("The variable 'y'", inner) in (["list", 1], ["shared", 0])
