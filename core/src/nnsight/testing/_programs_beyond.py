"""Conformance of transports: programs that change more than values. One that keeps the model to itself drops some."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nnsight.testing._model import same
from nnsight.testing._transport import TransportSuite
from nnsight.tracing.saving import save


class Beyond(TransportSuite):
    """What a block does to the model, to the caller and to the run itself."""

    def test_argument_that_was_not_given_is_added(self) -> None:
        model, x = self.structured(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            args, kwargs = model.inputs
            model.inputs = args, {**kwargs, "scale": 0.5}
            result = save(model.output)
        expected = model._module(x, scale=0.5)
        same(result.detach(), expected.detach(), "the result after an argument was added")

    def test_value_of_another_shape_and_dtype_flows_on(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            model.lm_head.output = model.lm_head.output[:, :3].double()
            result = save(model.output)
        same(result.detach(), model._module(x)[:, :3].double().detach(), "the result")

    def test_function_of_the_caller_counts_in_a_variable_of_the_caller(self) -> None:
        model, x = self.net(), self.x()
        total = 0

        def add(number: int) -> None:
            nonlocal total
            total += number

        with self.transport.around(model.trace) as run, run(x) as _:
            for layer in model.h:
                add(layer.output.shape[1])
        assert total == 24

    def test_list_of_the_caller_is_filled(self) -> None:
        model, x = self.net(), self.x()
        found: list[Any] = []
        with self.transport.around(model.trace) as run, run(x) as _:
            for layer in model.h:
                found.append(layer.output)
        assert len(found) == 3

    def test_weights_are_changed(self) -> None:
        model, x = self.net(), self.x()
        bare = copy.deepcopy(model._module)
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                _ = model.h[0].output
                model.lm_head.weight.mul_(2)
                result = save(model.output)
            bare.lm_head.weight.mul_(2)
            same(result, bare(x), "the result after a weight was changed in the block")
        assert torch.equal(model._module.lm_head.weight, bare.lm_head.weight)

    def test_module_is_attached(self) -> None:
        model, x = self.net(), self.x()
        added = nn.Linear(8, 8)
        with self.transport.around(model.trace) as run, run(x) as _:
            model.h[0].adapter = added
            model.h[0].output = model.h[0].output + model.h[0].adapter(model.h[0].output)
            result = save(model.output)
        expected = self.plain(model, x, {("h.0", "output", 0): lambda value: value + added(value)})
        same(result.detach(), expected.result, "the result with a module attached")
        assert model._module.h[0].adapter is added

    def test_weights_get_gradients(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            model.output.pow(2).sum().backward()
        bare = copy.deepcopy(model._module)
        bare.zero_grad()
        bare(x).pow(2).sum().backward()
        same(model._module.lm_head.weight.grad, bare.lm_head.weight.grad, "the gradient of a weight")

    def test_function_drives_the_model(self) -> None:
        model, x = self.net(), self.x()

        def double(value: torch.Tensor) -> torch.Tensor:
            once: torch.Tensor = model._module(value)
            return once * 2

        with model.trace(x, fn=double, **self.transport.options) as tracer:
            hidden = save(model.h[0].output)
            result = save(tracer.result)
        bare = model._module
        same(hidden.detach(), bare.h[0](bare.emb(x)).detach(), "a value of the model that a function drives")
        same(result.detach(), (bare(x) * 2).detach(), "what the function returns")

    def test_autocast_around_the_block_holds_in_the_model(self) -> None:
        model, x = self.net(), self.x()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with self.transport.around(model.trace) as run, run(x) as _:
                result = save(model.output)
            expected = model._module(x)
        same(result.detach(), expected.detach(), "the result under autocast")

    def test_traces_nest_in_a_block(self) -> None:
        model, x, y = self.net(), self.x(0), self.x(1)
        with self.transport.around(model.trace) as run, run(x) as _:
            with model.trace(y):
                other = model.h[0].output
            model.h[0].output = other * 2
            result = save(model.output)
        bare = model._module
        expected = bare.lm_head(bare.h[2](bare.h[1](bare.h[0](bare.emb(y)) * 2)))
        same(result.detach(), expected.detach(), "the result of a run that was given a value of another one")
