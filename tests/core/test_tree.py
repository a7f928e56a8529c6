"""The tree of envoys mirrors the tree of modules: how it is walked, shown, changed and copied."""

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from modules import WIDTH, Block, Calls, Net, assert_idle, assert_usable, plain, rows, seeded
from torch import nn

from nnsight import Envoy, NNsight
from nnsight.errors import MissedProviderError, NotInTreeError, OrphanError, WrapError


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    return rows()


def torch_path(path):
    """The path that torch has for an envoy's."""
    return path.removeprefix("model").removeprefix(".")


# -- walking


def test_attributes_lead_to_the_modules(net, model):
    assert model._module is net
    assert model.emb._module is net.emb
    assert model.h._module is net.h
    assert model.h[1].mlp._module is net.h[1].mlp
    assert isinstance(model.h[1].mlp, Envoy)
    assert model.h[1] is model.h[1]


def test_index_slice_iteration_and_length_are_those_of_the_list(net, model):
    assert [envoy._module for envoy in model.h] == list(net.h)
    assert len(model.h) == len(net.h)
    for index in (0, 2, -1, -3):
        assert model.h[index]._module is net.h[index]
    for part in (slice(1, None), slice(None, -1), slice(None, None, -1), slice(5, 9)):
        assert [envoy._module for envoy in model.h[part]] == list(net.h)[part]
    assert [envoy._module for envoy in reversed(model.h[:])] == list(reversed(net.h))
    for index in (3, -4):
        with pytest.raises(IndexError, match=r"`model\.h` has 3 children"):
            model.h[index]


def test_children_are_reached_by_name(net):
    net = nn.ModuleDict({"relu": nn.ReLU(), "my layer": nn.Linear(2, 2)})
    model = NNsight(net)
    assert model["my layer"]._module is net["my layer"]
    assert model.relu is model["relu"]
    with pytest.raises(KeyError, match=r"no child 'my_layer'.*Nearest: my layer"):
        model["my_layer"]


def test_index_of_a_dictionary_or_sequential_counts_children():
    net = nn.Sequential(OrderedDict(first=nn.Linear(2, 3), second=nn.ReLU()))
    model = NNsight(net)
    assert model[0]._module is net[0]
    assert model[-1]._module is net[-1]
    assert [envoy._module for envoy in model] == list(net)


def test_containment_is_by_name_and_by_envoy(model):
    assert "emb" in model
    assert "lm_heads" not in model
    assert model.emb in model
    assert model.h[0] not in model
    assert model.h[0] in model.h


def test_every_module_of_the_tree_is_named_as_torch_names_it(net, model):
    named = {torch_path(path): envoy._module for path, envoy in model.named_modules()}
    assert list(named.items()) == list(net.named_modules())
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    assert [envoy._module for envoy in model.h[0].modules()] == list(net.h[0].modules())


def test_modules_can_be_filtered_and_named(net, model):
    is_linear = lambda envoy: isinstance(envoy._module, nn.Linear)
    found = model.modules(include_fn=is_linear, names=True)
    expected = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    assert [(torch_path(path), envoy._module) for path, envoy in found] == expected
    assert model.modules(is_linear) == [envoy for _, envoy in found]


def test_path_leads_back_to_the_envoy(net, model):
    assert model.path == "model"
    assert model.h[1].mlp.path == "model.h.1.mlp"
    for path, envoy in model.named_modules():
        assert envoy.path == path
        assert model.get(path) is envoy
        assert model.get(torch_path(path)) is envoy
        assert envoy._module is net.get_submodule(torch_path(path))
    assert model.h.get("1.attn") is model.h[1].attn
    assert model.get("") is model


def test_get_reads_values_inside_a_block(net, model, x):
    with model.trace(x):
        hidden = model.get("h.0.output")
    assert torch.equal(hidden, plain(net, x).outputs["h.0"][0])


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("h.0.atn", "attn"), ("lm_heads", "lm_head"), ("h.0.attn.weights", "weight"), ("model.embs", "emb")],
)
def test_unknown_path_names_the_nearest(model, path, nearest):
    with pytest.raises(NotInTreeError, match=rf"Nearest: .*\b{nearest}\b"):
        model.get(path)
    with pytest.raises(AttributeError):
        getattr(model, path.split(".")[-1])
    assert not hasattr(model, path.split(".")[-1])


