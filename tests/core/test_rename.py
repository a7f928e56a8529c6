"""Other names for modules, envoy classes of one's own, and views of values under a name."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from modules import WIDTH, Block, Net, assert_usable, plain, rows, run, seeded
from torch import nn

from nnsight import (
    Envoy,
    MissedProviderError,
    NamingError,
    NNsight,
    NNsightError,
    NotInTreeError,
    OutOfOrderError,
    ReadOnlyError,
    ViewError,
    eproperty,
    save,
)  # fmt: skip


class Causal(nn.Module):
    """As in GPT-2: the parts are below `transformer`."""

    def __init__(self):
        super().__init__()
        self.transformer = seeded(Net)
        self.lm_head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x):
        return self.lm_head(self.transformer(x))


@pytest.fixture
def net():
    return seeded(Causal)


# -- names


def test_a_name_stands_beside_the_original_wherever_it_occurs(net):
    model = NNsight(net, rename={"attn": "self_attn"})
    for block in model.transformer.h:
        assert block.self_attn is block.attn and block["self_attn"] is block.attn and "self_attn" in block
    with model.trace(rows()):
        value = model.transformer.h[1].self_attn.output
        model.transformer.h[1].self_attn.output = value * 0
        result = model.output
    expected = plain(net, rows(), edit=lambda path, out: out * 0 if path == "transformer.h.1.attn" else None)
    assert torch.equal(value, plain(net, rows()).outputs["transformer.h.1.attn"][0])
    assert torch.equal(result, expected.result)
    assert_usable(model, net, rows())


@pytest.mark.parametrize("key", ["transformer.h", ".transformer.h", "model.transformer.h"])
def test_a_dotted_path_gives_a_name_to_the_root(net, key):
    model = NNsight(net, rename={key: "layers"})
    assert model.layers is model.transformer.h
    assert not hasattr(model.transformer, "layers")


def test_names_may_be_written_in_names_that_others_give(net):
    model = NNsight(net, rename={"model.layers": "blocks", "transformer": "model", "h": "layers", "blocks": "parts"})
    assert model.model is model.transformer and model.model.layers is model.transformer.h
    assert model.blocks is model.transformer.h and model.parts is model.transformer.h


def test_several_sources_and_several_aliases(net):
    names = {"h": "layers", "blocks": "layers", "gpt_neox.layers": "layers", "attn": ["self_attn", "attention"]}
    model = NNsight(net, rename=names)
    first = model.transformer.layers[0]
    assert first.self_attn is first.attention is first.attn
    assert not hasattr(model, "gpt_neox") and not hasattr(model, "layers") and not hasattr(first, "nothing")


def test_one_mapping_for_many_models_gives_one_name():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.layers = nn.ModuleList(seeded(Block) for _ in range(2))

    names = {"transformer": "model", "h": "layers", "model.layers": "layers", "transformer.h": "layers"}
    for made in (seeded(Causal), Other()):
        model = NNsight(made, rename=names)
        assert isinstance(model.layers[1]._module, Block) and model.layers is model.model.layers


def test_a_star_stands_for_any_one_part(net):
    model = NNsight(net, rename={"transformer.h.*.mlp": "feed_forward", "*.emb": "embed"})
    assert all(block.feed_forward is block.mlp for block in model.transformer.h)
    assert model.transformer.embed is model.transformer.emb
    assert not hasattr(model, "feed_forward") and not hasattr(model, "embed")


def test_a_path_from_the_root_and_one_to_a_star_s_place(net):
    model = NNsight(net, rename={"transformer.h.0.mlp": "first_mlp", "*.h.0": "first"})
    assert model.first_mlp is model.transformer.h[0].mlp
    assert model.transformer.first is model.transformer.h[0]


def test_a_class_names_its_modules(net):
    model = NNsight(net, rename={nn.ModuleList: "layers", Net: "body"})
    assert model.body is model.transformer and model.body.layers is model.transformer.h


def test_a_dotted_alias_is_put_where_it_says(net):
    model = NNsight(net, rename={"lm_head": "body.head", "transformer": "body"})
    assert model.transformer.head is model.lm_head and not hasattr(model, "head")
    with pytest.raises(NamingError, match="has no module 'decoder'"):
        NNsight(net, rename={"lm_head": "decoder.head"})
    with pytest.raises(NamingError, match="outside of it"):
        NNsight(net, rename={"transformer": "transformer.h.up"})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"attn": "mlp"}, r"`model\.transformer\.h\.0\.attn` cannot be called 'mlp': `model\.transformer\.h\.0` has a"),
        ({"attn": "x", "mlp": "x"}, r"'x': `model\.transformer\.h\.0\.attn` is called so too"),
        ({nn.Linear: "linear"}, "'linear': .* is called so too"),
        ({"attn": "output"}, "every Envoy has `.output`"),
        ({"lm_head": "trace"}, "every NNsight has `.trace`"),
        ({"emb": "training"}, "has an attribute of that name"),
        ({"transformer": "_module"}, r"every NNsight has `\._module`"),
    ],
)
def test_collisions_are_errors(net, names, message):
    with pytest.raises(NamingError, match=message):
        NNsight(net, rename=names)


def test_a_module_may_be_given_the_name_that_it_has(net):
    model = NNsight(net, rename={"h": "h", "transformer": ["transformer", "model"], "model.h": "layers"})
    assert model.layers is model.transformer.h


@pytest.mark.parametrize(
    "names", [["h"], {"h": 3}, {"h": []}, {3: "x"}, {"h": "a b"}, {"a..b": "x"}, {int: "x"}, {"h": "class"}]
)
def test_what_is_no_rename_is_an_error(net, names):
    with pytest.raises(NamingError, match="cannot be used"):
        NNsight(net, rename=names)


def test_a_key_that_matches_nothing_is_silent_unless_told(net):
    NNsight(net, rename={"transfromer": "model"})
    with pytest.raises(NamingError, match="'transfromer' matches no module of this model. Nearest: transformer"):
        NNsight(net, rename={"transfromer": "model"}, strict_rename=True)
    with pytest.raises(NamingError, match="no module of this model is a Conv1d"):
        NNsight(net, rename={nn.Conv1d: "conv"}, strict_rename=True)
    NNsight(net, rename={"transformer": "model", "model.h": "layers"}, strict_rename=True)


def test_names_can_be_given_later(net):
    model = NNsight(net, rename={"transformer": "model"})
    model.rename({"model.h": "layers"})
    assert model.layers is model.model.h
    with pytest.raises(NamingError):
        model.rename({"lm_head": "layers"})
    with pytest.raises(NamingError, match="matches no module"):
        model.rename({"head": "x"}, strict=True)
    assert model.layers is model.model.h and not hasattr(model, "x")


def test_names_are_in_paths_the_repr_and_errors(net):
    model = NNsight(net, rename={"h": "layers", "transformer.h": "blocks", "attn": ["self_attn", "att"]})
    assert model.get("transformer.layers.0.self_attn") is model.transformer.h[0].attn
    assert model.get("model.blocks.1") is model.transformer.h[1]
    text = repr(model)
    assert "(layers/h): ModuleList(" in text and "(self_attn/att/attn): Linear(" in text and "(0-2): 3 x Block(" in text
    assert "(blocks) = model.transformer.h" in text
    assert "blocks" in dir(model)
    with pytest.raises(NotInTreeError, match="Nearest: blocks"):
        model.blokcs
    with pytest.raises(KeyError, match="Nearest: layers"):
        model.transformer["layesr"]


def test_errors_of_a_run_say_what_the_user_calls_a_place(net):
    model = NNsight(net, rename={"transformer.h": ["layers", "parts"], "attn": "self_attn"})
    late = r"missed for `model\.transformer\.h\.0\.attn\.output` \(`model\.layers\.0\.self_attn\.output`\): occurrence"
    with pytest.raises(OutOfOrderError, match=late), model.trace(rows()):
        model.layers[1].output
        model.layers[0].self_attn.output
    never = r"complete but `model\.transformer\.h\.output` \(`model\.layers\.output`\) was not provided"
    with pytest.raises(MissedProviderError, match=never), model.trace(rows()):
        model.layers.output
    with (
        pytest.raises(OutOfOrderError, match=r"missed for `model\.transformer\.emb\.output`: occ"),
        model.trace(rows()),
    ):
        model.lm_head.output
        model.transformer.emb.output
    round_and_round = NNsight(net, rename={"transformer": "lm_head.x", "lm_head": "transformer.y"})
    with pytest.raises(OutOfOrderError, match="missed for"), round_and_round.trace(rows()):
        round_and_round.lm_head.output
        round_and_round.transformer.emb.output


def test_paths_from_an_alias_that_is_called_as_the_root_is(net):
    model = NNsight(net, rename={"transformer": "model", "h": "layers"})
    block = model.transformer.h[0]
    for path in ("model.transformer.h.0", "model.layers.0", "model.h.0", "transformer.layers.0", "model.model.h.0"):
        assert model.get(path) is block
    assert model.get("model.lm_head") is model.lm_head and model.get("model") is model
    with model.trace(rows()) as tracer:
        cache = tracer.cache(modules=["model.layers.0", "model.lm_head"])
    assert len(cache) == 2 and torch.equal(cache.model.layers[0].output, cache["model.transformer.h.0"].output)


def test_the_nearest_names_are_said_once(net):
    model = NNsight(net, rename={"attn": "self_attn"})
    with pytest.raises(NotInTreeError, match=r"Nearest: self_attn\.$"):
        model.transformer.h[0].self_atn


def test_names_follow_when_the_tree_changes(net):
    model = NNsight(net, rename={"attn": "self_attn", "transformer.h": "layers", "adapter": "extra"})
    first = model.layers[0]
    new = seeded(nn.Linear, WIDTH, WIDTH, seed=1)
    first.self_attn = new
    assert net.transformer.h[0].attn is new and first.self_attn is first.attn and first.attn._module is new
    first.adapter = seeded(nn.Linear, WIDTH, WIDTH)
    assert first.extra is first.adapter
    model.transformer.h = nn.ModuleList([Block()])
    assert model.layers is model.transformer.h and len(model.layers) == 1 and model.layers[0].self_attn
    del net.transformer.h[0].attn
    with model.trace(rows(), fn=lambda x: net.transformer.emb(x)):
        hidden = model.transformer.emb.output
    assert torch.equal(hidden, net.transformer.emb(rows()))


def test_names_are_in_edited_copied_and_pickled_wrappers(net):
    model = NNsight(net, rename={"transformer.h": "layers", "attn": "self_attn"}, envoys={"mlp": Marked})
    with model.edit() as edited:
        model.layers[0].output[:] = 0
    assert edited.layers is edited.transformer.h and edited.layers is not model.layers
    with edited.trace(rows()):
        assert not edited.layers[0].output.any()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.layers is twin.transformer.h and twin.layers._module is not model.layers._module
        assert twin.layers[0].self_attn is twin.layers[0].attn and type(twin.layers[0].mlp) is Marked


def test_an_alias_costs_what_a_child_does(net):
    model = NNsight(net, rename={"transformer": "model"})
    assert model.__dict__["model"] is model.__dict__["transformer"]


def test_names_keep_no_model_alive(net):
    model = NNsight(net, rename={"transformer.h": "layers", "attn": "self_attn"})
    alive = weakref.ref(model.layers[0]), weakref.ref(net)
    gc.disable()
    try:
        del model, net
        assert alive[0]() is None
    finally:
        gc.enable()


def test_naming_is_a_plugin_that_can_be_switched_off():
    program = """
    from torch import nn
    from nnsight import NNsight
    print(NNsight(nn.Sequential(nn.Linear(2, 2)))[0].path)
    try:
        NNsight(nn.Sequential(nn.Linear(2, 2)), rename={"0": "first"})
    except ImportError as error:
        print("switched off" in str(error))
    """
    assert run(program, NNSIGHT_PLUGINS_DISABLE="rename") == "model.0\nTrue"


# -- envoy classes


class Marked(Envoy):
    pass


class Other(Envoy):
    pass


def test_envoy_classes_by_type_path_and_for_all(net):
    model = NNsight(net, envoys={nn.Linear: Marked, "h.*": Other, "transformer.h.1": Marked, "emb": Other})
    block = model.transformer.h
    assert type(block[0]) is Other and type(block[1]) is Marked  # the longer path
    assert type(model.transformer.emb) is Marked  # the class, before the path
    assert type(block) is Envoy
    assert {type(part) for part in NNsight(net, envoys=Other).modules()[1:]} == {Other}
    assert type(NNsight(net, envoys={nn.Module: Other, nn.Linear: Marked}).lm_head) is Marked


def test_envoy_classes_by_alias(net):
    model = NNsight(net, rename={"attn": "self_attn", "h": "layers"}, envoys={"layers.*.self_attn": Marked})
    assert type(model.transformer.h[2].attn) is Marked and type(model.transformer.h[2].mlp) is Envoy


def test_envoy_classes_by_alias_of_a_path(net):
    names = {"transformer.h": "layers", "transformer.h.*.attn": "self_attn", ".transformer.h.0.mlp": "first_mlp"}
    model = NNsight(net, rename=names, envoys={"layers.*.self_attn": Marked, "first_mlp": Other})
    assert {type(block.attn) for block in model.layers} == {Marked}
    assert [type(block.mlp) for block in model.layers] == [Other, Envoy, Envoy]
    NNsight(net, rename={"a": "b", "b": "a"}, envoys={"a": Marked})  # names that go round
    model = NNsight(net, rename={Net: "body"}, envoys={"body": Other})
    assert type(model.transformer) is Other


@pytest.mark.parametrize(
    "envoys", [{"h": int}, {"h": nn.Linear}, {3: Marked}, {"": Marked}, nn.Linear, "h", 3, [Marked]]
)
def test_what_is_no_envoy_class_is_an_error(net, envoys):
    with pytest.raises(NamingError, match="cannot be used"):
        NNsight(net, envoys=envoys)


# -- views


class Viewed(Envoy):
    """Parts of a block under names of their own; heads are four wide."""

    mark = 2

    @eproperty(key="mlp.input", description="(B, H, D)")
    def heads(self, value):
        return value.unflatten(-1, (-1, 4))

    @heads.inverse
    def heads(self, view, value):
        return view.flatten(-2)

    @eproperty(key="mlp.output")
    def doubled(self, value):
        """Twice what it is."""
        return value * self.mark

    @doubled.inverse
    def doubled(self, view, value):
        return view / self.mark

    @eproperty(key="mlp.output")
    def halved(self, value):
        return value / self.mark

    @halved.inverse
    def _whole(self, view, value):
        return view * self.mark

    shifted = eproperty("output", view=lambda self, value: value + 1)
    same = eproperty("output")

    @eproperty(key="output")
    def broken(self, value):
        return self.nothing_here


@pytest.fixture
def viewed():
    return NNsight(seeded(Net), envoys={Block: Viewed})


def heads_of(value):
    return value.unflatten(-1, (-1, 4))


def test_a_view_is_read(viewed):
    with viewed.trace(rows()):
        heads, doubled, shifted = viewed.h[1].heads, viewed.h[1].doubled, viewed.h[1].shifted
        assert viewed.h[1].same is viewed.h[1].output
    expected = plain(viewed._module, rows())
    assert torch.equal(heads, heads_of(expected.inputs["h.1.mlp"][0][0][0]))
    assert torch.equal(doubled, expected.outputs["h.1.mlp"][0] * 2)
    assert torch.equal(shifted, expected.outputs["h.1"][0] + 1)


def hooked(net, x, path, change):
    """Run with a pre-hook by hand that changes a module's input."""
    net = copy.deepcopy(net)
    net.get_submodule(path).register_forward_pre_hook(lambda _, args: (change(args[0]),))
    return net(x)


