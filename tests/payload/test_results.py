"""What a block has saved, as bytes and back: it arrives as it is here, and reading it runs nothing."""

# ruff: noqa: F841 - what a block binds is looked up by name

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from nnsight import Capture, NNsight, PayloadError, UnsendableError, payload
from nnsight.payload import container


class Colour(enum.Enum):
    RED = 1

    @classmethod
    def _missing_(cls, value):
        Dangerous.made += 1
        return cls.RED


class Way(enum.IntFlag):
    UP = 1
    DOWN = 2


@dataclasses.dataclass
class Found:
    layer: int
    hidden: torch.Tensor


Pair = collections.namedtuple("Pair", "left right")


class Dangerous:
    made = 0

    def __init__(self):
        Dangerous.made += 1

    def __setstate__(self, state):
        Dangerous.made += 1

    def __del__(self):
        Dangerous.made += 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def arrive(values, root=None):
    return payload.Results(b"".join(payload.write_results(values, root)), root).values


def test_values_arrive_as_they_are(model):
    hidden = torch.arange(12.0).reshape(3, 4)
    saved = {
        "hidden": hidden, "row": hidden[1], "again": [hidden, {"deep": (hidden, 1.5, None)}], "text": "é",
        "nan": math.nan,
        "array": np.arange(3, dtype=np.int16), "scalar": np.float32(0.5), "half": hidden.to(torch.bfloat16).t(),
        "colour": Colour.RED, "ways": Way.UP | Way.DOWN,
        "found": Found(2, hidden), "pair": Pair(1, hidden), "layer": model[0], "whole": model,
        "size": hidden.shape, "when": {1, 2}, "list": [],
    }  # fmt: skip
    found = arrive(saved, model)
    assert list(found) == list(saved)
    assert torch.equal(found["hidden"], hidden)
    assert found["again"][0] is found["hidden"] is found["again"][1]["deep"][0] is found["found"].hidden
    found["row"].zero_()
    assert found["hidden"][1].eq(0).all() and not hidden[1].eq(0).all()
    assert torch.equal(found["half"], saved["half"]) and found["half"].stride() == (1, 4)
    assert found["array"].dtype == np.int16 and type(found["scalar"]) is np.float32
    assert found["colour"] is Colour.RED and found["ways"] == Way.UP | Way.DOWN
    assert type(found["found"]) is Found and type(found["pair"]) is Pair
    assert found["layer"] is model[0] and found["whole"] is model
    assert (found["text"], found["size"], found["when"]) == ("é", hidden.shape, {1, 2})
    assert math.isnan(found["nan"])


