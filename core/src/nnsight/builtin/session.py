"""`model.session()`: traces that belong together. Here it costs nothing: values flow between them as in any code."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from nnsight.errors import TracerStateError
from nnsight.kernel.blocks import PlainBlock, close_block, open_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight.tracing.model import Envoy


class Session:
    """A group of traces. `save` works everywhere in it."""

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._block: PlainBlock | None = None

    def __enter__(self) -> Self:
        if self._block is not None:
            raise TracerStateError("This session is open already. Call `model.session()` again for one inside of it.")
        self._frame = sys._getframe(1)
        self._block = PlainBlock(self._frame)
        open_block(self._frame, self._block)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._frame is not None and self._block is not None
        close_block(self._frame, self._block)
        self._block.close()
        self._frame = self._block = None


def session(envoy: Envoy) -> Callable[..., Any]:
    """Return the method `model.session(remote=False, backend=None)`."""

    def open_session(remote: Any = False, backend: Any = None, **options: Any) -> Any:
        """Group traces: `with model.session() as session:`.

        Args:
            remote: where to run them; False is here.
            backend: what carries them there.
            **options: for the transport.
        """
        if remote or backend is not None:
            from nnsight import plugins  # lazy: a transport is a plugin

            return plugins.open_remote(envoy, "session", (), options, remote, backend)
        return Session()

    return open_session
