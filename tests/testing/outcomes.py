"""Running the tests of a suite without pytest's report, to see which of them find something broken."""

from __future__ import annotations

import pytest


def failing(suite, *names):
    """Run the tests of a suite and return the names of those that fail."""
    failed = set()
    for name in sorted(names or (name for name in dir(suite) if name.startswith("test_"))):
        try:
            getattr(suite(), name)()
        except (Exception, pytest.fail.Exception):
            failed.add(name)
    return failed
