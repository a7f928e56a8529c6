"""What `torch.compile` has made is looked into as what it was made of, and stays compiled for everybody else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import NNsight

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower")  # Python 3.13.0

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def scaled(x):
    return torch.mul(x, 3) + 1


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = scaled

    def forward(self, x):
        return torch.relu(self.function(self.linear(x))) * 2


class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) - 1


class Counting:
    """A backend that runs what it is given, and counts how often it is."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def backend():
    torch.compiler.reset()
    yield Counting()
    torch.compiler.reset()


def in_place(part, backend):
    part.compile(backend=backend)
    return part


def forward_of_it(part, backend):
    part.forward = torch.compile(part.forward, backend=backend)
    return part


def function_of_it(part, backend):
    part.function = torch.compile(part.function, backend=backend)
    return part


def wrapped(part, backend):
    return torch.compile(part, backend=backend)


@pytest.mark.parametrize("how", [in_place, forward_of_it, function_of_it, wrapped])
def test_operations_of_what_was_compiled(how, backend):
    torch.manual_seed(0)
    part = Part()
    with torch.no_grad():
        inner = part.linear(X)
        net = Net(how(part, backend))
        expected = net(X)
        count = backend.count
        assert count == 1
        model = NNsight(net)
        with model.trace(X) as tracer:
            product = model.part.source.self_function_0.source.torch_mul_0.output
            active = model.part.source.torch_relu_0.output
            model.part.source.torch_relu_0.output = active + 1
            result = tracer.result
        assert torch.equal(product, inner * 3)
        assert torch.equal(active, torch.relu(inner * 3 + 1))
        assert torch.equal(result, (active + 1) * 2 - 1)
        assert torch.equal(net(X), expected)
    assert backend.count == count, "it was compiled again"


def test_a_compiled_model_is_the_model_inside(backend):
    net = torch.compile(Net(Part()), backend=backend)
    with torch.no_grad():
        expected = net(X)
        model = NNsight(net)
        assert model.source.names == ["self_part_0"]
        assert model.source.self_part_0.path == "model._orig_mod.source.self_part_0"
        with model.trace(X) as tracer:
            shifted = model.source.ops.sub_0.output
            result = tracer.result
    assert torch.equal(shifted, expected)
    assert torch.equal(result, expected)
