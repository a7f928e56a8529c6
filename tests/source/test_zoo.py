"""Every operation in every forward of every architecture: what is read is what the plain model computes.

The plain model is one whose file was executed with a recorder around every expression (`instrument`).
"""

from __future__ import annotations

import inspect

import instrument
import more_zoo
import pytest
import torch
import zoo

from nnsight import NNsight

IDS = torch.tensor([[5, 17, 33, 2, 90, 41]])


def same(left, right):
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or left.dtype != right.dtype:
            return False
        return torch.equal(left.nan_to_num(3), right.nan_to_num(3)) if left.is_floating_point() else left.equal(right)
    if isinstance(left, tuple | list):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, bool | int | float | str | None):
        return left == right
    return type(left).__name__ == type(right).__name__


def twin_of(net):
    """A model of the same weights whose code records, and its recorder."""
    kind, recorder = instrument.instrumented(type(net))
    twin = kind(net.config).eval()
    twin.load_state_dict(net.state_dict())
    recorder.watch(twin)
    return twin, recorder


def is_from(net, module):
    """Whether a module's forward is in the file that defines a model."""
    forward = inspect.unwrap(type(module).forward)
    return forward.__code__.co_filename == inspect.getfile(type(net))


def keys_of(path, function, source):
    """The operations of a function by where they stand, as the recorder names them."""
    found = {}
    for group in (source, source.vars, source.ops, source.returns):
        for operation in group:
            spot = operation._spot
            word = "" if spot.kind in ("call", "return") else spot.name.rpartition("_")[0]
            found[path, function, spot.kind, spot.span, word] = operation
    return found


def recorded(recorder, paths, function):
    """What the recorder has of these modules and a function."""
    found = {}
    for (path, name, kind, span, word), values in recorder.found.items():
        if path in paths and name == function:
            found[path, name, kind, span, "" if kind == "call" else word] = values
    return found


def compare(cache, operations, truth):
    """Every operation was reached as often as in the plain model, and gave the same each time."""
    missing = [key for key in truth if key not in operations]
    assert not missing, f"no operation is where the model computes {missing[:3]}"
    for key, operation in operations.items():
        if key not in truth:
            assert operation not in cache, f"{operation.path} was not computed by the plain model"
            continue
        got = [visit.output for visit in cache[operation].steps]
        assert len(got) == len(truth[key]), f"{operation.path} was reached {len(got)} times, not {len(truth[key])}"
        for index, (one, other) in enumerate(zip(got, truth[key], strict=True)):
            assert same(one, other), f"{operation.path} (the {index}th time): {one} is not {other}"


def check_forwards(net, inputs, **how):
    """Compare all forwards of a model, called or run as `fn` says, with those of its twin; return how many values."""
    twin, recorder = twin_of(net)
    paths = [path for path, module in net.named_modules() if is_from(net, module)]
    model = NNsight(net)
    with torch.no_grad():
        expected = getattr(twin, how.get("fn", "__call__"))(**inputs)
        truth = recorded(recorder, {*paths}, "forward")
        operations = {}
        with model.trace(**inputs, **how) as tracer:
            sources = [model.get(path).source for path in paths]
            groups = [group for source in sources for group in (source, source.vars, source.ops, source.returns)]
            cache = tracer.cache(modules=groups, device=None)
            for path, source in zip(paths, sources, strict=True):
                operations.update(keys_of(path, "forward", source))
            result = tracer.result
        plain = getattr(net, how.get("fn", "__call__"))(**inputs)
    compare(cache, operations, truth)
    for got in (result, plain):
        assert same(values_of(got), values_of(expected)), "looking changed the result"
    return sum(map(len, truth.values()))


def values_of(result):
    return result if isinstance(result, torch.Tensor) else list(result.to_tuple())


@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_all_operations_of_all_forwards_in_a_generation(name):
    inputs = {"input_ids": IDS, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    net = zoo.make(name)  # one that was not called: RWKV scales its weights at its first call
    assert check_forwards(net, inputs, fn="generate") > 300


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"])
def test_all_operations_of_experts_computed_one_after_another(name):
    """Otherwise what computes them is no forward, but a function that their forward is replaced by."""
    eager = {"experts_implementation": "eager"}
    assert check_forwards(zoo.build(name, **eager), {"input_ids": IDS}) > check_forwards(
        zoo.build(name), {"input_ids": IDS}
    )


@pytest.mark.parametrize("name", more_zoo.ARCHITECTURES)
def test_all_operations_of_all_forwards(name):
    assert check_forwards(more_zoo.build(name), more_zoo.inputs_of(name)) > 100


@pytest.mark.parametrize("name", [name for name in zoo.CAUSAL if name not in zoo.RECURRENT])
def test_all_operations_of_the_function_that_attention_calls(name):
    net = zoo.build(name, attn_implementation="eager")
    paths = {
        path: module
        for path, module in net.named_modules()
        if is_from(net, module) and "attention_interface_0" in NNsight(module).source.names
    }
    if not paths:
        attention = [type(module).__name__ for module in net.modules() if "Attention" in type(module).__name__]
        assert name in ("gptj", "bloom"), f"{attention} of {name} calls no attention function"
        return
    twin, recorder = twin_of(net)
    model = NNsight(net)
    with torch.no_grad():
        twin(IDS)
        for path in paths:
            truth = recorded(recorder, {path}, "eager_attention_forward")
            with model.trace(IDS) as tracer:
                inside = model.get(path).source.attention_interface_0.source
                operations = keys_of(path, "eager_attention_forward", inside)
                cache = tracer.cache(modules=[inside, inside.vars, inside.ops, inside.returns])
            assert len(truth) > 10
            compare(cache, operations, truth)
