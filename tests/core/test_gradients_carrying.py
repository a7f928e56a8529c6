"""What else happens in a thread in which a traced backward pass stands still, and what a pass may not be carried by."""

import contextlib
import os
import random
import threading

import pytest
import torch
from modules import WIDTH, Calls, assert_usable, rows, run, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnsight import NNsight
from nnsight.builtin._gradients import carrying
from nnsight.builtin._gradients.carrying import Switched
from nnsight.builtin._gradients.thread import Worker
from nnsight.builtin.backward import backward
from nnsight.errors import TracerStateError, WrongThreadError

pytestmark = [
    pytest.mark.usefixtures("nothing_remains_of_gradients"),
    # The profiler of torch tells of its start and stop.
    pytest.mark.filterwarnings("ignore:.*[Pp]rofiler"),
]
plain_grad = torch._C.TensorBase.grad.__get__


#: Where greenlets are not used at all every pass has a thread, and nothing of this thread is in its way.
IN_THREADS = os.environ.get("NNSIGHT_MODEL_SIDE") == "thread"


def refused(match):
    """Expect that the pass cannot go on; where it has a thread of its own it can."""
    return contextlib.nullcontext() if IN_THREADS else pytest.raises(TracerStateError, match=match)


def assert_taken_down(x):
    """Assert that a pass which was refused has not ended; where it was not, that its gradients are right."""
    assert torch.equal(plain_grad(x), gradients_of(1)[0]) if IN_THREADS else plain_grad(x) is None


@pytest.fixture(autouse=True)
def no_pass_is_left():
    yield
    assert torch._C._current_graph_task_id() == -1
    assert torch.is_grad_enabled()


def chain(scale=1.0):
    """A leaf, what is computed of it, and a loss."""
    x = torch.full((2, 3), float(scale), requires_grad=True)
    first = x * 2
    second = first**2
    return x, first, second, (torch.tanh(second * 0.01) * 3).sum()


def gradients_of(scale):
    x, first, second, loss = chain(scale)
    return torch.autograd.grad(loss, (x, first, second))


# -- which stack


def test_one_pass_at_a_time_needs_no_thread():
    out = run(
        """
        import threading
        import torch
        from torch import nn
        from nnsight import NNsight
        model = NNsight(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        for _ in range(3):
            with model.trace(torch.ones(1, 2)):
                hidden = model[0].output
                with model.output.sum().backward():
                    assert hidden.grad.shape == (1, 2)
            hidden = torch.ones(2, requires_grad=True) * 2
            with hidden.sum().backward():
                assert hidden.grad.tolist() == [1.0, 1.0]
        print(threading.active_count())
        """,
        NNSIGHT_MODEL_SIDE="greenlet",
    )
    assert out == "1"


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]])
def test_passes_that_stand_still_together_end_in_any_order(model, order):
    cases = [chain(scale) for scale in (1, 2, 3)]
    opened = [backward.open(case[3]) for case in cases]
    for one, (_, _, second, _) in zip(opened, cases, strict=True):
        one.__enter__()
        one.read(second)
    for index in order:
        assert torch.equal(opened[index].read(cases[index][1]), gradients_of(index + 1)[1])
        opened[index].__exit__(None, None, None)
    for scale, case in enumerate(cases, 1):
        assert torch.equal(case[0].grad, gradients_of(scale)[0])


def test_a_pass_limited_to_inputs_lets_others_run_through_checkpoints(model):
    x, first, second, loss = chain()
    layer = seeded(nn.Linear, 3, 3)
    with loss.backward(inputs=[x, first]):
        assert torch.equal(second.grad, gradients_of(1)[2])
        checkpoint(layer, torch.ones(1, 3, requires_grad=True), use_reentrant=True).sum().backward()
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert layer.weight.grad is not None


# -- plain passes in the block


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_plain_backward_through_a_checkpoint_in_the_block(model, use_reentrant):
    x, first, second, loss = chain()
    other, layer = torch.ones(1, 3, requires_grad=True), seeded(nn.Linear, 3, 3)
    layer(other).sum().backward()
    expected, other.grad = other.grad, None
    with loss.backward():
        assert torch.equal(second.grad, gradients_of(1)[2])
        checkpoint(layer, other, use_reentrant=use_reentrant).sum().backward()
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert torch.equal(other.grad, expected)
    assert torch.equal(x.grad, gradients_of(1)[0])


@pytest.mark.parametrize("has_begun", [True, False])
def test_hooks_of_a_plain_backward_in_the_block_see_ordinary_gradients(model, has_begun):
    x, first, second, loss = chain()
    kept = torch.ones(2, requires_grad=True)
    kept.grad = torch.full((2,), 7.0)
    other, seen = torch.ones(2, requires_grad=True), []
    with loss.backward():
        if has_begun:
            assert torch.equal(second.grad, gradients_of(1)[2])
        product = other * 2
        product.register_hook(lambda gradient: seen.append(kept.grad))
        product.sum().backward()
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert len(seen) == 1
    assert seen[0] is kept.grad
    assert torch.equal(x.grad, gradients_of(1)[0])


