"""Gradients in a traced backward equal those of plain torch, and nothing of it remains."""

import asyncio
import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from modules import WIDTH, Block, Calls, Net, Pair, assert_idle, assert_usable, plain, rows, run, same, seeded
from torch import nn
from torch.autograd.profiler import record_function

import nnsight
from nnsight.builtin._gradients import thread

PLAIN_GRAD = torch._C.TensorBase.grad


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return nnsight.NNsight(net)


@pytest.fixture(autouse=True)
def _nothing_remains():
    yield
    assert "grad" not in torch.Tensor.__dict__
    assert torch.Tensor.grad is PLAIN_GRAD
    assert sum(one.name == "nnsight-backward" for one in threading.enumerate()) <= 2 * thread._KEPT


def expected_gradients(net, x, *paths, edit=None):
    """Return what `retain_grad` gives for the outputs of modules, and the gradients of all parameters."""
    net = copy.deepcopy(net)
    outputs = {}

    def hook(path):
        def keep(module, args, output):
            output.retain_grad()
            outputs[path] = output
            if edit is not None:
                output.register_hook(lambda gradient: edit(path, gradient))

        return keep

    for path in paths:
        net.get_submodule(path).register_forward_hook(hook(path))
    net(x).sum().backward()
    return [outputs[path].grad for path in paths], {name: one.grad for name, one in net.named_parameters()}


def parameter_gradients(net):
    return {name: one.grad for name, one in net.named_parameters()}


# -- reading


def test_gradients_in_reverse_order_equal_retained_ones(net, model):
    x = rows()
    expected, parameters = expected_gradients(net, x, "h.2", "h.1.attn", "emb")
    with model.trace(x):
        emb = model.emb.output
        attn = model.h[1].attn.output
        last = model.h[2].output
        with model.output.sum().backward():
            found = [last.grad.save(), attn.grad.save(), emb.grad.save()]
    assert same(found, expected)
    assert same(parameter_gradients(net), parameters)


def test_backward_after_the_trace(net, model):
    x = rows()
    expected, parameters = expected_gradients(net, x, "h.1")
    with model.trace(x):
        hidden = model.h[1].output
        loss = model.output.sum()
    with loss.backward():
        found = hidden.grad.save()
    assert same([found], expected)
    assert same(parameter_gradients(net), parameters)


def test_backward_without_any_model(model):
    x = rows().requires_grad_(True)
    doubled = x * 2
    with (doubled**2).sum().backward():
        found = doubled.grad
    assert torch.equal(found, 2 * doubled.detach())
    assert torch.equal(x.grad, 4 * doubled.detach())


def test_gradient_of_the_loss_itself_and_of_a_leaf(model):
    x = rows().requires_grad_(True)
    loss = (x * 3).sum()
    with loss.backward(torch.tensor(2.0)):
        assert loss.grad == 2.0
        found = x.grad
    assert torch.equal(found, torch.full_like(x, 6.0))
    assert torch.equal(x.grad, torch.full_like(x, 6.0))


def test_reading_again_at_one_stop_gives_the_same_object(model):
    with model.trace(rows()):
        hidden = model.h[1].output
        with model.output.sum().backward():
            assert hidden.grad is hidden.grad


def test_a_traced_gradient_does_not_include_what_was_accumulated_before(model):
    x = rows().requires_grad_(True)
    (x * 2).sum().backward()
    with (x * 3).sum().backward():
        assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert torch.equal(x.grad, torch.full_like(x, 5.0))


def test_outputs_of_one_operation_in_any_order(model):
    x = rows(n=3).requires_grad_(True)
    first, second, third = (x * 2).unbind(0)
    with (first.sum() + (second * 3).sum() + third.sum()).backward():
        assert torch.equal(second.grad, torch.full((WIDTH,), 3.0))
        assert torch.equal(first.grad, torch.ones(WIDTH))
        assert torch.equal(third.grad, torch.ones(WIDTH))


def test_a_body_that_asks_for_nothing_runs_backward(net, model):
    x = rows()
    _, parameters = expected_gradients(net, x)
    with model.trace(x):
        with model.output.sum().backward():
            pass
    assert same(parameter_gradients(net), parameters)


