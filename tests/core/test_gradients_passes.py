"""Several traced passes: of higher order, one after another, in invokes, in edits, and many at once."""

import asyncio
import contextlib
import copy
import threading

import pytest
import torch
from gradients import expected_gradients, parameter_gradients
from modules import WIDTH, assert_usable, plain, rows, same

from nnsight.builtin._gradients import thread

pytestmark = pytest.mark.usefixtures("nothing_remains_of_gradients")


# -- higher order, several passes


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_second_order(net, model):
    x = rows()

    def loss_of(net, x):
        return torch.tanh(net(x)).sum()

    twin = copy.deepcopy(net)
    outputs = []
    twin.h[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    (gradient,) = torch.autograd.grad(loss_of(twin, x), outputs, create_graph=True)
    (gradient**2).sum().backward()

    with model.trace(x):
        hidden = model.h[1].output
        with torch.tanh(model.output).sum().backward(create_graph=True):
            first = hidden.grad
    assert torch.equal(first, gradient)
    net.zero_grad()
    with (first**2).sum().backward():
        second = hidden.grad
    (expected,) = torch.autograd.grad(
        (torch.autograd.grad(torch.tanh(rest(net, hidden)).sum(), hidden, create_graph=True)[0] ** 2).sum(), hidden
    )
    assert torch.allclose(second, expected)
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad), name


def rest(net, hidden):
    return net.lm_head(net.h[2](hidden))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_edits_keep_the_graph_with_create_graph(model):
    x = rows().requires_grad_(True)
    scale = torch.tensor(2.0, requires_grad=True)
    hidden = x**2
    with (hidden**2).sum().backward(create_graph=True):
        hidden.grad = hidden.grad * scale
    (found,) = torch.autograd.grad(x.grad.sum(), scale)
    assert torch.allclose(found, (4 * x**3).sum())


