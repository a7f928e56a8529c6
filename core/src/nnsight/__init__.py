"""Read and change the inside of a running PyTorch model.

Importing this package loads nothing but the standard library: every public name is fetched from its module when it is
first used. A name that is not the core's own is looked up among the plugins (entry-point group `nnsight.exports`).
"""

from __future__ import annotations

from nnsight._version import __version__ as __version__

TYPE_CHECKING = False  # type checkers take this name as true; importing `typing` would double the import time
if TYPE_CHECKING:
    from typing import Any

    from nnsight._compat import Object as Object
    from nnsight.builtin.cached import Cache as Cache
    from nnsight.builtin.eproperty import eproperty as eproperty
    from nnsight.builtin.explain import Explanation as Explanation
    from nnsight.builtin.explain import explain as explain
    from nnsight.builtin.places import Places as Places
    from nnsight.config import CONFIG as CONFIG
    from nnsight.errors import BatchError as BatchError
    from nnsight.errors import CacheError as CacheError
    from nnsight.errors import CacheFileError as CacheFileError
    from nnsight.errors import CacheWarning as CacheWarning
    from nnsight.errors import CaptureError as CaptureError
    from nnsight.errors import ConfigError as ConfigError
    from nnsight.errors import ConfigWarning as ConfigWarning
    from nnsight.errors import ConformanceError as ConformanceError
    from nnsight.errors import DeadlockError as DeadlockError
    from nnsight.errors import EditFileError as EditFileError
    from nnsight.errors import GradientError as GradientError
    from nnsight.errors import InputError as InputError
    from nnsight.errors import InvokeError as InvokeError
    from nnsight.errors import MissedProviderError as MissedProviderError
    from nnsight.errors import MissingPluginError as MissingPluginError
    from nnsight.errors import NamingError as NamingError
    from nnsight.errors import NNsightError as NNsightError
    from nnsight.errors import NoGraphError as NoGraphError
    from nnsight.errors import NoInputError as NoInputError
    from nnsight.errors import NotCachedError as NotCachedError
    from nnsight.errors import NotInTreeError as NotInTreeError
    from nnsight.errors import OrphanError as OrphanError
    from nnsight.errors import OutOfOrderError as OutOfOrderError
    from nnsight.errors import OutsideTraceError as OutsideTraceError
    from nnsight.errors import PayloadError as PayloadError
    from nnsight.errors import PayloadWarning as PayloadWarning
    from nnsight.errors import PluginConflictError as PluginConflictError
    from nnsight.errors import PluginDisabledError as PluginDisabledError
    from nnsight.errors import PluginError as PluginError
    from nnsight.errors import PluginWarning as PluginWarning
    from nnsight.errors import ReadOnlyError as ReadOnlyError
    from nnsight.errors import RecomputeError as RecomputeError
    from nnsight.errors import SaveError as SaveError
    from nnsight.errors import ScanError as ScanError
    from nnsight.errors import StubError as StubError
    from nnsight.errors import TracerStateError as TracerStateError
    from nnsight.errors import UnknownPluginError as UnknownPluginError
    from nnsight.errors import UnsendableError as UnsendableError
    from nnsight.errors import ViewError as ViewError
    from nnsight.errors import WrapError as WrapError
    from nnsight.errors import WrongThreadError as WrongThreadError
    from nnsight.hookspecs import hookimpl as hookimpl
    from nnsight.joint.containers import register_container as register_container
    from nnsight.joint.invoker import Capture as Capture
    from nnsight.joint.invoker import Invoker as Invoker
    from nnsight.kernel.controller import current_run as current_run
    from nnsight.kernel.interleaver import Interleaver as Interleaver
    from nnsight.kernel.mediator import Mediator as Mediator
    from nnsight.tracing.model import Envoy as Envoy
    from nnsight.tracing.model import NNsight as NNsight
    from nnsight.tracing.model import traceable as traceable
    from nnsight.tracing.saving import save as save
    from nnsight.tracing.tracer import Tracer as Tracer

_PUBLIC = {
    "nnsight._compat": ("Object",),
    "nnsight.builtin.cached": ("Cache",),
    "nnsight.builtin.eproperty": ("eproperty",),
    "nnsight.builtin.explain": ("Explanation", "explain"),
    "nnsight.config": ("CONFIG",),
    "nnsight.errors": (
        "BatchError", "CacheError", "CacheFileError", "CacheWarning", "CaptureError", "ConfigError", "ConfigWarning",
        "ConformanceError", "DeadlockError", "EditFileError", "GradientError", "InputError", "InvokeError",
        "MissedProviderError",
        "MissingPluginError", "NNsightError", "NamingError", "NoGraphError", "NoInputError", "NotCachedError", "NotInTreeError",  # noqa: E501
        "OrphanError", "OutOfOrderError", "OutsideTraceError", "PayloadError", "PayloadWarning", "PluginConflictError",
        "PluginDisabledError", "PluginError", "PluginWarning", "ReadOnlyError", "RecomputeError", "SaveError",
        "ScanError", "StubError", "TracerStateError", "UnknownPluginError", "UnsendableError", "ViewError",
        "WrapError", "WrongThreadError",
    ),
    "nnsight.hookspecs": ("hookimpl",),
    "nnsight.kernel.controller": ("current_run",),
    "nnsight.kernel.interleaver": ("Interleaver",),
    "nnsight.kernel.mediator": ("Mediator",),
    "nnsight.builtin.places": ("Places",),
    "nnsight.joint.containers": ("register_container",),
    "nnsight.joint.invoker": ("Capture", "Invoker"),
    "nnsight.tracing.model": ("Envoy", "NNsight", "traceable"),
    "nnsight.tracing.saving": ("save",),
    "nnsight.tracing.tracer": ("Tracer",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = frozenset(
    {"config", "errors", "hookspecs", "intervention", "modeling", "ndif", "payload", "plugins", "protocols", "testing"}
)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # inspection asks for many of these; no plugin may provide one
        raise AttributeError(f"module 'nnsight' has no attribute {name!r}")
    from importlib import import_module  # lazy: a bare `import nnsight` needs none of it

    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        return import_module(f"nnsight.{name}")
    else:
        from nnsight.plugins import exported

        value = exported(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from nnsight.plugins import names

    return sorted({"__version__", *_MODULE_OF, *_SUBMODULES, *names("nnsight.exports")})
