"""Where a model comes from, and its three loadings: the configuration, an empty tree on the meta device, the weights.

Nothing here is specific to language models but the default automodel. transformers is imported when first used: it
takes seconds.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnsight import InputError
from nnsight_hf.errors import LoadError

_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
#: Options of `from_pretrained` that say where and how to fetch, for the configuration and the tokenizer as well.
_FETCHING = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip

_NOTHING = "Nothing to load at {name!r}: {why} {remedy}"


@dataclass
class Checkpoint:
    """Where a model comes from and how it is loaded.

    Attributes:
        name: what the user called it.
        source: what transformers is told; absolute for a local folder, so that a later `chdir` does no harm.
        automodel: the class that loads it, or its name in transformers.
        config: its configuration.
        options: for `from_pretrained`, as far as they are not the configuration's.
        gguf_file: the name of the GGUF file in `source`, if the weights are in one.
        device_map: where the weights go.
        dtype: what they are cast to; None for what they were saved as.
    """

    name: str
    source: str
    automodel: Any
    config: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    gguf_file: str | None = None
    device_map: Any = None
    dtype: torch.dtype | str | None = None

    def read_config(self, given: Any, attributes: dict[str, Any]) -> None:
        """Set `config`: a copy of the one given, else the one at `source`.

        Args:
            given: a configuration, where to find one, or None.
            attributes: keyword arguments of the user; those that the configuration knows are set on it, the others
                are kept for the weights.

        Raises:
            LoadError: there is no model there.
        """
        from transformers import AutoConfig  # lazy: heavy

        self.options.update({name: attributes[name] for name in attributes if name in _FETCHING})
        if given is not None and not isinstance(given, str | os.PathLike):
            self.config = copy.deepcopy(given)
            self.options.update(attributes)
            return
        fetching = self._fetching()
        source, gguf_file = locate(given, None) if given is not None else (self.source, self.gguf_file)
        if gguf_file is not None:
            fetching["gguf_file"] = gguf_file
        own = {name: attributes[name] for name in attributes if name not in (*_FETCHING, "quantization_config")}
        try:
            self.config, unused = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **fetching, **own)
        except (OSError, ValueError) as error:
            raise not_found(str(given or self.name), error) from error
        self.options.update({name: attributes[name] for name in attributes if name not in own or name in unused})

    def make_empty(self) -> nn.Module:
        """Return the model without weights: all parameters and buffers are on the meta device."""
        options = {} if self.dtype in (None, "auto") else {"dtype": self.dtype}
        for name in ("attn_implementation", "trust_remote_code"):
            if name in self.options:
                options[name] = self.options[name]
        with torch.device("meta"):
            module: nn.Module = self._automodel().from_config(copy.deepcopy(self.config), **options)
        generation_config = self._read_generation_config()
        if generation_config is not None:
            module.generation_config = generation_config
        return self._named(module.eval())

    def load(self) -> nn.Module:
        """Return the model with its weights.

        Raises:
            LoadError: the weights are missing or cannot be read.
            InputError: `device_map` names a device that is not here.
        """
        check_is_there(self.device_map)
        options = dict(self.options)
        if self.gguf_file is not None:
            from transformers import GgufConfig  # lazy: heavy

            # Left in blocks, the loaded model could be run but not saved.
            options.setdefault("quantization_config", GgufConfig(dequantize=True))
            options["gguf_file"] = self.gguf_file
        if self.dtype is not None:
            options["dtype"] = self.dtype
        try:
            with torch.inference_mode(mode=False):  # weights made in inference mode could never be trained
                module: nn.Module = self._automodel().from_pretrained(
                    self.source, config=copy.deepcopy(self.config), device_map=self.device_map, **options
                )
        except OSError as error:
            raise not_found(self.name, error) from error
        return self._named(module.eval())

    def load_tokenizer(self, options: dict[str, Any]) -> Any:
        """Return the tokenizer that comes with the model.

        Args:
            options: for `AutoTokenizer.from_pretrained`, before the defaults of this library.

        Raises:
            LoadError: none does.
        """
        return read_tokenizer(self.source, self.gguf_file, {**self._fetching(), **options})

    def _automodel(self) -> Any:
        import transformers  # lazy: heavy

        return getattr(transformers, self.automodel) if isinstance(self.automodel, str) else self.automodel

    def _fetching(self) -> dict[str, Any]:
        return {name: self.options[name] for name in _FETCHING if name in self.options}

    def _named(self, module: nn.Module) -> nn.Module:
        module.name_or_path = self.name  # type: ignore[assignment]
        return module

    def _read_generation_config(self) -> Any:
        from transformers import GenerationConfig  # lazy: heavy

        if self.gguf_file is not None:
            return None
        fetching = self._fetching()
        fetching.pop("trust_remote_code", None)
        try:
            return GenerationConfig.from_pretrained(self.source, **fetching)
        except (OSError, ValueError):  # most models have none: transformers derives one from the configuration
            return None


def read_tokenizer(source: str, gguf_file: str | None, options: dict[str, Any]) -> Any:
    """Return the tokenizer at `source`, padding on the left and with a pad token.

    Raises:
        LoadError: there is none.
    """
    from transformers import AutoTokenizer  # lazy: heavy

    if gguf_file is not None:
        options = {"gguf_file": gguf_file, **options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{"padding_side": "left", **options})
    except (OSError, ValueError, ImportError) as error:
        raise LoadError(f"No tokenizer can be loaded from {source!r}: {_first_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        # transformers makes up an empty one for a folder that has none
        raise LoadError(f"No tokenizer can be loaded from {source!r}: there are no tokenizer files.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def locate(name: str | os.PathLike[str], gguf_file: str | None) -> tuple[str, str | None]:
    """Return the source that `name` stands for, and the GGUF file in it.

    Args:
        name: a local folder, a GGUF file, or the name of a repository on the Hugging Face hub.
        gguf_file: the GGUF file in it, when the user named one.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent.absolute()), path.name
    if path.is_dir():
        return str(path.absolute()), gguf_file
    return os.fspath(name), gguf_file