def test_arguments_of_backward_are_passed_on(model):
    x = rows().requires_grad_(True)
    hidden = x * 2
    weight = torch.arange(float(x.numel())).view_as(x)
    with (hidden * 3).backward(gradient=weight, retain_graph=True):
        found = hidden.grad
    assert torch.equal(found, 3 * weight)
    with (hidden * 3).backward(weight, None, False, [x]):
        assert torch.equal(hidden.grad, 3 * weight)


def test_inputs_leave_everything_else_alone(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    with model.trace(x):
        hidden = model.h[1].output
        with model.output.sum().backward(inputs=[hidden]):
            found = hidden.grad * 1
            hidden.grad = hidden.grad * 2
    assert same([found], expected)
    assert torch.equal(hidden.grad, 2 * found)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not hidden._backward_hooks


# -- changing


def test_an_assigned_gradient_propagates(net, model):
    x = rows()
    _, parameters = expected_gradients(net, x, "h.1", edit=lambda path, gradient: gradient * 3)
    with model.trace(x):
        hidden = model.h[1].output
        with model.output.sum().backward():
            hidden.grad = hidden.grad * 3
            assert torch.equal(hidden.grad, torch.full_like(hidden, 1) * hidden.grad)
    assert same(parameter_gradients(net), parameters)


def test_an_assignment_alone_propagates(net, model):
    x = rows()
    _, parameters = expected_gradients(net, x, "h.1", edit=lambda path, gradient: torch.ones_like(gradient))
    with model.trace(x):
        hidden = model.h[1].output
        with model.output.sum().backward():
            hidden.grad = torch.ones_like(hidden)
    assert same(parameter_gradients(net), parameters)


def test_edits_in_place_reach_no_other_branch(net, model):
    # The gradient of the sum `x + mlp(...)` is one buffer for both of its terms.
    def edit(path, gradient):
        gradient = gradient.clone()
        gradient[:, :3] = 0
        gradient *= 2
        return gradient

    x = rows()
    _, parameters = expected_gradients(net, x, "h.1.mlp", edit=edit)
    with model.trace(x):
        mlp = model.h[1].mlp.output
        with model.output.sum().backward():
            mlp.grad[:, :3] = 0
            mlp.grad *= 2
    assert same(parameter_gradients(net), parameters)


def test_edits_after_the_block_do_not_reach_the_graph(net, model):
    x = rows()
    _, parameters = expected_gradients(net, x)
    with model.trace(x):
        early, hidden = model.emb.output, model.h[1].output
        with model.output.sum().backward():
            found = hidden.grad
            early.grad
            found.zero_()
    assert same(parameter_gradients(net), parameters)


def test_edits_of_several_tensors(net, model):
    x = rows()
    _, parameters = expected_gradients(net, x, "h.2", "h.0", edit=lambda path, gradient: gradient * (2 + len(path)))
    with model.trace(x):
        first, last = model.h[0].output, model.h[2].output
        with model.output.sum().backward():
            last.grad = last.grad * 5
            first.grad *= 5
    assert same(parameter_gradients(net), parameters)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda t: torch.ones(3), r"shape \(3,\).*`hidden`.*shape \(2, 8\)"),
        (lambda t: torch.ones_like(t, dtype=torch.float64), r"torch.float64.*torch.float32"),
        (lambda t: None, "None was assigned.*zeros"),
        (lambda t: 1.0, "a float was assigned"),
    ],
)
def test_a_value_that_is_no_gradient_of_the_tensor_is_refused(model, net, make, match):
    x = rows()
    expected, parameters = expected_gradients(net, x, "h.0")
    with model.trace(x):
        early, hidden = model.h[0].output, model.h[1].output
        with model.output.sum().backward():
            with pytest.raises(nnsight.GradientError, match=match):
                hidden.grad = make(hidden)
            found = early.grad
    assert same([found], expected)
    assert same(parameter_gradients(net), parameters)


# -- views


