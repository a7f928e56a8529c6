"""`eproperty`: a value of the run under a name of its own on an envoy class, as a view with its inverse.

A view of the value's own memory is edited in place as it is. Where a view copies, what a block has done to it is put
back, through the inverse, when the block goes on: a seat in the run waits for the end of the block's turn at the visit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch

from nnsight.errors import NamingError, NotInTreeError, ReadOnlyError, ViewError
from nnsight.kernel.controller import current_run
from nnsight.kernel.envoy import Envoy
from nnsight.kernel.mediator import Mediator

if TYPE_CHECKING:
    from nnsight.kernel.interleaver import Interleaver

View = Callable[..., Any]
_PORTS = ("output", "input", "inputs")


class eproperty:  # noqa: N801 - used like `property`
    """A value of the run, as an attribute of an envoy class.

    Args:
        key: where the value is: `output`, `input` or `inputs` of the envoy or, behind a path, of a module below it
            (`o_proj.input`). Any other name is a location of its own, which `publish` reaches.
        view: `view(envoy, value)` returns what a block reads; the value itself by default.
        inverse: `inverse(envoy, view, value)` returns the value that a view stands for, given the old one.
        description: what it is, in a few words; shown by `help`.

    Example:
        >>> class Attention(Envoy):
        ...     @eproperty(key="o_proj.input", description="(B, H, T, D), per head")
        ...     def heads(self, value):
        ...         return value.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        ...
        ...     @heads.inverse
        ...     def from_heads(self, view, value):
        ...         return view.transpose(1, 2).flatten(-2)
        >>> model = NNsight(net, envoys={"self_attn": Attention})
    """

    def __init__(
        self, key: str | View | None = None, *, view: View | None = None, inverse: View | None = None,
        description: str = "",
    ) -> None:  # fmt: skip
        if isinstance(key, str) and not all(key.split(".")):
            raise NamingError(f"eproperty(key={key!r}) cannot be used: it is 'output' or a path to it, 'mlp.output'.")
        self._key: str | None = None if callable(key) else key
        self._view = view
        self._inverse = inverse
        self.description = description
        self._name = ""
        self.__doc__ = description
        if callable(key):  # `@eproperty` without arguments
            self(key)

    def __call__(self, view: View) -> Self:
        """Take the function that makes the view. One with no argument but the envoy is only a name."""
        self._name = view.__name__
        self.description = self.description or inspect.getdoc(view) or ""
        self.__doc__ = inspect.getdoc(view) or self.description
        if len(inspect.signature(view).parameters) > 1:
            self._view = view
        return self

    def inverse(self, inverse: View) -> Self:
        """Take the function that turns a view back into the value: `(envoy, view, value) -> value`."""
        self._inverse = inverse
        return self

    transform = inverse  # its name in 0.8

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = self._name or name  # an inverse under another name is the same value
        if self._key is None:
            self._key = self._name

    def __get__(self, envoy: Any, owner: type[Any] | None = None) -> Any:
        if envoy is None:
            return self
        try:
            block, at = self._find(envoy)
            value = at.read(block)
            if self._view is None:
                return value
            view = self._view(envoy, value)
        except AttributeError as error:
            envoy._failed(self._name, error)  # else Python would ask `__getattr__`, which hides it
            raise
        copies = _copied(view, value)
        if copies:
            _WriteBack(block, at, self, envoy, view, value, copies).take()
        return view

    def __set__(self, envoy: Any, view: Any) -> None:
        block, at = self._find(envoy)
        if self._view is None:
            at.write(block, view)
        else:
            value = at.read(block)
            if self._inverse is not None:
                self._check(envoy, view, self._view(envoy, value), at.name)
            at.write(block, self._undo(envoy, view, value, at.name))

    def publish(self, envoy: Any, value: Any) -> Any:
        """Reach the location, where it is one of its own. Called on the model side, by whoever drives the model.

        Args:
            envoy: whose value it is.
            value: the value.

        Returns:
            The value to go on with: blocks may have changed it.
        """
        run = current_run.get()
        if run is None or run.tree is not envoy._tree:
            return value
        target, port = self._target(envoy)
        return run.visit(target._tree.number(target._path, port), value)

    def _undo(self, envoy: Any, view: Any, value: Any, where: str) -> Any:
        if self._inverse is None:
            raise ReadOnlyError(
                f"`{envoy.path}.{self._name}` is a view of `{where}` without an inverse, so it can only be read. "
                f"Write `{where}`, or give the eproperty an inverse."
            )
        return self._inverse(envoy, view, value)

    def _check(self, envoy: Any, given: Any, view: Any, where: str) -> None:
        """Refuse what has not the shape of the view: its inverse would fail, or make what the model cannot use."""
        if not isinstance(view, torch.Tensor):
            return
        if not isinstance(given, torch.Tensor):
            found = f"{type(given).__name__} is none"
        elif given.shape != view.shape:
            found = f"what was assigned has the shape {tuple(given.shape)}"
        else:
            return
        raise ViewError(
            f"`{envoy.path}.{self._name}`, a view of `{where}`, is a tensor of shape {tuple(view.shape)} here, but "
            f"{found}. Assign a tensor of that shape, or edit the view in place."
        )

    def _target(self, envoy: Any) -> tuple[Envoy, str]:
        """Return the envoy whose value it is, and the name of the port there."""
        assert self._key is not None
        path, _, port = self._key.rpartition(".")
        try:
            target = envoy.get(path) if path else envoy
        except AttributeError as error:
            raise NotInTreeError(f"`{envoy.path}.{self._name}` is a view of `{self._key}`, but {error}") from None
        assert isinstance(target, Envoy)
        if port in target._children:
            raise NamingError(
                f"`{envoy.path}.{self._name}`: {self._key!r} is a module, not a value. Say which of its values is "
                f"meant: key='{self._key}.output' or '{self._key}.input'."
            )
        return target, port

    def _find(self, envoy: Any) -> tuple[Mediator, _Location]:
        """Return the block that a request belongs to, and the location that it means."""
        target, port = self._target(envoy)
        block, number = target._seat(self._name)
        if port not in _PORTS:
            number = target._tree.number(target._path, port)
        return block, _Location(number + (port == "output"), port, f"{target._path}.{port}")


class _Location:
    """A location and how its value is meant: `.input` is the first argument of what the run holds.

    Args:
        number: the location.
        port: how it is asked for.
        name: for messages.
    """

    def __init__(self, number: int, port: str, name: str) -> None:
        self.number = number
        self._port = port
        self.name = name

    def read(self, block: Mediator) -> Any:
        value = block.read(self.number)
        if self._port != "input":
            return value
        args, kwargs = value
        if not args and not kwargs:
            raise ValueError(f"`{self.name}`: the module was called without arguments, so it has no `.input`.")
        return args[0] if args else next(iter(kwargs.values()))

    def write(self, block: Mediator, value: Any) -> None:
        if self._port == "input":
            args, kwargs = block.read(self.number)
            if args or not kwargs:
                value = ((value, *args[1:]), kwargs)
            else:
                value = (args, {**kwargs, next(iter(kwargs)): value})
        block.write(self.number, value)


class _WriteBack(Mediator):
    """A seat that waits for the end of a block's turn at a visit, to put back what the block has done to a copy.

    Args:
        block: the block.
        at: the location that it stands at.
        hooked: the eproperty.
        envoy: whose it is.
        view: what the block was given.
        value: what the run holds.
        copies: the tensors in the view that have memory of their own.
    """

    def __init__(
        self, block: Mediator, at: _Location, hooked: eproperty, envoy: Any, view: Any, value: Any,
        copies: list[torch.Tensor],
    ) -> None:  # fmt: skip
        assert block.run is not None
        super().__init__(block.run, _no_request, _no_request, order=block.order)
        del self.to_block  # the method below: a bound method in its place would be a reference cycle
        self._block = block
        self._at = at
        self._hooked = hooked
        self._envoy = envoy
        self._view = view
        self._value = value
        self._copies = [(copy, _version(copy)) for copy in copies]

    def take(self) -> None:
        """Wait for the rest of this visit."""
        run: Interleaver | None = self.run
        assert run is not None
        self.wanted = {self._at.number: run.counts[self._at.number] - 1}
        run.enqueue(self, self._at.number)

    def to_block(self) -> None:
        """Put back what was changed. Other blocks are resumed here."""
        was_edited = [version is not None and _version(copy) != version for copy, version in self._copies]
        is_unknown = any(version is None for _, version in self._copies) and self._hooked._inverse is not None
        if not any(was_edited) and not is_unknown:
            return
        block = self._block
        step, first, thread = block.step, block.first, block.thread
        # This visit, whatever the block waits for by now; and the model may run in a thread of its own.
        block.step, block.thread = None, threading.get_ident()
        try:
            if self._at.read(block) is self._value:  # else the block has assigned another
                self._at.write(block, self._hooked._undo(self._envoy, self._view, self._value, self._at.name))
        finally:
            block.step, block.first, block.thread = step, first, thread


def _no_request() -> None:
    raise AssertionError("a view asks for nothing")


def _copied(view: Any, value: Any) -> list[torch.Tensor]:
    """Return the tensors of a view that share no memory with the value."""
    own = {tensor.untyped_storage()._cdata for tensor in _tensors(value)}
    return [tensor for tensor in _tensors(view) if tensor.untyped_storage()._cdata not in own]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was edited in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version
