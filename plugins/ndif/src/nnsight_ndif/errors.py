"""The errors of blocks that run in another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnsight import InputError, NNsightError


class RunnerError(NNsightError, RuntimeError):
    """The process that runs a block has ended before the block did, or could not be started."""


class RunnerTimeoutError(RunnerError, TimeoutError):
    """A block took longer than it may; its process was killed."""


class FrameError(RunnerError, ValueError):
    """A message from a runner is malformed, too large, or asks for something that is not there."""


class IndexRangeError(InputError, IndexError):
    """A module that looks indices up was given one that it has not."""


class IsolationError(RunnerError, OSError):
    """The system cannot give an isolation that the operator has not waived."""


class NotInRunnerError(NNsightError, NotImplementedError):
    """Something that works in the caller's own process does not work in a runner."""


class RemoteBlockError(RunnerError):
    """A block raised an exception whose class is not known here; its name and message are in this one's."""


class RunnerWarning(UserWarning):
    """Something that a block did stays in its process."""


def function_of(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return the function that shall drive a model from a runner.

    Raises:
        NotInRunnerError: it is the name of a method of the model's, which stays with the model.
    """
    if isinstance(function, str):
        raise NotInRunnerError(
            f"`trace(fn={function!r})` runs a method of the model, and a block in a runner can call modules only: give "
            "a function that calls them."
        )
    return function
