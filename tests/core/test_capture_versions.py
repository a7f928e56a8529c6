"""The tests of captured blocks under the other interpreters that the library is for, in interpreters without packages."""  # noqa: E501

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CORE_SOURCE

VERSIONS = ["3.11", "3.12", "3.13"]


def interpreter(version):
    """Return an interpreter of a version: from pyenv, or on the path; None where there is none."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [str(path / "bin" / "python") for path in sorted(root.glob(f"versions/{version}.*"))]
    candidates += filter(None, [shutil.which(f"python{version}")])
    for candidate in candidates:
        try:
            done = subprocess.run([candidate, "-V"], capture_output=True, text=True, timeout=20)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.startswith(f"Python {version}."):
            return candidate
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_captured_blocks(version):
    found = interpreter(version)
    if found is None and f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        found = sys.executable
    if found is None:
        pytest.skip(f"there is no python{version} here, neither in pyenv nor on the path")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [found, "-W", "error", "-B", str(Path(__file__).with_name("test_capture.py"))],
        env={**environment, "PYTHONPATH": str(CORE_SOURCE)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed" in done.stdout
