"""What lies inside a forward, at the model's end: `envoy.source` of a block that has no forwards to look into."""

from __future__ import annotations

from typing import Any

from nnsight import NNsight, plugins
from nnsight.protocols import Elsewhere
from nnsight_ndif.errors import FrameError

_MAX_SITES = 10_000
_HOW = ("apart", "before", "at")


class Inside:
    """The functions that a block has looked into.

    Args:
        root: the model.
    """

    def __init__(self, root: NNsight) -> None:
        self._envoys = dict(root.named_modules())
        self._sites: dict[int, tuple[int, Any]] = {}

    def tell(self, request: Any) -> Any:
        """Return data that tells of a function, None where it is not known before it is called.

        Raises:
            FrameError: the request is malformed.
        """
        match request:
            case [str(path), list(steps), str(how)] if path in self._envoys and how in _HOW:
                pass
            case _:
                raise FrameError("a request for a source is malformed")
        if not all(type(step) is str for step in steps) or len(self._sites) >= _MAX_SITES:
            raise FrameError("a request for a source has no steps, or is one too many")
        found = self._provider().described(self._envoys[path], steps, how)
        if found is None:
            return None
        site, data = found
        self._sites[data["first"]] = data["size"], site
        return data

    def enter_all(self) -> None:
        """Let the run that has just been opened look into all of them."""
        for first in self._sites:
            self.enter(first)

    def enter(self, number: int) -> None:
        """Let the open run look into the function that has a location, if one has."""
        for first, (size, site) in self._sites.items():
            if first <= number < first + size:
                self._provider().enter(site, number - first)

    def _provider(self) -> Elsewhere:
        found: Elsewhere = plugins.resolve("nnsight.envoy", "source")
        return found
