"""Gradients come in reverse order: what is asked for too late or in the wrong place, and how a pass ends."""

import contextlib
import gc
import weakref

import pytest
import torch
from gradients import expected_gradients, parameter_gradients
from modules import WIDTH, Block, Net, Pair, assert_idle, assert_usable, plain, rows, run, same, seeded
from torch import nn

import nnsight

pytestmark = pytest.mark.usefixtures("nothing_remains_of_gradients")


# -- order


def test_a_gradient_that_has_passed_is_an_error_at_once_and_the_block_goes_on(net, model):
    x = rows()
    expected, parameters = expected_gradients(net, x, "h.0", "emb")
    with model.trace(x):
        emb, first, last = model.emb.output, model.h[0].output, model.h[2].output
        with model.output.sum().backward():
            found = [first.grad]
            with pytest.raises(nnsight.OutOfOrderError, match=r"`last` \(shape \(2, 8\)\).*reverse order"):
                last.grad
            with pytest.raises(nnsight.OutOfOrderError):
                last.grad = torch.zeros_like(last)
            found.append(emb.grad)
    assert same(found, expected)
    assert same(parameter_gradients(net), parameters)


def test_parallel_branches_have_their_order_too(net, model):
    x = rows().requires_grad_(True)
    left, right = x * 2, x * 3
    with (left * 5 + right * 7).sum().backward():
        assert torch.equal(left.grad, torch.full_like(x, 5.0))
        with pytest.raises(nnsight.OutOfOrderError, match="`right`"):
            right.grad
        assert torch.equal(x.grad, torch.full_like(x, 31.0))


