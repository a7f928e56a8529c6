"""Operations read, assigned, edited in place and skipped, in blocks of every kind, beside the same done by hand."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import nn

from nnsight import MissedProviderError, NNsight, OutOfOrderError, OutsideTraceError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def scaled(x, factor=2):
    return torch.mul(x, factor)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = scaled(x, factor=3) + 1
        x = torch.stack([torch.mul(row, 2) for row in x])
        if x.shape[0] > 99:
            x = torch.sin(x)
        elif x.shape[0] > 98:
            x = torch.cos(x)
        else:
            x = torch.tanh(x)
        return self.last(x)


def by_hand(net, relu=None, scaled_from=None, add=None, stack=None, tanh=None, x=X):
    """The forward of `Net` with some of its values replaced."""
    relu = torch.relu(net.first(x)) if relu is None else relu
    tripled = (relu if scaled_from is None else scaled_from) * 3
    add = tripled + 1 if add is None else add
    stack = torch.stack([row * 2 for row in add]) if stack is None else stack
    tanh = torch.tanh(stack) if tanh is None else tanh
    return {"relu": relu, "scaled": tripled, "add": add, "stack": stack, "tanh": tanh, "result": net.last(tanh)}


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def model(net):
    return NNsight(net)


def test_read_in_order(net, model):
    expected = by_hand(net)
    with model.trace(X) as tracer:
        source = model.source
        args = source.self_first_0.inputs
        relu = source.torch_relu_0.output
        (positional, named) = source.scaled_0.inputs
        first = source.scaled_0.input
        variable = source.vars.x_1.output
        stack = source.torch_stack_0.output
        operand = source.torch_tanh_0.input
        returned = source.returns[0].output
        result = tracer.result
    assert args[1] == {}
    assert args[0][0] is X
    assert torch.equal(relu, expected["relu"])
    assert positional[0] is relu
    assert first is relu
    assert named == {"factor": 3}
    assert torch.equal(variable, expected["add"])
    assert operand is stack
    assert returned is result
    assert torch.equal(result, expected["result"])


def test_variable_and_value_of_its_call_are_one_object(model):
    with model.trace(X):
        value, variable = model.source.torch_relu_0.output, model.source.vars.x_0.output
    assert value is variable


EDITS = {
    "assigned": (lambda s: setattr(s.torch_relu_0, "output", torch.ones(3, 4)), {"relu": torch.ones(3, 4)}),
    "in place": (lambda s: s.torch_relu_0.output.zero_(), {"relu": torch.zeros(3, 4)}),
    "by slice": (lambda s: s.torch_tanh_0.output.__setitem__(slice(None), 0.5), {"tanh": torch.full((3, 4), 0.5)}),
    "input": (lambda s: setattr(s.scaled_0, "input", torch.ones(3, 4)), {"scaled_from": torch.ones(3, 4)}),
    "inputs": (
        lambda s: setattr(s.scaled_0, "inputs", ((torch.ones(3, 4),), {"factor": 5})), {"add": torch.full((3, 4), 6.0)},
    ),
    "operator": (lambda s: setattr(s.ops.add_0, "output", torch.ones(3, 4)), {"add": torch.ones(3, 4)}),
    "operand": (lambda s: setattr(s.ops.add_0, "input", torch.ones(3, 4)), {"add": torch.full((3, 4), 2.0)}),
    "variable": (lambda s: setattr(s.vars.x_1, "output", torch.ones(3, 4)), {"add": torch.ones(3, 4)}),
    "skipped": (lambda s: s.torch_relu_0.skip(torch.ones(3, 4)), {"relu": torch.ones(3, 4)}),
    "submodule skipped": (lambda s: s.self_first_0.skip(torch.ones(3, 4)), {"relu": torch.ones(3, 4)}),
    "operator skipped": (lambda s: s.ops.add_0.skip(torch.ones(3, 4)), {"add": torch.ones(3, 4)}),
    "inside a call": (
        lambda s: setattr(s.scaled_0.source.torch_mul_0, "output", torch.ones(3, 4)), {"add": torch.full((3, 4), 2.0)},
    ),
    "a call that is looked into, skipped": (
        lambda s: s.scaled_0.skip(torch.ones(3, 4)), {"add": torch.full((3, 4), 2.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edit_equals_the_forward_by_hand(net, model, name):
    edit, replaced = EDITS[name]
    with torch.no_grad(), model.trace(X) as tracer:
        edit(model.source)
        result = tracer.result
    expected = by_hand(net, **replaced)["result"]
    assert torch.equal(result, expected)
    assert not torch.equal(result, net(X))


@pytest.mark.parametrize("name", EDITS)
def test_edit_that_stays_is_made_in_every_trace(net, model, name):
    edit, replaced = EDITS[name]
    with model.edit() as edited:
        edit(model.source)
    expected = by_hand(net, **replaced)["result"]
    with torch.no_grad():
        for _ in range(2):
            with edited.trace(X) as tracer:
                result = tracer.result
            assert torch.equal(result, expected)
        with model.trace(X) as tracer:
            assert torch.equal(tracer.result, net(X))


@pytest.mark.parametrize("name", ["assigned", "inputs", "operator", "variable", "inside a call"])
def test_gradients_of_an_edit(net, model, name):
    edit, replaced = EDITS[name]
    x = X.clone().requires_grad_()
    with model.trace(x):
        edit(model.source)
        model.output.pow(2).sum().backward()
    got = [net.first.weight.grad, net.last.weight.grad]
    net.zero_grad()
    by_hand(net, **replaced)["result"].pow(2).sum().backward()
    assert got[0] is None or torch.equal(got[0], torch.zeros(4, 4))
    assert torch.equal(got[1], net.last.weight.grad)


def test_gradient_at_an_operation(net, model):
    with model.trace(X):
        relu, add = model.source.torch_relu_0.output, model.source.ops.add_0.output
        with model.output.pow(2).sum().backward():
            at_add = add.grad.clone()
            relu.grad = torch.zeros_like(relu.grad)
    assert torch.equal(net.first.weight.grad, torch.zeros(4, 4))
    values = by_hand(net)
    (expected,) = torch.autograd.grad(values["result"].pow(2).sum(), values["add"])
    assert torch.allclose(at_add, expected)


def test_turns_of_a_comprehension_read_and_edited(net, model):
    with torch.no_grad(), model.trace(X) as tracer:
        rows = []
        for turn in tracer.iter[:3]:
            rows.append(model.source.torch_mul_0.output.clone())
            if turn == 1:
                model.source.torch_mul_0.output = torch.zeros(4)
        stack = model.source.torch_stack_0.output.clone()
    expected = by_hand(net)["stack"].detach()
    assert torch.equal(torch.stack(rows), expected)
    expected[1] = 0
    assert torch.equal(stack, expected)


def test_open_loop_over_turns_has_them_all(model):
    with model.trace(X) as tracer:
        seen = [model.source.torch_mul_0.output for _ in tracer.iter[:]]
        result = tracer.result
    assert len(seen) == 3
    assert torch.equal(torch.stack(seen), by_hand(model._module)["stack"])
    assert torch.equal(result, model._module(X))


def test_untaken_branches_say_so(model):
    first = Net.forward.__code__.co_firstlineno
    with model.trace(X):
        with pytest.raises(
            MissedProviderError,
            match=rf"under `if x.shape.0. > 99:` in line {first + 4}, and this branch was not taken",
        ):
            model.source.torch_sin_0.output
    with model.trace(X):
        with pytest.raises(MissedProviderError, match=rf"`elif x.shape.0. > 98:` in line {first + 6}, and this branch"):
            model.source.vars.x_4.output
        # the block can go on


def test_requests_out_of_order_say_so(model):
    with model.trace(X):
        model.source.torch_stack_0.output
        with pytest.raises(
            OutOfOrderError, match=r"`model.source.torch_relu_0.output`: occurrence 0 of it was asked for"
        ):
            model.source.torch_relu_0.output
        kept = model.source.torch_tanh_0.output
    assert kept.shape == (3, 4)


def test_inside_what_was_skipped_says_so(model):
    with model.trace(X):
        inside = model.source.scaled_0.source
        model.source.scaled_0.skip(torch.ones(3, 4))
        with pytest.raises(MissedProviderError, match="lies inside `model.source.scaled_0`, which was skipped"):
            inside.torch_mul_0.output


def test_outside_a_block_says_so(model):
    with pytest.raises(OutsideTraceError, match=r"source.torch_relu_0.output of Envoy `model`: no block"):
        model.source.torch_relu_0.output
    with pytest.raises(OutsideTraceError):
        model.source.torch_relu_0.output = X
    with pytest.raises(OutsideTraceError):
        model.source.torch_relu_0.skip(X)


def test_call_without_arguments_has_no_input():
    class Draws(nn.Module):
        def forward(self):
            return torch.get_default_dtype()

    model = NNsight(Draws())
    with model.trace():
        with pytest.raises(ValueError, match="was called without arguments, so it has no `.input`"):
            model.source.torch_get_default_dtype_0.input


def test_inputs_of_another_form_are_refused(model):
    with model.trace(X):
        with pytest.raises(TypeError, match=r"`model.source.torch_relu_0.inputs` takes \(args, kwargs\).*got int"):
            model.source.torch_relu_0.inputs = 3
        result = model.output
    assert torch.equal(result, model._module(X))


def test_scan_gives_shapes(model):
    class Shapes(nn.Module):
        def forward(self, x):
            return scaled(torch.cat([x, x], dim=1)).T @ x

    with NNsight(Shapes()).scan(torch.ones(2, 2)) as tracer:
        model = tracer._envoy
        cat = model.source.torch_cat_0.output.shape
        inside = model.source.scaled_0.source.torch_mul_0.output.shape
    assert cat == inside == (2, 4)


def test_session_carries_values_between_traces(net, model):
    with model.session():
        with model.trace(X):
            relu = model.source.torch_relu_0.output
        with model.trace(X) as tracer:
            model.source.torch_relu_0.output = relu * 2
            result = tracer.result
    assert torch.equal(result, by_hand(net, relu=by_hand(net)["relu"] * 2)["result"])


def test_helpers_generators_properties_and_loops(model):
    class Reader:
        @property
        def relu(self):
            return model.source.torch_relu_0.output

    def read(name):
        return getattr(model.source, name).output

    with model.trace(X):
        relu = Reader().relu
        rest = dict(zip("ab", (read(name) for name in ("torch_stack_0", "torch_tanh_0")), strict=True))
    assert torch.equal(torch.tanh(rest["a"]), rest["b"])
    assert relu.shape == (3, 4)


def test_modes_of_the_caller_hold_inside(model):
    with torch.no_grad(), model.trace(X):
        assert not model.source.torch_relu_0.output.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), model.trace(X):
        assert model.source.self_first_0.output.dtype == torch.bfloat16
    with torch.inference_mode(), model.trace(X):
        assert model.source.self_first_0.output.is_inference()


def test_threads_and_tasks_do_not_meet(net, model):
    found = {}

    def work(index):
        for _ in range(5):
            with model.trace(X[index : index + 1]):
                relu = model.source.torch_relu_0.output
                model.source.torch_tanh_0.output = torch.full((1, 4), float(index))
                found.setdefault(index, []).append((relu, model.output))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def task(index):
        with model.trace(X[index : index + 1]):
            relu = model.source.torch_relu_0.output
            await asyncio.sleep(0)
            model.source.torch_tanh_0.output = torch.full((1, 4), float(index))
            found[index].append((relu, model.output))

    async def tasks():
        await asyncio.gather(*map(task, range(3)))

    asyncio.run(tasks())
    for index in range(3):
        values = by_hand(net, tanh=torch.full((1, 4), float(index)), x=X[index : index + 1])
        assert len(found[index]) == 6
        for relu, result in found[index]:
            assert torch.equal(relu, values["relu"])
            assert torch.equal(result, values["result"])


def test_traces_nest(net, model):
    with model.trace(X):
        outer = model.source.torch_relu_0.output
        with model.trace(X * 2):
            inner = model.source.torch_relu_0.output
            model.source.torch_tanh_0.output = torch.zeros(3, 4)
        tanh = model.source.torch_tanh_0.output
    assert torch.equal(outer, by_hand(net)["relu"])
    assert torch.equal(inner, by_hand(net, x=X * 2)["relu"])
    assert torch.equal(tanh, by_hand(net)["tanh"])