def test_hooks_of_an_inner_pass_see_ordinary_gradients(model):
    x, first, _, loss = chain()
    _, inner, last, inner_loss = chain(2)
    kept = torch.ones(2, requires_grad=True)
    kept.grad = torch.full((2,), 7.0)
    seen = []
    last.register_hook(lambda gradient: seen.append(kept.grad))
    with loss.backward():
        with inner_loss.backward():
            assert torch.equal(inner.grad, gradients_of(2)[1])
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert len(seen) == 1
    assert seen[0] is kept.grad
    assert torch.equal(x.grad, gradients_of(1)[0])


def test_a_pass_that_a_hook_traces(model):
    x, first, second, loss = chain()
    seen = []

    def trace(gradient):
        with torch.enable_grad():
            _, inner, _, inner_loss = chain(2)
        with inner_loss.backward():
            seen.append(inner.grad)

    second.register_hook(trace)
    with loss.backward():
        found = first.grad
    assert torch.equal(seen[0], gradients_of(2)[1])
    assert torch.equal(found, gradients_of(1)[1])
    assert torch.equal(x.grad, gradients_of(1)[0])


def test_plain_passes_that_fail_in_the_block(model):
    x, first, second, loss = chain()
    with loss.backward():
        assert torch.equal(second.grad, gradients_of(1)[2])
        for _ in range(3):
            other = torch.ones(2, requires_grad=True)
            product = other * 2
            product.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                (product * 3).sum().backward()
            with pytest.raises(RuntimeError, match="does not require grad"):
                torch.ones(2).sum().backward()
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert torch.equal(x.grad, gradients_of(1)[0])


def test_a_model_that_computes_gradients_itself_goes_on_meanwhile():
    def forces(module, x):
        x = x.detach().requires_grad_(True)
        (force,) = torch.autograd.grad(module.b(module.a(x)).pow(2).sum(), x)
        return module.c(force)

    net = seeded(Calls, forces)
    model = NNsight(net)
    x, first, second, loss = chain()
    value = rows()
    with model.trace(value), loss.backward():
        early = model.a.output
        assert torch.equal(second.grad, gradients_of(1)[2])
        late = model.c.output
        assert torch.equal(first.grad, gradients_of(1)[1])
        _ = early, late
    assert torch.equal(late, net(value))
    assert torch.equal(x.grad, gradients_of(1)[0])


def test_a_pass_cannot_go_on_before_one_that_began_later_in_its_thread():
    def hooked(module, x):
        hidden = module.a(x)
        hidden.register_hook(lambda gradient: module.b(gradient))
        return torch.autograd.grad(hidden.sum(), hidden)[0]

    net = seeded(Calls, hooked)
    model = NNsight(net)
    x, first, second, loss = chain()
    with refused("another one, which the model or a hook runs, began after it"):
        with model.trace(rows()), loss.backward():
            assert torch.equal(second.grad, gradients_of(1)[2])
            _ = model.b.output  # the model stands in a hook of its own pass
            assert torch.equal(first.grad, gradients_of(1)[1])
    assert_taken_down(x)
    assert_usable(model, net, rows())
    x, first, second, loss = chain()
    with loss.backward():
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert torch.equal(x.grad, gradients_of(1)[0])


# -- what torch keeps per thread


def profiler():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def test_a_profiler_around_and_one_that_is_through(model):
    with profiler():
        x, first, second, loss = chain()
        with loss.backward():
            assert torch.equal(first.grad, gradients_of(1)[1])
    assert torch.equal(x.grad, gradients_of(1)[0])
    x, first, second, loss = chain()
    with loss.backward():
        with profiler():
            assert torch.equal(second.grad, gradients_of(1)[2])
        with profiler():
            torch.ones(2) * 2
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert torch.equal(x.grad, gradients_of(1)[0])
    assert not torch._C._autograd._profiler_enabled()


def test_a_profiler_that_starts_while_a_pass_stands_still_is_told_where_to_start(model):
    x, first, second, loss = chain()
    with refused("Start the profiler before the `with` of the backward pass"):
        with loss.backward():
            assert torch.equal(second.grad, gradients_of(1)[2])
            with profiler():
                assert torch.equal(first.grad, gradients_of(1)[1])
    assert_taken_down(x)
    assert not torch._C._autograd._profiler_enabled()
    with profiler():
        torch.ones(2) * 2


