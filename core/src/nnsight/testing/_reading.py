"""Conformance of models: values that blocks read are those that torch's own hooks see."""

from __future__ import annotations

from typing import Any

import torch

import nnsight
from nnsight.testing._model import ModelSuite, envoy_at, is_changed, same
from nnsight.testing._plain import Visit, copied, leaves


class Reading(ModelSuite):
    """Tests that read."""

    def test_a_run_of_the_bare_module_can_be_repeated(self) -> None:
        """Without this nothing else here means anything."""
        one, other = self.inputs()[:2]
        first, second = self.record(one), self.record(one)
        assert first.passed == second.passed, "two runs on one input pass other modules: is the module in eval mode?"
        same(second.result, first.result, "the result of a second module that make_module() made")
        assert is_changed(self.record(other).result, first.result), "inputs() gives two with the same result"

    def test_the_tree_mirrors_the_module(self) -> None:
        model = self.make_model()
        expected = {path: module for path, module in self.make_module().named_modules() if path}
        for path, module in expected.items():
            envoy = envoy_at(model, path)
            assert type(envoy._module) is type(module), f"model.get({path!r}) is not the module of that path"
            assert envoy.path == f"model.{path}"
        shown = repr(model)
        for name, _ in model._module.named_children():
            assert name in shown, f"print(model) does not show {name!r}"

    def test_outputs_are_what_forward_hooks_see(self) -> None:
        for one in self.inputs():
            expected = self.record(one)
            for visit, value in zip(expected.first("output"), self._read(one, expected.first("output")), strict=True):
                same(value, visit.value, visit.name)

    def test_inputs_are_what_forward_pre_hooks_see(self) -> None:
        for one in self.inputs():
            expected = self.record(one)
            for visit, value in zip(expected.first("inputs"), self._read(one, expected.first("inputs")), strict=True):
                same(value, visit.value, visit.name)

    def test_inputs_and_outputs_are_read_in_one_block(self) -> None:
        one = self.inputs()[0]
        visits = self.record(one).first()
        for visit, value in zip(visits, self._read(one, visits), strict=True):
            same(value, visit.value, visit.name)

    def _read(self, one: Any, visits: list[Visit]) -> list[Any]:
        """Return the values of some visits as a block reads them."""
        model = self.make_model()
        seen = []
        with self.trace(model, one):
            for visit in visits:
                seen.append(copied(getattr(envoy_at(model, visit.path), visit.port)))
        return seen

    def test_input_is_the_first_argument(self) -> None:
        one = self.inputs()[0]
        visits = [visit for visit in self.record(one).first("inputs") if any(visit.value)]
        model = self.make_model()
        seen = []
        with self.trace(model, one):
            for visit in visits:
                seen.append(copied(envoy_at(model, visit.path).input))
        for visit, value in zip(visits, seen, strict=True):
            args, kwargs = visit.value
            same(value, args[0] if args else next(iter(kwargs.values())), f"the first argument at {visit.name}")

    def test_result_is_what_the_bare_module_returns(self) -> None:
        model = self.make_model()
        for one in self.inputs():
            expected = self.record(one).result
            with self.trace(model, one) as tracer:
                result = tracer.result
            with self.trace(model, one):
                output = model.output
            same(copied(result), expected, "tracer.result")
            same(copied(output), expected, "model.output")

    def test_run_without_a_block_returns_what_the_bare_module_returns(self) -> None:
        one = self.inputs()[0]
        result = self.trace(self.make_model(), one, trace=False)
        same(copied(result), self.record(one).result, "the result of trace(..., trace=False)")

    def test_block_that_asks_for_nothing_still_runs_the_model(self) -> None:
        model, ran = self.make_model(), []
        model._module.register_forward_hook(lambda *_: ran.append(1))
        with self.trace(model, self.inputs()[0]):
            pass
        assert ran == [1], f"the model ran {len(ran)} times, not once"

    def test_value_read_twice_is_one_object(self) -> None:
        one = self.inputs()[0]
        path = self.middle(self.record(one))
        model = self.make_model()
        with self.trace(model, one):
            first, second = envoy_at(model, path).output, envoy_at(model, path).output
        assert first is second

    def test_values_are_there_after_the_block_saved_or_not(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        path = self.middle(expected)
        model = self.make_model()
        with self.trace(model, one) as tracer:
            hidden = envoy_at(model, path).output
            result = nnsight.save(tracer.result)
        visit = next(visit for visit in expected.first("output") if visit.path == path)
        same([type(leaf) for leaf in leaves(hidden)], [type(leaf) for leaf in leaves(visit.value)], visit.name)
        same(copied(result), expected.result, "the saved result")

    def test_what_a_module_makes_of_another_value_leaves_the_run_alone(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        calls = [visit for visit in expected.first("inputs") if visit.path and _is_tensors(visit.value)]
        model, bare = self.make_model(), self.make_module()
        path = self.middle(expected)
        with self.trace(model, one) as tracer:
            _ = envoy_at(model, path).output
            made = [copied(envoy_at(model, visit.path)(*visit.value[0], **visit.value[1])) for visit in calls]
            result = tracer.result
        same(copied(result), expected.result, "the result of a run in which modules were called by the block")
        for visit, value in zip(calls, made, strict=True):
            plain = copied(bare.get_submodule(visit.path)(*visit.value[0], **visit.value[1]))
            same(value, plain, f"what {visit.path} makes of a value in a block")

    def test_gradient_mode_of_the_caller_holds_in_the_model(self) -> None:
        one = self.inputs()[0]
        model = self.make_model()
        with torch.no_grad(), self.trace(model, one) as tracer:
            result = tracer.result
        assert not any(leaf.requires_grad for leaf in leaves(result) if isinstance(leaf, torch.Tensor))
        assert torch.is_grad_enabled()


def _is_tensors(value: Any) -> bool:
    """Whether a module is called with tensors and constants alone, so that it can be called with them again.

    What else there is may be a cache, which a call fills.
    """
    if type(value) in (tuple, list):
        return all(map(_is_tensors, value))
    if type(value) is dict:
        return all(map(_is_tensors, value.values()))
    return isinstance(value, torch.Tensor | bool | int | float | str | None)
