"""Heads as a view on real attention modules: what a block reads and writes is what hooks by hand do."""

import pytest
import torch
import zoo

from nnsight import Envoy, LanguageModel, OutOfOrderError, ViewError, eproperty

IDS = torch.tensor([[5, 17, 99, 3, 42, 8], [7, 7, 120, 64, 9, 31]])
HEADS, WIDTH = 4, 8


class Attention(Envoy):
    """An attention module, with what each head gives before they are mixed."""

    def split(self, value):
        return value.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def join(self, view, value):
        return view.transpose(1, 2).flatten(-2)


def of(projection):
    class OfHeads(Attention):
        heads = eproperty(
            f"{projection}.input", view=Attention.split, inverse=Attention.join, description="(B, H, T, D), per head"
        )

        #: the same, but as a copy: what is done to it is put back
        copied = eproperty(
            f"{projection}.input",
            view=lambda self, value: self.split(value).clone(),
            inverse=Attention.join,
        )

    return OfHeads


#: architecture -> the output projection of an attention module
PROJECTIONS = {
    "gpt2": "c_proj", "gpt_neox": "dense", "opt": "out_proj", "bloom": "dense", "llama": "o_proj", "qwen3": "o_proj",
    "gemma2": "o_proj", "mixtral": "o_proj", "gpt_oss": "o_proj",
}  # fmt: skip


def wrap(name):
    plain = zoo.build(name)
    attention = of(PROJECTIONS[name])
    return plain, LanguageModel(plain, standard_names=True, envoys={"layers.*.self_attn": attention})


def run_hooked(plain, model, layer, change=None, ids=IDS, **options):
    """Run with a pre-hook on the output projection; return what it was given first, and the result."""
    projection = model.layers[layer].self_attn.get(PROJECTIONS[plain.config.model_type])._module
    seen = []

    def hook(_module, args):
        seen.append(args[0].clone())
        return None if change is None else (change(args[0].clone()),)

    handle = projection.register_forward_pre_hook(hook)
    with torch.no_grad():
        result = plain.generate(ids, **options) if options else plain(ids).logits
    handle.remove()
    return seen[0], result


def third_off(value):
    value[..., 2 * WIDTH : 3 * WIDTH] = 0
    return value


@pytest.mark.parametrize("name", PROJECTIONS)
def test_heads_are_read_and_edited(name):
    plain, model = wrap(name)
    value, expected = run_hooked(plain, model, 1, third_off)
    with torch.no_grad(), model.trace(IDS):
        heads = model.layers[1].self_attn.heads
        before = heads.clone()
        heads[:, 2] = 0
        result = model.output.logits
    assert before.shape == (2, HEADS, 6, WIDTH)
    for head in range(HEADS):
        assert torch.equal(before[:, head], value[..., head * WIDTH : (head + 1) * WIDTH])
    assert torch.equal(result, expected) and not torch.equal(result, run_hooked(plain, model, 1)[1])


@pytest.mark.parametrize("name", PROJECTIONS)
def test_heads_are_assigned_and_edited_as_copies(name):
    plain, model = wrap(name)
    _, expected = run_hooked(plain, model, 1, third_off)
    off = torch.ones(1, HEADS, 1, 1)
    off[:, 2] = 0
    with torch.no_grad():
        with model.trace(IDS):
            model.layers[1].self_attn.heads = model.layers[1].self_attn.heads * off
            assigned = model.output.logits
        with model.trace(IDS):
            model.layers[1].self_attn.copied[:, 2] = 0
            edited = model.output.logits
    assert torch.equal(assigned, expected) and torch.equal(edited, expected)


def test_an_invoke_sees_and_edits_the_heads_of_its_rows():
    plain, model = wrap("llama")
    value, whole = run_hooked(plain, model, 1)
    _, off = run_hooked(plain, model, 1, third_off)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            model.layers[1].self_attn.heads[:, 2] = 0
            first = model.output.logits
        with tracer.invoke(IDS[1:]):
            heads = model.layers[1].self_attn.heads
            second = model.output.logits
    assert heads.shape == (1, HEADS, 6, WIDTH)
    assert torch.equal(heads[0, 1], value[1, :, WIDTH : 2 * WIDTH])
    assert torch.equal(first, off[:1]) and torch.equal(second, whole[1:])


def test_heads_at_every_step_of_a_generation():
    plain, model = wrap("gpt2")
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    _, expected = run_hooked(plain, model, 2, third_off, IDS, **options)
    shapes = []
    with model.generate(IDS, **options) as tracer:
        for _ in tracer.iter[:]:
            heads = model.layers[2].self_attn.heads
            heads[:, 2] = 0
            shapes.append(tuple(heads.shape))
        result = tracer.result
    assert shapes == [(2, HEADS, 6, WIDTH)] + [(2, HEADS, 1, WIDTH)] * 3
    assert torch.equal(result, expected)


def test_gradients_reach_the_heads():
    plain, model = wrap("llama")
    with model.trace(IDS):
        heads = model.layers[1].self_attn.heads
        with model.output.logits.sum().backward():
            gradient = heads.grad
    seen = []
    projection = plain.model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    loss = plain(IDS).logits.sum()
    handle.remove()
    (expected,) = torch.autograd.grad(loss, seen)
    plain.zero_grad()
    assert gradient.shape == (2, HEADS, 6, WIDTH)
    torch.testing.assert_close(gradient.transpose(1, 2).flatten(-2), expected)


def test_wrong_shape_and_wrong_order_say_where():
    plain, model = wrap("gpt2")
    where = r"`model\.transformer\.h\.1\.attn\.heads`, a view of `model\.transformer\.h\.1\.attn\.c_proj\.input`"
    with pytest.raises(ViewError, match=where + r".* \(2, 4, 6, 8\).* \(2, 6, 4, 8\)"), model.trace(IDS):
        model.layers[1].self_attn.heads = torch.zeros(2, 6, HEADS, WIDTH)
    late = r"`model\.transformer\.h\.0\.attn\.c_proj\.input` \(`model\.layers\.0\.self_attn\.c_proj\.input`\)"
    with pytest.raises(OutOfOrderError, match=late), model.trace(IDS):
        model.layers[1].output
        model.layers[0].self_attn.heads
    with torch.no_grad(), model.trace(IDS):
        result = model.output.logits
    assert torch.equal(result, run_hooked(plain, model, 1)[1])
