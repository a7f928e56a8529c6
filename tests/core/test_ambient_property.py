"""K3 as a property: whatever modes block and model open and close, each side sees exactly its own."""

import contextlib
import copy
from contextvars import ContextVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modules import rows, seeded
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)

from nnsight import NNsight

WIDTH = 4
VISITS = 4
variable = ContextVar("variable", default=0)


class Functions(TorchFunctionMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.log.append(func)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self, log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach_.default:  # of a factory function; not there in inference mode
            self.log.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def grad_set(value):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(value)
    yield
    torch.set_grad_enabled(before)


@contextlib.contextmanager
def variable_set(value):
    before = variable.get()
    variable.set(value)
    yield
    variable.set(before)


def keep(tensor):
    return tensor


MODES = {
    "no_grad": lambda log: torch.no_grad(),
    "enable_grad": lambda log: torch.enable_grad(),
    "set_grad_enabled": lambda log: grad_set(False),
    "bfloat16": lambda log: torch.autocast("cpu", torch.bfloat16, cache_enabled=True),
    "float16": lambda log: torch.autocast("cpu", torch.float16, cache_enabled=True),
    "no autocast": lambda log: torch.autocast("cpu", enabled=False),
    "no cast cache": lambda log: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "functions": Functions,
    "operations": Operations,
    "saved tensors": lambda log: saved_tensors_hooks(lambda tensor: log.append("pack") or tensor, keep),
    "meta": lambda log: torch.device("meta"),
    "variable": lambda log: variable_set(variable.get() + 1),
    "inference": lambda log: torch.inference_mode(),
}


class Side:
    """Opens and closes modes as told, and notes what it sees."""

    def __init__(self):
        self.log, self.seen, self.open = [], [], []
        self.own = torch.ones(2, requires_grad=True)

    def run(self, steps):
        for step in steps:
            if step is not None:
                mode = MODES[step](self.log)
                mode.__enter__()
                self.open.append(mode)
            elif self.open:
                self.open.pop().__exit__(None, None, None)
            self.look()

    def close(self):
        self.run([None] * len(self.open))

    def look(self):
        self.seen.append(look())
        _ = torch.zeros(2) * 2  # what the modes of this side must see


def look():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu")
        and (torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "functions": [
            type(torch._C._get_function_stack_at(i)).__name__ for i in range(torch._C._len_torch_function_stack())
        ],
        "operations": [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()],
        "in operations": is_in_torch_dispatch_mode(),
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        "device": torch.get_default_device().type,
        "variable": variable.get(),
    }


class Scripted(nn.Module):
    """Calls its parts in a row and opens and closes modes between them."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(VISITS))
        self.side, self.segments = Side(), []

    def forward(self, x):
        for part, segment in zip(self.parts, self.segments, strict=True):
            self.side.run(segment)
            x = torch.tanh(part(x.float().clone()))  # no tensor of an inference scope, no low precision
        self.side.close()
        return x


segments = st.lists(st.lists(st.sampled_from([None, None, *MODES]), max_size=3), min_size=VISITS, max_size=VISITS)


@settings(max_examples=250, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    outer=st.lists(st.sampled_from(list(MODES)), max_size=2), in_model=segments, in_block=segments, late=st.booleans()
)
def test_each_side_sees_its_own_modes_and_the_model_computes_as_alone(outer, in_model, in_block, late):
    net = seeded(Scripted)
    net.segments = in_model
    x = rows(width=WIDTH)
    before = look()
    # An inference scope of the model holds in the block as well. One that the block opens meanwhile puts that back when
    # it ends: torch gives no way to mend it once the trace is over.
    is_shared = any("inference" in steps for steps in in_model)
    late = late and not is_shared

    alone, block_alone, twin = Side(), Side(), copy.deepcopy(net)
    with contextlib.ExitStack() as stack:
        for name in outer:
            stack.enter_context(MODES[name]([]))
        expected = twin(x)
        for segment in in_block:
            alone.run(segment)
        alone.close()
    assert look() == before

    model = NNsight(net)
    with contextlib.ExitStack() as stack:
        for name in outer:
            stack.enter_context(MODES[name]([]))
        with model.trace(x) as tracer:
            for part, segment in zip(model.parts, in_block, strict=True):
                block_alone.run(segment)
                _ = part.output
            if not late:
                block_alone.close()
            result = tracer.result
        block_alone.close()
    assert look() == before

    for got, wanted in zip(block_alone.seen, alone.seen, strict=True):
        if is_shared:
            got, wanted = dict(got, inference=None), dict(wanted, inference=None)
        assert got == wanted
    assert net.side.seen == twin.side.seen
    assert block_alone.log == alone.log
    assert net.side.log == twin.side.log

    assert result.dtype is expected.dtype
    assert result.requires_grad == expected.requires_grad
    assert result.is_inference() == expected.is_inference()
    assert torch.equal(result, expected)
    if expected.requires_grad:
        expected.sum().backward()
        result.sum().backward()
        for got, wanted in zip(net.parameters(), twin.parameters(), strict=True):
            assert (got.grad is None) == (wanted.grad is None)
            assert got.grad is None or torch.equal(got.grad, wanted.grad)
