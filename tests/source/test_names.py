"""What operations are called: calls as in nnsight 0.6.2 (the lists here are what it prints), the rest beside them."""

# ruff: noqa: E741, F841, PLW0120, RUF046, UP018
from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnsight import NNsight, NotInTreeError
from nnsight_source import Group, Operation, SourceError

X = torch.arange(4.0).reshape(2, 2) + 1


def helper(x):
    return torch.relu(x)


class Everything(nn.Module):
    """Calls of every kind of thing, wherever calls can be. It is only read, never run."""

    def forward(self, x, y=None):
        a = self.l(self.l(x))
        b = self.ls[0](a)
        c = self.d["a"](b)
        d = (lambda z: torch.tanh(z))(c)
        e = [torch.neg(r) for r in d if r.sum() > torch.zeros(())]
        f = {k: torch.abs(v) for k, v in zip("ab", e, strict=True)}

        def inner(q):
            return torch.exp(q)

        g = inner(x)
        if (n := len(e)) > 0 and torch.is_tensor(x):
            x = x + F.relu(x).sum().item()
        h = f"{torch.numel(x)} {str(x.shape)}"  # noqa: RUF010
        i = x.view(-1).view(x.size(0), -1)
        j = getattr(torch, "relu")(x)  # noqa: B009
        k = functools.partial(torch.add, x)(x)
        l = x if torch.is_tensor(x) else torch.zeros(1)
        with torch.no_grad():
            m = torch.sum(x, dim=int(0))
        for t in range(2):
            x = helper(x)
            x = helper(x)
        else:
            x = helper(x)
        try:
            x = x.add(1)
        except ValueError as err:
            raise TypeError(str(err)) from err
        finally:
            x = x.add(2)
        assert torch.is_tensor(x), str(x)
        while x.sum() > 1e9:
            x = x.div(2)
        x[torch.tensor(0)] = x[torch.tensor(1)]
        x[int(0)] += torch.ones(4)
        self.z = torch.ones(1)
        o = super().__init__
        q = [*map(torch.relu, x)]
        r = dict(a=dict(b=tuple(x)))  # noqa: C408
        s: torch.Tensor = torch.add(x, torch.mul(x, x))
        t1, (t2, *t3) = torch.split(x, 1), list(x)
        (lambda: torch.sin(x))()

        @torch.no_grad()
        def deco(z=torch.cos(x)):  # noqa: B008
            yield torch.log(z)

        u = list(deco())
        match x.shape:
            case (w, v) if torch.is_tensor(x):
                x = x.mul(1)
        v = math.sqrt(4.0)
        return torch.cat([x, *x.unbind()][:1])

    EXPECTED = """
        self_l_0 self_l_1 unknown_0 unknown_1 torch_tanh_0 unknown_2 torch_neg_0 r_sum_0 torch_zeros_0 torch_abs_0 zip_0
        torch_exp_0 inner_0 len_0 torch_is_tensor_0 F_relu_0 sum_0 item_0 torch_numel_0 str_0 x_view_0 x_size_0 view_0
        getattr_0 unknown_3 functools_partial_0 unknown_4 torch_is_tensor_1 torch_zeros_1 torch_no_grad_0 int_0
        torch_sum_0 range_0 helper_0 helper_1 helper_2 x_add_0 str_1 TypeError_0 x_add_1 torch_is_tensor_2 str_2 x_sum_0
        x_div_0 torch_tensor_0 torch_tensor_1 int_1 torch_ones_0 torch_ones_1 super_0 map_0 tuple_0 dict_0 dict_1
        torch_mul_0 torch_add_0 torch_split_0 list_0 torch_sin_0 unknown_5 torch_cos_0 torch_log_0 deco_0 list_1
        torch_is_tensor_3 x_mul_0 math_sqrt_0 x_unbind_0 torch_cat_0
    """


class Attributes(nn.Module):
    """Calls of what has no name of its own."""

    def forward(self, x):
        super().__init__
        a = self.g()(x) + self.g().__call__(x) + self.a.b.c.d(x) + x.T.sum() + (x + x).sum() + x[0].sum()
        b = x[0].T.sum() + x.f()[0].g(x) + (not x).h() + "a".join(x) + {}.get(x) + (yield x).k(x)
        return a + b + x.a(x)(x)(x) + x[self.g(x)].j(1)

    EXPECTED = """
        super_0 self_g_0 unknown_0 self_g_1 __call___0 self_a_b_c_d_0 x_T_sum_0 sum_0 sum_1 T_sum_0 x_f_0 g_0 h_0 join_0
        get_0 k_0 x_a_0 unknown_1 unknown_2 self_g_2 j_0
    """


class Alone(nn.Module):
    """Operators and a call."""

    def forward(self, x):
        return (x @ x.T) * 2 + torch.relu(x)[0]

    EXPECTED = "torch_relu_0"


