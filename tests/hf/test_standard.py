"""Standard names: on every architecture they lead to the parts that transformers' own interface and hooks tell."""

import pickle

import pytest
import torch
import zoo
from torch import nn

from nnsight import Envoy, LanguageModel, NamingError, NNsightError, NotInTreeError

IDS = torch.tensor([[5, 17, 99, 3, 42, 8], [7, 7, 120, 64, 9, 31]])
#: What a class of transformers is called that attends, or mixes tokens in its place; and one that works on each token.
ATTENDS = "Attention"
FEEDS = ("MLP", "SparseMoeBlock", "FeedForward", "MoE")


def first(value):
    """Return the tensor that a module's output is, or begins with."""
    return first(value[0]) if isinstance(value, tuple | list) else getattr(value, "last_hidden_state", value)


def part(layer, *kinds):
    found = [child for child in layer.children() if any(kind in type(child).__name__ for kind in kinds)]
    assert len(found) <= 1
    return found[0] if found else None


def parts_of(plain):
    """Return standard name -> module, found without our data: through transformers' interface, and by class."""
    lists = [module for module in plain.modules() if isinstance(module, nn.ModuleList)]
    layers = next(found for found in lists if len(found) == plain.config.num_hidden_layers)
    normed, head = [], plain.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, args: normed.append(args[0]))
    outputs = {}
    hooks = [m.register_forward_hook(lambda m, _args, output: outputs.setdefault(m, output)) for m in plain.modules()]
    with torch.no_grad():
        plain(IDS)
    for one in (handle, *hooks):
        one.remove()
    norms = [  # the head may be given a slice of what the last norm has made
        module
        for module, output in outputs.items()
        if isinstance(output, torch.Tensor) and output.data_ptr() == normed[0].data_ptr() and not [*module.children()]
    ]
    parts = {"embed_tokens": plain.get_input_embeddings(), "ln_final": norms[0], "lm_head": head}
    for i, layer in enumerate(layers):
        parts[f"layers.{i}"] = layer
        parts[f"layers.{i}.self_attn"] = part(layer, ATTENDS)
        parts[f"layers.{i}.mlp"] = part(layer, *FEEDS)
        if hasattr(layer, "fc2"):  # OPT has no module for it: what is added to the residual stream is this one's
            parts[f"layers.{i}.mlp"] = layer.fc2
    return parts


def run_hooked(plain, parts, change=None):
    """Run with hooks by hand; return name -> output of the first tensor, and the logits."""
    seen, handles = {}, []
    for name, module in parts.items():

        def hook(_module, _args, output, name=name):
            if name == change:
                output = (first(output) * 0, *output[1:]) if isinstance(output, tuple) else output * 0
            seen[name] = first(output).clone()
            return output

        if module is not None:
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        logits = plain(IDS).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("body", ["", "model."])
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_every_name_reads_what_a_hook_on_the_part_sees(name, body):
    plain = zoo.build(name)
    parts = parts_of(plain)
    expected, logits = run_hooked(plain, parts)
    model = LanguageModel(plain, standard_names=True)
    order = list(expected)  # that in which the modules ended
    seen = {}
    with torch.no_grad(), model.trace(IDS):
        for at in order:
            seen[at] = first(model.get(at if at == "lm_head" else body + at).output)
        result = model.output.logits
    assert torch.equal(result, logits)
    for at in order:
        assert torch.equal(seen[at], expected[at]), at
        found = model.get(at)  # in eval mode a dropout gives what it is given, so a value alone does not tell
        assert getattr(found, "last", found)._module is parts[at], at


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_names_are_absent_where_the_architecture_has_no_such_part(name):
    plain = zoo.build(name)
    model = LanguageModel(plain, standard_names=True)
    for at, module in parts_of(plain).items():
        path, _, last = at.rpartition(".")
        assert hasattr(model.get(path), last) is (module is not None), at
        if module is None:
            with pytest.raises(NotInTreeError, match=f"has no `{last}`: it is a {name} model, and .*`[.]m(ixer|amba)`"):
                model.get(at)
    assert len(model.layers) == model.num_layers == 3
    assert (model.hidden_size, model.vocab_size) == (32, 128)
    if name in zoo.RECURRENT:
        with pytest.raises(NotInTreeError, match=f"no `num_heads`: it is a {name} model, and it carries a state"):
            model.num_heads
    else:
        assert model.num_heads == 4


@pytest.mark.parametrize("name", [name for name in zoo.CAUSAL if name not in ("mamba", "mamba2")])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_an_edit_of_a_part_is_what_a_hook_does(name, part):
    plain = zoo.build(name)
    _, logits = run_hooked(plain, parts_of(plain), change=f"layers.1.{part}")
    model = LanguageModel(plain, standard_names=True)
    with torch.no_grad(), model.trace(IDS):
        output = getattr(model.layers[1], part).output
        off = first(output) * 0
        getattr(model.layers[1], part).output = (off, *output[1:]) if isinstance(output, tuple) else off
        result = model.output.logits
    assert torch.equal(result, logits)
    assert not torch.equal(logits, run_hooked(plain, {})[1])


def test_modules_without_a_module_of_their_own_are_read_and_changed_like_one():
    plain = zoo.build("opt")
    model = LanguageModel(plain, standard_names=True)
    mlp = model.layers[1].mlp
    assert repr(mlp) == "Span(model.model.decoder.layers.1.fc1 ... model.model.decoder.layers.1.fc2)"
    with torch.no_grad():
        with model.trace(IDS):
            given = mlp.input
            same = mlp.inputs[0][0]
            mlp.input = given * 2
            result = model.output.logits
        handle = plain.model.decoder.layers[1].fc1.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
        expected = plain(IDS).logits
        handle.remove()
    assert same is given and torch.equal(result, expected)
    with pytest.raises(AttributeError):
        mlp.outputs


