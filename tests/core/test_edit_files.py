"""Edits as files: source and tensors, without pickle."""

import gc
import io
import json
import math
import weakref

import numpy as np
import pytest
import torch
from modules import WIDTH, Net, plain, rows, run, seeded

from nnsight import CONFIG, NNsight
from nnsight.errors import CaptureError, EditFileError

SCALE = 3


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def result_of(model, x):
    with model.trace(x) as tracer:
        result = tracer.result
    return result


def edited_by(net, x, **changes):
    names = {name.replace("_", "."): change for name, change in changes.items()}
    return plain(net, x, edit=lambda path, output: names[path](output) if path in names else None).result


def test_edits_come_back_from_a_file(net, model, tmp_path):
    x, vector = rows(), torch.arange(float(WIDTH))
    factor, layers = 2.5, [0, 2]
    with model.edit() as edited:
        model.h[1].output = model.h[1].output * factor + vector
    with edited.edit() as edited:
        for index in layers:
            model.h[index].attn.output[:, index] = torch.zeros(1) + SCALE
    path = edited.export_edits("mine", tmp_path)
    fresh = NNsight(net)
    fresh.import_edits("mine", tmp_path)
    assert path == tmp_path / "mine" / "__default__.safetensors"
    assert torch.equal(result_of(fresh, x), result_of(edited, x))
    assert not torch.equal(result_of(fresh, x), net(x))
    assert torch.equal(result_of(model, x), net(x))


def test_file_is_read_in_another_process(net, model, tmp_path):
    shift = torch.full((WIDTH,), 0.5)
    with model.edit(inplace=True):
        model.h[0].output = model.h[0].output + shift
    model.export_edits("mine", tmp_path)
    printed = run(
        f"""
        import torch
        from modules import Net, rows, seeded
        from nnsight import NNsight
        model = NNsight(seeded(Net))
        model.import_edits("mine", {str(tmp_path)!r})
        with model.trace(rows()) as tracer:
            result = tracer.result
        print(result.sum().item())
        """
    )
    expected = edited_by(net, rows(), h_0=lambda output: output + shift)
    assert float(printed) == expected.sum().item()


def test_all_kinds_of_values(net, model, tmp_path):
    none, yes, number, text = None, True, 7, "é\n"
    real, infinite = 0.1, [math.inf, -0.0]
    nested = {"list": [1, (2.5, "x")], "none": None}
    half, integers, flags = torch.ones(3, dtype=torch.bfloat16), torch.arange(4), torch.tensor([True, False])
    scalar, empty = torch.tensor(2.0), torch.empty(0, 3)
    turned = torch.arange(6.0).reshape(2, 3).t()
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    layer = model.h[1]
    with model.edit(inplace=True):
        values = (none, yes, number, text, real, infinite, nested, half, integers, flags, scalar, empty, turned, array)
        layer.values = values
        layer.names = (torch.nn.__name__, np.pi, layer.path, model.path, len(text), abs(-number))
    model.export_edits("kinds", tmp_path)
    again = NNsight(net)
    again.import_edits("kinds", tmp_path)
    result_of(again, rows())
    seen = again.h[1].values
    wanted = (none, yes, number, text, real, infinite, nested, half, integers, flags, scalar, empty, turned, array)
    for value, expected in zip(seen, wanted, strict=True):
        assert type(value) is type(expected)
        if isinstance(expected, torch.Tensor):
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected)
        elif isinstance(expected, np.ndarray):
            assert value.dtype == expected.dtype
            assert (value == expected).all()
        else:
            assert value == expected
    assert math.copysign(1, seen[5][1]) == -1
    assert again.h[1].names == ("torch.nn", np.pi, "model.h.1", "model", 2, 7)


def test_gradient_is_wanted_as_it_was(net, model, tmp_path):
    weight = torch.ones(1, requires_grad=True)
    with model.edit(inplace=True) as same:
        model.h[0].output = model.h[0].output * weight
        same.h[0].weight_seen = weight
    model.export_edits("grad", tmp_path)
    again = NNsight(net)
    again.import_edits("grad", tmp_path)
    result_of(again, rows())
    assert again.h[0].weight_seen.requires_grad


