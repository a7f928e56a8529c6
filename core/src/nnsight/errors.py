"""Every error this library raises on purpose.

All derive from `NNsightError` and from the builtin a caller would expect, so both `except NNsightError` and
`except ValueError` work. One class per thing that a caller handles differently.
"""

from __future__ import annotations


class NNsightError(Exception):
    """Base of all errors raised by this library."""


class MissedProviderError(NNsightError, ValueError):
    """A location was requested that the run did not provide."""


class OutOfOrderError(MissedProviderError):
    """A location was requested after the run had already passed it."""


class OutsideTraceError(NNsightError, ValueError):
    """A value was requested where no block is open."""


class NoInputError(NNsightError, ValueError):
    """A trace had to run a model that needs an input, and got none."""


class InputError(NNsightError, ValueError):
    """The input given to a trace cannot be used."""


class WrongThreadError(NNsightError, RuntimeError):
    """A block was used or closed from a thread that is not its own."""


class DeadlockError(NNsightError, RuntimeError):
    """Every block waits for something that cannot happen any more."""


class TracerStateError(NNsightError, RuntimeError):
    """A tracer was entered twice, or used before it was entered."""


class WrapError(NNsightError, TypeError):
    """The object given cannot be wrapped."""


class NotInTreeError(NNsightError, AttributeError):
    """A name is neither a module of the tree nor an attribute of the module."""


class OrphanError(NNsightError, ReferenceError):
    """An envoy outlived the root that owns it."""


class SaveError(NNsightError, ValueError):
    """`save` was called where no block is open."""


class PluginError(NNsightError, RuntimeError):
    """A plugin could not be loaded or broke its contract."""


class PluginConflictError(PluginError):
    """Two distributions claim one name."""


class MissingPluginError(NNsightError, ImportError):
    """A known name is provided by a distribution that is not installed."""


class ConfigError(NNsightError, ValueError):
    """A configuration value cannot be read or used."""


class PluginDisabledError(PluginError, ImportError):
    """A name is provided by a plugin that the environment switches off."""


class UnknownPluginError(PluginError, LookupError):
    """No plugin provides this name, and none is known that would."""


class PluginWarning(UserWarning):
    """A plugin was left out because it could not be loaded."""


class ConfigWarning(UserWarning):
    """A setting in the configuration file or the environment is not known."""


class CaptureError(NNsightError, ValueError):
    """The body of a block cannot be taken out of its frame."""


class BatchError(InputError):
    """Invokes cannot be joined, or one touched what belongs to the whole batch."""


class InvokeError(NNsightError, ValueError):
    """An invoke where none can be."""


class NamingError(NNsightError, ValueError):
    """A name given to a module cannot be: another has it, or nothing is there to be named."""


class NotCachedError(NNsightError, KeyError, AttributeError):
    """A cache holds nothing under this name."""

    __str__ = Exception.__str__  # a KeyError would show the message in quotes


class CacheError(NNsightError, ValueError):
    """A cache was asked for one value where it holds several, or for something it cannot do."""


class CacheFileError(NNsightError, OSError):
    """A cache could not be written to a file, or read from one."""


class PayloadWarning(UserWarning):
    """A value that has travelled is asked for what stayed at the other end."""


class CacheWarning(UserWarning):
    """A cache does not hold everything that was asked for."""


class ScanError(NNsightError, RuntimeError):
    """A scan came to code that needs the values of tensors, where there are only shapes."""


class ReadOnlyError(NNsightError, AttributeError):
    """A view of a value has no inverse, so it can only be read."""


class ViewError(NNsightError, ValueError):
    """What was assigned to a view of a value has not the view's shape."""


class NoGraphError(NNsightError, NotImplementedError):
    """Backward was traced from a tensor that no gradient can come from."""


class GradientError(NNsightError, ValueError):
    """A value cannot be the gradient of this tensor, or which part of a gradient is its own cannot be told."""


class RecomputeError(NNsightError, RuntimeError):
    """A checkpointed region cannot be computed again as blocks had changed it."""


class StubError(NNsightError, ValueError):
    """No stub can be made of what was named, or it cannot be written."""


class EditFileError(NNsightError, ValueError):
    """Edits could not be written to a file, or read from one."""


class ConformanceError(NNsightError, TypeError):
    """A subclass of a conformance suite replaces or drops a test without saying why."""


class PayloadError(NNsightError, ValueError):
    """A payload is damaged, was written by another version, or is not for this model."""


class UnsendableError(NNsightError, TypeError):
    """A variable of a block is bound to what cannot travel to another process."""
