"""The command line: `python -m nnsight <command>`. Plugins add commands through the hook `nnsight_commands`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from nnsight import __version__
from nnsight._hooks import Command, the_only
from nnsight._known import KNOWN, extra_for, how_to_install
from nnsight._registry import missing, nearest
from nnsight.errors import NNsightError, PluginWarning
from nnsight.plugins import hooks, registry


def list_plugins(arguments: list[str]) -> int:
    """List what every installed plugin provides, and its state."""
    _take_no_arguments("plugins", arguments)
    from nnsight import _doctor

    states = _doctor.states()
    rows = [("GROUP", "NAME", "DISTRIBUTION", "STATE")]
    for state in states:
        implemented = f" [{', '.join(state.hooks)}]" if state.hooks else ""
        rows.append((state.entry.group, state.entry.name, state.entry.origin, state.text + implemented))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
    if not states:
        print(f"no plugin is installed; for Hugging Face models: {how_to_install('hf')}")
    return 0


def diagnose(arguments: list[str]) -> int:
    """Check this installation; the exit code is 1 when something is broken."""
    _take_no_arguments("doctor", arguments)
    from nnsight import _doctor

    print(f"nnsight-core {__version__}")
    is_broken = False
    for what, is_well, text in _doctor.check():
        mark = "note" if is_well is None else "ok" if is_well else "FAIL"
        print(f"{mark:<5} {what:<9} {text}", flush=True)
        is_broken |= is_well is False
    return int(is_broken)


def print_version(arguments: list[str]) -> int:
    """Print the version."""
    _take_no_arguments("version", arguments)
    print(__version__)
    return 0


def write_stubs(arguments: list[str]) -> int:
    """Write a type stub of a model's tree, for editors and type checkers; --help says more."""
    from nnsight.builtin import stubs_command  # lazy: it needs torch

    return stubs_command.main(arguments)


def print_help(arguments: list[str]) -> int:
    """List the commands."""
    print("usage: python -m nnsight <command> [arguments]\n\ncommands:")
    commands: dict[str, Callable[..., object]] = {**_COMMANDS}
    for name, claims in sorted(_plugin_commands().items()):
        commands.setdefault(name, claims[0][1])
    for name, command in commands.items():
        lines = (command.__doc__ or "").strip().splitlines()
        print(f"  {name:<12} {lines[0] if lines else ''}".rstrip())
    return 0


_COMMANDS: dict[str, Command] = {
    "plugins": list_plugins,
    "doctor": diagnose,
    "stubs": write_stubs,
    "version": print_version,
    "help": print_help,
}
_ALIASES = {"-h": "help", "--help": "help", "-V": "version", "--version": "version"}


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: the command's name and its arguments; none stands for `help`.

    Returns:
        The exit code: 2 for a command that does not exist or is used wrongly, else the command's own.
    """
    name, *rest = arguments or ["help"]
    name = _ALIASES.get(name, name)
    try:
        command = _COMMANDS.get(name) or _plugin_command(name)
        return command(rest)
    except _UsageError as error:
        return _complain(str(error), 2)
    except NNsightError as error:
        return _complain(str(error), 1)


class _UsageError(Exception):
    """The command line cannot be understood."""


def _plugin_command(name: str) -> Command:
    commands = _plugin_commands()
    if name in commands:
        return the_only(name, commands[name])
    extra = extra_for("command", name)
    if extra is not None:
        registry.entry("nnsight", extra)  # raises when the plugin is not there to be asked
        raise hooks.broken.get(extra) or missing("command", name)
    near = nearest(name, [*_COMMANDS, *commands, *KNOWN["command"]])
    raise _UsageError(f"there is no command {name!r}{near}\n`python -m nnsight help` lists them")


def _plugin_commands() -> dict[str, list[tuple[str, Command]]]:
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        commands = hooks.commands()
    for remark in remarks:
        if issubclass(remark.category, PluginWarning):
            _complain(f"warning: {remark.message}", 0)
    return commands


def _take_no_arguments(command: str, arguments: list[str]) -> None:
    if arguments:
        raise _UsageError(f"`{command}` takes no arguments, but was given: {' '.join(arguments)}")


def _complain(text: str, code: int) -> int:
    print(f"nnsight: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
