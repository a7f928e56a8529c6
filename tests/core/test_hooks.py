"""Hooks: every spec has a test here, plugins are held to their contract, and who failed is always named."""

from __future__ import annotations

import inspect
import types
import typing

import pytest

import nnsight
from nnsight import hookspecs
from nnsight._hooks import Hooks
from nnsight._registry import Registry
from nnsight.errors import PluginConflictError, PluginError

SPECS = sorted(name for name in vars(hookspecs) if name.startswith("nnsight_"))


@pytest.fixture
def hooks(monkeypatch):
    """A manager that no installed plugin takes part in."""
    monkeypatch.setenv("NNSIGHT_PLUGINS_DISABLE", "*, nnsight-core")
    return Hooks(Registry())


def plugin_of(**functions):
    return types.SimpleNamespace(**functions)


def command(arguments: list[str]) -> int:
    """Do something."""
    return len(arguments)


class Special:
    """A type a plugin may want saved."""


# --- One call for every spec: (what the plugin's function is called with, what it returns, how the library calls it)

ENVOY, TRACER, BLOCK, RUN, ERROR = object(), object(), object(), object(), ValueError("the run's")
CALLS = {
    "nnsight_wrapped": ({"envoy": ENVOY}, None, lambda h: h.wrapped(ENVOY)),
    "nnsight_trace_opened": ({"tracer": TRACER}, None, lambda h: h.trace_opened(TRACER)),
    "nnsight_block_joined": ({"block": BLOCK}, None, lambda h: h.block_joined(BLOCK)),
    "nnsight_run_started": ({"run": RUN}, None, lambda h: h.run_started(RUN)),
    "nnsight_run_ended": ({"run": RUN, "error": ERROR}, None, lambda h: h.run_ended(RUN, ERROR)),
    "nnsight_saveable_types": ({}, [Special, Special], lambda h: h.saveable_types() == (Special,)),
    "nnsight_commands": ({}, {"do": command}, lambda h: h.commands() == {"do": [("one", command)]}),
    "nnsight_doctor": ({}, [("gpu", None, "none")], lambda h: h.doctor() == [("gpu", None, "none")]),
}
OBSERVERS = [
    "nnsight_wrapped",
    "nnsight_trace_opened",
    "nnsight_block_joined",
    "nnsight_run_started",
    "nnsight_run_ended",
]


@pytest.mark.parametrize("name", SPECS)
def test_hook_is_registered_and_called_with_its_arguments(hooks, name):
    assert name in CALLS, f"{name} has no test: add how the library calls it to CALLS"
    expected, returned, call = CALLS[name]
    seen = []
    parameters = inspect.signature(getattr(hookspecs, name)).parameters
    function = eval(
        f"lambda {', '.join(parameters)}: record({', '.join(parameters)})",
        {"record": lambda *v: seen.append(v) or returned},
    )
    hooks.register(plugin_of(**{name: function}), "one")
    assert call(hooks) is (None if name in OBSERVERS else True)
    assert seen == [tuple(expected[parameter] for parameter in parameters)]


@pytest.mark.parametrize("name", SPECS)
def test_hook_says_when_it_fires_and_is_fully_typed(name):
    spec = getattr(hookspecs, name)
    assert inspect.getdoc(spec).startswith("Fires ")
    named = {name: getattr(nnsight, name) for name in ("Envoy", "Interleaver", "Mediator", "Tracer")}
    hints = typing.get_type_hints(spec, {**vars(hookspecs), **named})
    assert set(hints) == {*inspect.signature(spec).parameters, "return"}
    assert (hints["return"] is type(None)) == (name in OBSERVERS)


@pytest.mark.parametrize("name", SPECS)
def test_hook_can_be_implemented_without_its_arguments(hooks, name):
    _, returned, call = CALLS[name]
    seen = []
    hooks.register(plugin_of(**{name: lambda: seen.append(1) or returned}), "one")
    call(hooks)
    assert seen == [1]


# --- The hot path


