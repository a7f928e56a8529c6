"""Into what a call calls: functions, methods, submodules, decorated and wrapped ones, as deep as there is Python."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import zoo
from torch import nn

from nnsight import NNsight, OutOfOrderError
from nnsight_source import SourceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def deepest(x):
    return torch.sigmoid(x)


def deeper(x):
    return deepest(x) + 1


def deep(x, times=2):
    for _ in range(times):
        x = deeper(x)
    return x


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 10

    return wrapper


@logged
def decorated(x):
    return torch.cos(x)


def first_choice(x):
    return torch.sin(x)


def second_choice(x):
    return torch.tan(x)


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return torch.add(x, self.by)

    def method(self, x):
        return torch.sub(x, self.by)

    @classmethod
    def of_class(cls, x):
        return torch.neg(x)

    @staticmethod
    def static(x):
        return torch.abs(x)


class Part(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.parts, self.shift = Part(), nn.ModuleList([Part(), Part()]), Shift(3)
        self.partial = functools.partial(deep, times=1)

    def helped(self, x):
        return self._norm(x) * 2

    def _norm(self, x):
        return torch.rsqrt(x.pow(2) + 1)

    @property
    def chosen(self):
        return first_choice if self.training else second_choice

    def forward(self, x):
        x = deep(x)
        x = decorated(x)
        x = self.helped(x)
        x = self.shift(x)
        x = self.shift.method(x)
        x = Shift.of_class(x)
        x = self.shift.static(x)
        x = self.partial(x)
        x = self.part(x)
        for part in self.parts:
            x = part(x)
        function = self.chosen
        x = function(x)
        choices = {"a": first_choice}
        return choices["a"](x)


def by_hand(net, x=X):
    found = {"deepest": [], "deeper": []}
    for _ in range(2):
        found["deepest"].append(torch.sigmoid(x))
        x = found["deepest"][-1] + 1
        found["deeper"].append(x)
    found["cos"] = torch.cos(x)
    x = found["cos"] * 10
    found["rsqrt"] = torch.rsqrt(x.pow(2) + 1)
    found["add"] = found["rsqrt"] * 2 + 3
    found["sub"] = found["add"] - 3
    found["neg"] = -found["sub"]
    found["abs"] = found["neg"].abs()
    found["partial"] = torch.sigmoid(found["abs"])
    found["tanh"] = [torch.tanh(found["partial"] + 1)]
    for _ in range(2):
        found["tanh"].append(torch.tanh(found["tanh"][-1]))
    found["chosen"] = torch.sin(found["tanh"][-1]) if net.training else torch.tan(found["tanh"][-1])
    found["last"] = torch.sin(found["chosen"])
    return found


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def model(net):
    return NNsight(net)


INSIDE = {
    "function": (lambda s: s.deep_0.source.deeper_0, lambda f: f["deeper"][0]),
    "three deep": (lambda s: s.deep_0.source.deeper_0.source.deepest_0, lambda f: f["deepest"][0]),
    "four deep": (
        lambda s: s.deep_0.source.deeper_0.source.deepest_0.source.torch_sigmoid_0, lambda f: f["deepest"][0],
    ),
    "decorated": (lambda s: s.decorated_0.source.torch_cos_0, lambda f: f["cos"]),
    "method of a method": (lambda s: s.self_helped_0.source.self__norm_0.source.torch_rsqrt_0, lambda f: f["rsqrt"]),
    "callable object": (lambda s: s.self_shift_0.source.torch_add_0, lambda f: f["add"]),
    "method of another object": (lambda s: s.self_shift_method_0.source.torch_sub_0, lambda f: f["sub"]),
    "class method": (lambda s: s.Shift_of_class_0.source.torch_neg_0, lambda f: f["neg"]),
    "static method": (lambda s: s.self_shift_static_0.source.torch_abs_0, lambda f: f["abs"]),
    "partial": (lambda s: s.self_partial_0.source.deeper_0.source.deepest_0, lambda f: f["partial"]),
    "submodule": (lambda s: s.self_part_0.source.torch_tanh_0, lambda f: f["tanh"][0]),
    "submodule of a loop": (lambda s: s.part_0.source.torch_tanh_0, lambda f: f["tanh"][1]),
    "chosen as it runs": (lambda s: s.function_0.source.torch_tan_0, lambda f: f["chosen"]),
    "out of a dict": (lambda s: s.unknown_0.source.torch_sin_0, lambda f: f["last"]),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_inside_a_call(net, model, name):
    net.eval()
    operation, expected = INSIDE[name]
    with model.trace(X) as tracer:
        got = operation(model.source).output
        result = tracer.result
    assert torch.equal(got, expected(by_hand(net)))
    assert torch.equal(result, net(X))


@pytest.mark.parametrize("name", INSIDE)
def test_edit_inside_a_call_reaches_the_result(net, model, name):
    net.eval()
    operation, _ = INSIDE[name]
    with model.trace(X) as tracer:
        operation(model.source).output = torch.full((2, 4), 0.25)
        edited = tracer.result
    with model.trace(X) as tracer:
        value = operation(model.source).output
        value.copy_(torch.full((2, 4), 0.25))
        again = tracer.result
    assert torch.equal(edited, again)
    assert not torch.equal(edited, net(X))


def test_function_that_is_really_called_is_looked_into(net, model):
    with model.trace(X):
        model._module.train()
        names = model.source.function_0.source.names
    assert names == ["torch_sin_0"]
    net.eval()
    with model.trace(X):
        names = model.source.function_0.source.names
    assert names == ["torch_tan_0"]


def test_submodule_points_to_the_submodule(net, model):
    assert str(model.source.self_part_0.source) == str(model.part.source)
    with model.trace(X):
        assert model.source.self_part_0.source.torch_tanh_0.path == "model.part.source.torch_tanh_0"
        inside = model.source.part_0.source
        assert inside.torch_tanh_0.path == "model.parts.0.source.torch_tanh_0"


def test_submodule_of_a_later_turn(model):
    with model.trace(X) as tracer:
        for _ in tracer.iter[1]:
            inside = model.source.part_0.source
    assert inside.torch_tanh_0.path == "model.parts.1.source.torch_tanh_0"


def test_turns_of_what_a_call_calls(net, model):
    with model.trace(X) as tracer:
        inside = model.source.deep_0.source
        deeper = [inside.deeper_0.output for _ in tracer.iter[:2]]
        cos = model.source.decorated_0.source.torch_cos_0.output
    assert all(map(torch.equal, deeper, by_hand(net)["deeper"]))
    assert torch.equal(cos, by_hand(net)["cos"])


def test_source_kept_from_one_turn_serves_the_next(net, model):
    with model.trace(X) as tracer:
        seen = []
        for _ in tracer.iter[:2]:
            seen.append(model.source.deep_0.source.deeper_0.source.deepest_0.output)
            break
        inside = model.source.deep_0.source.deeper_0.source
        with tracer.iter[1]:
            seen.append(inside.deepest_0.output)
    assert all(map(torch.equal, seen, by_hand(net)["deepest"]))


def test_outer_call_is_read_after_what_is_inside(net, model):
    with model.trace(X):
        inside = model.source.self_helped_0.source
        rsqrt = inside.self__norm_0.output
        helped = model.source.self_helped_0.output
        with pytest.raises(OutOfOrderError, match=re.escape("`model.source.self_helped_0.source.self__norm_0.output`")):
            inside.self__norm_0.output
    assert torch.equal(helped, rsqrt * 2)


def test_names_are_known_outside_a_block_where_the_source_tells(model):
    source = model.source
    assert source.deep_0.source.names == ["range_0", "deeper_0"]
    assert source.deep_0.source.deeper_0.source.deepest_0.source.names == ["torch_sigmoid_0"]
    assert source.decorated_0.source.names == ["torch_cos_0"]
    assert source.self_helped_0.source.self__norm_0.source.names == ["x_pow_0", "torch_rsqrt_0"]
    assert source.self_shift_0.source.names == ["torch_add_0"]
    assert source.self_part_0.source.names == ["torch_tanh_0"]
    with pytest.raises(
        SourceError, match=r"calls .`function`. is known only at the moment of the call.*inside a trace"
    ):
        source.function_0.source
    with pytest.raises(SourceError, match="calls .`an expression`. is known only"):
        source.unknown_0.source


def test_what_has_no_python_source_says_so(model):
    with model.trace(X):
        with pytest.raises(SourceError, match=r"source of `tanh` is unavailable: it is not written in Python"):
            model.part.source.torch_tanh_0.source
    with pytest.raises(SourceError, match="source of `dict` is unavailable: it is a class"):

        class Makes(nn.Module):
            def forward(self, x):
                return dict(x=x)["x"]  # noqa: C408

        NNsight(Makes()).source.dict_0.source


def test_module_that_is_not_in_the_model_says_so():
    loose = Part()

    class Calls(nn.Module):
        def forward(self, x):
            return loose(x)

    model = NNsight(Calls())
    with model.trace(X):
        with pytest.raises(SourceError, match=r"`model.source.loose_0` calls a module that is not in the model"):
            model.source.loose_0.source
        got = model.source.loose_0.output
    assert torch.equal(got, torch.tanh(X))


def test_attention_of_gpt2_down_to_torch(gpt2, ids):
    model = NNsight(gpt2)
    attn = model.transformer.h[1].attn
    with torch.no_grad(), model.trace(ids) as tracer:
        inside = attn.source.attention_interface_0.source
        heads = inside.torch_nn_functional_scaled_dot_product_attention_0.output
        merged = attn.source.attention_interface_0.output[0]
        result = tracer.result.logits
    assert torch.equal(heads.transpose(1, 2), merged)
    assert torch.equal(result, gpt2(ids).logits)


@pytest.mark.parametrize("name", ["nn_functional_dropout_0", "nn_functional_softmax_0"])
def test_attention_written_in_python(ids, name):
    eager = zoo.build("llama", attn_implementation="eager")
    model = NNsight(eager)
    with torch.no_grad():
        expected = eager(ids, output_attentions=True).attentions
        with model.trace(ids):
            pattern = getattr(model.model.layers[1].self_attn.source.attention_interface_0.source, name).output
    assert torch.equal(pattern, expected[1])


def test_norm_of_gemma(ids):
    gemma = zoo.build("gemma2")
    model = NNsight(gemma)
    norm = gemma.model.layers[0].input_layernorm
    with torch.no_grad(), model.trace(ids):
        hidden = model.model.layers[0].input_layernorm.input
        scale = model.model.layers[0].input_layernorm.source.self__norm_0.source.torch_rsqrt_0.output
    assert torch.equal(scale, torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + norm.eps))
