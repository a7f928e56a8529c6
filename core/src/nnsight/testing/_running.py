"""Conformance of models: how runs nest, fail and meet, and that a model is usable whatever happened."""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nnsight import plugins
from nnsight.errors import MissedProviderError, NNsightError, OutOfOrderError, OutsideTraceError
from nnsight.testing._model import ModelSuite, as_given, envoy_at, same
from nnsight.testing._plain import copied
from nnsight.tracing.model import NNsight


class MarkedError(Exception):
    """Raised by the tests themselves, so that nothing else can be taken for it."""


class Running(ModelSuite):
    """Tests of runs as a whole."""

    def test_traces_of_one_model_nest(self) -> None:
        one, other = self.inputs()[:2]
        outer, inner = self.record(one), self.record(other)
        model = self.make_model()
        with self.trace(model, one) as tracer:
            _ = envoy_at(model, self.middle(outer)).output
            with self.trace(model, other) as inside:
                between = inside.result
            result = tracer.result
        same(copied(between), inner.result, "the result of a trace inside of another")
        same(copied(result), outer.result, "the result of a trace around another")

    def test_threads_trace_one_model_at_once(self) -> None:
        inputs = [one for one in self.inputs() for _ in range(3)]
        model = self.make_model()
        expected = [self.record(one).result for one in inputs]

        def read(one: Any) -> Any:
            with self.trace(model, one) as tracer:
                result = tracer.result
            return copied(result)

        with ThreadPoolExecutor(len(inputs)) as pool:
            found = list(pool.map(read, inputs))
        for result, plain in zip(found, expected, strict=True):
            same(result, plain, "the result in one of several threads")

    def test_location_that_was_passed_is_out_of_order_and_the_block_goes_on(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        paths = self.spots(expected)
        model = self.make_model()
        with self.trace(model, one) as tracer:
            _ = envoy_at(model, paths[-1]).output
            with pytest.raises(OutOfOrderError, match=paths[0].replace(".", r"\.")):
                _ = envoy_at(model, paths[0]).inputs
            result = tracer.result
        same(copied(result), expected.result, "the result after a request that came too late")
        self.check_usable(model)

    def test_value_outside_of_a_block_is_an_error(self) -> None:
        model = self.make_model()
        with pytest.raises(OutsideTraceError):
            _ = model.output
        self.check_usable(model)

    def test_error_in_a_block_is_raised_as_it_is(self) -> None:
        one = self.inputs()[0]
        path = self.middle(self.record(one))
        model, raised = self.make_model(), MarkedError("in the block")
        with pytest.raises(MarkedError) as caught:
            with self.trace(model, one):
                _ = envoy_at(model, path).output
                raise raised
        assert caught.value is raised
        self.check_usable(model)

    def test_error_in_the_model_is_raised_at_the_request(self) -> None:
        one = self.inputs()[0]
        path = self.middle(self.record(one))
        model, raised, after = self.make_model(), MarkedError("in the model"), []

        def fail(*_: Any) -> None:
            raise raised

        handle = model._module.get_submodule(path).register_forward_hook(fail)
        with pytest.raises(MarkedError) as caught:
            with self.trace(model, one):
                _ = model.output
                after.append(1)
        handle.remove()
        assert caught.value is raised
        assert not after, "the block went on although the model had failed"
        self.check_usable(model)

    def test_trace_without_input_runs_what_needs_none_and_says_so_otherwise(self) -> None:
        model, bare = self.make_model(), self.make_module()
        try:
            expected = copied(bare())
        except Exception:  # noqa: BLE001 - however the bare module refuses to be called without an input
            with pytest.raises((ValueError, TypeError)):
                with model.trace():
                    _ = model.output
        else:
            with model.trace() as tracer:
                result = tracer.result
            same(copied(result), expected, "the result of a trace without input")
        self.check_usable(model)

    def test_bad_input_is_refused(self) -> None:
        model = self.make_model()
        # What a model class prepares it has to check; what it hands on as it is, the module refuses in its own way.
        kind: Any = Exception if type(model).prepare is NNsight.prepare else NNsightError
        for bad in self.bad_inputs:
            arguments = as_given(bad)
            with pytest.raises(kind):
                with model.trace(*arguments.args, **arguments.kwargs):
                    _ = model.output
            self.check_usable(model)

    def test_request_for_what_is_not_in_the_tree_names_the_path(self) -> None:
        one = self.inputs()[0]
        model = self.make_model()
        with pytest.raises(AttributeError, match="no_such_module_anywhere"):
            with self.trace(model, one):
                _ = model.no_such_module_anywhere.output
        self.check_usable(model)

    def test_module_that_does_not_run_is_missed(self) -> None:
        one = self.inputs()[0]
        model = self.make_model()
        calls = self.record(one).calls("")
        with pytest.raises(MissedProviderError):
            with self.trace(model, one) as tracer:
                tracer.next(calls)
                _ = model.output
        self.check_usable(model)

    def test_hooks_of_plugins_fire_once(self) -> None:
        fired: list[str] = []
        plugin = types.SimpleNamespace(
            nnsight_wrapped=lambda: fired.append("wrapped"),
            nnsight_trace_opened=lambda: fired.append("opened"),
            nnsight_run_started=lambda: fired.append("started"),
            nnsight_run_ended=lambda: fired.append("ended"),
        )
        plugins.register(plugin, "nnsight-testing-observer")
        try:
            model = self.make_model()
            with self.trace(model, self.inputs()[0]):
                fired.append("block")
        finally:
            plugins.unregister(plugin)
        assert fired == ["wrapped", "opened", "block", "started", "ended"], fired
