"""Conformance of transports: stops, invokes, steps, and what is built on them."""

from __future__ import annotations

from typing import Any

import torch

from nnsight.testing._model import same
from nnsight.testing._plain import copied, record
from nnsight.testing._transport import TransportSuite
from nnsight.testing.tiny import repeat, rows
from nnsight.tracing.saving import save


class Runs(TransportSuite):
    """Runs as a whole."""

    def test_stop_ends_block_and_run(self) -> None:
        model, x = self.net(), self.x()
        reached: list[int] = []
        handle = model._module.lm_head.register_forward_hook(lambda *_: reached.append(1))
        hidden: Any = None
        after: list[int] = []
        with self.transport.around(model.trace) as run, run(x) as tracer:
            hidden = save(model.h[0].output)
            tracer.stop()
            after = save([1])
        handle.remove()
        assert not after and not reached
        bare = model._module
        same(hidden.detach(), bare.h[0](bare.emb(x)).detach(), "what was read before the stop")

    def test_part_of_a_model_is_traced(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.h[1].trace) as run, run(x) as tracer:
            inner = save(model.h[1].attn.output)
            result = save(tracer.result)
        bare = model._module.h[1]
        same(inner.detach(), bare.attn(x).detach(), "a value in the part")
        same(result.detach(), bare(x).detach(), "the result of the part")

    def test_gradients_are_off_where_the_caller_has_them_off(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                off = save([model.h[0].output.requires_grad, torch.is_grad_enabled()])
        with self.transport.around(model.trace) as run, run(x) as _:
            on = save([model.h[0].output.requires_grad, torch.is_grad_enabled()])
        assert (off, on) == ([False, False], [True, True])

    def test_runs_follow_one_another(self) -> None:
        model = self.net()
        found = []
        for seed in range(3):
            x = self.x(seed)
            with self.transport.around(model.trace) as run, run(x) as _:
                model.h[0].output = model.h[0].output * seed
                result = save(model.output)
            found.append(result.detach())
        for seed, value in enumerate(found):

            def change(value: torch.Tensor, seed: int = seed) -> torch.Tensor:
                return value * seed

            expected = self.plain(model, self.x(seed), {("h.0", "output", 0): change}).result
            same(value, expected, f"the result of run {seed}")

    # -- invokes

    def test_invokes_see_and_change_their_rows(self) -> None:
        model, x, y = self.net(), rows(0, 1), rows(1, 2)
        with torch.no_grad(), model.trace(**self.transport.options) as tracer:
            with tracer.invoke(x):
                first = save(model.h[0].output)
                model.h[1].output[:] = 1
                one = save(model.output)
            with tracer.invoke(y):
                model.h[1].output = model.h[1].output * 2
                two = save(model.output)
            with tracer.invoke():
                whole = save(model.output)

        def change(value: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.ones_like(value[:1]), value[1:] * 2])

        expected = self.plain(model, torch.cat([x, y]), {("h.1", "output", 0): change})
        same(torch.cat([one, two]).detach(), expected.result, "the rows of the invokes, put together,")
        same(whole.detach(), expected.result, "the result that an invoke without input sees")
        value = next(v.value for v in expected.visits if (v.path, v.port) == ("h.0", "output"))
        same(first.detach(), value[:1], "the rows of the first invoke")

    def test_names_go_from_one_invoke_to_the_next(self) -> None:
        model, x, y = self.net(), rows(0, 1), rows(1, 1)
        with torch.no_grad(), model.trace(**self.transport.options) as tracer:
            with tracer.invoke(x):
                hidden = model.h[0].output
            with tracer.invoke(y):
                model.h[1].output = hidden * 2
                result = save(model.output)
        bare = model._module
        with torch.no_grad():
            hidden = bare.h[0](bare.emb(torch.cat([x, y])))[:1]
            expected = bare.lm_head(bare.h[2](torch.cat([bare.h[1](hidden), hidden * 2])))[1:]
        same(result, expected, "the result of the second invoke")

    def test_invokes_that_bind_one_name_have_a_variable_each(self) -> None:
        model, x, y = self.net(), rows(0, 1), rows(1, 1)
        with torch.no_grad(), model.trace(**self.transport.options) as tracer:
            with tracer.invoke(x):
                hidden = model.h[0].output
                _ = model.h[2].output
                one = save(hidden.clone())
            with tracer.invoke(y):
                hidden = model.h[0].output
                _ = model.h[2].output
                two = save(hidden.clone())
        bare = model._module
        with torch.no_grad():
            expected = bare.h[0](bare.emb(torch.cat([x, y])))
        same(torch.cat([one, two]), expected, "what two invokes keep under one name")

    def test_barrier_lets_invokes_meet(self) -> None:
        model, x, y = self.net(), rows(0, 1), rows(1, 1)
        with torch.no_grad(), model.trace(**self.transport.options) as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                hidden = model.h[0].output.clone()
                barrier()
            with tracer.invoke(y):
                barrier()
                model.h[0].output = hidden
                result = save(model.output)
        bare = model._module
        with torch.no_grad():
            hidden = bare.h[0](bare.emb(torch.cat([x, y])))[:1]
            expected = bare.lm_head(bare.h[2](bare.h[1](torch.cat([hidden, hidden]))))[1:]
        same(result, expected, "the result of the invoke that was given another's value")

    def test_invokes_one_after_another_are_runs_of_their_own(self) -> None:
        model, x, y = self.net(), rows(0, 1), rows(1, 3)
        with model.trace(batched=False, **self.transport.options) as tracer:
            with tracer.invoke(x):
                one = save(model.output)
            with tracer.invoke(y):
                two = save(model.output)
        same(one.detach(), model._module(x).detach(), "the result of the first")
        same(two.detach(), model._module(y).detach(), "the result of the second")

    # -- steps

    def test_every_step_is_read(self) -> None:
        model, x = self.repeats(), self.x()
        found: list[Any] = []
        with self.transport.around(model.repeat) as run, run(x, times=4) as tracer:
            found = save([])
            for step in tracer.iter[:]:
                found.append((step, model.first.output))
            result = save(tracer.result)
        expected = record(model._module, lambda: repeat(model._module, x, 4))
        values = [v.value for v in expected.visits if (v.path, v.port) == ("first", "output")]
        assert [step for step, _ in found] == [0, 1, 2, 3]
        same([value.detach() for _, value in found], values, "the values of the steps")
        same(result.detach(), expected.result, "the result after an open loop")

    def test_some_steps_are_changed(self) -> None:
        model, x = self.repeats(), self.x()
        with torch.no_grad():
            with self.transport.around(model.repeat) as run, run(x, times=5) as tracer:
                seen = save([])
                for step in tracer.iter[1:4:2]:
                    model.first.output = model.first.output * (step + 1)
                    seen.append(step)
                result = save(tracer.result)

            def times(number: int) -> Any:
                return lambda value: value * number

            changes = {("first", "output", 1): times(2), ("first", "output", 3): times(4)}
            expected = record(model._module, lambda: repeat(model._module, x, 5), changes)
        assert seen == [1, 3]
        same(result, expected.result, "the result")

    def test_next_and_all_mean_later_steps(self) -> None:
        model, x = self.repeats(), self.x()
        with self.transport.around(model.repeat) as run, run(x, times=3) as tracer:
            first = save(model.first.output)
            second = save(model.first.next().output)
        count: list[int] = []
        with self.transport.around(model.repeat) as run, run(x, times=3) as tracer:
            count = save([])
            for _ in tracer.all():
                count.append(len(count))
        values = [
            v.value for v in record(model._module, lambda: repeat(model._module, x, 3)).visits
            if (v.path, v.port) == ("first", "output")
        ]  # fmt: skip
        same([first.detach(), second.detach()], values[:2], "the values of two steps")
        assert count == [0, 1, 2]

    # -- what is built on them

    def test_cache_holds_the_values(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as tracer:
            cache = tracer.cache(modules=["h.0", "lm_head"], include_inputs=True)
            model.h[0].output[:] *= 2
        expected = self.plain(model, x, {("h.0", "output", 0): lambda value: value * 2})
        values = {(v.path, v.port): v.value for v in expected.visits}
        assert list(cache.keys()) == ["model.h.0", "model.lm_head"]
        same(cache["model.h.0"].output, values["h.0", "output"], "a cached output")
        same(cache["model.lm_head"].inputs[0][0], values["lm_head", "inputs"][0][0], "a cached input")

    def test_session_takes_values_from_trace_to_trace(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad(), model.session(**self.transport.options):
            with model.trace(x):
                hidden = model.h[1].output
            with model.trace(x):
                model.h[0].output = hidden * 3
                result = save(model.output)
        bare = model._module
        with torch.no_grad():
            hidden = bare.h[1](bare.h[0](bare.emb(x)))
            expected = bare.lm_head(bare.h[2](bare.h[1](hidden * 3)))
        same(result, expected, "the result of the second trace of a session")

    def test_edit_of_the_model_takes_part(self) -> None:
        model, x = self.net(), self.x()
        with model.edit() as edited:
            edited.h[0].output = edited.h[0].output * 2
        with self.transport.around(edited.trace) as run, run(x) as _:
            result = save(edited.output)
        expected = self.plain(model, x, {("h.0", "output", 0): lambda value: value * 2}).result
        same(result.detach(), expected, "the result of a model with an edit")

    def test_value_made_in_a_block_takes_the_place_of_one(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            hidden = model.h[0].output
            model.h[0].output = torch.arange(hidden.numel(), dtype=hidden.dtype).view(hidden.shape) / 10
            result = save(model.output)
        number = (torch.arange(16, dtype=torch.float32) / 10).view(2, 8)
        expected = self.plain(model, x, {("h.0", "output", 0): lambda _: number}).result
        same(copied(result), expected, "the result")


class Gradients(TransportSuite):
    """Gradients of what a block computes."""

    def test_gradients_of_values_are_those_of_autograd(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            first, last = model.h[0].output, model.h[2].output
            loss = model.output.pow(2).sum()
            with loss.backward():
                late = save(last.grad)
                early = save(first.grad)
        expected = self._gradients(model, x)
        same(late, expected[1], "the gradient of a late value")
        same(early, expected[0], "the gradient of an early value")

    def test_assigned_gradient_flows_on(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            first, last = model.h[0].output, model.h[2].output
            loss = model.output.pow(2).sum()
            with loss.backward():
                last.grad = last.grad * 2
                early = save(first.grad)
        expected = self._gradients(model, x)
        same(early, expected[0] * 2, "the gradient of an early value", 1e-6)

    def test_gradient_of_what_the_block_made_of_values(self) -> None:
        model, x = self.net(), self.x()
        scale = torch.full((8,), 2.0, requires_grad=True)
        with self.transport.around(model.trace) as run, run(x) as _:
            factor = scale.detach().clone().requires_grad_(True)
            model.h[0].output = model.h[0].output * factor
            (found,) = torch.autograd.grad(model.output.sum(), [factor])
            gradient = save(found)
        bare = model._module
        result = bare.lm_head(bare.h[2](bare.h[1](bare.h[0](bare.emb(x)) * scale)))
        same(gradient, torch.autograd.grad(result.sum(), scale)[0], "the gradient of a factor")

    def _gradients(self, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bare = model._module
        first = bare.h[0](bare.emb(x))
        last = bare.h[2](bare.h[1](first))
        return torch.autograd.grad(bare.lm_head(last).pow(2).sum(), [first, last])
