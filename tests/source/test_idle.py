"""Rule K1: the rewritten forward is in place only while a run needs it, and only for that run."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight_source import live, place, rewrite

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(torch.relu(self.linear(x)))


class Child(Part):
    pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.other = Part(), Part()

    def forward(self, x):
        return self.other(self.part(x))


@pytest.fixture
def net():
    return Net()


@pytest.fixture(autouse=True)
def _nothing_remains():
    before = {kind: dict(vars(kind)) for kind in (Part, Child, Net)}
    yield
    assert {kind: dict(vars(kind)) for kind in before} == before
    assert not live._tables
    assert not place._standing


def test_taking_and_printing_a_source_changes_nothing(net):
    model = NNsight(net)
    source = model.part.source
    str(source), str(source.torch_relu_0), list(source), source.vars.names, source.returns[0]
    assert "forward" not in vars(net.part)
    assert Part.forward.__code__.co_filename == __file__
    assert not hasattr(Part.forward, "_nnsight_before")


def test_it_is_in_place_only_while_a_run_looks_in(net):
    model = NNsight(net)
    original = Part.forward
    with model.trace(X):
        model.part.input
        assert Part.forward is original
        model.part.source.torch_relu_0.output
        assert Part.forward is not original
        assert "forward" not in vars(net.part)
        model.other.output
    assert Part.forward is original


def test_a_run_that_asks_for_no_operation_never_sees_it(net):
    model = NNsight(net)
    with model.trace(X):
        model.part.source.torch_relu_0.output
    original = Part.forward
    with model.trace(X):
        model.part.output
        assert Part.forward is original


@pytest.mark.parametrize("how", ["error in the block", "error in the model", "stop", "missed", "abandoned"])
def test_it_is_taken_away_however_a_run_ends(net, how):
    model = NNsight(net)
    original = Part.forward
    if how == "error in the block":
        with pytest.raises(ZeroDivisionError), model.trace(X):
            model.part.source.torch_relu_0.output
            raise ZeroDivisionError
    elif how == "error in the model":
        with pytest.raises(RuntimeError), model.trace(X):
            model.part.source.torch_relu_0.output = torch.zeros(2, 5, 7)
            model.other.linear.input = torch.zeros(9, 9)
            model.output
    elif how == "stop":
        with model.trace(X) as tracer:
            model.part.source.torch_relu_0.output
            tracer.stop()
    elif how == "missed":
        with pytest.raises(ValueError), model.trace(X) as tracer, tracer.iter[3]:
            model.part.source.torch_relu_0.output
    else:

        def block():
            with model.trace(X):
                model.part.source.torch_relu_0.output
                yield

        left = block()
        next(left)
        left.close()
    assert Part.forward is original
    assert torch.equal(net(X), Net()(X))


def test_others_get_the_original_meanwhile(net):
    model, twin, child = NNsight(net), Net(), Child()
    with torch.no_grad():
        plain, of_child = twin(X), child(X)
        with model.trace(X):
            model.part.source.torch_relu_0.output = torch.zeros(2, 4)
            assert torch.equal(twin(X), plain)
            assert torch.equal(net(X), plain)
            assert torch.equal(child(X), of_child)
            seen = []
            thread = threading.Thread(target=lambda: seen.append(net(X)))
            thread.start()
            thread.join()
            edited = model.output
    assert torch.equal(seen[0], plain)
    assert not torch.equal(edited, plain)


def test_copies_pickles_and_checkpoints_taken_meanwhile_are_clean(net):
    model = NNsight(net)
    file = io.BytesIO()
    with torch.no_grad(), model.trace(X):
        model.part.source.torch_relu_0.output = torch.zeros(2, 4)
        copied, pickled = copy.deepcopy(net), pickle.dumps(net)
        torch.save(net.state_dict(), file)
        assert [*inspect.signature(net.part.forward).parameters] == ["x"]
        assert inspect.getsource(Part.forward).lstrip().startswith("def forward(self, x):")
    for one in (copied, pickle.loads(pickled)):
        assert torch.equal(one(X), net(X))
        assert set(vars(one.part)) == set(vars(net.part))


def test_class_of_a_subclass_is_left_alone(net):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.child, self.part = Child(), Part()

        def forward(self, x):
            return self.part(self.child(x))

    holder = Holder()
    model = NNsight(holder)
    with model.trace(X):
        in_child = model.child.source.torch_relu_0.output
        assert "forward" in vars(Child)
        in_part = model.part.source.torch_relu_0.output
    assert "forward" not in vars(Child)
    assert torch.equal(in_child, torch.relu(holder.child.linear(X)))
    assert torch.equal(in_part, torch.relu(holder.part.linear(torch.tanh(in_child))))


def test_forward_of_an_instance_is_put_back_and_looks_the_same_meanwhile(net):
    def forward(x):
        return torch.sigmoid(x)

    net.part.forward = forward
    model = NNsight(net)
    with model.trace(X):
        got = model.part.source.torch_sigmoid_0.output
        assert net.part.forward == forward
        assert net.part.forward.__name__ == "forward"
        assert copy.copy(net.part.forward) is forward
        assert copy.deepcopy(net).part.forward is forward
    assert vars(net.part)["forward"] is forward
    assert torch.equal(got, torch.sigmoid(X))


def test_forward_replaced_meanwhile_is_left(net):
    """What a user puts there while a run looks in is not taken away at its end."""
    model = NNsight(net)
    original = Part.forward
    plain = net.part(X)
    try:
        with model.trace(X):
            model.part.source.torch_relu_0.output
            standing = Part.forward

            @functools.wraps(standing)
            def wrapped(self, x):
                return standing(self, x) + 1

            Part.forward = wrapped
            model.output
        assert Part.forward is wrapped
        assert torch.equal(net.part(X), plain + 1)
    finally:
        Part.forward = original


def test_code_is_rewritten_once_for_all_modules_of_a_class(net):
    model = NNsight(net)
    assert model.part.source._site.rewritten is model.other.source._site.rewritten
    assert rewrite.rewritten(Part.forward) is model.part.source._site.rewritten


def test_weights_are_freed_without_the_collector():
    def look():
        net = Net()
        model = NNsight(net)
        with model.trace(X) as tracer:
            model.part.source.torch_relu_0.output
            model.other.source.torch_tanh_0.output = torch.zeros(2, 4)
            tracer.cache(modules=[model.other.source.returns])
        return weakref.ref(net.part), weakref.ref(net)

    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in look()] == [None, None]
    finally:
        gc.enable()


def test_two_runs_of_one_class_end_in_any_order(net):
    first, second = NNsight(net), NNsight(Net())
    original = Part.forward
    one, other = first.trace(X), second.trace(X)
    one.__enter__()
    a = first.part.source.torch_relu_0.output
    other.__enter__()
    b = second.part.source.torch_relu_0.output
    one.__exit__(None, None, None)
    assert Part.forward is not original
    c = second.part.source.torch_tanh_0.output
    other.__exit__(None, None, None)
    assert Part.forward is original
    assert torch.equal(a, b)
    assert torch.equal(c, torch.tanh(b))


def test_export_and_script_work_as_before(net):
    model = NNsight(net)
    with model.trace(X):
        model.part.source.torch_relu_0.output
    assert torch.equal(torch.export.export(net, (X,)).module()(X), net(X))
    assert torch.equal(torch.jit.trace(net, X)(X), net(X))
