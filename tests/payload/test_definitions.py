"""Functions and classes of the user's files arrive as source, with what they use, and do the same there."""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import io
import linecache
import subprocess
import sys
import textwrap
import traceback
import typing

import pytest
import torch
from torch import nn

from nnsight import UnsendableError

FACTOR = 3
HANDLE = io.StringIO()
LOG = []
_MISSING = object()


def tripled(value, by=FACTOR, *, plus=(0,)):
    """Multiply."""
    return value * by + plus[0]


def is_even(number):
    return True if number == 0 else is_odd(number - 1)


def is_odd(number):
    return False if number == 0 else is_even(number - 1)


def optional(value=_MISSING):
    return value is _MISSING


def handle_named_like_a_global(value):
    return value.HANDLE


def logged(value):
    global FACTOR
    LOG.append(value)
    FACTOR = value
    return LOG


def doubling(function):
    """Return a function that doubles what another returns."""

    @functools.wraps(function)
    def inner(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return inner


def adding(number):
    def decorate(function):
        @functools.wraps(function)
        def add(value):
            return function(value) + number

        return add

    return decorate


@adding(10)
@doubling
def decorated(value):
    return value + FACTOR


@torch.no_grad()
def without_gradients(value):
    return value * 2, torch.is_grad_enabled()


@functools.cache
def fibonacci(number):
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)


@contextlib.contextmanager
def noting(notes):
    notes.append("in")
    try:
        yield FACTOR
    finally:
        notes.append("out")


async def later(value):
    await asyncio.sleep(0)
    return value + FACTOR


def numbers(count):
    yield from range(count)


class Base(abc.ABC):
    made = 0

    def __init__(self, value):
        Base.made += 1
        self.__value = value

    @abc.abstractmethod
    def get(self): ...

    def own(self):
        return self.__value


@dataclasses.dataclass
class Config:
    size: int = 2
    layers: list[int] = dataclasses.field(default_factory=list)

    def total(self):
        return self.size * len(self.layers) * FACTOR


class Child(Base):
    kinds: typing.ClassVar = {"a": Config}
    config = Config(4)

    class Inner:
        def name(self):
            return type(self).__qualname__

    def get(self):
        return tripled(super().own())

    @property
    def half(self):
        return self.own() / 2

    @staticmethod
    def fixed(value):
        return value + FACTOR

    @classmethod
    def make(cls, value):
        return cls(value)

    def __len__(self):
        return 7


class Colour(enum.IntEnum):
    RED = enum.auto()
    BLUE = enum.auto()

    def other(self):
        return Colour.BLUE if self is Colour.RED else Colour.RED


class Pair(typing.NamedTuple):
    left: int
    right: int = FACTOR

    def both(self):
        return self.left + self.right


Item = typing.TypeVar("Item")
Items = list[int] | None


class Box(typing.Generic[Item]):
    kept: Items = None

    def __init__(self, value: Item) -> None:
        self.value = value


class Filled(Box[torch.Tensor]):
    def total(self):
        return self.value.sum()


class Flag(enum.Flag):
    UP = 1
    DOWN = 2


REGISTRY: dict[str, type] = {}


def register(cls):
    REGISTRY[cls.__name__] = cls
    return cls


class Registered:
    def __init_subclass__(cls, **kwargs):
        register(cls)
        cls.options = kwargs


class First(Registered, level=2):
    pass


def names():
    return sorted(REGISTRY)


# --- Functions


def test_function_with_defaults_and_globals(send):
    arrived = send(tripled)
    assert arrived is not tripled
    assert (arrived(2), arrived(2, 5), arrived(2, plus=(1,))) == (6, 10, 7)
    assert (arrived.__name__, arrived.__qualname__, arrived.__doc__) == ("tripled", "tripled", "Multiply.")
    assert arrived.__module__ == tripled.__module__


def test_functions_that_call_each_other(send):
    even, odd = send(is_even, is_odd)
    assert even(10) and not even(7) and odd(7)


def test_mark_for_no_value(send):
    arrived = send(optional)
    assert arrived() and not arrived(1)


def test_attribute_named_like_a_global_does_not_send_that(send):
    assert send(handle_named_like_a_global)(collections.namedtuple("N", "HANDLE")(4)) == 4


