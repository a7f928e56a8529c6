"""What programs of the 0.6 series import for blocks on a server. There is no client for one yet."""

from __future__ import annotations

from typing import Any, Self

from nnsight import InputError


class RemoteBackend:
    """A server that runs blocks. Programs can name the class; one cannot be made yet.

    Raises:
        InputError: always.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        raise InputError(
            f"{cls.__name__}(...): this version of nnsight-ndif has no client for a server. `remote='local'` runs a "
            "block in a process of its own on this machine, as a server would; leave `backend=` out for that."
        )
