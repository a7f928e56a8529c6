"""`envoy.source`: every operation inside a module's forward is a location that can be read, changed and skipped.

The forward is read as source, compiled once more with each operation passed through a visit, and put in the place of
the original while a run needs it: nothing is changed on a module that no run is looking into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_source.elsewhere import described, enter, made
from nnsight_source.errors import SourceError as SourceError
from nnsight_source.source import Group as Group
from nnsight_source.source import Operation as Operation
from nnsight_source.source import Source as Source
from nnsight_source.source import source_of

if TYPE_CHECKING:
    from nnsight import Envoy


class _Sources:
    """What `envoy.source` is made by, also in a process without the model; see `nnsight.protocols.Elsewhere`."""

    def __call__(self, envoy: Envoy) -> Source:
        """Return the operations inside an envoy's forward.

        Raises:
            SourceError: the forward has no Python source.
        """
        return source_of(envoy)

    described = staticmethod(described)
    enter = staticmethod(enter)
    made = staticmethod(made)


source = _Sources()
