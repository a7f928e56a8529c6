"""CONFIG: where each value comes from, what is written, and that the key is never shown."""

from __future__ import annotations

import os
import pickle
import stat
import sys
from pathlib import Path

import pytest

from nnsight.config import Config
from nnsight.errors import ConfigError, ConfigWarning

KEY = "secret-key-0123456789"


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """The user's file, in an environment that sets nothing."""
    for variable in [name for name in os.environ if name.startswith(("NNSIGHT_", "NDIF_"))]:
        monkeypatch.delenv(variable)
    path = tmp_path / "folder" / "config.toml"
    path.parent.mkdir()
    monkeypatch.setenv("NNSIGHT_CONFIG", str(path))
    return path


@pytest.fixture
def config():
    return Config()


# --- Precedence


def test_defaults(config):
    assert config.API.HOST.startswith("https://")
    assert (config.API.APIKEY, config.API.COMPRESS) == (None, True)
    assert (config.APP.DEBUG, config.APP.REMOTE_LOGGING, config.APP.PYMOUNT, config.APP.CROSS_INVOKER) == (
        False,
        True,
        True,
        True,
    )
    assert config.APP.CACHE_DIR.name == "nnsight"


def test_the_file_wins_over_defaults(config, file):
    file.write_text('[APP]\nDEBUG = true\nCACHE_DIR = "~/elsewhere"\n\n[api]\nhost = "http://localhost:1"\n')
    assert config.APP.DEBUG is True
    assert config.APP.CACHE_DIR == Path.home() / "elsewhere"
    assert config.API.HOST == "http://localhost:1"
    assert config.API.COMPRESS is True


@pytest.mark.parametrize(
    ("variable", "text", "section", "field", "value"),
    [
        ("NDIF_API_KEY", KEY, "API", "APIKEY", KEY),
        ("NDIF_HOST", "http://localhost:2", "API", "HOST", "http://localhost:2"),
        ("NNSIGHT_DEBUG", "1", "APP", "DEBUG", True),
        ("NNSIGHT_APP_DEBUG", "yes", "APP", "DEBUG", True),
        ("NNSIGHT_APP_PYMOUNT", "0", "APP", "PYMOUNT", False),
        ("NNSIGHT_APP_CROSS_INVOKER", "false", "APP", "CROSS_INVOKER", False),
        ("NNSIGHT_APP_REMOTE_LOGGING", "off", "APP", "REMOTE_LOGGING", False),
        ("NNSIGHT_APP_CACHE_DIR", "~/there", "APP", "CACHE_DIR", Path.home() / "there"),
        ("NNSIGHT_API_COMPRESS", "no", "API", "COMPRESS", False),
    ],
)
def test_the_environment_wins_over_the_file(config, file, monkeypatch, variable, text, section, field, value):
    file.write_text('[APP]\nDEBUG = false\nPYMOUNT = true\n[API]\nHOST = "http://file"\nAPIKEY = "from-file"\n')
    monkeypatch.setenv(variable, text)
    assert getattr(getattr(config, section), field) == value


def test_the_long_variable_wins_over_the_short_one_and_an_empty_one_is_unset(config, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "short")
    monkeypatch.setenv("NNSIGHT_API_APIKEY", "long")
    monkeypatch.setenv("NNSIGHT_DEBUG", "")
    assert config.API.APIKEY == "long"
    assert config.APP.DEBUG is False


def test_an_assignment_wins_over_all_and_reload_forgets_it(config, file, monkeypatch):
    file.write_text("[APP]\nPYMOUNT = true\n")
    monkeypatch.setenv("NNSIGHT_APP_PYMOUNT", "1")
    app = config.APP
    app.PYMOUNT = "off"
    assert config.APP.PYMOUNT is False
    file.write_text("[APP]\nDEBUG = true\n")
    config.reload()
    assert config.APP is app
    assert (app.PYMOUNT, app.DEBUG) == (True, True)


