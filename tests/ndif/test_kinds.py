"""A model's own classes in a runner: envoys with views and methods, subclasses of the wrapper, what they keep."""

from __future__ import annotations

import io

import pytest
import torch

from nnsight import Envoy, LanguageModel, NNsight, UnsendableError, eproperty, save

both = pytest.mark.parametrize("remote", [False, "local"])
SCALE = 3


class Attention(Envoy):
    factor = 2

    @eproperty(key="c_proj.input", description="(B, H, T, D), per head")
    def heads(self, value):
        return value.unflatten(-1, (4, -1)).transpose(1, 2)

    @heads.inverse
    def from_heads(self, view, value):
        return view.transpose(1, 2).flatten(-2)

    def scaled(self):
        return self.output[0] * self.factor * SCALE

    @property
    def first(self):
        return self.output[0][0]


class Lens(LanguageModel):
    def lens(self, hidden):
        return self.lm_head(self.transformer.ln_f(hidden))

    @property
    def middle(self):
        return self.transformer.h[1]


def ablated(plain, ids, head):
    """The logits and heads of the first layer where one head is zero."""
    seen = []

    def zero(_module, args):
        heads = args[0].unflatten(-1, (4, -1)).clone()
        seen.append(heads.transpose(1, 2).clone())
        heads[:, :, head] = 0
        return (heads.flatten(-2),)

    handle = plain.transformer.h[0].attn.c_proj.register_forward_pre_hook(zero)
    logits = plain(ids).logits
    handle.remove()
    return logits, seen[0]


@both
def test_views_of_an_envoy_class_are_read_and_written(gpt, ids, remote):
    model = LanguageModel(gpt._module, envoys={"attn": Attention})
    expected, seen = ablated(gpt._module, ids, 1)
    with model.trace(ids, remote=remote):
        heads = save(model.transformer.h[0].attn.heads.clone())
        model.transformer.h[0].attn.heads[:, 1] = 0
        edited = save(model.output.logits)
    torch.testing.assert_close([heads, edited], [seen, expected])
    mask = torch.ones(1, 4, 1, 1)
    mask[:, 1] = 0
    with model.trace(ids, remote=remote):
        model.transformer.h[0].attn.heads = model.transformer.h[0].attn.heads * mask
        assigned = save(model.output.logits)
    torch.testing.assert_close(assigned, expected)


@both
def test_methods_and_properties_of_an_envoy_class(gpt, ids, remote):
    model = LanguageModel(gpt._module, envoys={"attn": Attention})
    with model.trace(ids, remote=remote):
        attention = model.transformer.h[1].attn
        output = save(attention.output[0])
        found = save([attention.scaled(), attention.first])
        told = save([type(attention).__name__, isinstance(attention, Attention), isinstance(model.lm_head, Attention)])
    assert torch.equal(found[0], output * 6) and torch.equal(found[1], output[0])
    assert told == ["Attention", True, False]


@both
def test_subclass_of_the_wrapper_has_its_methods(gpt, ids, remote):
    model = Lens(gpt._module)
    with model.trace(ids, remote=remote):
        early = save(model.lens(model.middle.output))
        is_own = save(isinstance(model, Lens))
    plain = gpt._module
    hidden = plain(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(early, plain.lm_head(plain.transformer.ln_f(hidden)))
    assert is_own is True


@both
def test_what_the_user_keeps_on_envoys_is_there(gpt, ids, remote):
    model = LanguageModel(gpt._module)
    model.layer, model.vector, model.transformer.h[0].note = 1, torch.full((32,), 2.0), {"words": ["a", None]}
    with model.trace(ids, remote=remote):
        hidden = save(model.transformer.h[model.layer].output * model.vector)
        note = save(model.transformer.h[0].note["words"])
        with pytest.raises(AttributeError):
            model.transformer.h[0].nothing
    expected = gpt._module(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(hidden, expected * 2) and note == ["a", None]


def test_class_that_cannot_travel_is_told_where_it_is_needed(net, x):
    log = io.StringIO()

    class Logging(Envoy):
        def told(self):
            log.write("told")
            return self.output

    model = NNsight(net._module, envoys={torch.nn.ReLU: Logging})
    with model.trace(x, remote="local"):
        result = save(model.output)
    assert torch.equal(result, net._module(x))
    with pytest.raises(NotImplementedError, match=r"`model\.1` has no 'told' in a runner.*StringIO"):
        with model.trace(x, remote="local"):
            model[1].told()
    with pytest.raises(UnsendableError, match="'log'"):
        with model.trace(x, remote="local"):
            log.write(str(model[1].output))
