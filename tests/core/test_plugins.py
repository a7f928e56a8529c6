"""Names from entry points: found lazily, loaded once, and every way they can be wrong says so where it matters."""

from __future__ import annotations

import pytest

from nnsight import plugins
from nnsight.errors import MissingPluginError, PluginError, UnknownPluginError

CLASS = "print('imported', __name__)\nclass Thing: pass\n"


# --- Finding and loading


def test_an_export_is_imported_at_its_first_use_only(site):
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    out = site.run(
        """
        import nnsight
        dir(nnsight)
        print("before")
        from nnsight import Thing
        print(Thing.__name__, nnsight.Thing is Thing)
        """
    )
    assert out.splitlines() == ["before", "imported alpha_module", "Thing True"]


def test_names_and_lookup_of_every_group(site):
    groups = ["nnsight", "nnsight.exports", "nnsight.modeling", "nnsight.envoy", "nnsight.tracer"]
    values = {"nnsight.envoy": "alpha_module:double", "nnsight.tracer": "alpha_module:double"}
    points = {group: {f"name{i}": values.get(group, "alpha_module")} for i, group in enumerate(groups)}
    site.add("alpha", points, {"alpha_module": "def double(of): return 2 * of"})
    out = site.run(
        f"""
        from nnsight import plugins
        for i, group in enumerate({groups}):
            assert f"name{{i}}" in plugins.names(group), group
            found = plugins.resolve(group, f"name{{i}}")
            assert getattr(found, "double", found)(2) == 4
            assert plugins.lookup(group, f"name{{i}}") is plugins.resolve(group, f"name{{i}}")
            assert plugins.serves(group, f"name{{i}}")
        print("done")
        """
    )
    assert out == "done"


def test_unknown_name_raises_and_lookup_gives_none():
    assert plugins.lookup("nnsight.envoy", "no_such_name") is None
    assert not plugins.serves("nnsight.envoy", "no_such_name")
    with pytest.raises(
        UnknownPluginError, match=r"no plugin provides 'sorce' \(nnsight.envoy\); did you mean source\?"
    ):
        plugins.resolve("nnsight.envoy", "sorce")
    with pytest.raises(ValueError, match="'nnsight.envoys' is not an entry-point group"):
        plugins.resolve("nnsight.envoys", "source")


def test_scan_happens_once_and_refresh_repeats_it(site):
    site.add("beta", {"nnsight.exports": {"Late": "late_module:Thing"}}, {"late_module": CLASS})
    out = site.run(
        """
        import importlib.metadata
        from nnsight import plugins
        scans = []
        real = importlib.metadata.distributions
        importlib.metadata.distributions = lambda: scans.append(1) or real()
        plugins.names("nnsight.exports"), plugins.names("nnsight"), plugins.lookup("nnsight.tracer", "x")
        print(len(scans))
        plugins.refresh()
        plugins.names("nnsight")
        print(len(scans))
        """
    )
    assert out.splitlines() == ["1", "2"]


def test_refresh_forgets_what_distributions_gave_and_keeps_what_was_registered_by_hand(site):
    entry_points = {
        "nnsight": {"alpha": "alpha_hooks"},
        "nnsight.exports": {"Thing": "alpha_module:Thing"},
        "nnsight.modeling": {"engine": "alpha_module"},
    }
    hook = "def nnsight_wrapped(envoy): print('alpha saw', envoy)"
    info = site.add("alpha", entry_points, {"alpha_module": CLASS, "alpha_hooks": hook})
    out = site.run(
        f"""
        import os, sys, types
        import nnsight, nnsight.modeling
        from nnsight import plugins
        plugins.register(types.SimpleNamespace(nnsight_wrapped=lambda envoy: print("mine saw", envoy)), "mine")
        plugins.hooks.wrapped(1)
        first = nnsight.Thing
        assert nnsight.modeling.engine.Thing is first
        plugins.refresh()
        assert nnsight.Thing is first and nnsight.modeling.engine.Thing is first
        plugins.hooks.wrapped(2)
        os.rename({str(info)!r}, {str(info.parent / "gone")!r})
        plugins.refresh()
        plugins.hooks.wrapped(3)
        print(hasattr(nnsight, "Thing"), hasattr(nnsight.modeling, "engine"), "nnsight.modeling.engine" in sys.modules)
        os.rename({str(info.parent / "gone")!r}, {str(info)!r})
        plugins.refresh()
        plugins.hooks.wrapped(4)
        assert nnsight.Thing is first
        """
    )
    assert out.splitlines() == [
        "alpha saw 1", "mine saw 1", "imported alpha_module", "alpha saw 2", "mine saw 2", "mine saw 3",
        "False False False", "alpha saw 4", "mine saw 4",
    ]  # fmt: skip


