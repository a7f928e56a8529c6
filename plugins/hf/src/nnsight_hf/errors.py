"""The errors that only this plugin raises; the rest are the core's."""

from __future__ import annotations

from nnsight import InputError, NNsightError


class LoadError(NNsightError, OSError):
    """There is nothing to load under this name, or what is there cannot be loaded."""


class MissingTokenizerError(InputError, AttributeError):
    """Text was given to a model that has no tokenizer."""