def test_modules_read_like_one_in_invokes_steps_and_edits():
    plain = zoo.build("opt")
    model = LanguageModel(plain, standard_names=True)
    expected, _ = run_hooked(plain, parts_of(plain))
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(IDS[:1]):
                first_row = model.layers[1].mlp.output
            with tracer.invoke(IDS[1:]):
                model.layers[1].mlp.output[:] = 0
                second_row = model.layers[1].mlp.output
        shapes = []
        with model.generate(IDS, max_new_tokens=3, do_sample=False) as tracer:
            for _ in tracer.iter[:]:
                shapes.append(tuple(model.layers[0].mlp.output.shape))
        with model.edit() as edited:
            model.layers[1].mlp.output[:] = 0
        with edited.trace(IDS):
            result = edited.output.logits
    assert torch.equal(first_row, expected["layers.1.mlp"][:6]) and not second_row.any()
    assert shapes == [(12, 32), (2, 32), (2, 32)]  # OPT flattens batch and tokens for these modules
    assert torch.equal(result, run_hooked(plain, parts_of(plain), change="layers.1.mlp")[1])


def test_the_original_names_and_those_of_the_user_stay_valid():
    plain = zoo.build("gpt2")
    names = {"layers": "blocks", "mlp": "feed_forward", ".transformer.h": "parts"}
    model = LanguageModel(plain, standard_names=True, rename=names)
    assert model.transformer.h is model.layers is model.model.layers is model.blocks is model.parts
    assert model.layers[0].feed_forward is model.layers[0].mlp
    with pytest.raises(NamingError, match="cannot be called 'ln_final'"):
        LanguageModel(plain, standard_names=True, rename={"lm_head": "ln_final"})
    with pytest.raises(NamingError, match="'nothing' matches no module"):
        LanguageModel(plain, standard_names=True, rename={"nothing": "x"}, strict_rename=True)


@pytest.mark.parametrize("name", ["tokenizer", "generator", "repo_id", "num_layers"])
def test_what_the_wrapper_has_itself_is_no_alias(name):
    with pytest.raises(NamingError, match=f"every LanguageModel has `[.]{name}`"):
        LanguageModel(zoo.build("gpt2"), rename={"transformer": name})


@pytest.mark.parametrize(
    "options", [{"rename": "x"}, {"rename": {".transformer": 5}}, {"envoys": "x"}, {"envoys": {"h": 3}}, {"envoys": 3}]
)
def test_what_is_no_name_is_an_error_beside_standard_names(options):
    with pytest.raises(NamingError, match=f"{next(iter(options))}=.* cannot be used"):
        LanguageModel(zoo.build("gpt2"), standard_names=True, **options)


class Marked(Envoy):
    pass


def test_envoy_classes_by_standard_name():
    model = LanguageModel(
        zoo.build("gpt2"), standard_names=True, envoys={"layers.*.self_attn": Marked, "ln_final": Marked}
    )
    assert {type(layer.attn) for layer in model.transformer.h} == {Marked}
    assert type(model.transformer.ln_f) is Marked and type(model.layers[0].mlp) is Envoy
    assert type(LanguageModel(zoo.build("gpt2"), standard_names=True, envoys=Marked).layers[0]) is Marked


def test_without_being_asked_for_there_are_none():
    model = LanguageModel(zoo.build("gpt2"))
    assert (
        not hasattr(model, "layers") and not hasattr(model, "num_layers") and not hasattr(model.transformer, "layers")
    )


def test_names_are_there_before_the_weights_and_after(gpt2_folder, tokenizer):
    model = LanguageModel(gpt2_folder, standard_names=True)
    assert len(model.layers) == model.num_layers == 12 and not model.dispatched
    with model.trace("Hello"):
        hidden = model.layers[3].output
    assert model.layers[3] is model.transformer.h[3] and first(hidden).shape[-1] == model.hidden_size
    twin = pickle.loads(pickle.dumps(model))
    assert twin.layers is twin.transformer.h and twin.num_heads == 4


def test_names_are_those_of_the_cache_too():
    model = LanguageModel(zoo.build("bloom"), standard_names=True)
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["layers.1.self_attn", model.layers[0]])
        expected = model.transformer.h[1].self_attention.output[0]
    assert torch.equal(cache["model.layers.1.self_attn"].output[0], expected)
    assert torch.equal(cache.model.layers[1].self_attn.output[0], expected)
    assert torch.equal(cache.layers[1].self_attn.output[0], expected)


def test_what_has_no_standard_names_is_told_the_way_out():
    import transformers

    encoder = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(NamingError, match=r"nothing is known about the names of a 'bert' model.*gpt2.*rename=\{"):
        LanguageModel(encoder, standard_names=True)
    with pytest.raises(NNsightError, match="Linear, which has no configuration"):
        LanguageModel(nn.Linear(2, 2), standard_names=True)
    headless = zoo.build("gpt2").transformer
    with pytest.raises(NamingError, match="a gpt2 model has `transformer`, but this GPT2Model has not.*rename="):
        LanguageModel(headless, standard_names=True)
    assert (
        LanguageModel(encoder, rename={"bert.encoder.layer": "layers"}).layers[0].path == "model.bert.encoder.layer.0"
    )
