"""What a payload says of the model it was written for, and whether a model is that one."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch

from nnsight._version import __version__
from nnsight.errors import PayloadError


def describe_model(root: Any) -> dict[str, Any]:
    """Return what identifies a model: its key, the fingerprint of its tree, and the versions that matter."""
    paths = [path for path, _ in root._module.named_modules()]
    return {
        "key": model_key(root),
        "tree": hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16],
        "modules": len(paths),
        "versions": _versions(root._module),
    }


def model_key(root: Any) -> str:
    """Return what a model is called where several are served: the wrapper's class and the repository or class."""
    module = type(root._module)
    repository = getattr(root, "repo_id", None)
    name = repository if isinstance(repository, str) and repository else f"{module.__module__}.{module.__qualname__}"
    return f"{type(root).__name__}:{name}"


def envoy_at(root: Any, path: str) -> Any:
    """Return the envoy at a path. `root.get` may not: a part of the model can be called `model`, too.

    Args:
        root: the root envoy.
        path: what `envoy.path` was at the other end: it begins with the root's own name.

    Raises:
        LookupError: there is none.
    """
    own, _, rest = path.partition(".")
    if own != root.path:
        raise LookupError(f"{path!r:.200} does not begin with {root.path!r}")
    found = root
    for name in rest.split(".") if rest else ():
        try:
            found = found[name]  # not `getattr`: whoever wrote the path would have any attribute be made
        except KeyError as error:
            raise LookupError(error.args[0]) from None
    return found


def check_model(described: Any, root: Any) -> None:
    """Check that a payload was written for a tree like that of a model.

    Args:
        described: what `describe_model` returned at the other end.
        root: the model here.

    Raises:
        PayloadError: it was not; says which side to change.
    """
    match described:
        case {"key": str(key), "tree": str(tree), "modules": int(count), "versions": dict(versions)}:
            pass
        case _:
            raise PayloadError("This payload does not say which model it is for.")
    here = describe_model(root)
    if tree == here["tree"]:
        return
    differ = [
        f"{name} {version} here, {versions[name]} there"
        for name, version in here["versions"].items()
        if versions.get(name, version) != version
    ]
    raise PayloadError(
        f"This payload was written for {key!r:.200} with a tree of {count} modules (fingerprint {tree!r:.20}), and "
        f"{here['key']!r} here has {here['modules']} (fingerprint {here['tree']!r}). The receiving side holds the "
        "weights, so change the sending side: load the same model there"
        + (f", with the same versions ({'; '.join(differ)})." if differ else ".")
    )


def _versions(module: torch.nn.Module) -> dict[str, str]:
    package = type(module).__module__.partition(".")[0]
    found = {"nnsight-core": __version__, "torch": torch.__version__}
    version = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(version, str):
        found[package] = version
    return {name: str(version) for name, version in found.items()}
