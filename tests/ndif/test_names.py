"""Names that the user gave to modules are known to a block in a runner."""

import pytest
import torch

from nnsight import LanguageModel, OutOfOrderError

NAMES = {
    "transformer": "model",
    "h": "layers",
    "model.layers": "layers",
    "attn": "self_attn",
    "transformer.h.*.mlp": "ffn",
}


@pytest.fixture(scope="module")
def named(gpt):
    return LanguageModel(gpt._module, rename=NAMES)


def test_values_are_read_and_written_under_other_names(named, ids):
    plain = named._module
    seen = []
    handles = [
        plain.transformer.h[0].attn.register_forward_hook(lambda _module, _args, output: seen.append(output[0])),
        plain.transformer.h[1].mlp.register_forward_hook(lambda _module, _args, output: output * 0),
    ]
    expected = plain(ids).logits
    for handle in handles:
        handle.remove()
    with named.trace(ids, remote="local"):
        attended = named.layers[0].self_attn.output[0].save()
        named.model.layers[1].ffn.output[:] = 0
        logits = named.output.logits.save()
    assert torch.equal(attended, seen[0]) and torch.equal(logits, expected)


def test_standard_names_are_known(gpt, ids):
    model = LanguageModel(gpt._module, standard_names=True)
    with model.trace(ids, remote="local"):
        normed = model.ln_final.output.save()
        logits = model.lm_head.output.save()
    assert torch.equal(logits, gpt._module.lm_head(normed))


def test_errors_say_the_name(named, ids):
    with pytest.raises(OutOfOrderError, match=r"\(`model\.layers\.0\.output`\)"):
        with named.trace(ids, remote="local"):
            named.layers[1].output
            named.layers[0].output


def test_original_names_stay_valid_and_absent_ones_are_absent(named, ids):
    with named.trace(ids, remote="local"):
        hidden = named.transformer.h[0].attn.output[0].save()
        found = [hasattr(named, "layers"), hasattr(named, "blocks")].save()
    assert hidden.shape == (2, 5, 32) and found == [True, False]