def first_head_off(value):
    value = value.clone()
    heads_of(value)[:, 0] = 0
    return value


def test_the_model_sees_a_view_edited_in_place_or_assigned(viewed):
    net = viewed._module
    with viewed.trace(rows()):
        viewed.h[1].heads[:, 0] = 0
        edited = viewed.output
    with viewed.trace(rows()):
        heads = viewed.h[1].heads.clone()
        heads[:, 0] = 0
        viewed.h[1].heads = heads
        assigned = viewed.output
    expected = hooked(net, rows(), "h.1.mlp", first_head_off)
    assert torch.equal(edited, expected) and torch.equal(assigned, expected)
    assert_usable(viewed, net, rows())


def test_an_inverse_may_have_a_name_of_its_own(viewed):
    with viewed.trace(rows()):
        viewed.h[1].halved = viewed.h[1].halved * 0 + 1
        value = viewed.h[1].mlp.output
    assert (value == 2).all()
    with pytest.raises(ViewError, match=r"`model\.h\.1\.halved`"), viewed.trace(rows()):
        viewed.h[1].halved = torch.zeros(3)


@pytest.mark.parametrize("is_last", [False, True])
def test_the_model_sees_an_edited_view_that_is_a_copy(viewed, is_last):
    with viewed.trace(rows()) as tracer:
        viewed.h[1].doubled[:] = 6
        if not is_last:
            hidden = viewed.h[2].mlp.output
        result = tracer.result
    expected = plain(viewed._module, rows(), edit=lambda path, out: out * 0 + 3 if path == "h.1.mlp" else None)
    assert torch.equal(result, expected.result)
    assert is_last or torch.equal(hidden, expected.outputs["h.2.mlp"][0])


