"""The rows of a joint batch: what an invoke sees of a value, and how what it writes goes back."""

import copy
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, fields

import pytest
import torch
from modules import WIDTH, Answer, Block, Calls, Net, Structured, assert_usable, plain, rows, same, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnsight import NNsight
from nnsight.errors import BatchError
from nnsight.protocols import Inputs


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def close(left, right):
    return torch.allclose(left, right, atol=1e-6)


class Ops(TorchDispatchMode):
    """Counts operations of one kind."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().startswith(f"aten::{self.name}")
        return function(*args, **(kwargs or {}))


# -- reading


def test_values_are_views_of_the_joint_value(model):
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            a = model.h[0].output
        with tracer.invoke(rows(1)):
            b = model.h[0].output
        with tracer.invoke():
            whole = model.h[0].output
    storage = whole.untyped_storage().data_ptr()
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == storage
    assert (a.storage_offset(), b.storage_offset()) == (0, 2 * WIDTH)


def test_two_reads_at_one_visit_are_one_object(model):
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            is_same = model.h[0].output is model.h[0].output
            model.h[0].output = model.h[0].output * 2
            is_same_after_a_write = model.h[0].output is model.h[0].output
        with tracer.invoke(rows(1)):
            pass
    assert is_same
    assert is_same_after_a_write


def test_in_place_edits_flow_on_and_stay_in_their_rows(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.h[0].output[:] = 0
            first = tracer.result
        with tracer.invoke(b):
            model.h[1].output[:, 0] += 1
            second = tracer.result

    def zero(path, output):
        return torch.zeros_like(output) if path == "h.0" else None

    def add(path, output):
        return torch.cat([output[:, :1] + 1, output[:, 1:]], 1) if path == "h.1" else None

    assert close(first, plain(net, a, edit=zero).result)
    assert close(second, plain(net, b, edit=add).result)


@dataclass
class Named:
    value: torch.Tensor
    label: str = "label"


Point = namedtuple("Point", ["x", "y"])


class Output(OrderedDict):
    """A dict that is a dataclass too, as the outputs of transformers are."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__[key] = value

    def __reduce__(self):
        return _output, (dict(self),)


def _output(values):
    return Output(**values)


def nested(x):
    return {
        "tuple": (x, [x * 2, None, 3, "text"]),
        "point": Point(x + 1, (x + 2,)),
        "named": Named(x * 3),
        "output": Output(logits=x * 4, hidden=(x, x * 5)),
        "answer": Answer(x, (x * 6,)),
    }


def flat(value):
    return value["output"]["hidden"][1] + value["point"].x + value["named"].value + value["tuple"][1][0]


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.make = Calls(lambda self, x: nested(x))
        self.use = Calls(lambda self, value: flat(value))

    def forward(self, x):
        return self.use(self.make(x))


