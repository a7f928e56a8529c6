"""How a tree of envoys comes to mirror a tree of modules, and keeps doing so when that changes."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, TypeVar

from nnsight.kernel.controller import Instrumentation
from nnsight.kernel.location import ROOT, Location, Tree

if TYPE_CHECKING:
    from torch import nn

    from nnsight.kernel.envoy import Envoy

E = TypeVar("E", bound="Envoy")


def build(envoy: Envoy, module: nn.Module) -> None:
    """Make this envoy the root of a new tree over `module`."""
    values = envoy.__dict__
    tree = Tree()
    values.update(
        _module=module, _tree=tree, _path=ROOT, _number=tree.add_module(ROOT), _parent=None, _children={},
        _envoys={}, _instrumentation=Instrumentation(tree), _root=weakref.ref(envoy), edits=[],
    )  # fmt: skip
    values["_output_at"] = (tree, envoy._number + 1)
    envoy._instrumentation.add(module, envoy._number)
    _grow(envoy, envoy)
    _name(envoy)


def mount(envoy: Envoy, name: str, module: nn.Module, ends_steps: bool) -> Envoy:
    """Give a module beside the model's own a place in the tree, such as what collects generated ids."""
    root, envoy = envoy._find_root(), in_tree(envoy)
    mounted = _mirror(root, envoy, name, module)
    _grow(root, mounted)
    envoy.__dict__[name] = mounted
    if ends_steps:
        envoy._tree.ends.append(mounted._number)
    return mounted


def rebind(envoy: Envoy, module: nn.Module) -> None:
    """Let the tree mirror another module of the same shape, such as the loaded model in place of an empty one."""
    root = envoy._find_root()
    _rebind(root, envoy, module, set())
    envoys = {id(known._module): known for known in root._envoys.values()}
    root.__dict__["_envoys"] = envoys
    everyone = (root, *envoys.values())
    root._instrumentation.replace([(known._module, known._number) for known in everyone])
    _name(root)


def copy_wrapper(envoy: E) -> E:
    """Return this envoy of a copy of the whole wrapper: other envoys and edits, the same modules and locations.

    Nobody but the caller has the copy, so what is returned for a part owns its root. That root owns all parts in its
    turn: what is returned is another object with the part's attributes, which the tree does not refer to.
    """
    root, envoy = envoy._find_root(), in_tree(envoy)
    originals = {id(known) for known in root._envoys.values()}
    copies: dict[int, Envoy] = {}
    new = _copy(root, originals, copies)
    new.__dict__["edits"] = list(root.edits)
    new.__dict__["_envoys"] = {key: _copy(known, originals, copies) for key, known in root._envoys.items()}
    reference = weakref.ref(new)
    for copied in copies.values():
        parent = copied._parent and copied._parent()
        copied.__dict__["_root"] = reference
        copied.__dict__["_parent"] = weakref.ref(copies[id(parent)]) if parent is not None else None
    _name(new)
    found: E = copies[id(envoy)]  # type: ignore[assignment]
    if found is new:
        return found
    owner = type(found).__new__(type(found))
    owner.__dict__ = found.__dict__
    owner._kept_root = new
    return owner


def in_tree(envoy: E) -> E:
    """Return the envoy that the root has for a module; another one for an envoy that owns its root."""
    found: E = envoy._find_root()._envoys.get(id(envoy._module), envoy)  # type: ignore[assignment]
    return found


def children(envoy: Envoy) -> dict[str, Envoy]:
    """Return an envoy's children by name, after mirroring what was done to its module without us."""
    mirrored, modules = envoy._children, envoy._module._modules
    for name in list(mirrored):
        if mirrored[name]._module is not modules.get(name):
            detach(envoy, name)
    if len(mirrored) != len(modules):
        for name, module in modules.items():
            if module is not None:
                attach(envoy, name, module)
    return envoy._children


def attach(envoy: Envoy, name: str, module: nn.Module) -> Envoy:
    """Mirror a module that has become a child of this one's; return its envoy."""
    old = envoy._children.get(name)
    if old is not None:
        if old._module is module:
            return old
        detach(envoy, name)
    root, envoy = envoy._find_root(), in_tree(envoy)
    known = root._envoys.get(id(module))
    if known is None or known._module is not module:
        known = _mirror(root, envoy, name, module)
        _place(envoy, name, known)
        _grow(root, known)
    else:
        _place_known(root, envoy, name, known)
    _order(envoy)
    _name(root)
    return known


def assign(envoy: Envoy, module: object) -> None:
    """Put another module in the place of an envoy's own, wherever that is in the tree."""
    parent, name = envoy.parent, envoy._path.rpartition(".")[2]
    assert parent is not None
    setattr(parent._module, name, module)
    found = parent._module._modules.get(name)
    if found is not None:
        attach(parent, name, found)
    else:
        detach(parent, name)


