"""Conformance of models: what blocks write lands, exactly as a hook that returns the same value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnsight.testing._model import ModelSuite, by_path, envoy_at, is_changed, same
from nnsight.testing._plain import Recording, copied, move_, moved, record


class Writing(ModelSuite):
    """Tests that change values."""

    def test_assigned_outputs_land(self) -> None:
        def write(envoy: Any) -> None:
            envoy.output = moved(envoy.output)

        self._check_each("output", moved, write)

    def test_outputs_edited_in_place_land(self) -> None:
        def write(envoy: Any) -> None:
            move_(envoy.output)

        self._check_each("output", move_, write)

    def test_assigned_inputs_land(self) -> None:
        def write(envoy: Any) -> None:
            envoy.inputs = moved(envoy.inputs)

        self._check_each("inputs", moved, write)

    def test_inputs_edited_in_place_land(self) -> None:
        def write(envoy: Any) -> None:
            move_(envoy.inputs)

        self._check_each("inputs", move_, write)

    def test_assigned_first_arguments_land(self) -> None:
        def write(envoy: Any) -> None:
            envoy.input = moved(envoy.input)

        self._check_each("inputs", _with_first_moved, write)

    def _check_each(self, port: str, change: Callable[[Any], Any], write: Callable[[Any], None]) -> None:
        """Change one module after the other, and compare what comes of it with a hook that does the same."""
        one = self.inputs()[0]
        model, bare = self.make_model(), self.make_module()
        before = self.record(one, module=bare)
        has_effect = False
        with torch.no_grad():
            for path in self.spots(before, port):
                expected = self.record(one, by_path({path: change}, port), bare).result
                with self.trace(model, one) as tracer:
                    write(envoy_at(model, path))
                    result = tracer.result
                same(copied(result), expected, f"the result after a change of {path}.{port}")
                has_effect = has_effect or is_changed(expected, before.result)
        assert has_effect, f"no change of any module's {port} changes the result: the test says nothing"

    def test_two_changes_of_one_run_land(self) -> None:
        one = self.inputs()[0]
        paths = self.spots(self.record(one))
        first, last = paths[0], paths[-1]
        model = self.make_model()
        with torch.no_grad():
            expected = self.record(one, by_path({first: moved, last: moved})).result
            with self.trace(model, one) as tracer:
                for path in dict.fromkeys((first, last)):
                    envoy_at(model, path).output = moved(envoy_at(model, path).output)
                result = tracer.result
        same(copied(result), expected, f"the result after changes of {first} and {last}")

    def test_assigned_result_is_what_the_run_returns(self) -> None:
        one = self.inputs()[0]
        model = self.make_model()
        with torch.no_grad():
            expected = self.record(one, by_path({"": moved})).result
            with self.trace(model, one) as tracer:
                model.output = moved(model.output)
                result = tracer.result
        same(copied(result), expected, "tracer.result after model.output was assigned")

    def test_change_ends_with_its_run(self) -> None:
        one = self.inputs()[0]
        path = self.middle(self.record(one))
        model = self.make_model()
        with torch.no_grad(), self.trace(model, one):
            envoy_at(model, path).output = moved(envoy_at(model, path).output)
        self.check_usable(model)

    def test_skipped_module_and_what_is_in_it_do_not_run(self) -> None:
        one = self.inputs()[0]
        before = self.record(one)
        model = self.make_model()
        with torch.no_grad():
            for path in self.spots(before):
                value = moved(_output_of(before, path))
                expected = self._without(one, path, value)

                def run(path: str = path, value: Any = value) -> Any:
                    with self.trace(model, one) as tracer:
                        envoy_at(model, path).skip(value)
                        result = tracer.result
                    return result

                found = record(model._module, run)
                same(found.result, expected.result, f"the result after {path} was skipped")
                inside = [visit.name for visit in found.visits if visit.path.startswith(f"{path}.")]
                assert not inside, f"{path} was skipped, but {inside[0]} was reached"

    def _without(self, one: Any, path: str, value: Any) -> Recording:
        """Run the bare module with one part of it that returns a value instead of running."""
        module = self.make_module()
        module.get_submodule(path).forward = lambda *args, **kwargs: value
        return self.record(one, module=module)

    def test_stop_ends_the_run_where_the_block_is(self) -> None:
        one = self.inputs()[0]
        before = self.record(one)
        path = self.middle(before)
        model, after = self.make_model(), []

        def run() -> None:
            with self.trace(model, one) as tracer:
                _ = envoy_at(model, path).output
                tracer.stop()
                after.append(1)

        found = record(model._module, run)
        assert not after, "what follows tracer.stop() was run"
        until = before.passed[: before.passed.index((path, "output", 0))]
        assert found.passed[: len(until)] == until
        late = [visit.name for visit in found.visits[len(until) :] if visit.path != path]
        assert not late, f"the run was stopped at {path}, but {late[0]} was reached"
        self.check_usable(model)


def _with_first_moved(value: Any) -> Any:
    """Return `(args, kwargs)` with other numbers in the first argument."""
    args, kwargs = value
    if args:
        return (moved(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: moved(kwargs[name])}


def _output_of(found: Recording, path: str) -> Any:
    return next(visit.value for visit in found.first("output") if visit.path == path)