def test_output_of_a_language_model_arrives_with_its_class():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, bos_token_id=1, eos_token_id=2)
    output = GPT2LMHeadModel(config).eval()(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    found = arrive({"output": output})["output"]
    assert type(found) is type(output)
    assert torch.equal(found.logits, output.logits) and torch.equal(found["logits"], output.logits)
    assert list(found.keys()) == list(output.keys())
    assert len(found.hidden_states) == 3
    assert torch.equal(found.past_key_values.layers[0].keys, output.past_key_values.layers[0].keys)


def test_cache_arrives(model):
    x = torch.randn(3, 4)
    named = NNsight(model._module, rename={"0": "first"})
    with named.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
    found = arrive({"cache": cache})["cache"]
    assert found.keys() == cache.keys()
    assert torch.equal(found["model.0"].output, model._module[0](x))
    assert torch.equal(found["first"].input, x)
    assert found["model.0"].output is not cache["model.0"].output


def test_large_results_come_in_parts_and_are_written_as_they_go():
    large = torch.randint(0, 256, (24 << 20,), dtype=torch.uint8)
    parts = payload.write_results({"large": large, "small": 1})
    sizes = []

    def watched():
        for part in parts:
            sizes.append(len(part))
            yield part

    found = payload.Results(watched()).values
    assert torch.equal(found["large"], large)
    assert len(sizes) > 20 and max(sizes) < 2 << 20


def test_results_larger_than_the_limit_are_refused():
    data = b"".join(payload.write_results({"large": torch.zeros(10_000)}))
    with pytest.raises(PayloadError, match=r"announces 40000 bytes of tensors, and 1000 may be in one"):
        payload.Results(data, limit=1000)


def test_options_are_told():
    data = b"".join(payload.write_results({"a": 1}, options={"seconds": 2.5}))
    assert payload.Results(data).options == {"seconds": 2.5}


@pytest.mark.parametrize("value", [lambda: 1, open, nn.Linear(1, 1).forward, (n for n in "a"), Dangerous()])
def test_what_is_no_value_is_refused_by_name(value):
    with pytest.raises(UnsendableError, match=r"^What was saved as 'it' cannot come back, item 0: it is a "):
        payload.write_results({"it": [value]})


# --- Classes and functions that the caller has sent


def plus(value):
    return value + 1


class Sent(Capture):
    """A `with` item whose block is played by a receiver that has nothing but the bytes, and answers."""

    what = "trace"

    def __init__(self, envoy):
        self.envoy = envoy

    def _captured(self, block):
        own = {}
        data = b"".join(payload.write_run(self.envoy, "trace", ((), {}), block.scope, own=own))
        sent = payload.Run(data).open(self.envoy.get, None, called=lambda name: f"<{name}>")
        sent.blocks[0].run(None)
        bound = sent.blocks[0].bound()
        self.there = bound
        self.answer = b"".join(payload.write_results(bound, self.envoy, sent=sent))
        block.scope.give(payload.Results(self.answer, self.envoy, own=own).values)
        block.scope.close()


def test_objects_of_classes_that_were_sent_arrive_as_of_the_callers(model):
    kinds = [Found, Colour, Pair]
    sent = Sent(model)
    with sent:
        made = Found(1, torch.ones(2))
        both = {"colour": Colour.RED, "pair": Pair(made, plus)}
        classes = kinds
    assert type(sent.there["made"]) is not Found
    assert type(made) is Found and torch.equal(made.hidden, torch.ones(2))
    assert both["colour"] is Colour.RED
    assert type(both["pair"]) is Pair and both["pair"].left is made and both["pair"].right is plus
    assert classes == kinds


def test_class_that_was_not_sent_is_none_of_the_callers(model):
    sent = Sent(model)
    with sent:
        made = Found(1, None)
    with pytest.raises(PayloadError, match="holds a class where only values may be"):
        payload.Results(sent.answer, model)
    with pytest.raises(PayloadError, match="holds a class where only values may be"):
        payload.Results(sent.answer, model, own={("class", 7): Found, ("function", 0): plus})


def test_class_of_the_block_itself_does_not_come_back(model):
    with pytest.raises(UnsendableError, match=r"cannot come back: the class `.*Inner` is none .*defined outside of"):
        with Sent(model):

            class Inner:
                pass

            made = Inner()


# --- Reading runs nothing


COLOUR, WAY = ["import", __name__, "Colour"], ["import", __name__, "Way"]
POPEN, CACHE = ["import", "subprocess", "Popen"], ["import", "nnsight.builtin.cached", "Cache"]


def crafted(value, **tables):
    header = {"kind": "results", "values": {"it": value}, "shared": [], "tensors": [[], []], **tables}
    return b"".join(container.write(header, []))


@pytest.mark.parametrize(
    "value",
    [
        ["import", "os", "system"], ["import", "this", ""], ["import", "antigravity", "x"], ["function", 0],
        ["class", 0], ["namespace", 0], ["partial", ["import", "os", "system"], ["tuple", "true"], ["dict"]],
        ["attribute", 1, "real"], ["cached", ["import", "os", "system"], 1, False], ["logger", "a"],
        ["instance", POPEN, {"pid": 1}, None],
        ["instance", ["import", "types", "SimpleNamespace"], {"__class__": POPEN}, None],
        ["instance", ["import", __name__, "Dangerous"], {}, None], ["member", POPEN, "a", None],
        ["member", COLOUR, None, 7], ["member", WAY, None, "x"],
        ["member", WAY, None, ["list"]], ["named", POPEN, 1],
        ["defaultdict", POPEN], ["portable", POPEN, 1], ["portable", CACHE, 1],
        ["portable", CACHE, ["list", ["list", True, True], ["list"], ["list", 1]]],
        ["envoy", "model"], ["submodule", "model"], ["tensor", 0], ["given", 1], ["given", ["class", 0]],
        ["class", [0]], ["function", "0"],
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_would_run_code_is_refused(value):
    before, loaded = Dangerous.made, set(sys.modules)
    with pytest.raises(PayloadError):
        payload.Results(crafted(value))
    assert Dangerous.made == before
    assert not {"this", "antigravity"} & (set(sys.modules) - loaded)


def test_run_is_no_result_and_a_result_is_no_run():
    data = b"".join(payload.write_results({"a": 1}))
    with pytest.raises(PayloadError, match="kind 'results', and a run was expected"):
        payload.Run(data)
    with pytest.raises(PayloadError, match="kind 'run', and results were expected"):
        payload.Results(b"".join(container.write({"kind": "run"}, [])))


def test_envoy_of_results_must_be_a_module(model):
    with pytest.raises(
        PayloadError, match=r"`model\.0\.weight`, which is not in the model here: `model\.0` has no child 'weight'"
    ):
        payload.Results(crafted(["envoy", "model.0.weight"]), model)
