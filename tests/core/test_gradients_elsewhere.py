"""What a traced backward means for everything else: parameters, optimizers, threads, plain `backward()`."""

import contextlib
import copy
import threading

import pytest
import torch
from gradients import expected_gradients
from modules import rows, run, same, seeded
from torch import nn
from torch.autograd.profiler import record_function

pytestmark = pytest.mark.usefixtures("nothing_remains_of_gradients")


# -- parameters and optimizers


def test_a_parameter_gives_what_was_accumulated(net, model):
    x = rows()
    expected, parameters = expected_gradients(net, x, "h.0")
    with model.trace(x):
        hidden = model.h[0].output
        with model.output.sum().backward():
            late = net.lm_head.weight.grad
            assert late is not None
            assert torch.equal(late, parameters["lm_head.weight"])
            bias = net.h[1].mlp.bias.grad
            weight = net.h[1].mlp.weight.grad
            found = hidden.grad
            early = net.emb.weight.grad
    assert late is net.lm_head.weight.grad
    assert torch.equal(bias, parameters["h.1.mlp.bias"])
    assert torch.equal(weight, parameters["h.1.mlp.weight"])
    assert same([found], expected)
    assert torch.equal(early, parameters["emb.weight"])


def test_parameters_in_any_order_give_final_gradients(net, model):
    x = rows()
    _, parameters = expected_gradients(net, x)
    for reverse in (False, True):
        net.zero_grad()
        with model.trace(x):
            with model.output.sum().backward():
                found = {}
                for name, one in sorted(net.named_parameters(), reverse=reverse):
                    found[name] = one.grad.clone()
        assert same(found, dict(sorted(parameters.items(), reverse=reverse)))


def test_an_optimizer_steps_in_the_block(net, model):
    x = rows()
    twin = copy.deepcopy(net)
    for one in (net, twin):
        assert all(parameter.grad is None for parameter in one.parameters())
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).sum().backward()
    other.step()
    other.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with model.trace(x):
        with model.output.sum().backward():
            optimizer.step()
            optimizer.zero_grad()
    assert same(net.state_dict(), twin.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_parameter_that_takes_no_part_is_read_as_ever(net, model):
    other = nn.Linear(2, 2)
    other.weight.grad = torch.ones(2, 2)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    with model.trace(x):
        hidden = model.h[1].output
        with model.output.sum().backward():
            assert other.weight.grad is not None
            assert torch.equal(other.weight.grad, torch.ones(2, 2))
            assert other.bias.grad is None
            assert frozen.grad is None
            found = hidden.grad
    assert same([found], expected)


def test_other_threads_are_left_alone(net, model):
    stop, failures, steps = threading.Event(), [], []

    def train():
        layer = seeded(nn.Linear, 4, 4)
        twin = copy.deepcopy(layer)
        optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.01) for one in (layer, twin))
        try:
            while not stop.is_set() or not steps:
                for one, how in ((layer, optimizer), (twin, other)):
                    how.zero_grad()
                    one(torch.ones(1, 4)).sum().backward()
                    how.step()
                assert layer.weight.grad is not None
                steps.append(torch.equal(layer.weight, twin.weight))
        except BaseException as error:
            failures.append(error)

    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    worker = threading.Thread(target=train)
    worker.start()
    for _ in range(10):
        with model.trace(x):
            hidden = model.h[1].output
            with model.output.sum().backward():
                before = len(steps)
                found = hidden.grad
                while len(steps) < before + 2 and not failures:
                    stop.wait(0.001)
        assert same([found], expected)
    stop.set()
    worker.join()
    assert not failures
    assert all(steps)


def test_a_thread_started_in_the_block_reads_the_ordinary_gradient(model):
    x = rows().requires_grad_(True)
    x.grad = torch.ones_like(x)
    seen = []
    with (x * 2).sum().backward():
        worker = threading.Thread(target=lambda: seen.append(x.grad))
        worker.start()
        worker.join()
        assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert torch.equal(seen[0], torch.full_like(x, 3.0)) or seen[0] is x.grad


# -- plain backward


def test_everywhere_else_backward_simply_runs(model):
    def fresh():
        x = torch.ones(2, requires_grad=True)
        return x, (x * 2).sum()

    x, loss = fresh()
    assert loss.backward() is None
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    with record_function("backward"): loss.backward()  # noqa: E701 # fmt: skip
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    with torch.no_grad(): loss.backward()  # noqa: E701 # fmt: skip
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    with torch.no_grad(), record_function("backward"): loss.backward(); assert x.grad is not None  # noqa: E701, E702 # fmt: skip
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    with contextlib.ExitStack() as stack: stack.callback(loss.backward)  # noqa: E701 # fmt: skip
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    with contextlib.nullcontext(loss.backward()) as nothing:
        assert nothing is None
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    [one.backward() for one in [loss]]
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    exec("loss.backward()")
    assert torch.equal(x.grad, torch.full((2,), 2.0))

    x, loss = fresh()
    call = loss.backward
    call()
    torch.Tensor.backward((x * 3).sum())
    assert torch.equal(x.grad, torch.full((2,), 5.0))


def test_one_line_bodies_and_later_items(model):
    x = torch.ones(2, requires_grad=True)
    hidden = x * 2
    with (hidden * 3).sum().backward(): found = hidden.grad  # noqa: E701 # fmt: skip
    assert torch.equal(found, torch.full((2,), 3.0))

    hidden = x * 2
    loss = (hidden * 3).sum()
    with torch.no_grad(), loss.backward(), contextlib.nullcontext():
        found = hidden.grad
        assert not torch.is_grad_enabled()
    assert torch.equal(found, torch.full((2,), 3.0))


def test_backward_keeps_its_signature_and_name(model):
    import inspect

    assert list(inspect.signature(torch.Tensor.backward).parameters) == [
        "self", "gradient", "retain_graph", "create_graph", "inputs",
    ]  # fmt: skip
    assert torch.Tensor.backward.__name__ == "backward"
    assert torch.Tensor.backward.__doc__.startswith("Computes the gradient")


def test_backward_is_wrapped_when_a_model_is_wrapped_and_not_before():
    out = run(
        """
        import torch
        import nnsight
        from torch import nn
        plain = torch.Tensor.backward
        nnsight.NNsight
        assert torch.Tensor.backward is plain
        nnsight.NNsight(nn.Linear(2, 2))
        wrapped = torch.Tensor.backward
        assert wrapped is not plain
        nnsight.NNsight(nn.Linear(2, 2))
        assert torch.Tensor.backward is wrapped
        print("ok")
        """
    )
    assert out == "ok"


def test_switched_off_it_is_left_alone():
    out = run(
        """
        import torch
        import nnsight
        from torch import nn
        plain = torch.Tensor.backward
        nnsight.NNsight(nn.Linear(2, 2))
        print(torch.Tensor.backward is plain)
        """,
        NNSIGHT_PLUGINS_DISABLE="backward",
    )
    assert out == "True"


def test_a_tracer_opens_one_too(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    with model.trace(x) as tracer:
        hidden = model.h[1].output
        with tracer.backward(model.output.sum(), retain_graph=True):
            found = hidden.grad
    assert same([found], expected)