def test_module_may_be_called_model():
    net = nn.ModuleDict({"model": nn.Linear(2, 2)})
    model = NNsight(net)
    assert model.get("model")._module is net["model"]
    assert model.get("model.weight") is net["model"].weight


def test_parent_and_root(model):
    assert model.parent is None
    assert model.root is model
    assert model.h[1].mlp.parent is model.h[1]
    assert model.h[1].parent is model.h
    assert {envoy.root for envoy in model.modules()} == {model}


def test_envoy_is_true_though_it_has_no_children(model):
    assert len(model.emb) == 0
    assert model.emb
    assert list(model.emb) == []


def test_dir_has_children_and_the_modules_own_names(model):
    assert {"emb", "h", "lm_head", "output", "trace", "training", "state_dict"} <= set(dir(model))
    assert {"weight", "bias", "in_features"} <= set(dir(model.emb))


# -- devices


def test_device_and_dtype_are_those_of_the_parameters(net, model):
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert NNsight(nn.ReLU()).device is None
    assert NNsight(nn.ReLU()).dtype is None
    assert NNsight(nn.ReLU()).devices == set()
    net.lm_head.to("meta")
    assert model.devices == {torch.device("cpu"), torch.device("meta")}
    assert model.lm_head.device == torch.device("meta")
    buffered = nn.BatchNorm1d(2, affine=False)
    assert NNsight(buffered).device == torch.device("cpu")


def test_to_converts_the_module_in_place_and_returns_the_envoy(net, model, x):
    assert model.to(torch.float64) is model
    assert net.emb.weight.dtype == torch.float64
    assert model.h[0].to(dtype=torch.float64) is model.h[0]
    assert model.cpu() is model
    with model.trace(x.double()):
        hidden = model.h[0].output
    assert torch.equal(hidden, plain(net, x.double()).outputs["h.0"][0])


# -- attributes of the module


def test_attributes_of_the_module_are_read_through_the_envoy(net, model):
    assert model.emb.weight is net.emb.weight
    assert model.emb.in_features == WIDTH
    assert model.training is True
    assert model.state_dict().keys() == net.state_dict().keys()
    assert [p.shape for p in model.parameters()] == [p.shape for p in net.parameters()]


def test_parameter_set_through_the_envoy_is_the_modules(net, model, x):
    weight = nn.Parameter(torch.ones_like(net.lm_head.weight))
    model.lm_head.weight = weight
    assert net.lm_head.weight is weight
    assert dict(net.named_parameters())["lm_head.weight"] is weight
    with model.trace(x):
        hidden = model.h[2].output
        logits = model.lm_head.output
    assert torch.equal(logits, hidden @ weight.T)


def test_plain_attributes_and_buffers_set_through_the_envoy_are_the_modules():
    net = nn.BatchNorm1d(2)
    model = NNsight(net)
    model.training = False
    model.eps = 0.5
    model.running_mean = torch.ones(2)
    assert (net.training, net.eps) == (False, 0.5)
    assert torch.equal(dict(net.named_buffers())["running_mean"], torch.ones(2))
    model.train()
    assert net.training
    assert model.training


def test_attribute_that_the_module_lacks_is_the_envoys_own(net, model):
    model.note = "mine"
    assert model.note == "mine"
    assert not hasattr(net, "note")
    del model.note
    assert not hasattr(model, "note")


@pytest.mark.parametrize(("slip", "meant"), [("outptu", "output"), ("outputs", "output"), ("inpust", "inputs")])
def test_assigning_to_a_misspelt_location_in_a_block_is_an_error(net, model, x, slip, meant):
    expected = net(x)
    with model.trace(x):
        with pytest.raises(NotInTreeError, match=rf"`model.h.1` has no {slip!r} to assign to\. Nearest: .*\b{meant}\b"):
            setattr(model.h[1], slip, torch.zeros(1))
        result = model.output
    assert torch.equal(result, expected)
    assert slip not in vars(model.h[1])