def test_statements_functions_and_contexts_of_an_edit(net, model, tmp_path):
    x = rows()
    with model.edit(inplace=True) as (tracer, same), torch.no_grad():

        def scale(value, by=SCALE):
            """Scale.

            By a number.
            """
            return value * by

        for step in tracer.iter[:1]:
            hidden = same.h[step].output
            total = sum(scale(part) for part in (hidden, hidden))
            same.h[step].output = total if (doc := scale.__doc__) else hidden
            same.h[step].doc = doc
    model.export_edits("statements", tmp_path)
    again = NNsight(net)
    again.import_edits("statements", tmp_path)
    expected = edited_by(net, x, h_0=lambda output: output * 6)
    assert torch.allclose(result_of(again, x), expected, atol=1e-6)
    assert [line.strip() for line in again.h[0].doc.splitlines()][:3] == ["Scale.", "", "By a number."]
    assert torch.equal(result_of(model, x), result_of(again, x))


def test_edit_of_a_part_is_the_parts(net, model, tmp_path):
    x = rows()
    with model.h[0].edit(inplace=True) as block:
        block.attn.output[:] = 0
    model.export_edits("part", tmp_path)
    again = NNsight(net)
    again.h[2].import_edits("part", tmp_path)
    assert torch.equal(result_of(again, x), edited_by(net, x, h_0_attn=lambda output: output * 0))


def test_imported_edits_are_added_and_can_be_exported_again(net, model, tmp_path):
    x = rows()
    with model.edit(inplace=True):
        model.h[0].output[:] = 0
    model.export_edits("one", tmp_path)
    again = NNsight(net)
    with again.edit(inplace=True):
        again.h[0].output = again.h[0].output + 1
    again.import_edits("one", tmp_path)
    again.export_edits("both", tmp_path)
    last = NNsight(net)
    last.import_edits("both", tmp_path)
    assert len(last.edits) == 2
    assert torch.equal(result_of(last, x), edited_by(net, x, h_0=lambda output: output * 0))


def test_variants_and_the_default_folder(net, model, tmp_path, monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "CACHE_DIR", tmp_path)
    for factor in (2, 3):
        model.clear_edits()
        with model.edit(inplace=True):
            model.h[0].output = model.h[0].output * factor
        path = model.export_edits("scaled", variant=f"by-{factor}")
        assert path == tmp_path / "exports" / "scaled" / f"by-{factor}.safetensors"
    again = NNsight(net)
    again.import_edits("scaled", variant="by-2")
    assert torch.equal(result_of(again, rows()), edited_by(net, rows(), h_0=lambda output: output * 2))


def test_error_in_an_imported_edit_shows_its_line(net, model, tmp_path):
    with model.edit(inplace=True):
        hidden = model.h[0].output
        raise KeyError(hidden.shape)
    model.export_edits("failing", tmp_path)
    again = NNsight(net)
    again.import_edits("failing", tmp_path)
    with pytest.raises(KeyError) as caught:
        result_of(again, rows())
    assert "in the edit opened at <edits failing, __default__>" in caught.value.__notes__[0]
    assert str(caught.traceback[-1].statement).strip() == "raise KeyError(hidden.shape)"


class Custom:
    def __init__(self):
        self.factor = 2

    def scaled(self, value):
        return helper(value) * self.factor


def helper(value):
    return value * SCALE