def test_globals_that_functions_change_are_shared(send):
    log, triple, entries = send(logged, lambda: FACTOR, LOG)
    assert log(7) == [7]
    assert entries == [7] and triple() == 7
    assert LOG == [] and FACTOR == 3


def test_closures_share_their_variables(send):
    count = 0

    def up():
        nonlocal count
        count += 1
        return count

    def read():
        return count

    up()
    there_up, there_read = send(up, read)
    there_up(), there_up()
    assert (there_read(), read()) == (3, 1)


def test_recursion_through_a_closure(send):
    def countdown(number):
        return [number, *countdown(number - 1)] if number else []

    assert send(countdown)(3) == [3, 2, 1]


def test_variable_that_is_not_bound_yet(send):
    def early():
        return late

    arrived = send(early)
    with pytest.raises(NameError, match="late"):
        arrived()
    late = 3
    assert send(early)() == late


def test_lambdas(send):
    scale = 4
    one, two = lambda value: value + 1, lambda value, by=2: [item * by * scale for item in value]
    many = {"a": lambda: FACTOR, "b": lambda: lambda x: x * scale}
    three = lambda value: (
        value
        + scale
    )  # fmt: skip
    assert send(one)(1) == 2 and send(two)([1, 2]) == [8, 16]
    arrived = send(many)
    assert arrived["a"]() == 3 and arrived["b"]()(2) == 8
    assert send(three)(1) == 5
    assert send(sorted([three], key=lambda f: f(1)))[0](2) == 6


def test_decorated_functions_do_what_they_do(send):
    assert decorated(1) == 18
    arrived = send(decorated)
    assert arrived(1) == 18
    assert (arrived.__name__, arrived.__wrapped__(1), arrived.__wrapped__.__wrapped__(1)) == ("decorated", 8, 4)
    value, is_enabled = send(without_gradients)(torch.ones(1, requires_grad=True))
    assert not value.requires_grad and not is_enabled


def test_cached_function_is_cached_there(send):
    arrived = send(fibonacci)
    assert arrived(60) == fibonacci(60)
    assert arrived.cache_info().misses == 61


def test_generators_contexts_and_coroutines(send):
    notes = []
    with send(noting)(notes) as factor:
        notes.append(factor)
    assert notes == ["in", 3, "out"]
    assert asyncio.run(send(later)(1)) == 4
    assert list(send(numbers)(3)) == [0, 1, 2]


def test_attributes_of_a_function(send):
    def function():
        return function.calls

    function.calls = [1]
    assert send(function)() == [1]


def test_partial_of_an_own_function(send):
    assert send(functools.partial(tripled, by=10))(2) == 20


def test_what_was_compiled_arrives_as_it_was_before(send):
    def double(value):
        return value * 2

    layer = nn.Linear(2, 2)
    there, module = send(torch.compile(double), torch.compile(layer))
    assert there(3) == 6 and there.__name__ == "double"
    assert type(module) is nn.Linear and torch.equal(module(torch.ones(1, 2)), layer(torch.ones(1, 2)))


def test_arguments_of_all_kinds(send):
    def function(a, /, b, *args, c, d=4, **kwargs):
        return a, b, args, c, d, kwargs

    arrived = send(function)
    assert arrived(1, 2, 3, c=5, e=6) == (1, 2, (3,), 5, 4, {"e": 6})
    assert str(inspect.signature(arrived)) == "(a, /, b, *args, c, d=4, **kwargs)"


def test_traceback_has_the_line_of_the_file(send):
    def fails():
        number = 0
        return 1 / number

    with pytest.raises(ZeroDivisionError) as caught:
        send(fails)()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.filename == f"<{__file__}, sent>"
    assert (last.lineno, last.line) == (fails.__code__.co_firstlineno + 2, "return 1 / number")


# --- Classes


def test_class_with_its_methods(send):
    arrived, plain = send(Child, Child.Inner)
    child = arrived.make(2)
    assert (child.get(), child.half, arrived.fixed(1), len(child)) == (6, 1.0, 4, 7)
    assert (arrived.__qualname__, arrived.get.__qualname__) == ("Child", "Child.get")
    assert (plain.__qualname__, plain().name()) == ("Child.Inner", "Child.Inner")
    with pytest.raises(TypeError, match="abstract"):
        arrived.__mro__[1](1)


