"""Edits: blocks that take part in every later run of a model."""

import gc
import weakref

import pytest
import torch
from modules import WIDTH, Calls, Net, assert_idle, assert_usable, plain, rows, seeded
from test_steps import Cell, Generating, steps_of

from nnsight import NNsight
from nnsight.errors import CaptureError, OutOfOrderError


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def close(left, right):
    return torch.allclose(left, right, atol=1e-6)


def zeroed(net, x, *paths):
    return plain(net, x, edit=lambda path, output: output * 0 if path in paths else None)


def scaled(net, x, **factors):
    return plain(net, x, edit=lambda path, output: output * factors[path] if path in factors else None)


# -- the copy and the original


def test_edited_copy_and_untouched_original(net, model):
    x = rows()
    with model.edit() as edited:
        model.h[0].output[:] = 0
    with model.trace(x) as tracer:
        original = tracer.result
    with edited.trace(x) as tracer:
        hidden = edited.h[0].output
        changed = tracer.result
    assert torch.equal(original, plain(net, x).result)
    assert torch.equal(hidden, torch.zeros(2, WIDTH))
    assert torch.equal(changed, zeroed(net, x, "h.0").result)
    assert edited._module is net
    assert_idle(net)


def test_body_does_not_run_when_the_edit_is_made(model):
    ran = []
    with model.edit():
        ran.append(1)
    assert ran == []


def test_edit_reads_through_either_wrapper(net, model):
    x = rows()
    with model.edit() as edited:
        edited.h[0].output = edited.h[0].output * 0
    with edited.trace(x):
        through_the_original = model.lm_head.output
        assert through_the_original is edited.lm_head.output
    assert torch.equal(through_the_original, zeroed(net, x, "h.0").result)


def test_edit_in_place(net, model):
    x = rows()
    with model.edit(inplace=True) as same:
        model.h[0].output[:] = 0
    with model.trace(x) as tracer:
        changed = tracer.result
    assert same is model
    assert torch.equal(changed, zeroed(net, x, "h.0").result)
    model.clear_edits()
    with model.trace(x) as tracer:
        restored = tracer.result
    assert torch.equal(restored, plain(net, x).result)


def test_clear_edits_of_a_copy_leaves_the_original_alone(net, model):
    x = rows()
    with model.edit(inplace=True):
        model.h[0].output[:] = 0
    with model.edit() as edited:
        model.h[1].output[:] = 0
    edited.clear_edits()
    with edited.trace(x) as tracer:
        plainly = tracer.result
    with model.trace(x) as tracer:
        still = tracer.result
    assert torch.equal(plainly, plain(net, x).result)
    assert torch.equal(still, zeroed(net, x, "h.0").result)


def test_edit_on_both_forms_of_as(net, model):
    x = rows()
    with model.edit() as (tracer, edited):
        model.h[0].output[:] = 0
    with model.edit(inplace=True) as [tracer_too, same]:
        model.h[1].output[:] = 0
    assert same is model
    assert tracer is not tracer_too
    with edited.trace(x) as run:
        first = run.result
    with model.trace(x) as run:
        second = run.result
    assert torch.equal(first, zeroed(net, x, "h.0").result)
    assert torch.equal(second, zeroed(net, x, "h.1").result)
    model.clear_edits()


def test_plain_call_of_an_edited_model_runs_no_edit(net, model):
    x = rows()
    with model.edit() as edited:
        model.h[0].output[:] = 0
    assert torch.equal(edited(x), net(x))
    assert torch.equal(edited.trace(x, trace=False), zeroed(net, x, "h.0").result)


# -- several edits


def test_edits_take_part_in_the_order_they_were_made(net, model):
    x = rows()
    with model.edit() as once:
        model.h[0].output = model.h[0].output * 2
    with once.edit() as twice:
        model.h[0].output = model.h[0].output + 1
    with twice.trace(x):
        seen = model.h[0].output
    with once.trace(x):
        before = model.h[0].output
    expected = plain(net, x).outputs["h.0"][0]
    assert torch.equal(seen, expected * 2 + 1)
    assert torch.equal(before, expected * 2)


