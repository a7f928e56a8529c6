"""What every suite is: a class of tests that a subclass may replace or drop, each only with a reason.

The reason is asked for when the class is made, so that a test cannot be lost by giving something else its name.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import pytest

from nnsight.errors import ConformanceError

Test = TypeVar("Test", bound=Callable[..., Any])

Raises = type[BaseException] | tuple[type[BaseException], ...] | None

_REASON = "_nnsight_reason"


class Dropped:
    """Stands in a class for a test of the suite that it does not keep.

    Args:
        reason: why.
        is_run: whether the test runs and has to fail.
        raises: with what it has to fail; None for anything.
    """

    def __init__(self, reason: str, is_run: bool, raises: Raises) -> None:
        self.reason = reason
        self.is_run = is_run
        self.raises = raises

    def instead_of(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """Return what the class has in the place of the test: the test, expected to fail."""

        @functools.wraps(test)
        def expected_to_fail(*args: Any, **kwargs: Any) -> Any:
            return test(*args, **kwargs)

        setattr(expected_to_fail, _REASON, self.reason)
        marked: Callable[..., Any] = pytest.mark.xfail(
            reason=self.reason, run=self.is_run, raises=self.raises, strict=True
        )(expected_to_fail)
        return marked


def dropped(reason: str, *, run: bool = True, raises: Raises = None) -> Any:
    """Leave a test of a suite out.

    It stands in the class under the test's name: `test_scan_gives_shapes = dropped("the forward reads values")`.
    It still runs and has to fail, so that a reason which has become untrue is noticed.

    Args:
        reason: why the model or transport cannot keep to it; it is shown in the report of the tests.
        run: False for a test that must not even be tried, because it would hang or crash.
        raises: the error that the test has to fail with, where the model or transport refuses by one.

    Raises:
        ConformanceError: the reason says nothing.
    """
    return Dropped(_checked(reason), run, raises)


def changed(reason: str) -> Callable[[Test], Test]:
    """Replace a test of a suite by one's own: `@changed("rows are along dim 1")` above a method of its name.

    Args:
        reason: why the suite's own test does not fit.

    Raises:
        ConformanceError: the reason says nothing.
    """
    text = _checked(reason)

    def mark(test: Test) -> Test:
        setattr(test, _REASON, text)
        return test

    return mark


def reasons(suite: type[Suite]) -> dict[str, str]:
    """Return the tests that a suite's subclass has replaced or dropped, and why."""
    found = {name: getattr(suite, name, None) for name in _tests_of(suite)}
    return {name: getattr(test, _REASON) for name, test in found.items() if hasattr(test, _REASON)}


class Suite:
    """Base of the suites. A subclass whose name begins with `Test` is collected by pytest."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            if isinstance(value, Dropped):
                setattr(cls, name, value.instead_of(_inherited(cls, name)))
            elif hasattr(value, _REASON):
                _inherited(cls, name)
        for name in _tests_of(cls):
            _check(cls, name)


def _tests_of(suite: type) -> set[str]:
    bases = [base for base in suite.__mro__ if issubclass(base, Suite)]
    return {name for base in bases for name in vars(base) if name.startswith("test")}


def _owners(suite: type, name: str) -> list[type]:
    return [base for base in suite.__mro__ if name in vars(base)]


def _check(suite: type, name: str) -> None:
    """Raise when a test of a suite has become something else without a reason, also by a class that is mixed in."""
    owners = _owners(suite, name)
    if len(owners) > 1 and not hasattr(inspect.getattr_static(suite, name), _REASON):
        raise ConformanceError(
            f"{suite.__name__} replaces {name} of {owners[-1].__name__} (by that of {owners[0].__name__}) and does not "
            f'say why. Put @changed("the reason") above it, or leave the test out with {name} = dropped("the reason").'
        )


def _inherited(suite: type, name: str) -> Callable[..., Any]:
    """Return the test that a class stands in for."""
    owners = [base for base in _owners(suite, name)[1:] if issubclass(base, Suite)]
    if not owners:
        _no_such_test(suite, name)
    test: Callable[..., Any] = vars(owners[0])[name]
    return test


def _no_such_test(suite: type, name: str) -> NoReturn:
    tests = {test for base in suite.__mro__[1:] if issubclass(base, Suite) for test in vars(base)}
    near = difflib.get_close_matches(name, [test for test in tests if test.startswith("test")], n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ConformanceError(f"{suite.__name__} gives a reason for {name}, but its suite has no such test{hint}")


def _checked(reason: Any) -> str:
    if isinstance(reason, str) and len(reason.split()) > 1:
        return reason
    raise ConformanceError(f"A reason to drop or change a test is a sentence or a part of one, not {reason!r}.")
