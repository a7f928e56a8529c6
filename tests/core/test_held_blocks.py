"""Blocks held open in generators and tasks, and blocks in the wrong thread."""

import asyncio
import contextvars
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from modules import Calls, Net, assert_idle, assert_usable, plain, rows, seeded

from nnsight import NNsight
from nnsight.errors import WrongThreadError


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    model = NNsight(net)
    yield model
    assert_usable(model, net, rows())


def doubled(net, x):
    return plain(net, x, edit=lambda path, output: output * 2 if path == "h.1" else None)


def in_thread(function, *args):
    """Run a function in a new thread; return what it returns or raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def held(model, x):
    with model.trace(x) as tracer:
        yield model.h[0].output
        model.h[1].output = model.h[1].output * 2
        yield model.h[2].output
        yield tracer.result


def test_many_generators_hold_blocks_open_at_once(net, model):
    inputs = [rows(seed) for seed in range(20)]
    generators = [held(model, x) for x in inputs]
    steps = list(zip(*generators, strict=True))
    for index, x in enumerate(inputs):
        expected = doubled(net, x)
        assert torch.equal(steps[0][index], expected.outputs["h.0"][0])
        assert torch.equal(steps[1][index], expected.outputs["h.2"][0])
        assert torch.equal(steps[2][index], expected.result)


def test_generator_steps_in_different_contexts(net, model):
    x = rows()
    generator = held(model, x)
    first = contextvars.Context().run(next, generator)
    second = contextvars.copy_context().run(next, generator)
    third = contextvars.Context().run(next, generator)
    assert contextvars.Context().run(next, generator, "end") == "end"
    expected = doubled(net, x)
    assert torch.equal(first, expected.outputs["h.0"][0])
    assert torch.equal(second, expected.outputs["h.2"][0])
    assert torch.equal(third, expected.result)


async def async_held(model, x):
    with model.trace(x) as tracer:
        yield model.h[0].output
        await asyncio.sleep(0)
        yield model.h[2].output
        yield tracer.result


def test_async_generator_steps_in_different_tasks(net, model):
    x = rows()

    async def main():
        generator = async_held(model, x)
        return [await asyncio.create_task(generator.__anext__()) for _ in range(3)]

    expected = plain(net, x)
    got = asyncio.run(main())
    assert torch.equal(got[0], expected.outputs["h.0"][0])
    assert torch.equal(got[1], expected.outputs["h.2"][0])
    assert torch.equal(got[2], expected.result)


def test_async_generator_that_is_left_early_releases_the_model(net, model):
    async def main():
        async for _ in async_held(model, rows()):
            break
        generator = async_held(model, rows())
        await asyncio.create_task(generator.__anext__())
        await asyncio.create_task(generator.aclose())

    asyncio.run(main())
    assert_idle(net)


def test_cancelled_task_releases_the_model(net, model):
    log = []
    net.h[1].register_forward_hook(lambda *_: log.append("ran"))

    async def work():
        with model.trace(rows()):
            _ = model.h[0].output
            await asyncio.sleep(60)

    async def main():
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert_idle(net)
    assert log == []


def test_block_is_meant_by_its_frame_and_not_by_the_context(net, model):
    x, other = rows(), rows(1)
    generator = held(model, other)
    with model.trace(x):
        next(generator)  # leaves its own block open in this context
        mine = model.h[0].output
        theirs = next(generator)
        last = model.h[2].output
    generator.close()
    assert torch.equal(mine, plain(net, x).outputs["h.0"][0])
    assert torch.equal(theirs, doubled(net, other).outputs["h.2"][0])
    assert torch.equal(last, plain(net, x).outputs["h.2"][0])


def test_task_that_a_block_has_started_belongs_to_it(net, model):
    x = rows()

    async def main():
        async def helper():
            return model.h[1].output

        with model.trace(x):
            _ = model.h[0].output
            return await asyncio.create_task(helper())

    assert torch.equal(asyncio.run(main()), plain(net, x).outputs["h.1"][0])


def test_dropped_generator_releases_the_model(net, model):
    generator = held(model, rows())
    next(generator)
    del generator
    assert_idle(net)
    generator = held(model, rows())
    next(generator)
    cycle = [generator]
    cycle.append(cycle)
    del generator, cycle
    gc.collect()
    assert_idle(net)


# -- the wrong thread


class Watched:
    """A model whose forward notes in which thread it is taken down."""

    def __init__(self):
        self.ended = []

        def forward(module, x):
            try:
                return module.b(module.a(x))
            finally:
                self.ended.append(threading.get_ident())

        self.net = seeded(Calls, forward)
        self.model = NNsight(self.net)

    def held(self):
        with self.model.trace(rows()):
            yield self.model.a.output
            yield self.model.b.output


def test_block_closed_in_another_thread_says_so_and_releases_the_model():
    watched = Watched()
    ready, closed, done = threading.Event(), threading.Event(), []

    def work():
        generator = watched.held()
        next(generator)
        done.append(generator)
        ready.set()
        closed.wait()
        with watched.model.trace(rows()):  # comes by: takes down what was left
            _ = watched.model.a.output

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    with pytest.raises(WrongThreadError, match=r"The end of a block.*opened at .*test_held_blocks.py:\d+.*belongs to"):
        done.pop().close()
    assert_idle(watched.net)
    x = rows()
    with watched.model.trace(x) as tracer:
        result = tracer.result
    assert torch.equal(result, watched.net(x))
    closed.set()
    thread.join()
    assert len(watched.ended) == 4
    assert_usable(watched.model, watched.net, x)


def test_block_whose_thread_has_ended_says_so_and_releases_the_model():
    watched = Watched()
    opened = []

    def work():
        opened.append(watched.held())
        next(opened[0])

    in_thread(work)
    with pytest.raises(WrongThreadError, match="The end of a block"):
        opened.pop().close()
    assert_usable(watched.model, watched.net, rows())
    # another thread may get the number of the one that is gone
    for _ in range(5):
        in_thread(assert_usable, watched.model, watched.net, rows())


def test_block_abandoned_before_its_thread_ends_is_let_go():
    def scenario():
        watched = Watched()
        opened, ready, closed = [], threading.Event(), threading.Event()

        def work():
            opened.append(watched.held())
            next(opened[0])
            ready.set()
            closed.wait()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        ready.wait()
        with pytest.raises(WrongThreadError, match="The end of a block"):
            opened.pop().close()
        closed.set()
        thread.join()
        assert_usable(watched.model, watched.net, rows())
        return weakref.ref(watched.net.a.weight)

    reference = scenario()
    gc.collect()
    assert reference() is None


def test_block_collected_in_another_thread_says_so(monkeypatch):
    watched = Watched()
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(unraisable.exc_value))
    ready, collected = threading.Event(), threading.Event()

    def work():
        cycle = [watched.held()]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        ready.set()
        collected.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    gc.collect()
    collected.set()
    thread.join()
    assert [type(error) for error in said] == [WrongThreadError]
    said.clear()
    assert_usable(watched.model, watched.net, rows())


@pytest.mark.parametrize("carry_context", [False, True])
def test_request_from_another_thread_says_so_and_the_block_goes_on(net, model, carry_context):
    x = rows()

    def elsewhere(request):
        run = contextvars.copy_context().run if carry_context else lambda function: function()
        with pytest.raises(WrongThreadError, match="Read values in the block's own thread and hand them over") as told:
            in_thread(run, request)
        return str(told.value)

    with model.trace(x) as tracer:
        elsewhere(lambda: model.h[0].output)
        hidden = model.h[0].output
        elsewhere(lambda: model.h[0].output)  # the model stands here
        elsewhere(lambda: model.h[1].output)
        elsewhere(lambda: setattr(model.h[0], "output", hidden))
        elsewhere(lambda: model.h[1].skip(hidden))
        elsewhere(lambda: model.h[1](hidden, hook=True))
        carried = "A value" if carry_context else "`tracer.result`"
        assert elsewhere(lambda: tracer.result).startswith(carried)
        assert "`tracer.stop`" in elsewhere(tracer.stop)
        assert model.h[0].output is hidden
        result = tracer.result
    assert torch.equal(result, net(x))


def test_block_opened_inside_the_thread_of_another_is_its_own(net, model):
    x, other = rows(), rows(1)

    def work():
        with model.trace(other):
            return model.h[1].output

    with model.trace(x):
        _ = model.h[0].output
        theirs = contextvars.copy_context().run(in_thread, work)
        mine = model.h[1].output
    assert torch.equal(theirs, plain(net, other).outputs["h.1"][0])
    assert torch.equal(mine, plain(net, x).outputs["h.1"][0])