def test_block_of_the_trace_comes_after_the_edits(net, model):
    x = rows()
    with model.edit() as edited:
        model.h[0].output = model.h[0].output * 0 + 1
    with edited.trace(x) as tracer:
        model.h[0].output = model.h[0].output + 4
        result = tracer.result
    assert torch.equal(result, plain(net, x, edit=lambda path, out: out * 0 + 5 if path == "h.0" else None).result)


def test_edits_in_a_loop_keep_their_turns_values(net, model):
    x = rows()
    for i in range(3):
        with model.edit(inplace=True):
            model.h[i].output = model.h[i].output * (i + 2)
    with model.trace(x) as tracer:
        result = tracer.result
    model.clear_edits()
    assert close(result, scaled(net, x, **{"h.0": 2, "h.1": 3, "h.2": 4}).result)


# -- variables


def edit_with(model, factor, store):
    count = 0
    with model.edit() as edited:
        count += 1
        store.append(count)
        model.h[0].output = model.h[0].output * factor
    return edited


def test_edit_keeps_the_values_it_was_made_with_and_starts_anew_in_every_run(net, model):
    x, store = rows(), []
    edited = edit_with(model, 3, store)
    for _ in range(2):
        with edited.trace(x):
            hidden = model.h[0].output
        assert torch.equal(hidden, plain(net, x).outputs["h.0"][0] * 3)
    assert store == [1, 1]


def test_what_an_edit_binds_does_not_reach_the_traces_frame(model):
    hidden = "mine"
    with model.edit() as edited:
        hidden = model.h[0].output
        also_hidden = hidden
    with edited.trace(rows()):
        pass
    assert hidden == "mine"
    assert "also_hidden" not in locals()


def test_variable_that_a_function_around_the_edit_sets_is_live(net, model):
    factor = 2

    def set_factor(value):
        nonlocal factor
        factor = value

    with model.edit() as edited:
        model.h[0].output = model.h[0].output * factor
    set_factor(5)
    x = rows()
    with edited.trace(x):
        hidden = model.h[0].output
    assert torch.equal(hidden, plain(net, x).outputs["h.0"][0] * 5)


# -- parts of a model


def test_edit_is_seen_when_a_part_is_traced(net, model):
    x = rows()
    with model.edit() as edited:
        model.h[0].attn.output[:] = 0
    with edited.h[0].trace(x) as tracer:
        part = tracer.result
    assert torch.equal(part, plain(net.h[0], x, edit=lambda path, out: out * 0 if path == "attn" else None).result)


def test_edit_of_another_part_does_not_disturb(net, model):
    x = rows()
    with model.edit() as edited:
        model.emb.output[:] = 0
        model.h[0].attn.output[:] = 0
    with edited.h[1].trace(x) as tracer:
        part = tracer.result
    assert torch.equal(part, net.h[1](x))


def test_part_is_edited_through_itself_and_seen_from_the_parent(net, model):
    x = rows()
    with model.h[0].edit() as block:
        model.h[0].attn.output[:] = 0
    with block.trace(x) as tracer:
        part = tracer.result
    with block.root.trace(x) as tracer:
        whole = tracer.result
    with model.trace(x) as tracer:
        original = tracer.result
    expected = plain(net.h[0], x, edit=lambda path, out: out * 0 if path == "attn" else None)
    assert torch.equal(part, expected.result)
    assert torch.equal(whole, zeroed(net, x, "h.0.attn").result)
    assert torch.equal(original, plain(net, x).result)


def test_edit_in_place_of_a_part_is_the_models(net, model):
    x = rows()
    with model.h[0].edit(inplace=True):
        model.h[0].output[:] = 0
    with model.trace(x) as tracer:
        whole = tracer.result
    model.h[0].clear_edits()
    with model.trace(x) as tracer:
        restored = tracer.result
    assert torch.equal(whole, zeroed(net, x, "h.0").result)
    assert torch.equal(restored, plain(net, x).result)


# -- with invokes and steps