def test_eight_threads_get_one_object(site):
    source = "import time\ntime.sleep(0.05)\nclass Thing: pass\n"
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": source})
    out = site.run(
        """
        from concurrent.futures import ThreadPoolExecutor
        from nnsight import plugins
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _: plugins.resolve("nnsight.exports", "Thing"), range(8)))
        print(len(found))
        """
    )
    assert out == "1"


def test_plugins_that_import_each_others_names_from_two_threads_do_not_deadlock(site):
    for mine, other in (("Left", "Right"), ("Right", "Left")):
        source = f"""
            import time
            time.sleep(0.05)
            class {mine}:
                def friend(self):
                    from nnsight import {other}
                    return {other}
            """
        site.add(mine.lower(), {"nnsight.exports": {mine: f"module_{mine}:{mine}"}}, {f"module_{mine}": source})
    out = site.run(
        """
        import threading, nnsight
        threads = [threading.Thread(target=lambda n=n: getattr(nnsight, n)().friend()) for n in ("Left", "Right")]
        [t.start() for t in threads]
        [t.join(10) for t in threads]
        print([t.is_alive() for t in threads])
        """
    )
    assert out == "[False, False]"


def test_a_second_copy_later_on_the_path_is_not_a_conflict(site, tmp_path):
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    older = tmp_path / "older" / "alpha-0.5.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: alpha\nVersion: 0.5\n")
    (older / "entry_points.txt").write_text("[nnsight.exports]\nThing = old_module:Thing\nGone = old_module:Gone\n")
    out = site.run(
        f"""
        import sys; sys.path.append({str(tmp_path / "older")!r})
        from nnsight import plugins
        print(plugins.names("nnsight.exports"), plugins.registry.entry("nnsight.exports", "Thing").origin)
        """
    )
    assert out == "('Thing',) alpha 1.0"


def test_a_second_copy_that_serves_the_same_is_not_a_conflict_either(site, tmp_path):
    info = site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    older = tmp_path / "older" / "alpha-0.5.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: Alpha\nVersion: 0.5\n")
    (older / "entry_points.txt").write_text((info / "entry_points.txt").read_text())
    out = site.run(
        f"""
        import sys; sys.path.append({str(tmp_path / "older")!r})
        from nnsight import plugins
        print(plugins.registry.entry("nnsight.exports", "Thing").origin)
        """
    )
    assert out == "alpha 1.0"


def test_distributions_with_unreadable_metadata_do_not_stop_the_scan(site):
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    torn = site.add("torn", {})
    (torn / "entry_points.txt").write_text("[console_scripts]\nnot a pair\n")
    ours = site.add("ours", {})
    (ours / "entry_points.txt").write_text("[nnsight.exports]\nnot a pair\n")
    (site.add("binary", {}) / "entry_points.txt").write_bytes(b"\xff\xfe nnsight")
    out = site.run(
        """
        from nnsight import plugins
        print(plugins.names("nnsight.exports"), len(plugins.registry.catalog.problems))
        print(plugins.registry.catalog.problems[0])
        """
    )
    assert out.splitlines()[0] == "('Thing',) 1"
    assert "not a pair" in out.splitlines()[1]


# --- What is missing, contested or broken


@pytest.mark.parametrize(
    ("name", "extra"),
    [("LanguageModel", "hf"), ("VisionLanguageModel", "hf"), ("DiffusionModel", "diffusers"), ("VLLM", "vllm")],
)
def test_known_export_that_is_not_installed_says_how_to_install_it(site, name, extra):
    error = site.fail(f"from nnsight import {name}").splitlines()[-1]
    assert error == (
        f"nnsight.errors.MissingPluginError: '{name}' is provided by nnsight-{extra}, which is not installed: "
        f'pip install "nnsight-core[{extra}]"'
    )


