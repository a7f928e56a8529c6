"""What programs of the 0.6 series import for blocks that run elsewhere."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import nnsight
from nnsight import InputError

PROGRAM = """
    import sys
    sys.path.insert(0, {folder!r})
    import torch
    from torch import nn
    from nnsight import NNsight
    from nnsight.ndif import register
    import installed_one

    model = NNsight(nn.Linear(2, 2))
    x = torch.ones(1, 2)
    if {is_registered}:
        register(installed_one)
    with model.trace(x, remote="local"):
        doubled = installed_one.doubled(model.output).save()
    assert torch.equal(doubled, 2 * model._module(x))
    print("it ran")
"""


@pytest.fixture
def run(tmp_path):
    """A function that runs a program that uses an installed package which the runner does not have."""

    def run(is_registered):
        package = tmp_path / "site-packages" / "installed_one"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("BY = 2\ndef doubled(value):\n    return value * BY\n")
        program = tmp_path / "program.py"
        program.write_text(textwrap.dedent(PROGRAM.format(folder=str(package.parent), is_registered=is_registered)))
        return subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)

    return run


def test_a_registered_package_need_not_be_there(run):
    ran = run(True)
    assert ran.stdout == "it ran\n", ran.stderr


def test_without_it_the_error_names_the_package(run):
    assert "No module named 'installed_one'" in run(False).stderr


def test_the_class_of_servers_can_be_imported_and_says_that_there_is_none():
    from nnsight.intervention.backends.remote import RemoteBackend

    assert RemoteBackend is nnsight.RemoteBackend is nnsight.ndif.RemoteBackend
    assert not isinstance(None, RemoteBackend)
    with pytest.raises(InputError, match=r"RemoteBackend.*no client for a server.*remote='local'"):
        RemoteBackend("openai-community/gpt2", blocking=False)