def plain_nested(value):
    """Containers as plain tuples, to compare."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        return tuple(plain_nested(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return tuple(plain_nested(item) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        return tuple(plain_nested(getattr(value, field.name)) for field in fields(value))
    return value


def test_containers_are_looked_into_and_keep_their_types():
    net = Containers()
    model = NNsight(net)
    a, b = rows(0, 1), rows(1, 2)
    got = []
    with model.trace() as tracer:
        for x in (a, b):
            with tracer.invoke(x):
                got.append((x, model.make.output, model.use.input))
        with tracer.invoke():
            whole = model.make.output
    for x, output, given in got:
        for value in (output, given):
            assert same(plain_nested(value), plain_nested(nested(x)))
            assert type(value["point"]) is Point
            assert type(value["named"]) is Named
            assert type(value["output"]) is Output
            assert torch.equal(value["output"].logits, x * 4)
    assert same(plain_nested(whole), plain_nested(nested(torch.cat([a, b]))))


def test_what_is_put_into_a_container_reaches_the_model_for_the_rows_of_the_invoke():
    net = Containers()
    model = NNsight(net)
    a, b = rows(0, 1), rows(1, 2)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.make.output["tuple"][1][0] = torch.zeros(1, WIDTH)
            first = tracer.result
        with tracer.invoke(b):
            model.make.output["named"].value = b * 0
            model.make.output["output"]["logits"] = b * 0
            second = tracer.result
        with tracer.invoke():
            whole = model.make.output
    assert close(first, a * 5 + a + 1 + a * 3)
    assert close(second, b * 5 + b + 1 + b * 2)
    assert torch.equal(whole["output"].logits, torch.cat([a * 4, b * 0]))
    assert type(whole["output"]) is Output


def test_constant_in_a_container_cannot_be_changed_by_one_invoke():
    net = Containers()
    model = NNsight(net)
    with pytest.raises(BatchError, match=r"`model\.make\.output` holds a str, which cannot be replaced for the rows"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0, 1)):
                model.make.output["tuple"][1][3] = "changed"
            with tracer.invoke(rows(1, 2)):
                pass


def test_plain_structures_of_the_kernel_tests():
    net = seeded(Structured)
    model = NNsight(net)
    a, b = rows(0), rows(1)
    got = []
    with model.trace() as tracer:
        for x in (a, b):
            with tracer.invoke(x):
                got.append((model.pair.output, model.mapping.output, model.answering.output, tracer.result))
    for x, values in zip((a, b), got, strict=True):
        expected = plain(net, x)
        wanted = [expected.outputs[name][0] for name in ("pair", "mapping", "answering")] + [expected.result]
        assert all(close_all(value, want) for value, want in zip(values, wanted, strict=True))


def close_all(left, right):
    left, right = plain_nested(left), plain_nested(right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(close_all, left, right))
    return close(left, right)


# -- writing


def test_write_replaces_the_rows_of_its_invoke(net, model):
    inputs = [rows(i, i + 1) for i in range(3)]
    values = [torch.full((i + 1, WIDTH), float(i)) for i in range(3)]
    results = []
    with model.trace() as tracer:
        for x, value in zip(inputs, values, strict=True):
            with tracer.invoke(x):
                model.h[1].output = value
                results.append(tracer.result)
        with tracer.invoke():
            whole = model.h[1].output
    assert torch.equal(whole, torch.cat(values))
    for value, result in zip(values, results, strict=True):
        assert close(result, net.lm_head(net.h[2](value)))


def test_write_does_not_change_what_was_read_before(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            before = model.h[0].output
            copied = before.clone()
            model.h[0].output = before * 0
            after = model.h[0].output
        with tracer.invoke(rows(1)):
            pass
    assert torch.equal(before, copied)
    assert torch.equal(after, torch.zeros(2, WIDTH))


def test_in_place_edit_after_a_write_of_the_same_visit(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.h[0].output = model.h[0].output * 0
            model.h[0].output[:, 0] = 5
            first = model.h[1].input
        with tracer.invoke(b):
            model.h[0].output[:, 1] = 7
            second = model.h[1].input
    expected = torch.zeros(2, WIDTH)
    expected[:, 0] = 5
    assert torch.equal(first, expected)
    expected = plain(net, b).outputs["h.0"][0].detach().clone()
    expected[:, 1] = 7
    assert close(second, expected)


@pytest.mark.parametrize("count", [2, 8])
def test_one_visit_is_copied_once_however_many_invokes_write(net, model, count):
    value = torch.zeros(1, WIDTH)
    with torch.no_grad(), Ops("clone") as clones, Ops("cat") as joins:
        with model.trace() as tracer:
            for i in range(count):
                with tracer.invoke(rows(i, 1)):
                    model.h[0].output = value
                    model.h[0].output = value + 1
                    model.h[2].output = value
    assert clones.count == 2
    assert joins.count == 1


def test_write_of_a_part_of_a_container_leaves_the_rest_alone():
    net = Containers()
    model = NNsight(net)
    a, b = rows(0, 1), rows(1, 2)
    with model.trace() as tracer:
        with tracer.invoke(a):
            value = model.make.output
            value["tuple"][1][0] = torch.zeros(1, WIDTH)
            value["point"] = value["point"]._replace(x=torch.ones(1, WIDTH))
            model.make.output = value
            first = tracer.result
        with tracer.invoke(b):
            value = model.make.output
            value["named"] = Named(value["named"].value * 0)
            model.make.output = value
            second = tracer.result
        with tracer.invoke():
            whole = model.make.output
    assert close(first, a * 5 + 1 + a * 3)
    assert close(second, b * 5 + b + 1 + b * 2)
    assert type(whole["output"]) is Output
    assert type(whole["named"]) is Named
    assert torch.equal(whole["output"].logits, torch.cat([a, b]) * 4)


def test_tuple_with_one_new_item(net):
    net = seeded(Structured)
    model = NNsight(net)
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            pair = model.pair.output
            model.pair.output = (pair[0] * 0, *pair[1:])
            first = tracer.result
        with tracer.invoke(b):
            second = tracer.result
    edited = plain(net, a, edit=lambda path, output: (output[0] * 0, output[1]) if path == "pair" else None)
    assert close(first, edited.result)
    assert close(second, plain(net, b).result)


def test_input_is_written_for_one_invoke(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.h[1].input = torch.zeros(2, WIDTH)
            first = tracer.result
        with tracer.invoke(b):
            second = tracer.result
    assert close(first, net.lm_head(net.h[2](net.h[1](torch.zeros(2, WIDTH)))))
    assert close(second, plain(net, b).result)


def test_shapes_that_do_not_match_are_both_named_with_the_location(net, model):
    match = r"`model\.h\.0\.output` has shape \(2, 8\) for the rows of this invoke.*has shape \(3, 8\)"
    with pytest.raises(BatchError, match=match):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                model.h[0].output = torch.zeros(3, WIDTH)
            with tracer.invoke(rows(1)):
                pass
    assert_usable(model, net, rows())


def test_value_of_another_kind_is_refused_with_the_location(net, model):
    with pytest.raises(BatchError, match=r"`model\.h\.0\.output` is a tensor of shape \(2, 8\); got a tuple of 1"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                model.h[0].output = (torch.zeros(2, WIDTH),)
            with tracer.invoke(rows(1)):
                pass
    assert_usable(model, net, rows())


def test_container_of_another_size_is_refused_with_the_location():
    net = seeded(Structured)
    model = NNsight(net)
    with pytest.raises(BatchError, match=r"`model\.pair\.output` is a tuple of 2; got a tuple of 1"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                model.pair.output = (torch.zeros(2, WIDTH),)
            with tracer.invoke(rows(1)):
                pass
    with pytest.raises(BatchError, match=r"`model\.mapping\.output` is a dict with keys \['hidden', 'extra'\]"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                model.mapping.output = {"hidden": 1}
            with tracer.invoke(rows(1)):
                pass
    assert_usable(model, net, rows())


def test_lone_invoke_may_change_shapes(net):
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            model.a.output = torch.zeros(5, WIDTH)
            result = tracer.result
    assert torch.equal(result, net.b(torch.zeros(5, WIDTH)))


# -- gradients


def test_gradients_flow_through_writes(net, model):
    a, b = rows(0), rows(1)
    scale = torch.tensor(2.0, requires_grad=True)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.h[0].output = model.h[0].output * scale
            first = tracer.result
        with tracer.invoke(b):
            model.h[1].output = model.h[1].output * 3
            second = tracer.result
    (first.sum() + second.sum()).backward()
    got = {name: parameter.grad for name, parameter in net.named_parameters()}
    reference = copy.deepcopy(net)
    for parameter in reference.parameters():
        parameter.grad = None
    factor = torch.tensor(2.0, requires_grad=True)
    hidden = reference.h[0](reference.emb(a)) * factor
    one = reference.lm_head(reference.h[2](reference.h[1](hidden)))
    two = reference.lm_head(reference.h[2](reference.h[1](reference.h[0](reference.emb(b))) * 3))
    (one.sum() + two.sum()).backward()
    assert close(scale.grad, factor.grad)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(got[name], parameter.grad, atol=1e-5), name


def test_gradients_stay_in_their_rows(net, model):
    a, b = rows(0).requires_grad_(), rows(1).requires_grad_()
    with model.trace() as tracer:
        with tracer.invoke(a):
            result = tracer.result
        with tracer.invoke(b):
            model.h[0].output = model.h[0].output * 2
    result.sum().backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() == 0


# -- values that have no rows of the batch


class Flattened(nn.Module):
    """Works on `(B * S, width)`, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        flattened = self.inner(x.flatten(0, 1))
        return self.after(flattened.unflatten(0, x.shape[:2]))