def test_edit_takes_part_in_the_whole_batch(net, model):
    a, b = rows(0), rows(1)
    with model.edit() as edited:
        model.h[0].output[:] = 0
        shape = model.h[1].output.shape
        assert shape == (4, WIDTH)
    with edited.trace() as tracer:
        with tracer.invoke(a):
            first = model.h[0].output
            one = tracer.result
        with tracer.invoke(b):
            model.h[0].output = model.h[0].output + 1
            two = tracer.result
    assert torch.equal(first, torch.zeros(2, WIDTH))
    assert close(one, zeroed(net, a, "h.0").result)
    assert close(two, plain(net, b, edit=lambda path, out: out * 0 + 1 if path == "h.0" else None).result)


def test_edit_takes_part_in_invokes_that_run_apart(net, model):
    with model.edit() as edited:
        model.h[0].output[:] = 0
    got = []
    with edited.trace(batched=False) as tracer:
        for i in range(2):
            with tracer.invoke(rows(i)):
                got.append(tracer.result)
    for i, result in enumerate(got):
        assert torch.equal(result, zeroed(net, rows(i), "h.0").result)


def test_edit_without_a_loop_is_for_the_first_step():
    net = seeded(Cell)
    model, x = Generating(net), rows()
    with model.edit() as edited:
        model.first.output[:] = 0
    with edited.generate(x) as tracer:
        result = tracer.result
    assert torch.equal(result, steps_of(net, x, edit=lambda step, out: out * 0 if step == 0 else out)[-1][3])


@pytest.mark.parametrize("form", ["tracer", "model", "all", "block"])
def test_edit_with_steps(form):
    net = seeded(Cell)
    model, x = Generating(net), rows()
    with model.edit() as (tracer, edited):
        if form == "tracer":
            for step in tracer.iter[1::2]:
                model.first.output[:] = 0
        elif form == "model":
            for step in model.iter[1::2]:
                model.first.output[:] = 0
        elif form == "all":
            for step in model.all():
                if step % 2:
                    model.first.output[:] = 0
        else:
            with tracer.iter[:] as step:
                if step % 2:
                    model.first.output[:] = 0
    with edited.generate(x) as run:
        seen = [model.second.output for _ in run.iter[:]]
        result = run.result
    expected = steps_of(net, x, edit=lambda step, out: out * 0 if step % 2 else out)
    assert all(torch.equal(value, plain[2]) for value, plain in zip(seen, expected, strict=True))
    assert torch.equal(result, expected[-1][3])


def test_edit_with_next_and_stop():
    net = seeded(Cell)
    model, x = Generating(net), rows()
    steps, after = [], []
    with model.edit() as (tracer, edited):
        tracer.next(2)
        _ = model.first.output
        tracer.stop()
    with edited.generate(x) as run:
        for step in run.iter[:]:
            _ = model.second.output
            steps.append(step)
        after.append("dropped")
    assert steps == [0, 1]
    assert after == []
    assert_idle(net)


# -- errors


def test_failing_edit_names_itself_and_the_model_stays_usable(net, model):
    with model.edit() as edited:
        _ = model.h[0].output
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine") as caught:
        with edited.trace(rows()) as tracer:
            _ = tracer.result
    notes = " ".join(caught.value.__notes__)
    line = caught.traceback[-1].lineno + 1
    assert notes == f"in the edit opened at {__file__}:{line - 2}"
    assert_usable(model, net, rows())


def test_failing_edit_is_told_to_a_block_that_waits_and_once_only(net, model):
    with model.edit() as edited:
        _ = model.h[0].output
        raise KeyError("mine")
    caught = []
    with edited.trace(rows()) as tracer:
        try:
            _ = tracer.result
        except KeyError as error:
            caught.append(error)
    assert len(caught) == 1
    assert_usable(model, net, rows())


def test_edit_that_asks_in_the_wrong_order_names_itself(net, model):
    with model.edit() as edited:
        _ = model.h[1].output
        _ = model.h[0].output
    with pytest.raises(OutOfOrderError, match=r"`model\.h\.0\.output`") as caught:
        with edited.trace(rows()):
            pass
    assert "in the edit opened at" in caught.value.__notes__[0]
    with pytest.raises(OutOfOrderError):
        with edited.h[1].trace(rows()):
            with edited.trace(rows()):
                pass
    assert_usable(model, net, rows())


def test_edit_that_cannot_be_captured_says_why(model):
    def run():
        with model.edit():
            return 1

    with pytest.raises(CaptureError, match="`return` at"):
        run()
    assert model.edits == []


