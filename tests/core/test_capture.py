# Code as users write it, and as no tool would leave it.
# ruff: noqa: E501, E701, E702, F821, B023, PLW0120, UP033
"""Taking bodies out of their frames: what a captured block runs, reads and binds, and what it refuses.

Needs neither torch nor pytest, so that `test_capture_versions.py` can run it under interpreters that have no packages:
`python test_capture.py` runs every test.
"""

import asyncio
import contextlib
import ctypes
import functools
import gc
import importlib
import linecache
import os
import subprocess
import sys
import tempfile
import textwrap
import traceback
import weakref
from pathlib import Path

from nnsight.capture.callsite import is_with_item
from nnsight.capture.cells import Scope, bind, write_back
from nnsight.capture.compiler import read_block
from nnsight.capture.leave import Leave, Leaving
from nnsight.errors import CaptureError

CAN_DELETE = sys.version_info < (3, 12)
counter = 0


class Held:
    """A tracer in small: captures the body of its `with`; `run` runs it."""

    def __init__(self, *before):
        self.before = before

    def __enter__(self):
        frame = sys._getframe(1)
        self.scope = Scope(read_block(frame), frame, self.before[-1].scope if self.before else None)
        bind(self.scope, self.entered())
        self.leaving = Leaving(frame)
        self.leaving.arm()
        return self.after()

    def entered(self):
        return self

    def after(self):
        return self

    def __exit__(self, kind, error, trace):
        self.leaving.restore()
        assert kind is Leave, f"the body ran in place: {error!r}"
        return True

    def __call__(self):
        """Run the body without writing back what it binds."""
        self.scope.function(self, self.wait)()
        self.scope.is_over = True

    def wait(self, sibling, name):
        assert sibling.is_over or sibling.has(name)

    def run(self):
        self()
        write_back([self.scope])
        self.scope.close()


@contextlib.contextmanager
def raises(kind, *parts):
    """As pytest.raises, which is not there under every interpreter; the parts are text of the message."""
    try:
        yield
    except kind as error:
        for part in parts:
            assert part in str(error), f"{part!r} is not in {error}"
    else:
        raise AssertionError(f"did not raise {kind}")


@contextlib.contextmanager
def module(source):
    """A module from a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "captured_module.py")
        path.write_text(textwrap.dedent(source), "utf-8")
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            yield importlib.import_module(path.stem), path
        finally:
            sys.path.remove(folder)
            sys.modules.pop(path.stem, None)
            linecache.cache.pop(str(path), None)


def cell(source, name, namespace, flags=0):
    """Run source as a notebook does: a code object with an entry of its own in linecache."""
    source = textwrap.dedent(source)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    code = compile(source, name, "exec", flags=flags)
    exec(code, namespace)


# --- Leaving the body


def test_body_runs_when_it_is_told_to_and_not_in_place():
    ran = []
    held = Held()
    with held:
        ran.append(1)
        ran.append(2)
    assert ran == []
    held.run()
    assert ran == [1, 2]


def test_body_on_the_line_of_its_with_does_not_run_in_place():
    ran = []
    held = Held()
    with held: ran.append(1); ran.append(2)  # fmt: skip
    assert ran == []
    held.run()
    assert ran == [1, 2]


def test_body_may_be_pass():
    held = Held()
    with held:
        pass
    held.run()


def test_first_statement_may_be_try():
    ran = []
    held = Held()
    with held:
        try:
            ran.append("try")
            raise KeyError(1)
        except KeyError as error:
            ran.append(error.args)
        else:
            ran.append("else")
        finally:
            ran.append("finally")
    assert ran == []
    held.run()
    assert ran == ["try", (1,), "finally"]


def test_first_statement_may_be_a_loop_or_a_with():
    ran = []
    first, second = Held(), Held()
    with first:
        for i in range(2):
            ran.append(i)
        else:
            ran.append("else")
    with second:
        with contextlib.nullcontext(5) as value:
            ran.append(value)
    first.run()
    second.run()
    assert ran == [0, 1, "else", 5]


def test_with_in_a_loop_and_inside_other_statements():
    ran, blocks = [], []
    for i in range(3):
        try:
            if i != 1:
                held = Held()
                with held:
                    ran.append(i)
                blocks.append(held)
        finally:
            pass
    for held in blocks:
        held.run()
    assert ran == [0, 2]


def log_of(events, name):
    class Logged:
        def __enter__(self):
            events.append(f"enter {name}")
            return name

        def __exit__(self, *error):
            events.append(f"exit {name}")

    return Logged()


def test_items_before_wrap_the_capture_and_items_after_belong_to_the_body():
    events = []
    held = Held()
    with log_of(events, "a") as a, held, log_of(events, "b") as b:
        events.append((a, b))
    assert events == ["enter a", "exit a"]
    held.run()
    assert events == ["enter a", "exit a", "enter b", ("a", "b"), "exit b"]


def test_parenthesised_header_with_comments_and_a_trailing_comma():
    events = []
    held = Held()
    # fmt: off
    with (
        log_of(events, "a"),  # with x:
        held as bound,
        log_of(
            events, "b",
        ) as b,
    ):
        events.append(b)
    # fmt: on
    assert bound is held
    assert events == ["enter a", "exit a"]
    held.run()
    assert events == ["enter a", "exit a", "enter b", "b", "exit b"]


def test_header_continued_with_backslashes():
    events = []
    held = Held()
    # fmt: off
    with log_of(events, "a"), \
         held, \
         log_of(events, "b"):
        events.append("body")
    # fmt: on
    held.run()
    assert events == ["enter a", "exit a", "enter b", "body", "exit b"]


def test_every_item_of_a_header_may_be_captured():
    ran = []
    outer, inner = Held(), Held()
    with outer, inner: ran.append("body")  # fmt: skip
    assert ran == []
    outer()
    assert ran == []
    inner.run()
    assert ran == ["body"]


def test_same_call_twice_in_one_header():
    ran = []
    made = []

    def make():
        made.append(Held())
        return made[-1]

    with make(), make(): ran.append("body")  # fmt: skip
    assert len(made) == 1
    made[0]()
    assert len(made) == 2
    made[1]()
    assert ran == ["body"]


def test_two_code_objects_with_one_file_and_line():
    namespace = {"Held": Held, "ran": []}
    for text in ("one", "two"):
        cell(f"held = Held()\nwith held:\n    ran.append({text!r})\n", "<same cell>", namespace)
        namespace["held"].run()
    assert namespace["ran"] == ["one", "two"]


def test_nested_capture_inside_a_captured_body():
    ran = []
    outer, inner = Held(), Held()
    with outer:
        ran.append("outer")
        with inner:
            ran.append("inner")
        ran.append("after")
    outer()
    assert ran == ["outer", "after"]
    inner.run()
    assert ran == ["outer", "after", "inner"]


def test_items_with_text_that_is_not_ascii():
    held, seen = Held(), {}
    with contextlib.nullcontext("é→ü") as text, held, contextlib.nullcontext("日本") as more: seen["text"] = text, more  # fmt: skip
    held.run()
    assert seen == {"text": ("é→ü", "日本")}


def test_header_whose_strings_and_comments_look_like_code():
    held, seen = Held(), []
    with contextlib.nullcontext("with x: # no"), held:  # with y:
        seen.append("""
