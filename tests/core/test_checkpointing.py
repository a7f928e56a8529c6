"""Gradients under `torch.utils.checkpoint` are those of the same model without it, whatever blocks change."""

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
from modules import WIDTH, Block, Calls, assert_idle, assert_usable, rows, same, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

import nnsight

WHOLE = slice(None)


class Stack(nn.Module):
    """Blocks in a row, each a checkpointed region if `is_checkpointed`, with dropout in and between them."""

    def __init__(self, use_reentrant, is_checkpointed=True):
        super().__init__()
        self.emb = nn.Linear(WIDTH, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.drop = nn.Dropout(0.2)
        self.lm_head = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.use_reentrant = use_reentrant
        self.is_checkpointed = is_checkpointed
        self.computed = 0

    def forward(self, x):
        x = self.emb(x)
        for block in self.h:
            if self.is_checkpointed:
                x = checkpoint(self.region, block, x, use_reentrant=self.use_reentrant)
            else:
                x = self.region(block, x)
            x = self.drop(x)
        return self.lm_head(x)

    def region(self, block, x):
        self.computed += 1
        return self.drop(block(x))


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def use_reentrant(request):
    return request.param


def pair(use_reentrant, make=Stack):
    """Return a model without and one with checkpointing, with the same weights."""
    bare, net = seeded(make, use_reentrant, is_checkpointed=False), seeded(make, use_reentrant)
    return bare, net


def parameter_gradients(net):
    return {name: one.grad for name, one in net.named_parameters()}


def close(left, right):
    return left.keys() == right.keys() and all(
        one is other if one is None or other is None else torch.allclose(one, other, atol=1e-6)
        for one, other in ((left[name], right[name]) for name in left)
    )


def calls_late(model):
    value = model.h[0].mlp.output
    model.h[0].mlp.output = model.h[2].mlp(value)


def mixes_regions(model):
    value = model.h[0].mlp.output
    model.h[2].mlp.output = model.h[2].mlp.output + value


def adds_noise(model):
    model.h[1].attn.output = model.h[1].attn.output + torch.randn(2, WIDTH)


def assigns(path, value):
    def edit(model):
        envoy = functools.reduce(getattr, path.split(".")[:-1], model.h[1])
        setattr(envoy, path.split(".")[-1], value(getattr(envoy, path.split(".")[-1])))

    return edit


EDITS = {
    "none": lambda model: None,
    "output in place": lambda model: model.h[1].mlp.output.__setitem__((WHOLE, 0), 3.0),
    "output times two in place": lambda model: model.h[1].attn.output.mul_(2),
    "output past autograd": lambda model: model.h[1].attn.output.data.mul_(2),
    "input past autograd": lambda model: model.h[1].attn.input.data.__setitem__((WHOLE, 0), 2.0),
    "output as an array": lambda model: model.h[1].attn.output.detach().numpy().__imul__(2),
    "a view of a view": lambda model: model.h[1].mlp.output[0][:2].fill_(5),
    "output replaced": assigns("mlp.output", lambda value: value * 2),
    "output replaced by a constant": assigns("attn.output", torch.ones_like),
    "input replaced": assigns("attn.input", lambda value: value * 2),
    "input in place": lambda model: model.h[1].attn.input.__setitem__((WHOLE, 0), 2.0),
    "input of the region replaced": assigns("input", lambda value: value * 2),
    "input of the region in place": lambda model: model.h[1].input.mul_(2),
    "output of the block in place": lambda model: model.h[1].output.__setitem__(0, 0.0),
    "output of the block replaced": assigns("output", lambda value: value**2),
    "skipped": lambda model: model.h[1].mlp.skip(torch.ones(2, WIDTH)),
    "skipped with a value of the region": lambda model: model.h[1].mlp.skip(model.h[1].attn.output),
    "block skipped": lambda model: model.h[1].skip(model.h[0].output),
    "numbers drawn": adds_noise,
    "modules called": calls_late,
    "values of another region": mixes_regions,
}


def gradients(net, edit, run):
    """Return the gradients of parameters, and what `run` gives, with a fixed state of the random numbers."""
    torch.manual_seed(0)
    found = run(nnsight.NNsight(net), edit)
    return parameter_gradients(net), found


def assert_alike(use_reentrant, edit, run):
    bare, net = pair(use_reentrant)
    expected, expected_found = gradients(bare, edit, run)
    parameters, found = gradients(net, edit, run)
    assert close(parameters, expected)
    assert len(found) == len(expected_found)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected_found, strict=True))
    assert net.computed > bare.computed
    assert_idle(net)


