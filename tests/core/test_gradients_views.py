"""The gradient of a view is that view of the gradient of what it is a view of."""

import contextlib

import pytest
import torch
from gradients import expected_gradients, parameter_gradients
from modules import WIDTH, Answer, Calls, Net, assert_usable, plain, rows, same, seeded
from torch import nn

import nnsight

pytestmark = pytest.mark.usefixtures("nothing_remains_of_gradients")


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


class Nested(nn.Module):
    """Gives tensors in a dict, a tuple, a list and a dataclass, each with another layout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.linear(x)
        return {"pair": (x * 2, [torch.sin(x)]), "answer": Answer(torch.stack([x * 3], 1), (torch.tanh(x).T,))}


class AroundNested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.nested, self.last = nn.Linear(WIDTH, WIDTH), Nested(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        values = self.nested(self.first(x))
        doubled, (sine,) = values["pair"]
        answer = values["answer"]
        return self.last(doubled * sine + answer.logits[:, 0] + answer.hidden[0].T)


def parts_of(values):
    return values["pair"][0], values["pair"][1][0], values["answer"].logits, values["answer"].hidden[0]


NESTED_VIEWS = {
    "whole": lambda t: t,
    "first": lambda t: t[0],
    "columns": lambda t: t[..., 1:3],
    "transposed": lambda t: t.transpose(0, -1),
    "moved": lambda t: t.movedim(0, -1)[..., 0],
    "diagonal": lambda t: t.diagonal(0, 0, -1),
    "unfolded": lambda t: t.unfold(-1, 2, 2),
    "selected": lambda t: t.select(-1, 0).unsqueeze(-1),
}


def nested_gradients(net, x):
    twin = plain(net, x)
    return torch.autograd.grad((twin.result**2).sum(), parts_of(twin.outputs["nested"][0]))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", NESTED_VIEWS)
def test_views_of_what_containers_hold(name, part):
    view, net, x = NESTED_VIEWS[name], seeded(AroundNested), rows()
    model = nnsight.NNsight(net)
    with model.trace(x):
        value = view(parts_of(model.nested.output)[part])
        with (model.output**2).sum().backward():
            found = value.grad
    assert torch.equal(found, view(nested_gradients(net, x)[part]))


@pytest.mark.parametrize("part", range(3))  # the transposed one does not have the batch in front
@pytest.mark.parametrize("name", NESTED_VIEWS)
def test_views_of_what_containers_hold_of_the_rows_of_invokes(name, part):
    view, net = NESTED_VIEWS[name], seeded(AroundNested)
    model, inputs = nnsight.NNsight(net), [rows(seed=1), rows(seed=2, n=3)]
    found = []
    with model.trace() as tracer:
        for x in inputs:
            with tracer.invoke(x):
                value = view(parts_of(model.nested.output)[part])
                with (model.output**2).sum().backward(retain_graph=True):
                    found.append(value.grad)
    for x, one in zip(inputs, found, strict=True):
        assert torch.allclose(one, view(nested_gradients(net, x)[part]), atol=1e-6)


def test_the_error_for_a_value_of_another_shape_names_the_view(model, net):
    with model.trace(rows()):
        hidden = model.h[1].output
        with model.output.sum().backward():
            with pytest.raises(nnsight.GradientError, match=r"shape \(3,\).*`hidden\[0\]` \(shape \(8,\)\)"):
                hidden[0].grad = torch.ones(3)
    assert_usable(model, net, rows())
