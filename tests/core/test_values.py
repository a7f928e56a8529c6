"""What a block reads and writes: `.output`, `.input`, `.inputs`, results."""

import copy

import pytest
import torch
from modules import WIDTH, Calls, Net, Structured, plain, rows, same, seeded

from nnsight import NNsight


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


# -- reading


def test_every_output_and_input_equals_what_hooks_see(net, model):
    x = rows()
    expected = plain(net, x)
    paths = ["emb", *(f"h.{i}{part}" for i in range(3) for part in ("", ".attn", ".mlp"))]
    order = ["emb", *(f"h.{i}{part}" for i in range(3) for part in (".attn", ".mlp", "")), "lm_head"]
    assert set(order) == {*paths, "lm_head"}
    seen = {}
    with model.trace(x):
        for path in order:
            seen[path] = model.get(path).output
    for path in order:
        assert torch.equal(seen[path], expected.outputs[path][0]), path
    with model.trace(x):
        seen = {path: model.get(path).inputs for path in ("emb", "h.0", "h.0.attn", "h.0.mlp", "h.1", "lm_head")}
    for path, inputs in seen.items():
        assert same(inputs, expected.inputs[path][0]), path


def test_root_has_input_and_output(net, model):
    x = rows()
    with model.trace(x):
        first = model.input
        last = model.output
    assert first is x
    assert torch.equal(last, net(x))


def test_structured_values_come_as_they_are():
    net = seeded(Structured)
    model, x = NNsight(net), rows()
    expected = plain(net, x)
    with model.trace(x):
        pair = model.pair.output
        mapping = model.mapping.output
        answer = model.answering.output
    assert same(pair, expected.outputs["pair"][0])
    assert same(mapping, expected.outputs["mapping"][0])
    assert type(answer) is type(expected.outputs["answering"][0])
    assert same(answer, expected.outputs["answering"][0])


def test_reading_again_at_one_visit_gives_the_same_object(model):
    with model.trace(rows()):
        first = model.h[0].output
        assert model.h[0].output is first
        inputs = model.h[1].inputs
        assert model.h[1].inputs is inputs
        assert model.h[1].input is inputs[0][0]
        assert model.h[1].input is first


def test_what_the_block_binds_is_there_afterwards(net, model):
    x = rows()
    with model.trace(x):
        h = model.h[0].output
        shape = h.shape
    assert shape == (2, WIDTH)
    assert torch.equal(h, plain(net, x).outputs["h.0"][0])


def test_result_is_what_the_traced_call_returns(net, model):
    x = rows()
    with model.trace(x) as tracer:
        result = tracer.result
        assert tracer.result is result
    assert torch.equal(result, net(x))


def test_result_can_be_replaced_only_where_it_is_a_value(net, model):
    x = rows()
    with model.trace(x) as tracer:
        model.output = model.output * 2
        result = tracer.result
    assert torch.equal(result, net(x) * 2)


def test_keyword_input_is_the_input(net):
    model = NNsight(net)
    x = rows()
    with model.trace(x=x):
        assert model.input is x
        assert same(model.inputs, ((), {"x": x}))
        out = model.output
    assert torch.equal(out, net(x))


def test_forward_with_positional_and_keyword_arguments():
    net = seeded(Calls, lambda self, x, *rest, scale=1.0, **more: self.a(x) * scale + sum(rest) + more["shift"])
    model, x = NNsight(net), rows()
    with model.trace(x, 1.0, 2.0, scale=3.0, shift=4.0):
        args, kwargs = model.inputs
        out = model.output
    assert args[0] is x
    assert args[1:] == (1.0, 2.0)
    assert kwargs == {"scale": 3.0, "shift": 4.0}
    assert torch.equal(out, net(x, 1.0, 2.0, scale=3.0, shift=4.0))


def test_model_without_arguments_runs_without_input():
    net = seeded(Calls, lambda self: self.a(torch.ones(1, WIDTH)))
    model = NNsight(net)
    with model.trace():
        out = model.a.output
    assert torch.equal(out, net())


# -- writing


def edited(net, x, path, change):
    return plain(net, x, edit=lambda at, output: change(output) if at == path else None)


@pytest.mark.parametrize("path", ["emb", "h.1", "h.1.attn", "lm_head", ""])
def test_replacing_an_output_equals_a_hook_that_returns_it(net, model, path):
    x = rows()
    expected = edited(net, x, path, lambda output: output * 2 + 1)
    with model.trace(x) as tracer:
        envoy = model.get(path)
        envoy.output = envoy.output * 2 + 1
        again = envoy.output
        result = tracer.result
    assert torch.equal(again, expected.outputs[path][0])
    assert torch.equal(result, expected.result)
    assert not torch.equal(result, net(x))


def test_writing_without_reading_waits_for_the_location(net, model):
    x, value = rows(), torch.ones(2, WIDTH)
    with model.trace(x) as tracer:
        model.h[1].output = value
        result = tracer.result
    assert torch.equal(result, edited(net, x, "h.1", lambda _: value).result)


def test_last_write_at_a_visit_wins(net, model):
    x = rows()
    with model.trace(x) as tracer:
        model.h[1].output = torch.zeros(2, WIDTH)
        model.h[1].output = torch.ones(2, WIDTH)
        result = tracer.result
    assert torch.equal(result, edited(net, x, "h.1", torch.ones_like).result)


