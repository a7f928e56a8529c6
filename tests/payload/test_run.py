"""A run as bytes, played by the smallest receiver there can be: the same as run here."""

# ruff: noqa: F841 - what a block binds is looked up by name

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

from nnsight import Capture, LanguageModel, NNsight, PayloadError, UnsendableError, payload

WIDTH = 3.0


class Sent(Capture):
    """A `with` item whose body is made a payload."""

    what = "trace"

    def __init__(self, envoy, method, *args, options=None, **kwargs):
        self.envoy, self.method, self.arguments, self.options = envoy, method, (args, kwargs), options
        self.bytes = b""

    def _captured(self, block):
        parts = payload.write_run(self.envoy, self.method, self.arguments, block.scope, self.options)
        self.bytes = b"".join(parts)
        block.scope.close()


def play(data, model, add_edits=True):
    """Run a payload on a model; return what its block has bound."""
    run = payload.Run(data)
    run.check(model)
    modules = dict(model._module.named_modules())
    sent = run.open(model.get, lambda path: modules[path.removeprefix("model").lstrip(".")], called=lambda n: f"<{n}>")
    main, *edits = sent.blocks
    args, kwargs = sent.values["arguments"]
    if edits:
        model = model.copy_wrapper()
        for path, block in zip(run.edits, edits, strict=True):
            model.get(path).edit(inplace=True).take(block.scope())
    opened = getattr(model.get(run.path), run.method)
    if run.method == "generate":
        with model.generate(*args, **kwargs) as tracer:
            main.run(tracer)
    else:
        with opened(*args, **kwargs) as tracer:
            main.run(tracer)
    return main.bound()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


@pytest.fixture(scope="module")
def gpt():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 12, "n_embd": 24, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    config = GPT2Config(bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    return LanguageModel(GPT2LMHeadModel(config).eval())


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


def test_trace(model, x):
    scale = torch.full((8,), WIDTH)
    sent = Sent(model, "trace", x)
    with sent as tracer:
        model[0].output = model[0].output * scale
        hidden = model[1].output
        result = tracer.result
    found = play(sent.bytes, model)
    assert set(found) == {"tracer", "hidden", "result"}
    assert torch.equal(found["hidden"], torch.relu(model._module[0](x) * 3))
    assert torch.equal(found["result"], model._module[2](found["hidden"]))


def test_trace_of_a_part_with_keywords(gpt):
    hidden = torch.randn(1, 2, 24)
    sent = Sent(gpt.transformer.h[3], "trace", hidden_states=hidden)
    with sent:
        out = gpt.transformer.h[3].output
    assert torch.equal(play(sent.bytes, gpt)["out"], gpt._module.transformer.h[3](hidden))


def test_generate(gpt):
    ids = torch.tensor([[5, 6, 7]])
    sent = Sent(gpt, "generate", ids, max_new_tokens=3, do_sample=False)
    with sent as tracer:
        seen = []
        for step in tracer.iter[:]:
            seen.append(gpt.lm_head.output[:, -1])
        result = tracer.result
    found = play(sent.bytes, gpt)
    expected = gpt._module.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found["result"], expected)
    assert len(found["seen"]) == 3


def test_invokes(model, x):
    sent = Sent(model, "trace")
    with sent as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(x[:1]):
            hidden = model[0].output
            barrier()
            first = hidden * 1
        with tracer.invoke(x[1:]):
            barrier()
            model[0].output[:] = 1
            second = model.output
    found = play(sent.bytes, model)
    assert torch.allclose(found["first"], model._module[0](x[:1]))
    assert torch.allclose(found["second"], model._module[2](torch.ones(2, 8)))


def test_session(model, x):
    sent = Sent(model, "session")
    with sent:
        with model.trace(x):
            hidden = model[0].output
        with model.trace(x):
            model[0].output = hidden * 2
            result = model.output
    found = play(sent.bytes, model)
    assert torch.equal(found["result"], model._module[2](torch.relu(model._module[0](x) * 2)))


def test_edits_of_the_model_travel(model, x):
    shift = torch.ones(8)
    with model.edit() as edited:
        edited[0].output = edited[0].output + shift
    with edited[2].edit(inplace=True) as (_, part):
        part.output = part.output * WIDTH
    sent = Sent(edited, "trace", x)
    with sent:
        result = edited.output
    assert payload.Run(sent.bytes).edits == ["model", "model.2"]
    found = play(sent.bytes, model)
    assert torch.equal(found["result"], model._module[2](torch.relu(model._module[0](x) + 1)) * 3)
    with model.trace(x):
        result = model.output
    assert torch.equal(result, model._module(x))


def test_names_given_to_modules_are_told(gpt, x):
    named = NNsight(nn.Sequential(nn.Linear(4, 8)), rename={"0": "first"})
    sent = Sent(named, "trace", x, options={"batched": False})
    with sent:
        out = named.first.output
    run = payload.Run(sent.bytes)
    assert run.names == [["model", "first", "model.0"]]
    assert run.options == {"batched": False}
    assert torch.equal(play(sent.bytes, named)["out"], named._module(x))


def test_block_is_read_from_a_file_and_from_parts(model, x, tmp_path):
    large = torch.randn(300_000)
    sent = Sent(model, "trace", x)
    with sent:
        total = large.sum() + model.output.sum()
    (tmp_path / "run").write_bytes(sent.bytes)
    parts = [sent.bytes[start : start + 1000] for start in range(0, len(sent.bytes), 1000)]
    with open(tmp_path / "run", "rb") as file:
        from_file = play(file, model)["total"]
    assert from_file == play(parts, model)["total"] == large.sum() + model._module(x).sum()


