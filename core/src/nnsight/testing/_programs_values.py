"""Conformance of transports: programs that read and change values."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from nnsight.testing._model import same
from nnsight.testing._transport import TransportSuite
from nnsight.tracing.saving import save


class Values(TransportSuite):
    """Values read and written."""

    def test_outputs_are_what_hooks_see(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            seen = save([model.emb.output, model.h[0].attn.output, model.h[0].output, model.h[-1].output])
            result = save(model.output)
        expected = {(v.path, v.port): v.value for v in self.plain(model, x).visits}
        for value, path in zip(seen, ("emb", "h.0.attn", "h.0", "h.2"), strict=True):
            same(value.detach(), expected[path, "output"], f"{path}.output")
        same(result.detach(), expected["", "output"], "model.output")

    def test_inputs_are_what_pre_hooks_see(self) -> None:
        model, x = self.structured(), self.x()
        with self.transport.around(model.trace) as run, run(x, scale=2.0) as _:
            arguments = save(model.inputs)
            first = save(model.inner.input)
        assert list(arguments[1]) == ["scale"] and arguments[1]["scale"] == 2.0
        same(arguments[0][0], x, "the positional argument")
        same(first.detach(), (model._module.first(x) * 2.0).detach(), "the first argument of a part")

    def test_result_is_what_the_call_returns(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as tracer:
            result = save(tracer.result)
        same(result.detach(), model._module(x).detach(), "tracer.result")

    def test_assigned_output_flows_on(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            model.h[1].output = model.h[0].output * 2 - 1
            result = save(model.output)
        found: list[Any] = []

        def keep(value: Any) -> Any:
            found.append(value)
            return value

        changes = {
            ("h.0", "output", 0): keep,
            ("h.1", "output", 0): lambda value: found[0] * 2 - 1,
        }
        same(result.detach(), self.plain(model, x, changes).result, "the result after an assignment")

    def test_edit_in_place_flows_on(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                model.h[0].output[:, 2:5] = 7
                model.h[1].output[0] += model.h[1].output[1]
                result = save(model.output)
        same(
            result, self.plain(model, x, {("h.0", "output", 0): _fill, ("h.1", "output", 0): _add}).result, "the result"
        )

    def test_edit_through_a_view_of_a_view_flows_on(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                part = model.h[0].output[1].view(2, 4)[0]
                part.mul_(-3)
                result = save(model.output)

        def change(value: torch.Tensor) -> torch.Tensor:
            value[1].view(2, 4)[0].mul_(-3)
            return value

        same(result, self.plain(model, x, {("h.0", "output", 0): change}).result, "the result")

    def test_edit_behind_the_back_of_torch_flows_on(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                model.h[0].output.numpy()[0] = 1.5
                model.h[1].output.data[1] = 2.5
                result = save(model.output)

        def change(row: int, number: float) -> Any:
            def write(value: torch.Tensor) -> torch.Tensor:
                value[row] = number
                return value

            return write

        changes = {("h.0", "output", 0): change(0, 1.5), ("h.1", "output", 0): change(1, 2.5)}
        same(result, self.plain(model, x, changes).result, "the result")

    def test_value_that_is_only_looked_at_stays(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                hidden = model.h[0].output
                total = save(float(hidden.numpy().sum()) + hidden.clone().mul_(0).sum().item())
                result = save(model.output)
        expected = self.plain(model, x)
        value = next(v.value for v in expected.visits if (v.path, v.port) == ("h.0", "output"))
        assert total == float(value.numpy().sum())
        same(result, expected.result, "the result")

    def test_assigned_arguments_flow_on(self) -> None:
        model, x = self.structured(), self.x()
        with self.transport.around(model.trace) as run, run(x, scale=1.0) as _:
            args, kwargs = model.inputs
            model.inputs = (args[0] * 2,), {**kwargs, "scale": 0.5}
            model.inner.input = model.inner.input + 1
            result = save(model.output)
        bare = model._module
        expected = bare.inner(bare.first(x * 2) * 0.5 + 1)
        same(result.detach(), expected.detach(), "the result after arguments were assigned")

    def test_value_that_passes_twice_is_one_object(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            first = model.h[0].output
            is_same = save([first is model.h[0].output, first is model.h[1].input])
        assert is_same == [True, True]

    def test_containers_come_as_they_are(self) -> None:
        model, x = self.structured(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            pair, mapping = model.inner.pair.output, model.inner.mapping.output
            kinds = save(
                [type(pair).__name__, type(mapping).__name__, sorted(mapping), type(mapping["extra"]).__name__]
            )
            answer = save(model.inner.answering.output)
        assert kinds == ["tuple", "dict", ["extra", "hidden"], "tuple"]
        expected = self.plain(model, x)
        value = next(v.value for v in expected.visits if (v.path, v.port) == ("inner.answering", "output"))
        assert type(answer) is type(value)
        same(answer.logits.detach(), value.logits, "a field of a dataclass")
        same([one.detach() for one in answer.hidden], list(value.hidden), "a tuple in a dataclass")

    def test_assigned_item_of_a_container_flows_on(self) -> None:
        model, x = self.structured(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            left, right = model.inner.pair.output
            model.inner.pair.output = (left * 3, right)
            model.inner.mapping.output["hidden"] = model.inner.mapping.output["hidden"] - 1
            result = save(model.output)

        def triple(value: Any) -> Any:
            return value[0] * 3, value[1]

        def less(value: Any) -> Any:
            return {**value, "hidden": value["hidden"] - 1}

        changes = {("inner.pair", "output", 0): triple, ("inner.mapping", "output", 0): less}
        same(result.detach(), self.plain(model, x, changes).result, "the result")

    def test_skipped_module_does_not_run(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            model.h[1].skip(model.h[0].output * 2)
            result = save(model.output)
        bare = model._module
        hidden = bare.h[0](bare.emb(x))
        same(result.detach(), bare.lm_head(bare.h[2](hidden * 2)).detach(), "the result")

    def test_modules_parameters_and_settings_are_the_models(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            early = save(model.lm_head(model.h[0].output))
            projected = save(functional.linear(model.h[1].output, model.lm_head.weight))
            facts = save([model.h[0].attn.in_features, model.training, str(model.lm_head.weight.dtype), len(model.h)])
            result = save(model.output)
        bare = model._module
        first = bare.h[0](bare.emb(x))
        same(early.detach(), bare.lm_head(first).detach(), "what a module makes of a value in the block")
        same(projected.detach(), bare.lm_head(bare.h[1](first)).detach(), "what a weight makes of one")
        assert facts == [8, False, "torch.float32", 3]
        same(result.detach(), bare(x).detach(), "the result")


def _fill(value: torch.Tensor) -> torch.Tensor:
    value[:, 2:5] = 7
    return value


def _add(value: torch.Tensor) -> torch.Tensor:
    value[0] += value[1]
    return value