def test_observers_nobody_implements_are_none(hooks):
    assert (hooks.trace_opened, hooks.run_started, hooks.run_ended) == (None, None, None)
    hooks.wrapped(ENVOY)
    plugin = plugin_of(nnsight_run_started=lambda run: None)
    hooks.register(plugin, "one")
    assert hooks.run_started is not None
    assert hooks.run_ended is None
    hooks.unregister(plugin)
    assert hooks.run_started is None


def test_pluggy_is_imported_at_the_first_wrap_and_only_for_a_plugin(site):
    program = """
        import sys, nnsight
        from nnsight.plugins import hooks
        print("pluggy" in sys.modules, end=" ")
        hooks.wrapped(None)
        print("pluggy" in sys.modules)
        """
    no_builtins = {"NNSIGHT_PLUGINS_DISABLE": "nnsight-core"}
    assert site.run(program, **no_builtins) == "False False"
    site.add(
        "alpha",
        {"nnsight": {"alpha": "alpha_hooks"}},
        {"alpha_hooks": "def nnsight_wrapped(envoy): print('wrapped', end=' ')"},
    )
    assert site.run(program, **no_builtins) == "False wrapped True"


# --- Order and options


def test_last_registered_is_called_first_and_options_change_that(hooks):
    order = []
    for name in "abc":
        hooks.register(plugin_of(nnsight_wrapped=lambda n=name: order.append(n)), name)
    first = hookspecs.hookimpl(tryfirst=True)(lambda: order.append("first"))
    last = hookspecs.hookimpl(trylast=True)(lambda: order.append("last"))
    hooks.register(plugin_of(nnsight_wrapped=first), "first")
    hooks.register(plugin_of(nnsight_wrapped=last), "last")
    hooks.register(plugin_of(nnsight_wrapped=lambda: order.append("d")), "d")
    hooks.wrapped(ENVOY)
    assert order == ["first", "d", "c", "b", "a", "last"]


def test_methods_of_an_object_and_of_a_class_are_hooks(hooks):
    seen = []

    class Plugin:
        def nnsight_wrapped(self, envoy):
            seen.append((type(self), envoy))

        @staticmethod
        def nnsight_run_started(run):
            seen.append(run)

    assert hooks.register(Plugin()) == "Plugin"
    hooks.wrapped(ENVOY)
    hooks.run_started(RUN)
    assert seen == [(Plugin, ENVOY), RUN]


# --- The contract


def test_misspelt_hook_is_an_error_that_names_the_nearest(hooks):
    with pytest.raises(
        PluginError,
        match="plugin 'one' implements 'nnsight_run_start', which is not a hook; did you mean nnsight_run_started",
    ):
        hooks.register(plugin_of(nnsight_run_start=lambda run: None), "one")
    marked = hookspecs.hookimpl(lambda: None)
    with pytest.raises(PluginError, match="implements 'wrapped', which is not a hook; did you mean nnsight_wrapped"):
        hooks.register(plugin_of(wrapped=marked), "one")
    hooks.register(plugin_of(nnsight_future=hookspecs.hookimpl(optionalhook=True)(lambda: None)), "one")


def test_wrong_argument_is_an_error_that_names_it(hooks):
    with pytest.raises(PluginError, match=r"plugin 'one' does not fit its hook: (.|\n)*model"):
        hooks.register(plugin_of(nnsight_wrapped=lambda model: None), "one")
    hooks.register(plugin_of(nnsight_wrapped=lambda envoy: None), "one")  # nothing was left behind


def test_hook_that_is_not_a_function_is_an_error(hooks):
    with pytest.raises(PluginError, match="has nnsight_wrapped, which is not a function"):
        hooks.register(plugin_of(nnsight_wrapped=3), "one")


def test_wrappers_are_refused(hooks):
    @hookspecs.hookimpl(wrapper=True)
    def wrapper():
        yield

    with pytest.raises(PluginError, match="implements 'nnsight_wrapped' as a wrapper"):
        hooks.register(plugin_of(nnsight_wrapped=wrapper), "one")