# -- lifetime


def test_edited_copy_of_a_part_keeps_its_model():
    net = seeded(Net)
    x = rows()

    def make():
        model = NNsight(net)
        with model.h[0].edit() as block:
            block.output[:] = 0
        return block

    block = make()
    gc.collect()
    with block.trace(x) as tracer:
        result = tracer.result
    assert torch.equal(result, torch.zeros(2, WIDTH))


def test_edited_copy_of_a_part_is_freed_without_the_cyclic_collector():
    def make():
        net = seeded(Net)
        model = NNsight(net)
        with model.h[0].edit() as block:
            block.output[:] = 0
        with block.edit(inplace=True):
            block.mlp.output = block.mlp.output + 1
        with block.edit() as again:
            again.output = block.attn.output
        with again.trace(rows()):
            pass
        with block.root.trace(rows()) as tracer:
            result = tracer.result
        assert torch.equal(result, net.lm_head(net.h[2](net.h[1](torch.zeros(2, WIDTH)))))
        return weakref.ref(net), weakref.ref(block.root), weakref.ref(again.root)

    make()
    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in make()] == [None, None, None]
    finally:
        gc.enable()


def test_edited_copy_of_a_part_is_a_part_of_its_model():
    net = seeded(Net)
    model, x = NNsight(net), rows()
    with model.h[0].edit() as block:
        block.output[:] = 0
    assert block.path == "model.h.0"
    assert [path for path, _ in block.named_modules()] == ["model.h.0", "model.h.0.attn", "model.h.0.mlp"]
    block.adapter = torch.nn.Linear(WIDTH, WIDTH)
    assert block.root.h[0].adapter is block.adapter
    assert block.adapter.path == "model.h.0.adapter"
    assert block.adapter.parent is block.root.h[0]
    with block.edit(inplace=True):
        block.output = block.adapter(block.output, hook=True)
    with block.root.trace(x):
        adapted = block.adapter.output
        hidden = block.root.h[1].input
    assert torch.equal(adapted, net.h[0].adapter(torch.zeros(2, WIDTH)))
    assert hidden is adapted
    with model.trace(x):
        untouched = model.h[0].output
    assert torch.equal(untouched, net.h[0](net.emb(x)))
    del block.adapter
    assert [path for path, _ in block.named_modules()] == ["model.h.0", "model.h.0.attn", "model.h.0.mlp"]
    assert not hasattr(block, "adapter")


def test_edit_does_not_keep_the_function_it_was_written_in(model):
    class Thing:
        pass

    def make():
        thing = Thing()
        reference = weakref.ref(thing)
        factor = 2
        with model.edit() as edited:
            model.h[0].output = model.h[0].output * factor
        return edited, reference

    gc.disable()
    try:
        edited, reference = make()
        assert reference() is None
        with edited.trace(rows()):
            pass
    finally:
        gc.enable()


def test_edited_model_is_freed():
    def make():
        net = seeded(Net)
        model = NNsight(net)
        with model.edit() as edited:
            _ = torch.zeros(1)
        with edited.trace(rows()):
            pass
        return weakref.ref(net)

    make()
    gc.collect()
    gc.disable()
    try:
        assert make()() is None
    finally:
        gc.enable()


def test_modules_added_later_are_reached_by_edits():
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    model, x = NNsight(net), rows()
    model.c = torch.nn.Linear(WIDTH, WIDTH)
    with model.edit() as edited:
        model.a.output = model.c(model.a.output, hook=True)
    with edited.trace(x) as tracer:
        seen = model.c.output
        result = tracer.result
    assert torch.equal(seen, net.c(net.a(x)))
    assert torch.equal(result, net.b(net.c(net.a(x))))


def test_model_that_is_edited_in_place_by_name_is_freed():
    def make():
        net = seeded(Net)
        model = NNsight(net)
        with model.edit(inplace=True) as (tracer, same):
            for _ in tracer.iter[:1]:
                model.h[0].output = same.h[0].output * 2
        with model.trace(rows()):
            pass
        return weakref.ref(net)

    make()
    gc.collect()
    gc.disable()
    try:
        assert make()() is None
    finally:
        gc.enable()
