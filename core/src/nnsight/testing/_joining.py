"""Conformance of models: several inputs in one run, each with its own rows, as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight.errors import BatchError
from nnsight.testing._model import ModelSuite, as_given, envoy_at, is_changed, same
from nnsight.testing._plain import copied, floats, moved


class Joining(ModelSuite):
    """Tests of invokes."""

    def test_prepare_says_how_many_rows_an_input_has(self) -> None:
        model = self.make_model()
        for one in self.inputs():
            arguments = as_given(one)
            rows = model.prepare("trace", arguments.args, dict(arguments.kwargs)).rows
            assert isinstance(rows, int) and rows > 0, f"prepare says that {one!r} has {rows!r} rows"

    def test_one_invoke_is_the_input_alone(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        path = self.middle(expected)
        model = self.make_model()
        with model.trace() as tracer:
            with self.invoke(tracer, one):
                hidden = copied(envoy_at(model, path).output)
                result = tracer.result
        visit = next(visit for visit in expected.first("output") if visit.path == path)
        same(hidden, visit.value, visit.name)
        same(copied(result), expected.result, "the result of one invoke")

    def test_invokes_one_after_another_are_the_inputs_alone(self) -> None:
        one, other = self.inputs()[:2]
        model = self.make_model()
        torch.manual_seed(0)
        with model.trace(batched=False) as tracer:
            with self.invoke(tracer, one):
                first = tracer.result
            with self.invoke(tracer, other):
                second = tracer.result
        same(copied(first), self.record(one).result, "the result of the first invoke with batched=False")
        same(copied(second), self.record(other).result, "the result of the second invoke with batched=False")

    def test_invoke_without_input_sees_the_whole_run(self) -> None:
        one = self.inputs()[0]
        model = self.make_model()
        with model.trace() as tracer:
            with self.invoke(tracer, one):
                first = tracer.result
            with tracer.invoke():
                whole = tracer.result
        same(copied(whole), copied(first), "the result that an invoke without input sees")

    def test_joint_invokes_are_the_inputs_alone(self) -> None:
        if not self.joins_invokes:
            return self._check_refused()
        one, other = self.inputs()[:2]
        expected = self.record(one), self.record(other)
        paths = self.spots(expected[0])
        path = paths[len(paths) // 2]
        model = self.make_model()
        with torch.no_grad(), model.trace() as tracer:
            with self.invoke(tracer, one):
                hidden = envoy_at(model, path).output
                first = tracer.result
            with self.invoke(tracer, other):
                second = tracer.result
        visit = next(visit for visit in expected[0].first("output") if visit.path == path)
        self.check_close(hidden, visit.value, f"{visit.name} of the first of two invokes")
        self.check_close(first, expected[0].result, "the result of the first of two invokes")
        self.check_close(second, expected[1].result, "the result of the second of two invokes")
        return None

    def test_change_in_one_invoke_stays_there(self) -> None:
        if not self.joins_invokes:
            return self._check_refused()
        one, other = self.inputs()[:2]
        path = self.middle(self.record(one))
        changed = self.record(one, {(path, "output", 0): moved}).result
        untouched = self.record(other).result
        model = self.make_model()
        for write in (_assign, _edit_in_place):
            with torch.no_grad(), model.trace() as tracer:
                with self.invoke(tracer, one):
                    write(envoy_at(model, path))
                    first = tracer.result
                with self.invoke(tracer, other):
                    second = tracer.result
            self.check_close(first, changed, f"the result of an invoke that changes {path}")
            self.check_close(second, untouched, f"the result of an invoke beside one that changes {path}")
        return None

    def test_invoke_without_input_beside_others_sees_all_rows(self) -> None:
        if not self.joins_invokes:
            return self._check_refused()
        one, other = self.inputs()[:2]
        model = self.make_model()
        with torch.no_grad(), model.trace() as tracer:
            with self.invoke(tracer, one):
                first = tracer.result
            with self.invoke(tracer, other):
                second = tracer.result
            with tracer.invoke():
                whole = tracer.result
        parts = [floats(first), floats(second), floats(whole)]
        assert len({len(part) for part in parts}) == 1, "an invoke's result holds not as many tensors as the whole one"
        for mine, its, all_of_it in zip(*parts, strict=True):
            assert mine.shape[0] + its.shape[0] == all_of_it.shape[0], "the rows are not those of the whole"
            same(torch.cat([mine, its]), all_of_it, "what the invokes see, put together,")
        return None

    def test_value_goes_from_one_invoke_to_the_next(self) -> None:
        if not self.joins_invokes:
            return self._check_refused()
        one, other = self.inputs()[:2]
        path = self.middle(self.record(one))
        model = self.make_model()
        seen: list[Any] = []
        with torch.no_grad(), model.trace() as tracer:
            with self.invoke(tracer, one):
                value = envoy_at(model, path).output
            with self.invoke(tracer, other):
                seen.append(copied(value))
                result = tracer.result
        assert any(is_changed(floats(seen)[0], zero) for zero in [torch.zeros_like(floats(seen)[0])])
        self.check_close(result, self.record(other).result, "the result of an invoke that looks at another's value")
        return None

    def _check_refused(self) -> None:
        """Assert that a model which does not join inputs says so."""
        one, other = self.inputs()[:2]
        model = self.make_model()
        with pytest.raises(BatchError):
            with model.trace() as tracer:
                with self.invoke(tracer, one):
                    pass
                with self.invoke(tracer, other):
                    pass
        self.check_usable(model)


def _assign(envoy: Any) -> None:
    envoy.output = moved(envoy.output)


def _edit_in_place(envoy: Any) -> None:
    for tensor in floats(envoy.output):
        tensor.mul_(0.5).add_(0.25)