def test_newer_hookspec_version_is_refused(hooks):
    newer = hookspecs.HOOKSPEC_VERSION + 1
    with pytest.raises(
        PluginError, match=f"written for version {newer} of the hooks.*pip install --upgrade nnsight-core"
    ):
        hooks.register(plugin_of(nnsight_hookspec_version=newer), "one")
    with pytest.raises(PluginError, match="must be an integer"):
        hooks.register(plugin_of(nnsight_hookspec_version="1"), "one")
    hooks.register(plugin_of(nnsight_hookspec_version=1), "one")


def test_registering_twice_is_a_conflict(hooks):
    plugin = plugin_of()
    hooks.register(plugin, "one")
    with pytest.raises(PluginConflictError, match="a plugin named 'one' is already registered"):
        hooks.register(plugin_of(), "one")
    with pytest.raises(PluginConflictError, match="already registered, as 'one'"):
        hooks.register(plugin, "two")


def test_unregistering_what_is_not_there_names_the_nearest(hooks):
    with pytest.raises(PluginError, match="'tracer' is not a registered plugin"):
        hooks.unregister("tracer")
    hooks.register(plugin_of(), "tracer2")
    with pytest.raises(PluginError, match="did you mean tracer2"):
        hooks.unregister("tracer1")


# --- Plugins that fail


@pytest.mark.parametrize("name", OBSERVERS[:3])
def test_observer_that_raises_is_named_and_chained_and_the_others_still_run(hooks, name):
    seen = []
    cause = ZeroDivisionError("inside")

    def fail():
        raise cause

    hooks.register(plugin_of(**{name: lambda: seen.append(1)}), "fine")
    hooks.register(plugin_of(**{name: fail}), "bad")
    with pytest.raises(PluginError, match=f"plugin 'bad' failed in {name}: ZeroDivisionError: inside") as caught:
        CALLS[name][2](hooks)
    assert caught.value.__cause__ is cause
    assert seen == [1]


def test_every_failing_observer_is_mentioned(hooks):
    for name in ("one", "two"):
        hooks.register(plugin_of(nnsight_wrapped=lambda n=name: int(n)), name)
    with pytest.raises(PluginError, match="plugin 'two' failed") as caught:
        hooks.wrapped(ENVOY)
    assert any("plugin 'one' failed in nnsight_wrapped: ValueError" in note for note in caught.value.__notes__)


def test_run_ended_never_replaces_the_error_of_the_run(hooks):
    hooks.register(plugin_of(nnsight_run_ended=lambda: 1 / 0), "bad")
    mine = KeyError("the user's")
    hooks.run_ended(RUN, mine)
    assert mine.__notes__ == ["plugin 'bad' failed in nnsight_run_ended: ZeroDivisionError: division by zero"]
    with pytest.raises(PluginError, match="plugin 'bad' failed in nnsight_run_ended"):
        hooks.run_ended(RUN, None)


def test_keyboard_interrupt_in_a_hook_is_not_caught(hooks):
    def interrupt():
        raise KeyboardInterrupt

    hooks.register(plugin_of(nnsight_wrapped=interrupt), "one")
    with pytest.raises(KeyboardInterrupt):
        hooks.wrapped(ENVOY)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(None, "returned None, which is not a list"), ([3], "returned 3, which is not a type")],
)
def test_saveable_types_must_be_types(hooks, answer, message):
    hooks.register(plugin_of(nnsight_saveable_types=lambda: answer), "bad")
    with pytest.raises(PluginError, match=f"plugin 'bad' {message}"):
        hooks.saveable_types()


def test_failing_doctor_hook_is_a_line_of_doctor(hooks):
    hooks.register(plugin_of(nnsight_doctor=lambda: 1 / 0), "bad")
    hooks.register(plugin_of(nnsight_doctor=lambda: [("disk", True, "fine")]), "good")
    assert hooks.doctor() == [
        ("disk", True, "fine"),
        ("bad", False, "plugin 'bad' failed in nnsight_doctor: ZeroDivisionError: division by zero"),
    ]