def test_class_and_its_instances_belong_together(send):
    made = Child(3)
    kind, child, other = send(Child, made, Child(4))
    assert type(child) is type(other) is kind
    assert issubclass(kind, kind.__mro__[1]) and not isinstance(child, Child)
    assert child.own() == 3
    assert kind.kinds["a"]().size == 2 and kind.config.size == 4


def test_class_attributes_are_those_of_now(send):
    class Counter:
        total = 0
        seen: typing.ClassVar = []

        def add(self):
            type(self).total += 1

    Counter().add()
    Counter.seen.append("a")
    Counter.later = 5
    Counter.method = lambda self: self.later
    arrived = send(Counter)
    assert (arrived.total, arrived.seen, arrived.later, arrived().method()) == (1, ["a"], 5, 5)


class Only:
    made = None

    def __new__(cls):
        if cls.made is None:
            cls.made = super().__new__(cls)
        return cls.made


def test_class_that_holds_an_instance_of_itself(send):
    kind, only = send(Only, Only())
    assert kind() is only and type(only) is kind


def test_class_defined_in_a_function(send):
    offset = 10

    class Local(Base):
        def get(self):
            return offset + self.own() + isinstance(self, Local)

    assert send(Local)(1).get() == 12
    assert send(Local(2)).get() == 13


def test_dataclasses_enums_and_named_tuples(send):
    config, colour, pair, kind = send(Config(2, [1, 2]), Colour.BLUE, Pair(1), Colour)
    assert config.total() == 12 and config == type(config)(2, [1, 2])
    assert colour.other() is kind.RED and colour == 2
    assert pair.both() == 4 and type(pair)(2, 2).both() == 4


def test_generic_classes_and_aliases_of_types(send):
    box, filled, items, wanted = send(Box(3), Filled(torch.ones(2)), Items, typing.Callable[[int], str | None])
    assert box.value == 3 and filled.total() == 2
    assert isinstance(filled, type(box)) and type(box)[int](4).value == 4
    assert items == Items and wanted == typing.Callable[[int], str | None]
    for alias in (dict[str, list[int]], typing.Literal["a", 1], tuple[int, ...], typing.Optional[int]):  # noqa: UP045
        assert send(alias) == alias


def test_class_that_is_called_as_its_base(send):
    flag, both = send(Flag, Flag.UP | Flag.DOWN)
    assert both == flag.UP | flag.DOWN and both.value == 3


def test_what_runs_while_a_class_is_made_is_there(send):
    kind, listed = send(First, names)
    assert kind.options == {"level": 2}
    assert listed() == ["First"]


def test_class_that_needs_another_one_while_it_is_made(send):
    first, second = send(Needs, Needed)
    assert first.made is second.value
    assert second().back() is first


class Needed:
    value = 5

    def back(self):
        return Needs


class Needs:
    made = Needed.value

    def other(self):
        return Needed


def test_module_class_with_super(send):
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(width, width)

        def forward(self, x):
            return torch.relu(self.layer(x)) * FACTOR

    net, kind = Net(4), None
    arrived, kind = send(net, Net)
    x = torch.randn(2, 4)
    assert torch.equal(arrived(x), net(x))
    assert kind(3).layer.weight.shape == (3, 3)


def test_class_whose_base_is_a_variable_that_is_lost_says_so(send):
    def make():
        size = 3

        class Lost:
            width = size + 1

        return Lost

    with pytest.raises(UnsendableError, match=r"class `.*Lost`.*uses `size` while it is defined.*top of its file"):
        send(make())


# --- Modules of the user's files


def test_function_that_uses_a_module_of_the_users(send):
    import users_file as helpers

    def use(value):
        return helpers.scaled(value) + helpers.SCALE + helpers.through_module(4)

    assert send(use)(2) == 11.0


def test_module_of_the_users_is_one_object(send):
    import users_file as helpers

    def first():
        return helpers.noted(1)

    def second():
        return helpers.calls, helpers.noted(2)

    one, two = send(first, second)
    assert one() == 1
    assert two() == ([1, 2], 2)
    assert helpers.calls == []


