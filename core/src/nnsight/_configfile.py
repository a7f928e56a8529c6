"""Where settings come from and go to: the user's file, as TOML, and the environment. Knows no setting by name."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnsight.errors import ConfigError

Values = dict[str, dict[str, Any]]  # section -> field -> value


def config_path() -> Path:
    """Return the user's configuration file: `$NNSIGHT_CONFIG`, or `nnsight/config.toml` in the config folder."""
    named = os.environ.get("NNSIGHT_CONFIG")
    return Path(named).expanduser() if named else _folder("XDG_CONFIG_HOME", "APPDATA", ".config") / "config.toml"


def default_cache_dir() -> Path:
    """Return the `nnsight` folder in the user's cache folder."""
    return _folder("XDG_CACHE_HOME", "LOCALAPPDATA", ".cache")


def _folder(variable: str, on_windows: str, under_home: str) -> Path:
    named = os.environ.get(on_windows if sys.platform == "win32" else variable)
    return (Path(named) if named else Path.home() / under_home) / "nnsight"


def read(path: Path) -> tuple[Values, str]:
    """Read a file.

    Returns:
        Its tables with their names in capitals (a file that is not there has none), and its text.

    Raises:
        ConfigError: it cannot be read, or is not TOML, or has values outside of a table.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}, ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read ({error}); repair or remove it") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The cause is left out: its text may quote the line, and the line may be the key.
        reason = re.sub(r"\s*\(at .*", "", str(error))
        raise ConfigError(
            f"{path}, line {_line_of_error(str(error), text)}: not valid TOML ({reason}); repair the line or remove "
            'the file. A section looks like: [APP], a setting like: DEBUG = true, text like: HOST = "..."'
        ) from None
    values: Values = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            line = line_of(text, None, section)
            raise ConfigError(
                f"{path}, line {line}: {section} stands outside of a section; put it under [API] or [APP]"
            )
        values.setdefault(section.upper(), {}).update({field.upper(): value for field, value in table.items()})
    return values, text


def write(path: Path, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace a file as one step; only its owner may read it, for it may hold a key.

    Raises:
        ConfigError: the folder or the file cannot be written.
    """
    text = "".join(_table(section, fields) for section, fields in values.items() if fields)
    target = path.resolve()  # a link stays a link
    scratch = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigError(
            f"the configuration file {path} cannot be written ({error}); choose another with NNSIGHT_CONFIG"
        ) from error


def line_of(text: str, section: str | None, field: str) -> int:
    """Return the line (from 1) that sets a field, or 1 if it is written in a way this does not see."""
    current: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([^\]]+?)\s*\]", line)
        if header:
            current = header[1].strip("\"'").upper()
        elif current == section and re.match(rf"\s*[\"']?{re.escape(field)}[\"']?\s*=", line, re.IGNORECASE):
            return number
    return 1


def _line_of_error(message: str, text: str) -> int:
    found = re.search(r"line (\d+)", message)
    return int(found[1]) if found else max(1, len(text.splitlines()))


def _table(section: str, fields: Mapping[str, Any]) -> str:
    return (
        f"[{_key(section)}]\n" + "".join(f"{_key(key)} = {_literal(value)}\n" for key, value in fields.items()) + "\n"
    )


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _literal(name)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(str(key))} = {_literal(item)}' for key, item in value.items())}}}"
    return '"' + "".join(_escaped(character) for character in str(value)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return f"\\u{ord(character):04x}" if ord(character) < 0x20 or ord(character) == 0x7F else character