VIEWS = {
    "row": lambda t: t[1],
    "column": lambda t: t[:, 2],
    "rows": lambda t: t[1:],
    "stepped": lambda t: t[:, ::3],
    "transposed": lambda t: t.T,
    "reshaped": lambda t: t.view(2, 4, 2),
    "element": lambda t: t[1, 3],
    "deep": lambda t: t.view(2, 4, 2)[:, 1:3].transpose(1, 2)[0],
    "split": lambda t: t.split(3, dim=1)[1],
    "chunked": lambda t: t.chunk(2, dim=1)[1][0],
    "unbound": lambda t: t.unbind(1)[5],
    "unsqueezed": lambda t: t[None, 1].squeeze(0),
    "whole": lambda t: t[:],
}


@pytest.mark.parametrize("where", ["linear", "viewed"])
@pytest.mark.parametrize("name", VIEWS)
def test_the_gradient_of_a_view_outside_the_graph_is_that_view_of_the_gradient(name, where):
    view = VIEWS[name]

    def forward(self, x):
        value = self.a(x)
        return self.c(torch.relu(self.b(value.view(1, 2, WIDTH) if where == "viewed" else value)).view(2, WIDTH))

    net = seeded(Calls, forward)
    net.b = Viewing() if where == "viewed" else net.b
    model, x = nnsight.NNsight(net), rows()
    expected, _ = expected_gradients(net, x, "b")
    with model.trace(x):
        value = model.b.output
        seen = view(value.reshape(2, WIDTH))
        with torch.no_grad():
            quiet = view(value.view(2, WIDTH))
        with model.output.sum().backward():
            assert torch.equal(seen.grad, view(expected[0].view(2, WIDTH)))
            if where == "linear":
                assert torch.equal(quiet.grad, view(expected[0].view(2, WIDTH)))
            late = view(value.view(2, WIDTH))
            assert torch.equal(late.grad, view(expected[0].view(2, WIDTH)))
            assert torch.equal(value.grad, expected[0])


class Viewing(nn.Module):
    """Gives a view of what it computes, as `Conv1D` does."""

    def forward(self, x):
        return (x.view(2, WIDTH) * 2).view(x.shape)


@pytest.mark.parametrize("name", VIEWS)
def test_edits_of_a_view_reach_just_its_part(name):
    view = VIEWS[name]

    def edit(path, gradient):
        gradient = gradient.clone()
        view(gradient).mul_(-2)
        return gradient

    net = seeded(Net)
    model, x = nnsight.NNsight(net), rows()
    _, parameters = expected_gradients(net, x, "h.1", edit=edit)
    for assign in (False, True):
        net.zero_grad()
        with model.trace(x):
            seen = view(model.h[1].output)
            with model.output.sum().backward():
                if assign:
                    seen.grad = seen.grad * -2
                else:
                    seen.grad.mul_(-2)
        assert same(parameter_gradients(net), parameters)


def test_a_view_that_the_loss_uses_has_a_gradient_of_its_own(model):
    # It is not the view of the whole gradient: that has what flows through the other uses too.
    x = rows().requires_grad_(True)
    hidden = x * 2
    part = hidden[0]
    with (part.sum() + (hidden * 10).sum()).backward():
        assert torch.equal(part.grad, torch.ones(WIDTH))
        assert torch.equal(hidden.grad, torch.tensor([[11.0], [10.0]]).expand(2, WIDTH))


def test_a_view_whose_own_gradient_has_passed_is_out_of_order(model):
    x = rows().requires_grad_(True)
    hidden = x * 2
    part = hidden[0]
    later = hidden * 10
    with (part * 3 + later).sum().backward():
        later.grad
        assert torch.equal(part.grad, torch.full((WIDTH,), 6.0))
    hidden = x * 2
    part = hidden[0]
    loss = (part * 3).sum() + torch.relu(hidden).sum()
    middle = loss.grad_fn.next_functions[0][0]
    assert middle is not None
    with loss.backward():
        hidden.grad
        with pytest.raises(nnsight.OutOfOrderError, match="`part`"):
            part.grad


