"""The state of torch that belongs to a side: what held when a side stopped holds again when it goes on.

Grad mode, autocast (enabled, dtype, cache), the torch function and dispatch mode stacks, saved-tensor hooks, default
device, CUDA device and stream. Process-wide settings are left alone, and contextvars travel with the greenlet.
Inference mode is the model's: a scope that the block opened is lifted while the model runs, one that the model opened
is lent to the block (its tensors could not be edited otherwise).

`probe` is called twice per switch. With nothing unusual set it returns the grad mode as a bool; anything else is a
`Snapshot`.
"""

from __future__ import annotations

import copy
from functools import cache
from threading import Thread
from typing import Any

import torch
from torch._C import (
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import (
    _pop_saved_tensors_default_hooks,
    _push_saved_tensors_default_hooks,
    _top_saved_tensors_default_hooks,
)
from torch.utils import _device, _python_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

is_autocast_cache_enabled = torch.is_autocast_cache_enabled
is_grad_enabled = torch.is_grad_enabled
is_inference_mode_enabled = torch.is_inference_mode_enabled
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


class Snapshot:
    """All of a side's ambient state, for the cases in which some of it is unusual."""

    __slots__ = (
        "autocast",
        "autocast_cache",
        "cuda",
        "device",
        "dispatch",
        "functions",
        "grad",
        "inference",
        "is_lent",
        "saved_hooks",
    )

    def __init__(self) -> None:
        self.functions = _function_modes()
        with torch._C.DisableTorchFunction():  # a mode of the user's must not see these calls
            self._read()

    def _read(self) -> None:
        self.grad = is_grad_enabled()
        # Every inference scope switches forward-mode gradients off; where they are on, the mode is lent.
        self.is_lent = is_inference_mode_enabled() and torch._C._is_fwd_grad_enabled()
        self.inference = is_inference_mode_enabled() and not self.is_lent
        self.autocast = tuple(
            (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in _AUTOCAST_DEVICES
        )
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.dispatch = _get_current_dispatch_mode_stack()
        self.saved_hooks = _saved_hooks()
        self.device = (_device.CURRENT_DEVICE, getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None))
        self.cuda = _cuda_state()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return (
            self.grad == other.grad
            and self.inference == other.inference
            and self.autocast == other.autocast
            and self.autocast_cache == other.autocast_cache
            and self.cuda == other.cuda
            and _same(self.functions, other.functions)
            and _same(self.dispatch, other.dispatch)
            and len(self.saved_hooks) == len(other.saved_hooks)
            and all(_same(a, b) for a, b in zip(self.saved_hooks, other.saved_hooks, strict=True))
            and _same(self.device, other.device)
        )

    __hash__ = None  # type: ignore[assignment]


State = bool | Snapshot


def probe() -> State:
    """Return the calling thread's ambient state: its grad mode when nothing else is set."""
    if (
        _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or _is_any_autocast_enabled()
        or not is_autocast_cache_enabled()
        or _top_saved_tensors_default_hooks(True) is not None
        or is_inference_mode_enabled()
        or torch.cuda._initialized
    ):
        return Snapshot()
    return is_grad_enabled()


def inherited(state: State) -> State:
    """Return what a model starts with where `state` holds: inference mode that is lent there is its own."""
    if isinstance(state, bool) or not state.is_lent:
        return state
    own = copy.copy(state)
    own.inference, own.is_lent = True, False
    return own


def restore(wanted: State, now: State, lend: bool = False) -> None:
    """Make `wanted` hold, given that `now` holds.

    Args:
        wanted: the state of the side that goes on.
        now: the state of the side that stops.
        lend: whether `now` is the model's and `wanted` a block's, which then gets its inference mode.
    """
    if isinstance(wanted, bool) and isinstance(now, bool):
        torch._C._set_grad_enabled(wanted)
        return
    # A plain state says that nothing but the grad mode is set: take both in full.
    target, current = _full(wanted), _full(now)
    if target == current and not current.is_lent:
        return
    with torch._C.DisableTorchFunction():
        _restore_full(target, current, lend and current.inference and not target.inference)


def _restore_full(target: Snapshot, current: Snapshot, is_lent: bool) -> None:
    _restore_autocast(target, current)
    if not _same(target.functions, current.functions):
        _set_function_modes(target.functions)
    if not _same(target.dispatch, current.dispatch):
        _set_dispatch_modes(target.dispatch)
    if target.saved_hooks != current.saved_hooks:
        _set_saved_hooks(target.saved_hooks)
    _device.CURRENT_DEVICE = target.device[0]
    torch._GLOBAL_DEVICE_CONTEXT.device_context = target.device[1]
    if target.cuda != current.cuda and target.cuda is not None:
        _set_cuda_state(target.cuda)
    _set_inference(target.inference or is_lent, is_lent)
    torch._C._set_grad_enabled(target.grad)


def lend(model: State) -> None:
    """Give the calling block the inference mode of a model that runs in another thread, or take it back."""
    wanted = isinstance(model, Snapshot) and model.inference
    is_own = is_inference_mode_enabled() and not torch._C._is_fwd_grad_enabled()
    if not is_own and wanted is not is_inference_mode_enabled():
        with torch._C.DisableTorchFunction():  # the block's modes would see it
            grad = is_grad_enabled()
            _set_inference(wanted, wanted)
            torch._C._set_grad_enabled(grad)


def settle(began: State) -> None:
    """End the lending of inference mode to a block that closes and had `began` when it opened.

    A scope that the block opened while the mode was lent, and closed after the model had ended its own, puts it back.
    """
    if is_inference_mode_enabled() and not (isinstance(began, Snapshot) and began.is_lent):
        lend(True)


_scopes: list[Any] = []


def _set_inference(value: bool, is_lent: bool) -> None:
    """Set inference mode for good. torch only has scopes, whose end puts back all they found: they are kept."""
    if is_inference_mode_enabled() is not value:
        _scopes.append(torch._C._InferenceMode(value))
        if len(_scopes) >= 1000:
            spent = _scopes.copy()
            _scopes.clear()
            Thread(target=spent.clear).start()  # what they put back is that thread's
    if value and torch._C._is_fwd_grad_enabled() is not is_lent:
        torch._C._set_fwd_grad_enabled(is_lent)


_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]