@pytest.mark.parametrize(("name", "extra"), [("language", "hf"), ("vllm", "vllm"), ("diffusion", "diffusers")])
def test_known_modeling_name_that_is_not_installed_says_how_to_install_it(site, name, extra):
    error = site.fail(f"import nnsight.modeling.{name}").splitlines()[-1]
    assert error.endswith(f'which is not installed: pip install "nnsight-core[{extra}]"')


def test_installed_distribution_without_a_known_name_asks_for_an_upgrade(site):
    site.add(
        "nnsight-hf", {"nnsight.exports": {"LanguageModel": "hf_module:Thing"}}, {"hf_module": CLASS}, version="0.0.1"
    )
    error = site.fail("from nnsight import VisionLanguageModel")
    assert "nnsight-hf 0.0.1 is installed but does not provide 'VisionLanguageModel'" in error
    assert 'pip install --upgrade "nnsight-core[hf]"' in error


def test_missing_plugin_is_an_import_error_that_carries_the_name():
    error = MissingPluginError("text", name="VLLM")
    assert isinstance(error, ImportError)
    assert error.name == "VLLM"


CONFLICT = (
    "PluginConflictError: 'Thing' in group nnsight.exports is claimed by alpha 1.0 (alpha_module:Thing) and "
    "beta 2.0 (beta_module:Thing). Uninstall one of them, or choose by setting NNSIGHT_PLUGINS_DISABLE=alpha or "
    "NNSIGHT_PLUGINS_DISABLE=beta."
)


def _two_claims(site):
    site.add(
        "alpha",
        {"nnsight.exports": {"Thing": "alpha_module:Thing", "Alpha": "alpha_module:Thing"}},
        {"alpha_module": CLASS},
    )
    site.add("beta", {"nnsight.exports": {"Thing": "beta_module:Thing"}}, {"beta_module": CLASS}, version="2.0")


def test_a_name_claimed_twice_is_an_error_that_lists_both_where_it_is_used(site):
    _two_claims(site)
    assert site.fail("from nnsight import Thing").endswith(CONFLICT)
    assert site.run("from nnsight import Alpha; import nnsight; 'Thing' in dir(nnsight)") == "imported alpha_module"


def test_a_conflict_ends_when_one_side_is_disabled(site):
    _two_claims(site)
    out = site.run("from nnsight import Thing; print(Thing.__module__)", NNSIGHT_PLUGINS_DISABLE="Alpha")
    assert out.splitlines()[-1] == "beta_module"