def test_sender_needs_no_weights(gpt, tmp_path):
    gpt._module.save_pretrained(tmp_path)
    lazy = LanguageModel(str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    sent = Sent(lazy, "trace", ids)
    with sent:
        hidden = lazy.transformer.h[5].output * 2
    assert not lazy.dispatched
    assert torch.equal(
        play(sent.bytes, gpt)["hidden"], gpt._module(ids, output_hidden_states=True).hidden_states[6] * 2
    )


# --- What it is for


def test_model_is_described(gpt, model):
    assert payload.model_key(model) == "NNsight:torch.nn.modules.container.Sequential"
    described = payload.describe_model(gpt)
    assert described["key"].startswith("LanguageModel:")
    assert described["modules"] == len(list(gpt._module.modules()))
    assert set(described["versions"]) == {"nnsight-core", "torch", "transformers"}


def test_other_tree_is_refused_and_says_which_side_to_change(model, x):
    sent = Sent(model, "trace", x)
    with sent:
        result = model.output
    other = NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    told = r"tree of 4 modules .* here has 3 .*change the sending side: load the same model there"
    with pytest.raises(PayloadError, match=told):
        payload.Run(sent.bytes).check(other)
    payload.Run(sent.bytes).check(NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))


def test_other_versions_are_told(model, x, monkeypatch):
    sent = Sent(model, "trace", x)
    with sent:
        result = model.output
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(PayloadError, match=r"with the same versions \(torch 9\.9 here, 2\..* there\)"):
        payload.Run(sent.bytes).check(NNsight(nn.Linear(1, 1)))


def test_name_that_cannot_travel_is_told_at_the_with(model, x):
    from io import StringIO

    handle = StringIO()
    with pytest.raises(
        UnsendableError, match=r"The variable 'handle' of the block at .*test_run\.py:\d+ cannot be sent"
    ):
        with Sent(model, "trace", x):
            handle.write(model.output)
    with pytest.raises(
        UnsendableError, match=r"One of the arguments .*cannot be sent, item 1, item 'extra': .*StringIO"
    ):
        with Sent(model, "trace", x, extra=handle):
            model.output


# --- Size


@pytest.mark.parametrize("large", [[0] * 1_000_001, "x" * (17 << 20)], ids=["values", "bytes"])
def test_what_could_not_be_read_again_is_not_written(model, x, large):
    told = r"What the block uses takes \d+\.\d MB and \d+ values without its tensors.*Put long lists .* into tensors"
    with pytest.raises(UnsendableError, match=told):
        with Sent(model, "trace", x):
            total = model.output.sum() + len(large)


def test_trace_of_gpt2_takes_two_kilobytes(gpt):
    ids = torch.tensor([[5, 6, 7, 8]])
    sent = Sent(gpt, "trace", ids)
    with sent as tracer:
        hidden = gpt.transformer.h[5].output.save()
        gpt.transformer.h[6].output[:] = 0
        logits = gpt.lm_head.output.save()
    assert len(sent.bytes) <= 2048
    assert play(sent.bytes, gpt)["logits"].shape == (1, 4, 64)


def test_header_is_json_and_tensors_are_safetensors(model, x):
    """What another program would do to read it."""
    from safetensors.torch import load

    from nnsight.payload.container import zstd

    table = torch.arange(6.0)
    sent = Sent(model, "trace", x)
    with sent:
        result = model.output + table[:2]
    assert sent.bytes[:6] == b"NNSP\x01\x00"
    content = zstd().decompress(sent.bytes[6:])
    size = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + size])
    assert header["kind"] == "run" and header["method"] == "trace"
    pieces = load(content[4 + size :])
    assert sorted(len(piece) for piece in pieces.values()) == [24, 48]
    assert any(piece.view(torch.float32).tolist() == table.tolist() for piece in pieces.values() if len(piece) == 24)


class Around(nn.Module):
    """A model whose main part is called `model`, as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.model(x))


def test_path_of_a_part_that_is_called_as_the_root_is_its_own():
    model, x = NNsight(Around()), torch.ones(1, 4)
    for envoy in (model, model.model, model.model[0], model.head):
        assert payload.envoy_at(model, envoy.path) is envoy
    for path in ("model.model.9", "head", "", "other.model", "model.head.weight", "model.head.output", "model..head"):
        with pytest.raises(LookupError):
            payload.envoy_at(model, path)
    sent = Sent(model.model, "trace", x)
    with sent:
        model.model[0].output = model.model[0].output * 2
    run = payload.Run(sent.bytes)
    run.check(model)
    assert run.path == "model.model"
    saved = b"".join(payload.write_results({"part": model.model}, model))
    assert payload.Results(saved, model).values["part"] is model.model


def test_nothing_is_pickled(model, x, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something is pickled")

    for module, names in (
        (pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        (torch, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    scale, found = torch.full((8,), WIDTH), {"layers": [model[0], model[2]]}
    sent = Sent(model, "trace", x)
    with sent:
        found["layers"][0].output = found["layers"][0].output * scale
        hidden = model[1].output
    answer = b"".join(payload.write_results({"hidden": play(sent.bytes, model)["hidden"]}, model))
    assert torch.equal(payload.Results(answer).values["hidden"], torch.relu(model._module[0](x) * 3))