@pytest.mark.parametrize("kind", [Everything, Attributes, Alone])
def test_names_of_calls(kind):
    assert NNsight(kind()).source.names == kind.EXPECTED.split()


def test_names_in_gpt2(gpt2):
    model = NNsight(gpt2)
    block = model.transformer.h[0]
    held = "curr_cache" if "curr_cache_update_0" in block.attn.source.names else "curr_past_key_values"
    given = "cache" if held == "curr_cache" else "past_key_values"
    assert (
        block.attn.source.names
        == f"""
        isinstance_0 {given}_is_updated_get_0 hasattr_0 ValueError_0 self_q_attn_0 self_c_attn_0 split_0
        key_states_view_0 transpose_0 value_states_view_0 transpose_1 self_c_attn_1 split_1 key_states_view_1
        transpose_2 value_states_view_1 transpose_3 query_states_view_0 transpose_4 {held}_update_0
        ALL_ATTENTION_FUNCTIONS_get_interface_0 self__upcast_and_reordered_attn_0 attention_interface_0
        attn_output_reshape_0 contiguous_0 self_c_proj_0 self_resid_dropout_0
    """.split()
    )
    assert block.mlp.source.names == ["self_c_fc_0", "self_act_0", "self_c_proj_0", "self_dropout_0"]
    assert block.ln_1.source.names == ["F_layer_norm_0"]


def a(x, k=1):
    return x * 2 + k


b = c = d = e = f = a


class Which(nn.Module):
    """The same function several times in one expression."""

    def forward(self, x):
        x = a(a(x, 3), a(x, 5))
        y = [b(r, 1) for r in b(x, 2) if b(r, 3).sum() > 0]
        z = c(x, 1).sum() if c(x, 2).sum() > 0 else c(x, 3)
        w = {d(x, 1).sum().item(): d(x, 2), d(x, 3).sum().item(): d(x, 4)}
        e(x, 1)[e(x, 2).sum().long() * 0] = e(x, 3)[0]
        return x.add(f(x, 1), alpha=f(x, 2).sum().item()).add(f(x, 3))


def test_counters_of_one_callee_are_those_of_0_6_2():
    """Which of several calls of one thing a name means; the numbers are the second arguments, as 0.6.2 gives them."""
    x = a(a(X, 3), a(X, 5))
    expected = {
        "a_0": a(X, 3), "a_1": a(X, 5), "a_2": x, "b_0": a(a(x, 2)[0], 1), "b_1": a(x, 2), "b_2": a(a(x, 2)[0], 3),
        "c_0": a(x, 2), "c_1": a(x, 1), "d_0": a(x, 1), "d_1": a(x, 3), "d_2": a(x, 2), "d_3": a(x, 4), "e_1": a(x, 2),
        "e_2": a(x, 3), "f_0": a(x, 1), "f_1": a(x, 2), "f_2": a(x, 3),
    }  # fmt: skip
    model = NNsight(Which())
    for name, value in expected.items():
        with model.trace(X):
            got = model.source[name].output.clone()
        assert torch.equal(got, value), name


class Kinds(nn.Module):
    def forward(self, x):
        y = x + 1
        y += x
        y, self.z = -y, x[0]
        y[0] = y[1] ** 2
        if y.ndim > 5:
            return y
        self.n: int = 3
        return (n := y @ x) * n


def test_other_kinds_have_names_of_their_own_and_shift_nothing():
    source = NNsight(Kinds()).source
    assert source.names == []
    assert source.vars.names == ["y_0", "y_1", "y_2", "self_z_0", "item_y_0", "self_n_0", "n_0"]
    assert source.ops.names == ["add_0", "neg_0", "getitem_0", "getitem_1", "pow_0", "gt_0", "matmul_0", "mul_0"]
    assert source.returns.names == ["returns[0]", "returns[1]"]
    model = NNsight(Kinds())
    seen = {}
    for name in ("y_0", "y_1", "y_2", "self_z_0", "item_y_0", "self_n_0", "n_0"):
        with model.trace(X):
            value = getattr(model.source.vars, name).output
            seen[name] = value.clone() if isinstance(value, torch.Tensor) else value
    y = -(X + 1 + X)
    assert torch.equal(seen["y_0"], X + 1)
    assert torch.equal(seen["y_1"], X + 1 + X)
    assert torch.equal(seen["y_2"], y)
    assert torch.equal(seen["self_z_0"], X[0])
    assert torch.equal(seen["item_y_0"], y[1] ** 2)
    assert seen["self_n_0"] == 3
    y[0] = y[1] ** 2
    assert torch.equal(seen["n_0"], y @ X)


