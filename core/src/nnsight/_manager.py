"""pluggy as this library uses it: strict about what a plugin may declare, exact about which plugin failed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, NoReturn

import pluggy

from nnsight import hookspecs
from nnsight._registry import nearest
from nnsight.errors import PluginConflictError, PluginError

_PREFIX = "nnsight_"
_VERSION = "nnsight_hookspec_version"


class Implementation:
    """One plugin's function for one hook."""

    __slots__ = ("_function", "_positions", "hook", "plugin")

    def __init__(self, hook: str, found: pluggy.HookImpl, parameters: Sequence[str]) -> None:
        self.hook = hook
        self.plugin = found.plugin_name
        self._function = found.function
        self._positions = [parameters.index(argument) for argument in found.argnames]

    def call(self, values: tuple[Any, ...]) -> Any:
        """Call the function with those of the hook's arguments that it takes."""
        return self._function(*[values[position] for position in self._positions])

    def failure(self, error: Exception) -> PluginError:
        """Return the error that says this plugin raised `error`."""
        return PluginError(f"plugin {self.plugin!r} failed in {self.hook}: {type(error).__name__}: {error}")

    def refusal(self, reason: str) -> PluginError:
        """Return the error that says this plugin did not keep to the hook's contract."""
        return PluginError(f"plugin {self.plugin!r} {reason} ({self.hook})")


class _Observer:
    """All implementations of one observer hook. Each is called, also when an earlier one raised."""

    __slots__ = ("_implementations",)

    def __init__(self, implementations: Sequence[Implementation]) -> None:
        self._implementations = implementations

    def __call__(self, *values: Any) -> None:
        failures = self._call_all(values)
        if failures:
            first, error = failures[0]
            failure = first.failure(error)
            for other, later in failures[1:]:
                failure.add_note(str(other.failure(later)))
            raise failure from error

    def _call_all(self, values: tuple[Any, ...]) -> list[tuple[Implementation, Exception]]:
        failures = []
        for implementation in self._implementations:
            try:
                implementation.call(values)
            except Exception as error:  # noqa: BLE001 - a plugin boundary; raised again with the plugin's name
                failures.append((implementation, error))
        return failures


class _RunEndedObserver(_Observer):
    """As an observer, but the error that ended the run is never replaced by a plugin's."""

    __slots__ = ()

    def __call__(self, *values: Any) -> None:
        ended_by: BaseException | None = values[1]
        if ended_by is None:
            super().__call__(*values)
            return
        for implementation, error in self._call_all(values):
            ended_by.add_note(str(implementation.failure(error)))


class _PluginManager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        options = super().parse_hookimpl_opts(plugin, name)
        if options is not None or not name.startswith(_PREFIX):
            return options
        static = inspect.getattr_static(plugin, name, None)
        if not isinstance(static, FunctionType | MethodType | staticmethod | classmethod):
            return None
        return {
            "wrapper": False, "hookwrapper": False, "optionalhook": False, "tryfirst": False, "trylast": False,
            "specname": None,
        }  # fmt: skip


class Manager:
    """The registered plugins and their implementations."""

    def __init__(self) -> None:
        self._pluggy = _PluginManager("nnsight")
        self._pluggy.add_hookspecs(hookspecs)
        self._parameters = {
            name: tuple(inspect.signature(value).parameters)
            for name, value in vars(hookspecs).items()
            if name.startswith(_PREFIX)
        }

    def add(self, plugin: object, name: str | None) -> str:
        """Register a plugin after checking all it declares; on an error nothing is registered."""
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        if self._pluggy.has_plugin(name):
            other = self._pluggy.get_plugin(name)
            raise PluginConflictError(f"a plugin named {name!r} is already registered: {other!r}")
        if self._pluggy.is_registered(plugin):
            raise PluginConflictError(f"{plugin!r} is already registered, as {self._pluggy.get_name(plugin)!r}")
        self._check_version(plugin, name)
        for attribute in dir(plugin):
            self._check_attribute(plugin, name, attribute)
        try:
            self._pluggy.register(plugin, name)
        except pluggy.PluginValidationError as error:
            self._pluggy.unregister(name=name)  # older versions of pluggy leave half of it behind
            raise PluginError(f"plugin {name!r} does not fit its hook: {error}") from error
        return name

    def remove(self, plugin: object) -> bool:
        """Unregister a plugin by object or name; return whether there was one."""
        name = plugin if isinstance(plugin, str) else self._pluggy.get_name(plugin)
        if name is None or not self._pluggy.has_plugin(name):
            return False
        self._pluggy.unregister(name=name)
        return True

    def names(self) -> list[str]:
        """Return the names of the registered plugins."""
        return [name for name, plugin in self._pluggy.list_name_plugin() if plugin is not None]

    def implementations(self, hook: str) -> list[Implementation]:
        """Return the implementations of a hook in calling order: the last registered first, as in pluggy."""
        caller: pluggy.HookCaller = getattr(self._pluggy.hook, hook)
        return [Implementation(hook, found, self._parameters[hook]) for found in reversed(caller.get_hookimpls())]

    def observer(self, hook: str) -> Callable[..., None] | None:
        """Return what calls every implementation of an observer hook, or None if there is none."""
        found = self.implementations(hook)
        return _Observer(found) if found else None

    def run_ended_observer(self) -> Callable[..., None] | None:
        """Return the observer of `nnsight_run_ended`, or None."""
        found = self.implementations("nnsight_run_ended")
        return _RunEndedObserver(found) if found else None

    def implemented(self) -> dict[str, list[str]]:
        """Return the hooks that each plugin implements."""
        hooks: dict[str, list[str]] = {name: [] for name in self.names()}
        for hook in self._parameters:
            for implementation in self.implementations(hook):
                hooks[implementation.plugin].append(hook)
        return hooks

    def _check_version(self, plugin: object, name: str) -> None:
        version = getattr(plugin, _VERSION, hookspecs.HOOKSPEC_VERSION)
        if not isinstance(version, int):
            raise PluginError(f"plugin {name!r} states {_VERSION} = {version!r}; it must be an integer")
        if version > hookspecs.HOOKSPEC_VERSION:
            raise PluginError(
                f"plugin {name!r} is written for version {version} of the hooks, this nnsight-core has version "
                f"{hookspecs.HOOKSPEC_VERSION}: pip install --upgrade nnsight-core"
            )

    def _check_attribute(self, plugin: object, name: str, attribute: str) -> None:
        options = self._pluggy.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            if attribute in self._parameters:
                _refuse(name, f"has {attribute}, which is not a function: a hook must be a plain function or method")
            return
        hook = options.get("specname") or attribute
        if hook not in self._parameters:
            if not options.get("optionalhook"):
                _refuse(name, f"implements {hook!r}, which is not a hook{nearest(hook, list(self._parameters))}")
        elif options.get("wrapper") or options.get("hookwrapper"):
            _refuse(name, f"implements {hook!r} as a wrapper; the hooks of nnsight cannot be wrapped")


def _refuse(plugin: str, reason: str) -> NoReturn:
    raise PluginError(f"plugin {plugin!r} {reason}")