with z:
  end
""")
    held.run()
    assert seen == ["\nwith z:\n  end\n"]


# --- Tracers


class Recorder:
    """A trace function as a debugger has it."""

    def __init__(self):
        self.lines = []

    def __call__(self, frame, event, argument):
        if frame.f_code.co_name == "watched":
            self.lines.append((event, frame.f_lineno - frame.f_code.co_firstlineno))
        return self

    def function(self, frame, event, argument):
        return self(frame, event, argument) and self.function


def watched(ran):
    held = Held()
    with held:
        ran.append(1)
    after = 1
    return held, after


def record(tracer):
    before = sys.gettrace()
    ran = []
    sys.settrace(tracer)
    try:
        held, _ = watched(ran)
        restored = sys.gettrace()
    finally:
        sys.settrace(before)
    assert ran == []
    held.run()
    assert ran == [1]
    return restored


def test_tracer_that_is_an_object_is_put_back_and_sees_the_lines_after():
    recorder = Recorder()
    assert record(recorder) is recorder
    assert ("line", 4) in recorder.lines
    assert ("line", 5) in recorder.lines
    assert not [event for event, _ in recorder.lines if event == "opcode"]


def test_tracer_that_is_a_method_is_put_back_and_sees_the_lines_after():
    recorder = Recorder()
    function = recorder.function
    assert record(function) is function
    assert ("line", 4) in recorder.lines
    assert ("line", 5) in recorder.lines


def test_without_a_tracer_none_is_left_and_frames_are_as_before():
    before = sys.gettrace(), sys._getframe().f_trace, sys._getframe().f_trace_opcodes
    held = Held()
    with held:
        pass
    assert (sys.gettrace(), sys._getframe().f_trace, sys._getframe().f_trace_opcodes) == before


def test_tracer_written_in_c_does_not_make_the_body_run_in_place():
    """As the C tracer of coverage does: `frame.f_trace` means nothing to it."""
    calls = []
    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    trace = kind(lambda holder, frame, what, argument: calls.append(what) or 0)
    ran = []
    held = Held()
    before = sys.gettrace()
    ctypes.pythonapi.PyEval_SetTrace(trace, ctypes.py_object(Recorder()))
    try:
        with held:
            ran.append(1)
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert ran == []
    assert isinstance(found, Recorder)
    assert calls
    held.run()
    assert ran == [1]


def test_exception_between_entering_and_the_body_is_not_swallowed():
    class Failing(Held):
        def after(self):
            self.leaving.restore()
            raise KeyError("in __enter__")

    with raises(KeyError, "in __enter__"):
        with Failing():
            pass


# --- What a block binds


def test_names_are_written_back_when_the_block_has_run():
    held = Held()
    value = "before"
    with held:
        value = "after"
        new = [value]
    assert value == "before"
    held.run()
    assert value == "after"
    assert new == ["after"]


def test_every_way_to_bind_a_name():
    held = Held()
    with held:
        a = 1
        b: int = 2
        c, (d, *e) = 3, (4, 5, 6)
        if (f := 7) and [g := 8 for _ in range(2)]:
            pass
        for h in (9, 10):
            pass
        with contextlib.nullcontext(11) as i, contextlib.nullcontext((12, 13)) as (j, k):
            pass
        import os.path
        from os import path as m

        def n():
            return 14

        class O:
            value = 15

        a += 100
        match {"x": [16, 17, 18], "y": 19, "z": 20}:
            case {"x": [p, *q], **r}:
                pass
        try:
            raise ValueError(21)
        except ValueError as caught:
            s = caught.args
    held.run()
    assert (a, b, c, d, e, f, g, h, i, j, k) == (101, 2, 3, 4, [5, 6], 7, 8, 10, 11, 12, 13)
    assert os.path is m
    assert (n(), O.value, p, q, r, s) == (14, 15, 16, [17, 18], {"y": 19, "z": 20}, (21,))


def test_name_of_an_except_clause_is_gone_afterwards():
    held = Held()
    with held:
        try:
            raise ValueError
        except ValueError as error:
            kept = type(error)
    held.run()
    assert kept is ValueError
    with raises(NameError):
        error


def test_augmented_assignment_starts_from_the_frame_value():
    held = Held()
    total, items = 10, [1]
    same = items
    with held:
        total += 5
        items += [2]
    held.run()
    assert total == 15
    assert items is same == [1, 2]


def test_augmented_assignment_of_an_attribute_and_an_item():
    class Box:
        n = 1

    box, numbers, held = Box(), [1, 2], Held()
    with held:
        box.n += 1
        numbers[1] *= 5
        numbers[:1] = [7, 8]
    held.run()
    assert (box.n, numbers) == (2, [7, 8, 10])


def test_block_deletes_its_own_name():
    held = Held()
    with held:
        temporary = 1
        kept = temporary + 1
        del temporary
    held.run()
    assert kept == 2
    with raises(NameError):
        temporary


def test_block_deletes_an_item():
    held, values = Held(), {"a": 1, "b": 2}
    with held:
        del values["a"]
    held.run()
    assert values == {"b": 2}


def deletes_name_of_the_function():
    held, value = Held(), 1
    with held:
        del value
    held.run()
    return locals()


def test_deleting_a_name_of_the_function_reaches_it_or_says_that_it_cannot():
    if CAN_DELETE:
        assert "value" not in deletes_name_of_the_function()
    else:
        with raises(CaptureError, "`del value`", "Delete it after the block"):
            deletes_name_of_the_function()


def test_deleting_a_name_of_a_module_reaches_it():
    namespace = {"Held": Held}
    cell("value = 1\nheld = Held()\nwith held:\n    del value\nheld.run()\n", "<deletes>", namespace)
    assert "value" not in namespace


def test_block_binds_in_the_order_they_are_written_back():
    first, second = Held(), Held()
    with first:
        value = 1
    with second:
        value = 2
    second()
    first()
    write_back([first.scope, second.scope])
    assert value == 2


def test_what_a_failing_block_has_bound_is_written_back():
    held = Held()
    with held:
        bound = 1
        raise KeyError(bound)
    with raises(KeyError):
        held()
    write_back([held.scope])
    assert bound == 1


def test_as_binds_a_name_a_pattern_and_nothing():
    class Pair(Held):
        def entered(self):
            return 1, (2, 3)

    pair, seen = Pair(), []
    with pair as (a, [b, c]):
        seen.append((a, b, c))
    assert (a, b, c) == (1, 2, 3)
    pair.scope.function((4, (5, 6)), pair.wait)()
    assert seen == [(4, 5, 6)]


def test_as_binds_an_attribute_in_the_body():
    class Box:
        pass

    box, held = Box(), Held()
    with held as box.value:
        same = box.value is held
    held.run()
    assert same


# --- What a block reads


def test_value_is_the_one_that_held_when_the_block_was_entered():
    blocks, got = [], []
    for i in range(3):
        held = Held()
        with held:
            got.append((i, i * 10))
        blocks.append(held)
    for held in blocks:
        held.run()
    assert got == [(0, 0), (1, 10), (2, 20)]


def test_every_turn_of_a_loop_has_its_own_names():
    blocks, results = [], []
    for i in range(3):
        held = Held(*blocks)
        with held:
            double = i * 2
            results.append(lambda: double)
        blocks.append(held)
    for held in blocks:
        held()
    assert [result() for result in results] == [0, 2, 4]


def test_blocks_that_bind_the_same_names_do_not_see_each_other():
    first, got = Held(), {}
    with first:
        hs = "hsA"
        h1 = "h1A"
        got["A"] = hs + h1
    second = Held(first)
    with second:
        hs = "hsB"
        h1 = "h1B"
        got["B"] = hs + h1
    a, b = first.scope.function(first, first.wait), second.scope.function(second, second.wait)
    b()
    a()
    assert got == {"A": "hsAh1A", "B": "hsBh1B"}


def test_later_block_reads_what_an_earlier_one_has_bound():
    first = Held()
    with first:
        value = 5
    second = Held(first)
    with second:
        twice = value * 2
    first()
    second()
    write_back([first.scope, second.scope])
    assert (value, twice) == (5, 10)


def test_read_of_an_earlier_blocks_name_waits_for_it():
    first = Held()
    with first:
        value = 5
    second = Held(first)
    with second:
        twice = value * 2
    waited = []

    def wait(sibling, name):
        waited.append((sibling is first.scope, name))
        first()

    second.scope.function(second, wait)()
    assert waited == [(True, "value")]
    write_back([second.scope])
    assert twice == 10


def test_nearest_earlier_block_that_binds_the_name_is_read():
    first, second = Held(), None
    with first:
        value = 1
    second = Held(first)
    with second:
        value = 2
    third = Held(first, second)
    with third:
        got = value
    for held in (first, second, third):
        held()
    write_back([third.scope])
    assert got == 2


def test_block_that_ends_without_binding_leaves_the_frame_value():
    value = "frame"
    first, never = Held(), False
    with first:
        if never:
            value = "block"
    second = Held(first)
    with second:
        got = value
    first()
    second()
    write_back([second.scope])
    assert got == "frame"


def test_name_that_nobody_has_bound_is_a_name_error_that_says_so():
    first, never = Held(), False
    with first:
        if never:
            value = 1
    second = Held(first)
    with second:
        value
    first()
    with raises(NameError, "'value'", "no block before this one has bound it"):
        second()


def test_own_binding_wins_over_an_earlier_blocks():
    first = Held()
    with first:
        value = 1
    second = Held(first)
    with second:
        before = value
        value = 2
        after = value
    first()
    second()
    write_back([second.scope])
    assert (before, after, value) == (1, 2, 2)


def test_own_binding_in_one_branch_only():
    first = Held()
    with first:
        value = 1
    for flag in (True, False):
        second = Held(first)
        with second:
            if flag:
                value = 2
            got = value
        if not first.scope.is_over:
            first()
        second()
        write_back([second.scope])
        assert got == (2 if flag else 1)


def test_augmented_assignment_to_an_earlier_blocks_name():
    first = Held()
    with first:
        value = 1
    second = Held(first)
    with second:
        value += 10
    first()
    second()
    write_back([first.scope, second.scope])
    assert value == 11


def test_earlier_blocks_name_is_read_in_functions_lambdas_and_comprehensions():
    first = Held()
    with first:
        value = 3
    second = Held(first)
    with second:

        def function(n=value):
            return n + value

        got = [function(), (lambda: value)(), [value for _ in range(1)], sum(value for _ in range(2))]
        own = [value for value in range(2)]
        shadowed = (lambda value: value)(7)
    first()
    second()
    write_back([second.scope])
    assert got == [6, 3, [3], 6]
    assert (own, shadowed) == ([0, 1], 7)


def test_block_reads_globals_as_they_are_when_it_runs():
    global counter
    held, got = Held(), []
    counter = 1
    with held:
        got.append(counter)
    counter = 2
    held.run()
    assert got == [2]


def test_global_statement_reaches_the_module():
    global counter
    counter = 0
    held = Held()
    with held:
        global counter_two
        counter += 1
        counter_two = counter
    held.run()
    assert (counter, counter_two) == (1, 1)


def test_nonlocal_variable_is_the_one_of_the_function_around():
    def outer():
        value = 1

        def inner():
            nonlocal value
            held = Held()
            with held:
                value += 1
            value = 10
            held.run()
            return value

        return inner(), value

    assert outer() == (11, 11)


def test_variable_that_the_callers_functions_set_stays_live():
    value = 1

    def set_value(new):
        nonlocal value
        value = new

    held, got = Held(), []
    with held:
        got.append(value)
        set_value(5)
        got.append(value)
    set_value(3)
    held.run()
    assert got == [3, 5]


def test_variable_that_the_callers_functions_read_is_seen_by_them():
    value = 1

    def get_value():
        return value

    held, got = Held(), []
    with held:
        value = 2
        got.append(get_value())
    held.run()
    assert got == [2]
    assert get_value() == 2


def test_variable_that_the_callers_functions_only_read_is_each_turns_own():
    blocks, got = [], []
    for i in range(3):

        def get():
            return i

        held = Held()
        with held:
            got.append(i)
        blocks.append(held)
    for held in blocks:
        held.run()
    assert got == [0, 1, 2]


def test_recursive_function_and_class_with_methods_in_a_block():
    held = Held()
    with held:

        def factorial(n):
            return 1 if n < 2 else n * factorial(n - 1)

        class Base:
            def name(self):
                return "base"

        class Derived(Base):
            scale = factorial(3)

            def name(self):
                return super().name() + type(self).__name__

        got = factorial(5), Derived().name(), Derived.scale
    held.run()
    assert got == (120, "baseDerived", 6)


def test_generators_comprehensions_and_lambdas():
    factor, held = 2, Held()
    with held:
        base = 10
        squares = [base + factor * n for n in range(3)]
        table = {n: base for n in range(2)}
        unique = {n % 2 + base for n in range(4)}
        lazily = (base * n for n in range(3))
        by = sorted([3, 1, 2], key=lambda n: -n * factor)
        nested = [[a + b + base for a in range(2)] for b in range(2)]

        def generate():
            yield base
            yield from (base + n for n in range(2))

        listed = list(generate())
    held.run()
    assert squares == [10, 12, 14]
    assert (table, unique, list(lazily), by) == ({0: 10, 1: 10}, {10, 11}, [0, 10, 20], [3, 2, 1])
    assert nested == [[10, 11], [11, 12]]
    assert listed == [10, 10, 11]


def test_functions_of_a_block_share_its_variables():
    held = Held()
    with held:
        count = 0

        def increase():
            nonlocal count
            count += 1
            return count

        got = [increase(), increase(), count]
    held.run()
    assert got == [1, 2, 2]
    assert count == 2


def test_statements_of_all_kinds():
    held, seen = Held(), []
    with held:
        n = 0
        while True:
            n += 1
            if n == 2:
                continue
            if n > 3:
                break
        for i in range(3):
            if i == 1:
                break
        else:
            seen.append("no")
        match (n, i):
            case (4, int() as got) if got:
                seen.append(got)
            case _:
                seen.append("other")
        try:
            with contextlib.suppress(KeyError):
                raise KeyError
            assert n == 4, "message"
        finally:
            seen.append("finally")
        try:
            raise ExceptionGroup("group", [ValueError(1), KeyError(2)])
        except* ValueError as group:
            seen.append(len(group.exceptions))
        except* KeyError:
            seen.append("key")
        text = f"{n!r:>3}{'x' * 2}"
    held.run()
    assert seen == [1, "finally", 1, "key"]
    assert text == "  4xx"


def test_assertions_in_a_block_still_assert():
    held, value = Held(), 1
    with held:
        assert value == 2, "not two"
    with raises(AssertionError, "not two"):
        held.run()


# --- Where a block is written


def decorate(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


@decorate
@functools.lru_cache(
    maxsize=None,
)
def decorated(n):
    held = Held()
    with held:
        value = n + 1
    held.run()
    return value


def test_decorated_function():
    assert [decorated(1), decorated(2)] == [2, 3]


class Owner:
    __secret = 5

    def __init__(self):
        self.__hidden = 7

    def mangled(self):
        held = Held()
        with held:
            __local = self.__hidden + self.__secret
            self.__new = __local
        held.run()
        return __local, self.__new, sorted(vars(self))

    def name(self):
        return "owner"

    @classmethod
    def of_the_class(cls):
        held = Held()
        with held:
            value = cls.__secret
        held.run()
        return value


class Child(Owner):
    def name(self):
        held = Held()
        with held:
            value = super().name() + "!"
        held.run()
        return value

    def defining_class(self):
        held = Held()
        with held:
            value = __class__
        held.run()
        return value

    class Inner:
        def __init__(self):
            held = Held()
            with held:
                self.__x = 1
            held.run()


def test_private_names_are_mangled():
    assert Owner().mangled() == (12, 12, ["_Owner__hidden", "_Owner__new"])
    assert Owner.of_the_class() == 5
    assert vars(Child.Inner()) == {"_Inner__x": 1}


def test_super_without_arguments():
    assert Child().name() == "owner!"
    assert Child().defining_class() is Child


def test_class_body():
    factor = 3

    class Body:
        held = Held()
        before = 2
        with held:
            after = before * factor
            before = 4

            def method(self):
                return factor

        held.run()

    assert (Body.before, Body.after, Body().method()) == (4, 6, 3)


def test_function_inside_a_function_with_free_variables():
    a = 1

    def inner(b):
        c = 3
        held = Held()
        with held:
            got = a, b, c
        held.run()
        return got

    a = 10
    assert inner(2) == (10, 2, 3)


def test_generator_function_holds_blocks_between_its_steps():
    def generate():
        for i in range(2):
            held = Held()
            with held:
                value = i * 10
            held.run()
            yield value

    assert list(generate()) == [0, 10]


def test_async_function():
    async def main():
        held = Held()
        await asyncio.sleep(0)
        with held:
            value = [n for n in range(3)]
        held.run()
        await asyncio.sleep(0)
        return value

    assert asyncio.run(main()) == [0, 1, 2]


def test_lambda_default_and_keyword_only_arguments_of_the_function():
    def function(a, /, b=2, *args, c=3, **kwargs):
        held = Held()
        with held:
            got = a, b, args, c, kwargs
        held.run()
        return got

    assert function(1, 5, 6, c=7, d=8) == (1, 5, (6,), 7, {"d": 8})


def test_module_level_block():
    source = """
        from __main__ import Held
        held = Held()
        x = 1
        with held:
            y = x + 1
            z = [x + n for n in range(2)]
        held.run()
        """
    with held_in_main(), module(source) as (made, _):
        assert (made.y, made.z) == (2, [1, 2])


@contextlib.contextmanager
def held_in_main():
    """Let modules made here import from `__main__`, whatever runs the tests."""
    main = sys.modules["__main__"]
    had = main.__dict__.get("Held")
    main.Held = Held
    try:
        yield
    finally:
        if had is None:
            del main.Held
        else:
            main.Held = had


FUTURE = """
{future}
from __main__ import Held