def test_a_copy_is_put_back_before_the_next_block_looks(viewed):
    with viewed.trace() as tracer:
        with tracer.invoke(rows(1, n=1)):
            viewed.h[0].doubled[:] = 4
        with tracer.invoke(rows(2, n=1)):
            other = viewed.h[0].mlp.output
        with tracer.invoke():
            whole = viewed.h[0].mlp.output
            cache = tracer.cache(modules=["h.1.mlp"])
    assert (whole[0] == 2).all() and torch.equal(whole[1:], other)
    torch.testing.assert_close(other, plain(viewed._module, rows(2, n=1)).outputs["h.0.mlp"][0])
    assert cache["h.1.mlp"].output.shape == (2, WIDTH)


def test_a_copy_that_was_only_read_is_not_put_back(viewed):
    with viewed.trace(rows()) as tracer:
        viewed.h[0].doubled
        value = viewed.h[0].mlp.output
        viewed.h[0].mlp.output = replaced = value + 1
        cache = tracer.cache(modules=[viewed.h[0].mlp])
    assert torch.equal(cache.h[0].mlp.output, replaced)


def test_a_view_without_an_inverse_can_only_be_read(viewed):
    with pytest.raises(ReadOnlyError, match=r"`model\.h\.1\.shifted` is a view of `model\.h\.1\.output` without"):
        with viewed.trace(rows()):
            viewed.h[1].shifted = rows()
    with pytest.raises(ReadOnlyError, match="can only be read"), viewed.trace(rows()):
        viewed.h[1].shifted[:] = 0
    assert_usable(viewed, viewed._module, rows())