def test_functions_classes_and_instances_of_the_users_files(net, model, tmp_path):
    x, custom, shift = rows(), Custom(), torch.ones(1)
    layer = torch.nn.Linear(WIDTH, WIDTH)
    both = [shift, {1: shift}]

    def moved(value):
        return value + shift

    with model.edit(inplace=True):
        model.h[0].output = moved(custom.scaled(model.h[0].output))
        model.h[1].output = layer(model.h[1].output)
        model.h[2].seen = (type(custom) is Custom, both[0] is both[1][1])
    model.export_edits("custom", tmp_path)
    again = NNsight(net)
    again.import_edits("custom", tmp_path)
    expected = edited_by(net, x, h_0=lambda output: output * 6 + 1, h_1=layer)
    assert torch.allclose(result_of(again, x), expected, atol=1e-6)
    assert again.h[2].seen == (True, True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (io.StringIO(), r"_io\.StringIO"),
        ((n for n in "a"), "generator"),
        (torch.eye(2).to_sparse(), r"torch\.Tensor, of torch\.float32, torch\.sparse_coo"),
        (np.array([object()]), r"numpy\.ndarray, of object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_values_are_refused_by_name_and_type_and_nothing_is_written(model, tmp_path, value, kind):
    with model.edit(inplace=True):
        _ = value
    match = rf"cannot be exported. The variable 'value' of .*test_edit_files\.py:\d+ cannot be sent: it is a {kind}"
    with pytest.raises(EditFileError, match=match):
        model.export_edits("mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_value_deep_in_a_container_is_named(model, tmp_path):
    settings = {"layers": [1, io.StringIO()]}
    with model.edit(inplace=True):
        _ = settings
    with pytest.raises(EditFileError, match=r"'settings' .*, item 'layers', item 1: it is a _io\.StringIO"):
        model.export_edits("mine", tmp_path)


def test_envoy_of_another_model_is_refused(model, tmp_path):
    other = NNsight(seeded(Net))
    with model.edit(inplace=True):
        _ = other
    with pytest.raises(EditFileError, match=r"'other' .*of another model"):
        model.export_edits("mine", tmp_path)


class Owner:
    __factor = 2

    def edit(self, model):
        with model.edit(inplace=True):
            model.h[0].output = model.h[0].output * self.__factor


def test_private_names_are_those_of_the_class(net, model, tmp_path):
    Owner().edit(model)
    model.export_edits("mine", tmp_path)
    again = NNsight(net)
    again.import_edits("mine", tmp_path)
    assert torch.equal(result_of(again, rows()), edited_by(net, rows(), h_0=lambda output: output * 2))


def test_same_file_is_imported_again_after_it_has_changed(net, model, tmp_path):
    for factor in (2, 3):
        model.clear_edits()
        if factor == 2:
            with model.edit(inplace=True):
                model.h[0].output = model.h[0].output * 2
        else:
            with model.edit(inplace=True):
                model.h[0].output = model.h[0].output * 3
        model.export_edits("mine", tmp_path)
        if factor == 2:
            first = NNsight(net)
            first.import_edits("mine", tmp_path)
    second = NNsight(net)
    second.import_edits("mine", tmp_path)
    first.export_edits("first", tmp_path)  # its text is still its own
    third = NNsight(net)
    third.import_edits("first", tmp_path)
    for found, factor in ((first, 2), (second, 3), (third, 2)):
        assert torch.equal(
            result_of(found, rows()), edited_by(net, rows(), h_0=lambda output, factor=factor: output * factor)
        )


def test_edit_that_binds_outside_of_itself_is_refused(model, tmp_path):
    with model.edit(inplace=True):
        global SEEN
        SEEN = model.h[0].output
    with pytest.raises(EditFileError, match="binds variables outside of itself"):
        model.export_edits("mine", tmp_path)


def test_model_without_edits_cannot_be_exported(model, tmp_path):
    with pytest.raises(EditFileError, match=r"Cannot export an Envoy before calling \.edit\(\)"):
        model.export_edits("mine", tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "..", "/etc"])
def test_names_that_leave_the_folder_are_refused(model, tmp_path, name):
    with model.edit(inplace=True):
        pass
    with pytest.raises(EditFileError, match="cannot be the name of exported edits"):
        model.export_edits(name, tmp_path)
    with pytest.raises(EditFileError, match="cannot be the name of exported edits"):
        model.import_edits("mine", tmp_path, variant=name)


def test_file_that_is_not_there(model, tmp_path):
    with pytest.raises(EditFileError, match=r"No edits can be read from .*__default__\.safetensors.*No such file"):
        model.import_edits("mine", tmp_path)


@pytest.mark.parametrize("damage", ["empty", "short", "text", "tensors"])
def test_damaged_file_is_refused_and_adds_nothing(net, model, tmp_path, damage):
    vector = torch.ones(WIDTH)
    with model.edit(inplace=True):
        model.h[0].output = model.h[0].output + vector
    path = model.export_edits("mine", tmp_path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "short": content[:40], "text": b"{}" * 50, "tensors": content[:-8]}[damage])
    again = NNsight(net)
    with pytest.raises(EditFileError, match="cannot be used"):
        again.import_edits("mine", tmp_path)
    assert again.edits == []


def test_edit_of_what_the_model_does_not_have_is_refused(model, tmp_path):
    layer = model.h[2]
    with model.edit(inplace=True):
        layer.output[:] = 0
    model.export_edits("mine", tmp_path)
    small = NNsight(seeded(Net, 2))
    with pytest.raises(EditFileError, match="cannot be used: .*no"):
        small.import_edits("mine", tmp_path)
    assert small.edits == []


def test_file_is_plain_data(model, tmp_path):
    vector = torch.arange(3.0)
    with model.edit(inplace=True):
        _ = vector
    content = model.export_edits("mine", tmp_path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"]["nnsight"])
    assert about["format"] == 2
    assert about["edits"]["blocks"][0]["text"].endswith("_ = vector\n")
    assert header["piece.0"] == {"dtype": "U8", "shape": [12], "data_offsets": [0, 12]}
    assert content[8 + size :] == vector.numpy().tobytes()


def test_file_of_another_format_says_so(net, model, tmp_path):
    with model.edit(inplace=True):
        pass
    path = model.export_edits("mine", tmp_path)
    path.write_bytes(path.read_bytes().replace(b'format\\": 2', b'format\\": 1'))
    with pytest.raises(EditFileError, match="its format is 1, and this version reads 2"):
        NNsight(net).import_edits("mine", tmp_path)


def test_imported_source_that_leaves_its_block_is_refused(net, model, tmp_path):
    with model.edit(inplace=True):
        _ = 1
    path = model.export_edits("mine", tmp_path)
    path.write_bytes(path.read_bytes().replace(b"_ = 1", b"yield"))
    with pytest.raises((CaptureError, EditFileError)):
        NNsight(net).import_edits("mine", tmp_path)


def test_edits_of_a_part_that_is_called_as_the_root_are_found(tmp_path):
    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.model(x))

    model, x = NNsight(Around()), torch.ones(1, 4)
    with model.edit(inplace=True):
        model.model.output = model.model.output * 2
    model.export_edits("mine", tmp_path)
    fresh = NNsight(model._module)
    fresh.import_edits("mine", tmp_path)
    with fresh.trace(x):
        result = fresh.output
    assert torch.equal(result, model._module.head(model._module.model(x) * 2))


PROGRAM = """
factor = 2

def scaled(value):
    return value * factor

with model.edit(inplace=True):
    model.h[0].output = scaled(model.h[0].output)
"""


def test_model_with_imported_edits_is_freed_without_the_cyclic_collector(net, tmp_path):
    """Also where the edit is written at the top of a file, and so names its model as a global."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    x, module = rows(), seeded(Net)
    namespace = {"model": NNsight(module), "__name__": "program", "__file__": str(path)}
    exec(compile(PROGRAM, str(path), "exec"), namespace)
    namespace["model"].export_edits("mine", tmp_path)

    def use():
        other = NNsight(seeded(Net))
        other.import_edits("mine", tmp_path)
        assert torch.equal(result_of(other, x), edited_by(module, x, h_0=lambda output: output * 2))
        return weakref.ref(other._module)

    gc.collect()
    gc.disable()
    try:
        assert use()() is None
    finally:
        gc.enable()