def sequences(seed, n=1, length=3):
    return torch.randn(n, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_undeclared_flattened_value_is_read_whole(net):
    net = seeded(Flattened)
    model = NNsight(net)
    a, b = sequences(0), sequences(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = model.inner.output
            mine = model.after.output
        with tracer.invoke(b):
            second = model.inner.output
    assert first is second
    assert close(first, net.inner(torch.cat([a, b]).flatten(0, 1)))
    assert close(mine, net(a))


def test_undeclared_flattened_value_cannot_be_written():
    net = seeded(Flattened)
    model = NNsight(net)
    match = r"`model\.inner\.output` holds a tensor of shape \(6, 8\) whose rows are not those of the batch \(2 rows\)"
    with pytest.raises(BatchError, match=match):
        with model.trace() as tracer:
            with tracer.invoke(sequences(0)):
                pass
            with tracer.invoke(sequences(1)):
                model.inner.output = torch.zeros(6, WIDTH)
    assert_usable(model, net, sequences(0))


def test_undeclared_flattened_value_cannot_be_edited_in_place():
    net = seeded(Flattened)
    model = NNsight(net)
    match = r"`model\.inner\.output`, of shape \(6, 8\), was edited in place by an invoke.*reached the other"
    with pytest.raises(BatchError, match=match) as caught:
        with model.trace() as tracer:
            with tracer.invoke(sequences(0)):
                model.inner.output[:3] = 0
                _ = model.after.output
            with tracer.invoke(sequences(1)):
                pass
    assert "in the invoke opened at" in caught.value.__notes__[0]
    assert_usable(model, net, sequences(0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_in_place_edit_as_the_last_thing_of_a_block_is_noticed(mode):
    net = seeded(Flattened)
    model = NNsight(net)
    with mode(), pytest.raises(BatchError, match="edited in place"):
        with model.trace() as tracer:
            with tracer.invoke(sequences(0)):
                pass
            with tracer.invoke(sequences(1)):
                model.inner.output.mul_(2)


def test_undeclared_flattened_value_cannot_be_edited_when_the_model_has_gone_on():
    net = seeded(Flattened)
    model = NNsight(net)
    with pytest.raises(BatchError, match=r"`model\.inner\.output`, of shape \(6, 8\), was edited in place"):
        with model.trace() as tracer:
            with tracer.invoke(sequences(0)):
                early = model.inner.output
                late = model.after.input
                early[:3] = 0
                _ = model.after.output
            with tracer.invoke(sequences(1)):
                pass
    with pytest.raises(BatchError, match=r"`model\.inner\.output`, of shape \(6, 8\), was edited in place"):
        with model.trace() as tracer:
            with tracer.invoke(sequences(0)):
                early = model.inner.output
                late = model.after.output
                early[:3] = 0
            with tracer.invoke(sequences(1)):
                pass
    assert late.shape == (1, 3, WIDTH)
    assert_usable(model, net, sequences(0))


def test_what_the_model_changes_in_place_is_no_edit_of_an_invoke():
    class Own(Flattened):
        def forward(self, x):
            flattened = self.inner(x.flatten(0, 1))
            flattened.relu_()
            return self.after(flattened.unflatten(0, x.shape[:2]))

    net = seeded(Own)
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(sequences(0)):
            early = model.inner.output
            kept = model.after.output
        with tracer.invoke(sequences(1)):
            other = model.after.output
    with torch.no_grad():
        assert close(kept, net(sequences(0)))
        assert close(other, net(sequences(1)))
    assert not (early < 0).any()


def test_whole_values_are_not_kept_for_an_invoke_that_drops_them():
    class Own(Flattened):
        def forward(self, x):
            return self.after(self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * 2)

    net = seeded(Own)
    model = NNsight(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(sequences(0)):
            dropped = weakref.ref(model.inner.output)
            _ = model.after.output
            is_gone = dropped() is None
        with tracer.invoke(sequences(1)):
            pass
    assert is_gone


def test_whole_batch_invoke_may_write_what_has_no_rows():
    net = seeded(Flattened)
    model = NNsight(net)
    a, b = sequences(0), sequences(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = tracer.result
        with tracer.invoke(b):
            second = tracer.result
        with tracer.invoke():
            model.inner.output[:] = 0
    expected = net.after(torch.zeros(1, 3, WIDTH))
    assert close(first, expected)
    assert close(second, expected)


class Declared(NNsight):
    """Says that flattened tensors hold the rows of the batch one after another."""

    def rows(self, tensor, batch):
        found = super().rows(tensor, batch)
        size, rest = divmod(tensor.shape[0], batch.joint.total)
        if found is None and not rest and size == batch.joint.args[0].shape[1]:
            return slice(batch.start * size, (batch.start + batch.size) * size)
        return found


def test_declared_flattened_value_is_split_and_written():
    net = seeded(Flattened)
    model = Declared(net)
    a, b = sequences(0), sequences(1, 2)
    with model.trace() as tracer:
        with tracer.invoke(a):
            mine = model.inner.output
            model.inner.output = mine * 0
            first = tracer.result
        with tracer.invoke(b):
            theirs = model.inner.output
            second = tracer.result
    assert close(mine, net.inner(a.flatten(0, 1)))
    assert close(theirs, net.inner(b.flatten(0, 1)))
    assert close(first, net.after(torch.zeros(1, 3, WIDTH)))
    assert close(second, net(b))


class Tabled(nn.Module):
    """Has tables whose leading size is 2: so many rows as the batch of two invokes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0], [2.0]]))
        self.register_buffer("positions", torch.tensor([[3.0], [4.0]]))
        self.give = Calls(lambda _, *given: given[0] if given else self.weight * 10)
        self.use = Calls(lambda _, x, table: x + table.sum())
        self.give_position = Calls(lambda _, offset: self.positions + offset)
        self.block = Block()

    def forward(self, x):
        x = self.use(x, self.weight)
        x = self.use(x, self.positions)
        x = self.use(x, self.give())
        x = self.use(x, self.give_position(5))
        return self.block(x)


def test_parameters_and_buffers_as_long_as_the_batch_are_not_split():
    net = seeded(Tabled)
    model = NNsight(net)
    seen = []
    with model.trace() as tracer:
        for i in range(2):
            with tracer.invoke(rows(i, 1)):
                seen.append([model.use.inputs[0] for _ in tracer.iter[:2]])
    for i, inputs in enumerate(seen):
        assert inputs[0][0].shape == (1, WIDTH)
        assert torch.equal(inputs[0][0], rows(i, 1))
        assert inputs[0][1] is net.weight
        assert inputs[1][1] is net.positions


def test_output_of_a_module_that_is_given_nothing_of_the_batch_is_not_split():
    net = seeded(Tabled)
    model = NNsight(net)
    seen = []
    with model.trace() as tracer:
        for i in range(2):
            with tracer.invoke(rows(i, 1)):
                given = model.give.output
                offset = model.give_position.output
                seen.append((given, offset))
    for given, offset in seen:
        assert torch.equal(given, net.weight * 10)
        assert torch.equal(offset, net.positions + 5)


def test_output_of_a_module_that_is_given_nothing_of_the_batch_is_still_no_rows_as_an_input():
    net = seeded(Tabled)
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(rows(0, 1)):
            _ = model.give.output
            tracer.next(2)
            table = model.use.inputs[0][1]
        with tracer.invoke(rows(1, 1)):
            pass
    assert torch.equal(table, net.weight * 10)


def test_table_cannot_be_written_by_one_invoke():
    net = seeded(Tabled)
    model = NNsight(net)
    with pytest.raises(BatchError, match=r"`model\.give\.output` holds a tensor of shape \(2, 1\) whose rows are not"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0, 1)):
                model.give.output = torch.zeros(2, 1)
            with tracer.invoke(rows(1, 1)):
                pass
    assert_usable(model, net, rows())


def test_table_cannot_be_edited_in_place_by_one_invoke():
    net = seeded(Tabled)
    model = NNsight(net)
    with pytest.raises(BatchError, match=r"`model\.give\.output`, of shape \(2, 1\), was edited in place"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0, 1)):
                model.give.output[:] = 0
            with tracer.invoke(rows(1, 1)):
                _ = model.block.output


def test_module_that_is_given_an_object_is_taken_to_hold_rows():
    class Holder:
        def __init__(self, value):
            self.value = value

    net = seeded(Calls, lambda self, x: self.b(self.inner(Holder(x))))
    net.inner = Calls(lambda _, holder: holder.value * 2)
    model = NNsight(net)
    a, b = rows(0, 1), rows(1, 1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = model.inner.output
        with tracer.invoke(b):
            second = model.inner.output
    assert close(first, a * 2)
    assert close(second, b * 2)


def test_module_that_turns_its_input_around_gives_rows():
    net = seeded(Calls, lambda self, x: self.inner(x.transpose(0, 1)))
    net.inner = Calls(lambda _, x: x.transpose(0, 1) * 2)
    model = NNsight(net)
    a, b = sequences(0), sequences(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = model.inner.output
        with tracer.invoke(b):
            second = model.inner.output
    assert close(first, a * 2)
    assert close(second, b * 2)


def test_numbers_and_text_are_given_whole():
    net = seeded(Calls, lambda self, x: self.inner(x, 3, "text"))
    net.inner = Calls(lambda _, x, n, text: (x.sum(), n, text))
    model = NNsight(net)
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = model.inner.output
        with tracer.invoke(b):
            second = model.inner.inputs[0][1:]
    assert close(first[0], torch.cat([a, b]).sum())
    assert first[1:] == second == (3, "text")


def test_scalar_tensor_of_the_whole_batch_cannot_be_edited_by_one_invoke():
    net = seeded(Calls, lambda self, x: self.inner(x))
    net.inner = Calls(lambda _, x: x.sum())
    model = NNsight(net)
    with pytest.raises(BatchError, match=r"`model\.inner\.output`, of shape \(\), was edited in place"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                model.inner.output.zero_()
            with tracer.invoke(rows(1)):
                pass


# -- skipping


def test_skip_by_every_invoke_joins_their_values(net, model):
    a, b = rows(0, 1), rows(1, 2)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.h[1].skip(model.h[1].input * 2)
            first = tracer.result
        with tracer.invoke(b):
            model.h[1].skip(model.h[1].input)
            second = tracer.result
    assert close(first, net.lm_head(net.h[2](net.h[0](net.emb(a)) * 2)))
    assert close(second, net.lm_head(net.h[2](net.h[0](net.emb(b)))))


def test_skip_with_containers_joins_them():
    net = seeded(Structured)
    model = NNsight(net)
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.pair.skip((a, a))
        with tracer.invoke(b):
            model.pair.skip((b, b * 2))
        with tracer.invoke():
            left, right = model.pair.output
    assert torch.equal(left, torch.cat([a, b]))
    assert torch.equal(right, torch.cat([a, b * 2]))


def test_skip_by_some_invokes_is_refused(net, model):
    match = r"A batched \.skip\(\) has to cover every row: `model\.h\.1` was skipped for 1 of 3 rows"
    with pytest.raises(BatchError, match=match):
        with model.trace() as tracer:
            with tracer.invoke(rows(0, 1)):
                model.h[1].skip(model.h[1].input)
            with tracer.invoke(rows(1, 2)):
                pass
    assert_usable(model, net, rows())


def test_skip_by_the_whole_batch_invoke(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = tracer.result
        with tracer.invoke(b):
            pass
        with tracer.invoke():
            model.h[1].skip(model.h[1].input)
    assert close(first, net.lm_head(net.h[2](net.h[0](net.emb(a)))))


# -- model classes


class Padded(NNsight):
    """Joins sequences of different length with zeros on the left."""

    def prepare(self, method, args, kwargs):
        (x,) = args or (None,)
        return Inputs() if x is None else Inputs((x,), kwargs, len(x))

    def join(self, inputs):
        longest = max(one.args[0].shape[1] for one in inputs)
        padded = [nn.functional.pad(one.args[0], (0, 0, longest - one.args[0].shape[1], 0)) for one in inputs]
        return Inputs((torch.cat(padded),), {}, sum(one.rows for one in inputs))


def test_model_class_says_how_inputs_join():
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    model = Padded(net)
    a, b = sequences(0, 1, 2), sequences(1, 2, 4)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = tracer.result
        with tracer.invoke(b):
            second = tracer.result
    assert close(first[:, 2:], net(a))
    assert close(second, net(b))


def test_what_was_assigned_may_be_changed_and_assigned_again(net, model):
    """As where the block is alone: the location holds the very object, until the model goes on."""
    with model.trace() as tracer:
        with tracer.invoke(rows(0, 1)):
            new = model.h[0].output * 0
            model.h[0].output = new
            new[:] = 3
            assert model.h[0].output is new
            model.h[0].output = new
            after = model.h[1].input
        with tracer.invoke(rows(1, 1)):
            other = model.h[1].input
    assert torch.equal(after, torch.full_like(after, 3))
    assert torch.allclose(other, net.h[0](net.emb(rows(1, 1))), atol=1e-6)


def test_an_edit_in_place_reaches_the_residual_stream_whatever_other_invokes_assign(model):
    """A block adds its input to what its layers make of it, so zeros put into theirs are zeros in both."""
    x = rows(0, 1)
    with torch.no_grad(), model.trace(x):
        model.h[0].attn.input[:] = 0
        alone = model.h[0].output
    for order in ((0, 1), (1, 0)):
        found = {}
        with torch.no_grad(), model.trace() as tracer:
            for index in order:
                with tracer.invoke(x):
                    if index:
                        model.h[0].attn.input[:] = 0
                    else:
                        model.h[0].attn.input = model.h[0].attn.input * 2
                    found[index] = model.h[0].output
        assert torch.allclose(found[1], alone, atol=1e-6)
        assert not torch.allclose(found[0], alone, atol=1e-6)