def test_transforms_of_torch_func(model):
    x, first, second, loss = chain()
    with loss.backward():
        late = torch.func.vmap(lambda row: row * second.grad.sum())(torch.ones(3))
        doubled = torch.func.grad(lambda value: (value * late.sum()).sum())(torch.ones(2))
        assert torch.equal(first.grad, gradients_of(1)[1])
    assert torch.equal(late, torch.ones(3) * gradients_of(1)[2].sum())
    assert torch.equal(doubled, late.sum().expand(2))
    assert torch.equal(x.grad, gradients_of(1)[0])
    x, first, second, loss = chain()
    with refused("outside of it"):
        with loss.backward():
            assert torch.equal(second.grad, gradients_of(1)[2])
            torch.func.vmap(lambda row: row * first.grad.sum())(torch.ones(3))
    assert torch.equal(torch.func.vmap(torch.sum)(torch.ones(2, 3)), torch.full((2,), 3.0))


# -- other threads, and the end


def standing(scale, seen):
    x, _, second, loss = chain(scale)
    with loss.backward():
        seen.append(second.grad)
        yield x


def in_another_thread(function):
    raised = []

    def call():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=call)
    worker.start()
    worker.join()
    return raised


def test_the_end_in_another_thread_is_an_error_and_takes_the_pass_down(model):
    seen = []
    block = standing(1, seen)
    x = next(block)
    (error,) = in_another_thread(lambda: next(block))
    assert type(error) is (StopIteration if IN_THREADS else WrongThreadError)
    if not IN_THREADS:
        assert f"belongs to thread {threading.get_ident()}" in str(error)
        assert __file__ in str(error)
    with model.trace(rows()):  # what was left to this thread is taken down
        pass
    assert_taken_down(x)
    assert torch.equal(seen[0], gradients_of(1)[2])


def test_a_block_that_is_closed_in_another_thread_is_taken_down(model):
    seen = []
    block = standing(1, seen)
    x = next(block)
    assert in_another_thread(block.close) == []
    x, first, _, loss = chain(2)
    with loss.backward():
        assert torch.equal(first.grad, gradients_of(2)[1])
    assert torch.equal(x.grad, gradients_of(2)[0])
    with model.trace(rows()):
        pass


@pytest.mark.parametrize("side", ["greenlet", "thread"])
def test_python_ends_while_a_pass_stands_still(side):
    out = run(
        """
        import torch
        from torch import nn
        from nnsight import NNsight
        NNsight(nn.Linear(2, 2))

        def standing():
            x = torch.ones(2, requires_grad=True)
            hidden = x * 2
            with (hidden**2).sum().backward():
                yield hidden.grad

        block = standing()
        print(next(block).tolist())
        """,
        NNSIGHT_MODEL_SIDE=side,
    )
    assert out == "[4.0, 4.0]"


# -- anything in any order


def flow(model, choose):
    """A traced pass that yields between its steps, with other passes between them."""
    scale = choose.randint(1, 9)
    expected = dict(zip(("x", "first", "second"), gradients_of(scale), strict=True))
    x, first, second, loss = chain(scale)
    with backward.open(loss) as opened:
        yield
        for name, tensor in (("second", second), ("first", first)):
            if choose.random() < 0.7:
                assert torch.equal(opened.read(tensor), expected[name])
            yield
            meanwhile(model, choose)
    assert torch.equal(plain_grad(x), expected["x"])


def meanwhile(model, choose):
    kind = choose.choice(["nothing", "plain", "fails", "shapes", "trace", "checkpoint"])
    leaf = torch.ones(2, 3, requires_grad=True)
    if kind == "plain":
        (leaf * 3).sum().backward()
        assert torch.equal(plain_grad(leaf), torch.full((2, 3), 3.0))
    elif kind == "fails":
        product = leaf * 2
        product.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            product.sum().backward()
    elif kind == "shapes":
        product = leaf * 2
        product.register_hook(lambda gradient: torch.ones(4) @ torch.ones(5))
        with pytest.raises(RuntimeError, match="size"):
            product.sum().backward()
    elif kind == "trace":
        with model.trace(rows()):
            hidden = model.h[0].output
            with model.output.sum().backward():
                assert hidden.grad.shape == (2, WIDTH)
    elif kind == "checkpoint":
        layer = seeded(nn.Linear, 3, 3)
        checkpoint(layer, leaf, use_reentrant=choose.random() < 0.5).sum().backward()
        assert torch.equal(plain_grad(leaf), layer.weight.sum(0).detach().expand(2, 3))


@pytest.mark.parametrize("seed", range(4))
def test_passes_begin_stop_fail_and_end_in_any_order(model, seed, monkeypatch):
    choose, made = random.Random(seed), []
    make = carrying.make
    monkeypatch.setattr(carrying, "make", lambda *given: made.append(make(*given)) or made[-1])
    for _ in range(20):
        flows = [flow(model, choose) for _ in range(choose.randint(1, 5))]
        while flows:
            one = choose.choice(flows)
            if choose.random() < 0.05:
                one.close()
                flows.remove(one)
                continue
            with contextlib.suppress(StopIteration):
                next(one)
                continue
            flows.remove(one)
    kinds = {type(one) for one in made}
    assert kinds == ({Worker} if IN_THREADS else {Worker, Switched})
