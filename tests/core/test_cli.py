"""`python -m nnsight`: what it lists, what it finds broken, and its exit codes."""

from __future__ import annotations

import pytest

import nnsight

HOOKS = """
    def _hello(arguments):
        \"\"\"Say hello.

        More about it.
        \"\"\"
        print("hello", *arguments)
        return len(arguments)

    def nnsight_commands():
        return {"hello": _hello}

    def nnsight_doctor():
        return [("alpha", None, "a remark"), ("alpha", True, "is well")]
    """


def plain(site, *arguments, code=0, **variables):
    done = site.nnsight(*arguments, **variables)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("name", ["version", "--version", "-V"])
def test_version(site, name):
    assert plain(site, name).stdout.strip() == nnsight.__version__


@pytest.mark.parametrize("arguments", [[], ["help"], ["-h"], ["--help"]])
def test_help_lists_the_commands_of_the_core_and_of_plugins(site, arguments):
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": HOOKS})
    out = plain(site, *arguments).stdout
    for name in ("plugins", "doctor", "version", "help"):
        assert f"\n  {name} " in out
    assert "\n  hello        Say hello.\n" in out


def test_help_needs_neither_torch_nor_pydantic(site):
    program = (
        "import sys; from nnsight.__main__ import main; main(['help']); print({'torch', 'pydantic'} & set(sys.modules))"
    )
    assert site.run(program, NNSIGHT_PLUGINS_DISABLE="nnsight-core").endswith("set()")


def test_plugin_command_gets_its_arguments_and_gives_the_exit_code(site):
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": HOOKS})
    assert plain(site, "hello", "a", "b", "--c", code=3).stdout.strip() == "hello a b --c"


def test_unknown_command_names_the_nearest(site):
    done = plain(site, "plugin", code=2)
    assert done.stderr.splitlines()[0] == "nnsight: there is no command 'plugin'; did you mean plugins?"
    assert plain(site, "doctor", "now", code=2).stderr == "nnsight: `doctor` takes no arguments, but was given: now\n"


def test_known_command_without_its_plugin_says_how_to_install_it(site):
    assert 'pip install "nnsight-core[hf]"' in plain(site, "demo", code=1).stderr
    site.add("nnsight-hf", {"nnsight": {"hf": "hf_hooks"}}, {"hf_hooks": "import not_there_at_all"})
    assert "plugin 'hf' (nnsight-hf 1.0" in plain(site, "demo", code=1).stderr.splitlines()[-1]
    assert (
        "switched off by NNSIGHT_PLUGINS_DISABLE='hf'"
        in plain(site, "demo", code=1, NNSIGHT_PLUGINS_DISABLE="hf").stderr
    )


def test_command_claimed_by_two_plugins_is_an_error_when_used(site):
    for name in ("alpha", "beta"):
        site.add(name, {"nnsight": {name: f"{name}_hooks"}}, {f"{name}_hooks": HOOKS})
    assert "the command 'hello' is claimed by the plugins" in plain(site, "hello", code=1).stderr
    plain(site, "version")
    plain(site, "help")


def test_broken_plugin_does_not_stop_the_commands_of_others(site):
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": HOOKS})
    site.add("beta", {"nnsight": {"beta": "beta_hooks"}}, {"beta_hooks": "def nnsight_commands(): return {'x': 3}"})
    site.add("gamma", {"nnsight": {"gamma": "gamma_hooks"}}, {"gamma_hooks": "import not_there_at_all"})
    done = plain(site, "hello")
    assert done.stdout == "hello\n"
    assert "warning: plugin 'beta' gives 3 for 'x', which is not a function" in done.stderr
    assert "warning: plugin 'gamma' (gamma 1.0" in done.stderr


