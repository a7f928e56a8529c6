"""The error of this plugin."""

from __future__ import annotations

from nnsight import NNsightError


class SourceError(NNsightError, ValueError):
    """What happens inside a callable cannot be shown or reached."""
