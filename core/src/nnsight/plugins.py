"""Plugins: names from entry points, behaviour from hooks.

| group              | serves                                              |
|--------------------|-----------------------------------------------------|
| `nnsight`          | hook implementations (`nnsight.hookspecs`)          |
| `nnsight.exports`  | `from nnsight import LanguageModel`                 |
| `nnsight.modeling` | `from nnsight.modeling.vllm import VLLM`            |
| `nnsight.envoy`    | an attribute of every envoy, such as `envoy.source` |
| `nnsight.tracer`   | a method of every tracer, such as `tracer.cache()`  |

Nothing is scanned before the first name is looked up or the first model wrapped, and no plugin is imported before it is
used. `NNSIGHT_PLUGINS_DISABLE=a,b` and `NNSIGHT_PLUGINS_ALLOW=a,b` choose which take part (`nnsight._discovery`).
"""

from __future__ import annotations

import sys
from typing import Any

from nnsight._hooks import Hooks
from nnsight._registry import Registry, nearest
from nnsight.errors import UnknownPluginError

_MODELING = "nnsight.modeling."

registry = Registry()
hooks = Hooks(registry)

names = registry.names
serves = registry.serves
resolve = registry.resolve
register = hooks.register
unregister = hooks.unregister


_exported: set[str] = set()


def refresh() -> None:
    """Read the installed distributions again: they have changed, or the environment variables that choose among them.

    Every object and hook that came from one is forgotten, also as a name of `nnsight` and a module of
    `nnsight.modeling`, and looked up again when it is needed. Plugins that were registered by hand stay.
    """
    registry.refresh()
    package = vars(sys.modules["nnsight"])
    for name in _exported:
        package.pop(name, None)
    _exported.clear()
    for name in [name for name in sys.modules if name.startswith(_MODELING)]:
        del sys.modules[name]
        vars(sys.modules[_MODELING[:-1]]).pop(name.removeprefix(_MODELING), None)
    hooks.reload()


def lookup(group: str, name: str) -> Any | None:
    """Return what a plugin serves under a name, or None when no plugin has anything to do with it.

    Raises:
        PluginError, ImportError: there is a plugin for it that cannot be used; as `resolve` does.
    """
    return resolve(group, name) if serves(group, name) else None  # an error would look for the nearest names


def open_remote(
    envoy: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], remote: Any, backend: Any,
    function: Any = None, batched: bool = True,
) -> Any:  # fmt: skip
    """Open a trace on a backend; where there is none, by the function `open_remote` that a plugin exports.

    Raises:
        MissingPluginError: nnsight-ndif is not installed.
    """
    from nnsight.protocols import Backend  # lazy: typing would double the time that `import nnsight` takes

    if isinstance(backend, Backend):
        return backend.open_block(envoy, method, args, kwargs, function, batched)
    return resolve("nnsight.exports", "open_remote")(envoy, method, args, kwargs, remote, backend, function, batched)


def exported(name: str) -> Any:
    """Return what a plugin exports as `nnsight.<name>`; the package's `__getattr__` ends here.

    Raises:
        AttributeError: no plugin exports it, and none is known that would.
        ImportError: it is known but not installed, or switched off.
        PluginError: its plugin cannot be loaded, or several claim the name.
    """
    try:
        found = resolve("nnsight.exports", name)
        _exported.add(name)
        return found
    except UnknownPluginError:
        import nnsight

        near = nearest(name, nnsight.__dir__())
        raise AttributeError(f"module 'nnsight' has no attribute {name!r}{near}") from None
