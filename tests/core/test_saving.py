"""`x.save()` and `nnsight.save(x)`: there while a block is open in the calling code, and nowhere else."""

import asyncio
import collections
import copy
import json
import pickle
import threading
import typing

import pytest
import torch
from modules import WIDTH, Calls, Net, plain, rows, run, seeded
from torch import nn

import nnsight
from nnsight import CONFIG, NNsight
from nnsight.errors import NNsightError, SaveError

VALUES = {
    "tensor": torch.ones(2),
    "parameter": nn.Parameter(torch.ones(2)),
    "list": [1, 2],
    "tuple": (1, 2),
    "dict": {"a": 1},
    "set": {1},
    "frozenset": frozenset({1}),
    "int": 5,
    "bool": True,
    "float": 0.5,
    "complex": 1j,
    "none": None,
    "str": "text",
    "bytes": b"bytes",
    "bytearray": bytearray(b"bytes"),
    "slice": slice(1, 2),
    "range": range(3),
    "torch.Size": torch.Size([2]),
    "counter": collections.Counter("aab"),
}


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    return rows()


@pytest.fixture
def setting():
    """The value of `CONFIG.APP.PYMOUNT` is put back."""
    before = CONFIG.APP.PYMOUNT
    yield CONFIG.APP
    CONFIG.APP.PYMOUNT = before


