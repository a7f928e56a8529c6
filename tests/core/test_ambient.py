"""Grad mode, autocast, modes, hooks, devices and contextvars belong to the side that set them."""

import contextlib
import copy
from contextvars import ContextVar

import pytest
import torch
from modules import WIDTH, Calls, Net, plain, rows, same, seeded
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from nnsight import NNsight

user = ContextVar("user", default="nobody")


class Functions(TorchFunctionMode):
    """Counts the torch functions that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts the operations that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def seen_alone(kind, function):
    with kind() as mode:
        function()
    return mode.seen


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def gradients(net, x):
    """Return the gradients that plain torch gives for the sum of the output."""
    twin = copy.deepcopy(net)
    twin(x).sum().backward()
    return [parameter.grad for parameter in twin.parameters()]


def has_gradients(net, expected):
    return all(torch.equal(parameter.grad, grad) for parameter, grad in zip(net.parameters(), expected, strict=True))


# -- grad mode


def test_no_grad_in_the_block_leaves_the_model_its_gradients(net, model):
    x = rows()
    expected = gradients(net, x)
    with model.trace(x) as tracer:
        with torch.no_grad():
            norm = model.h[0].output.norm()
            assert not torch.is_grad_enabled()
            assert not norm.requires_grad
            _ = model.h[2].output
        assert torch.is_grad_enabled()
        result = tracer.result
    result.sum().backward()
    assert has_gradients(net, expected)


def test_overlapping_scopes_of_both_sides_leave_the_mode_as_it_was(net):
    def forward(self, x):
        x = self.a(x)
        with torch.no_grad():
            x = self.b(x)
        return self.c(x)

    model, x = NNsight(seeded(Calls, forward)), rows()
    with model.trace(x):
        a = model.a.output
        with torch.no_grad():
            b = model.b.output  # the model has opened its own
        assert torch.is_grad_enabled()
        c = model.c.output  # and closed it
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert [value.requires_grad for value in (a, b, c)] == [True, False, True]


def test_grad_mode_that_the_block_sets_stays_in_the_block_and_after_it(net, model):
    x = rows()
    try:
        with model.trace(x) as tracer:
            torch.set_grad_enabled(False)
            hidden = model.h[1].output
            assert not torch.is_grad_enabled()
            result = tracer.result
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert hidden.requires_grad
    assert result.requires_grad


def test_block_has_gradients_where_the_model_has_none():
    def generate(self, x):
        with torch.no_grad():
            return self.b(self.a(x))

    model, x = NNsight(seeded(Calls, generate)), rows()
    probe = torch.nn.Linear(WIDTH, 1)
    with model.trace(x):
        hidden = model.a.output
        assert torch.is_grad_enabled()
        loss = probe(hidden).sum()
        after = model.b.output
    loss.backward()
    assert torch.equal(probe.weight.grad[0], hidden.sum(0))
    assert not hidden.requires_grad
    assert not after.requires_grad


def test_modes_of_enter_hold_for_the_model_wherever_it_is_started(net, model):
    x = rows()
    with contextlib.ExitStack() as stack:
        with torch.no_grad():
            stack.enter_context(model.trace(x))
        assert torch.is_grad_enabled()
        hidden = model.h[1].output
        assert torch.is_grad_enabled()
    assert not hidden.requires_grad
    with torch.no_grad():
        with model.trace(x):
            with torch.enable_grad():
                hidden = model.h[1].output
    assert not hidden.requires_grad


# -- autocast


def test_autocast_in_the_block_leaves_the_model_its_dtype(net, model):
    x = rows()
    expected = plain(net, x)
    with model.trace(x) as tracer:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.h[0].output
            low = hidden @ hidden.T
            last = model.h[2].output
        result = tracer.result
        assert (hidden @ hidden.T).dtype is torch.float32
    assert low.dtype is torch.bfloat16
    assert same(last, expected.outputs["h.2"][0])
    assert same(result, expected.result)


def test_autocast_in_the_model_leaves_the_block_its_dtype():
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(self.a(x))

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    expected = plain(net, x)
    with model.trace(x):
        hidden = model.a.output
        high = x @ x.T
        last = model.b.output
    assert high.dtype is torch.float32
    assert same(hidden, expected.outputs["a"][0])
    assert same(last, expected.outputs["b"][0])


def test_casts_cached_by_the_block_without_gradients_are_not_the_models(net, model):
    x = rows()
    twin = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16):
        twin(x).sum().backward()
        with model.trace(x) as tracer:
            hidden = model.h[0].output
            with torch.no_grad():
                model.lm_head(hidden)
            result = tracer.result
        result.sum().backward()
    assert has_gradients(net, [parameter.grad for parameter in twin.parameters()])


def test_casts_cached_by_the_block_in_inference_mode_are_not_the_models(net, model):
    x = rows()
    twin = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16):
        twin(x).sum().backward()
        with model.trace(x) as tracer:
            hidden = model.h[0].output
            with torch.inference_mode():
                model.lm_head(hidden)
                result = tracer.result
        result.sum().backward()
    assert has_gradients(net, [parameter.grad for parameter in twin.parameters()])


def test_autocast_without_cache_stays_on_its_side(net, model):
    with model.trace(rows()):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            _ = model.h[0].output
            assert not torch.is_autocast_cache_enabled()
        _ = model.h[1].output
        assert torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_cast_cache_that_is_off_without_autocast_stays_on_its_side():
    class Casting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.autocast("cpu", enabled=False):
                x = self.a(x)
            return self.b(x)

    model = NNsight(Casting())
    with model.trace(rows()):
        _ = model.a.output
        assert torch.is_autocast_cache_enabled()
        with torch.autocast("cpu", torch.bfloat16):  # puts back what it found
            _ = model.b.output
        assert torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


# -- inference mode


def test_inference_mode_of_the_block_is_lifted_for_the_model(net, model):
    x = rows()
    expected = gradients(net, x)
    with model.trace(x) as tracer:
        with torch.inference_mode():
            hidden = model.h[0].output
            assert torch.is_inference_mode_enabled()
            assert hidden.sum().is_inference()
            result = tracer.result
            assert torch.is_inference_mode_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert not hidden.is_inference()
    result.sum().backward()
    assert has_gradients(net, expected)


def test_inference_mode_of_the_model_holds_for_the_block_that_edits_its_values():
    def forward(self, x):
        with torch.inference_mode():
            x = self.b(self.a(x))
        return x

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        model.a.output[:] = 1.0
        assert torch.is_inference_mode_enabled()
        result = tracer.result
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert result.is_inference()
    assert torch.equal(result, net.b(torch.ones(2, WIDTH)))


def test_inference_mode_around_the_trace_holds_for_both(net, model):
    x = rows()
    with torch.inference_mode():
        with model.trace(x) as tracer:
            hidden = model.h[0].output
            model.h[1].output[:] = 0
            result = tracer.result
        assert torch.is_inference_mode_enabled()
    assert hidden.is_inference()
    expected = plain(net, x, edit=lambda path, output: output * 0 if path == "h.1" else None).result
    assert torch.equal(result, expected)


def test_inference_mode_of_the_block_ends_while_that_of_the_model_is_open():
    def forward(self, x):
        x = self.a(x)
        with torch.inference_mode():
            x = self.b(x)
        return self.c(x.clone())

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    expected = plain(net, x)
    with model.trace(x):
        with torch.inference_mode():
            a = model.a.output
            b = model.b.output
        c = model.c.output
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    for path, value in {"a": a, "b": b, "c": c}.items():
        assert value.is_inference() == expected.outputs[path][0].is_inference()
        assert torch.equal(value, expected.outputs[path][0])


# -- mode stacks


@pytest.mark.parametrize("kind", [Functions, Operations])
def test_modes_of_the_block_see_what_the_block_does(net, model, kind):
    x = rows()
    own = seen_alone(kind, lambda: torch.ones(3) * 2)
    with model.trace(x) as tracer:
        with kind() as mode:
            _ = model.h[0].output
            _ = torch.ones(3) * 2
            _ = model.h[2].output
        assert mode.seen == own
        result = tracer.result
    assert own
    assert mode.seen == own
    assert torch.equal(result, net(x))


@pytest.mark.parametrize("kind", [Functions, Operations])
def test_modes_of_the_model_see_what_the_model_does(kind):
    modes = []

    def forward(self, x):
        x = self.a(x)
        with kind() as mode:
            x = self.b(x)
        modes.append(mode)
        return self.c(x)

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    net(x)
    with model.trace(x):
        with kind() as own:
            _ = model.a.output
            _ = torch.ones(3) * 2
            _ = model.b.output
            _ = torch.ones(3) * 2
        _ = model.c.output
    assert modes[0].seen == modes[1].seen > 0
    assert own.seen == 2 * seen_alone(kind, lambda: torch.ones(3) * 2)


def test_mode_around_the_trace_sees_both_sides(net, model):
    x = rows()
    with Operations() as alone:
        net(x)
        _ = torch.ones(3) * 2
    with Operations() as mode:
        with model.trace(x):
            _ = model.h[1].output
            _ = torch.ones(3) * 2
    assert mode.seen == alone.seen


def test_overlapping_dispatch_modes_leave_torch_as_it_was():
    def forward(self, x):
        x = self.a(x)
        with Operations():
            x = self.b(x)
        return self.c(x)

    model = NNsight(seeded(Calls, forward))
    with model.trace(rows()):
        with Operations():
            assert is_in_torch_dispatch_mode()
            _ = model.a.output
            _ = model.b.output
            assert is_in_torch_dispatch_mode()
        assert not is_in_torch_dispatch_mode()
        _ = model.c.output
    assert not is_in_torch_dispatch_mode()


# -- saved tensors


def test_saved_tensor_hooks_of_the_block_do_not_touch_the_models_graph(net, model):
    x, packed = rows(), []
    expected = gradients(net, x)

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with model.trace(x) as tracer:
        with saved_tensors_hooks(pack, lambda tensor: tensor * 0):
            hidden = model.h[0].output
            _ = model.h[2].output
            assert packed == []
            _ = hidden * hidden
            assert len(packed) == 2
        result = tracer.result
    assert len(packed) == 2
    result.sum().backward()
    assert has_gradients(net, expected)


def test_saved_tensor_hooks_of_the_model_do_not_touch_the_blocks_graph():
    def forward(self, x):
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor * 0):
            return self.b(self.a(x))

    model, x = NNsight(seeded(Calls, forward)), rows()
    weight = torch.ones(WIDTH, requires_grad=True)
    with model.trace(x):
        loss = (model.a.output.detach() * weight).sum()
        _ = model.b.output
    loss.backward()
    assert torch.count_nonzero(weight.grad)


def test_loss_built_while_the_model_stands_in_a_checkpoint():
    def forward(self, x):
        x = self.a(x)
        return self.c(checkpoint(lambda x: torch.relu(self.b(x)), x, use_reentrant=False))

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    expected = gradients(net, x)
    weight = torch.ones(WIDTH, requires_grad=True)
    with model.trace(x) as tracer:
        hidden = model.b.output
        loss = (hidden.detach() * weight).pow(2).sum()
        result = tracer.result
    loss.backward()
    assert torch.allclose(weight.grad, 2 * hidden.pow(2).sum(0))
    result.sum().backward()
    assert has_gradients(net, expected)


# -- devices


def test_default_device_of_the_block_is_not_the_models():
    net = seeded(Calls, lambda self, x: self.b(self.a(x) + torch.ones(WIDTH)) + torch.zeros(1))
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        with torch.device("meta"):
            _ = model.a.output
            assert torch.empty(1).device.type == "meta"
            assert torch.get_default_device().type == "meta"
            _ = model.b.output
        assert torch.get_default_device().type == "cpu"
        result = tracer.result
    assert torch.equal(result, net(x))


def test_default_device_of_the_model_is_not_the_blocks():
    made = []

    def forward(self, x):
        with torch.device("meta"):
            x = self.b(self.a(x))
            made.append((torch.empty(1).device.type, torch.get_default_device().type))
        made.append((torch.empty(1).device.type, torch.get_default_device().type))
        return x

    model = NNsight(seeded(Calls, forward))
    with model.trace(rows()) as tracer:
        _ = model.a.output
        assert torch.empty(1).device.type == "cpu"
        assert torch.get_default_device().type == "cpu"
        with torch.device("meta"):
            _ = model.b.output
            assert torch.empty(1).device.type == "meta"
        _ = tracer.result
        assert torch.get_default_device().type == "cpu"
    assert made == [("meta", "meta"), ("cpu", "cpu")]
    assert torch.get_default_device().type == "cpu"


# -- contextvars


def test_contextvars_stay_on_their_side():
    seen = []

    def forward(self, x):
        seen.append(user.get())
        user.set("model")
        x = self.a(x)
        seen.append(user.get())
        x = self.b(x)
        seen.append(user.get())
        return x

    model = NNsight(seeded(Calls, forward))
    token = user.set("caller")
    try:
        with model.trace(rows()):
            user.set("block")
            _ = model.a.output
            assert user.get() == "block"
            user.set("block again")
            _ = model.b.output
            assert user.get() == "block again"
        assert user.get() == "block again"
    finally:
        user.reset(token)
    assert seen == ["caller", "model", "model"]
    assert user.get() == "nobody"
