"""The programs of the 0.6.2 README with invokes, steps, edits and sessions, word for word, on a tiny GPT-2.

They are written to a file and imported, because blocks that wait for their turn need their source.
"""

import importlib.util
import textwrap

import pytest
import torch

BATCHING = """
with model.trace() as tracer:
    # First invoke: worker thread 1
    with tracer.invoke("The Eiffel Tower is in"):
        embeddings = model.transformer.wte.output  # Thread waits here
        output1 = model.lm_head.output.save()

    # Second invoke: worker thread 2 (runs after thread 1 completes)
    with tracer.invoke("_ _ _ _ _ _"):
        model.transformer.wte.output = embeddings  # Uses value from thread 1
        output2 = model.lm_head.output.save()
"""

PROMPT_LESS = """
with model.trace() as tracer:
    with tracer.invoke("Hello"):
        out1 = model.lm_head.output[:, -1].save()

    with tracer.invoke(["World", "Test"]):
        out2 = model.lm_head.output[:, -1].save()

    # No-arg invoke: operates on ALL 3 inputs
    with tracer.invoke():
        out_all = model.lm_head.output[:, -1].save()  # Shape: [3, vocab]
"""

ITERATING = """
with model.generate("Hello", max_new_tokens=5) as tracer:
    logits = list().save()

    # Iterate over all generation steps
    for step in tracer.iter[:]:
        logits.append(model.lm_head.output[0][-1].argmax(dim=-1))

print(model.tokenizer.batch_decode(logits))
"""

CONDITIONAL = """
with model.generate("Hello", max_new_tokens=5) as tracer:
    outputs = list().save()

    for step_idx in tracer.iter[:]:
        if step_idx == 2:
            model.transformer.h[0].output[0][:] = 0  # Only on step 2

        outputs.append(model.transformer.h[-1].output[0])
"""

TWO_INVOKES = """
with model.generate(max_new_tokens=3) as tracer:
    with tracer.invoke("Hello"):  # First invoker — pass input here
        for step in tracer.iter[:]:
            hidden = model.transformer.h[-1].output.save()
    with tracer.invoke():  # Second invoker — runs after generation
        final = model.output.save()  # Now works!
"""

EDITING = """
# Create edited model (non-destructive)
with model.edit() as model_edited:
    model.transformer.h[0].output[0][:] = 0

# Original model unchanged
with model.trace("Hello"):
    out1 = model.transformer.h[0].output[0].save()

# Edited model has modification
with model_edited.trace("Hello"):
    out2 = model_edited.transformer.h[0].output[0].save()

assert not torch.all(out1 == 0)
assert torch.all(out2 == 0)
"""

SESSIONS = """
with model.session() as session:
    with model.trace("Hello"):
        hs1 = model.transformer.h[0].output[0].save()

    with model.trace("World"):
        model.transformer.h[0].output[0][:] = hs1  # Use value from first trace
        hs2 = model.transformer.h[0].output[0].save()
"""

GRADIENTS = """
with model.trace("Hello"):
    hs = model.transformer.h[-1].output[0]
    hs.requires_grad_(True)

    logits = model.lm_head.output
    loss = logits.sum()

    with loss.backward():
        grad = hs.grad.save()

print(grad.shape)
"""

SCANNING = """
import nnsight

with model.scan("Hello"):
    dim = nnsight.save(model.transformer.h[0].output[0].shape[-1])

print(dim)  # 768
"""

CACHING = """
with model.trace("Hello") as tracer:
    cache = tracer.cache()

# Access cached values
layer0_out = cache['model.transformer.h.0'].output
print(cache.model.transformer.h[0].output[0].shape)
"""

SOURCE = """
# Discover available operations
print(model.transformer.h[0].attn.source)
# Shows forward method with operation names like:
#   attention_interface_0 -> 66  attn_output, attn_weights = attention_interface(...)
#   self_c_proj_0         -> 79  attn_output = self.c_proj(attn_output)

# Access operation values
with model.trace("Hello"):
    attn_out = model.transformer.h[0].attn.source.attention_interface_0.output.save()
"""

AFTER_AN_OPEN_LOOP = """
with model.generate("Hello", max_new_tokens=3) as tracer:
    hidden = list().save()
    for step in tracer.iter[:]:
        hidden.append(model.transformer.h[-1].output)
    ids = model.generator.output.save()
    result = tracer.result.save()
"""


@pytest.fixture
def run(gpt2_root, model, monkeypatch, tmp_path):
    """A function that runs a program as a file; it returns the program's names."""
    monkeypatch.chdir(gpt2_root)

    def execute(program):
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(program), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("program", path)
        module = importlib.util.module_from_spec(spec)
        module.__dict__.update(model=model, torch=torch)
        spec.loader.exec_module(module)
        return module.__dict__

    return execute


@pytest.fixture
def logits(plain, tokenizer):
    """A function that gives the logits of one prompt alone, (1, T, V), as transformers computes them."""

    def compute(prompt, **kwargs):
        with torch.no_grad():
            return plain(**tokenizer(prompt, return_tensors="pt"), **kwargs).logits

    return compute


