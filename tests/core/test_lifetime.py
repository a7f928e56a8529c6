"""K5 and K10: after a run nothing remains, and `del model` frees it without the cyclic collector."""

import gc
import threading
import weakref
from types import FunctionType

import pytest
import torch
from greenlet import greenlet
from modules import WIDTH, Net, assert_idle, rows, run, seeded

from nnsight import NNsight
from nnsight.errors import MissedProviderError, OrphanError, OutOfOrderError
from nnsight.kernel import sides


@pytest.fixture(autouse=True)
def _no_cyclic_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Failing(Net):
    """Fails between its blocks and its head."""

    def forward(self, x):
        super().forward(x)
        raise KeyError("in the model")


class Stubborn(Net):
    """Swallows whatever is raised in its blocks."""

    def forward(self, x):
        for block in self.h:
            try:
                x = block(x)
            except BaseException:
                pass
        return x


def left_after(scenario, kind=Net):
    """Run a scenario on a new model, drop the model, and return what of it is still alive."""
    net = seeded(kind)
    model = NNsight(net)
    watched = {"wrapper": weakref.ref(model), "block": weakref.ref(model.h[1]), "net": weakref.ref(net)}
    watched |= {name: weakref.ref(parameter) for name, parameter in net.named_parameters()}
    scenario(model)
    assert_idle(net)
    del net, model
    return [name for name, reference in watched.items() if reference() is not None]


# -- ways for a run to end


def only_wrapped(model):
    pass


def reads_and_writes(model):
    with torch.no_grad(), model.trace(rows()) as tracer:
        model.h[0].output[:] = 0
        model.h[1].output = model.h[1].output * 2
        model.h[2].skip(model.h[2].input)
        _ = tracer.result


def asks_for_nothing(model):
    with model.trace(rows()):
        pass


def runs_without_a_block(model):
    model.trace(rows(), trace=False)


def traces_a_part(model):
    with model.h[1].trace(rows()):
        _ = model.h[1].attn.output


def model_raises(model):
    try:
        with model.trace(rows()):
            _ = model.h[0].output
            _ = model.output
    except KeyError:
        pass


def model_raises_and_the_block_goes_on(model):
    with model.trace(rows()):
        try:
            _ = model.output
        except KeyError:
            pass


def model_gets_a_wrong_shape(model):
    try:
        with model.trace(rows(width=WIDTH + 1)):
            _ = model.output
    except RuntimeError:
        pass


def block_raises(model):
    try:
        with model.trace(rows()):
            _ = model.h[0].output
            raise KeyError("in the block")
    except KeyError:
        pass


def block_raises_before_the_model_starts(model):
    try:
        with model.trace(rows()):
            raise KeyError("in the block")
    except KeyError:
        pass


def block_stops(model):
    with model.trace(rows()) as tracer:
        _ = model.h[0].output
        tracer.stop()


def asks_out_of_order(model):
    with model.trace(rows()):
        _ = model.h[1].output
        try:
            _ = model.h[0].output
        except OutOfOrderError:
            pass


def asks_for_what_is_not_reached(model):
    with model.trace(rows()):
        try:
            _ = model.h.output
        except MissedProviderError:
            pass


def is_interrupted(model):
    try:
        with model.trace(rows()):
            _ = model.h[0].output
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def traces_itself_inside(model):
    with model.trace(rows()):
        _ = model.h[0].output
        with model.trace(rows(1)):
            _ = model.h[1].output
        _ = model.h[2].output


def traces_another_inside(model):
    other = NNsight(seeded(Net, seed=1))
    with model.trace(rows()):
        with other.trace(rows(1)):
            other.h[1].output = model.h[0].output
            model.h[1].output = other.h[2].output


def runs_in_a_thread(model):
    def work():
        with model.trace(rows()):
            _ = model.h[1].output

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def held(model):
    with model.trace(rows()):
        yield model.h[0].output
        yield model.h[1].output


def generator_runs_out(model):
    list(held(model))


def generator_is_closed(model):
    generator = held(model)
    next(generator)
    generator.close()


def generator_is_dropped(model):
    next(held(model))


def tracer_is_kept(model):
    with model.trace(rows()) as tracer:
        _ = model.h[0].output
    kept.append(tracer)


def attaches_and_deletes(model):
    model.h[0].adapter = torch.nn.Linear(WIDTH, WIDTH)
    with model.trace(rows()):
        _ = model.h[0].adapter(model.h[0].output)
    del model.h[0].adapter


kept = []


@pytest.mark.parametrize(
    "scenario",
    [
        only_wrapped, reads_and_writes, asks_for_nothing, runs_without_a_block, traces_a_part,
        model_gets_a_wrong_shape, block_raises, block_raises_before_the_model_starts, block_stops, asks_out_of_order,
        asks_for_what_is_not_reached, is_interrupted, traces_itself_inside, traces_another_inside, runs_in_a_thread,
        generator_runs_out, generator_is_closed, generator_is_dropped, tracer_is_kept, attaches_and_deletes,
    ],
)  # fmt: skip
def test_model_is_freed_after_it(scenario):
    assert left_after(scenario) == []