def test_views_of_a_view_that_the_module_gives(model):
    # In a chain of views the nearest one in the graph counts, not the innermost base.
    def forward(self, x):
        whole = self.a(x)
        return self.b(whole.view(4, 2, 2)).sum() + (whole * 100).sum()

    net = Calls(forward)
    net.b = nn.Identity()
    wrapped = nnsight.NNsight(net)
    with wrapped.trace(rows()):
        given = wrapped.b.input
        part = given[1]
        with wrapped.output.backward():
            assert torch.equal(part.grad, torch.ones(2, 2))


def test_the_readme_idiom_with_blocks_that_give_plain_tensors(net, model):
    # `output[0]` is a view of a plain tensor; `requires_grad_` on it changes nothing.
    x = rows()
    expected, _ = expected_gradients(net, x, "h.2")
    with model.trace(x):
        hs = model.h[-1].output[0]
        hs.requires_grad_(True)
        loss = model.lm_head.output.sum()
        with loss.backward():
            grad = hs.grad.save()
    assert torch.equal(grad, expected[0][0])


def test_an_expanded_view_can_be_read_only(model):
    x = rows(n=1).requires_grad_(True)
    hidden = x * 2
    wide = hidden.expand(3, WIDTH)
    with (hidden * 3).sum().backward():
        with contextlib.suppress(nnsight.GradientError):
            assert torch.equal(wide.grad, torch.full((3, WIDTH), 3.0))
        assert torch.equal(hidden.grad, torch.full((1, WIDTH), 3.0))


# -- requires_grad_ on activations


def test_requires_grad_on_an_output_of_a_frozen_model(net, model):
    x = rows()
    expected, _ = expected_gradients(net, x, "h.1")
    net.requires_grad_(False)
    with model.trace(x):
        hidden = model.h[1].output
        hidden.requires_grad_(True)
        with model.output.sum().backward():
            found = hidden.grad
    assert same([found], expected)
    assert torch.equal(hidden.grad, found)


def test_requires_grad_on_a_view_of_a_value_without_graph_says_where_to_set_it(net, model):
    net.requires_grad_(False)
    with model.trace(rows()):
        hidden = model.h[1].output[0]
        hidden.requires_grad_(True)
        with pytest.raises(nnsight.NoGraphError, match=r"frozen.*on a view.*") as caught:
            with model.output.sum().backward():
                pass
    assert "`model.layer.output.requires_grad_(True)`" in str(caught.value)
    net.lm_head.requires_grad_(True)
    with model.trace(rows()):
        hidden = model.h[1].output[0]
        hidden.requires_grad_(True)
        with model.output.sum().backward():
            with pytest.raises(
                nnsight.MissedProviderError, match=r"`requires_grad_\(True\)` was set on a view.*output"
            ):
                hidden.grad
    assert_idle(net)


# -- no graph


def test_no_graph_says_that_gradients_are_off(model):
    with torch.no_grad():
        with model.trace(rows()):
            with pytest.raises(nnsight.NoGraphError, match=r"torch\.no_grad\(\)"):
                with model.output.sum().backward():
                    pass


def test_no_graph_says_inference_mode(model):
    with torch.inference_mode():
        with model.trace(rows()):
            loss = model.output.sum()
    with pytest.raises(nnsight.NoGraphError, match="inference mode"):
        with loss.backward():
            pass


def test_no_graph_says_that_the_model_is_frozen(net, model):
    net.requires_grad_(False)
    with model.trace(rows()):
        with pytest.raises(nnsight.NoGraphError, match="frozen: none of its parameters"):
            with model.output.sum().backward():
                pass


def test_no_graph_says_that_the_model_ran_without():
    @torch.no_grad()
    def quiet(self, x):
        return self.a(x)

    model = nnsight.NNsight(Calls(quiet))
    with model.trace(rows()):
        with pytest.raises(nnsight.NoGraphError, match=r"as `generate` does") as caught:
            with model.output.sum().backward():
                pass
    assert str(caught.value).startswith("This tensor does not require grad, so a backward session cannot produce")
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, RuntimeError)


def test_no_graph_says_the_dtype(model):
    with pytest.raises(nnsight.NoGraphError, match=r"torch\.int64"):
        with torch.ones(2, dtype=torch.int64).sum().backward():
            pass


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
