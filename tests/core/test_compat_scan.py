"""Programs of 0.6 and 0.7 that scan: each test is one, as users write it."""

from __future__ import annotations

import pytest
import torch
from modules import WIDTH, Calls, Net, rows, seeded

import nnsight
from nnsight import NNsight


class ModelError(Exception):
    """What a program raises itself when a model does not suit it."""


def test_scan_with_keyword_arguments_gives_shapes():
    model = NNsight(seeded(Calls, lambda self, x, scale=1: self.b(self.a(x)) * scale))
    with model.scan(x=rows(), scale=2):
        size = nnsight.save(model.a.output.shape[-1])
        out = nnsight.save(model.output.shape)
    assert size == WIDTH
    assert out == (2, WIDTH)


def test_scan_on_a_dict():
    model = NNsight(seeded(Calls, lambda self, batch: self.a(batch["x"])))
    with model.scan({"x": rows()}):
        shape = nnsight.save(model.a.output.shape)
    assert shape == (2, WIDTH)


def test_stop_in_a_scan():
    net = seeded(Net)
    model = NNsight(net)
    with model.scan(rows()) as tracer:
        shape = nnsight.save(model.h[0].output.shape)
        tracer.stop()
        nnsight.save(model.no_such_module)
    assert shape == (2, WIDTH)
    with model.trace(rows()):
        out = model.output.save()
    assert torch.equal(out, net(rows()))


def test_helper_closures_in_a_scan_check_a_model():
    model = NNsight(seeded(Net))
    found = {}

    def check(name, get):
        found[name] = tuple(get().shape)

    def run():
        with model.scan(rows()) as tracer:
            check("embedded", lambda: model.emb.output)
            for index in range(3):
                check(f"layer {index}", lambda index=index: model.h[index].output)
            tracer.stop()

    run()
    assert found == {name: (2, WIDTH) for name in ("embedded", "layer 0", "layer 1", "layer 2")}


@pytest.mark.parametrize("how", ["scan", "trace"])
def test_users_exception_keeps_its_class_and_message(how):
    model = NNsight(seeded(Net))
    with pytest.raises(Exception, match="layer 0 gives 8, not 9") as caught:
        with getattr(model, how)(rows()):
            size = model.h[0].output.shape[-1]
            if size != 9:
                raise ModelError(f"layer 0 gives {size}, not 9")
    assert isinstance(caught.value, ModelError)
    assert str(caught.value) == "layer 0 gives 8, not 9"


@pytest.mark.parametrize("how", ["scan", "trace"])
def test_users_exception_is_caught_by_its_class_outside(how):
    model = NNsight(seeded(Net))
    try:
        with getattr(model, how)(rows()):
            try:
                _ = model.h[0].output.shape[7]
            except IndexError as error:
                raise ModelError("unsuited") from error
    except ModelError as error:
        caught = error
    assert type(caught.__cause__) is IndexError
