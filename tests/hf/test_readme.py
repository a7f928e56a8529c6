"""The programs of the 0.6.2 README that need inline blocks only, word for word, on a tiny GPT-2."""

import textwrap

import pytest
import torch

from nnsight import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"

QUICK_START = """
from nnsight import LanguageModel

model = LanguageModel('openai-community/gpt2', device_map='auto', dispatch=True)

with model.trace('The Eiffel Tower is in the city of'):
    # Intervene on activations (must access in execution order!)
    model.transformer.h[0].output[0][:] = 0

    # Access and save hidden states from a later layer
    hidden_states = model.transformer.h[-1].output[0].save()

    # Get model output
    output = model.output.save()

print(model.tokenizer.decode(output.logits.argmax(dim=-1)[0]))
"""

ACCESSING = """
with model.trace("The Eiffel Tower is in the city of"):
    # Access attention output
    attn_output = model.transformer.h[0].attn.output[0].save()

    # Access MLP output
    mlp_output = model.transformer.h[0].mlp.output.save()

    # Access any layer's output (access in execution order)
    layer_output = model.transformer.h[5].output[0].save()

    # Access final logits
    logits = model.lm_head.output.save()
"""

IN_PLACE = """
with model.trace("Hello"):
    # Zero out all activations
    model.transformer.h[0].output[0][:] = 0

    # Modify specific positions
    model.transformer.h[0].output[0][:, -1, :] = 0  # Last token only
"""

REPLACEMENT = """
with model.trace("Hello"):
    # Add noise to activations
    hs = model.transformer.h[-1].mlp.output.clone()
    noise = 0.01 * torch.randn(hs.shape)
    model.transformer.h[-1].mlp.output = hs + noise

    result = model.transformer.h[-1].mlp.output.save()
"""

GENERATION = """
with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
    output = model.generator.output.save()

print(model.tokenizer.decode(output[0]))
# "The Eiffel Tower is in the city of Paris"
"""

ANY_MODEL = """
from nnsight import NNsight
import torch

net = torch.nn.Sequential(
    torch.nn.Linear(5, 10),
    torch.nn.Linear(10, 2)
)

model = NNsight(net)

with model.trace(torch.rand(1, 5)):
    layer1_out = model[0].output.save()
    output = model.output.save()
"""

AD_HOC = """
with model.trace("The Eiffel Tower is in the city of"):
    # Get intermediate hidden states
    hidden_states = model.transformer.h[-1].output[0]

    # Apply lm_head to get "logit lens" view
    logits = model.lm_head(model.transformer.ln_f(hidden_states))
    tokens = logits.argmax(dim=-1).save()

print(model.tokenizer.decode(tokens[0]))
"""

DEFERRED = """
with model.trace("Hello"):
    # Code runs in a worker thread
    # Thread WAITS here until layer output is available
    hs = model.transformer.h[-1].output[0]

    # .save() marks the value to persist after the context exits
    hs = hs.save()
    # Alternative: hs = nnsight.save(hs)

# After exiting, hs contains the actual tensor
print(hs.shape)  # torch.Size([1, 2, 768])
"""


@pytest.fixture
def run(gpt2_root, monkeypatch):
    """A function that runs a program where `openai-community/gpt2` is found; it returns the program's names."""
    monkeypatch.chdir(gpt2_root)

    def execute(program, **names):
        scope = {"torch": torch, **names}
        exec(compile(textwrap.dedent(program), "<readme>", "exec"), scope)
        return scope

    return execute


def layers(plain, tokenizer, prompt):
    with torch.no_grad():
        return plain(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states


def test_quick_start(run, plain, tokenizer, hooked, capsys):
    names = run(QUICK_START)

    def zero(_module, _args, output):
        output[0][:] = 0

    with torch.no_grad(), hooked(plain, {"transformer.h.0": zero}):
        expected = plain(**tokenizer(PROMPT, return_tensors="pt")).logits
    assert torch.equal(names["output"].logits, expected)
    assert names["hidden_states"].shape == (10, 32)
    assert capsys.readouterr().out == tokenizer.decode(expected.argmax(-1)[0]) + "\n"


def test_accessing(run, model, plain, tokenizer, recorded, tensors):
    names = run(ACCESSING, model=model)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        expected = dict(recorded(plain, lambda: plain(**inputs)))
    assert torch.equal(names["attn_output"], expected["transformer.h.0.attn"][0])
    assert torch.equal(names["mlp_output"], expected["transformer.h.0.mlp"][0])
    assert torch.equal(names["layer_output"], expected["transformer.h.5"][0][0])
    assert torch.equal(names["logits"], expected["lm_head"][0])


def test_in_place(run, model, plain, tokenizer, hooked):
    # The one line that differs: in transformers 5 a layer returns a tensor, so `output[0]` is a row of the batch.
    program = IN_PLACE.replace("output[0][:, -1, :]", "output[:, -1, :]")
    names = run(program + "    after = model.transformer.h[1].output", model=model)
    seen = []
    hooks = {
        "transformer.h.0": lambda _module, _args, output: output * 0,
        "transformer.h.1": lambda _module, _args, output: seen.append(output),
    }
    with torch.no_grad(), hooked(plain, hooks):
        plain(**tokenizer("Hello", return_tensors="pt"))
    assert torch.equal(names["after"], seen[0])


def test_replacement(run, model):
    names = run(REPLACEMENT, model=model)
    assert torch.equal(names["result"], names["hs"] + names["noise"])


def test_generation(run, model, plain, tokenizer, capsys):
    names = run(GENERATION, model=model)
    inputs = tokenizer("The Eiffel Tower is in", return_tensors="pt")
    expected = plain.generate(**inputs, max_new_tokens=3, pad_token_id=tokenizer.pad_token_id)
    assert torch.equal(names["output"], expected)
    assert names["output"].shape == (1, inputs["input_ids"].shape[1] + 3)
    assert capsys.readouterr().out == tokenizer.decode(expected[0]) + "\n"


def test_any_model(run):
    names = run(ANY_MODEL)
    assert names["layer1_out"].shape == (1, 10)
    assert torch.equal(names["output"], names["net"][1](names["layer1_out"]))


def test_ad_hoc(run, model, plain, tokenizer):
    names = run(AD_HOC, model=model)
    with torch.no_grad():
        expected = plain(**tokenizer(PROMPT, return_tensors="pt")).logits
    assert torch.allclose(names["logits"], expected[0], atol=1e-5)
    assert torch.equal(names["tokens"], expected[0].argmax(-1))


def test_deferred_execution(run, model, plain, tokenizer):
    names = run(DEFERRED, model=model)
    with torch.no_grad():
        expected = plain.transformer.ln_f(names["hs"])
    assert torch.allclose(expected, layers(plain, tokenizer, "Hello")[-1][0], atol=1e-6)


def test_a_name_with_a_slash_loads_lazily_and_without_a_network(run, gpt2_folder):
    model = LanguageModel("openai-community/gpt2")
    assert not model.dispatched
    with model.trace("Hello"):
        logits = model.lm_head.output
    assert logits.shape == (1, 1, 50257)
    assert model.dispatched