def test_the_cores_own_names_cannot_be_taken(site):
    site.add("alpha", {"nnsight.exports": {"NNsightError": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    assert site.run("from nnsight import NNsightError; print(NNsightError.__module__)") == "nnsight.errors"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import module_that_is_not_there", "ModuleNotFoundError: No module named 'module_that_is_not_there'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('needs a GPU')", "SystemExit: needs a GPU"),
        ("def broken(:", "SyntaxError: "),
        ("x = 1", "AttributeError: module 'alpha_module' has no attribute 'Thing'"),
    ],
)
def test_a_broken_plugin_raises_only_where_it_is_needed_and_names_itself(site, source, reason):
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": source})
    site.add("beta", {"nnsight.exports": {"Fine": "beta_module:Thing"}}, {"beta_module": CLASS})
    assert site.run("from nnsight import Fine; print(Fine.__module__)").splitlines()[-1] == "beta_module"
    error = site.fail("from nnsight import Thing")
    assert "PluginError: plugin 'Thing' (alpha 1.0, entry point `Thing = alpha_module:Thing` in group nnsigh" in error
    assert f"could not be loaded: {reason}" in error
    assert "The above exception was the direct cause of the following exception" in error
    assert "NNSIGHT_PLUGINS_DISABLE=alpha" in error


# --- The switches


@pytest.mark.parametrize("word", ["alpha-plugin", "Alpha_Plugin", "other, alpha.plugin", "*", "Thing", "hookname"])
def test_disable_by_distribution_plugin_or_entry_name(site, word):
    site.add(
        "alpha.plugin",
        {"nnsight": {"hookname": "alpha_hooks"}, "nnsight.exports": {"Thing": "alpha_module:Thing"}},
        {"alpha_module": CLASS, "alpha_hooks": ""},
    )
    error = site.fail("from nnsight import Thing", NNSIGHT_PLUGINS_DISABLE=word)
    assert "PluginDisabledError: plugin 'Thing' (alpha-plugin 1.0" in error
    assert f"is switched off by NNSIGHT_PLUGINS_DISABLE={word!r}" in error


def test_the_short_name_of_our_own_distributions_disables_them(site):
    site.add("nnsight-hf", {"nnsight.exports": {"LanguageModel": "hf_module:Thing"}}, {"hf_module": CLASS})
    error = site.fail("from nnsight import LanguageModel", NNSIGHT_PLUGINS_DISABLE="hf")
    assert "remove it from NNSIGHT_PLUGINS_DISABLE" in error
    assert "ImportError" not in site.run("from nnsight import LanguageModel", NNSIGHT_PLUGINS_DISABLE="vllm, ,")


def test_allow_leaves_out_all_others_but_the_core(site):
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    site.add("beta", {"nnsight.exports": {"Fine": "beta_module:Thing"}}, {"beta_module": CLASS})
    program = "from nnsight import {}, NNsightError"
    site.run(program.format("Thing"), NNSIGHT_PLUGINS_ALLOW="alpha")
    error = site.fail(program.format("Fine"), NNSIGHT_PLUGINS_ALLOW="alpha")
    assert "is switched off by NNSIGHT_PLUGINS_ALLOW='alpha': to use it, add beta to it" in error
    site.run(program.format("Fine"), NNSIGHT_PLUGINS_ALLOW="")


def test_what_both_switches_name_is_disabled(site):
    site.add("alpha", {"nnsight.exports": {"Thing": "alpha_module:Thing"}}, {"alpha_module": CLASS})
    error = site.fail("from nnsight import Thing", NNSIGHT_PLUGINS_ALLOW="alpha", NNSIGHT_PLUGINS_DISABLE="alpha")
    assert "switched off by NNSIGHT_PLUGINS_DISABLE" in error


def test_builtins_of_the_core_are_disabled_by_name_only(site, libraries):
    program = """
        import sys; sys.path.remove({libraries!r}); sys.path.append({libraries!r})
        from nnsight import plugins
        print(plugins.names("nnsight.tracer"))
        """.format(libraries=str(libraries))
    # A core of its own, first on the path, so that the test does not depend on which builtins there are.
    site.add("nnsight-core", {"nnsight.tracer": {"first": "builtins", "second": "builtins"}})
    assert site.run(program) == "('first', 'second')"
    assert site.run(program, NNSIGHT_PLUGINS_DISABLE="*") == "('first', 'second')"
    assert site.run(program, NNSIGHT_PLUGINS_ALLOW="alpha") == "('first', 'second')"
    assert site.run(program, NNSIGHT_PLUGINS_DISABLE="first") == "('second',)"
    assert site.run(program, NNSIGHT_PLUGINS_DISABLE="nnsight-core") == "()"


# --- nnsight.modeling


def test_modeling_alias_is_the_plugins_own_module(site):
    site.add(
        "alpha",
        {"nnsight.modeling": {"engine": "alpha_package"}},
        {
            "alpha_package.__init__": CLASS,
            "alpha_package.parts": CLASS,
            "alpha_package.deep.__init__": "",
            "alpha_package.deep.down": CLASS,
        },
    )
    out = site.run(
        """
        import importlib, pickle, sys
        import nnsight.modeling.engine
        from nnsight.modeling.engine import Thing
        import alpha_package
        assert sys.modules["nnsight.modeling.engine"] is alpha_package is nnsight.modeling.engine
        assert alpha_package.__name__ == alpha_package.__spec__.name == "alpha_package"
        from nnsight.modeling.engine.parts import Thing as Part
        import nnsight.modeling.engine.deep.down
        import alpha_package.parts, alpha_package.deep.down
        assert sys.modules["nnsight.modeling.engine.deep.down"] is alpha_package.deep.down
        assert alpha_package.parts.Thing is Part
        assert pickle.loads(pickle.dumps(Thing)) is Thing
        assert importlib.reload(nnsight.modeling.engine) is alpha_package
        importlib.reload(nnsight.modeling)
        print(sum(type(f).__name__ == "AliasFinder" for f in sys.meta_path))
        """
    )
    assert out.splitlines() == [
        "imported alpha_package",
        "imported alpha_package.parts",
        "imported alpha_package.deep.down",
        "imported alpha_package",  # the reload, the only second load
        "1",
    ]


def test_modeling_name_is_reached_as_an_attribute(site):
    site.add("alpha", {"nnsight.modeling": {"engine": "alpha_module"}}, {"alpha_module": CLASS})
    assert "Thing" in site.run("import nnsight; print(nnsight.modeling.engine.Thing, dir(nnsight.modeling))")
    assert site.run("from nnsight.modeling import engine; print(engine.__name__)").endswith("alpha_module")


def test_modeling_unknown_name_names_the_nearest(site):
    site.add("alpha", {"nnsight.modeling": {"engine": "alpha_module"}}, {"alpha_module": CLASS})
    error = site.fail("import nnsight.modeling.engin")
    assert "ModuleNotFoundError: No module named 'nnsight.modeling.engin': " in error
    assert error.endswith("did you mean engine?")
    assert site.run("import nnsight; print(hasattr(nnsight.modeling, 'engin'))") == "False"


def test_modeling_entry_that_is_no_module_is_refused(site):
    site.add("alpha", {"nnsight.modeling": {"engine": "alpha_module:Thing"}}, {"alpha_module": "class Thing: pass"})
    error = site.fail("import nnsight.modeling.engine")
    assert "PluginError: plugin 'engine' (alpha 1.0, " in error
    assert "must be a module, not <class" in error


@pytest.mark.parametrize(("group", "of"), [("nnsight.envoy", "envoy"), ("nnsight.tracer", "tracer")])
def test_what_is_to_be_a_function_and_is_none_is_refused(site, group, of):
    site.add("alpha", {group: {"thing": "alpha_module"}}, {"alpha_module": CLASS})
    error = site.fail(
        """
        import torch
        from nnsight import NNsight
        model = NNsight(torch.nn.Linear(2, 2))
        with model.trace(torch.ones(1, 2)) as tracer:
            tracer.thing() if "GROUP".endswith("tracer") else model.thing
        """.replace("GROUP", group)
    )
    assert f"PluginError: plugin 'thing' (alpha 1.0, entry point `thing = alpha_module` in group {group})" in error
    assert f"must be a function of the {of}, not <module 'alpha_module'" in error


def test_any_callable_serves_as_the_method_of_a_tracer(site):
    source = """
        import functools
        class Kept:
            def __init__(self, tracer, name):
                self.value = getattr(tracer, name)
        def both(first, tracer):
            return first, tracer.result
        partly = functools.partial(both, "given")
        """
    points = {"nnsight.tracer": {"kept": "alpha_module:Kept", "partly": "alpha_module:partly"}}
    site.add("alpha", points, {"alpha_module": source})
    out = site.run(
        """
        import torch
        from nnsight import NNsight
        with NNsight(torch.nn.Linear(2, 2)).trace(torch.ones(1, 2)) as tracer:
            first, result = tracer.partly()
            kept = tracer.kept("result")
        print(first, kept.value is result)
        """
    )
    assert out == "given True"


def test_an_error_in_the_function_of_an_envoy_is_that_error(site):
    site.add(
        "alpha",
        {"nnsight.envoy": {"thing": "alpha_module:thing"}},
        {"alpha_module": "def thing(envoy): return envoy.path.no_such_method()"},
    )
    error = site.fail(
        """
        import torch
        from nnsight import NNsight
        NNsight(torch.nn.Linear(2, 2)).thing
        """
    )
    assert error.endswith("AttributeError: 'str' object has no attribute 'no_such_method'")


def test_modeling_import_error_inside_a_plugin_is_not_taken_for_a_missing_name(site):
    site.add("alpha", {"nnsight.modeling": {"engine": "alpha_module"}}, {"alpha_module": "import not_there_at_all"})
    error = site.fail("import nnsight.modeling.engine")
    assert "PluginError: plugin 'engine' (alpha 1.0" in error
    assert "No module named 'not_there_at_all'" in error


@pytest.mark.parametrize("method", ["trace", "session"])
def test_remote_run_without_its_plugin_says_how_to_install_it(site, method):
    error = site.fail(
        f"""
        import torch
        from nnsight import NNsight
        with NNsight(torch.nn.Linear(2, 2)).{method}(remote=True):
            pass
        """
    ).splitlines()[-1]
    assert error == (
        "nnsight.errors.MissingPluginError: 'open_remote' is provided by nnsight-ndif, which is not installed: "
        'pip install "nnsight-core[ndif]"'
    )


def test_plugin_errors_share_a_base():
    assert issubclass(PluginError, RuntimeError)
