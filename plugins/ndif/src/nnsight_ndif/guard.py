"""A check of indices before a module looks them up: out of range they would end a CUDA context, not just the call.

It takes a seat of its own in every run that a runner's block takes part in, behind all other blocks, and looks at what
embeddings are given: the input comes from the runner, too. At the same places it looks at the clock: a generation that
the block asked for must end at the job's deadline, too, although nobody waits for a message then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nnsight import Interleaver, Mediator, NNsight, current_run
from nnsight_ndif.errors import IndexRangeError

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Guard:
    """Checks the indices that the embeddings of a model are given.

    Args:
        root: the model.
        check_time: raises when the job has taken too long.
    """

    def __init__(self, root: NNsight, check_time: Callable[[], None]) -> None:
        self.check_time = check_time
        known = [envoy for _, envoy in root.named_modules() if isinstance(envoy._module, _EMBEDDINGS)]
        self._watched = [root, *(envoy for envoy in known if envoy is not root)]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that takes the seats in the run it is called in, and then does what `function` does."""

        def run_guarded(*args: Any, **kwargs: Any) -> Any:
            run = current_run.get()
            if run is not None:
                for envoy in self._watched:
                    number = run.number_of(envoy._module)
                    if number is not None:
                        _Seat(run, number, self, envoy._module)
            return function(*args, **kwargs)

        return run_guarded

    def check_arguments(self, module: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Raise when a call of a module would look up what is not there.

        Raises:
            IndexRangeError: an index is out of range.
        """
        if isinstance(module, _EMBEDDINGS):
            check(module, arguments)


class _Seat(Mediator):
    """Looks at every call of one module."""

    def __init__(self, run: Interleaver, number: int, guard: Guard, module: Any) -> None:
        super().__init__(run, _no_request, _no_request, order=sys.maxsize)
        del self.to_block  # the method below: a bound method in its place would be a reference cycle
        self._guard = guard
        self._module = module
        self._input = number
        self._wait()

    def _wait(self) -> None:
        assert self.run is not None
        # As one of several, although it is one: a lone number is taken for the block that drives the model.
        self.wanted = {self._input: self.run.count(self._input)}
        self.run.enqueue(self, self._input)

    def to_block(self) -> None:
        """Look at what the module is given. Other blocks are resumed here."""
        run = self.run
        assert run is not None
        self._guard.check_time()
        if isinstance(self._module, _EMBEDDINGS):
            check(self._module, run.value)
        self._wait()


def _no_request() -> None:
    raise AssertionError("a guard asks for nothing")


def check(module: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Raise when an embedding is given an index that it has not.

    Raises:
        IndexRangeError: it is.
    """
    args, kwargs = arguments
    values = (*args, *kwargs.values())
    for value in values[:1]:  # what follows are the offsets and weights of bags
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.numel():
            low, high = (int(bound) for bound in torch.aminmax(value.detach()))
            if low < 0 or high >= module.num_embeddings:
                raise IndexRangeError(
                    f"An embedding of {module.num_embeddings} entries was given the indices {low} to {high}: they go "
                    f"from 0 to {module.num_embeddings - 1}."
                )
