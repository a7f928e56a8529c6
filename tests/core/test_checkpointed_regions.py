"""Whichever way values enter a region of `torch.utils.checkpoint`, gradients are right or backward is an error."""

import functools

import pytest
import torch
from modules import WIDTH, Calls, assert_usable, rows, seeded
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import nnsight


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def use_reentrant(request):
    return request.param


def close(left, right):
    return left.keys() == right.keys() and all(
        one is other if one is None or other is None else torch.allclose(one, other, atol=1e-6)
        for one, other in ((left[name], right[name]) for name in left)
    )


def parameter_gradients(net):
    return {name: one.grad for name, one in net.named_parameters()}


def early_and_late(self, x):
    """Uses its input before the place where blocks edit it, and after."""
    return torch.relu(x) * self.b(x)


def of_pair(self, values):
    return early_and_late(self, values[0]) + values[1]


def ones():
    return torch.ones(1, requires_grad=True)


FORMS = {
    "argument": lambda self, x, how: checkpoint(functools.partial(early_and_late, self), x, **how),
    "view": lambda self, x, how: checkpoint(
        lambda y: early_and_late(self, y), x.view(2, 1, WIDTH)[:, 0], **how
    ),
    "nested": lambda self, x, how: checkpoint(
        lambda y: checkpoint(functools.partial(early_and_late, self), y * 1, **how) * 2, x, **how
    ),
    "nested, the same": lambda self, x, how: checkpoint(
        lambda y: checkpoint(functools.partial(early_and_late, self), y, **how) * 2, x, **how
    ),
    "sequential": lambda self, x, how: checkpoint_sequential(
        [functools.partial(early_and_late, self), torch.sin, torch.relu], 2, x, **how
    ),
    "keyword": lambda self, x, how: checkpoint(lambda x: early_and_late(self, x), x=x, use_reentrant=False),
    "partial": lambda self, x, how: checkpoint(functools.partial(early_and_late, self, x), use_reentrant=False),
    "closure": lambda self, x, how: checkpoint(lambda _: early_and_late(self, x), ones(), **how),
    "tuple": lambda self, x, how: checkpoint(lambda _, both: of_pair(self, both), ones(), (x, x * 2), **how),
}  # fmt: skip
UNWATCHED = {"keyword", "partial", "closure", "tuple"}


def bare_form(name, self, x):
    if name in ("nested", "nested, the same"):
        return early_and_late(self, x * 1 if name == "nested" else x) * 2
    if name == "sequential":
        return torch.relu(torch.sin(early_and_late(self, x)))
    if name == "tuple":
        return of_pair(self, (x, x * 2))
    return early_and_late(self, x)


FORM_EDITS = {
    "none": lambda model: None,
    "input in place": lambda model: model.b.input.__setitem__((slice(None), 0), 3.0),
    "output in place": lambda model: model.b.output.mul_(2),
    "input replaced": lambda model: setattr(model.b, "input", model.b.input * 2),
    "output replaced by the input": lambda model: setattr(model.b, "output", model.b.input),
    "edited before": lambda model: model.a.output.mul_(3),
}


@pytest.mark.parametrize("edit", FORM_EDITS)
@pytest.mark.parametrize("form", FORMS)
def test_however_values_enter_a_region_gradients_are_right_or_an_error(use_reentrant, form, edit):
    def forward(is_checkpointed):
        def run(self, x):
            x = self.a(x)
            if is_checkpointed:
                return self.c(FORMS[form](self, x, {"use_reentrant": use_reentrant}))
            return self.c(bare_form(form, self, x))

        return run

    is_refused = edit == "input in place" and form in UNWATCHED
    expected = None
    for is_checkpointed in (False, True):
        net = seeded(Calls, forward(is_checkpointed))
        model = nnsight.NNsight(net)
        with model.trace(rows()):
            FORM_EDITS[edit](model)
            loss = (model.output**2).sum()
        if is_checkpointed and is_refused:
            with pytest.raises(nnsight.errors.RecomputeError, match=r"shape \(2, 8\).*edited in place in it.*Replace"):
                loss.backward()
            assert_usable(model, net, rows())
            continue
        loss.backward(retain_graph=True)
        loss.backward()
        if expected is None:
            expected = parameter_gradients(net)
        else:
            assert close(parameter_gradients(net), expected)


def test_what_a_region_finds_on_a_module_and_blocks_edit_is_an_error(use_reentrant):
    def forward(self, x):
        self.kept = self.a(x)
        return self.c(checkpoint(lambda _: early_and_late(self, self.kept), ones(), use_reentrant=use_reentrant))

    net = seeded(Calls, forward)
    model = nnsight.NNsight(net)
    with model.trace(rows()):
        model.b.input[:, 0] = 3
        loss = (model.output**2).sum()
    with pytest.raises(nnsight.errors.RecomputeError, match="uses but does not compute"):
        loss.backward()


def test_a_value_edited_between_the_region_and_backward_is_an_error():
    def forward(self, x):
        x = self.a(x)
        value = checkpoint(lambda y: torch.relu(y) + torch.sin(x), x * 1, use_reentrant=False)
        return self.c(self.b(value))

    model = nnsight.NNsight(seeded(Calls, forward))
    with model.trace(rows()):
        early = model.a.output
        model.b.output
        early.zero_()
        loss = model.output.sum()
    with pytest.raises(nnsight.errors.RecomputeError, match="edited in place since"):
        loss.backward()


@pytest.mark.parametrize("edit", FORM_EDITS)
def test_a_scan_of_a_region(use_reentrant, edit):
    net = seeded(Calls, lambda self, x: self.c(FORMS["argument"](self, self.a(x), {"use_reentrant": use_reentrant})))
    model = nnsight.NNsight(net)
    with model.scan(rows()):
        FORM_EDITS[edit](model)
        shape = nnsight.save(model.output.shape)
    assert shape == (2, WIDTH)
    assert_usable(model, net, rows())


class Sparse(torch.nn.Module):
    def forward(self, x):
        return x.to_sparse()


def test_values_without_memory_of_their_own(use_reentrant):
    def region(self, x):
        return self.sparse(self.b(x)).to_dense()

    def through(self, x):
        return self.c(checkpoint(functools.partial(region, self), self.a(x), use_reentrant=use_reentrant))

    found = []
    for is_traced in (False, True):
        net = seeded(Calls, through)
        net.sparse = Sparse()
        if is_traced:
            model = nnsight.NNsight(net)
            with model.trace(rows()):
                value = model.sparse.output
                assert value.layout is torch.sparse_coo
                loss = model.output.sum()
        else:
            loss = net(rows()).sum()
        loss.backward()
        found.append(parameter_gradients(net))
    assert close(*found)
    meta = seeded(Calls, through).to("meta")
    meta.sparse = torch.nn.Identity()
    meta.function = lambda self, x: checkpoint(self.b, self.a(x), use_reentrant=use_reentrant)
    model = nnsight.NNsight(meta)
    with model.trace(rows().to("meta")):
        model.b.output *= 2
        assert model.output.shape == (2, WIDTH)