@pytest.fixture
def generated(plain, tokenizer):
    def compute(prompt, **kwargs):
        inputs = tokenizer(prompt, return_tensors="pt")
        return plain.generate(
            **inputs, pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True,
            output_hidden_states=True, **kwargs,
        )  # fmt: skip

    return compute


def test_batching(run, logits, plain, tokenizer, hooked):
    names = run(BATCHING)
    batch = tokenizer(["The Eiffel Tower is in", "_ _ _ _ _ _"], padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def first_row_for_both(_module, _args, output):
        return output[:1].expand_as(output)

    with torch.no_grad(), hooked(plain, {"transformer.wte": first_row_for_both}):
        expected = plain(**batch, position_ids=positions).logits
    assert torch.allclose(names["output1"], logits("The Eiffel Tower is in"), atol=1e-4)
    assert torch.allclose(names["output2"], expected[1:], atol=1e-4)


def test_prompt_less_invoke(run, logits):
    names = run(PROMPT_LESS)
    expected = torch.cat([logits(word)[:, -1] for word in ("Hello", "World", "Test")])
    assert torch.allclose(names["out_all"], expected, atol=1e-4)
    assert torch.allclose(names["out1"], expected[:1], atol=1e-4)
    assert torch.allclose(names["out2"], expected[1:], atol=1e-4)


def test_iterating(run, generated, tokenizer, capsys):
    names = run(ITERATING)
    expected = [step[0].argmax(-1) for step in generated("Hello", max_new_tokens=5).logits]
    assert [int(token) for token in names["logits"]] == [int(token) for token in expected]
    assert capsys.readouterr().out == f"{tokenizer.batch_decode(expected)}\n"


def test_conditional(run, generated, plain, hooked):
    names = run(CONDITIONAL)
    calls = []

    def zero_at_step_two(_module, _args, output):
        calls.append(0)
        return output * 0 if len(calls) == 3 else output

    seen = []
    hooks = {"transformer.h.0": zero_at_step_two, "transformer.h.11": lambda _m, _a, output: seen.append(output[0])}
    with hooked(plain, hooks):
        generated("Hello", max_new_tokens=5)
    assert len(names["outputs"]) == len(seen) == 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(names["outputs"], seen, strict=True))


def test_two_invokes(run, generated, plain, hooked, logits):
    seen = []
    with hooked(plain, {"transformer.h.11": lambda _m, _a, output: seen.append(output)}):
        generated("Hello", max_new_tokens=3)
    names = run(TWO_INVOKES)
    assert torch.equal(names["hidden"], seen[-1])
    # An invoke without a loop means the first pass of the model.
    assert torch.allclose(names["final"].logits, logits("Hello")[:, -1:], atol=1e-4)


def test_editing(run, logits, plain, tokenizer, hooked):
    names = run(EDITING)
    with names["model_edited"].trace("Hello"):
        edited = names["model"].lm_head.output
    with hooked(plain, {"transformer.h.0": lambda _m, _a, output: output * 0}):
        assert torch.allclose(edited, logits("Hello"), atol=1e-4)


def test_sessions(run, plain, tokenizer):
    names = run(SESSIONS)
    with torch.no_grad():
        expected = plain(**tokenizer("Hello", return_tensors="pt"), output_hidden_states=True).hidden_states[1]
    assert torch.equal(names["hs1"], expected[0])
    assert torch.equal(names["hs2"], expected[0])


def test_code_after_an_open_loop_runs(run, generated):
    names = run(AFTER_AN_OPEN_LOOP)
    expected = generated("Hello", max_new_tokens=3)
    assert len(names["hidden"]) == 3
    assert torch.equal(names["ids"], expected.sequences)
    assert torch.equal(names["result"], expected.sequences)


def test_gradients(run, model, plain, tokenizer, capsys):
    names = run(GRADIENTS)
    model.zero_grad()  # the model is shared
    seen = []

    def keep(_module, _args, output):
        output.retain_grad()
        seen.append(output)

    handle = plain.transformer.h[-1].register_forward_hook(keep)
    plain(**tokenizer("Hello", return_tensors="pt")).logits.sum().backward()
    handle.remove()
    plain.zero_grad()
    assert torch.allclose(names["grad"], seen[0].grad[0], atol=1e-5)
    assert capsys.readouterr().out == f"{seen[0][0].shape}\n"


def test_scanning(run, plain):
    assert run(SCANNING)["dim"] == plain.config.n_embd


def test_caching(run, plain, tokenizer, capsys):
    names = run(CACHING)
    with torch.no_grad():
        expected = plain(**tokenizer("Hello", return_tensors="pt"), output_hidden_states=True).hidden_states[1]
    assert torch.equal(names["layer0_out"], expected)
    assert capsys.readouterr().out == f"{expected[0].shape}\n"


def test_source(run, plain, tokenizer, capsys):
    names = run(SOURCE)
    printed = capsys.readouterr().out
    assert "attention_interface_0" in printed
    assert "self_c_proj_0" in printed
    seen = []
    handle = plain.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        plain(**tokenizer("Hello", return_tensors="pt"))
    handle.remove()
    attended = names["attn_out"][0]
    assert torch.equal(attended.reshape(*attended.shape[:-2], -1), seen[0])
