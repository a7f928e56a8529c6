"""Conformance of models: wrapping changes nothing on the module, and after a run nothing remains (K1 and K5)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight.kernel import blocks
from nnsight.kernel.controller import SLOT
from nnsight.testing._model import ModelSuite, envoy_at, same
from nnsight.testing._plain import copied
from nnsight.testing._running import MarkedError
from nnsight.tracing.model import NNsight


class Idle(ModelSuite):
    """Tests of what is there when nothing runs."""

    def test_wrapping_changes_nothing_on_the_module(self) -> None:
        assert _looks(self.make_model()._module) == _looks(self.make_module())

    def test_wrapping_uses_no_random_numbers(self) -> None:
        torch.manual_seed(1)
        self.make_module()
        expected = torch.rand(3)
        torch.manual_seed(1)
        self.make_model()
        assert torch.equal(torch.rand(3), expected), "wrapping draws random numbers that a program without it would not"

    def test_tracing_leaves_nothing_on_the_module(self) -> None:
        model = self.make_model()
        self.record(self.inputs()[0], module=model._module)  # some modules keep something of their first run
        for end in _ENDS:
            before = _looks(model._module)
            end(self, model)
            name = end.__name__
            assert _looks(model._module) == before, f"{name} leaves something on a module"
            assert not blocks.open_blocks, f"{name} leaves a block open"

    def test_bare_module_works_as_before_while_a_trace_is_open(self) -> None:
        one, other = self.inputs()[:2]
        expected = self.record(other).result
        model = self.make_model()
        with self.trace(model, one):
            _ = envoy_at(model, self.middle(self.record(one))).output
            found = self.record(other, module=model._module).result
        same(found, expected, "the result of the bare module during a trace")

    def test_dropping_the_model_frees_it(self) -> None:
        """Without the cyclic collector, where the bare module is freed without it after a call."""
        bare = self.make_module()
        references: list[weakref.ref[Any]] = [weakref.ref(bare), *(weakref.ref(weight) for weight in bare.parameters())]
        gc.disable()
        try:
            self.run_plainly(bare, copy.deepcopy(self.inputs()[0]))
            del bare
            collect = any(reference() is not None for reference in references)
            for end in _ENDS:
                model = self.make_model()
                kept: dict[str, weakref.ref[Any]] = {
                    "the wrapper": weakref.ref(model),
                    "its module": weakref.ref(model._module),
                }
                kept |= {name: weakref.ref(weight) for name, weight in model._module.named_parameters()}
                end(self, model)
                del model
                if collect:
                    gc.collect()
                left = [name for name, part in kept.items() if part() is not None]
                assert not left, f"after {end.__name__}, something still refers to {', '.join(left[:3])}"
        finally:
            gc.enable()

    def test_deepcopy_is_a_model_of_its_own(self) -> None:
        self._check_twin(copy.deepcopy)

    def test_pickled_model_is_the_same(self) -> None:
        self._check_twin(lambda model: pickle.loads(pickle.dumps(model)))

    def _check_twin(self, twin_of: Callable[[NNsight], NNsight]) -> None:
        model = self.make_model()
        twin = twin_of(model)
        assert type(twin) is type(model)
        mine = {weight.data_ptr() for weight in model._module.parameters() if weight.numel()}
        assert not mine & {weight.data_ptr() for weight in twin._module.parameters()}, "the weights are shared"
        self.check_usable(twin)
        with torch.no_grad():
            for weight in twin._module.parameters():
                weight.zero_()
        self.check_usable(model)

    def test_copies_of_the_module_during_a_trace_are_clean(self) -> None:
        one = self.inputs()[0]
        expected = self.record(one)
        model = self.make_model()
        with self.trace(model, one):
            _ = envoy_at(model, self.middle(expected)).output
            twin = copy.deepcopy(model._module)
        assert _looks(twin) == _looks(self.make_module()), "a deepcopy made during a trace has something on it"
        same(self.record(one, module=twin).result, expected.result, "the result of a deepcopy made during a trace")


def _looks(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return what can be seen on a module and all below it without running it."""
    found: list[tuple[Any, ...]] = []
    for path, part in module.named_modules():
        values = {name: value for name, value in vars(part).items() if name != SLOT or value is not None}
        hooks = [(name, len(value)) for name, value in values.items() if name.endswith("_hooks")]
        weights = [(name, one.requires_grad, one.dtype) for name, one in part.named_parameters(recurse=False)]
        buffers = [name for name, _ in part.named_buffers(recurse=False)]
        found.append((path, type(part).__qualname__, part.training, sorted(values), hooks, weights, buffers))
    return found


# -- ways for a run to end


def _reads(suite: ModelSuite, model: NNsight) -> None:
    with suite.trace(model, suite.inputs()[0]) as tracer:
        _ = copied(tracer.result)


def _stops(suite: ModelSuite, model: NNsight) -> None:
    path = suite.middle(suite.record(suite.inputs()[0]))
    with suite.trace(model, suite.inputs()[0]) as tracer:
        _ = envoy_at(model, path).output
        tracer.stop()


def _raises(suite: ModelSuite, model: NNsight) -> None:
    path = suite.middle(suite.record(suite.inputs()[0]))
    with pytest.raises(MarkedError):
        with suite.trace(model, suite.inputs()[0]):
            _ = envoy_at(model, path).output
            raise MarkedError


def _edits(suite: ModelSuite, model: NNsight) -> None:
    with model.edit(inplace=True):
        model.output = model.output
    _reads(suite, model)
    model.clear_edits()


_ENDS = (_reads, _stops, _raises, _edits)