def in_thread(function):
    """Return what a function returns in another thread."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join()
    return answers[0]


def can_save():
    return [name for name, value in VALUES.items() if hasattr(value, "save")]


# -- in a block


def test_save_returns_its_argument(model, x):
    with model.trace(x):
        for name, value in VALUES.items():
            assert value.save() is value, name
            assert nnsight.save(value) is value, name
        hidden = model.h[0].output
        kept = hidden.save()
    assert kept is hidden


def test_saved_and_unsaved_values_are_there_afterwards(net, model, x):
    expected = plain(net, x).outputs
    with model.trace(x):
        saved = model.emb.output.save()
        unsaved = model.h[0].output
        listed = [block.output for block in model.h[1:]].save()
        size = saved.shape.save()
        total = saved.sum().item().save()
    assert torch.equal(saved, expected["emb"][0])
    assert torch.equal(unsaved, expected["h.0"][0])
    assert torch.equal(listed[1], expected["h.2"][0])
    assert size == (2, WIDTH)
    assert total == expected["emb"][0].sum().item()


def test_saving_does_not_copy_or_end_the_edit(net, model, x):
    with model.trace(x) as tracer:
        hidden = model.h[0].output.save()
        hidden *= 2
        result = tracer.result.save()
    edited = plain(net, x, edit=lambda path, output: output * 2 if path == "h.0" else None)
    assert torch.equal(hidden, edited.outputs["h.0"][0])
    assert torch.equal(result, edited.result)


def test_object_of_any_type_is_saved_by_the_function(model, x):
    value = object()
    with model.trace(x):
        assert nnsight.save(value) is value
        assert not hasattr(value, "save")


def test_save_in_helpers_generators_and_tasks_of_the_block(model, x):
    def helper():
        return can_save()

    def stream():
        yield can_save()

    async def task():
        with model.trace(x):
            return await asyncio.create_task(later())

    async def later():
        return can_save()

    with model.trace(x):
        assert helper() == list(VALUES)
        assert list(stream()) == [list(VALUES)]
    assert asyncio.run(task()) == list(VALUES)


def test_save_in_an_invoke(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            first = model.emb.output.save()
        with tracer.invoke(x):
            count = len(VALUES).save()
    assert first.shape == (2, WIDTH)
    assert count == len(VALUES)


def test_save_in_a_session_outside_its_traces(model, x):
    with model.session():
        before = [1].save()
        with model.trace(x):
            hidden = model.emb.output
        after = nnsight.save(hidden.sum())
        assert can_save() == list(VALUES)
    assert before == [1]
    assert torch.equal(after, hidden.sum())
    assert not can_save()


# -- anywhere else


def test_nothing_has_save_outside_of_a_block(model, x):
    assert not can_save()
    with model.trace(x):
        assert can_save() == list(VALUES)
    assert not can_save()
    with pytest.raises(KeyError), model.trace(x):
        raise KeyError
    assert not can_save()


@pytest.mark.parametrize("value", [torch.ones(1), [1], 5, None], ids=lambda value: type(value).__name__)
def test_missing_save_is_an_attribute_error_that_says_where_it_is(model, value):
    message = (
        rf"^'{type(value).__name__}' object has no attribute 'save' outside of a trace: variables keep their values"
    )
    with pytest.raises(AttributeError, match=message) as caught:
        value.save()
    assert caught.value.name == "save"
    assert getattr(value, "save", "default") == "default"
    # torch's compiler takes every name in `dir(torch.Tensor)` to be there, so on that class the name is.
    assert hasattr(type(value), "save") is isinstance(value, torch.Tensor)


def test_function_outside_of_a_block_is_an_error(model):
    with pytest.raises(SaveError, match=r"outside of a trace.*with model\.trace"):
        nnsight.save(1)
    assert issubclass(SaveError, NNsightError)
    assert issubclass(SaveError, ValueError)


def test_nothing_has_save_on_the_model_side(x):
    seen = {}

    def forward(net, given):
        seen["model"] = can_save()
        with pytest.raises(SaveError):
            nnsight.save(given)
        return net.a(given)

    model = NNsight(seeded(Calls, forward))
    with model.trace(x):
        out = model.a.output
        seen["block"] = can_save()
    assert seen == {"model": [], "block": list(VALUES)}
    assert out.shape == (2, WIDTH)


def test_nothing_has_save_in_a_forward_that_the_end_of_the_block_drives(x):
    seen = []
    model = NNsight(seeded(Calls, lambda net, given: seen.extend(can_save()) or net.a(given)))
    with model.trace(x):
        pass
    assert not seen


def test_nothing_has_save_in_other_threads(model, x):
    with model.trace(x):
        model.emb.output
        assert can_save() == list(VALUES)
        assert in_thread(can_save) == []


def test_nothing_has_save_where_a_generator_holds_a_block_open(model, x):
    def read():
        with model.trace(x):
            yield can_save()

    generator = read()
    assert next(generator) == list(VALUES)
    assert in_thread(can_save) == []
    generator.close()
    assert not can_save()


def test_import_alone_gives_nothing_save():
    source = """
        import nnsight, torch
        print("save" in vars(int), "save" in vars(torch.Tensor), "save" in dir(object))
        nnsight.NNsight(torch.nn.Linear(1, 1))
        print("save" in dir(object), hasattr(5, "save"), hasattr(torch.ones(1), "save"))
    """
    assert run(source).split("\n") == ["False False False", "False False False"]


# -- what has a `save` of its own


class Settings(dict):
    def save(self, path="here"):
        return f"written to {path}"


class Proxy:
    """Answers every name, as proxies do."""

    def __getattr__(self, name):
        return f"attribute {name}"


class Checkpoint(nn.Module):
    def save(self):
        return "checkpoint"


def test_own_save_of_a_subclass_is_kept(model, x):
    settings, tensor = Settings(a=1), torch.ones(1).as_subclass(type("Sub", (torch.Tensor,), {"save": lambda s: "sub"}))
    assert settings.save("x") == "written to x"
    with model.trace(x):
        assert settings.save("x") == "written to x"
        assert tensor.save() == "sub"
        assert nnsight.save(settings) is settings
    assert settings.save() == "written to here"
    assert tensor.save() == "sub"


def test_class_that_answers_every_name_is_kept(model, x):
    with model.trace(x):
        assert Proxy().save == "attribute save"
    assert Proxy().save == "attribute save"


def test_dict_that_answers_every_name_is_kept_outside_of_a_block(model, x):
    class Attributes(dict):
        __getattr__ = dict.__getitem__

    values = Attributes(save="mine")
    assert values.save == "mine"
    with pytest.raises(KeyError):
        Attributes().save  # its own error, as without us


def test_instance_attribute_called_save_is_kept(model, x):
    class Sub(dict):
        pass

    sub, tensor = Sub(), torch.ones(1)
    sub.save = "mine"
    tensor.save = "mine too"
    assert (sub.save, tensor.save) == ("mine", "mine too")
    with model.trace(x):
        assert (sub.save, tensor.save) == ("mine", "mine too")


def test_save_of_a_wrapped_module_is_its_own(x):
    model = NNsight(nn.Sequential(Checkpoint()))
    assert model[0].save() == "checkpoint"
    assert not hasattr(NNsight(nn.Linear(1, 1)), "save")


# -- libraries that look at types


def test_object_and_other_types_are_untouched(model):
    plain_names = json.loads(run("import json; print(json.dumps(dir(object)))"))
    assert dir(object) == plain_names
    assert "save" not in vars(type)
    assert "save" not in dir(nn.Module)
    assert not hasattr(type("Any", (), {}), "save")


@typing.runtime_checkable
class CanSave(typing.Protocol):
    def save(self): ...


def test_runtime_checkable_protocol_with_save_matches_who_has_it(model, net, x):
    def matching():
        candidates = {"checkpoint": Checkpoint(), "object": object(), "module": net, "function": can_save}
        return [name for name, value in candidates.items() if isinstance(value, CanSave)]

    assert matching() == ["checkpoint"]
    with model.trace(x):
        assert matching() == ["checkpoint"]


def test_values_copy_pickle_and_print_as_before(model, x):
    def all_of():
        kept = {name: value for name, value in VALUES.items() if name not in ("tensor", "parameter")}
        return repr(kept), pickle.loads(pickle.dumps(kept)) == kept, copy.deepcopy(kept) == kept

    outside = all_of()
    assert outside[1:] == (True, True)
    with model.trace(x):
        assert all_of() == outside
        assert torch.equal(copy.deepcopy(VALUES["tensor"]), VALUES["tensor"])


def test_class_with_a_field_called_save(model):
    class Point(typing.NamedTuple):
        save: int

    assert Point(3).save == 3
    assert Point(3)._replace(save=4) == (4,)


# -- switched off


def test_switched_off_values_have_no_save_but_the_function_works(model, x, setting):
    setting.PYMOUNT = False
    with model.trace(x):
        assert not can_save()
        with pytest.raises(AttributeError):
            model.emb.output.save()
        kept = nnsight.save(model.h[0].output)
    assert kept.shape == (2, WIDTH)
    setting.PYMOUNT = True
    with model.trace(x):
        assert can_save() == list(VALUES)