# --- Plugins that are installed


GOOD = "def nnsight_wrapped(envoy): print('good saw', envoy)"


def test_broken_plugin_is_reported_once_at_the_users_line_and_the_rest_loads(site):
    site.add("alpha", {"nnsight": {"bad": "alpha_hooks"}}, {"alpha_hooks": "import not_there_at_all"})
    site.add("beta", {"nnsight": {"good": "beta_hooks"}}, {"beta_hooks": GOOD})
    site.add("gamma", {"nnsight": {"typo": "gamma_hooks"}}, {"gamma_hooks": "def nnsight_wraped(envoy): pass"})
    site.add("delta", {"nnsight": {"future": "delta_hooks"}}, {"delta_hooks": "nnsight_hookspec_version = 99"})
    out = site.run(
        """
        import warnings
        from nnsight.plugins import hooks
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            hooks.wrapped("first")
            hooks.wrapped("second")
        for warning in seen:
            print(warning.category.__name__, warning.filename, warning.message)
        """
    )
    lines = out.splitlines()
    assert lines[:2] == ["good saw first", "good saw second"]
    assert len(lines) == 5
    assert all(line.startswith("PluginWarning <string> plugin ") for line in lines[2:])
    assert "plugin 'bad' (alpha 1.0" in lines[2]
    assert "No module named 'not_there_at_all'" in lines[2]
    assert any("'nnsight_wraped', which is not a hook; did you mean nnsight_wrapped" in line for line in lines)
    assert any("written for version 99 of the hooks" in line for line in lines)


def test_two_distributions_with_one_plugin_name_are_both_left_out(site):
    site.add("alpha", {"nnsight": {"same": "alpha_hooks"}}, {"alpha_hooks": GOOD})
    site.add("beta", {"nnsight": {"same": "beta_hooks"}}, {"beta_hooks": GOOD})
    done = site.python("-W", "always", "-c", "from nnsight.plugins import hooks; hooks.wrapped(1); print('went on')")
    assert done.stdout == "went on\n"
    assert "'same' in group nnsight is claimed by alpha 1.0 (alpha_hooks) and beta 1.0 (beta_hooks)" in done.stderr


def test_disabled_plugin_is_silently_left_out(site):
    site.add("alpha", {"nnsight": {"bad": "alpha_hooks"}}, {"alpha_hooks": "import not_there_at_all"})
    done = site.python(
        "-W", "error", "-c", "from nnsight.plugins import hooks; hooks.wrapped(1)", NNSIGHT_PLUGINS_DISABLE="bad"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_plugin_that_wraps_a_model_while_it_is_imported_does_not_recurse(site):
    source = (
        "from nnsight.plugins import hooks\nhooks.wrapped('inner')\ndef nnsight_wrapped(envoy): print('saw', envoy)"
    )
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": source})
    assert site.run("from nnsight.plugins import hooks; hooks.wrapped('outer')") == "saw outer"


def test_a_second_thread_that_loads_plugins_too_registers_none_that_is_half_imported(site):
    source = """
        import threading
        from nnsight.plugins import hooks
        def wrap():
            hooks.wrapped("by another thread")
        other = threading.Thread(target=wrap)
        other.start()
        other.join(0.3)  # it waits for this import
        hooks.wrapped("while it is imported")
        def nnsight_wrapped(envoy):
            print("saw", envoy)
        """
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": source})
    out = site.run(
        """
        import threading
        from nnsight.plugins import hooks
        hooks.wrapped("first")
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()
        """
    )
    assert sorted(out.splitlines()) == ["saw by another thread", "saw first"]


def test_plugins_are_loaded_once_by_many_threads(site):
    source = "import time\ntime.sleep(0.05)\nprint('imported')\ndef nnsight_wrapped(envoy): print('saw')"
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": source})
    out = site.run(
        """
        import threading
        from nnsight.plugins import hooks
        threads = [threading.Thread(target=hooks.wrapped, args=(i,)) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        """
    )
    assert sorted(out.split()) == ["imported"] + ["saw"] * 8
