"""Operations in invokes: each sees its rows, and what it writes or skips reaches no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import BatchError, NNsight

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def mixed(x, scale):
    y = torch.sigmoid(x)
    return y * scale, scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        scale = self.scale
        same = x
        positions = torch.arange(4)  # as long as the batch
        kept = self.scale * 2
        x = torch.relu(self.first(x)) @ torch.eye(4)
        pair = mixed(x, scale)
        x, _ = pair
        return x[:, :2] + same[:, :2] + positions[0] + kept[0]


@pytest.fixture
def net():
    return Net()


def whole(net, read):
    """What a read gives of all the rows."""
    model = NNsight(net)
    with torch.no_grad(), model.trace(X):
        found = read(model.source)
        found = [one.clone() for one in found] if isinstance(found, tuple) else found.clone()
    return found


WITH_ROWS = {
    "call": lambda source: source.torch_relu_0.output,
    "submodule": lambda source: source.self_first_0.output,
    "input": lambda source: source.torch_relu_0.input,
    "operator": lambda source: source.ops.matmul_0.output,
    "operand": lambda source: source.ops.matmul_0.input,
    "variable": lambda source: source.vars.same_0.output,
    "variable of an operator": lambda source: source.vars.x_0.output,
    "subscript": lambda source: source.ops.getitem_0.output,
    "return": lambda source: source.returns[0].output,
    "below a call": lambda source: source.mixed_0.source.torch_sigmoid_0.output,
}
WITHOUT = {
    "call": lambda source: source.torch_arange_0.output,
    "variable of a call": lambda source: source.vars.positions_0.output,
    "parameter": lambda source: source.vars.scale_0.output,
    "operator": lambda source: source.ops.mul_0.output,
    "variable of an operator": lambda source: source.vars.kept_0.output,
}


@pytest.mark.parametrize("name", WITH_ROWS)
def test_an_invoke_reads_its_rows(net, name):
    read = WITH_ROWS[name]
    expected = whole(net, read)
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = read(model.source).clone()
        with tracer.invoke(X[1:]):
            rest = read(model.source).clone()
        with tracer.invoke():
            every = read(model.source).clone()
    assert torch.equal(first, expected[:1])
    assert torch.equal(rest, expected[1:])
    assert torch.equal(every, expected)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_rows_is_read_whole_though_as_long_as_the_batch(net, name):
    read = WITHOUT[name]
    expected = whole(net, read)
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = read(model.source).clone()
        with tracer.invoke(X[1:]):
            rest = read(model.source).clone()
    assert torch.equal(first, expected)
    assert torch.equal(rest, expected)


def test_a_value_without_rows_does_not_hide_the_rows_of_the_next(net):
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            scale = model.source.vars.scale_0.output
            same = model.source.vars.same_0.output
        with tracer.invoke(X[1:]):
            rest = model.source.vars.same_0.output
    assert torch.equal(scale, net.scale)
    assert torch.equal(same, X[:1])
    assert torch.equal(rest, X[1:])


EDITS = {
    "assigned": lambda source: setattr(source.torch_relu_0, "output", torch.ones(1, 4)),
    "in place": lambda source: source.torch_relu_0.output.fill_(1),
    "input": lambda source: setattr(source.torch_relu_0, "input", torch.ones(1, 4)),
    "variable": lambda source: setattr(source.vars.x_0, "output", torch.ones(1, 4)),
    "below a call": lambda source: setattr(source.mixed_0.source.torch_sigmoid_0, "output", torch.ones(1, 4)),
    "returned": lambda source: source.returns[0].output.fill_(3),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_reaches_the_rows_of_its_invoke_alone(net, name):
    model = NNsight(net)
    plain = net(X).detach()
    with torch.no_grad(), model.trace(X[1:2]):
        EDITS[name](model.source)
        alone = model.output.clone()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            pass
        with tracer.invoke(X[1:2]):
            EDITS[name](model.source)
        with tracer.invoke(X[2:]):
            pass
        with tracer.invoke():
            result = model.output.clone()
    expected = torch.cat([plain[:1], alone, plain[2:]])
    assert torch.equal(result, expected)
    assert not torch.equal(alone, plain[1:2])


def test_each_invoke_edits_its_rows_of_one_operation(net):
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        for index in range(4):
            with tracer.invoke(X[index : index + 1]):
                model.source.torch_relu_0.output = model.source.torch_relu_0.output * index
        with tracer.invoke():
            product = model.source.ops.matmul_0.input
    assert torch.equal(product, torch.relu(net.first(X)).detach() * torch.arange(4.0)[:, None])


def test_skipped_by_all_invokes_but_not_by_some(net):
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:3]):
            model.source.self_first_0.skip(torch.zeros(3, 4))
        with tracer.invoke(X[3:]):
            model.source.self_first_0.skip(torch.ones(1, 4))
        with tracer.invoke():
            given = model.source.torch_relu_0.input
    assert torch.equal(given, torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None].expand(4, 4))
    with pytest.raises(BatchError, match="`model.source.self_first_0` was skipped for 3 of 4 rows"):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(X[:3]):
                model.source.self_first_0.skip(torch.zeros(3, 4))
            with tracer.invoke(X[3:]):
                pass
    with model.trace(X) as tracer:
        assert torch.equal(tracer.result, net(X))


def test_an_untaken_branch_in_one_invoke_does_not_stop_the_other(net):
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            with pytest.raises(ValueError, match="was not provided"):
                with tracer.iter[1]:
                    model.source.torch_relu_0.output
        with tracer.invoke(X[1:]):
            rest = model.source.torch_relu_0.output
    assert torch.equal(rest, torch.relu(net.first(X[1:])).detach())


def test_invokes_one_after_another(net):
    model = NNsight(net)
    seen = []
    with torch.no_grad(), model.trace(batched=False) as tracer:
        for index in range(2):
            with tracer.invoke(X[index : index + 1]):
                model.source.torch_relu_0.output = torch.full((1, 4), float(index))
                seen.append(model.source.ops.matmul_0.output)
    assert [one.mean().item() for one in seen] == [0.0, 1.0]
