"""What holds for every test: no network, and one torch thread.

Where the system cannot isolate blocks as they should be (many containers), those of the tests run with what there is:
they are our own. Which measures are missing is printed at the start, and the tests of isolation itself are skipped.
"""

from __future__ import annotations

import os
import sys

# Before anything else: huggingface_hub reads it while it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from nnsight_ndif import isolation

WAIVED = "NNSIGHT_ALLOW_MISSING"
_missing: dict[str, str] = {}


def pytest_configure():
    if WAIVED not in os.environ and sys.platform == "linux":
        _missing.update(isolation.missing())
        if _missing:
            os.environ[WAIVED] = ",".join(_missing)


def pytest_report_header():
    return [f"runners without {name}: {reason}" for name, reason in _missing.items()]


@pytest.fixture(autouse=True)
def _one_torch_thread():
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