# -- gradients of the parameters


def plain_in_the_trace(model, edit):
    with model.trace(rows()):
        edit(model)
        loss = (model.output**2).sum()
        loss.backward()
    return [loss]


def plain_after_the_trace(model, edit):
    with model.trace(rows()):
        edit(model)
        loss = (model.output**2).sum()
    loss.backward()
    return [loss]


def again_and_again(model, edit):
    with model.trace(rows()):
        edit(model)
        loss = (model.output**2).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return [loss]


def several_traces_then_backward(model, edit):
    losses = []
    for seed in range(3):
        with model.trace(rows(seed=seed)):
            if seed != 1:
                edit(model)
            losses.append((model.output**2).sum())
    for loss in reversed(losses):
        loss.backward()
    return losses


def within_another_trace(model, edit):
    with model.trace(rows()):
        edit(model)
        loss = (model.output**2).sum()
    with model.trace(rows(seed=1)):
        first = model.h[0].output
        loss.backward()
        last = model.output
    return [loss, first, last]


def with_hooks_as_pass_of_its_own(model, edit):
    with model.edit() as edited:
        edit(edited)
    with edited.trace(rows()):
        block, late = edited.h[1].output, edited.h[2].attn.output
        loss = (edited.output**2).sum()
        with loss.backward():
            found = [late.grad.clone(), block.grad.clone()]
    return [loss, *found]


def traced_after_the_trace(model, edit):
    with model.edit() as edited:
        edit(edited)
    with edited.trace(rows()):
        block, late = edited.h[1].output, edited.h[2].attn.output
        loss = (edited.output**2).sum()
    with loss.backward():
        late.grad = late.grad * 2
        block.grad[:, :3] = 0
        found = block.grad.clone()
    return [loss, found]


RUNS = [
    plain_in_the_trace, plain_after_the_trace, again_and_again, several_traces_then_backward, within_another_trace,
    with_hooks_as_pass_of_its_own, traced_after_the_trace,
]  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", EDITS)
def test_gradients_are_those_without_checkpointing(use_reentrant, name, run):
    assert_alike(use_reentrant, EDITS[name], run)


@pytest.mark.parametrize("name", [name for name in EDITS if "skipped" not in name])
def test_an_edit_in_one_invoke(use_reentrant, name):
    def run(model, edit):
        with model.trace() as tracer:
            with tracer.invoke(rows(seed=1, n=3)):
                model.h[1].mlp.output *= 3
            with tracer.invoke(rows()):
                edit(model)
            with tracer.invoke():
                loss = (model.output**2).sum()
        loss.backward()
        return [loss]

    assert_alike(use_reentrant, EDITS[name], run)


def test_gradients_are_those_of_torch_with_hooks(use_reentrant):
    """The same edit by hand: a forward hook, with checkpointing and without."""
    expected = []
    for net in pair(use_reentrant):
        net.eval()
        net.h[1].mlp.register_forward_hook(lambda module, args, output: output * 3)
        (net(rows()) ** 2).sum().backward()
        expected.append(parameter_gradients(net))
    assert close(*expected)
    net = seeded(Stack, use_reentrant).eval()
    model = nnsight.NNsight(net)
    with model.trace(rows()):
        model.h[1].mlp.output = model.h[1].mlp.output * 3
        (model.output**2).sum().backward()
    assert close(parameter_gradients(net), expected[0])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_second_order(use_reentrant):
    def run(model, edit):
        with model.trace(rows()):
            edit(model)
            block = model.h[2].mlp.output
            with torch.tanh(model.output).sum().backward(create_graph=True):
                gradient = block.grad
        (gradient**2).sum().backward()
        return [gradient.detach()]

    assert_alike(use_reentrant, EDITS["output replaced"], run)


def test_a_graph_outlives_its_model(use_reentrant):
    def run(model, edit):
        x = rows().requires_grad_(True)
        with model.trace(x):
            edit(model)
            loss = (model.output**2).sum()
        net = weakref.ref(model._module)
        del model
        loss.backward()
        return [x.grad, torch.tensor(net() is None)]

    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = nnsight.NNsight(seeded(Stack, use_reentrant, is_checkpointed=is_checkpointed).eval())
        holder = [model]
        del model
        found.append(run(holder.pop(), EDITS["output in place"])[0])
    assert torch.allclose(*found)


