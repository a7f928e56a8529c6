"""Standard names: the same tree for any causal language model, `LanguageModel(..., standard_names=True)`.

What is called what in which architecture is data, `standard_names.json`, keyed by the `model_type` of the
configuration: the paths of `model`, `layers`, `embed_tokens`, `ln_final` and `lm_head` from the root, of `self_attn`
and `mlp` from a layer. Two parts in a list are the first and the last of a run of modules that has no module of its
own. `absent` says why a name is missing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from torch import nn

from nnsight import Envoy, NamingError, NotInTreeError

#: What each size is called in a configuration; transformers maps other spellings to these.
SIZES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
}
_OF_ROOT = ("model", "layers", "embed_tokens", "ln_final", "lm_head")
_OF_LAYER = ("self_attn", "mlp")


@dataclass(frozen=True)
class StandardNames:
    """What an architecture calls the parts that the standard names stand for.

    Attributes:
        architecture: its `model_type`.
        rename: for `NNsight(rename=)`.
        layers: the path of the layers.
        spans: names of a layer that stand for several modules: the first and the last.
        absent: why a name is missing.
    """

    architecture: str
    rename: dict[str, list[str]]
    layers: str
    spans: dict[str, tuple[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def given(self, rename: Any, envoys: Any) -> tuple[Any, Any]:
        """Return `rename` and `envoys` with what the standard names need, beside what the user gave."""
        merged: dict[Any, Any] = dict(self.rename)
        if rename is not None and not isinstance(rename, Mapping):
            return rename, envoys  # refused where it is read, as is all that cannot be used
        for key, aliases in (rename or {}).items():
            if key in merged and isinstance(aliases, str | list | tuple | set):
                aliases = [*merged[key], *([aliases] if isinstance(aliases, str) else aliases)]
            merged[key] = aliases
        if envoys is None or isinstance(envoys, Mapping):
            kind = SpannedLayer if self.spans else StandardLayer
            envoys = {f"{self.layers}.*": kind, **(envoys or {})}
        return merged, envoys

    def error(self, path: str, name: str) -> NotInTreeError | None:
        """Return the error for a name that this architecture has not got, or None for any other name."""
        if name not in self.absent:
            return None
        why = self.absent[name]
        return NotInTreeError(f"`{path}` has no `{name}`: it is a {self.architecture} model, and {why}.")

    def check(self, root: Envoy) -> None:
        """Refuse a model that lacks a part which its architecture has.

        Raises:
            NamingError: it does.
        """
        for path in self.rename:
            if "*" not in path and _walk(root._module, path) is None:
                raise NamingError(
                    f"standard_names=True: a {self.architecture} model has `{path.removeprefix('.')}`, but this "
                    f"{type(root._module).__name__} has not. Standard names are for causal language models; name the "
                    "parts of others with rename=."
                )


class StandardLayer(Envoy):
    """A layer under standard names. It says why a name is missing."""

    def __getattr__(self, name: str) -> Any:
        if name in _OF_LAYER and "_module" in self.__dict__:
            error = names_of(self.root._module).error(self.path, name)
            if error is not None:
                raise error
        return super().__getattr__(name)


class SpannedLayer(StandardLayer):
    """A layer of an architecture that has no module for the MLP."""

    @property
    def mlp(self) -> Span:
        """The modules of the MLP, as one."""
        first, last = names_of(self.root._module).spans["mlp"]
        return Span(self.get(first), self.get(last))


class Span:
    """Modules that run one after another, read and changed like one.

    Args:
        first: takes the input.
        last: gives the output.
    """

    def __init__(self, first: Envoy, last: Envoy) -> None:
        self.first = first
        self.last = last

    @property
    def output(self) -> Any:
        """What the last module gives. Only inside a block."""
        return self.last.output

    @output.setter
    def output(self, value: Any) -> None:
        self.last.output = value

    @property
    def input(self) -> Any:
        """The first argument of the first module. Only inside a block."""
        return self.first.input

    @input.setter
    def input(self, value: Any) -> None:
        self.first.input = value

    @property
    def inputs(self) -> Any:
        """The arguments of the first module: `(args, kwargs)`. Only inside a block."""
        return self.first.inputs

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self.first.inputs = value

    def __repr__(self) -> str:
        return f"Span({self.first.path} ... {self.last.path})"


def names_of(module: Any) -> StandardNames:
    """Return the standard names of a model.

    Args:
        module: the model, with its configuration.

    Raises:
        NamingError: nobody has written down the names of its architecture.
    """
    architecture = getattr(getattr(module, "config", None), "model_type", None)
    table = _table()
    if architecture in table:
        return table[architecture]
    what = f"a {architecture!r} model" if architecture else f"{type(module).__name__}, which has no configuration"
    raise NamingError(
        f"standard_names=True: nothing is known about the names of {what}; they are known of {', '.join(table)}. "
        "Leave it out and give the names yourself: rename={'path.of.the.layers': 'layers', ...}."
    )


def sizes_of(module: Any) -> dict[str, int]:
    """Return the sizes under their standard names, as far as the architecture has them."""
    found = {name: getattr(module.config, key, None) for name, key in SIZES.items()}
    absent = names_of(module).absent
    return {name: size for name, size in found.items() if size is not None and name not in absent}


@functools.cache
def _table() -> dict[str, StandardNames]:
    """Read the data; once, when the first model asks for standard names."""
    text = resources.files("nnsight_hf").joinpath("standard_names.json").read_text("utf-8")
    return {architecture: _read(architecture, entry) for architecture, entry in json.loads(text).items()}


def _read(architecture: str, entry: dict[str, Any]) -> StandardNames:
    rename: dict[str, list[str]] = {}
    for name in _OF_ROOT:
        # Twice: from the root, and in the body, as the architectures have it that the names are from.
        aliases = [name] if name in ("model", "lm_head") else [name, f"model.{name}"]
        rename[f".{entry[name]}"] = aliases
    spans = {}
    for name in _OF_LAYER:
        part = entry.get(name)
        if isinstance(part, list):
            spans[name] = (part[0], part[1])
        elif part is not None:
            rename[f".{entry['layers']}.*.{part}"] = [name]
    return StandardNames(architecture, rename, entry["layers"], spans, entry.get("absent", {}))


def _walk(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path.removeprefix("."))
    except AttributeError:
        return None