def test_in_place_edit_flows_on(net, model):
    x = rows()

    def zero(output):
        output = output.clone()
        output[:, 2:4] = 0
        output[0] += 1
        return output

    expected = edited(net, x, "h.1", zero)
    with torch.no_grad(), model.trace(x) as tracer:
        model.h[1].output[:, 2:4] = 0
        model.h[1].output[0] += 1
        result = tracer.result
    assert torch.equal(result, expected.result)


def test_in_place_edit_of_a_view_of_a_view(net, model):
    x = rows()

    def change(output):
        output = output.clone()
        output[0, 1] = 5.0
        return output

    with torch.no_grad(), model.trace(x) as tracer:
        model.h[0].output[0, 1:3][:1] = 5.0
        result = tracer.result
    assert torch.equal(result, edited(net, x, "h.0", change).result)


def test_augmented_assignment_of_an_output(net, model):
    x = rows()
    with torch.no_grad(), model.trace(x) as tracer:
        model.h[1].output += 1
        model.h[2].output[:] = 3
        result = tracer.result

    def edit(path, output):
        return {"h.1": output + 1, "h.2": torch.full_like(output, 3)}.get(path)

    assert torch.equal(result, plain(net, x, edit=edit).result)


def test_one_item_of_a_tuple_output_is_replaced():
    net = seeded(Structured)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        left, *rest = model.pair.output
        model.pair.output = (left * 0, *rest)
        result = tracer.result
    expected = plain(net, x, edit=lambda path, output: (output[0] * 0, output[1]) if path == "pair" else None)
    assert torch.equal(result, expected.result)


def test_dict_and_dataclass_outputs_are_edited_in_place():
    net = seeded(Structured)
    model, x = NNsight(net), rows()

    def edit(path, output):
        if path == "mapping":
            output["hidden"] = output["hidden"] * 3
        if path == "answering":
            output.logits = output.logits * 5

    with model.trace(x) as tracer:
        model.mapping.output["hidden"] = model.mapping.output["hidden"] * 3
        model.answering.output.logits *= 5
        result = tracer.result
    assert torch.equal(result, plain(net, x, edit=edit).result)


def test_input_is_replaced(net, model):
    x, value = rows(), rows(1)
    with model.trace(x) as tracer:
        model.h[1].input = value
        assert model.h[1].input is value
        result = tracer.result
    block = net.h[2](net.h[1](value))
    assert torch.equal(result, net.lm_head(block))


def test_root_input_is_replaced(net, model):
    other = rows(1)
    with model.trace(rows()) as tracer:
        model.input = other
        result = tracer.result
    assert torch.equal(result, net(other))


def test_keyword_only_input_is_replaced_by_name():
    net = seeded(Calls, lambda self, *, hidden, scale: self.a(hidden) * scale)
    model, x, other = NNsight(net), rows(), rows(1)
    with model.trace(hidden=x, scale=2.0) as tracer:
        model.input = other
        assert same(model.inputs, ((), {"hidden": other, "scale": 2.0}))
        result = tracer.result
    assert torch.equal(result, net(hidden=other, scale=2.0))


def test_keyword_input_is_edited_in_place():
    net = seeded(Calls, lambda self, *, hidden: self.a(hidden))
    model, x = NNsight(net), rows()
    changed = x.clone()
    changed[:, 1] = 7
    with model.trace(hidden=x.clone()) as tracer:
        model.input[:, 1] = 7
        result = tracer.result
    assert torch.equal(result, net(hidden=changed))


def test_inputs_are_replaced():
    net = seeded(Calls, lambda self, x, scale=1.0: self.a(x) * scale)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        args, kwargs = model.inputs
        model.inputs = (args, {**kwargs, "scale": 4.0})
        result = tracer.result
    assert torch.equal(result, net(x, scale=4.0))


def test_inputs_of_the_wrong_form_are_refused(model):
    with model.trace(rows()), pytest.raises(TypeError, match=r"takes \(args, kwargs\)"):
        model.h[0].inputs = torch.zeros(2)


def test_module_without_arguments_has_no_input():
    net = seeded(Calls, lambda self: self.a(torch.ones(1, WIDTH)))
    model = NNsight(net)
    with model.trace():
        assert model.inputs == ((), {})
        with pytest.raises(ValueError, match="called without arguments"):
            _ = model.input


def test_gradient_flows_through_an_edited_value(net, model):
    x, twin = rows(), copy.deepcopy(net)
    twin.h[1].register_forward_hook(lambda _, __, output: output * 2)
    twin(x).sum().backward()
    with model.trace(x) as tracer:
        model.h[1].output = model.h[1].output * 2
        tracer.result.sum().backward()
    for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_output_requires_grad_can_be_set(net, model):
    x = rows()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with model.trace(x) as tracer:
        hidden = model.h[1].output
        model.h[1].output.requires_grad = True
        tracer.result.sum().backward()
    leaf = plain(net, x).outputs["h.1"][0].requires_grad_()
    net.lm_head(net.h[2](leaf)).sum().backward()
    assert torch.equal(hidden.grad, leaf.grad)
