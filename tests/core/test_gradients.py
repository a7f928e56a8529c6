"""Gradients in a traced backward equal those of plain torch: reading, changing, and where there are none."""

import pytest
import torch
from gradients import expected_gradients, parameter_gradients
from modules import WIDTH, Calls, assert_idle, rows, same

import nnsight

pytestmark = pytest.mark.usefixtures("nothing_remains_of_gradients")


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


def test_no_graph_after_the_trace_names_what_it_can_be(net, model):
    net.requires_grad_(False)
    with model.trace(rows()):
        loss = model.output.sum()
    with pytest.raises(nnsight.NoGraphError, match=r"no_grad.*generate.*none of its parameters.*detached"):
        with loss.backward():
            pass


def test_no_graph_says_the_dtype(model):
    with pytest.raises(nnsight.NoGraphError, match=r"torch\.int64"):
        with torch.ones(2, dtype=torch.int64).sum().backward():
            pass
