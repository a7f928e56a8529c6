"""Programs of 0.6 and 0.7 that read and change values, on any torch module: each test is one, as users write it."""

from __future__ import annotations

import pytest
import torch
from modules import Calls, Net, plain, rows, seeded
from torch import nn

from nnsight import NNsight


class Tupled(nn.Module):
    """Layers that return tuples and take their input by keyword, as those of transformers 4 do."""

    def __init__(self, layers=3, width=8):
        super().__init__()
        self.h = nn.ModuleList(TupledLayer(width) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.h:
            x = layer(hidden_states=x)[0]
        return self.head(x)


class TupledLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Linear(width, width)

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.mlp(hidden_states)), hidden_states.sum()


def sequences(n=2, length=4, width=8):
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(0))


def test_output_read_several_times_at_one_visit_is_one_object():
    model = NNsight(seeded(Net))
    with model.trace(rows()):
        first = model.h[0].output
        second = model.h[0].output
        third = model.h[0].output.save()
    assert first is second is third


@pytest.mark.parametrize(
    ("index", "value"),
    [
        ((slice(None), 0), 0),
        ((0, slice(1, 3)), 1.5),
        ((slice(None), [0, 2]), 2),
        ((slice(None), torch.tensor([1, 3])), 3),
        ((0, -1), torch.arange(8.0)),
        ((slice(None), slice(None), [1, 5]), torch.ones(2, 4, 2)),
    ],
)
def test_parts_of_an_output_assigned_by_ints_lists_and_tensors(index, value):
    net = seeded(Tupled)
    model = NNsight(net)
    with model.trace(sequences()):
        model.h[1].output[0][index] = value
        out = model.output.save()

    def edit(path, output):
        if path == "h.1":
            output[0][index] = value

    with torch.no_grad():
        expected = plain(net, sequences(), edit=edit).result
    assert torch.allclose(out, expected)


@pytest.mark.parametrize("amount", [2, 0.5, torch.arange(8.0)])
def test_parts_of_an_output_added_to(amount):
    net = seeded(Tupled)
    model = NNsight(net)
    with model.trace(sequences()):
        model.h[0].output[0][:, -1] += amount
        out = model.head.output.save()

    def edit(path, output):
        if path == "h.0":
            output[0][:, -1] += amount

    with torch.no_grad():
        assert torch.allclose(out, plain(net, sequences(), edit=edit).result)


def test_whole_output_added_to():
    net = seeded(Net)
    model = NNsight(net)
    with torch.no_grad():
        with model.trace(rows()):
            model.h[0].output += 1
            model.h[1].attn.output *= torch.arange(8.0)
            out = model.output.save()

        def edit(path, output):
            return {"h.0": output + 1, "h.1.attn": output * torch.arange(8.0)[: output.shape[-1]]}.get(path)

        expected = plain(net, rows(), edit=lambda path, o: edit(path, o) if path in ("h.0", "h.1.attn") else None)
    assert torch.equal(out, expected.result)


def test_output_replaced_by_a_tuple_with_the_rest_of_the_old_one():
    net = seeded(Tupled)
    model = NNsight(net)
    with model.trace(sequences()):
        old = model.h[1].output
        model.h[1].output = (old[0] * 3, *old[1:])
        new = model.h[1].output.save()
        out = model.output.save()
    expected = plain(net, sequences(), edit=lambda path, o: (o[0] * 3, *o[1:]) if path == "h.1" else None)
    assert torch.equal(out, expected.result)
    assert torch.equal(new[1], old[1])


def test_requires_grad_set_on_an_output():
    net = seeded(Net).requires_grad_(False)
    model = NNsight(net)
    with model.trace(rows()):
        model.h[0].output.requires_grad = True
        hidden = model.h[0].output.save()
        loss = model.output.sum()
    loss.backward()
    leaf = plain(net, rows()).outputs["h.0"][0].clone().requires_grad_()
    net.lm_head(net.h[2](net.h[1](leaf))).sum().backward()
    assert torch.equal(hidden.grad, leaf.grad)


@pytest.mark.parametrize("how", ["assigned", "in part"])
def test_input_replaced_where_it_came_as_a_keyword(how):
    net = seeded(Tupled)
    model = NNsight(net)
    with model.trace(sequences()):
        if how == "assigned":
            model.h[1].input = model.h[1].input * 2
        else:
            model.h[1].input[:, 2] = 7
        given = model.h[1].inputs.save()
        out = model.output.save()
    assert given[0] == ()
    assert list(given[1]) == ["hidden_states"]
    with torch.no_grad():
        x = net.h[0](sequences())[0]
        if how == "assigned":
            x = x * 2
        else:
            x[:, 2] = 7
        expected = net.head(net.h[2](net.h[1](x)[0])[0])
    assert torch.allclose(out, expected)


def test_view_of_a_view_is_written_through():
    net = seeded(Tupled)
    model = NNsight(net)
    pos, vector = 2, torch.arange(8.0)
    with model.trace(sequences()):
        hs = model.h[0].output[0]
        hs[0, pos][:] = vector
        out = model.output.save()

    def edit(path, output):
        if path == "h.0":
            output[0][0, pos] = vector

    with torch.no_grad():
        assert torch.allclose(out, plain(net, sequences(), edit=edit).result)


def test_consecutive_modules_skipped_with_a_tensor():
    net = seeded(Net)
    model = NNsight(net)
    with model.trace(rows()):
        x = model.emb.output
        for block in model.h:
            block.skip(x)
        out = model.output.save()
    assert torch.equal(out, net.lm_head(net.emb(rows())))


def test_consecutive_modules_skipped_with_a_tuple():
    net = seeded(Tupled)
    model = NNsight(net)
    with model.trace(sequences()):
        hidden = model.h[0].input
        model.h[0].skip((hidden, None))
        model.h[1].skip((hidden, None))
        left = model.h[1].output.save()
        out = model.output.save()
    assert left[1] is None
    assert torch.equal(out, net.head(net.h[2](sequences())[0]))


def test_values_of_a_module_called_several_times():
    net = seeded(Calls, lambda self, x: self.a(self.a(self.a(x))))
    model = NNsight(net)
    seen = []
    with model.trace(rows()) as tracer:
        for _ in tracer.iter[0:3]:
            seen.append(model.a.output)
    assert [torch.equal(one, two) for one, two in zip(seen, plain(net, rows()).outputs["a"], strict=True)] == [True] * 3
