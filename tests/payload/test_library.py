"""What installed packages define arrives by name, and what was registered as source."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from nnsight import InputError, payload
from nnsight.payload import library

PACKAGE = {
    "__init__.py": "from installed_one.inner import Scale, doubled\n",
    "inner.py": """
import functools
import torch

BY = 2

def doubled(value):
    return _times(value, BY)

def _times(value, by):
    return value * by

def decorated(function):
    @functools.wraps(function)
    def inner(value):
        return function(value) + 1
    return inner

class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, value):
        return doubled(value) * self.by
""",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package in a folder of installed packages, forgotten again afterwards."""
    folder = tmp_path / "site-packages" / "installed_one"
    folder.mkdir(parents=True)
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(library, "_registered", set())
    library._roots.cache_clear()
    yield importlib.import_module("installed_one")
    library._roots.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "installed_one"]:
        del sys.modules[name]


def test_it_arrives_by_name_unless_it_is_registered(installed, send):
    assert send(installed.doubled) is installed.doubled
    payload.register(installed)
    arrived = send(installed.doubled)
    assert arrived is not installed.doubled
    assert torch.equal(arrived(torch.ones(2)), 2 * torch.ones(2))


@pytest.mark.parametrize("name", ["installed_one", "installed_one.inner"])
def test_registered_by_name_what_is_in_it_arrives_without_the_package(installed, send, name):
    payload.register(name)
    plus_one = installed.inner.decorated(lambda value: value)
    arrived = send(installed.Scale(5), installed.inner._times, plus_one)
    assert type(arrived[0]) is not installed.Scale
    assert arrived[0](1) == 10 and arrived[1](3, 4) == 12 and arrived[2](1) == 2


def test_other_packages_still_arrive_by_name(installed, send):
    payload.register("installed_one")
    assert send(torch.nn.functional.relu) is torch.nn.functional.relu


@pytest.mark.parametrize("wrong", ["installed_two", "installed_one.outer", "not a name", "", None, 3, "/etc/passwd"])
def test_what_is_no_module_is_an_error_that_names_it(installed, wrong):
    with pytest.raises(InputError, match="there is no such module here") as caught:
        payload.register(wrong)
    assert repr(wrong) in str(caught.value)
