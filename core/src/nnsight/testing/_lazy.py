"""Conformance of models whose weights are loaded when they are first needed."""

from __future__ import annotations

import torch

from nnsight.testing._model import ModelSuite, as_given, envoy_at, same
from nnsight.testing._plain import copied
from nnsight.tracing.model import NNsight


class LazyConformance(ModelSuite):
    """Tests for a model class that loads lazily; to be had beside `ModelConformance`."""

    def make_lazy_model(self) -> NNsight:
        """Return a new wrapper that has not loaded its weights, of the model that `make_module` makes."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} does not say how to wrap without weights: define make_lazy_model(self)")

    def test_tree_is_there_before_the_weights(self) -> None:
        model = self.make_lazy_model()
        assert not model.dispatched
        expected = {path: type(module) for path, module in self.make_module().named_modules()}
        assert {path: type(module) for path, module in model._module.named_modules()} == expected
        assert all(weight.is_meta for weight in model._module.parameters()), "some weights are there already"

    def test_first_run_loads_the_weights(self) -> None:
        model = self.make_lazy_model()
        one = self.inputs()[0]
        expected = self.record(one)
        envoy = envoy_at(model, self.middle(expected))
        with self.trace(model, one) as tracer:
            hidden = copied(envoy.output)
            result = tracer.result
        assert model.dispatched
        visit = next(visit for visit in expected.first("output") if f"model.{visit.path}" == envoy.path)
        same(hidden, visit.value, f"{visit.name}, by an envoy from before the weights were loaded,")
        same(copied(result), expected.result, "the result of the run that loads the weights")

    def test_scan_loads_no_weights(self) -> None:
        model = self.make_lazy_model()
        one = self.inputs()[0]
        arguments = as_given(one)
        path = self.middle(self.record(one))
        with model.scan(*arguments.args, **arguments.kwargs):
            _ = envoy_at(model, path).output
        assert not model.dispatched, "a scan loaded the weights"

    def test_dispatch_loads_the_weights_once(self) -> None:
        model = self.make_lazy_model()
        model.dispatch()
        assert model.dispatched
        before = [weight.data_ptr() for weight in model._module.parameters()]
        model.dispatch()
        assert [weight.data_ptr() for weight in model._module.parameters()] == before
        expected = dict(self.make_module().named_parameters())
        for name, weight in model._module.named_parameters():
            assert torch.equal(weight, expected[name]), f"the weight {name} is not the bare model's"
