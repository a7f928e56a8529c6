"""The manager of plugin hooks: typed calls for the library, pluggy behind them.

An observer hook that no plugin implements is None, so that a call site costs one attribute load and a truth test.
pluggy is imported when the first model is wrapped, and only if there is a plugin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nnsight._registry import Registry, nearest
from nnsight._warning import warn_user
from nnsight.errors import PluginConflictError, PluginError, PluginWarning

if TYPE_CHECKING:
    from nnsight._manager import Implementation, Manager
    from nnsight.kernel.interleaver import Interleaver
    from nnsight.kernel.mediator import Mediator
    from nnsight.tracing.model import Envoy
    from nnsight.tracing.tracer import Tracer

Command = Callable[[list[str]], int]


class Hooks:
    """What the library calls when something happens that plugins may care about.

    Attributes:
        trace_opened: `hooks.trace_opened(tracer)`, or None when no plugin implements it.
        block_joined: `hooks.block_joined(block)`, or None.
        run_started: `hooks.run_started(run)`, or None.
        run_ended: `hooks.run_ended(run, error)`, or None.
    """

    __slots__ = (
        "_broken", "_installed", "_is_loaded", "_loaders", "_lock", "_manager", "_registry", "_wrapped",
        "block_joined", "run_ended", "run_started", "trace_opened",
    )  # fmt: skip

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.RLock()
        self._manager: Manager | None = None
        self._is_loaded = False
        self._loaders: set[int] = set()
        self._installed: list[str] = []
        self._broken: dict[str, PluginError] = {}
        self._wrapped: Callable[[Envoy], None] | None = None
        self.trace_opened: Callable[[Tracer], None] | None = None
        self.block_joined: Callable[[Mediator], None] | None = None
        self.run_started: Callable[[Interleaver], None] | None = None
        self.run_ended: Callable[[Interleaver, BaseException | None], None] | None = None

    def wrapped(self, envoy: Envoy) -> None:
        """Tell plugins that a model was wrapped. The first call loads them."""
        if not self._is_loaded:
            self.load()
        if self._wrapped is not None:
            self._wrapped(envoy)

    def saveable_types(self) -> tuple[type, ...]:
        """Return the types that plugins want a `.save()` on, each once."""
        found: dict[type, None] = {}
        for implementation in self._implementations("nnsight_saveable_types"):
            for item in _answer(implementation, list):
                if not isinstance(item, type):
                    raise implementation.refusal(f"returned {item!r}, which is not a type")
                found[item] = None
        return tuple(found)

    def commands(self) -> dict[str, list[tuple[str, Command]]]:
        """Return the commands of plugins: name -> every plugin that claims it, with its function.

        A plugin that fails to say is left out with a warning: the others' commands, and help, must go on working.
        """
        found: dict[str, list[tuple[str, Command]]] = {}
        for implementation in self._implementations("nnsight_commands"):
            try:
                commands = _answer(implementation, dict)
                for name, command in commands.items():
                    if not callable(command):
                        raise implementation.refusal(f"gives {command!r} for {name!r}, which is not a function")
            except PluginError as error:
                warn_user(f"{error}. Its commands are left out.", PluginWarning)
                continue
            for name, command in commands.items():
                found.setdefault(name, []).append((implementation.plugin, command))
        return found

    def doctor(self) -> list[tuple[str, bool | None, str]]:
        """Return the lines that plugins add to `doctor`; one that fails is a line itself."""
        lines: list[tuple[str, bool | None, str]] = []
        for implementation in self._implementations("nnsight_doctor"):
            try:
                lines.extend((str(what), is_well, str(text)) for what, is_well, text in implementation.call(()))
            except Exception as error:  # noqa: BLE001 - doctor reports what is broken, it does not break
                lines.append((implementation.plugin, False, str(implementation.failure(error))))
        return lines

    def register(self, plugin: object, name: str | None = None) -> str:
        """Add a plugin that is not installed as a distribution: a module or any object with hook functions.

        Args:
            plugin: the object.
            name: what it is called in messages; the module or class name by default.

        Returns:
            The name it is registered under.

        Raises:
            PluginError: it implements a hook that does not exist, with wrong arguments, or for a newer version.
            PluginConflictError: the name is taken, or the plugin is registered already.
        """
        with self._lock:
            name = self._opened().add(plugin, name)
            self._refresh()
            return name

    def unregister(self, plugin: object) -> None:
        """Remove a plugin, given as the object or as the name it was registered under.

        Raises:
            PluginError: there is no such plugin.
        """
        with self._lock:
            names = self._manager.names() if self._manager else []
            if self._manager is None or not self._manager.remove(plugin):
                near = nearest(plugin, names) if isinstance(plugin, str) else ""
                raise PluginError(f"{plugin!r} is not a registered plugin{near}")
            self._refresh()

    def load(self) -> None:
        """Import and register the plugins of group `nnsight`, once; warn about each that cannot be."""
        me = threading.get_ident()
        if self._is_loaded or me in self._loaders:
            return  # a plugin that wraps a model while it is being imported comes back here
        # The imports happen outside the lock: another thread may hold a module's import lock and wait for ours.
        self._loaders.add(me)
        try:
            plugins, broken = self._imported()
        finally:
            self._loaders.discard(me)
        with self._lock:
            if self._is_loaded:
                return
            for name, plugin in plugins.items():
                try:
                    self._installed.append(self._opened().add(plugin, name))
                except PluginError as error:
                    broken[name] = error
            self._broken = broken
            self._is_loaded = True
            self._refresh()
        for text in [*map(str, broken.values()), *self._registry.catalog.problems]:
            warn_user(f"{text} It is left out.", PluginWarning)

    def reload(self) -> None:
        """Forget the plugins of distributions, and load those that are there now if they had been loaded."""
        with self._lock:
            was_loaded, self._is_loaded = self._is_loaded, False
            for name in self._installed:
                if self._manager is not None:
                    self._manager.remove(name)
            self._installed, self._broken = [], {}
            self._refresh()
        if was_loaded:
            self.load()

    @property
    def broken(self) -> dict[str, PluginError]:
        """The plugins of group `nnsight` that were left out, by name, and why."""
        self.load()
        return self._broken

    def implemented(self) -> dict[str, list[str]]:
        """Return the names of the hooks that each registered plugin implements."""
        self.load()
        return self._manager.implemented() if self._manager else {}

    def _imported(self) -> tuple[dict[str, object], dict[str, PluginError]]:
        plugins: dict[str, object] = {}
        broken: dict[str, PluginError] = {}
        for name in self._registry.names("nnsight"):
            try:
                plugins[name] = self._registry.resolve("nnsight", name)
            except PluginError as error:
                broken[name] = error
        return plugins, broken

    def _opened(self) -> Manager:
        if self._manager is None:
            from nnsight._manager import Manager  # lazy: imports pluggy

            self._manager = Manager()
        return self._manager

    def _refresh(self) -> None:
        manager = self._manager
        if manager is not None:
            self._wrapped = manager.observer("nnsight_wrapped")
            self.trace_opened = manager.observer("nnsight_trace_opened")
            self.block_joined = manager.observer("nnsight_block_joined")
            self.run_started = manager.observer("nnsight_run_started")
            self.run_ended = manager.run_ended_observer()

    def _implementations(self, hook: str) -> Sequence[Implementation]:
        self.load()
        return self._manager.implementations(hook) if self._manager else ()


def _answer(implementation: Implementation, kind: type) -> Any:
    """Ask one plugin for its part of a collection."""
    try:
        answer = implementation.call(())
    except Exception as error:
        raise implementation.failure(error) from error
    if not isinstance(answer, kind):
        raise implementation.refusal(f"returned {answer!r}, which is not a {kind.__name__}")
    return answer


def the_only(name: str, claims: list[tuple[str, Command]]) -> Command:
    """Return the one function of a command.

    Raises:
        PluginConflictError: several plugins claim it.
    """
    if len(claims) > 1:
        who = " and ".join(plugin for plugin, _ in claims)
        raise PluginConflictError(f"the command {name!r} is claimed by the plugins {who}; uninstall one of them")
    return claims[0][1]