def test_access_by_attribute_name_number_and_slice():
    source = NNsight(Which()).source
    assert [operation.name for operation in source] == source.names
    assert source["a_2"].name == source.a_2.name == source[2].name == source[-len(source) + 2].name == "a_2"
    assert [operation.name for operation in source[:2]] == ["a_0", "a_1"]
    assert source.returns[-1].path == "model.source.returns[0]"
    assert source.vars.y_0.path == "model.source.vars.y_0"
    assert "a_2" in source
    assert "a_3" not in source
    assert len(source.vars) == 5  # x, y, z, w, the item
    assert isinstance(source, Group)
    assert isinstance(source.a_0, Operation)
    assert source.a_0.line == Which.forward.__code__.co_firstlineno + 1


def test_completion_knows_the_names():
    source = NNsight(Which()).source
    offered = [name for name in dir(source) if not name.startswith("_")]
    assert {*source.names, "vars", "ops", "returns", "names"} <= {*offered}
    assert {"x_0", "y_0"} <= {*dir(source.vars)}
    assert not {"x_0", "a_0"} & {*dir(source.ops)}
    assert all(name.isidentifier() for name in dir(source.returns))
    offered = [name for name in dir(source.a_0) if not name.startswith("_")]
    assert {"output", "input", "inputs", "skip", "source", "name", "path", "line"} <= {*offered}


def test_what_there_is_not_is_an_error_with_the_names_there_are():
    source = NNsight(Kinds()).source
    assert not hasattr(source, "y_0")
    with pytest.raises(NotInTreeError, match=r"`model.source` has no operation 'y_0'; available: none\."):
        source.y_0
    with pytest.raises(
        NotInTreeError, match=r"no variable 'y_3' \(perhaps y_2 or .*available: y_0, y_1, y_2, self_z_0"
    ):
        source.vars.y_3
    with pytest.raises(NotInTreeError, match="has no operator 'div_0'"):
        source.ops.div_0
    with pytest.raises(KeyError, match="has no operation 'relu'"):
        source["relu"]
    with pytest.raises(IndexError, match="`model.source` has 2 of these, so there is no 2"):
        source.returns[2]
    for name in ("inputs", "input", "skip"):
        with pytest.raises(SourceError, match=rf"`model.source.vars.y_0` is the value of 'y', so it has no `.{name}`"):
            getattr(source.vars.y_0, name) if name != "skip" else source.vars.y_0.skip(1)
    with pytest.raises(SourceError, match="is no call, so there is nothing inside it"):
        source.ops.add_0.source
    with pytest.raises(AttributeError, match=r"`model.source.y` cannot be assigned to: assign to its `.output`"):
        source.y = 3
    with pytest.raises(AttributeError):
        source.ops.add_0.outputs = 3


class Shown(nn.Module):
    def forward(self, x):
        # twice
        y = torch.relu(torch.neg(x))
        z = torch.add(
            y,
            alpha=2,
            other="ä" and x,
        )
        return z * 2


SHOWN = """\
                 * def forward(self, x):
                 0     # twice
 torch_neg_0  -> 1     y = torch.relu(torch.neg(x))
 torch_relu_0 -> +     ...
 torch_add_0  -> 2     z = torch.add(
                 3         y,
                 4         alpha=2,
                 5         other="ä" and x,
                 6     )
                 7     return z * 2
 also: 2 in .vars, 1 in .ops, 1 in .returns"""
VARIABLES = """\
        * def forward(self, x):
        0     # twice
 y_0 -> 1     y = torch.relu(torch.neg(x))
 z_0 -> 2     z = torch.add(
        3         y,
        4         alpha=2,
        5         other="ä" and x,
        6     )
        7     return z * 2"""
MARKED = """\
model.source.torch_add_0 (FILE:LINE):

        def forward(self, x):
            # twice
            y = torch.relu(torch.neg(x))
            z = --> torch.add(
                y,
                alpha=2,
                other="ä" and x,
            ) <--
            return z * 2"""


def test_printed_source_has_names_and_lines():
    source = NNsight(Shown()).source
    assert str(source) == SHOWN
    assert str(source.vars) == VARIABLES


def test_printed_operation_is_marked_in_its_surroundings():
    source = NNsight(Shown()).source
    line = Shown.forward.__code__.co_firstlineno + 3
    assert str(source.torch_add_0) == MARKED.replace("FILE", __file__).replace("LINE", str(line))
    assert "y = torch.relu(--> torch.neg(x) <--)" in str(source.torch_neg_0)
    assert "--> y = torch.relu(torch.neg(x)) <--" in str(source.vars.y_0)
    assert "return --> z * 2 <--" in str(source.ops.mul_0)
    assert "--> return z * 2 <--" in str(source.returns[0])


def test_a_long_function_is_shown_around_an_operation():
    shown = str(NNsight(Everything()).source.x_add_0)
    assert shown.count("    ....") == 2
    assert "--> x.add(1) <--" in shown
    assert len(shown.splitlines()) == 15
