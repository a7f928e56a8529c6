"""Any number of threads and tasks trace one model at once, and blocks move between tasks."""

import asyncio
import contextlib
import contextvars
import copy
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from modules import WIDTH, Calls, Net, assert_usable, plain, rows, seeded

from nnsight import NNsight, protocols
from nnsight.errors import MissedProviderError


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


# -- at once


def test_eight_threads_trace_one_model_with_exact_results(net, model):
    inputs = [rows(seed) for seed in range(8)]
    expected = [doubled(net, x) for x in inputs]
    start = threading.Barrier(8)

    def work(index):
        start.wait()
        wrong = 0
        for _ in range(60):
            with model.trace(inputs[index]) as tracer:
                first = model.h[0].output
                model.h[1].output = model.h[1].output * 2
                result = tracer.result
            wrong += not torch.equal(first, expected[index].outputs["h.0"][0])
            wrong += not torch.equal(result, expected[index].result)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8


def test_fifty_tasks_trace_one_model_with_exact_results(net, model):
    inputs = [rows(seed) for seed in range(50)]
    expected = [doubled(net, x) for x in inputs]

    async def work(x):
        for _ in range(3):
            with model.trace(x) as tracer:
                first = model.h[0].output
                await asyncio.sleep(0)
                model.h[1].output = model.h[1].output * 2
                await asyncio.sleep(0.001)
                last = model.h[2].output
                await asyncio.sleep(0)
                result = tracer.result
        return first, last, result

    async def main():
        return await asyncio.gather(*(work(x) for x in inputs))

    for got, wanted in zip(asyncio.run(main()), expected, strict=True):
        assert torch.equal(got[0], wanted.outputs["h.0"][0])
        assert torch.equal(got[1], wanted.outputs["h.2"][0])
        assert torch.equal(got[2], wanted.result)


def test_plain_forward_in_another_thread_is_untouched_by_a_trace(net, model):
    x, other = rows(), rows(1)
    expected = net(other)
    stop, results = threading.Event(), []

    def forward():
        while not stop.is_set():
            results.append(torch.equal(net(other), expected))

    thread = threading.Thread(target=forward)
    thread.start()
    while len(results) < 300:
        with model.trace(x):
            model.h[0].output = torch.zeros(2, WIDTH)
            model.h[1].skip(torch.zeros(2, WIDTH))
    stop.set()
    thread.join()
    assert all(results)


def test_plain_forward_between_two_requests_is_untouched(net, model):
    x, other = rows(), rows(1)
    expected = net(other)
    with model.trace(x):
        _ = model.h[0].output
        assert torch.equal(in_thread(net, other), expected)
        assert torch.equal(net(other), expected)
        last = model.h[2].output
    assert torch.equal(last, plain(net, x).outputs["h.2"][0])


def train(net, steps=40):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        net(rows(step)).pow(2).sum().backward()
        optimizer.step()


def test_training_in_another_thread_equals_training_alone(net, model):
    alone = copy.deepcopy(net)
    train(alone)
    thread = threading.Thread(target=train, args=(net,))
    thread.start()
    traces = 0
    while thread.is_alive() or not traces:
        with torch.no_grad(), model.trace(rows()):
            model.h[0].output[:] = 0
            _ = model.h[2].output
        traces += 1
    thread.join()
    for got, expected in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, expected)


# -- forwards that use threads


def test_forward_with_a_thread_pool_passes_through(net):
    pool = ThreadPoolExecutor(2)

    def forward(self, x):
        context = contextvars.copy_context()
        left = pool.submit(self.a, x)
        right = pool.submit(context.run, self.b, x)
        return self.c(left.result() + right.result())

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        given = model.c.input
        result = tracer.result
    assert torch.equal(given, net.a(x) + net.b(x))
    assert torch.equal(result, net(x))
    for part in ("a", "b"):
        with model.trace(x), pytest.raises(MissedProviderError, match="or it was called from another thread"):
            _ = model.get(part).output
    assert_usable(model, net, x)
    pool.shutdown()


def test_forward_that_sends_its_parts_to_threads_and_tasks():
    def forward(self, x):
        async def main():
            in_another = await asyncio.to_thread(self.a, x)
            return await asyncio.create_task(call(in_another))

        async def call(x):
            return self.b(x)

        return asyncio.run(main())

    net = seeded(Calls, forward)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        hidden = model.b.output
        model.b.output = hidden * 2
        result = tracer.result
    assert torch.equal(hidden, net.b(net.a(x)))
    assert torch.equal(result, hidden * 2)


def test_blocks_that_are_left_by_return_in_threads_that_take_turns_often(net, model):
    x, interval = rows(), sys.getswitchinterval()
    expected = net(x)

    def look():
        with model.trace(x):
            return model.output

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = [future.result() for future in [pool.submit(look) for _ in range(1200)]]
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(result, expected) for result in results)


# -- what is kept per code object


def test_what_is_kept_for_a_code_object_is_one_for_all_threads(monkeypatch):
    together, make = threading.Barrier(2), weakref.ref

    def wait_and_make(*args):
        with contextlib.suppress(threading.BrokenBarrierError):  # one thread comes here alone
            together.wait(timeout=0.5)
        return make(*args)

    monkeypatch.setattr(protocols, "weakref", types.SimpleNamespace(ref=wait_and_make))
    code, known = compile("1", "<test>", "eval"), protocols.PerCode()
    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in [pool.submit(known.of, code) for _ in range(2)]]
    assert found[0] is found[1] is known.of(code)