def process_state() -> list[Any]:
    """Return what torch keeps for the whole process although it belongs to a side."""
    return [_device.CURRENT_DEVICE, *(getattr(_python_dispatch, name) for name in _FLAGS)]


def restore_process_state(state: list[Any]) -> None:
    """Make what `process_state` returned hold again."""
    _device.CURRENT_DEVICE = state[0]
    for name, value in zip(_FLAGS, state[1:], strict=True):
        setattr(_python_dispatch, name, value)
    _publish_dispatch_flags()


def _full(state: State) -> Snapshot:
    if isinstance(state, Snapshot):
        return state
    plain = Snapshot.__new__(Snapshot)
    plain.grad = state
    plain.inference = plain.is_lent = False
    plain.autocast = _default_autocast()
    plain.autocast_cache = True
    plain.functions = []
    plain.dispatch = []
    plain.saved_hooks = []
    plain.device = (None, None)
    plain.cuda = None
    return plain


@cache
def _default_autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    """Return what autocast is where nobody has touched it: a new thread knows."""
    found: list[tuple[bool, torch.dtype]] = []
    thread = Thread(target=lambda: found.extend((False, torch.get_autocast_dtype(name)) for name in _AUTOCAST_DEVICES))
    thread.start()
    thread.join()
    return tuple(found)


def _same(left: Any, right: Any) -> bool:
    """Compare two sequences by the identity of their items: modes may define `==` as they like."""
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _function_modes() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(_len_torch_function_stack())]


def _set_function_modes(modes: list[Any]) -> None:
    while _len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _set_dispatch_modes(modes: list[Any]) -> None:
    for mode in reversed(_get_current_dispatch_mode_stack()):
        _pop_mode(getattr(mode, "_mode_key", None))
    for mode in modes:
        _push_mode(mode)
    # Python-side flags that a mode sets when entered and puts back when left: they must say what the stack says.
    _python_dispatch._is_in_torch_dispatch_mode = bool(modes)
    _python_dispatch._is_in_non_infra_torch_dispatch_mode = any(not mode.is_infra_mode() for mode in modes)
    _python_dispatch._is_in_any_mode_without_ignore_compile_internals = any(
        not getattr(mode, "ignore_compile_internals", bool)() for mode in modes
    )
    _publish_dispatch_flags()


def _publish_dispatch_flags() -> None:
    publish = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)  # torch >= 2.9
    if publish is not None:
        publish(_python_dispatch._is_in_any_mode_without_ignore_compile_internals)


def _saved_hooks() -> list[tuple[Any, Any]]:
    """Read the stack of saved-tensor hooks, outermost first (torch only shows its top)."""
    hooks: list[tuple[Any, Any]] = []
    while (top := _top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _pop_saved_tensors_default_hooks()
    hooks.reverse()
    for pack, unpack in hooks:
        _push_saved_tensors_default_hooks(pack, unpack)
    return hooks


def _set_saved_hooks(hooks: list[tuple[Any, Any]]) -> None:
    while _top_saved_tensors_default_hooks(True) is not None:
        _pop_saved_tensors_default_hooks()
    for pack, unpack in hooks:
        _push_saved_tensors_default_hooks(pack, unpack)


def _restore_autocast(target: Snapshot, current: Snapshot) -> None:
    if target.autocast == current.autocast and target.autocast_cache == current.autocast_cache:
        if target.grad != current.grad and any(enabled for enabled, _ in target.autocast):
            torch.clear_autocast_cache()  # casts cached under no_grad carry no graph
        return
    for name, (enabled, dtype), now in zip(_AUTOCAST_DEVICES, target.autocast, current.autocast, strict=True):
        if (enabled, dtype) != now:
            torch.set_autocast_enabled(name, enabled)
            torch.set_autocast_dtype(name, dtype)
    torch.set_autocast_cache_enabled(target.autocast_cache)
    torch.clear_autocast_cache()


def _cuda_state() -> tuple[int, tuple[int, ...]] | None:
    if not torch.cuda._initialized:
        return None
    device = torch._C._cuda_getDevice()
    return device, tuple(torch._C._cuda_getCurrentStream(device))


def _set_cuda_state(state: tuple[int, tuple[int, ...]]) -> None:
    device, (stream, index, kind) = state
    torch._C._cuda_setStream(stream, index, kind)
    torch._C._cuda_setDevice(device)