# -- a graph that outlives its run


def test_an_edit_whose_place_is_gone_is_an_error_and_never_a_wrong_gradient(use_reentrant):
    net = seeded(Stack, use_reentrant).eval()
    model = nnsight.NNsight(net)
    with model.trace(rows()):
        model.h[1].mlp.output = model.h[1].mlp.output * 3
        loss = (model.output**2).sum()
    net.h[1].mlp = copy.deepcopy(net.h[1].mlp)
    with pytest.raises(
        nnsight.errors.RecomputeError, match=r"edit that was made at `model\.h\.1\.mlp\.output`.*not reached"
    ):
        loss.backward()


def test_a_graph_without_edits_outlives_its_run(use_reentrant):
    bare, net = pair(use_reentrant)
    for one in (bare, net):
        one.eval()
    (bare(rows()) ** 2).sum().backward()
    model = nnsight.NNsight(net)
    with model.trace(rows()):
        loss = (model.output**2).sum()
    loss.backward()
    assert close(parameter_gradients(net), parameter_gradients(bare))


def test_backward_from_another_thread(use_reentrant):
    def run(model, edit):
        with model.trace(rows()):
            edit(model)
            loss = (model.output**2).sum()
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
        return [loss]

    assert_alike(use_reentrant, EDITS["output in place"], run)


# -- everything else stays as it is


def test_reading_in_a_region_changes_nothing_and_has_a_graph(use_reentrant):
    bare, net = pair(use_reentrant)
    values = []
    for one in (bare, net):
        torch.manual_seed(0)
        model = nnsight.NNsight(one)
        with model.trace(rows()):
            hidden = model.h[1].attn.output
            output = model.output
        assert hidden.requires_grad
        values.append((hidden.detach(), output.detach()))
    assert same(*values)


def test_a_region_within_a_region_is_not_computed_again_before_backward(use_reentrant):
    def through(self, x):
        def inner(y):
            return checkpoint(self.b, y, use_reentrant=use_reentrant)

        return self.c(checkpoint(inner, self.a(x), use_reentrant=use_reentrant))

    net, seen = seeded(Calls, through), []
    net.b.register_forward_pre_hook(lambda module, args: seen.append(1))
    model = nnsight.NNsight(net)
    with model.trace(rows()):
        model.b.output = model.b.output * 1
        loss = model.output.sum()
    assert len(seen) == 1
    loss.backward()
    assert len(seen) > 1


def test_occurrences_are_not_used_up_by_computing_again(use_reentrant):
    net = seeded(Stack, use_reentrant).eval()
    model = nnsight.NNsight(net)
    with model.trace(rows()):
        first = model.h[0].mlp.output
        with first.sum().backward(retain_graph=True):
            pass
        model.h[1].mlp.output = torch.zeros(2, WIDTH)
        later = model.h[1].output
        assert torch.equal(later, model.h[1].output)
    assert_usable(model, net.eval(), rows())


def test_an_error_in_a_block_leaves_everything_as_it_was(use_reentrant):
    net = seeded(Stack, use_reentrant).eval()
    model = nnsight.NNsight(net)
    with pytest.raises(ZeroDivisionError):
        with model.trace(rows()):
            model.h[1].mlp.output *= 2
            1 / 0
    assert_usable(model, net, rows())
    bare = seeded(Stack, use_reentrant, is_checkpointed=False).eval()
    for one in (bare, net):
        one(rows()).sum().backward()
    assert close(parameter_gradients(net), parameter_gradients(bare))


def test_without_a_trace_a_reentrant_region_is_reentrant(use_reentrant):
    seen = []

    def region(x):
        seen.append(torch.is_grad_enabled())
        return x**2

    nnsight.NNsight(nn.Linear(2, 2))
    x = torch.ones(2, requires_grad=True)
    checkpoint(region, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == ([False, True] if use_reentrant else [True, True])
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_references_go_without_the_collector(use_reentrant):
    gc.collect()
    gc.disable()
    try:
        net = seeded(Stack, use_reentrant)
        model = nnsight.NNsight(net)
        with model.trace(rows()):
            model.h[1].mlp.output = hidden = model.h[1].mlp.output * 2
            model.h[2].attn.input[:, 0] = 2
            loss = model.output.sum()
        alive = [weakref.ref(one) for one in (net, hidden)]
        loss.backward()
        del net, model, hidden, loss
        assert [one() for one in alive] == [None] * 2
    finally:
        gc.enable()
