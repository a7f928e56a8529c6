"""`tracer.barrier(n)`: a point at which blocks wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight.errors import InputError

if TYPE_CHECKING:
    from nnsight.tracing.tracer import Tracer


class Barrier:
    """Lets `count` blocks of one trace meet. Calling it waits for the others; it can be used round after round."""

    def __init__(self, tracer: Tracer, count: int) -> None:
        if type(count) is not int or count < 1:
            raise InputError(f"A barrier is for a number of blocks, 1 or more, not {count!r}.")
        self._tracer = tracer
        self._count = count
        self._arrived = 0

    def __call__(self) -> None:
        """Wait until as many blocks have come here as the barrier is for.

        Raises:
            DeadlockError: fewer blocks come here than it waits for.
        """
        block = self._tracer.current_block()  # before counting: a call that is refused has not arrived
        self._arrived += 1
        needed = -(-self._arrived // self._count) * self._count  # the end of this round
        block.wait_until(lambda: self._arrived >= needed, self)

    def __str__(self) -> str:
        """Say what it is and how many have come in the round that nobody has ended yet."""
        return f"a barrier of {self._count} blocks, at which {self._arrived % self._count} had come"


def barrier(tracer: Tracer, n_participants: int) -> Barrier:
    """Return a barrier for that many blocks of this trace."""
    return Barrier(tracer, n_participants)