def test_the_default_file_is_in_the_users_config_folder(site):
    out = site.run("from nnsight import CONFIG; print(CONFIG.path); CONFIG.APP.DEBUG = True; CONFIG.save()")
    expected = site.home / "config" / "nnsight" / "config.toml"
    assert out == str(expected)
    assert expected.read_text() == "[APP]\nDEBUG = true\n\n"
    assert site.run("from nnsight import CONFIG; print(CONFIG.APP.DEBUG)") == "True"


def test_nothing_is_read_before_the_first_use(file):
    file.write_text("not toml at all")
    config = Config()
    with pytest.raises(ConfigError):
        _ = config.APP
    file.write_text("[APP]\nDEBUG = true\n")
    assert config.APP.DEBUG is True  # repaired meanwhile: the next use reads again


# --- Saving


def test_save_writes_what_was_assigned_and_keeps_the_rest(config, file, monkeypatch):
    file.write_text('[API]\nHOST = "http://file"\n\n[FUTURE]\nthing = [1, "two", {a = 1.5}]\n')
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("NNSIGHT_DEBUG", "1")
    with pytest.warns(ConfigWarning, match=r"there is no section \[FUTURE\]"):
        config.APP.CROSS_INVOKER = False
    assert config.save() == file
    assert file.read_text() == (
        '[API]\nHOST = "http://file"\n\n[FUTURE]\nTHING = [1, "two", {"a" = 1.5}]\n\n[APP]\nCROSS_INVOKER = false\n\n'
    )


def test_key_is_saved_alone_for_its_owner_only(config, file):
    config.APP.DEBUG = True
    config.set_default_api_key(f"  {KEY} ")
    assert config.API.APIKEY == KEY
    assert file.read_text() == f'[API]\nAPIKEY = "{KEY}"\n\n'
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Config().API.APIKEY == KEY
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_saving_closes_a_file_that_was_open_to_others(config, file):
    file.write_text("[APP]\nDEBUG = true\n")
    file.chmod(0o644)
    config.API.APIKEY = KEY
    config.save()
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_value_set_to_none_leaves_the_file(config, file):
    file.write_text(f'[API]\nAPIKEY = "{KEY}"\n')
    config.API.APIKEY = None
    config.save()
    assert file.read_text() == ""
    assert Config().API.APIKEY is None


@pytest.mark.parametrize(
    "text", ['a "quoted" one', "back\\slash", "line\nbreak\ttab", "ünï 中 🙂", "\x00\x1f\x7f", "#[x]"]
)
def test_any_text_survives_the_file(config, text):
    config.API.HOST = f"<{text}>"
    config.save()
    assert Config().API.HOST == f"<{text}>"


def test_a_link_to_the_file_stays_a_link(config, file, monkeypatch, tmp_path):
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    monkeypatch.setenv("NNSIGHT_CONFIG", str(link))
    config.set_default_api_key(KEY)
    assert link.is_symlink()
    assert KEY in file.read_text()


def test_a_folder_that_cannot_be_written_is_an_error(config, file, monkeypatch):
    file.write_text("")
    monkeypatch.setenv("NNSIGHT_CONFIG", str(file / "below-a-file" / "config.toml"))
    with pytest.raises(ConfigError, match="cannot be (read|written)"):
        config.set_default_api_key(KEY)


# --- Bad values


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[APP]\nDEBUG = tru\n", 2, "not valid TOML"),
        ("[APP]\nDEBUG = true\n[APP\n", 3, "not valid TOML"),
        ('[API]\nHOST = "unterminated', 2, "not valid TOML"),
        ("\n\nDEBUG = true\n", 3, "DEBUG stands outside of a section"),
        ('# a comment\n[API]\n\n[APP]\nPYMOUNT = true\nDEBUG = "perhaps"\n', 6, r"DEBUG in \[APP\] cannot be used"),
        ("[API]\nHOST = 3\n[APP]\nHOST = 3\n", 2, r"HOST in \[API\] cannot be used"),
    ],
)
def test_a_broken_file_is_an_error_that_names_file_line_and_remedy(config, file, text, line, message):
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"config.toml, line {line}: .*{message}.*(repair|put it under|correct or)"):
        _ = config.APP