def test_plugins_shows_every_state(site):
    site.add(
        "good",
        {"nnsight": {"good": "good_hooks"}, "nnsight.envoy": {"probe": "good_hooks:_hello"}},
        {"good_hooks": HOOKS},
    )
    site.add("one", {"nnsight.exports": {"Same": "one_module:X", "NNsight": "one_module:X"}}, {"one_module": "X = 1"})
    site.add("two", {"nnsight.exports": {"Same": "two_module:X"}}, {"two_module": "X = 2"}, version="2.5")
    site.add(
        "bad",
        {"nnsight": {"bad": "bad_hooks"}, "nnsight.modeling": {"bad": "bad_module"}},
        {"bad_hooks": "def nnsight_wraped(): pass", "bad_module": "1/0"},
    )
    site.add("off", {"nnsight.tracer": {"off": "off_module"}})
    taken = {"nnsight.envoy": {"output": "good_hooks:_hello"}, "nnsight.tracer": {"stop": "good_hooks:_hello"}}
    site.add("taken", taken)
    site.add("odd", {"nnsight.envoy": {"odd": "good_hooks"}})
    out = plain(site, "plugins", NNSIGHT_PLUGINS_DISABLE="off").stdout
    rows = {tuple(line.split()[:2]): line for line in out.splitlines()}
    assert rows["nnsight", "good"].endswith("  ok [nnsight_commands, nnsight_doctor]")
    assert "  good 1.0  " in rows["nnsight", "good"]
    assert rows["nnsight.envoy", "probe"].endswith("ok")
    same = [line for line in out.splitlines() if line.split()[:2] == ["nnsight.exports", "Same"]]
    assert [line.partition("conflict with ")[2] for line in same] == ["two (two_module:X)", "one (one_module:X)"]
    assert "two 2.5" in same[1]
    assert "conflict with nnsight-core, whose own name comes first" in rows["nnsight.exports", "NNsight"]
    for row in (rows["nnsight.envoy", "output"], rows["nnsight.tracer", "stop"]):
        assert row.endswith("conflict with nnsight-core, whose own name comes first")
    assert "broken: PluginError: plugin 'odd' (odd 1.0, " in rows["nnsight.envoy", "odd"]
    assert "broken: PluginError: plugin 'bad' implements 'nnsight_wraped'" in rows["nnsight", "bad"]
    assert rows["nnsight.modeling", "bad"].endswith("broken: ZeroDivisionError: division by zero")
    assert rows["nnsight.tracer", "off"].endswith("disabled by NNSIGHT_PLUGINS_DISABLE")


def test_plugins_without_any_says_what_to_install(site):
    out = plain(site, "plugins", NNSIGHT_PLUGINS_DISABLE="nnsight-core").stdout
    assert "GROUP" in out.splitlines()[0]


def test_doctor_is_well_here(site):
    site.add("alpha", {"nnsight": {"alpha": "alpha_hooks"}}, {"alpha_hooks": HOOKS})
    out = plain(site, "doctor", NNSIGHT_PLUGINS_DISABLE="gone").stdout
    for what in ("python", "torch", "greenlet", "pluggy", "pydantic", "config"):
        assert f"ok    {what} " in out
    assert " guard " in out
    assert "note  alpha     a remark" in out
    assert "ok    alpha     is well" in out
    assert (
        "note  plugins   NNSIGHT_PLUGINS_DISABLE or NNSIGHT_PLUGINS_ALLOW says 'gone', which names no installed" in out
    )


def test_doctor_finds_what_is_broken(site):
    site.add("bad", {"nnsight.exports": {"Bad": "bad_module:X"}}, {"bad_module": "1/0"})
    site.module("greenlet", "raise OSError('wrong build')")
    config = site.home / "config.toml"
    config.write_text("[APP]\nDEBUG = maybe\n")
    out = plain(site, "doctor", code=1, NNSIGHT_CONFIG=str(config)).stdout
    assert "FAIL  greenlet  OSError: wrong build; reinstall it" in out
    assert f"FAIL  config    {config}, line 2: not valid TOML" in out
    assert "FAIL  plugins   'Bad' (bad 1.0" in out


def test_doctor_notes_a_key_that_others_may_read(site):
    config = site.home / "config.toml"
    config.write_text('[API]\nAPIKEY = "abcdef"\n')
    config.chmod(0o644)
    out = plain(site, "doctor", NNSIGHT_CONFIG=str(config)).stdout
    assert f"chmod 600 {config}" in out
    assert "abcdef" not in out
