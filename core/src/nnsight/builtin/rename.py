"""Other names for modules: `NNsight(net, rename={"transformer.h": "layers"})`.

An alias is an ordinary attribute of the envoy it is reached from, so looking one up costs what a child does. The
modules keep the names they have. Names are given again whenever the tree has changed.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight._words import nearest
from nnsight.builtin.paths import walk
from nnsight.errors import NamingError
from nnsight.kernel.envoy import Envoy
from nnsight.kernel.location import ROOT

if TYPE_CHECKING:
    from nnsight.tracing.model import NNsight

Key = str | type[nn.Module]
Names = dict[int, dict[str, Envoy]]

_FORMS = (
    "`rename` maps a name ('h'), a dotted path ('transformer.h', '*' for any one part) or a module class to an alias "
    "or a list of aliases"
)


@dataclass(frozen=True)
class Rule:
    """One key of `rename`, taken apart.

    Attributes:
        key: as the user wrote it.
        aliases: what it gives, each as parts.
        parts: the parts of the path; empty for a class.
        is_anchored: whether the path starts at the root, instead of at any module.
    """

    key: Key
    aliases: tuple[tuple[str, ...], ...]
    parts: tuple[str, ...] = ()
    is_anchored: bool = False

    @property
    def mounts(self) -> int:
        """How many parts lead to where the alias is put: those up to the last `*`, which stands for many places."""
        stars = [index + 1 for index, part in enumerate(self.parts) if part == "*"]
        last = stars[-1] if stars else 0
        return last - 1 if last == len(self.parts) else last


@dataclass
class Naming:
    """All that a model was told about names and envoy classes. It refers to no tree, so wrappers can share it.

    Attributes:
        rules: what `rename` says.
        by_class: what `envoys` says about classes of modules; `by_path` about paths, as parts.
        is_strict: whether a rule that matches nothing is an error, the first time that the names are given.
    """

    rules: list[Rule] = field(default_factory=list)
    by_class: dict[type[Any], type[Any]] = field(default_factory=dict)
    by_path: list[tuple[tuple[str, ...], type[Any]]] = field(default_factory=list)
    is_strict: bool = False

    def class_of(self, path: str, module: nn.Module, default: type[Any]) -> type[Any]:
        """Return the envoy class of a module: by its class, nearest first, else by the longest path that matches."""
        for cls in type(module).__mro__ if self.by_class else ():
            if cls in self.by_class:
                return self.by_class[cls]
        parts = path.split(".")
        for pattern, found in self.by_path:
            if self._leads(pattern, parts, self.rules):
                return found
            if self._is_class_called(type(module), pattern[-1]) and self._leads(pattern[:-1], parts[:-1], self.rules):
                return found
        return default

    def _is_class_called(self, cls: type[nn.Module], wanted: str) -> bool:
        keys = [rule.key for rule in self.rules if any(alias[-1] == wanted for alias in rule.aliases)]
        return any(isinstance(key, type) and issubclass(cls, key) for key in keys)

    def _leads(self, pattern: Sequence[str], path: list[str], rules: list[Rule]) -> bool:
        """Return whether a path ends as a pattern says, part by part, under original names or aliases."""
        above = len(path) - len(pattern)
        return above >= 0 and all(
            self._means(wanted, path[: above + index + 1], rules) for index, wanted in enumerate(pattern)
        )

    def _means(self, wanted: str, path: list[str], rules: list[Rule]) -> bool:
        """Return whether the module at a path is called what is wanted, by itself or by one of the rules."""
        if wanted in ("*", path[-1]):
            return True
        for rule in rules:
            if rule.parts and any(alias[-1] == wanted for alias in rule.aliases):
                if rule.is_anchored and len(path) != len(rule.parts) + 1:
                    continue
                if self._leads(rule.parts, path, [other for other in rules if other is not rule]):
                    return True
        return False

    def apply(self, root: Any) -> None:
        """Give every module below a root its other names.

        Raises:
            NamingError: two modules would have one name, or a rule matches nothing and must.
        """
        given = _Given(root)
        given.follow(self.rules)
        missed = [rule for rule in self.rules if rule.key not in given.matched]
        given.follow([rule for one in missed for rule in _from_root(one)])
        missed = [rule for rule in missed if rule.key not in given.matched]
        if missed and self.is_strict:
            raise NamingError(_unmatched(missed[0].key, root))
        self.is_strict = False
        shown = root._tree.aliases
        shown.clear()
        for envoy in given.envoys:
            values = envoy.__dict__
            for alias in values.pop("_aliases", ()):
                values.pop(alias, None)
            names = given.names.get(id(envoy))
            if names:
                values["_aliases"] = names
                values.update(names)
                for alias, target in names.items():
                    shown.setdefault(target._path, (envoy._path, alias))


class _Given:
    """The names of one tree, while they are being given.

    Args:
        root: the root of the tree.
    """

    def __init__(self, root: Envoy) -> None:
        self.root = root
        self.envoys: list[Envoy] = [root, *root._envoys.values()]
        self.names: Names = {}
        self.matched: set[Key] = set()
        self._homeless: dict[tuple[Key, tuple[str, ...]], tuple[Envoy, Envoy]] = {}
        self._housed: set[tuple[Key, tuple[str, ...]]] = set()
        self._has_changed = False

    def follow(self, rules: Iterable[Rule]) -> None:
        """Give the names, again and again until nothing new comes up: rules may use names that other rules give."""
        by_first: dict[str, list[Rule]] = {}
        classes: list[Rule] = []
        for rule in rules:
            if isinstance(rule.key, str):
                by_first.setdefault(rule.parts[0], []).append(rule)
            else:
                classes.append(rule)
        self._has_changed = bool(by_first or classes)
        while self._has_changed:
            self._has_changed = False
            for envoy in self.envoys:
                self._follow_from(envoy, by_first)
                for name, child in envoy._children.items() if classes else ():
                    for rule in classes:
                        if isinstance(rule.key, type) and isinstance(child._module, rule.key):
                            self._place(envoy, rule, child, name)

        for (key, alias), (mount, target) in self._homeless.items():
            if (key, alias) not in self._housed:
                raise NamingError(_homeless(mount, target, alias))

    def _follow_from(self, envoy: Envoy, by_first: Mapping[str, list[Rule]]) -> None:
        """Follow the rules whose paths can start at this module."""
        starts = [*envoy._children, *self.names.get(id(envoy), ())]
        for name in [*starts, "*"]:
            for rule in by_first.get(name, ()):
                if rule.is_anchored and envoy is not self.root:
                    continue
                for mount in self._reach([envoy], rule.parts[: rule.mounts]):
                    rest = rule.parts[rule.mounts :]
                    for target in self._reach([mount], rest):
                        if target is not mount:
                            self._place(mount, rule, target, rest[-1])

    def _reach(self, starts: list[Envoy], parts: Iterable[str]) -> list[Envoy]:
        for part in parts:
            if part == "*":
                starts = [child for start in starts for child in start._children.values()]
            else:
                starts = [found for start in starts if (found := walk(start, (part,), self.names)) is not None]
        return starts

    def _place(self, mount: Envoy, rule: Rule, target: Envoy, name: str) -> None:
        self.matched.add(rule.key)
        for alias in rule.aliases:
            last = alias[-1]
            at = walk(mount, alias[:-1], self.names)
            if at is None:  # perhaps a later rule gives the name, or the same rule is for another place
                self._homeless.setdefault((rule.key, alias), (mount, target))
                continue
            if len(alias) > 1 and f"{at._path}.".startswith(f"{target._path}."):
                raise NamingError(_homeless(mount, target, alias))
            self._housed.add((rule.key, alias))
            names = self.names.setdefault(id(at), {})
            if names.get(last) is target or at._children.get(last) is target:
                continue
            self._check(at, last, target, names)
            names[last] = target
            self._has_changed = True

    def _check(self, mount: Envoy, alias: str, target: Envoy, names: dict[str, Envoy]) -> None:
        """Refuse a name that means something else already."""
        module = mount._module
        if alias in names:
            taken = f"`{names[alias]._path}` is called so too"
        elif alias in mount._children:
            taken = f"`{mount._path}` has a module of that name"
        elif alias in mount._own or any(alias in inspect.get_annotations(cls) for cls in type(mount).__mro__):
            taken = f"every {type(mount).__name__} has `.{alias}`, which would be hidden"
        elif alias in module.__dict__ or alias in module._parameters or alias in module._buffers:
            taken = f"`{mount._path}` has an attribute of that name, which would be hidden"
        else:
            return
        raise NamingError(f"`{target._path}` cannot be called {alias!r}: {taken}. Choose another alias.")


class Rename:
    """What `model.rename` is: gives modules further names.

    Args:
        envoy: any envoy of the model.
    """

    def __init__(self, envoy: NNsight) -> None:
        self._envoy = envoy

    def __call__(self, names: Mapping[Any, Any], *, strict: bool = False) -> None:
        """Give modules further names, beside those that they have.

        Args:
            names: name, dotted path or class -> alias, or a list of them.
            strict: whether a key that matches nothing is an error.

        Raises:
            NamingError: two modules would have one name, or a key matches nothing and `strict` is set.
        """
        root: Any = self._envoy.root
        old = root._naming or Naming()
        new = Naming([*old.rules, *_rules(names)], old.by_class, old.by_path, strict)
        new.apply(root)
        root.__dict__["_naming"] = new

    @staticmethod
    def naming(rename: Any, envoys: Any, is_strict: bool) -> Naming:
        """Return what `NNsight(..., rename=, envoys=, strict_rename=)` says.

        Raises:
            NamingError: a key or a value cannot be used.
        """
        by_class, by_path = _envoys(envoys)
        return Naming(_rules(rename or {}), by_class, by_path, bool(is_strict))


def _rules(rename: Any) -> list[Rule]:
    if not isinstance(rename, Mapping):
        raise NamingError(f"rename={rename!r} cannot be used. {_FORMS}.")
    rules = []
    for key, given in rename.items():
        aliases = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple | set) else []
        parts = [tuple(alias.removeprefix(".").split(".")) for alias in aliases if isinstance(alias, str)]
        is_class = isinstance(key, type) and issubclass(key, nn.Module)
        names = key.removeprefix(".").split(".") if isinstance(key, str) else []
        is_alias = (
            bool(parts) and len(parts) == len(aliases) and all(map(_is_name, (name for p in parts for name in p)))
        )
        if not is_alias or not (is_class or (names and all(names))):
            raise NamingError(f"rename={{{key!r}: {given!r}}} cannot be used. {_FORMS}.")
        is_anchored = isinstance(key, str) and key.startswith(".")
        rules.append(Rule(key, tuple(parts), tuple(names), is_anchored))
    return rules


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _from_root(rule: Rule) -> Iterator[Rule]:
    """Yield the rule for a path that names the root, as paths are written elsewhere: `model.transformer.h`."""
    if len(rule.parts) > 1 and rule.parts[0] == ROOT:
        yield Rule(rule.key, rule.aliases, rule.parts[1:], is_anchored=True)


def _envoys(given: Any) -> tuple[dict[type[Any], type[Any]], list[tuple[tuple[str, ...], type[Any]]]]:
    from nnsight.tracing.model import Envoy as Traceable

    by_class: dict[type[Any], type[Any]] = {}
    by_path: list[tuple[tuple[str, ...], type[Any]]] = []
    if isinstance(given, type):
        given = {nn.Module: given}
    if given is not None and not isinstance(given, Mapping):
        raise NamingError(f"envoys={given!r} cannot be used: give a subclass of Envoy, or {{class or path: subclass}}.")
    for key, cls in (given or {}).items():
        if not (isinstance(cls, type) and issubclass(cls, Traceable)):
            raise NamingError(f"envoys={{{key!r}: {cls!r}}} cannot be used: the value must be a subclass of Envoy.")
        if isinstance(key, type):
            by_class[key] = cls
        elif isinstance(key, str) and all(key.removeprefix(".").split(".")):
            by_path.append((tuple(key.removeprefix(".").split(".")), cls))
        else:
            raise NamingError(f"envoys={{{key!r}: ...}} cannot be used: a key is a module class or a dotted path.")
    by_path.sort(key=lambda entry: (-len(entry[0]), entry[0].count("*")))
    return by_class, by_path


def _homeless(mount: Envoy, target: Envoy, alias: tuple[str, ...]) -> str:
    where = ".".join(alias[:-1])
    return (
        f"`{target._path}` cannot be called {'.'.join(alias)!r}: `{mount._path}` has no module {where!r} outside of "
        "it. Give a name without dots, or the path of another module."
    )


def _unmatched(key: Key, root: Envoy) -> str:
    envoys = [root, *root._envoys.values()]
    if isinstance(key, type):
        near = nearest(key.__name__, {type(envoy._module).__name__ for envoy in envoys})
        return f"rename: no module of this model is a {key.__name__}.{near}"
    paths = {envoy._path.removeprefix(f"{ROOT}.") for envoy in envoys}
    near = nearest(key, paths | {path.rpartition(".")[2] for path in paths})
    return f"rename: {key!r} matches no module of this model.{near} Leave it out, or give strict_rename=False."