def test_only_what_is_used_of_a_module_travels(send):
    import users_file as helpers

    with pytest.raises(UnsendableError, match=r"`UNSENDABLE`, which `unsendable` uses,.*generator"):
        send(lambda: helpers.unsendable())


def test_module_of_the_users_used_as_a_value_is_refused(send):
    import users_file as helpers

    with pytest.raises(UnsendableError, match=r"module `.*users_file` of your files.*Import what the block uses"):
        send(lambda: dir(helpers))
    with pytest.raises(UnsendableError, match="of your files"):
        send([helpers])


def test_file_of_the_users_that_is_called_like_a_plugin(send, tmp_path, monkeypatch):
    (tmp_path / "nnsight_of_mine.py").write_text("def twice(value):\n    return value * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    twice = importlib.import_module("nnsight_of_mine").twice
    assert send(twice) is not twice and send(twice)(2) == 4


# --- What cannot travel


def uses_handle():
    return HANDLE.getvalue()


def test_variable_deep_in_a_helper_is_named(send):
    with pytest.raises(
        UnsendableError,
        match=r"'x': `uses_handle`, which `<lambda>` uses: `HANDLE`, which `uses_handle` uses, of .*_io\.StringIO",
    ):
        send(lambda: uses_handle())


def test_function_without_source_says_so(send):
    namespace = {}
    exec("def made(): return 1\nclass Made: pass", namespace)
    with pytest.raises(UnsendableError, match=r"function `made`, whose source cannot be found.*put it in a file"):
        send(namespace["made"])
    with pytest.raises(UnsendableError, match=r"class `Made`, whose source cannot be found"):
        send(type("Made", (), {}))


@pytest.mark.parametrize("change", ["value + 1", "value - 1 # longer", ""])
def test_source_that_has_changed_is_an_error(send, tmp_path, change):
    path = tmp_path / "changing.py"
    text = "def function(value):\n    return value - 1\n\n\nclass Kind:\n    def method(self):\n        return 1\n"
    path.write_text(text)
    namespace = {"__name__": "changing", "__file__": str(path)}
    exec(compile(text, str(path), "exec"), namespace)
    assert send(namespace["function"])(3) == 2
    path.write_text(text.replace("value - 1", change).replace("return 1", "return 2"))
    linecache.checkcache()
    exec(compile(text, str(path), "exec"), namespace)
    with pytest.raises(UnsendableError, match="changed since it was imported"):
        if change == "value - 1 # longer":
            send(namespace["Kind"])
        else:
            send(namespace["function"])


# --- Where code may be written


PROGRAM = """
import sys
from nnsight.payload.describing import Descriptions
from nnsight.payload.packing import Packer

SCALE = 2

def twice(value):
    return value * SCALE

class Kind:
    scale = SCALE
    def method(self):
        return self.scale

class Bare:
    field: int = 3

packer = Packer(None)
packer.descriptions = Descriptions(packer)
for value in (twice, Kind, Bare, lambda: SCALE):
    packer.named("The variable 'x'", value)
functions, classes, cells, namespaces = packer.descriptions.finish()
print(len(functions), len(classes), namespaces[0][1]["SCALE"], namespaces[0][0])
"""


def test_command_of_the_interpreter_is_a_source():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "2", "2", "__main__"], done.stderr


def test_cells_of_a_notebook_are_sources():
    """What IPython does: each cell is a file in linecache that is on no disk."""
    cells = PROGRAM.replace("\n\n", "\n\n#%%\n").split("#%%\n")
    program = f"""
import linecache
namespace = {{"__name__": "__main__", "__builtins__": __builtins__}}
import sys, types
main = types.ModuleType("__main__")
main.__dict__.update(namespace)
sys.modules["__main__"] = main
for number, cell in enumerate({cells!r}):
    name = f"<ipython-input-{{number}}>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    exec(compile(cell, name, "exec"), main.__dict__)
"""
    done = subprocess.run([sys.executable, "-"], input=textwrap.dedent(program), capture_output=True, text=True)
    assert done.stdout.split() == ["2", "2", "2", "__main__"], done.stderr
