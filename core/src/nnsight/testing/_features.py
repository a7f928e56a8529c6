"""Conformance of models: edits, caches, scans, sessions and gradients, each against plain torch."""

from __future__ import annotations

from typing import Any

import torch

from nnsight.testing._model import ModelSuite, as_given, by_path, envoy_at, is_changed, same
from nnsight.testing._plain import Recording, copied, floats, leaves, moved


class Features(ModelSuite):
    """Tests of what is built on reading and writing."""

    def test_edit_takes_part_in_every_run_of_the_copy_alone(self) -> None:
        one, other = self.inputs()[:2]
        path = self.middle(self.record(one))
        model = self.make_model()
        with model.edit() as edited:
            envoy_at(edited, path).output = moved(envoy_at(edited, path).output)
        for each in (one, other):
            expected = self.record(each, by_path({path: moved})).result
            with self.trace(edited, each) as tracer:
                result = tracer.result
            same(copied(result), expected, f"the result of a model with an edit of {path}")
        self.check_usable(model)

    def test_edit_in_place_holds_until_it_is_cleared(self) -> None:
        one = self.inputs()[0]
        path = self.middle(self.record(one))
        model = self.make_model()
        with model.edit(inplace=True):
            envoy_at(model, path).output = moved(envoy_at(model, path).output)
        with self.trace(model, one) as tracer:
            result = tracer.result
        same(copied(result), self.record(one, by_path({path: moved})).result, f"the result with an edit of {path}")
        model.clear_edits()
        self.check_usable(model)

    def test_cache_holds_what_hooks_see(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        model = self.make_model()
        with self.trace(model, one) as tracer:
            cache = tracer.cache(device=None, include_inputs=True)
        for visit in expected.first():
            if expected.calls(visit.path) > 1:
                continue  # its entry is a list
            name = f"model.{visit.path}" if visit.path else "model"
            assert name in cache, f"the cache holds nothing of {name}"
            same(copied(getattr(cache[name], visit.port)), visit.value, f"in the cache, {visit.name}")

    def test_scan_gives_the_shapes_of_a_run(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        model = self.make_model()
        seen = []
        arguments = as_given(one)
        with model.scan(*arguments.args, **arguments.kwargs):
            for visit in expected.first("output"):
                seen.append(_shapes(envoy_at(model, visit.path).output))
        for visit, shapes in zip(expected.first("output"), seen, strict=True):
            assert shapes == _shapes(visit.value), f"scanned, {visit.name} has {shapes}, not {_shapes(visit.value)}"
        self.check_usable(model)

    def test_session_takes_a_value_from_one_trace_to_the_next(self) -> None:
        one = self.inputs()[0]
        before = self.record(one)
        path = self.middle(before)
        model = self.make_model()
        with torch.no_grad():
            expected = self.record(one, by_path({path: moved})).result
            with model.session():
                with self.trace(model, one):
                    value = moved(envoy_at(model, path).output)
                with self.trace(model, one) as tracer:
                    envoy_at(model, path).output = value
                    result = tracer.result
        same(copied(result), expected, "the result of a run that was given a value of an earlier one")
        assert is_changed(expected, before.result), f"a change of {path} does not change the result"

    def test_part_of_the_model_is_traced(self) -> None:
        one = self.inputs()[0]
        found = self.record(one)
        path = self.middle(found)
        args, kwargs = next(visit.value for visit in found.first("inputs") if visit.path == path)
        expected = copied(self.make_module().get_submodule(path)(*copied(args), **copied(kwargs)))
        model = self.make_model()
        with envoy_at(model, path).trace(*args, **kwargs) as tracer:
            result = tracer.result
        same(copied(result), expected, f"the result of {path} traced alone")

    def test_gradients_are_those_of_autograd(self) -> None:
        one = self.inputs()[0]
        paths = self._differentiable(one)
        model = self.make_model()
        for path in dict.fromkeys((paths[0], paths[len(paths) // 2], paths[-1])):
            expected = self._gradient(one, path)
            with self.trace(model, one) as tracer:
                hidden = floats(envoy_at(model, path).output)[0]
                loss: Any = self.loss(tracer.result)
                with loss.backward():
                    gradient = hidden.grad
            same(copied(gradient), copied(expected), f"the gradient of {path}.output")
            model.zero_grad(set_to_none=True)

    def loss(self, result: Any) -> torch.Tensor:
        """Return one number that depends on all of a result: what gradients are taken of."""
        parts = [tensor.float().pow(2).mean() for tensor in floats(result) if tensor.requires_grad]
        assert parts, "the result does not require a gradient; give the model weights that do, or define loss()"
        return torch.stack(parts).sum()

    def _gradient(self, one: Any, path: str) -> torch.Tensor | None:
        """Return what autograd says of the first tensor in a module's output; None where the loss does not need it."""
        kept: list[torch.Tensor] = []
        results: list[Any] = []

        def keep(value: Any) -> Any:
            kept.append(floats(value)[0])
            return value

        def keep_result(value: Any) -> Any:
            results.append(value)
            return value

        found: Recording = self.record(one, {(path, "output", 0): keep, ("", "output", 0): keep_result})
        assert found.visits
        if not kept[0].requires_grad:
            return None
        return torch.autograd.grad(self.loss(results[0]), kept[0], allow_unused=True)[0]

    def _differentiable(self, one: Any) -> list[str]:
        paths = [path for path in self.spots(self.record(one)) if self._gradient(one, path) is not None]
        assert paths, "no module has an output that the loss depends on: there are no gradients to look at"
        return paths


def _shapes(value: Any) -> list[Any]:
    """Return shape and dtype of the tensors in a value."""
    return [(tuple(leaf.shape), leaf.dtype) for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