def detach(envoy: Envoy, name: str) -> None:
    """Forget a child and all below it, unless they are reachable by another name."""
    root = envoy._find_root()
    gone = envoy._children.pop(name)
    envoy.__dict__.pop(name, None)
    envoy.__dict__.pop(f"E_{name}", None)
    still = {id(module) for module in root._module.modules()}
    below = _below(gone)
    keys = {id(lost._module) for lost in below} - still
    for key in keys:
        root._envoys.pop(key, None)
    root._instrumentation.remove(keys)
    for kept in below:
        if id(kept._module) in still and not _is_home(root, kept):
            _move_to_alias(root, kept)
    _name(root)


def _below(envoy: Envoy) -> list[Envoy]:
    """Return an envoy and all that have their path through it."""
    found = [envoy]
    for name, child in envoy._children.items():
        if child._path == f"{envoy._path}.{name}":
            found += _below(child)
    return found


def _is_home(root: Envoy, envoy: Envoy) -> bool:
    """Return whether an envoy is where its path says."""
    parent = envoy.parent
    if parent is None or not (parent is root or root._envoys.get(id(parent._module)) is parent):
        return False
    return parent._children.get(envoy._path.rpartition(".")[2]) is envoy


def _move_to_alias(root: Envoy, envoy: Envoy) -> None:
    for other in (root, *root._envoys.values()):
        for name, child in other._children.items():
            if child is envoy:
                return _move(envoy, other, name)
    return None  # nowhere yet: it moves when it is placed again


def _move(envoy: Envoy, parent: Envoy, name: str) -> None:
    """Give an envoy, and all that have their path through it, the path below another parent."""
    home, path = envoy._path, f"{parent._path}.{name}"
    envoy.__dict__.update(_path=path, _parent=weakref.ref(parent))
    for number in (envoy._number, envoy._number + 1):
        envoy._tree.locations[number] = Location(path, envoy._tree.locations[number].port)
    for below, child in envoy._children.items():
        if child._path == f"{home}.{below}":
            _move(child, envoy, below)


def _order(envoy: Envoy) -> None:
    """Let the children stand in the order of the module's own."""
    mirrored = envoy._children
    order = [name for name in envoy._module._modules if name in mirrored]
    if order != [*mirrored]:
        known = dict(mirrored)
        mirrored.clear()
        mirrored.update((name, known[name]) for name in order)


def _name(root: Envoy) -> None:
    """Give modules their other names, where the model has such."""
    if root._naming is not None:
        root._naming.apply(root)


def _mirror(root: Envoy, parent: Envoy, name: str, module: nn.Module) -> Envoy:
    """Make the envoy of one module and number it."""
    path = f"{parent._path}.{name}"
    kind = root._class_of(path, module)
    envoy: Envoy = kind.__new__(kind)
    tree = root._tree
    number = tree.add_module(path)
    values = envoy.__dict__
    values["_module"] = module
    values["_tree"] = tree
    values["_path"] = path
    values["_number"] = number
    values["_output_at"] = (tree, number + 1)
    values["_parent"] = weakref.ref(parent)
    values["_root"] = root._root
    values["_children"] = {}
    root._envoys[id(module)] = envoy
    root._instrumentation.add(module, number)
    return envoy


def _grow(root: Envoy, envoy: Envoy) -> None:
    """Mirror everything below an envoy. A module met again is an alias of the envoy it has."""
    for name, module in envoy._module._modules.items():
        if module is None:
            continue
        child = root._envoys.get(id(module))
        if child is None:
            child = _mirror(root, envoy, name, module)
            _place(envoy, name, child)
            if module._modules:
                _grow(root, child)
        else:
            _place_known(root, envoy, name, child)


def _copy(envoy: Envoy, originals: set[int], copies: dict[int, Envoy]) -> Envoy:
    """Return the copy of an envoy, with copies of all envoys it refers to."""
    found = copies.get(id(envoy))
    if found is None:
        kind = type(envoy)
        found = copies[id(envoy)] = kind.__new__(kind)
        values = found.__dict__
        for name, value in envoy.__dict__.items():
            values[name] = _copy(value, originals, copies) if id(value) in originals else value
        values["_children"] = {name: _copy(child, originals, copies) for name, child in envoy._children.items()}
    return found


def _rebind(root: Envoy, envoy: Envoy, module: nn.Module, seen: set[int]) -> None:
    """Point an envoy and all below it at another module and what is below that."""
    if id(envoy) in seen:
        return
    seen.add(id(envoy))
    envoy.__dict__["_module"] = module
    for name in list(envoy._children):
        child, new = envoy._children[name], module._modules.get(name)
        if new is not None:
            _rebind(root, child, new, seen)
        else:
            detach(envoy, name)
    if envoy is not root:  # the root does not own itself
        root._envoys[id(module)] = envoy
    for name, new in module._modules.items():
        if new is not None and name not in envoy._children:
            attach(envoy, name, new)
    _order(envoy)


def _place_known(root: Envoy, parent: Envoy, name: str, child: Envoy) -> None:
    """Place an envoy that exists: as an alias, or as its new home when it has lost the old one."""
    _place(parent, name, child)
    if not _is_home(root, child):
        _move(child, parent, name)


def _place(parent: Envoy, name: str, child: Envoy) -> None:
    parent._children[name] = child
    if name in parent._own:
        parent.__dict__[f"E_{name}"] = child
    elif not name.isdigit():
        parent.__dict__[name] = child