@pytest.mark.parametrize("given", [torch.zeros(2, 2, 5), torch.zeros(2, WIDTH), torch.zeros(()), 3, None, [1.0], "x"])
def test_what_has_not_the_shape_of_a_view_cannot_be_assigned(viewed, given):
    what = rf"\({', '.join(map(str, given.shape))},?\)" if isinstance(given, torch.Tensor) else type(given).__name__
    with pytest.raises(
        ViewError, match=rf"`model\.h\.1\.heads`.*`model\.h\.1\.mlp\.input`.*\(2, \d, 4\).*{what}"
    ) as caught:
        with viewed.trace(rows()):
            viewed.h[1].heads = given
    assert isinstance(caught.value, NNsightError) and isinstance(caught.value, ValueError)
    with viewed.trace(rows()):
        try:
            viewed.h[1].heads = given
        except ViewError:
            viewed.h[1].heads = viewed.h[1].heads * 0  # the block goes on
        result = viewed.output
    assert torch.equal(result, hooked(viewed._module, rows(), "h.1.mlp", lambda value: value * 0))
    assert_usable(viewed, viewed._module, rows())


@pytest.mark.parametrize("key", ["", ".output", "mlp.", "a..output"])
def test_a_key_that_is_no_place_is_an_error_where_it_is_written(key):
    with pytest.raises(NamingError, match="key=.* cannot be used"):
        eproperty(key=key)