def not_found(name: str, error: BaseException) -> LoadError:
    """Return the error that says why nothing could be loaded, and what to do."""
    from huggingface_hub import constants  # lazy: heavy

    causes = _chain(error)
    if Path(name).expanduser().exists():
        why, remedy = f"it is here, but {_first_line(error)}", "A model folder has a config.json and the weights."
    elif "GatedRepoError" in causes:
        why, remedy = "its repository is gated.", "Ask for access on its page and log in with `hf auth login`."
    elif "RepositoryNotFoundError" in causes:
        why = "the Hugging Face hub has no such repository, or it is private."
        remedy = "Check the spelling; for a private one log in with `hf auth login`."
    elif "HFValidationError" in causes:
        why = "there is no such folder or file here, and it is no name that a repository could have."
        remedy = "Give a local folder, a .gguf file, or a name like 'openai-community/gpt2'."
    elif constants.HF_HUB_OFFLINE:
        why = "there is no such folder here, it is not in the cache, and offline mode is on (HF_HUB_OFFLINE is set)."
        remedy = f"Check the path, or unset HF_HUB_OFFLINE, or fetch it where there is a network: `hf download {name}`."
    elif "LocalEntryNotFoundError" in causes:
        why = "there is no such folder here, it is not in the cache, and the hub cannot be reached from this machine."
        remedy = f"Check the path and the network, or fetch it where there is one: `hf download {name}`."
    else:
        why, remedy = _first_line(error), "Check the name, the revision and the files of the repository."
    return LoadError(_NOTHING.format(name=name, why=why, remedy=remedy))


def parse_dtype(dtype: Any) -> torch.dtype | str | None:
    """Return a dtype given as such, by name, or as "auto".

    Raises:
        InputError: it is none of them.
    """
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype  # type: ignore[no-any-return]
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(found, torch.dtype):
            return found
    raise InputError(f"dtype={dtype!r} is no dtype: give torch.float32, 'bfloat16', ..., or 'auto'.")


def check_device_map(device_map: Any) -> None:
    """Refuse what can never be a device map.

    Raises:
        InputError: it is none; the message says what one looks like.
    """
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    for value in values:
        if value is None or isinstance(value, torch.device) or value in (*_PLACEMENTS, "disk"):
            continue
        try:
            _device(value)
        except (RuntimeError, TypeError):
            raise InputError(
                f"device_map={device_map!r} cannot be used: {value!r} is no device. Give one of "
                f"{', '.join(map(repr, _PLACEMENTS))}, a device such as 'cpu' or 'cuda:0', or a dict from the names "
                "of modules to devices."
            ) from None


def check_is_there(device_map: Any) -> None:
    """Refuse a device map that names a device this machine does not have.

    Raises:
        InputError: the device is not here.
    """
    values = device_map.values() if isinstance(device_map, dict) else [device_map]
    for value in values:
        if value is None or value in (*_PLACEMENTS, "disk"):
            continue
        device = _device(value)
        if device.type in ("cpu", "meta"):
            continue
        here = torch.accelerator.current_accelerator(check_available=True)
        if here is None or here.type != device.type or (device.index or 0) >= torch.accelerator.device_count():
            raise InputError(
                f"device_map={device_map!r} asks for device {value!r}, which torch does not see here. "
                "device_map='auto' takes what there is, 'cpu' always works."
            )


def _device(value: Any) -> torch.device:
    """Return the device that a value means; a number is one of this machine's accelerators."""
    if isinstance(value, int) and not isinstance(value, bool):
        here = torch.accelerator.current_accelerator()
        return torch.device("cuda" if here is None else here.type, value)
    return torch.device(value)


def _chain(error: BaseException | None) -> set[str]:
    """Return the names of the classes of an error and of all that it came from."""
    found = set()
    while error is not None:
        found |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