def test_a_file_that_is_no_text_is_an_error(config, file):
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read .* repair or remove it"):
        _ = config.APP


def test_a_folder_in_place_of_the_file_is_an_error(config, file, monkeypatch):
    monkeypatch.setenv("NNSIGHT_CONFIG", str(file.parent))
    with pytest.raises(ConfigError, match="cannot be read"):
        _ = config.API


def test_a_bad_variable_is_an_error_that_names_it(config, monkeypatch):
    monkeypatch.setenv("NNSIGHT_DEBUG", "perhaps")
    with pytest.raises(ConfigError, match="the environment variable NNSIGHT_DEBUG cannot be used: .*boolean"):
        _ = config.APP


def test_unknown_settings_warn_and_name_the_nearest(config, file, monkeypatch):
    file.write_text("[APP]\nDEBUGG = true\n")
    with pytest.warns(ConfigWarning, match=r"line 2: DEBUGG in \[APP\] is not a setting; did you mean DEBUG\?"):
        _ = config.APP
    file.write_text("")
    monkeypatch.setenv("NNSIGHT_APP_PYMONT", "1")
    with pytest.warns(ConfigWarning, match="NNSIGHT_APP_PYMONT is not a setting; did you mean PYMOUNT"):
        config.reload()


def test_bad_assignments_are_errors_and_change_nothing(config):
    with pytest.raises(ConfigError, match=r"CONFIG\.APP\.DEBUG cannot be set: .*boolean"):
        config.APP.DEBUG = "perhaps"
    with pytest.raises(ConfigError, match=r"CONFIG\.APP has no setting 'PYMONT'; did you mean PYMOUNT"):
        config.APP.PYMONT = False
    with pytest.raises(ConfigError, match=r"CONFIG\.APP cannot be replaced"):
        config.APP = None
    with pytest.raises(AttributeError, match="no section 'APQ'; it has API and APP"):
        _ = config.APQ
    with pytest.raises(ConfigError, match="the API key is empty"):
        config.set_default_api_key("  ")
    assert config.APP.DEBUG is False


def test_a_failed_reload_keeps_the_settings(config, file):
    config.APP.DEBUG = True
    file.write_text("[APP\n")
    with pytest.raises(ConfigError):
        config.reload()
    assert config.APP.DEBUG is True


# --- The key stays secret


def test_the_key_is_in_no_repr(config):
    config.API.APIKEY = KEY
    assert KEY not in f"{config!r} {config} {config.API!r} {config.API}"


@pytest.mark.parametrize(
    "text", [f'[API]\nAPIKEY = "{KEY}', f"[API]\nAPIKEY = {KEY}\n", f'[API]\nAPIKEY = ["{KEY}"]\n']
)
def test_the_key_is_in_no_error_about_the_file(config, file, text):
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        _ = config.API
    assert KEY not in _everything_said(caught.value)


def test_the_key_is_in_no_error_about_an_assignment(config):
    with pytest.raises(ConfigError) as caught:
        config.API.APIKEY = [KEY]
    assert KEY not in _everything_said(caught.value)


def _everything_said(error):
    said = []
    while error is not None:
        said.append(f"{error} {error.args}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return " ".join(said)


def test_errors_can_be_pickled(config):
    with pytest.raises(ConfigError) as caught:
        config.APP.DEBUG = "perhaps"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_pydantic_is_imported_at_the_first_use(site):
    out = site.run(
        "import sys, nnsight; print('pydantic' in sys.modules); nnsight.CONFIG; print('pydantic' in sys.modules)"
    )
    assert out.split() == ["False", "True"]