def test_other_attributes_can_be_set_in_a_block(model, x):
    model.h[0].outputs = []
    with model.trace(x):
        model.h[0].outputs = [model.h[0].output]
        model.h[1].out = model.h[1].output
        model.outputs = model.output
    assert (model.h[0].outputs[0].shape, model.h[1].out.shape) == ((2, WIDTH), (2, WIDTH))
    assert model.outputs.shape == (2, 2 * WIDTH)


def test_parameter_of_the_wrong_type_is_torchs_error(net, model):
    with pytest.raises(TypeError, match="cannot assign"):
        model.emb.weight = torch.ones(1)
    assert isinstance(net.emb.weight, nn.Parameter)


def test_property_of_the_module_is_read_and_fails_as_it_does():
    class Sized(nn.Module):
        @property
        def size(self):
            return 3

        @property
        def broken(self):
            return self.missing

    model = NNsight(Sized())
    assert model.size == 3
    with pytest.raises(AttributeError, match="missing|broken"):
        model.broken


# -- changing the tree


def test_attached_module_is_in_both_trees(net, model, x):
    adapter = seeded(nn.Linear, WIDTH, WIDTH)
    model.h[0].adapter = adapter
    assert net.h[0].adapter is adapter
    assert model.h[0].adapter._module is adapter
    assert model.h[0].adapter.path == "model.h.0.adapter"
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    with model.trace(x):
        hidden = model.h[0].output
        added = model.h[0].adapter(hidden)
    assert torch.equal(added, adapter(plain(net, x).outputs["h.0"][0]))


def test_attached_module_is_called_by_the_model(x):
    def forward(net, given):
        return net.extra(net.a(given)) if hasattr(net, "extra") else net.a(given)

    net = seeded(Calls, forward)
    model = NNsight(net)
    model.extra = seeded(Block, seed=3)
    with model.trace(x) as tracer:
        inner = model.extra.mlp.output
        result = tracer.result
    expected = plain(net, x)
    assert torch.equal(inner, expected.outputs["extra.mlp"][0])
    assert torch.equal(result, expected.result)


def test_module_attached_in_an_open_run_is_seen_by_it(net, model, x):
    class Scaled(nn.Linear):
        def forward(self, given):
            return super().forward(given) * 3

    scaled = seeded(Scaled, WIDTH, 2 * WIDTH, bias=False)
    with model.trace(x) as tracer:
        hidden = model.h[0].output
        model.lm_head = scaled
        logits = model.lm_head.output
        result = tracer.result
    assert torch.equal(hidden, plain(net, x).outputs["h.0"][0])
    assert torch.equal(logits, plain(net, x).outputs["lm_head"][0])
    assert torch.equal(result, logits)
    assert_idle(net)


def test_replaced_module_keeps_its_place(net, model, x):
    old = model.emb
    model.emb = seeded(nn.Linear, WIDTH, WIDTH, seed=7)
    assert model.emb is not old
    assert [envoy._module for envoy in model] == list(net.children())
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    assert repr(model) == repr(net)
    with model.trace(x):
        out = model.emb.output
    assert torch.equal(out, plain(net, x).outputs["emb"][0])
    with pytest.raises(MissedProviderError, match="emb"), model.trace(x):
        old.output


def test_envoy_assigned_means_its_module(net, model):
    model.h[0].mlp = model.h[1].mlp
    assert net.h[0].mlp is net.h[1].mlp
    assert model.h[0].mlp is model.h[1].mlp


def test_deleted_module_is_gone_from_both_trees(net, model, x):
    attn = weakref.ref(model.h[0].attn)
    del model.h[0].attn
    assert "attn" not in dict(net.h[0].named_children())
    assert "attn" not in model.h[0]
    assert not hasattr(model.h[0], "attn")
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    gc.collect()
    assert attn() is None


def test_module_set_to_none_is_gone(net, model):
    model.emb = None
    assert net.emb is None
    assert "emb" not in model
    assert [envoy._module for envoy in model.modules()] == list(net.modules())