def test_a_key_that_names_a_module_asks_for_its_port():
    class Vague(Envoy):
        whole = eproperty(key="mlp")

    model = NNsight(seeded(Net), envoys={Block: Vague})
    with (
        pytest.raises(NamingError, match=r"`model\.h\.0\.whole`: 'mlp' is a module.*'mlp\.output'"),
        model.trace(rows()),
    ):
        model.h[0].whole
    assert_usable(model, model._module, rows())


def test_an_error_in_a_view_says_what_happened(viewed):
    with pytest.raises(NotInTreeError, match="neither a module nor an attribute 'nothing_here'"):
        with viewed.trace(rows()):
            viewed.h[1].broken
    with pytest.raises(ValueError, match="heads"):
        viewed.h[1].heads
    wrong = NNsight(seeded(Net), envoys={nn.Linear: Viewed})
    with pytest.raises(NotInTreeError, match=r"`model\.emb\.heads` is a view of `mlp\.input`, but .*'mlp'"):
        with wrong.trace(rows()):
            wrong.emb.heads


def test_a_view_describes_itself():
    assert Viewed.heads.description == Viewed.heads.__doc__ == "(B, H, D)"
    assert Viewed.doubled.description == "Twice what it is."


def test_a_location_of_one_s_own():
    class Sampling(Envoy):
        token = eproperty(description="what was drawn")

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            token = self.head(x).argmax(-1)
            return type(envoy).token.publish(envoy, token) * 2

    net = seeded(Drawing)
    model = NNsight(net, envoys={"head": Sampling})
    envoy = model.head
    with model.trace(rows()):
        token = save(model.head.token)
        model.head.token = token + 1
        result = model.output
    assert torch.equal(token, net.head(rows()).argmax(-1)) and torch.equal(result, (token + 1) * 2)
    assert torch.equal(net(rows()), token * 2)


