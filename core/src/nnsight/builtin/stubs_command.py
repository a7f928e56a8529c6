"""`python -m nnsight stubs`: write the type stub of a model to a file."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from nnsight.builtin.stubs import HEADER, write_stub
from nnsight.errors import StubError
from nnsight.kernel.envoy import Envoy
from nnsight.tracing.model import NNsight

_USE = """\
{file}: {classes} classes. To use it:

    from typing import TYPE_CHECKING, cast
    if TYPE_CHECKING:
        from {module} import Model
    model = cast("Model", {model})
"""


def main(arguments: list[str]) -> int:
    """Write a type stub of a model's tree.

    Raises:
        StubError: there is no such model, or the file cannot be written.
    """
    options = _parse(arguments)
    if ":" in options.model and not Path(options.model).exists():
        root, shown = _from_module(options.model, options.standard_names)
        name = options.model.partition(":")[2]
    else:
        import nnsight  # lazy: the model class is a plugin's

        standard = {"standard_names": True} if options.standard_names else {}
        root = nnsight.LanguageModel(options.model, **standard)
        name = Path(options.model).name
        shown = f"LanguageModel({options.model!r}{', standard_names=True' if standard else ''})"
    module = re.sub(r"\W", "_", name).lower() + "_tree"
    if not module.isidentifier():
        module = f"model_{module}"
    file = Path(options.output or f"{module}.pyi")
    text = write_stub(root)
    _write(file, text)
    classes = len(re.findall(r"^class ", text, re.MULTILINE))
    print(_USE.format(file=file, classes=classes, module=file.stem, model=shown), end="")
    return 0


def _parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m nnsight stubs",
        description="Write a type stub of a model's tree, so that editors complete model.transformer.h[0].attn and "
        "type checkers find misspelt names. Weights are not loaded.",
    )
    parser.add_argument(
        "model", help="a Hugging Face repository or folder, or module:attr, which holds a model or returns one"
    )
    parser.add_argument("-o", "--output", help="the file to write (default: <name>_tree.pyi in this folder)")
    parser.add_argument("--standard-names", action="store_true", help="with LanguageModel(..., standard_names=True)")
    return parser.parse_args(arguments)


def _from_module(path: str, has_standard_names: bool) -> tuple[Envoy, str]:
    """Return the model that `module:attr` leads to, and how a program would write it."""
    name, _, attribute = path.partition(":")
    if has_standard_names:
        raise StubError(f"--standard-names is for a repository: {path!r} names a model that is there already.")
    found, shown = _import(path, name, attribute), attribute
    if callable(found) and not isinstance(found, nn.Module | Envoy):
        try:
            found, shown = found(), f"{attribute}()"
        except TypeError as error:
            raise StubError(f"{path!r} cannot be called without arguments: {error}.") from error
    if isinstance(found, nn.Module):
        found, shown = NNsight(found), f"NNsight({shown})"
    if not isinstance(found, Envoy):
        raise StubError(
            f"{path!r} is of type {type(found).__name__}: give a model, a torch.nn.Module, or what returns one."
        )
    return found, shown


def _import(path: str, name: str, attribute: str) -> Any:
    """Return an attribute of a module, which may be in this folder."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, ValueError) as error:
        raise StubError(f"{path!r} cannot be used: importing {name!r} failed ({error}).") from error
    except AttributeError as error:
        raise StubError(f"{path!r} cannot be used: {error}.") from error
    finally:
        sys.path.remove(here)
    return found


def _write(file: Path, text: str) -> None:
    try:
        if file.exists() and not file.read_text("utf-8").startswith(HEADER):
            raise StubError(f"{file} is there already and is no stub of ours: choose another file with --output.")
        file.write_text(text, "utf-8")
    except (OSError, UnicodeError) as error:
        raise StubError(f"{file} cannot be written: {error}.") from error