def test_several_passes_in_one_trace(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    with model.trace(x):
        hidden = model.h[1].output
        loss = model.output.sum()
        with loss.backward(retain_graph=True):
            first = hidden.grad
        with (loss * 2).backward(retain_graph=True):
            second = hidden.grad
        with loss.backward():
            third = hidden.grad
    assert same([first], expected)
    assert torch.equal(second, 2 * first)
    assert torch.equal(third, first)


def test_repeated_passes_with_plain_code_between(model):
    x = rows().requires_grad_(True)
    hidden = x * 2
    loss = (hidden**2).sum()
    for count in range(1, 4):
        with loss.backward(retain_graph=True):
            hidden.grad = torch.ones_like(hidden)
        assert torch.equal(x.grad, torch.full_like(x, 2.0 * count))
        assert (hidden + 1).sum().item() == pytest.approx((2 * x + 1).sum().item())


def test_a_pass_within_a_pass(model):
    x, y = rows().requires_grad_(True), rows(seed=1).requires_grad_(True)
    left, right = x * 2, y * 3
    with (left * 5).sum().backward():
        outer = left.grad
        with (right * 7).sum().backward():
            inner = right.grad
        (y * 2).sum().backward()
        assert left.grad is outer
    assert torch.equal(outer, torch.full_like(left, 5.0))
    assert torch.equal(inner, torch.full_like(left, 7.0))
    assert torch.equal(x.grad, torch.full_like(x, 10.0))
    assert torch.equal(y.grad, torch.full_like(x, 23.0))


# -- invokes and edits


def test_backward_in_invokes(net, model):
    one, two = rows(seed=1), rows(seed=2, n=3)
    expected = [expected_gradients(net, x, "h.1")[0][0] for x in (one, two)]
    with model.trace() as tracer:
        with tracer.invoke(one):
            hidden = model.h[1].output
            with model.output.sum().backward(retain_graph=True):
                first = hidden.grad.save()
        with tracer.invoke(two):
            hidden = model.h[1].output
            with model.output.sum().backward():
                second = hidden.grad.save()
    assert torch.allclose(first, expected[0])
    assert torch.allclose(second, expected[1])
    assert_usable(model, net, one)


def test_an_edit_in_an_invoke_reaches_its_rows_only(net, model):
    one, two = rows(seed=1), rows(seed=2)
    joint = torch.cat([one, two])

    def edit(path, gradient):
        gradient = gradient.clone()
        gradient[2:] = 0
        return gradient

    expected, parameters = expected_gradients(net, joint, "h.1", edit=edit)  # noqa: RUF059
    with model.trace() as tracer:
        with tracer.invoke(one):
            pass
        with tracer.invoke(two):
            hidden = model.h[1].output
        with tracer.invoke():
            whole = model.output.sum()
            with whole.backward():
                hidden.grad[:] = 0
    assert same(parameter_gradients(net), parameters)


def test_the_second_invoke_is_told_by_torch_that_the_graph_is_gone(net, model):
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        with model.trace() as tracer:
            with tracer.invoke(rows(seed=1)):
                hidden = model.h[1].output
                with model.output.sum().backward():
                    hidden.grad
            with tracer.invoke(rows(seed=2)):
                hidden = model.h[1].output
                with model.output.sum().backward():
                    hidden.grad
    assert_usable(model, net, rows())


def test_backward_in_an_edit(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    found = []
    with model.edit() as edited:
        hidden = edited.h[1].output
        with edited.output.sum().backward(retain_graph=True):
            found.append(hidden.grad)
    with edited.trace(x):
        pass
    assert same(found, expected)


# -- many at once


def test_seventy_passes_open_at_once_never_meet(net, model):
    with contextlib.ExitStack() as stack:
        cases = []
        for index in range(70):
            x = torch.full((2, 3), float(index + 1), requires_grad=True)
            hidden = x * 2
            opened = stack.enter_context(nnsight_backward(model, (hidden**2).sum()))
            cases.append((x, hidden, opened))
        for index, (_, hidden, opened) in enumerate(cases):
            assert torch.equal(opened.read(hidden), torch.full((2, 3), 4.0 * (index + 1)))
    for index, (x, _, _) in enumerate(cases):
        assert torch.equal(x.grad, torch.full((2, 3), 8.0 * (index + 1)))


def nnsight_backward(model, loss):
    from nnsight.builtin.backward import backward

    return backward.open(loss)


def test_seventy_tasks_never_meet(net, model):
    async def one(index):
        x = torch.full((2, WIDTH), float(index + 1), requires_grad=True)
        first, second = x * 2, None
        second = first**2
        with second.sum().backward():
            await asyncio.sleep(0)
            outer = second.grad.clone()
            await asyncio.sleep(0.001)
            inner = first.grad
            await asyncio.sleep(0)
            first.grad = inner * 3
            await asyncio.sleep(0.001)
        assert torch.equal(outer, torch.ones(2, WIDTH))
        assert torch.equal(inner, torch.full((2, WIDTH), 4.0 * (index + 1)))
        assert torch.equal(x.grad, torch.full((2, WIDTH), 24.0 * (index + 1)))
        return index

    async def everyone():
        return await asyncio.gather(*(one(index) for index in range(70)))

    assert asyncio.run(everyone()) == list(range(70))
    assert len(thread._idle) <= thread._KEPT


def test_passes_of_invokes_open_at_once(net, model):
    inputs = [rows(seed=seed, n=1) for seed in range(5)]
    expected = [expected_gradients(net, x, "h.1", "h.0")[0] for x in inputs]
    found = {}
    with model.trace() as tracer:
        barrier = tracer.barrier(5)
        for index, x in enumerate(inputs):
            with tracer.invoke(x):
                first = model.h[0].output
                second = model.h[1].output
                loss = model.output.sum()
                with loss.backward(retain_graph=True):
                    late = second.grad
                    barrier()
                    found[index] = [late, first.grad]
                    barrier()
    for index, pair in enumerate(expected):
        assert all(torch.allclose(a, b) for a, b in zip(found[index], pair, strict=True))


def test_seventy_invokes_open_at_once_never_meet(net, model):
    expected = [expected_gradients(net, rows(seed=seed, n=1), "h.1")[0][0] for seed in range(70)]
    found, opened, most = {}, 0, 0
    with model.trace() as tracer:
        barrier = tracer.barrier(70)
        for seed in range(70):
            with tracer.invoke(rows(seed=seed, n=1)):
                hidden = model.h[1].output
                with model.output.sum().backward(retain_graph=True):
                    opened += 1
                    most = max(most, opened)
                    gradient = hidden.grad
                    barrier()
                    found[seed] = gradient
                    barrier()
                    opened -= 1
    assert most == 70
    assert all(torch.allclose(found[seed], expected[seed], atol=1e-6) for seed in range(70))
    assert_usable(model, net, rows())


def test_seventy_tasks_with_a_trace_and_a_pass_each(net, model):
    async def one(seed):
        x = rows(seed=seed)
        with model.trace(x):
            first = model.h[0].output
            await asyncio.sleep(0)
            second = model.h[1].output
            loss = (model.output * (seed + 1)).sum()
            with loss.backward():
                await asyncio.sleep(0.001)
                late = second.grad.clone()
                await asyncio.sleep(0)
                early = first.grad.clone()
                await asyncio.sleep(0)
        return late, early

    async def everyone():
        return await asyncio.gather(*(one(seed) for seed in range(70)))

    for seed, found in enumerate(asyncio.run(everyone())):
        twin = plain(net, rows(seed=seed))
        late, early = twin.outputs["h.1"][0], twin.outputs["h.0"][0]
        expected = torch.autograd.grad((twin.result * (seed + 1)).sum(), (late, early))
        assert same(found, expected)
    assert_usable(model, net, rows())


def test_threads_with_passes_of_their_own(net, model):
    results = {}

    def work(index):
        x = torch.full((2, 3), float(index + 1), requires_grad=True)
        hidden = x * 2
        for _ in range(20):
            with (hidden**2).sum().backward(retain_graph=True):
                results.setdefault(index, set()).add(hidden.grad.sum().item())

    workers = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == {index: {4.0 * (index + 1) * 6} for index in range(6)}