# -- heads of real models


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=32, bos_token_id=1, eos_token_id=1))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


class Attention(Envoy):
    @eproperty(key="o_proj.input", description="(B, H, T, D): what each head gives")
    def heads(self, value):
        return value.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @heads.inverse
    def heads(self, view, value):
        return view.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize(
    ("make", "path"), [(gpt2, "transformer.h.1.attn.c_proj"), (llama, "model.layers.1.self_attn.o_proj")]
)
@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_attention_per_head(make, path, how):
    net = seeded(make).eval()
    names = {"transformer": "model", "h": "layers", "attn": "self_attn", "attn.c_proj": "self_attn.o_proj"}
    model = NNsight(net, rename=names, envoys={"self_attn": Attention})
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    seen = []

    def off(_module, args):
        seen.append(args[0].clone())
        value = args[0].clone().unflatten(-1, (4, 4))
        value[:, :, 2] = 0
        return (value.flatten(-2),)

    handle = net.get_submodule(path).register_forward_pre_hook(off)
    expected = net(ids).logits
    handle.remove()
    with model.trace(ids):
        heads = model.model.layers[1].self_attn.heads
        before = heads.clone()
        if how == "in place":
            heads[:, 2] = 0
        else:
            other = heads.clone()
            other[:, 2] = 0
            model.model.layers[1].self_attn.heads = other
        logits = model.output.logits
    assert before.shape == (2, 4, 3, 4)
    assert torch.equal(before, seen[0].unflatten(-1, (4, 4)).transpose(1, 2))
    assert torch.equal(logits, expected) and not torch.equal(logits, net(ids).logits)
