"""Programs of 0.6 and 0.7 that read and change values of a language model, and the inputs that they give it."""

from __future__ import annotations

import pytest
import torch

PROMPT = "The Eiffel Tower is in the city of"
PROMPTS = ["The Eiffel Tower is in the city of", "Berlin"]


def plain_logits(plain, tokenizer, prompts):
    encoding = tokenizer(prompts, return_tensors="pt", padding=True)
    positions = (encoding["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return plain(**encoding, position_ids=positions).logits, encoding["attention_mask"].bool()


def forms(tokenizer):
    one = tokenizer(PROMPT).input_ids
    return {
        "string": (PROMPT, PROMPT),
        "list": (PROMPTS, PROMPTS),
        "dict": ({"input_ids": torch.tensor([one])}, PROMPT),
        "BatchEncoding": (tokenizer(PROMPTS, return_tensors="pt", padding=True), PROMPTS),
        "1-D tensor": (torch.tensor(one), PROMPT),
        "2-D tensor": (torch.tensor([one]), PROMPT),
    }


@pytest.mark.parametrize("form", ["string", "list", "dict", "BatchEncoding", "1-D tensor", "2-D tensor"])
def test_inputs(form, model, plain, tokenizer):
    given, prompts = forms(tokenizer)[form]
    with torch.no_grad():
        with model.trace(given):
            ids = model.inputs[1]["input_ids"].save()
            logits = model.output.logits.save()
    expected, is_token = plain_logits(plain, tokenizer, [prompts] if isinstance(prompts, str) else prompts)
    assert torch.equal(ids, tokenizer(prompts, return_tensors="pt", padding=True).input_ids.reshape(ids.shape))
    assert torch.allclose(logits[is_token], expected[is_token], atol=1e-4)


def test_edits_of_every_kind_in_one_trace(model, plain, tokenizer, hooked):
    vector = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        with model.trace(PROMPT):
            model.transformer.wte.output[:, 0] = 0
            model.transformer.h[1].output[:, -1] += vector
            model.transformer.h[2].attn.output = (
                model.transformer.h[2].attn.output[0] * 2,
                *model.transformer.h[2].attn.output[1:],
            )
            hs = model.transformer.h[3].output
            hs[0, 2][:] = vector
            model.transformer.h[4].input = model.transformer.h[4].input * 0.5
            model.transformer.h[5].mlp.output[:, [1, 3]] = torch.tensor(3.0)
            logits = model.lm_head.output.save()

        def change(index, value, add=False):
            def hook(module, args, output):
                if add:
                    output[index] += value
                else:
                    output[index] = value

            return hook

        hooks = {
            "transformer.wte": change((slice(None), 0), 0),
            "transformer.h.1": change((slice(None), -1), vector, add=True),
            "transformer.h.2.attn": lambda module, args, output: (output[0] * 2, *output[1:]),
            "transformer.h.3": lambda module, args, output: (
                change((0, 2), vector)(module, args, output) or output * 0.5
            ),
            "transformer.h.5.mlp": change((slice(None), [1, 3]), 3.0),
        }
        with hooked(plain, hooks):
            expected = plain(**tokenizer(PROMPT, return_tensors="pt")).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_layers_skipped_one_after_another(model, plain, tokenizer):
    with torch.no_grad():
        with model.trace(PROMPT):
            hidden = model.transformer.h[3].output
            for layer in model.transformer.h[4:]:
                layer.skip(hidden)
            logits = model.output.logits.save()
        states = plain(**tokenizer(PROMPT, return_tensors="pt"), output_hidden_states=True).hidden_states
        assert torch.allclose(logits, plain.lm_head(plain.transformer.ln_f(states[4])), atol=1e-4)