def test_deleting_what_is_not_there_is_an_attribute_error(model):
    with pytest.raises(AttributeError):
        del model.nothing


def test_modules_changed_on_the_torch_side_are_found(net, model, x):
    net.extra = nn.Linear(2, 2)
    net.h.append(seeded(Block, seed=5))
    del net.h[0]
    net.h[0] = seeded(Block, seed=6)
    assert model.extra._module is net.extra
    assert len(model.h) == len(net.h)
    assert [envoy._module for envoy in model.h] == list(net.h)
    assert model.h[-1]._module is net.h[-1]
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    assert repr(model) == repr(net)
    assert_usable(model, net, x)


@pytest.mark.parametrize(
    "find",
    [
        lambda model: model.h[3],
        lambda model: model.h["3"],
        lambda model: model.get("h.3"),
        lambda model: list(model.h)[3],
        lambda model: model.h[:][3],
        lambda model: model.h[-1],
        lambda model: dict(model.named_modules())["model.h.3"],
    ],
    ids=["index", "name", "get", "iteration", "slice", "negative", "modules"],
)
def test_block_appended_on_the_torch_side_is_found(net, model, x, find):
    assert len(model.h) == 3
    net.h.append(seeded(Block, seed=5))
    found = find(model)
    assert found._module is net.h[3]
    with model.trace(x):
        out = found.output
    assert torch.equal(out, plain(net, x).outputs["h.3"][0])


# -- names that the envoy has itself


class Colliding(nn.Module):
    NAMES = ("output", "input", "trace", "path", "skip")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, given):
        for name in self.NAMES:
            given = self.get_submodule(name)(given)
        return given


def test_children_with_the_envoys_names_are_reached(x):
    net = seeded(Colliding)
    model = NNsight(net)
    expected = plain(net, x)
    seen = {}
    with model.trace(x):
        for name in Colliding.NAMES:
            assert model[name] is getattr(model, f"E_{name}")
            seen[name] = getattr(model, f"E_{name}").output
        result = model.output
    for name in Colliding.NAMES:
        assert torch.equal(seen[name], expected.outputs[name][0]), name
    assert torch.equal(result, expected.result)
    assert model.path == "model"
    assert model.get("skip.weight") is net.skip.weight
    for name in Colliding.NAMES:
        assert f"({name} -> .E_{name}): Linear" in repr(model)
    assert_idle(net)


def test_child_called_output_can_be_deleted(x):
    net = seeded(Colliding)
    model = NNsight(net)
    model.E_path.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    assert not net.path.weight.any()
    del model.path
    assert "path" not in model
    assert not hasattr(model, "E_path")
    assert model.path == "model"


# -- shared modules


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.ReLU()
        self.again = self.first
        self.part = nn.ModuleDict({"inner": self.first})

    def forward(self, given):
        return self.again(self.middle(self.first(given)))


def test_shared_module_has_one_envoy(x):
    net = seeded(Shared)
    model = NNsight(net)
    assert model.first is model.again
    assert model.first is model.part.inner
    assert model.first is model.part["inner"]
    assert model.again.path == "model.first"
    assert model.get("part.inner") is model.first
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    assert "(again = model.first): Linear" in repr(model)
    with model.trace(x):
        first = model.again.output
    assert torch.equal(first, plain(net, x).outputs["first"][0])


def test_shared_module_keeps_its_envoy_when_the_name_of_its_path_goes(x):
    net = seeded(Shared)
    model = NNsight(net)
    first = model.first
    model.first = nn.Identity()
    assert model.again is first
    assert first.path == "model.again"
    assert [envoy._module for envoy in model.modules()] == list(net.modules())
    assert [torch_path(path) for path, _ in model.named_modules()] == [path for path, _ in net.named_modules()]
    with model.trace(x):
        again = first.output
    assert torch.equal(again, plain(net, x).outputs["again"][0])


