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
from nnsight_source import SourceError

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba")
IDS = torch.tensor([[5, 17, 33, 2, 90, 41]])


@pytest.fixture(autouse=True)
def filled_memory():
    """Memory that is not written to yet holds the same in two runs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
            number = sum(key[2:4] == (spot.kind, spot.span) and key[4].partition("#")[0] == word for key in found)
            found[path, function, spot.kind, spot.span, word + (f"#{number}" if number else "")] = operation
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


@pytest.mark.parametrize("name", EXPERTS)
def test_all_operations_of_experts_computed_one_after_another(name):
    """Otherwise what computes them is no forward, but a function that their forward is replaced by."""
    assert check_forwards(zoo.build(name, experts_implementation="eager"), {"input_ids": IDS}) > check_forwards(
        zoo.build(name), {"input_ids": IDS}
    )


@pytest.mark.parametrize("name", more_zoo.ARCHITECTURES)
def test_all_operations_of_all_forwards(name):
    assert check_forwards(more_zoo.build(name), more_zoo.inputs_of(name)) > 100


def called_by(model, path, file):
    """What a forward calls once that is defined in the file of the model: its methods, and what attention calls."""
    found = {}
    for operation in model.get(path).source:
        if operation.name == "attention_interface_0":
            found["eager_attention_forward"] = [operation]
            continue
        try:
            function = operation.source._site.functions[0]  # outside of a block: what the names mean
        except SourceError:
            continue
        if function.__code__.co_filename == file and function.__name__ != "forward":
            found.setdefault(function.__name__, []).append(operation)
    return {name: operations[0] for name, operations in found.items() if len(operations) == 1}


def check_functions(net, inputs):
    """Compare what the forwards of a model call with its twin; return the names of the functions."""
    twin, recorder = twin_of(net)
    model = NNsight(net)
    checked = set()
    with torch.no_grad():
        twin(**inputs)
        for path, module in net.named_modules():
            calls = called_by(model, path, inspect.getfile(type(net))) if is_from(net, module) else {}
            for name, operation in calls.items():
                truth = recorded(recorder, {path}, name)
                if not truth:
                    continue  # a branch that was not taken, or no function of a module
                with model.trace(**inputs) as tracer:
                    inside = operation.source
                    operations = keys_of(path, name, inside)
                    cache = tracer.cache(modules=[inside, inside.vars, inside.ops, inside.returns])
                compare(cache, operations, truth)
                checked.add(name)
    return checked


@pytest.mark.parametrize("name", [name for name in zoo.CAUSAL if name not in zoo.RECURRENT])
def test_all_operations_of_the_functions_that_forwards_call(name):
    eager = {"attn_implementation": "eager", **({"experts_implementation": "eager"} if name in EXPERTS else {})}
    checked = check_functions(zoo.build(name, **eager), {"input_ids": IDS})
    assert ("_reshape" if name == "bloom" else "eager_attention_forward") in checked, checked


@pytest.mark.parametrize("name", [name for name in more_zoo.ARCHITECTURES if name != "resnet"])
def test_all_operations_of_the_functions_that_forwards_of_other_models_call(name):
    checked = check_functions(more_zoo.build(name, attn_implementation="eager"), more_zoo.inputs_of(name))
    assert "eager_attention_forward" in checked, checked
