"""`LanguageModel`: a causal language model of Hugging Face transformers, with its tokenizer.

The configuration, the tokenizer and the tree of modules are there at once; the weights are loaded for the first run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from nnsight import Envoy, NNsight, traceable
from nnsight.protocols import Inputs
from nnsight_hf import caches
from nnsight_hf.errors import LoadError, MissingTokenizerError
from nnsight_hf.generation import Generator, StepStreamer, can_stream
from nnsight_hf.inputs import prepare
from nnsight_hf.joining import Prompt, align, copies_per_prompt, rows_of
from nnsight_hf.loading import Checkpoint, check_device_map, locate, parse_dtype, read_tokenizer
from nnsight_hf.padding import default_side, pad_id
from nnsight_hf.standard import StandardNames, names_of, sizes_of

# One model at a time: two threads may open the first trace of one model, and loading needs the memory twice anyway.
_loading = threading.RLock()


class LanguageModel(NNsight):
    """A causal language model and its tokenizer.

    Args:
        model: the name of a repository on the Hugging Face hub, a local folder, a GGUF file, or a loaded model.
        config: a configuration to use instead of the model's own, or where to find one.
        tokenizer: a tokenizer to use instead of the model's own, or where to find one. A loaded model has none.
        tokenizer_kwargs: for `AutoTokenizer.from_pretrained`; decoders are padded on the left unless this says
            otherwise, and on the left in any case when they generate; encoders on the right.
        device_map: where the weights go: "auto", a device, or a dict from names of modules to devices.
        dispatch: load the weights now instead of at the first run.
        dtype: what the weights are cast to: a dtype, its name, or "auto" (also None) for what they were saved as.
        rename: other names for modules of the tree, as `NNsight` takes them.
        envoys: envoy classes for modules, as `NNsight` takes them.
        strict_rename: whether a key of `rename` that matches nothing is an error.
        standard_names: whether the parts get the same names whatever the architecture: `layers[i].self_attn`, `.mlp`,
            `embed_tokens`, `ln_final`, `lm_head` (also below `.model`), and `num_layers`, `num_heads`,
            `hidden_size`, `vocab_size`. The original names stay valid.
        revision: branch, tag or commit of the repository.
        attn_implementation: "sdpa", "eager", ...
        trust_remote_code: whether code that comes with the model may run.
        automodel: the class that loads the model, or its name in transformers.
        gguf_file: the GGUF file in the repository or folder.
        **kwargs: for `from_pretrained`.

    Attributes:
        tokenizer: the tokenizer; None for a loaded model that was given without one.
        repo_id: what the model was called.
        num_layers: how many layers there are; this and the next three only with `standard_names`.
        num_heads: how many heads a layer's attention has; absent where there is none.
        hidden_size: the size of the residual stream.
        vocab_size: how many logits there are for each token.
        generator: given the ids that `generate` returns, so that blocks can read them; its `streamer` is given the
            ids of each step.

    Raises:
        LoadError: there is no such model.
        InputError: `dtype` or `device_map` is none.
        WrapError: the object given is no module.
        NamingError: two modules would have one name, a key matches nothing and `strict_rename` is set, or the
            standard names of the architecture are not known.

    Example:
        >>> model = LanguageModel("openai-community/gpt2", device_map="auto")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     hidden = model.transformer.h[3].output
    """

    requires_input = True
    #: What a block in another process may call of the tokenizer.
    helpers: ClassVar[Mapping[str, frozenset[str]]] = {
        "tokenizer": frozenset(
            {"__call__", "__len__", "encode", "decode", "batch_decode", "tokenize", "pad", "get_vocab",
             "convert_tokens_to_ids", "convert_ids_to_tokens", "convert_tokens_to_string"}
        )
    }  # fmt: skip

    tokenizer: Any
    repo_id: str
    generator: Envoy
    num_layers: int
    num_heads: int
    hidden_size: int
    vocab_size: int
    _standard: StandardNames | None = None
    _checkpoint: Checkpoint | None
    _is_dispatched: bool
    _tokenizer_problem: str

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        config: Any = None,
        tokenizer: Any = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        device_map: Any = None,
        dispatch: bool = False,
        dtype: Any = None,
        torch_dtype: Any = None,
        rename: dict[Any, Any] | None = None,
        envoys: Any = None,
        strict_rename: bool = False,
        standard_names: bool = False,
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        automodel: Any = "AutoModelForCausalLM",
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        checkpoint = None
        if isinstance(model, str | os.PathLike):
            source, gguf_file = locate(model, gguf_file)
            named = {"revision": revision, "attn_implementation": attn_implementation}
            options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
            if trust_remote_code:
                options["trust_remote_code"] = True
            check_device_map(device_map)
            checkpoint = Checkpoint(
                name=os.fspath(model), source=source, automodel=automodel, options=options, gguf_file=gguf_file,
                device_map=device_map, dtype=parse_dtype(torch_dtype if dtype is None else dtype),
            )  # fmt: skip
            checkpoint.read_config(config, kwargs)
            module = checkpoint.make_empty()
        else:
            module = model
        caches.register()
        self._wrap(module, rename, envoys, strict_rename, names_of(module) if standard_names else None)
        self._checkpoint = checkpoint
        self._is_dispatched = checkpoint is None
        self.repo_id = checkpoint.name if checkpoint is not None else str(getattr(module, "name_or_path", ""))
        self._tokenizer_problem = ""
        self.tokenizer = self._find_tokenizer(tokenizer, tokenizer_kwargs or {})
        self.mount("generator", Generator(), ends_steps=True)
        if dispatch:
            self.dispatch()

    def _wrap(
        self, module: nn.Module, rename: Any, envoys: Any, is_strict: bool, standard: StandardNames | None
    ) -> None:
        """Wrap the module, with the standard names if there are any."""
        if standard is not None:
            rename, envoys = standard.given(rename, envoys)
        super().__init__(module, rename=rename, envoys=envoys, strict_rename=is_strict)
        if standard is not None:
            standard.check(self)
            self.__dict__.update(sizes_of(module), _standard=standard)

    def __getattr__(self, name: str) -> Any:
        standard = self.__dict__.get("_standard")
        error = None if standard is None else standard.error(self._path, name)
        if error is not None:
            raise error
        return super().__getattr__(name)

    @property
    def _model(self) -> nn.Module:
        """The torch module, as `_module` is."""
        return self._module

    @property
    def dispatched(self) -> bool:
        """Whether the weights are loaded."""
        return self._is_dispatched

    def dispatch(self) -> None:
        """Load the weights if they are not yet. The first run does it too.

        Raises:
            LoadError: the weights are missing or cannot be read.
            InputError: `device_map` names a device that is not here.
        """
        with _loading:
            if self._is_dispatched or self._checkpoint is None:
                return
            self.rebind(self._checkpoint.load())
            self._is_dispatched = True

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Turn an input into `input_ids` and `attention_mask`, both (B, T) int64, on the model's device.

        The input is a string, a list of strings, token ids (a list, a list of lists, an integer tensor or array of
        shape (T,) or (B, T)), an encoding, chat messages or a list of such conversations, or keywords. Rows of
        different length are padded, and then a single forward gets `position_ids` that count from each row's first
        token.

        Args:
            method: the method that was called on the model.
            args: the input, unless it is given by keyword.
            kwargs: input keywords, and arguments of the call itself.

        Raises:
            InputError: the input cannot be used.
        """
        try:
            return prepare(self._module, self.tokenizer, method, args, kwargs)
        except MissingTokenizerError as error:
            if self._tokenizer_problem:
                error.add_note(self._tokenizer_problem)
            raise

    def join(self, inputs: Sequence[Inputs]) -> Inputs:
        """Join the prompts of several invokes into one batch, padded to the longest.

        Args:
            inputs: what `prepare` returned for each.

        Raises:
            BatchError: they cannot be joined.
        """
        prompts = [one for one in inputs if isinstance(one, Prompt)]
        if len(prompts) < len(inputs):  # a subclass prepares in its own way
            return super().join(inputs)
        return super().join(align(prompts, pad_id(self.tokenizer, self._module)))

    def rows(self, tensor: torch.Tensor, batch: Any) -> slice | None:
        """Return which rows of a tensor are an invoke's: a prompt may have one each, or one per beam or token.

        Args:
            tensor: a value of the run, any shape but ().
            batch: the invoke's rows, and the joint call.
        """
        joint = batch.joint
        if tensor.shape[0] == joint.total:
            return slice(batch.start, batch.start + batch.size)
        copies = copies_per_prompt(joint.kwargs, getattr(self._module, "generation_config", None))
        ids = joint.kwargs.get("input_ids")
        if ids is not None and tensor.ndim > 1:
            copies |= {ids.shape[1] * factor for factor in copies}  # experts see one row per token
        return rows_of(tensor.shape[0], joint.total, batch.start, batch.size, copies)

    @traceable
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text: `with model.generate("Hello", max_new_tokens=3) as tracer:`, or without a `with`.

        Args:
            *args: the input, as `prepare` takes it.
            **kwargs: for the model's own `generate`.

        Returns:
            The ids, (B, prompt + new) int64, or what `return_dict_in_generate` asks for. In a block they are
            `tracer.result` and `model.generator.output`. No gradients: the model generates under `no_grad`.
        """
        module: Any = self._module
        default = getattr(module, "generation_config", None)
        if can_stream(kwargs, default):
            kwargs["streamer"] = StepStreamer(self.generator.streamer._module)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is not None and getattr(kwargs.get("generation_config") or default, "pad_token_id", None) is None:
            # Finished rows are filled with it; without one transformers picks the same and says so every time.
            kwargs.setdefault("pad_token_id", pad)
        return self.generator(module.generate(*args, **kwargs))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mount("generator", Generator(), ends_steps=True)

    def _find_tokenizer(self, given: Any, options: dict[str, Any]) -> Any:
        """Return the tokenizer that was given, or that is where was said, or that comes with the model, or None."""
        options = {"padding_side": default_side(self._module), **options}
        if isinstance(given, str | os.PathLike):
            source, gguf_file = locate(given, None)
            return read_tokenizer(source, gguf_file, options)
        if given is not None or self._checkpoint is None:
            return given
        try:
            return self._checkpoint.load_tokenizer(options)
        except LoadError as error:  # token ids do without; text says why it cannot
            self._tokenizer_problem = str(error)
            return None