def run():
    held = Held()
    with held:
        def function(x: undefined_name = 1) -> another:
            return x
    held.run()
    return function
"""


def test_future_flags_are_the_users():
    with held_in_main():
        with module(FUTURE.format(future="from __future__ import annotations")) as (made, _):
            assert made.run().__annotations__ == {"x": "undefined_name", "return": "another"}
        with module(FUTURE.format(future="undefined_name, another = int, str")) as (made, _):
            assert made.run().__annotations__ == {"x": int, "return": str}


RELOADED = """
from __main__ import Held

def run():
    held = Held()
    with held:
        value = {value}
    held.run()
    return value
"""


def rewrite(path, source):
    path.write_text(source, "utf-8")
    stamp = os.stat(path).st_mtime + 10  # as if some time had gone by: bytecode caches look at whole seconds
    os.utime(path, (stamp, stamp))


def test_file_edited_since_its_import_is_an_error():
    with held_in_main(), module(RELOADED.format(value=1)) as (made, path):
        rewrite(path, RELOADED.format(value=2))
        with raises(CaptureError, str(path), "has changed since it was imported", "Reload"):
            made.run()


def test_file_in_which_the_end_of_a_block_has_become_shorter_is_an_error():
    for after in ("int(2)", "int(2) + 1", "int(2) + 1 * 3", ""):
        with held_in_main(), module(RELOADED.format(value="int(2) + 1 * int(2)")) as (made, path):
            rewrite(path, RELOADED.format(value=after) if after else RELOADED.replace("value = {value}", "value = 1"))
            with raises(CaptureError, "has changed since it was imported"):
                made.run()


def test_file_edited_after_the_block_has_run_once_keeps_running_what_was_imported():
    with held_in_main(), module(RELOADED.format(value=1)) as (made, path):
        assert made.run() == 1
        rewrite(path, RELOADED.format(value=2))
        assert made.run() == 1


def test_file_with_lines_added_above_is_an_error():
    with held_in_main(), module(RELOADED.format(value=1)) as (made, path):
        rewrite(path, "\n\n" + RELOADED.format(value=1))
        with raises(CaptureError, "has changed since it was imported"):
            made.run()


def test_file_edited_and_reloaded_runs_the_new_code():
    with held_in_main(), module(RELOADED.format(value=1)) as (made, path):
        assert made.run() == 1
        old = made.run
        rewrite(path, RELOADED.format(value=2))
        assert importlib.reload(made).run() == 2
        assert old() == 1  # known already: what runs is what was imported


def test_other_names_operators_and_constants_are_noticed():
    base = (
        "def run(a=1, b=2):\n    held = Held()\n    with held:\n        {body}\n    held.run()\n    return locals()\n"
    )
    bodies = ["c = a + b", "c = a - b", "c = b + a", "c = a + 1", "c = a.real", "c = a.imag", "d = a + b", "c = a(b)",
              "c = [a for _ in b]", "c = {a for _ in b}", "c = lambda: a", "c = lambda: b", "c = a if b else 1",
              "c = a == b", "c = a != b", "c = not a", "c = -a", "c = f'{a}'", "c = f'{a!r}'", "c = 1.0", "c = 1",
              "c = True", "c = a < b < 1", "c = a[b]", "c = a(x=b)", "c = a(y=b)", "c = (a, b)", "c = [a, b]",
              "c = a is b", "c = a in b", "c = a and b", "c = a or b", "c = 0.0", "c = -0.0"]  # fmt: skip
    for old in bodies:
        namespace = {"Held": Held}
        cell(base.format(body=old), "<noticed>", namespace)
        for new in bodies:
            if new == old:
                continue
            fresh = base.format(body=new)
            linecache.cache["<noticed>"] = (len(fresh), None, fresh.splitlines(keepends=True), "<noticed>")
            with raises(CaptureError, "has changed"):
                namespace["run"]()


def test_notebook_cells_run_again_and_use_their_own_source():
    namespace = {"Held": Held}
    for run, text in ((1, "a = 1"), (2, "a = 2"), (3, "a = 3")):
        cell(f"held = Held()\nwith held:\n    {text}\nheld.run()\n", f"<ipython-input-{run}-abc>", namespace)
        assert namespace["a"] == run


def test_cell_with_top_level_await():
    import ast

    source = "import asyncio\nawait asyncio.sleep(0)\nheld = Held()\nwith held:\n    value = 5\nheld.run()\n"
    name = "<ipython-input-await>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = {"Held": Held, "__name__": "cell"}
    code = compile(source, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    asyncio.run(eval(code, namespace))
    assert namespace["value"] == 5


def test_interactive_statement_with_source():
    source = "with held:\n    [1].count(1)\n    value = 5\n"
    name = "<python-input-1>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = {"held": Held()}
    exec(compile(source, name, "single"), namespace)
    namespace["held"].run()
    assert namespace["value"] == 5


def test_generated_code_that_reuses_a_name_in_linecache():
    results = []
    for value in ("A", "B", "C"):
        namespace = {"Held": Held}
        source = (
            f"def run():\n    held = Held()\n    with held:\n        got = {value!r}\n    held.run()\n    return got\n"
        )
        cell(source, "<generated>", namespace)
        results += [namespace["run"](), namespace["run"]()]
    assert results == ["A", "A", "B", "B", "C", "C"]


def test_generated_code_whose_source_was_replaced_is_an_error():
    namespace = {"Held": Held}
    source = "def run():\n    held = Held()\n    with held:\n        got = {!r}\n    held.run()\n    return got\n"
    cell(source.format("A"), "<replaced>", namespace)
    first = namespace["run"]
    cell(source.format("B"), "<replaced>", namespace)
    with raises(CaptureError, "has changed"):
        first()
    assert namespace["run"]() == "B"


def test_code_without_source_is_an_error_with_the_way_out():
    with raises(CaptureError, "cannot be found", "`exec`", "plain `with model.trace(input):`"):
        exec("held = Held()\nwith held:\n    pass\n", {"Held": Held})


def test_code_without_source_of_a_named_file_is_an_error():
    with raises(CaptureError, "no_such_file.py:2", "cannot be found"):
        exec(compile("held = Held()\nwith held:\n    pass\n", "no_such_file.py", "exec"), {"Held": Held})


def test_python_dash_c():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_capture import Held\n"
        "def run():\n"
        "    held = Held()\n"
        "    with held: value = 5\n"
        "    held.run()\n"
        "    return value\n"
        "print(run())\n"
        "held = Held()\n"
        "with held:\n"
        "    outside = [n for n in range(2)]\n"
        "held.run()\n"
        "print(outside)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "5\n[0, 1]\n", done.stderr


def test_file_with_tabs_and_windows_line_ends():
    source = "from __main__ import Held\r\ndef run():\r\n\theld = Held()\r\n\twith held:\r\n\t\tvalue = 5\r\n\theld.run()\r\n\treturn value\r\n"
    with tempfile.TemporaryDirectory() as folder, held_in_main():
        path = Path(folder, "windows_lines.py")
        path.write_bytes(source.encode())
        sys.path.insert(0, folder)
        try:
            assert importlib.import_module("windows_lines").run() == 5
        finally:
            sys.path.remove(folder)
            sys.modules.pop("windows_lines", None)


# --- What cannot be captured


def refused(body, *parts, around="def run():\n    for _ in [1]:\n        with Held():\n{body}\n", call=True):
    """Assert that a block with this body is refused with these parts in the message, naming the line."""
    namespace = {"Held": Held}
    text = around.format(body=textwrap.indent(textwrap.dedent(body), "            "))
    cell(text, "<refused>", namespace)
    with raises(CaptureError, "<refused>:", *parts):
        result = namespace["run"]()
        if call:
            list(result) if hasattr(result, "__iter__") else asyncio.run(result)


def test_statements_that_leave_the_block_are_refused():
    refused("x = 1\nreturn x", "`return`", "<refused>:5", "return it after the block")
    refused("yield 1", "`yield`", "<refused>:4", "yield them after the block")
    refused("yield from [1]", "`yield from`", "<refused>:4")
    refused("if 1:\n    break", "`break`", "<refused>:5", "break after it")
    refused("continue", "`continue`", "<refused>:4", "use `if`")


def test_await_is_refused():
    around = "async def run():\n    for _ in [1]:\n        with Held():\n{body}\n"
    refused("await x", "`await`", "<refused>:4", "await before the block", around=around)
    refused("async with x:\n    pass", "`async with`", "<refused>:4", around=around)
    refused("async for _ in x:\n    pass", "`async for`", "<refused>:4", around=around)
    refused("y = [_ async for _ in x]", "`async", "<refused>:4", around=around)


def test_import_star_is_refused():
    namespace = {"Held": Held}
    with raises(CaptureError, "`import *`", "one by one"):
        cell("held = Held()\nwith held:\n    from os import *\n", "<star>", namespace)


def test_return_and_break_that_stay_inside_are_not_refused():
    held = Held()
    with held:

        def function():
            for i in range(5):
                if i == 2:
                    return i
            return None

        async def asynchronous():
            await asyncio.sleep(0)
            return [x async for x in aiter_of()]

        async def aiter_of():
            yield 1

        while True:
            for _ in range(2):
                continue
            break
        got = function(), (lambda: (yield 1)), asyncio.run(asynchronous())
    held.run()
    assert got[0] == 2
    assert got[2] == [1]


def test_break_in_the_else_of_a_loop_leaves_the_block():
    refused("for _ in []:\n    pass\nelse:\n    break", "`break`", "<refused>:7")


def test_block_that_was_refused_does_not_run_in_place():
    ran = []
    namespace = {"Held": Held, "ran": ran}
    cell("def run():\n    with Held():\n        ran.append(1)\n        return 5\n", "<refused>", namespace)
    with raises(CaptureError):
        namespace["run"]()
    assert ran == []
    assert sys.gettrace() is None or sys.gettrace().__module__ != "nnsight.capture.leave"


# --- Errors and tracebacks


def test_traceback_shows_the_users_line():
    held = Held()
    with held:
        first = 1
        first / 0  # here
    try:
        held.run()
    except ZeroDivisionError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.line == "first / 0  # here"
        assert last.filename == __file__
        assert last.name == "test_traceback_shows_the_users_line"
    else:
        raise AssertionError("did not raise")


def test_user_exceptions_keep_their_chain():
    held = Held()
    with held:
        try:
            {}["missing"]
        except KeyError as error:
            raise ValueError("outer") from error
    try:
        held.run()
    except ValueError as error:
        assert isinstance(error.__cause__, KeyError)
    else:
        raise AssertionError("did not raise")


# --- What is left


class Thing:
    pass


def uses_a_thing(fail):
    thing = Thing()
    held = Held()
    with held:
        inner = [thing for _ in range(2)]
        if fail:
            raise KeyError(len(inner))
    try:
        held.run()
    except KeyError:
        held.scope.close()
    return weakref.ref(thing)


def test_nothing_is_kept_without_the_cyclic_collector():
    uses_a_thing(fail=False)
    gc.collect()
    gc.disable()
    try:
        for fail in (False, True):
            assert uses_a_thing(fail)() is None
    finally:
        gc.enable()


def deletes_inside_the_function():
    thing = Thing()
    reference = weakref.ref(thing)
    held = Held()
    with held:
        got = id(thing)
    held.run()
    del thing
    return reference(), got


def test_variable_deleted_in_the_same_function_is_freed():
    gc.disable()
    try:
        assert deletes_inside_the_function()[0] is None
    finally:
        gc.enable()


def test_code_that_is_gone_is_not_kept():
    namespace = {"Held": Held}
    cell(
        "def run():\n    held = Held()\n    with held:\n        x = [n for n in range(2)]\n    held.run()\n",
        "<gone>",
        namespace,
    )
    namespace["run"]()
    reference = weakref.ref(namespace["run"].__code__)
    namespace.clear()
    gc.collect()
    assert reference() is None


def test_block_can_be_run_many_times_with_variables_of_its_own():
    held, got = Held(), []
    start = 5
    with held:
        start += 1
        got.append(start)
    for _ in range(3):
        again = held.scope.again()
        again.function(None, held.wait)()
    assert got == [6, 6, 6]
    assert start == 5


# --- Calls that are the item of a `with`


class Item:
    def __init__(self):
        self.is_item = is_with_item(sys._getframe(1))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_call_that_a_with_enters_is_told_from_one_that_it_does_not():
    with Item() as direct:
        pass
    plain = Item()
    with contextlib.nullcontext(Item()) as argument:
        pass
    with plain:
        inside = Item()
    with contextlib.nullcontext(), Item() as second:
        pass
    with contextlib.nullcontext(): one_line = Item()  # fmt: skip
    assert direct.is_item
    assert second.is_item
    assert not plain.is_item
    assert not argument.is_item
    assert not inside.is_item
    assert not one_line.is_item


if __name__ == "__main__":
    sys.modules.setdefault("test_capture", sys.modules["__main__"])
    tests = {name: value for name, value in globals().items() if name.startswith("test_")}
    failed = 0
    for name, test in tests.items():
        try:
            test()
        except Exception:
            failed += 1
            print(name)
            traceback.print_exc()
    print(f"{len(tests)} tests, {failed} failed")
    sys.exit(1 if failed else 0)
