"""The mode of a scan: torch's fake tensors, with stand-ins for whatever real tensors an operation meets.

torch's own mode takes real tensors too, but then works out every such operation anew, and its cache of operations costs
more than most models' forward. With stand-ins made once per scan and the memory below a scan of GPT-2 takes a quarter
of the time.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)

from nnsight.builtin.copying import map_tensors
from nnsight.errors import ScanError

_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
_DEVICE = torch.ops.prim.device.default
#: Views where nothing moves; run below the fake tensors they would, from the meta device.
_MOVES = frozenset(getattr(torch.ops.aten.to, name) for name in torch.ops.aten.to.overloads())  # type: ignore[no-untyped-call]
_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)  # torch >= 2.8; how experts of one layer are multiplied
_PLAIN = frozenset(
    (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)  # fmt: skip

#: An operation and what is known of its arguments -> what is known of its results: (shape, stride, dtype, device) of
#: each, None where one shares memory with an argument. Shapes follow from nothing else.
_memory: dict[Any, Any] = {}
_MEMORY_SIZE = 20_000

_NEEDS_VALUES = (
    "{operation} needs the values of a tensor, and in a scan there are only shapes: code such as `x.item()`, "
    "`if x > 0:`, `x.nonzero()` or `x[x > 0]` cannot run. Ask for shapes and dtypes alone, leave the block with "
    "`tracer.stop()` before the model comes there, or use `trace`, which computes."
)


def _is_no_scan(record: logging.LogRecord) -> bool:
    """Return False for what torch logs, with all its frames, of an operation in a scan that fails: it is raised."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_globals is globals():  # torch wraps our method, so its code says nothing
            return False
        frame = frame.f_back
    return True


class ScanMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Runs operations on shapes, dtypes and devices alone. What is on the meta device counts as on the CPU."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # The real tensors are kept beside their stand-ins: an `id` may be used again otherwise.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._scans = 0
        logging.getLogger(FakeTensorMode.__module__).addFilter(_is_no_scan)  # once, however often

    @staticmethod
    def current() -> ScanMode | None:
        """Return the mode of the scan that the caller is in."""
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return mode if isinstance(mode, ScanMode) else None

    def open(self) -> None:
        """Begin a scan. Scans within a scan share its mode: their tensors can be used together."""
        self._scans += 1
        self.__enter__()

    def close(self) -> None:
        """End a scan. The last one forgets the real tensors: what the user keeps of it must not keep the weights."""
        self.__exit__(None, None, None)
        self._scans -= 1
        if not self._scans:
            self._known.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor and not self.in_kernel_invocation:
            return args[0].fake_device  # asked for at almost every operation
        if func in _LIFTS:  # `torch.tensor(2)`: a constant, whose value torch keeps
            return super().__torch_dispatch__(func, types, args, kwargs)
        args = tuple([self._stand_in(arg) for arg in args])
        kwargs = {name: self._stand_in(value) for name, value in kwargs.items()} if kwargs else {}
        if _GROUPED is not None and func is _GROUPED.default:
            return self._make(_grouped(*args, **kwargs))
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            kwargs["device"] = torch.device("cpu")
        key = None if func._schema.is_mutable else _key(func, args, kwargs)
        known = None if key is None else _memory.get(key, ())
        if known:
            return self._make(known[0]) if len(known) == 1 else tuple(map(self._make, known))
        if known is None and key is not None and func.is_view and func not in _MOVES:
            return self._view(func, args, kwargs)
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ScanError(_NEEDS_VALUES.format(operation=f"`{error.func}`")) from error
        if known == ():
            if len(_memory) >= _MEMORY_SIZE:
                _memory.clear()
            _memory[key] = _about(result, args)
        return result

    def _make(self, about: Any) -> FakeTensor:
        shape, stride, dtype, device = about
        return FakeTensor(self, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that gives a view of its first argument on what is below the fake tensors."""
        device = args[0].fake_device
        with in_kernel_invocation_manager(self):
            result = func(*args, **kwargs)
        if type(result) is FakeTensor:  # the argument itself, as `x.to(x.dtype)` gives
            return result
        if isinstance(result, torch.Tensor):
            return FakeTensor(self, result, device)
        return type(result)([FakeTensor(self, item, device) for item in result])

    def fake_all(self, value: Any) -> Any:
        """Return a value with stand-ins for the real tensors in it."""
        with unset_fake_temporarily():
            return map_tensors(value, self._fake)

    def _stand_in(self, value: Any) -> Any:
        """Return an argument of an operation with stand-ins for real tensors."""
        if isinstance(value, torch.Tensor):
            return value if type(value) is FakeTensor else self._fake(value)
        if type(value) in (list, tuple):
            return type(value)([self._stand_in(item) for item in value])
        return value

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self:
            return tensor
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        if tensor.layout is torch.strided and not tensor.is_quantized and type(tensor) in (*_ORDINARY, FakeTensor):
            shell = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
            fake: torch.Tensor = FakeTensor(self, shell, device)
            if tensor.requires_grad and tensor.is_leaf:
                fake.requires_grad_()
        else:
            fake = self.from_tensor(tensor)
        if self._scans:
            self._known[id(tensor)] = tensor, fake
        return fake


def _grouped(
    left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor | None = None, bias: Any = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """Return what is known of the product of groups of rows: torch itself knows the shape for bfloat16 only.

    Args:
        left: (N, K), rows of all groups one after another; or (G, N, K), a matrix for each group.
        right: (G, K, M), or (K, M) for columns of all groups.
        offsets: (G,), where each group ends, if one of them is not divided by a dim of its own.
        bias: nothing that a shape follows from.
        out_dtype: of the result; that of `left` if it is None.
    """
    rows, columns = left.shape[-2], right.shape[-1]
    shape: tuple[int, ...] = (rows, columns)
    if left.ndim == right.ndim:
        groups = left.shape[0] if left.ndim == 3 or offsets is None else offsets.shape[0]
        shape = (groups, rows, columns)
    stride = torch.empty(shape, device="meta").stride()
    return shape, stride, out_dtype or left.dtype, cast("FakeTensor", left).fake_device


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what the shapes of an operation's results follow from; None where that is not known."""
    parts = [_key_part(arg) for arg in args]
    for name, value in kwargs.items():
        parts += [name, _key_part(value)]
    if None in parts or not any(type(arg) is FakeTensor for arg in args):
        return None
    return func, torch.get_default_dtype(), *parts


def _key_part(value: Any) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.dtype.is_complex:
            return None
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind in _PLAIN:
        return kind, value  # 1, 1.0 and True are equal, and give different dtypes
    if kind in (list, tuple):
        parts = tuple([_key_part(item) for item in value])
        return None if None in parts else parts
    return None


def _about(result: Any, args: Any) -> Any:
    """Return what is known of an operation's results: one entry each, or None where one shares memory."""
    results = result if type(result) is tuple else (result,)
    used = {arg.untyped_storage()._cdata for arg in args if type(arg) is FakeTensor}
    for one in results:
        is_fresh = type(one) is FakeTensor and one.constant is None and not one.dtype.is_complex
        if not is_fresh or one.untyped_storage()._cdata in used:
            return None
    return tuple((one.shape, one.stride(), one.dtype, one.fake_device) for one in results)


def without() -> AbstractContextManager[Any]:
    """Return a context in which tensors have values, inside of a scan."""
    return unset_fake_temporarily()


class Restoration:
    """Puts back what the modules held, where a run under fake tensors has left fake ones: a cached mask, a gradient.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._held = [
            (held, dict(held))
            for module in root.modules()
            for held in (module.__dict__, module._parameters, module._buffers)
        ]
        self._grads = [(parameter, parameter.grad) for parameter in root.parameters()]

    def undo(self) -> None:
        """Put everything back."""
        for held, before in self._held:
            for name in [name for name, value in held.items() if isinstance(value, FakeTensor)]:
                if name in before:
                    held[name] = before[name]
                else:
                    del held[name]
        for parameter, grad in self._grads:
            if isinstance(parameter.grad, FakeTensor):
                parameter.grad = grad
