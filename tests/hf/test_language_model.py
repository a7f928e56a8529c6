"""The wrapper: lazy weights, its attributes, what subclasses do with it, copies, and threads."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

import nnsight
from nnsight import Envoy, LanguageModel, NNsight, WrapError

TEXT = "The Eiffel Tower is in the city of"


def logits_of(model, prompt=TEXT):
    with torch.no_grad(), model.trace(prompt):
        logits = model.lm_head.output
    return logits


def plain_logits(plain, tokenizer, prompt=TEXT):
    with torch.no_grad():
        return plain(**tokenizer(prompt, return_tensors="pt")).logits


# -- lazy weights


def test_nothing_is_loaded_at_first_but_all_is_there(lazy, gpt2_folder):
    assert not lazy.dispatched
    assert {parameter.device.type for parameter in lazy.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in lazy.buffers()} <= {"meta"}
    assert lazy.device == torch.device("meta")
    assert lazy.config.n_layer == len(lazy.transformer.h) == 12
    assert lazy.transformer.wte.weight.shape == (50257, 32)
    assert lazy.tokenizer("Hello")["input_ids"] == [15496]
    assert lazy.generation_config.no_repeat_ngram_size == 4
    assert not lazy.training
    assert lazy.repo_id == lazy.name_or_path == str(gpt2_folder)
    assert "GPT2Block" in repr(lazy)


@pytest.mark.parametrize(
    "how", ["trace", "generate", "plain trace", "plain generate", "named method", "part", "dispatch"]
)
def test_the_first_run_loads(how, lazy, plain, tokenizer):
    if how == "trace":
        with lazy.trace(TEXT):
            pass
    elif how == "generate":
        with lazy.generate(TEXT, max_new_tokens=1):
            pass
    elif how == "plain trace":
        lazy.trace(TEXT, trace=False)
    elif how == "plain generate":
        lazy.generate(TEXT, max_new_tokens=1)
    elif how == "named method":
        assert lazy.trace(TEXT, fn="forward", trace=False).logits.device.type == "cpu"
    elif how == "part":
        with lazy.transformer.h[0].trace(torch.rand(1, 3, 32)):
            hidden = lazy.transformer.h[0].output
        assert hidden.device.type == "cpu"
    else:
        lazy.dispatch()
    assert lazy.dispatched
    assert lazy.device == torch.device("cpu")
    assert torch.equal(logits_of(lazy), plain_logits(plain, tokenizer))


def test_the_first_trace_reads_what_later_ones_read(lazy):
    first = logits_of(lazy)
    assert torch.equal(first, logits_of(lazy))


def test_dispatch_at_once(gpt2_folder):
    model = LanguageModel(gpt2_folder, dispatch=True)
    assert model.dispatched
    assert model.device == torch.device("cpu")
    before = model._model
    model.dispatch()
    assert model._model is before


def test_envoys_from_before_the_loading_stay_good(lazy):
    layer, head = lazy.transformer.h[3], lazy.lm_head
    with lazy.trace(TEXT):
        hidden = layer.output
        logits = head.output
    assert lazy.transformer.h[3] is layer
    assert layer._module is lazy._model.transformer.h[3]
    assert hidden.device.type == logits.device.type == "cpu"


def test_an_error_in_the_block_that_loaded_leaves_the_model_loaded(lazy):
    with pytest.raises(RuntimeError, match="mine"):
        with lazy.trace(TEXT):
            raise RuntimeError("mine")
    assert logits_of(lazy).shape == (1, 10, 50257)


def test_loading_under_inference_mode_gives_weights_that_can_be_trained(lazy):
    with torch.inference_mode():
        lazy.dispatch()
    lazy.trace(TEXT, trace=False).logits.sum().backward()
    assert lazy.lm_head.weight.grad is not None


def test_two_threads_open_the_first_trace(gpt2_folder, monkeypatch):
    loads = []
    original = AutoModelForCausalLM.from_pretrained.__func__

    def load(cls, *args, **kwargs):
        loads.append(threading.get_ident())
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(load))
    model, found = LanguageModel(gpt2_folder), {}
    barrier = threading.Barrier(3)

    def work(index):
        barrier.wait()
        found[index] = logits_of(model, f"{TEXT} {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert all(torch.equal(found[index], logits_of(model, f"{TEXT} {index}")) for index in range(3))


# -- what it is


def test_it_is_an_nnsight_found_by_both_names():
    from nnsight.modeling.language import LanguageModel as ByModule

    assert ByModule is nnsight.LanguageModel is LanguageModel
    assert issubclass(LanguageModel, NNsight)


def test_attributes_of_the_model_are_reached(model):
    assert model._model is model._module
    assert model.dtype is torch.float32
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.eval() is model._model
    assert isinstance(model.generator, Envoy)
    assert model.generator.path == "model.generator"
    assert "generator" not in repr(model)
    assert model.tokenizer.padding_side == "left"
    assert model.tokenizer.pad_token == model.tokenizer.eos_token


def test_tokenizer_kwargs_come_before_the_defaults(gpt2_folder):
    model = LanguageModel(gpt2_folder, tokenizer_kwargs={"padding_side": "right", "pad_token": "!"})
    assert model.tokenizer.padding_side == "right"
    assert model.tokenizer.pad_token == "!"


def test_a_tokenizer_by_object_or_by_name(gpt2_folder, plain, tokenizer):
    assert LanguageModel(gpt2_folder, tokenizer=tokenizer).tokenizer is tokenizer
    named = LanguageModel(plain, tokenizer=str(gpt2_folder))
    assert named.tokenizer("Hello")["input_ids"] == [15496]
    assert named.tokenizer.padding_side == "left"


def test_a_loaded_model(plain, tokenizer):
    model = LanguageModel(plain, tokenizer=tokenizer)
    assert model.dispatched
    assert model._model is plain
    model.dispatch()
    assert model._model is plain
    assert torch.equal(logits_of(model), plain_logits(plain, tokenizer))


@pytest.mark.parametrize("junk", [3, None, object(), ["gpt2"]])
def test_junk_cannot_be_wrapped(junk):
    with pytest.raises(WrapError, match=r"Only a torch\.nn\.Module can be wrapped"):
        LanguageModel(junk)


def test_a_wrapped_model_cannot_be_wrapped_again(model):
    with pytest.raises(WrapError, match="wrapped already"):
        LanguageModel(model)


def test_trace_false_runs_plainly(model, plain, tokenizer):
    assert torch.equal(model.trace(TEXT, trace=False).logits, plain(**tokenizer(TEXT, return_tensors="pt")).logits)


# -- subclasses


class Studied(LanguageModel):
    """What programs do: an own `__init__`, plain attributes, objects that hold the model, properties with setters."""

    scan: str = "a name that shadows a method"

    def __init__(self, name_or_module, *args, layer=2, **kwargs):
        super().__init__(name_or_module, *args, **kwargs)
        self.layer = layer
        self.helper = Helper(self)
        self.notes = {}

    @property
    def layer(self):
        return self._layer

    @layer.setter
    def layer(self, value):
        self._layer = value * 2

    def hidden(self, prompt):
        with self.trace(prompt):
            hidden = self.transformer.h[self.layer].output
        return hidden


class Helper:
    def __init__(self, model):
        self.model = model

    def hidden(self, prompt):
        with self.model.trace(prompt):
            hidden = self.model.transformer.h[4].output
        return hidden


def test_a_subclass_with_its_own_init(gpt2_folder, model):
    studied = Studied(str(gpt2_folder), layer=2, device_map="cpu", dispatch=True)
    assert studied.layer == 4
    assert studied.scan == Studied.scan
    assert studied.notes == {}
    assert studied.helper.model is studied
    with model.trace(TEXT):
        expected = model.transformer.h[4].output
    assert torch.equal(studied.hidden(TEXT), expected)
    assert torch.equal(studied.helper.hidden(TEXT), expected)


def test_a_subclass_made_through_new(gpt2_folder, plain, tokenizer):
    class Made(LanguageModel):
        @classmethod
        def make(cls, source, **kwargs):
            self = cls.__new__(cls)
            self.kind = "made"
            super(Made, self).__init__(
                source, config=None, tokenizer=tokenizer, tokenizer_kwargs={}, attn_implementation="eager",
                trust_remote_code=False, device_map="auto", dtype=torch.float32, dispatch=False, revision=None,
            )  # fmt: skip
            self.kind += " and filled"
            return self

    for source in (gpt2_folder, plain):
        made = Made.make(source)
        assert made.kind == "made and filled"
        assert made.tokenizer is tokenizer
        assert torch.allclose(logits_of(made), plain_logits(plain, tokenizer), atol=1e-5)
        assert made.config._attn_implementation == ("eager" if source is gpt2_folder else "sdpa")


def test_a_module_assigned_is_an_envoy_and_works_in_and_out_of_traces(gpt2_folder):
    model = LanguageModel(gpt2_folder, dispatch=True)
    probe = torch.nn.Linear(32, 2)
    model.probe = probe
    assert model.probe._module is probe
    with model.trace(TEXT):
        inside = model.probe(model.transformer.h[2].output)
        hidden = model.transformer.h[3].output
    assert inside.shape == (1, 10, 2)
    assert model.probe(hidden).shape == (1, 10, 2)
    assert model.probe.extra_repr() == probe.extra_repr()


# -- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_its_own_model(how, gpt2_folder):
    model = LanguageModel(gpt2_folder, dispatch=True)
    model.label = "mine"
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    before = logits_of(model)
    assert torch.equal(logits_of(twin), before)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not logits_of(twin).any()
    assert torch.equal(logits_of(model), before)
    assert twin.label == "mine"
    assert twin.dispatched
    with twin.generate(TEXT, max_new_tokens=2):
        ids = twin.generator.output
    assert ids.shape == (1, 12)
    assert twin.generator is not model.generator


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_an_empty_model_loads_by_itself(how, lazy):
    twin = copy.deepcopy(lazy) if how == "deepcopy" else pickle.loads(pickle.dumps(lazy))
    assert not twin.dispatched
    expected = logits_of(lazy)
    assert not twin.dispatched
    assert torch.equal(logits_of(twin), expected)


def test_a_dropped_model_frees_its_weights_without_the_collector(gpt2_folder):
    gc.collect()
    gc.disable()
    try:
        model = LanguageModel(gpt2_folder, dispatch=True)
        logits_of(model)
        model.generate(TEXT, max_new_tokens=2)
        weight = weakref.ref(model.transformer.h[0].mlp.c_fc.weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


# -- what the core is told


def test_types_of_transformers_can_be_saved():
    from transformers import BatchEncoding, DynamicCache

    from nnsight_hf import _plugin

    types = _plugin.nnsight_saveable_types()
    assert BatchEncoding in types
    assert issubclass(DynamicCache, tuple(types))


def test_a_cache_and_an_encoding_can_be_saved_in_a_block(model, tokenizer):
    encoding = tokenizer(TEXT, return_tensors="pt")
    with model.trace(encoding):
        cache = model.output.past_key_values.save()
        same = encoding.save()
    assert cache.get_seq_length() == 10
    assert same is encoding
    assert not hasattr(cache, "save")


def test_doctor_names_what_the_plugin_works_with():
    from nnsight_hf import _plugin

    lines = _plugin.nnsight_doctor()
    found = {what: is_well for what, is_well, _ in lines}
    assert found["transformers"] is found["accelerate"] is found["gguf"] is True
    assert all(isinstance(text, str) and text for _, _, text in lines)


def test_the_plugin_imports_nothing_heavy():
    import subprocess
    import sys

    program = (
        "import sys, nnsight_hf._plugin as p; p.nnsight_saveable_types(), p.nnsight_commands(), p.nnsight_doctor()\n"
    )
    program += "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
