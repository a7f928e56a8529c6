"""Settings: `CONFIG.API.HOST`, `CONFIG.APP.DEBUG` and so on.

A value comes from, last wins: the default; the user's file (`$NNSIGHT_CONFIG`, or `config.toml` in the `nnsight` folder
of the user's config folder); the environment (`NNSIGHT_<SECTION>_<FIELD>`, and the short `NDIF_API_KEY`, `NDIF_HOST`,
`NNSIGHT_DEBUG`); an assignment such as `CONFIG.APP.DEBUG = True`. The file is read at the first use of a section.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from nnsight import _configfile
from nnsight._registry import nearest
from nnsight._warning import warn_user
from nnsight.errors import ConfigError, ConfigWarning

_SHORT_VARIABLES = {
    ("API", "APIKEY"): "NDIF_API_KEY",
    ("API", "HOST"): "NDIF_HOST",
    ("APP", "DEBUG"): "NNSIGHT_DEBUG",
    ("APP", "EXPLAIN"): "NNSIGHT_EXPLAIN",
}


class Section(pydantic.BaseModel):
    """A group of settings; assignments are checked and converted."""

    model_config = pydantic.ConfigDict(
        validate_assignment=True, extra="forbid", str_strip_whitespace=True, hide_input_in_errors=True
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            try:
                super().__setattr__(name, value)
            except pydantic.ValidationError as error:
                raise ConfigError(f"CONFIG.{self._title()}.{name} cannot be set: {_reason(error)}") from None
        else:
            near = nearest(name, list(type(self).model_fields))
            raise ConfigError(f"CONFIG.{self._title()} has no setting {name!r}{near}")

    def _title(self) -> str:
        return type(self).__name__.upper()


class Api(Section):
    """How the remote service is reached.

    Attributes:
        HOST: the address of the service.
        APIKEY: the key it is used with; never shown.
        COMPRESS: whether requests and results travel compressed.
    """

    HOST: str = "https://api.ndif.us"
    APIKEY: str | None = pydantic.Field(default=None, repr=False)
    COMPRESS: bool = True


class App(Section):
    """How this library behaves.

    Attributes:
        DEBUG: show the library's own frames in tracebacks.
        EXPLAIN: record from the first model on what traces ask for; `nnsight.explain.on()` does so at any time.
        REMOTE_LOGGING: print the progress of remote runs.
        PYMOUNT: give values `x.save()`; `nnsight.save(x)` is always there.
        CROSS_INVOKER: let an invoke read names that an earlier invoke of the same trace binds.
        CACHE_DIR: where downloaded and converted files are kept.
    """

    DEBUG: bool = False
    EXPLAIN: bool = False
    REMOTE_LOGGING: bool = True
    PYMOUNT: bool = True
    CROSS_INVOKER: bool = True
    CACHE_DIR: Path = pydantic.Field(default_factory=_configfile.default_cache_dir)

    @pydantic.field_validator("CACHE_DIR")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()


class Config:
    """All settings. Making one reads nothing; the first use of a section does.

    Attributes:
        API: how the remote service is reached.
        APP: how this library behaves.
    """

    _sections: ClassVar[dict[str, type[Section]]] = {"API": Api, "APP": App}

    API: Api
    APP: App

    def __init__(self) -> None:
        self.__dict__["_lock"] = threading.RLock()

    def __getattr__(self, name: str) -> Section:
        if name not in self._sections:
            raise AttributeError(f"CONFIG has no section {name!r}; it has {' and '.join(self._sections)}")
        self._load()
        section: Section = self.__dict__[name]
        return section

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(f"CONFIG.{name} cannot be replaced; assign its settings, such as CONFIG.APP.DEBUG = True")

    def __repr__(self) -> str:
        return f"CONFIG({self.API!r}, {self.APP!r}, file={str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The file that `save` writes, whether or not it exists."""
        return _configfile.config_path()

    def reload(self) -> None:
        """Read the file and the environment again. Assignments that were not saved are forgotten.

        Raises:
            ConfigError: a value cannot be used; the settings stay as they were.
        """
        with self.__dict__["_lock"]:
            fresh, inherited = self._read()
            for name, section in fresh.items():
                held = self.__dict__.get(name)
                if held is None:
                    self.__dict__[name] = section
                else:  # someone may hold the section: it is changed in place
                    held.__dict__.update(section.__dict__)
            self.__dict__["_inherited"] = inherited

    def save(self) -> Path:
        """Write to the file what it already held and what was assigned since; nothing that the environment gave.

        Returns:
            The path of the file, which only its owner may read.

        Raises:
            ConfigError: it cannot be written.
        """
        self._load()
        changed: _configfile.Values = {}
        for name in self._sections:
            now, inherited = self.__dict__[name].__dict__, self.__dict__["_inherited"][name]
            changed[name] = {field: value for field, value in now.items() if value != inherited[field]}
        return self._write(changed)

    def set_default_api_key(self, key: str) -> None:
        """Use a key from now on and keep it in the file; nothing else is saved.

        Args:
            key: the key of the remote service.

        Raises:
            ConfigError: it is empty or not text, or the file cannot be written.
        """
        if not str(key).strip():
            raise ConfigError("the API key is empty")
        self.API.APIKEY = key
        self._write({"API": {"APIKEY": self.API.APIKEY}})

    def _write(self, changed: Mapping[str, Mapping[str, Any]]) -> Path:
        path = self.path
        with self.__dict__["_lock"]:
            values, _ = _configfile.read(path)
            for name, fields in changed.items():
                values.setdefault(name, {}).update(fields)
            for fields in values.values():
                for field in [field for field, value in fields.items() if value is None]:
                    del fields[field]  # TOML has no null; None is the default of what may be None
            _configfile.write(path, values)
        return path

    def _load(self) -> None:
        if "_inherited" not in self.__dict__:
            with self.__dict__["_lock"]:
                if "_inherited" not in self.__dict__:
                    self.reload()

    def _read(self) -> tuple[dict[str, Section], dict[str, dict[str, Any]]]:
        """Build the sections from the file and the environment, and remember what was not assigned."""
        path = self.path
        filed, text = _configfile.read(path)
        sections = {}
        for name, kind in self._sections.items():
            given = {}
            for field, value in filed.get(name, {}).items():
                where = f"{path}, line {_configfile.line_of(text, name, field)}: {field} in [{name}]"
                if _is_setting(kind, field, where):
                    given[field] = _checked(kind, field, value, where)
            given.update(_from_environment(name, kind))
            sections[name] = kind(**given)
        for name in filed.keys() - self._sections.keys():
            warn_user(f"{path}: there is no section [{name}]{nearest(name, list(self._sections))}", ConfigWarning)
        return sections, {name: dict(section.__dict__) for name, section in sections.items()}


def _from_environment(name: str, kind: type[Section]) -> dict[str, Any]:
    given = {}
    for (section, field), variable in _SHORT_VARIABLES.items():
        if section == name and os.environ.get(variable):
            given[field] = _checked(kind, field, os.environ[variable], f"the environment variable {variable}")
    prefix = f"NNSIGHT_{name}_"
    for variable, value in os.environ.items():
        field = variable.removeprefix(prefix)
        if field != variable and value and _is_setting(kind, field, f"the environment variable {variable}"):
            given[field] = _checked(kind, field, value, f"the environment variable {variable}")
    return given


def _is_setting(kind: type[Section], field: str, where: str) -> bool:
    if field in kind.model_fields:
        return True
    warn_user(f"{where} is not a setting{nearest(field, list(kind.model_fields))}; it is ignored", ConfigWarning)
    return False


def _checked(kind: type[Section], field: str, value: Any, where: str) -> Any:
    try:
        return getattr(kind(**{field: value}), field)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where} cannot be used: {_reason(error)}; correct or remove it") from None


def _reason(error: pydantic.ValidationError) -> str:
    """What pydantic says, without the value: it may be a key."""
    return "; ".join(detail["msg"] for detail in error.errors(include_input=False, include_url=False))


CONFIG = Config()
