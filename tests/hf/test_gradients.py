"""Gradients in a language model: heads, invokes that are padded, frozen models, and `generate`, which has none."""

import pytest
import torch

import nnsight

TEXT = "The Eiffel Tower is in"


@pytest.fixture(autouse=True)
def _clean(model):
    yield
    model._module.requires_grad_(True)
    model._module.zero_grad()


def retained(plain, tokenizer, path, text, change=None):
    """Return the gradient of a module's output for the sum of the last logits, and what another weight's is."""
    kept = []

    def keep(_module, _args, output):
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        if change is not None:
            output.register_hook(change)
        kept.append(output)

    handle = plain.get_submodule(path).register_forward_hook(keep)
    try:
        plain(**tokenizer(text, return_tensors="pt")).logits[:, -1].sum().backward()
        return kept[0].grad, plain.transformer.h[0].mlp.c_fc.weight.grad.clone()
    finally:
        handle.remove()
        plain.zero_grad()


def test_heads_as_views_of_a_fused_projection(model, plain, tokenizer):
    heads, width = plain.config.n_head, plain.config.n_embd

    def queries(value):
        return value.split(width, dim=2)[0].unflatten(-1, (heads, -1)).transpose(1, 2)

    def change(gradient):
        gradient = gradient.clone()
        queries(gradient)[:, 0] = 0
        return gradient

    path = "transformer.h.1.attn.c_attn"
    expected, _ = retained(plain, tokenizer, path, TEXT)
    _, weight = retained(plain, tokenizer, path, TEXT, change)
    model._module.zero_grad()  # the model is shared, and another test may have left gradients
    with model.trace(TEXT):
        fused = model.transformer.h[1].attn.c_attn.output
        with model.output.logits[:, -1].sum().backward():
            one = queries(fused).grad
            found = one.clone()
            one[:, 0] = 0
    assert torch.allclose(found, queries(expected), atol=1e-5)
    assert torch.allclose(model._module.transformer.h[0].mlp.c_fc.weight.grad, weight, atol=1e-5)


def test_invokes_of_different_lengths(model, plain, tokenizer):
    texts = ["Hello", TEXT]
    found = []
    with model.trace() as tracer:
        for text in texts:
            with tracer.invoke(text):
                hidden = model.transformer.h[2].output
                with model.output.logits[:, -1].sum().backward(retain_graph=True):
                    found.append(hidden.grad)
    for text, gradient in zip(texts, found, strict=True):
        expected, _ = retained(plain, tokenizer, "transformer.h.2", text)
        count = expected.shape[1]  # padding is on the left
        assert torch.allclose(gradient[:, -count:], expected, atol=1e-4)


def test_activations_of_a_frozen_model(model, plain, tokenizer):
    expected, _ = retained(plain, tokenizer, "transformer.h.2", TEXT)
    model._module.requires_grad_(False)
    with model.trace(TEXT):
        model.transformer.h[0].output.requires_grad = True
        hidden = model.transformer.h[2].output
        with model.output.logits[:, -1].sum().backward():
            found = hidden.grad
    assert torch.allclose(found, expected, atol=1e-5)
    assert model._module.lm_head.weight.grad is None


def test_generate_has_no_graph_and_the_error_says_so(model):
    with model.generate(TEXT, max_new_tokens=2):
        with pytest.raises(nnsight.NoGraphError, match=r"does not require grad.*`generate` does.*Use `trace`"):
            with model.lm_head.output.sum().backward():
                pass
    with model.trace(TEXT):
        with model.output.logits.sum().backward():
            pass
    assert model._module.lm_head.weight.grad is not None
