"""What the plugin tells nnsight. Every program that wraps a model imports it, so nothing heavy here."""

import importlib.metadata

nnsight_hookspec_version = 1


def nnsight_doctor() -> list[tuple[str, bool | None, str]]:
    """Report on the library that the models come from."""
    return [("glyphnet", True, importlib.metadata.version("glyphnet"))]
