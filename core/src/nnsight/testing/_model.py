"""What a suite for models is told about the model, and what its tests share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from nnsight.testing._plain import Change, Recording, copied, difference, floats, leaves, record
from nnsight.testing._suite import Suite
from nnsight.tracing.model import NNsight

Location = tuple[str, str, int]


@dataclass(frozen=True)
class Given:
    """An input that is more than one positional argument."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def given(*args: Any, **kwargs: Any) -> Given:
    """Return an input of several arguments, for `inputs` of a suite: each goes to `model.trace(*args, **kwargs)`."""
    return Given(args, kwargs)


class ModelSuite(Suite):
    """What a subclass says about its model. Only `make_module` and `inputs` must be given.

    Attributes:
        joins_invokes: whether several inputs can be one batch; where not, a `BatchError` is expected.
        padding: at which end inputs of different size are filled up in a batch; None where they all have one size.
        tolerance: how far values of a batch may be from those of an input alone. Everything else is compared bit by
            bit.
        bad_inputs: what cannot be an input; each must be refused with an error, and the model usable afterwards.
    """

    joins_invokes: bool = True
    padding: Literal["left", "right"] | None = None
    tolerance: float = 1e-5
    bad_inputs: Sequence[Any] = (object(),)
    _has_wrapped: ClassVar[bool]

    def make_module(self) -> nn.Module:
        """Return the bare model, made without nnsight: new each time, always with the same weights, small."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to make its model: define make_module(self)")

    def make_model(self) -> NNsight:
        """Return a new wrapper, with the plugin's class, around a model as `make_module` makes it."""
        return NNsight(self.make_module())

    def inputs(self) -> Sequence[Any]:
        """Return two or more different inputs: each what `model.trace` is given, or `given(...)` for several arguments.

        They must be as different as inputs of the model can be: of other lengths, other kinds.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its model takes: define inputs(self)")

    def run_plainly(self, module: nn.Module, one: Any) -> Any:
        """Return what the bare module makes of an input, as somebody would call it who does not have nnsight.

        Preprocessing is done here once more, without the plugin: that is what the plugin's own is compared with.
        """
        arguments = as_given(one)
        return module(*arguments.args, **arguments.kwargs)

    # -- what tests share ------------------------------------------------------------------------------------------

    def trace(self, model: Any, one: Any, **options: Any) -> Any:
        """Open a trace on an input; random numbers are those of every other run."""
        torch.manual_seed(0)
        arguments = as_given(one)
        return model.trace(*arguments.args, **arguments.kwargs, **options)

    def invoke(self, tracer: Any, one: Any) -> Any:
        """Open an invoke on an input."""
        arguments = as_given(one)
        return tracer.invoke(*arguments.args, **arguments.kwargs)

    def record(
        self, one: Any, changes: Mapping[Location, Change] | None = None, module: nn.Module | None = None
    ) -> Recording:
        """Return what a bare model does with an input."""
        self.teach_containers()
        module = self.make_module() if module is None else module
        torch.manual_seed(0)
        return record(module, lambda: self.run_plainly(module, copy.deepcopy(one)), changes)

    def check_usable(self, model: NNsight) -> None:
        """Assert that a model can be traced like a new one."""
        one = self.inputs()[0]
        expected = self.record(one)
        with self.trace(model, one) as tracer:
            result = tracer.result
        same(copied(result), expected.result, "the result of a trace afterwards")

    def teach_containers(self) -> None:
        """Let the plugin's class say which containers its values are in, before the first of them is copied."""
        if "_has_wrapped" not in vars(type(self)):
            self.make_model()
            type(self)._has_wrapped = True

    def check_close(self, joint: Any, alone: Any, what: str) -> None:
        """Assert that an invoke's value is the one of its input alone, apart from what fills it up."""
        mine, theirs = leaves(copied(joint)), leaves(alone)
        assert len(mine) == len(theirs), f"{what} holds {len(mine)} values, not {len(theirs)}"
        for value, plain in zip(mine, theirs, strict=True):
            if isinstance(plain, torch.Tensor):
                same(self._without_padding(value, plain), plain, what, self.tolerance)

    def _without_padding(self, value: Any, plain: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor) or self.padding is None or value.ndim != plain.ndim:
            return value
        for dim, (size, wanted) in enumerate(zip(value.shape, plain.shape, strict=True)):
            if dim and size > wanted:
                value = value.narrow(dim, size - wanted if self.padding == "left" else 0, wanted)
        return value

    def spots(self, found: Recording, port: str = "output") -> list[str]:
        """Return the paths of modules, the root left out, whose first value of a port has floating-point tensors."""
        paths = [visit.path for visit in found.first(port) if visit.path and floats(visit.value)]
        assert paths, f"no module below the root has floating-point tensors in its {port}: there is nothing to look at"
        return paths

    def middle(self, found: Recording) -> str:
        """Return the path of a module in the middle of the run that is done before the root is."""
        paths = self.spots(found)
        return paths[len(paths) // 2]


def as_given(one: Any) -> Given:
    """Return an input as arguments, copied: an edit in place must not reach the next run."""
    one = copy.deepcopy(one)
    return one if isinstance(one, Given) else Given((one,))


def same(ours: Any, theirs: Any, what: str, tolerance: float = 0.0) -> None:
    """Assert that a value is what plain torch gives.

    Args:
        ours: the value.
        theirs: plain torch's.
        what: what it is, for the message.
        tolerance: as for `difference`.
    """
    found = difference(ours, theirs, tolerance)
    assert found is None, f"{what} {found}"


def is_changed(ours: Any, theirs: Any) -> bool:
    """Whether two values differ: what a change has to bring about, for the test of it to mean something."""
    return difference(ours, theirs) is not None


def envoy_at(model: Any, path: str) -> Any:
    """Return the envoy of the module at a path below the root; "" is the root itself."""
    return model.get(path) if path else model


def by_path(changes: dict[str, Change], port: str = "output") -> dict[Location, Change]:
    """Return changes of first calls, as `record` takes them."""
    return {(path, port, 0): change for path, change in changes.items()}
