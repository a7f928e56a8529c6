"""Fixtures for the tests of a plugin: `pytest_plugins = ["nnsight.testing.fixtures"]` in its `conftest.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from nnsight.testing._loading import LoadedPlugin, loaded_plugin


@pytest.fixture
def load_plugin() -> Iterator[Callable[..., LoadedPlugin]]:
    """A function that loads a plugin until the test is over; arguments as `loaded_plugin`.

    For a longer time write a fixture around `with loaded_plugin(folder):`.
    """
    with contextlib.ExitStack() as stack:

        def load(*args: object, **kwargs: object) -> LoadedPlugin:
            return stack.enter_context(loaded_plugin(*args, **kwargs))  # type: ignore[arg-type]

        yield load
