"""No test of a suite is lost without a reason: by a name used twice, a class mixed in or a typing error."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from nnsight import ConformanceError
from nnsight.testing import ModelConformance, changed, dropped, reasons

NAME = "test_scan_gives_the_shapes_of_a_run"


def test_replacing_a_test_needs_a_reason():
    with pytest.raises(ConformanceError, match=rf"Mine replaces {NAME} of Features .*@changed\(.*dropped\("):

        class Mine(ModelConformance):
            def test_scan_gives_the_shapes_of_a_run(self):
                pass


@pytest.mark.parametrize("value", [None, False, "no", 3])
def test_taking_a_test_away_needs_a_reason(value):
    with pytest.raises(ConformanceError, match=f"replaces {NAME}"):
        type("Mine", (ModelConformance,), {NAME: value})


def test_a_class_mixed_in_cannot_take_a_test_away():
    mixin = type("Mixin", (), {NAME: lambda self: None})
    with pytest.raises(ConformanceError, match=rf"{NAME} of Features \(by that of Mixin\)"):
        type("Mine", (mixin, ModelConformance), {})


def test_a_subclass_of_a_subclass_is_held_to_it_too():
    mine = type("Mine", (ModelConformance,), {NAME: dropped("its forward reads values")})
    with pytest.raises(ConformanceError, match="does not say why"):
        type("Ours", (mine,), {NAME: lambda self: None})
    assert reasons(type("Theirs", (mine,), {})) == {NAME: "its forward reads values"}


@pytest.mark.parametrize("reason", ["", "   ", "no", None, 3])
def test_a_reason_that_says_nothing_is_refused(reason):
    with pytest.raises(ConformanceError, match="is a sentence or a part of one"):
        dropped(reason)
    with pytest.raises(ConformanceError, match="is a sentence or a part of one"):
        changed(reason)


def test_a_reason_for_a_test_that_does_not_exist_names_the_nearest():
    with pytest.raises(ConformanceError, match=rf"test_scan_gives_shapes, but.*did you mean.*{NAME}"):
        type("Mine", (ModelConformance,), {"test_scan_gives_shapes": dropped("its forward reads values")})
    own = changed("there is nothing to change")(lambda self: None)
    with pytest.raises(ConformanceError, match="has no such test"):
        type("Mine", (ModelConformance,), {"test_of_my_own": own})


def test_own_tests_and_helpers_need_no_reason():
    type("Mine", (ModelConformance,), {"test_of_my_own": lambda self: None, "loss": lambda self, result: result})


def test_reasons_lists_what_was_changed():
    own = changed("rows are along dim 1")(lambda self: None)
    mine = type("Mine", (ModelConformance,), {NAME: own, "test_pickled_model_is_the_same": dropped("it holds a file")})
    assert reasons(mine) == {NAME: "rows are along dim 1", "test_pickled_model_is_the_same": "it holds a file"}
    assert reasons(ModelConformance) == {}


PROGRAM = """
    import torch
    from nnsight.testing import ModelConformance, changed, dropped

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.first(x)
            return self.second(hidden if hidden.isfinite().all() else torch.zeros_like(hidden))

    class TestReads(ModelConformance):
        test_scan_gives_the_shapes_of_a_run = dropped("the forward reads values")
        {more}

        def make_module(self):
            return Reads()

        def inputs(self):
            return [torch.ones(1, 4), -torch.ones(2, 4)]
    """


def pytest_of(tmp_path, more):
    path = tmp_path / "test_reads.py"
    path.write_text(textwrap.dedent(PROGRAM.format(more=more)))
    command = [sys.executable, "-m", "pytest", "-q", "-rxX", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command += ["-k", "scan or pickled or mirrors", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    return done.returncode, done.stdout


def test_a_dropped_test_runs_and_its_reason_is_reported(tmp_path):
    more = "test_pickled_model_is_the_same = dropped('it would hang here', run=False)"
    code, out = pytest_of(tmp_path, more)
    assert code == 0, out
    assert "test_scan_gives_the_shapes_of_a_run - the forward reads values" in out
    assert "test_pickled_model_is_the_same - [NOTRUN] it would hang here" in out
    assert "2 xfailed" in out


def test_a_dropped_test_that_would_pass_fails(tmp_path):
    code, out = pytest_of(tmp_path, "test_the_tree_mirrors_the_module = dropped('this is not true')")
    assert code == 1
    assert "[XPASS(strict)] this is not true" in out
    assert "1 failed" in out
