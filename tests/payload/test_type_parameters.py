"""Functions and classes with type parameters (PEP 695) travel as others do."""

from __future__ import annotations

import importlib
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is new in Python 3.12")

TEXT = """
class Box[T]:
    held: T

    def __init__(self, value: T) -> None:
        self.value = value

    def get(self) -> T:
        return self.value


class Doubled(Box[int]):
    def twice(self) -> int:
        return self.get() * 2


def first[T](items: list[T]) -> T:
    return items[0]


def around(number):
    class Inner[T]:
        def get(self) -> int:
            return number

    def paired[T](value: T) -> tuple[T, int]:
        return value, number

    return Inner, paired
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "with_type_parameters.py").write_text(TEXT)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("with_type_parameters")
    del sys.modules["with_type_parameters"]


def test_classes_and_their_instances(send, module):
    kind, box, doubled = send(module.Box, module.Box("a"), module.Doubled(3))
    assert box.get() == "a" and doubled.twice() == 6
    assert type(box) is kind and isinstance(doubled, kind) and kind is not module.Box
    assert kind[int](4).get() == 4 and kind.__type_params__[0].__name__ == "T"
    assert (kind.__qualname__, kind.get.__qualname__) == ("Box", "Box.get")


def test_functions_and_what_is_defined_in_functions(send, module):
    inner, paired = module.around(5)
    first, there, there_paired = send(module.first, inner, paired)
    assert first([7, 8]) == 7
    assert there().get() == 5 and there_paired("a") == ("a", 5)
    assert there.__qualname__ == "around.<locals>.Inner"
