"""Conformance of models that run in steps, such as those that generate: each step is what hooks see in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from nnsight.errors import BatchError
from nnsight.testing._model import Given, Location, ModelSuite, as_given, envoy_at, is_changed, same
from nnsight.testing._plain import Change, Recording, Visit, copied, floats, moved, record


class StepsConformance(ModelSuite):
    """Tests for a method that calls the model several times; to be had beside `ModelConformance`.

    Attributes:
        step_method: the method that runs the steps, marked with `traceable` in the model's class.
        step_options: keyword arguments for it and for `run_steps_plainly`; at least three steps must come of them.
    """

    step_method: str = "generate"
    step_options: Mapping[str, Any] = {}

    def run_steps_plainly(self, module: nn.Module, one: Any) -> Any:
        """Return what the bare module gives for an input, with `step_options`, where `step_method` is called."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its model is run in steps without nnsight: define "
            "run_steps_plainly(self, module, one)"
        )

    # -- what tests share ------------------------------------------------------------------------------------------

    def call_of(self, model: Any, one: Any = None) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the step method and its arguments, for a call that stands in the header of a `with`."""
        arguments = as_given(one) if one is not None else Given()
        torch.manual_seed(0)
        return getattr(model, self.step_method), arguments.args, {**arguments.kwargs, **self.step_options}

    def record_steps(self, one: Any, changes: Mapping[Location, Change] | None = None) -> Recording:
        """Return what a bare model does in all steps."""
        self.teach_containers()
        module = self.make_module()
        torch.manual_seed(0)
        return record(module, lambda: self.run_steps_plainly(module, copy.deepcopy(one)), changes)

    def each_step(self, found: Recording) -> list[list[Visit]]:
        """Return the outputs of each step, of modules that are called once in every step."""
        count = found.calls("")
        assert count >= 3, f"the module runs {count} times; step_options must make three steps or more of it"
        paths = {visit.path for visit in found.visits if found.calls(visit.path) == count}
        outputs = [visit for visit in found.visits if visit.port == "output" and visit.path in paths]
        return [[visit for visit in outputs if visit.occurrence == step] for step in range(count)]

    # -- tests -----------------------------------------------------------------------------------------------------

    def test_steps_without_a_with_simply_run(self) -> None:
        one = self.inputs()[0]
        run, args, kwargs = self.call_of(self.make_model(), one)
        result = run(*args, **kwargs)
        same(copied(result), self.record_steps(one).result, f"the result of model.{self.step_method}(...)")

    def test_result_of_steps_is_what_the_bare_module_gives(self) -> None:
        model = self.make_model()
        for one in self.inputs():
            run, args, kwargs = self.call_of(model, one)
            with run(*args, **kwargs) as tracer:
                result = tracer.result
            same(copied(result), self.record_steps(one).result, "tracer.result after all steps")

    def test_every_step_is_what_hooks_see_in_it(self) -> None:
        one = self.inputs()[0]
        expected = self.record_steps(one)
        steps = self.each_step(expected)
        model = self.make_model()
        seen: list[list[Any]] = []
        run, args, kwargs = self.call_of(model, one)
        with run(*args, **kwargs) as tracer:
            for step in tracer.iter[:]:
                seen.append([copied(envoy_at(model, visit.path).output) for visit in steps[step]])
            result = tracer.result
        assert len(seen) == len(steps), f"the loop had {len(seen)} steps, the run {len(steps)}"
        for values, visits in zip(seen, steps, strict=True):
            for value, visit in zip(values, visits, strict=True):
                same(value, visit.value, visit.name)
        same(copied(result), expected.result, "tracer.result after an open loop")

    def test_bounded_loop_sees_its_steps(self) -> None:
        one = self.inputs()[0]
        steps = self.each_step(self.record_steps(one))
        path = steps[0][len(steps[0]) // 2].path
        model = self.make_model()
        seen = {}
        run, args, kwargs = self.call_of(model, one)
        with run(*args, **kwargs) as tracer:
            for step in tracer.iter[1:3]:
                seen[step] = copied(envoy_at(model, path).output)
        assert list(seen) == [1, 2]
        for step, value in seen.items():
            visit = next(visit for visit in steps[step] if visit.path == path)
            same(value, visit.value, visit.name)

    def test_request_without_a_loop_means_the_first_step_and_next_the_one_after(self) -> None:
        one = self.inputs()[0]
        steps = self.each_step(self.record_steps(one))
        path = steps[0][len(steps[0]) // 2].path
        model = self.make_model()
        run, args, kwargs = self.call_of(model, one)
        with run(*args, **kwargs) as tracer:
            first = copied(envoy_at(model, path).output)
            tracer.next()
            second = copied(envoy_at(model, path).output)
        for step, value in enumerate((first, second)):
            visit = next(visit for visit in steps[step] if visit.path == path)
            same(value, visit.value, visit.name)

    def test_change_in_one_step_lands_there_alone(self) -> None:
        one = self.inputs()[0]
        before = self.record_steps(one)
        paths = [visit.path for visit in self.each_step(before)[1] if visit.path and floats(visit.value)]
        model = self.make_model()
        has_effect = False
        for path in dict.fromkeys((paths[0], paths[len(paths) // 2], paths[-1])):
            expected = self.record_steps(one, {(path, "output", 1): moved})
            seen = []
            run, args, kwargs = self.call_of(model, one)
            with run(*args, **kwargs) as tracer:
                for step in tracer.iter[:]:
                    if step == 1:
                        envoy_at(model, path).output = moved(envoy_at(model, path).output)
                    seen.append(copied(model.output))
                result = tracer.result
            same(copied(result), expected.result, f"the result after a change of {path} in step 1")
            outputs = [visit.value for visit in expected.visits if (visit.path, visit.port) == ("", "output")]
            for step, (value, plain) in enumerate(zip(seen, outputs, strict=True)):
                same(value, plain, f"model.output of step {step} after a change of {path} in step 1")
            has_effect = has_effect or any(
                is_changed(new, visits[-1].value) for new, visits in zip(outputs, self.each_step(before), strict=True)
            )
        assert has_effect, "no change of any module in step 1 changes what the model gives: the test says nothing"

    def test_steps_of_joint_invokes_are_the_inputs_alone(self) -> None:
        one, other = self.inputs()[:2]
        model = self.make_model()
        run, args, kwargs = self.call_of(model)
        if not self.joins_invokes:
            with pytest.raises(BatchError):
                with run(*args, **kwargs) as tracer:
                    with self.invoke(tracer, one):
                        pass
                    with self.invoke(tracer, other):
                        pass
            return
        count = []
        with run(*args, **kwargs) as tracer:
            with self.invoke(tracer, one):
                for step in tracer.iter[:]:
                    _ = model.output
                    count.append(step)
                first = tracer.result
            with self.invoke(tracer, other):
                second = tracer.result
        expected = self.record_steps(one), self.record_steps(other)
        assert len(count) == max(found.calls("") for found in expected)
        self.check_close(first, expected[0].result, "the result of the first of two invokes with steps")
        self.check_close(second, expected[1].result, "the result of the second of two invokes with steps")