def test_a_tensor_that_is_not_in_the_graph_is_an_error_and_the_block_goes_on(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    other = rows(seed=1).requires_grad_(True)
    apart = other * 2
    with model.trace(x):
        hidden = model.h[1].output
        copied = hidden.clone()
        detached = hidden.detach()
        with model.output.sum().backward():
            for tensor in (apart, other, copied):
                with pytest.raises(nnsight.MissedProviderError, match="was not computed from it"):
                    tensor.grad
            with pytest.raises(nnsight.MissedProviderError, match="no graph.*detached"):
                detached.grad
            found = hidden.grad
            with pytest.raises(nnsight.MissedProviderError, match="was not computed from it"):
                apart.grad
    assert same([found], expected)


def test_messages_name_the_tensor_as_the_line_wrote_it(model):
    with model.trace(rows()):
        kept = [model.h[0].output, model.h[1].output]
        with model.output.sum().backward():
            kept[0].grad
            with pytest.raises(nnsight.OutOfOrderError, match=r"the gradient of `kept\[1\]` \(shape"):
                kept[1].grad


def test_a_location_of_a_finished_run_is_the_ordinary_error(model):
    with model.trace(rows()):
        loss = model.output.sum()
        with loss.backward():
            with pytest.raises(nnsight.OutOfOrderError, match=r"`model\.h\.0\.output`"):
                model.h[0].output
    with model.trace(rows()):
        loss = model.output.sum()
    with loss.backward():
        with pytest.raises(nnsight.OutsideTraceError, match=r"model\.h\.0"):
            model.h[0].output


def test_backward_from_the_middle_lets_the_model_go_on(net, model):
    x = rows()
    twin = plain(net, x)
    with model.trace(x):
        early = model.h[0].output
        with model.h[1].output.sum().backward():
            found = early.grad
            later = model.h[2].output
        result = model.output
    assert torch.equal(later, twin.outputs["h.2"][0])
    assert torch.equal(result, twin.result)
    (expected,) = torch.autograd.grad(twin.outputs["h.1"][0].sum(), twin.outputs["h.0"][0])
    assert torch.equal(found, expected)


def test_after_an_entered_pass_the_same_cannot_be_entered(model):
    x = rows().requires_grad_(True)
    with (x * 2).sum().backward() as entered:
        pass
    with pytest.raises(nnsight.TracerStateError, match="entered already"):
        with entered:
            pass


# -- errors and ends


def test_an_error_in_the_block_unwinds_backward(net, model):
    x = rows()
    with pytest.raises(ZeroDivisionError):
        with model.trace(x):
            hidden = model.h[1].output
            with model.output.sum().backward():
                hidden.grad
                1 / 0
    assert net.lm_head.weight.grad is not None
    assert net.emb.weight.grad is None
    assert_usable(model, net, x)


def test_an_error_before_the_first_request_runs_no_backward(net, model):
    with pytest.raises(ZeroDivisionError):
        with model.trace(rows()):
            with model.output.sum().backward():
                1 / 0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_error_of_torch_is_raised_at_the_line_that_asked(net, model):
    with model.trace(rows()):
        hidden = model.h[1].output
        loss = model.output.sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            with loss.backward():
                with pytest.raises(RuntimeError, match="second time") as caught:
                    hidden.grad
                with pytest.raises(nnsight.MissedProviderError, match="backward has failed"):
                    hidden.grad
                raise caught.value
        with pytest.raises(RuntimeError, match="second time"):
            with loss.backward():
                pass


def test_an_error_of_torch_after_the_last_request_is_raised_at_the_end(model):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("broken backward")

    x = rows().requires_grad_(True)
    hidden = Fails.apply(x) * 2
    reached = False
    with pytest.raises(ValueError, match="broken backward"):
        with (hidden * 3).sum().backward():
            found = hidden.grad
            reached = True
    assert reached
    assert torch.equal(found, torch.full_like(x, 3.0))


def test_stop_ends_the_pass_and_the_trace(net, model):
    with model.trace(rows()) as tracer:
        hidden = model.h[1].output
        with model.output.sum().backward():
            hidden.grad
            tracer.stop()
        raise AssertionError("not reached")
    assert net.emb.weight.grad is None
    assert_idle(net)


def test_a_return_in_the_block(net, model):
    def gradient(x):
        with model.trace(x):
            hidden = model.h[1].output
            with model.output.sum().backward():
                return hidden.grad

    x = rows()
    expected, parameters = expected_gradients(net, x, "h.1")
    assert same([gradient(x)], expected)
    assert same(parameter_gradients(net), parameters)


def test_a_generator_that_is_closed_in_the_block(net, model):
    def gradients(x):
        with model.trace(x):
            hidden = model.h[1].output
            with model.output.sum().backward():
                yield hidden.grad
                yield None

    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    steps = gradients(x)
    found = next(steps)
    (rows().requires_grad_(True) * 2).sum().backward()
    steps.close()
    assert same([found], expected)
    assert_usable(model, net, x)


def test_no_hook_stays_in_the_graph(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    with model.trace(x):
        hidden = model.h[1].output
        loss = model.output.sum()
    with loss.backward(retain_graph=True):
        hidden.grad = torch.zeros_like(hidden)
        net.emb.weight.grad
    net.zero_grad()
    loss.backward()
    assert same(parameter_gradients(net), expected_gradients(net, x)[1])
    assert hidden._backward_hooks is None
    assert same([hidden.detach()], [plain(net, x).outputs["h.1"][0].detach()])
    assert expected[0].shape == hidden.shape


@pytest.mark.parametrize("fails", [False, True])
def test_references_go_without_the_collector(fails):
    gc.collect()
    gc.disable()
    try:
        net = seeded(Net)
        model = nnsight.NNsight(net)
        with contextlib.suppress(ZeroDivisionError):
            with model.trace(rows()):
                hidden = model.h[1].output
                loss = model.output.sum()
                with loss.backward():
                    hidden.grad[0]
                    hidden[0].grad
                    net.emb.weight.grad
                    with contextlib.suppress(nnsight.OutOfOrderError):
                        hidden.grad
                    if fails:
                        1 / 0
        alive = [weakref.ref(one) for one in (net, model, hidden, loss)]
        del net, model, hidden, loss
        assert [one() for one in alive] == [None] * 4
    finally:
        gc.enable()


def test_ambient_state_of_the_caller_holds_in_the_pass(model):
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            seen.append((torch.is_autocast_enabled("cpu"), VARIABLE.get()))
            return gradient * 2

    from contextvars import ContextVar

    VARIABLE = ContextVar("variable", default="none")
    x = rows().requires_grad_(True)
    for _ in range(2):
        hidden = Looks.apply(x)
        loss = hidden.sum()
        token = VARIABLE.set("mine")
        with torch.autocast("cpu", dtype=torch.bfloat16), loss.backward():
            hidden.grad
        VARIABLE.reset(token)
        hidden = Looks.apply(x)
        with hidden.sum().backward():
            hidden.grad
    assert [value for _, value in seen] == ["mine", "none"] * 2
    assert [flag for flag, _ in seen][1::2] == [False, False]


def test_save_in_the_block_means_the_block_around_it(model):
    x = rows().requires_grad_(True)
    hidden = x * 2
    assert not hasattr(hidden, "save")
    with (hidden * 3).sum().backward():
        kept = hidden.grad.save()
        assert nnsight.save(kept) is kept
    assert not hasattr(hidden, "save")


def test_nested_module_outputs_in_tuples(model):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.pair, self.block = nn.Linear(WIDTH, WIDTH), Pair(), Block()

        def forward(self, x):
            left, right = self.pair(self.emb(x))
            return self.block(left) + right * 3

    net = seeded(Two)
    wrapped, x = nnsight.NNsight(net), rows()
    twin = plain(net, x)
    expected = torch.autograd.grad(twin.result.sum(), twin.outputs["pair"][0])
    with wrapped.trace(x):
        left, right = wrapped.pair.output
        with wrapped.output.sum().backward():
            # The order of two branches is the engine's: the later operation comes first.
            found_right = right.grad
            found_left = left.grad
    assert same((found_left, found_right), expected)


def test_in_thread_mode(tmp_path):
    out = run(
        """
        import torch, nnsight
        from modules import Net, rows, seeded
        net = seeded(Net)
        model = nnsight.NNsight(net)
        with model.trace(rows()):
            early, hidden = model.h[0].output, model.h[1].output
            loss = model.output.sum()
            with loss.backward():
                late = hidden.grad.clone()
                first = early.grad
                try:
                    hidden.grad
                except nnsight.OutOfOrderError:
                    print("out of order")
        tail = torch.nn.Sequential(*net.h[2:], net.lm_head)
        expected = torch.autograd.grad(tail(hidden.detach().requires_grad_(True)).sum(), [])
        """.replace("expected = torch", "# expected = torch")
        + """
        twin = hidden.detach().requires_grad_(True)
        net.lm_head(net.h[2](twin)).sum().backward()
        print(torch.equal(late, twin.grad))
        """,
        NNSIGHT_MODEL_SIDE="thread",
    )
    assert out.split("\n") == ["out of order", "True"]
