"""Conformance of transports: what a block is made of, what it knows, and what is told of it."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import math
import traceback
import warnings
from typing import Any

import pytest
import torch

from nnsight.errors import MissedProviderError, OutOfOrderError
from nnsight.testing._model import same
from nnsight.testing._transport import TransportSuite
from nnsight.tracing.saving import save

FACTOR = 3.0


class Kind(enum.Enum):
    """A class of the file that a program is in."""

    DOUBLE = 2


@dataclasses.dataclass
class Settings:
    """One with a tensor, a method and another class in it."""

    kind: Kind
    bias: torch.Tensor

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden, scaled and moved."""
        return scaled(hidden) * self.kind.value + self.bias


def scaled(hidden: torch.Tensor, by: float = FACTOR) -> torch.Tensor:
    """Return hidden, by a function that calls another one."""
    return twice(hidden, 2) * by


def twice(hidden: torch.Tensor, depth: int) -> torch.Tensor:
    """Return hidden, by a function that calls itself."""
    return hidden if depth == 0 else twice(hidden, depth - 1) * 2


class OwnError(LookupError):
    """An error of the file that a program is in."""


def fails(value: object) -> None:
    """Raise at a line that a test looks for."""
    raise OwnError(value, "here")


class Blocks(TransportSuite):
    """Python in a block."""

    def test_variables_of_the_caller_are_there(self) -> None:
        model, x = self.net(), self.x()
        scale, table, words, number = torch.full((8,), 3.0), {"by": [1.0, 2.0]}, ("a", None, True), 2
        with self.transport.around(model.trace) as run, run(x) as _:
            hidden = model.h[0].output * scale + table["by"][1] * number
            model.h[0].output = hidden
            told = save([words[0], words[1], words[2], math.floor(2.5)])
            result = save(model.output)

        def change(value: torch.Tensor) -> torch.Tensor:
            return value * scale + table["by"][1] * number

        same(result.detach(), self.plain(model, x, {("h.0", "output", 0): change}).result, "the result")
        assert told == ["a", None, True, 2]

    def test_functions_and_classes_of_the_file_are_there(self) -> None:
        model, x = self.net(), self.x()
        shift = 0.5

        def shifted(hidden: torch.Tensor, *, again: bool = True) -> torch.Tensor:
            return shifted(hidden, again=False) if again else hidden + shift

        settings = Settings(Kind.DOUBLE, torch.ones(8))
        with self.transport.around(model.trace) as run, run(x) as _:
            model.h[0].output = settings.apply(shifted(model.h[0].output))
            result = save(model.output)
            is_own = save([type(settings) is Settings, settings.kind is Kind.DOUBLE])

        def change(value: torch.Tensor) -> torch.Tensor:
            return settings.apply(shifted(value))

        same(result.detach(), self.plain(model, x, {("h.0", "output", 0): change}).result, "the result")
        assert is_own == [True, True]

    def test_statements_of_every_kind_run(self) -> None:
        model, x = self.net(), self.x()
        log: list[Any] = []
        with self.transport.around(model.trace) as run, run(x) as _:
            import itertools  # a block may import

            log = save([])
            for index, layer in enumerate(model.h):
                if index == 1:
                    continue
                if (mean := layer.output.mean()) > 1000:
                    break
                log.append(mean.item())
            try:
                log.append(1 / 0)
            except ZeroDivisionError as error:
                log.append(type(error).__name__)
            finally:
                log.append("finally")
            with torch.no_grad():
                log.append(torch.is_grad_enabled())
            total = sum(itertools.repeat(2, 3))
            log.append((lambda number: number + total)(1))
            result = save(model.output)
        values = {(v.path, v.port): v.value for v in self.plain(model, x).visits}
        means = [float(values[f"h.{index}", "output"].mean()) for index in (0, 2)]
        assert log == [*means, "ZeroDivisionError", "finally", False, 7]
        same(result.detach(), values["", "output"], "the result")

    def test_function_in_a_block_counts_in_a_variable_of_the_block(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            total = 0

            def add(number: int) -> int:
                nonlocal total
                total += number
                return total

            counts = save([add(layer.output.shape[1]) for layer in model.h])
        assert counts == [8, 16, 24]

    def test_branch_follows_the_value(self) -> None:
        model = self.net()
        for seed in range(4):
            x = self.x(seed)
            with self.transport.around(model.trace) as run, run(x) as _:
                if model.h[0].output[0, 0] > 0:
                    model.h[1].output = model.h[1].output * 0
                result = save(model.output)

            def change(value: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
                bare = model._module
                return value * 0 if bare.h[0](bare.emb(x))[0, 0] > 0 else value

            same(result.detach(), self.plain(model, x, {("h.1", "output", 0): change}).result, "the result")

    def test_what_was_saved_comes_back_under_its_name(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            found = save([layer.output for layer in model.h])
            named = save({"shape": tuple(found[0].shape), "mean": found[1].mean().item(), "none": None})
            number, text = save(len(found)), save("a" * 3)
            first, *rest = (save(part) for part in found)
            rest = save(rest)
        values = [
            v.value for v in self.plain(model, x).visits if v.path in ("h.0", "h.1", "h.2") and v.port == "output"
        ]
        same([one.detach() for one in found], values, "a list of values")
        assert named == {"shape": (2, 8), "mean": values[1].mean().item(), "none": None}
        assert (number, text, len(rest)) == (3, "aaa", 2)
        same(first.detach(), values[0], "a value that was unpacked")

    def test_method_save_marks_as_the_function_does(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            hidden: Any = model.h[0].output
            kept: Any = (hidden + 1).save()
            shape: Any = tuple(hidden.shape)
            size = shape.save()
        value = next(v.value for v in self.plain(model, x).visits if (v.path, v.port) == ("h.0", "output"))
        same(kept.detach(), value + 1, "a saved value")
        assert size == (2, 8)
        assert not hasattr(kept, "save")

    def test_block_that_asks_for_nothing_runs(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            total = save(sum(range(5)))
        assert total == 10

    def test_prints_and_warnings_are_told(self) -> None:
        model, x = self.net(), self.x()
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with self.transport.around(model.trace) as run, run(x) as _:
                print("shape", tuple(model.h[0].output.shape))
                warnings.warn("careful", FutureWarning, stacklevel=1)
        assert out.getvalue() == "shape (2, 8)\n"
        told = [(one.category, str(one.message), one.filename) for one in caught]
        assert told == [(FutureWarning, "careful", __file__)]

    def test_error_in_a_block_keeps_class_chain_and_line(self) -> None:
        model, x = self.net(), self.x()
        with pytest.raises(KeyError, match="missing") as caught:
            with self.transport.around(model.trace) as run, run(x) as _:
                hidden = model.h[0].output
                try:
                    hidden.no_such_method()
                except AttributeError as error:
                    raise KeyError("missing") from error
        assert isinstance(caught.value.__cause__, AttributeError)
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (last.filename, last.line) == (__file__, 'raise KeyError("missing") from error')
        self.check_usable(model, x)

    def test_error_in_a_function_keeps_class_arguments_and_line(self) -> None:
        model, x = self.net(), self.x()
        with pytest.raises(OwnError) as caught:
            with self.transport.around(model.trace) as run, run(x) as _:
                fails(model.h[0].output.ndim)
        assert caught.value.args == (2, "here")
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (last.filename, last.name, last.line) == (__file__, "fails", 'raise OwnError(value, "here")')
        self.check_usable(model, x)

    def test_request_that_comes_too_late_can_be_caught(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            _ = model.h[2].output
            try:
                told = save("")
                _ = model.h[0].output
            except OutOfOrderError as error:
                told = save(str(error))
            result = save(model.output)
        assert "model.h.0.output" in told
        same(result.detach(), model._module(x).detach(), "the result")

    def test_request_for_what_is_not_reached_is_missed(self) -> None:
        model, x = self.net(), self.x()
        with pytest.raises(MissedProviderError, match=r"model\.h\.1"):
            with self.transport.around(model.trace) as run, run(x) as _:
                model.h[1].skip(model.h[0].output)
                _ = model.h[1].attn.output
        self.check_usable(model, x)

    def test_error_in_the_model_is_raised_at_the_request(self) -> None:
        model, x = self.net(), self.x()
        after: list[Any] = []
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            with self.transport.around(model.trace) as run, run(torch.ones(2, 5)) as _:
                _ = model.h[0].output
                after = save([1])
        assert not after
        self.check_usable(model, x)

    def test_name_that_is_not_in_the_tree_is_an_error(self) -> None:
        model, x = self.net(), self.x()
        with pytest.raises(AttributeError, match="no_such_module"):
            with self.transport.around(model.trace) as run, run(x) as _:
                _ = model.no_such_module.output
        self.check_usable(model, x)

    def check_usable(self, model: Any, x: torch.Tensor) -> None:
        """Assert that the model can be traced over this transport like a new one."""
        with self.transport.around(model.trace) as run, run(x) as _:
            result = save(model.output)
        same(result.detach(), model._module(x).detach(), "the result of a trace afterwards")
