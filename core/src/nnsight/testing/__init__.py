"""What plugins are tested with: conformance suites, tiny models, and a fixture that loads a plugin under test.

`pip install "nnsight-core[testing]"` brings what it needs. The suites are classes for pytest to collect: subclass one
in your tests, say how your model or transport is made, and run pytest (docs/plugins/testing.md).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nnsight.testing._lazy import LazyConformance as LazyConformance
    from nnsight.testing._loading import LoadedPlugin as LoadedPlugin
    from nnsight.testing._loading import loaded_plugin as loaded_plugin
    from nnsight.testing._model import Given as Given
    from nnsight.testing._model import given as given
    from nnsight.testing._steps import StepsConformance as StepsConformance
    from nnsight.testing._suite import changed as changed
    from nnsight.testing._suite import dropped as dropped
    from nnsight.testing._suite import reasons as reasons
    from nnsight.testing._transport import CAPTURED as CAPTURED
    from nnsight.testing._transport import INLINE as INLINE
    from nnsight.testing._transport import Transport as Transport
    from nnsight.testing.models import ModelConformance as ModelConformance
    from nnsight.testing.transports import TransportConformance as TransportConformance

_MODULE_OF = {
    "CAPTURED": "_transport",
    "INLINE": "_transport",
    "Transport": "_transport",
    "TransportConformance": "transports",
    "Given": "_model",
    "LazyConformance": "_lazy",
    "LoadedPlugin": "_loading",
    "ModelConformance": "models",
    "StepsConformance": "_steps",
    "changed": "_suite",
    "dropped": "_suite",
    "given": "_model",
    "loaded_plugin": "_loading",
    "reasons": "_suite",
}
# Their assertions explain themselves as those of a test file do.
_SUITES = (
    "_features", "_idle", "_joining", "_lazy", "_programs_beyond", "_programs_blocks", "_programs_runs",
    "_programs_saved", "_programs_values", "_reading", "_running", "_steps", "_writing",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nnsight.testing' has no attribute {name!r}")
    import sys
    from importlib import import_module  # lazy: `import nnsight.testing` needs none of it

    try:
        import pytest  # lazy: an extra
    except ModuleNotFoundError as error:
        from nnsight.errors import MissingPluginError  # lazy: as above

        text = f'nnsight.testing.{name} needs pytest, which is not installed: pip install "nnsight-core[testing]"'
        raise MissingPluginError(text, name="pytest") from error
    modules = [f"nnsight.testing.{module}" for module in ("_model", *_SUITES)]
    pytest.register_assert_rewrite(*(module for module in modules if module not in sys.modules))
    return getattr(import_module(f"nnsight.testing.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