@pytest.mark.parametrize("scenario", [model_raises, model_raises_and_the_block_goes_on])
def test_model_is_freed_after_its_own_error(scenario):
    assert left_after(scenario, Failing) == []


@pytest.mark.parametrize("scenario", [block_raises, block_stops, is_interrupted])
def test_model_that_swallows_the_unwinding_is_freed(scenario):
    assert left_after(scenario, Stubborn) == []


def test_input_and_values_are_freed_when_the_block_lets_go_of_them():
    model = NNsight(seeded(Net))
    x = rows()
    with model.trace(x) as tracer:
        hidden = model.h[0].output
        result = tracer.result
    references = [weakref.ref(value) for value in (x, hidden, result)]
    del x, hidden, result
    assert [reference() for reference in references] == [None, None, None]


def test_frame_of_the_block_is_freed():
    model = NNsight(seeded(Net))

    class Local:
        pass

    def function():
        local = Local()
        with model.trace(rows()):
            _ = model.h[0].output
        return weakref.ref(local)

    assert function()() is None


def test_error_that_is_kept_keeps_no_instrumentation():
    net = seeded(Failing)
    model = NNsight(net)
    with pytest.raises(KeyError) as caught:
        with model.trace(rows()):
            _ = model.output
    assert caught.value.__traceback__ is not None
    assert_idle(net)


# -- greenlets, controllers, workers


def count(kind):
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


def controllers():
    functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
    return sum(f"{thing.__module__}.{thing.__name__}" == "nnsight.kernel.controller.controller" for thing in functions)


@pytest.mark.parametrize(
    "scenario",
    [reads_and_writes, block_raises, block_stops, asks_out_of_order, traces_itself_inside, generator_is_dropped],
)
def test_many_runs_leave_no_more_than_one(scenario):
    model = NNsight(seeded(Net))
    scenario(model)
    before = count(greenlet), controllers(), threading.active_count(), len(gc.get_objects())
    for _ in range(50):
        scenario(model)
    after = count(greenlet), controllers(), threading.active_count(), len(gc.get_objects())
    assert after[:3] == before[:3]
    assert after[3] - before[3] < 50  # less than one object per run


def test_controllers_go_with_the_model():
    before = controllers()
    model = NNsight(seeded(Net))
    assert controllers() == before
    reads_and_writes(model)
    assert controllers() > before
    del model
    assert controllers() == before


def test_idle_workers_are_few_and_refer_to_nothing():
    model = NNsight(seeded(Net))

    def nest(depth):
        with model.trace(rows()):
            _ = model.h[0].output
            if depth:
                nest(depth - 1)

    nest(2 * sides._POOL_SIZE)
    idle = [*sides._local.idle.models, *sides._local.idle.blocks]
    assert max(len(sides._local.idle.models), len(sides._local.idle.blocks)) <= sides._POOL_SIZE
    for worker in idle:
        assert worker.job is None
        assert worker.gr_context is None
        for value in worker.gr_frame.f_locals.values():
            assert value is None or isinstance(value, (bool, greenlet))


# -- interpreters and threads that end


SETUP = """
    import threading
    import torch
    from modules import Net, rows, seeded
    from nnsight import NNsight

    torch.set_num_threads(1)
    net = seeded(Net)
    model = NNsight(net)

    def trace():
        with model.trace(rows()) as tracer:
            hidden = model.h[0].output
            return tracer.result

    def held():
        with model.trace(rows()):
            yield model.h[0].output
            yield model.h[1].output
"""


def test_threads_that_have_traced_exit_quietly():
    program = f"""{SETUP}
    threads = [threading.Thread(target=trace) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(torch.equal(trace(), net(rows())))
    """
    assert run(program) == "True"


def test_thread_that_ends_with_an_open_block_exits_quietly():
    program = f"""{SETUP}
    def work():
        generator = held()
        next(generator)
        del generator
        generator = held()
        next(generator)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(torch.equal(trace(), net(rows())))
    """
    assert run(program) == "True"


def test_interpreter_with_an_open_block_exits_quietly():
    program = f"""{SETUP}
    generator = held()
    print(next(generator).shape)
    """
    assert run(program) == "torch.Size([2, 8])"


def test_interpreter_exits_quietly_with_a_tracer_that_was_never_left():
    program = f"""{SETUP}
    tracer = model.trace(rows()).__enter__()
    print(model.h[0].output.shape)
    """
    assert run(program) == "torch.Size([2, 8])"


# -- orphans


def test_part_does_not_keep_its_root_alive():
    net = seeded(Net)
    block = NNsight(net).h[1]
    for use in (lambda: block.root, lambda: block.output, lambda: block.trace(rows()).__enter__()):
        with pytest.raises(OrphanError, match=r"`model.h.1` belongs to is gone.*Keep the wrapper in a variable"):
            use()
    assert block.parent is None
    assert torch.equal(block(rows()), net.h[1](rows()))
