"""`python -m nnsight stubs`: what type checkers make of the stub, and what it says when there is no model."""

import re
import subprocess
import sys

import checkers
import pytest

from nnsight import Envoy, NNsight
from nnsight.builtin.stubs import write_stub

NETS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.input = nn.Identity()
        self.width = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.input(self.mlp(self.attn(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.parts = nn.ModuleDict({"head": nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return self.parts["head"](x)


net = Net()
number = 3


def named():
    from nnsight import NNsight

    return NNsight(Net(), rename={"h": "layers", "attn": "self_attn"})


def needy(size):
    return Net()
"""
USE = """
from typing import TYPE_CHECKING, cast

import torch
from nets import Net
from nnsight import NNsight

if TYPE_CHECKING:
    from net_tree import Model

model = cast("Model", NNsight(Net()))
with model.trace(torch.rand(2, 4)) as tracer:
    model.h[0].attn.output[:] = 0
    hidden = model.h[-1].mlp[1].output.save()
    model.h[2].mlp.output = hidden * 2
    inner = model.h[2].E_input.output
    result = tracer.result
plain = model.trace(torch.rand(2, 4), trace=False)
print(hidden.shape, inner, result, plain, model.h[0].mlp.path, [block.attn.weight.shape for block in model.h])
reveal_type(model.h[0].attn)
reveal_type(model.h[0].mlp[1])
reveal_type(model.h[0].width)
reveal_type(model.h[1].attn.weight)
reveal_type(model.parts["head"])
"""
PROGRAMS = ("use.py", "misspelt.py")  # one run of a checker for both: it takes seconds to start
REVEALED = ["Linear", "ReLU", "int", "Tensor", "Linear"]
MISSPELT = """
from net_tree import Model

def use(model: Model) -> None:
    model.hh
    model.h[0].atn
    model.h[0].attn.weight.shpe
    model.h[0].attn.outputs
    model.parts["heda"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, their stub, and programs that use it."""
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "nets.py").write_text(NETS)
    (folder / "use.py").write_text(USE)
    (folder / "misspelt.py").write_text(MISSPELT)
    done = stubs(folder, "nets:Net", "-o", "net_tree.pyi")
    assert done.returncode == 0, done.stderr
    assert 'model = cast("Model", NNsight(Net()))' in done.stdout and "from net_tree import Model" in done.stdout
    return folder


def stubs(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "nnsight", "stubs", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("check", [checkers.mypy, checkers.pyright])
def test_checkers_know_the_parts_of_the_model(folder, check):
    report, errors = check(folder, *PROGRAMS)
    assert [error for error in errors if error[0] == "use.py"] == []
    revealed = re.findall(r'(?:Revealed type is|Type of ".*" is) "([\w.]+)"', report)
    assert [name.rpartition(".")[2] for name in revealed] == REVEALED


@pytest.mark.slow
@pytest.mark.parametrize("check", [checkers.mypy, checkers.pyright])
def test_checkers_reject_a_misspelt_part(folder, check):
    _, errors = check(folder, *PROGRAMS)
    assert sorted({line for file, line, _ in errors if file == "misspelt.py"}) == [5, 6, 7, 8, 9]
    assert any("atn" in text for _, _, text in errors)


def test_the_program_that_the_checkers_accept_runs(folder):
    program = (folder / "use.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", re.sub(r"reveal_type\(.*\)\n", "", program)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_an_envoy_is_in_the_stub(folder):
    text = (folder / "net_tree.pyi").read_text()
    base = text[text.index("class _Envoy") : text.index("class Linear")]
    missing = [name for name in dir(Envoy) if not name.startswith("_") and not re.search(rf"\b{name}[:(]", base)]
    assert missing == []


def test_aliases_are_in_the_stub(folder):
    done = stubs(folder, "nets:named", "-o", "named_tree.pyi")
    assert done.returncode == 0, done.stderr
    text = (folder / "named_tree.pyi").read_text()
    assert "    layers: ModuleList\n" in text and "    self_attn: Linear\n" in text
    assert 'model = cast("Model", named())' in done.stdout


def test_parts_of_one_shape_share_a_class():
    from torch import nn

    def body(cls, text):
        return text[text.index(f"class {cls}(") :].split("\nclass ")[0]

    text = write_stub(NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(2, 2, bias=False))))
    assert text.count("class Linear(") == 1 and text.count("class Linear_2(") == 1
    assert "bias: torch.Tensor" in body("Linear", text) and "bias: torch.Tensor" not in body("Linear_2", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing_here:net"], "importing 'nothing_here' failed"),
        (["nets:nat"], "has no attribute 'nat'"),
        (["nets:number"], "is of type int: give a model"),
        (["nets:needy"], "cannot be called without arguments"),
        ([":net"], "importing '' failed"),
        (["nets:net", "-o", "nowhere/at/all.pyi"], "cannot be written"),
        (["nets:net", "-o", "nets.py"], "is no stub of ours"),
        (["nets:net", "--standard-names"], "is for a repository"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(folder, arguments, message):
    done = stubs(folder, *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert (folder / "nets.py").read_text() == NETS


def test_a_stub_is_written_over_and_usage_errors_are_told(folder):
    assert stubs(folder, "nets:net", "-o", "again.pyi").returncode == 0
    assert stubs(folder, "nets:net", "-o", "again.pyi").returncode == 0
    assert stubs(folder).returncode == 2