def test_module_wrapped_by_another_moves_below_it(net, model, x):
    emb, block = model.emb, model.h[1]
    model.emb = nn.Sequential(emb._module, nn.ReLU())
    net.h[1] = nn.Sequential(net.h[1])
    assert model.emb[0] is emb
    assert model.h[1][0] is block
    assert block.mlp.path == "model.h.1.0.mlp"
    named = {torch_path(path): envoy._module for path, envoy in model.named_modules()}
    assert list(named.items()) == list(net.named_modules())
    with model.trace(x):
        first = emb.output
        inner = block.mlp.output
    expected = plain(net, x)
    assert torch.equal(first, expected.outputs["emb.0"][0])
    assert torch.equal(inner, expected.outputs["h.1.0.mlp"][0])


def test_shared_module_deleted_under_one_name_stays_under_the_other(x):
    net = seeded(Shared)
    model = NNsight(net)
    del model.part.inner
    assert model.again is model.first
    with model.trace(x):
        first = model.first.output
    assert torch.equal(first, plain(net, x).outputs["first"][0])


# -- how it is shown


class Titled(nn.Module):
    """Has parts, and something to say about itself."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)
        self.register_module("absent", None)

    def extra_repr(self):
        return "size=2\nkind=titled"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)

    def _get_name(self):
        return "Another"


class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)

    def __repr__(self):
        return "drawn by itself"


SHOWN = {
    "linear": lambda: nn.Linear(3, 4, bias=False),
    "relu": nn.ReLU,
    "net": Net,
    "list": lambda: nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU()]),
    "list of one": lambda: nn.ModuleList([nn.ReLU()]),
    "empty list": nn.ModuleList,
    "sequential with equal parts": lambda: nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()),
    "empty sequential": nn.Sequential,
    "dictionary": lambda: nn.ModuleDict({"a": nn.Linear(1, 1), "1": nn.ReLU(), "2": nn.ReLU()}),
    "empty dictionary": nn.ModuleDict,
    "nested lists": lambda: nn.ModuleList(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]) for _ in range(2)),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
    "lstm": lambda: nn.LSTM(2, 2, num_layers=2),
    "parameters": lambda: nn.ParameterList([torch.ones(2)]),
    "extra text and an absent part": Titled,
    "name of its own": Named,
    "repr of its own": Drawn,
    "repr of its own below": lambda: nn.Sequential(Drawn(), nn.ReLU()),
}


@pytest.mark.parametrize("make", SHOWN.values(), ids=SHOWN)
def test_repr_is_torchs(make):
    net = make()
    assert repr(NNsight(net)) == repr(net)


def test_parts_are_shown_alone(net, model):
    assert repr(model.h) == repr(net.h)
    assert repr(model.h[0]) == repr(net.h[0])
    assert str(model.lm_head) == str(net.lm_head)


# -- ownership


def test_part_without_its_root_says_what_to_do(net, x):
    part = NNsight(net).h[0]
    assert part._module is net.h[0]
    assert part.path == "model.h.0"
    for use in (lambda: part.root, lambda: part.output, lambda: part.trace(x).__enter__()):
        with pytest.raises(OrphanError, match=r"`model\.h\.0`.*Keep the wrapper in a variable"):
            use()


def test_wrapper_is_freed_without_the_cyclic_collector(net, x):
    gc.disable()
    try:
        model = NNsight(net)
        with model.trace(x):
            model.h[0].output
        freed = [weakref.ref(model), weakref.ref(model.h[0].mlp)]
        del model
        assert [reference() for reference in freed] == [None, None]
    finally:
        gc.enable()


def test_wrapping_leaves_no_trace_on_the_modules(net):
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    model = NNsight(net)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert_idle(model._module)


def test_two_wrappers_of_one_module(net, x):
    one, two = NNsight(net), NNsight(net)
    expected = plain(net, x)
    with one.trace(x):
        first = one.h[0].output
        with two.trace(x * 2):
            inner = two.h[0].output
        last = one.h[2].output
    assert torch.equal(first, expected.outputs["h.0"][0])
    assert torch.equal(inner, plain(net, x * 2).outputs["h.0"][0])
    assert torch.equal(last, expected.outputs["h.2"][0])
    with one.trace(x):
        other = two.h[1].output  # the wrapper that runs is the one that counts
    assert torch.equal(other, expected.outputs["h.1"][0])
    assert_idle(net)


def test_wrapper_of_a_part(net, model, x):
    block = NNsight(net.h[1])
    with block.trace(x):
        inner = block.mlp.output
    assert torch.equal(inner, plain(net.h[1], x).outputs["mlp"][0])
    with pytest.raises(WrapError, match="wrapped already"):
        NNsight(model.h[0])


# -- copies


class Labelled(NNsight):
    def __init__(self, module, label):
        super().__init__(module)
        self.label = label


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: reloaded(model),
}


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_is_a_wrapper_of_other_modules(net, x, duplicate):
    model = Labelled(net, "mine")
    new = duplicate(model)
    assert type(new) is Labelled
    assert new.label == "mine"
    assert repr(new) == repr(net)
    assert not {id(p) for p in new.parameters()} & {id(p) for p in net.parameters()}
    with torch.no_grad():
        new.lm_head.weight.zero_()
    with new.trace(x):
        hidden = new.h[0].mlp.output
        logits = new.lm_head.output
    assert torch.equal(hidden, plain(net, x).outputs["h.0.mlp"][0])
    assert not logits.any()
    assert_usable(model, net, x)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_made_inside_a_block_is_clean(net, model, x, duplicate):
    with model.trace(x):
        model.h[0].output
        new = duplicate(model)
        model.h[1].output
    assert_usable(new, new._module, x)
    assert_usable(model, net, x)


def test_copy_of_the_wrapper_shares_the_modules(net, model, x):
    new = model.copy_wrapper()
    assert new is not model
    assert new._module is net
    assert new.h[1].mlp is not model.h[1].mlp
    assert new.h[1].mlp._module is net.h[1].mlp
    assert new.h[1].root is new
    assert new.h[1].parent is new.h
    new.edits.append("an edit")
    assert model.edits == []
    part = model.h[1].copy_wrapper()
    assert part.path == "model.h.1"
    assert part.root is not model  # kept alive by the part
    assert_usable(model, net, x)


# -- mounting and rebinding


def test_mounted_module_has_a_location_but_is_not_the_models(net, x):
    class Collect(nn.Module):
        def forward(self, value):
            return value

    collect = Collect()
    model = NNsight(net)
    mounted = model.mount("collected", collect)
    assert model.collected is mounted
    assert mounted.path == "model.collected"
    assert repr(model) == repr(net)
    assert not hasattr(net, "collected")
    with model.trace(x, fn=lambda given: collect(net(given) * 2)):
        logits = model.lm_head.output
        value = mounted.output
    assert torch.equal(logits, net(x))
    assert torch.equal(value, net(x) * 2)


def test_rebound_tree_mirrors_the_other_module(net, model, x):
    other = seeded(Net, seed=9)
    emb, block = model.emb, model.h[1]
    model.rebind(other)
    assert model._module is other
    assert model.emb is emb
    assert model.h[1] is block
    assert [envoy._module for envoy in model.modules()] == list(other.modules())
    with model.trace(x):
        hidden = block.output
    assert torch.equal(hidden, plain(other, x).outputs["h.1"][0])
    assert_idle(net)


def test_rebound_tree_follows_a_different_shape(model, x):
    other = seeded(Net, blocks=5, seed=9)
    other.h[0].adapter = nn.Linear(1, 1)
    del other.emb
    other.emb = nn.Identity()
    gone = model.h[2]
    model.rebind(other)
    assert len(model.h) == 5
    assert model.h[2] is gone
    assert [envoy._module for envoy in model.modules()] == list(other.modules())
    with model.trace(x):
        hidden = model.h[4].mlp.output
    assert torch.equal(hidden, plain(other, x).outputs["h.4.mlp"][0])
    smaller = seeded(Net, blocks=1, seed=9)
    model.rebind(smaller)
    assert [envoy._module for envoy in model.modules()] == list(smaller.modules())


def test_tree_is_not_rebound_while_a_run_is_open(net, model, x):
    with pytest.raises(RuntimeError, match="while a trace of it is open"):
        with model.trace(x):
            model.emb.output
            model.rebind(seeded(Net, seed=9))
    assert_idle(net)
