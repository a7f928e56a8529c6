"""Transformers with `gradient_checkpointing_enable()`: traced gradients are those of the same model without."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nnsight

IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))


def gpt2():
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config)


PARTS = {gpt2: ("transformer.h", "ln_1", "attn"), llama: ("model.layers", "input_layernorm", "self_attn")}


def layers_of(model, make):
    return model.get(PARTS[make][0])


def part(layer, make, index):
    return getattr(layer, PARTS[make][index])


def in_attention(layers, make):
    attention = part(layers[1], make, 2)
    attention.output = (attention.output[0] * 2, *attention.output[1:])


def in_source(layers, make):
    call = part(layers[1], make, 2).source.attention_interface_0
    mixed, weights = call.output
    call.output = (mixed * 2, weights)


def below_source(layers, make):
    call = part(layers[1], make, 2).source.attention_interface_0
    inside = call.source.torch_nn_functional_scaled_dot_product_attention_0
    inside.output = inside.output * 2
    layers[1].mlp.output *= 2


EDITS = {
    "none": lambda layers, make: None,
    "output in place": lambda layers, make: layers[1].output[:, 0].zero_(),
    "output replaced": lambda layers, make: setattr(layers[1], "output", layers[1].output * 2),
    "mlp in place": lambda layers, make: layers[1].mlp.output.mul_(3),
    "input in place": lambda layers, make: layers[1].input[:, 0].fill_(2),
    "norm input in place": lambda layers, make: part(layers[1], make, 1).input.mul_(2),
    "attention replaced": in_attention,
    "operation replaced": in_source,
    "operation of an operation replaced": below_source,
    "mlp skipped": lambda layers, make: layers[1].mlp.skip(torch.ones(2, 5, 16)),
}


def gradients(make, edit, enable, is_traced):
    torch.manual_seed(0)
    net = make().train()  # with dropout
    if enable is not None:
        net.gradient_checkpointing_enable(**enable)
    model = nnsight.NNsight(net)
    torch.manual_seed(1)
    with model.trace(IDS, labels=IDS, use_cache=False):
        layers = layers_of(model, make)
        edit(layers, make)
        late = layers[2].mlp.output
        loss = model.output.loss
        if is_traced:
            with loss.backward():
                late.grad = late.grad * 2
    if not is_traced:
        loss.backward()
    return {name: one.grad for name, one in net.named_parameters()}, loss.detach()


@pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "plain, after the trace"])
@pytest.mark.parametrize(
    "enable",
    [{}, *({"gradient_checkpointing_kwargs": {"use_reentrant": flag}} for flag in (False, True))],
    ids=["default", "non-reentrant", "reentrant"],
)
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("make", PARTS)
def test_gradients_are_those_without_checkpointing(make, name, enable, is_traced):
    expected, loss = gradients(make, EDITS[name], None, is_traced)
    found, again = gradients(make, EDITS[name], enable, is_traced)
    assert torch.equal(loss, again)
    assert found.keys() == expected.keys()
    for parameter, one in expected.items():
        if one is None:  # of what was skipped
            assert found[parameter] is None
        else:
            assert torch.allclose(found[parameter], one, atol=1e-6), parameter
