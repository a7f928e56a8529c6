"""When the model or the block raises, is interrupted, or will not be taken down: who sees what, and what is left."""

import os
import signal
import threading
import time
import traceback

import pytest
import torch
from modules import Calls, assert_usable, rows, seeded

from nnsight import NNsight
from nnsight.errors import OutOfOrderError


def make(forward):
    net = seeded(Calls, forward)
    return net, NNsight(net)


def last_line(error):
    """Return the last line of a traceback."""
    return traceback.extract_tb(error.__traceback__)[-1].line


def lines_here(error):
    return [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]


class Flaky:
    """A forward that fails while it is told to, between `a` and `b`."""

    def __init__(self, fail):
        self.fail = fail
        self.failing = True

    def __call__(self, module, x):
        x = module.a(x)
        if self.failing:
            self.fail()
        return module.b(x)


def failing(fail):
    flaky = Flaky(fail)
    net, model = make(flaky)
    return net, model, flaky


def recovers(net, model, flaky):
    flaky.failing = False
    assert_usable(model, net, rows())


# -- the model raises


def test_model_error_is_raised_at_the_line_that_waits():
    error = KeyError("in the model")

    def fail():
        raise error

    net, model, flaky = failing(fail)
    after = []
    with pytest.raises(KeyError) as caught:
        with model.trace(rows()):
            hidden = model.a.output
            _ = model.b.output  # waits
            after.append("went on")
    assert caught.value is error
    assert after == []
    assert torch.equal(hidden, net.a(rows()))
    assert "_ = model.b.output  # waits" in lines_here(error)
    assert last_line(error) == "raise error"
    recovers(net, model, flaky)


def test_model_error_is_raised_at_the_end_when_nobody_waits():
    def fail():
        raise KeyError("in the model")

    net, model, flaky = failing(fail)
    with pytest.raises(KeyError, match="in the model"):
        with model.trace(rows()):
            _ = model.a.output
    recovers(net, model, flaky)


def test_model_error_can_be_caught_and_the_block_goes_on():
    def fail():
        raise KeyError("in the model")

    net, model, flaky = failing(fail)
    after = []
    with model.trace(rows()):
        with pytest.raises(KeyError, match="in the model"):
            _ = model.b.output
        after.append("went on")
        with pytest.raises(KeyError, match="in the model"):  # why the run is over
            _ = model.b.output
        with pytest.raises(OutOfOrderError):
            _ = model.a.output
    assert after == ["went on"]
    recovers(net, model, flaky)


def test_model_error_keeps_its_cause_and_context():
    def fail():
        try:
            {}["missing"]
        except KeyError as inner:
            raise ValueError("outer") from inner

    net, model, flaky = failing(fail)
    with pytest.raises(ValueError, match="outer") as caught:
        with model.trace(rows()):
            _ = model.b.output
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__context__ is caught.value.__cause__
    assert "{}[" in last_line(caught.value.__cause__)
    recovers(net, model, flaky)


def test_model_error_keeps_its_chain_when_the_block_is_handling_another():
    def fail():
        try:
            {}["missing"]
        except KeyError:
            raise ValueError("outer")  # noqa: B904  the context is what is tested

    net, model, flaky = failing(fail)
    with pytest.raises(ValueError, match="outer") as caught:
        with model.trace(rows()):
            try:
                raise LookupError("of the block")
            except LookupError:
                _ = model.b.output
    assert type(caught.value.__context__) is KeyError
    recovers(net, model, flaky)


def test_model_does_not_see_what_the_block_is_handling():
    import sys

    seen = []
    _, model = make(lambda self, x: seen.append(sys.exception()) or self.a(x))
    with model.trace(rows()):
        try:
            raise LookupError("of the block")
        except LookupError:
            _ = model.a.output
            assert isinstance(sys.exception(), LookupError)
    assert seen == [None]


@pytest.mark.parametrize("port", ["output", "input", "inputs"])
def test_attribute_error_in_the_model_is_not_masked(port):
    def fail():
        torch.zeros(1).no_such_attribute  # the model's own mistake

    net, model, flaky = failing(fail)
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_attribute'") as caught:
        with model.trace(rows()):
            getattr(model.b, port)
    assert caught.value.name == "no_such_attribute"
    recovers(net, model, flaky)


def test_attribute_error_in_the_model_is_not_masked_by_result():
    def fail():
        torch.zeros(1).no_such_attribute

    net, model, flaky = failing(fail)
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_attribute'"):
        with model.trace(rows()) as tracer:
            _ = tracer.result
    recovers(net, model, flaky)


def test_attribute_error_handled_by_a_subclass_is_forgotten():
    class Careful(NNsight):
        @property
        def output(self):
            try:
                return super().output
            except AttributeError:
                return None

    def fail():
        torch.zeros(1).no_such_attribute

    flaky = Flaky(fail)
    net = seeded(Calls, flaky)
    model = Careful(net)
    with model.trace(rows()):
        assert model.output is None
    with pytest.raises(AttributeError, match="neither a module nor an attribute 'something_else'"):
        _ = model.something_else
    recovers(net, model, flaky)


def test_stop_iteration_in_the_model_stays_itself():
    def fail():
        next(iter(()))

    net, model, flaky = failing(fail)
    with pytest.raises(StopIteration):
        with model.trace(rows()):
            _ = model.b.output
    recovers(net, model, flaky)


def test_torch_error_message_is_unchanged():
    net, model, flaky = failing(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError) as expected:
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(RuntimeError) as caught:
        with model.trace(rows()):
            _ = model.b.output
    assert str(caught.value) == str(expected.value)
    recovers(net, model, flaky)


# -- the block raises


class OwnError(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code


def test_block_error_keeps_class_object_and_last_line():
    log = []

    def forward(self, x):
        try:
            return self.b(self.a(x))
        finally:
            log.append("finally")

    net, model = make(forward)
    error = OwnError(7, detail="mine")
    with pytest.raises(OwnError) as caught:
        with model.trace(rows()):
            _ = model.a.output
            raise error
    assert caught.value is error
    assert last_line(error) == "raise error"
    assert len(traceback.extract_tb(error.__traceback__)) == 1
    assert error.__cause__ is None
    assert error.__context__ is None
    assert log == ["finally"]
    assert_usable(model, net, rows())


def test_block_error_keeps_its_chain():
    net, model = make(lambda self, x: self.b(self.a(x)))
    with pytest.raises(OwnError) as caught:
        with model.trace(rows()):
            hidden = model.a.output
            try:
                hidden.no_such_attribute
            except AttributeError as error:
                raise OwnError(1, detail="chained") from error
    assert isinstance(caught.value.__cause__, AttributeError)
    assert last_line(caught.value.__cause__) == "hidden.no_such_attribute"
    with pytest.raises(OwnError) as caught:
        with model.trace(rows()):
            _ = model.a.output
            try:
                {}["missing"]
            finally:
                raise OwnError(2, detail="in finally")
    assert isinstance(caught.value.__context__, KeyError)
    assert_usable(model, net, rows())


def test_block_error_in_a_helper_ends_in_the_helper():
    net, model = make(lambda self, x: self.b(self.a(x)))

    def helper(value):
        return value.no_such_attribute

    with pytest.raises(AttributeError) as caught:
        with model.trace(rows()):
            helper(model.a.output)
    assert lines_here(caught.value)[-2:] == ["helper(model.a.output)", "return value.no_such_attribute"]
    assert last_line(caught.value) == "return value.no_such_attribute"
    assert_usable(model, net, rows())


def test_block_error_before_the_model_started_never_starts_it():
    ran = []
    _, model = make(lambda self, x: ran.append(1))
    with pytest.raises(OwnError):
        with model.trace(rows()):
            raise OwnError(1, detail="early")
    assert ran == []


def test_block_error_after_the_run_is_over():
    net, model = make(lambda self, x: self.b(self.a(x)))
    with pytest.raises(OwnError):
        with model.trace(rows()) as tracer:
            _ = tracer.result
            raise OwnError(1, detail="late")
    assert_usable(model, net, rows())


def test_model_error_while_unwinding_does_not_replace_the_block_error():
    failing = [True]

    def forward(self, x):
        try:
            return self.b(self.a(x))
        finally:
            if failing.pop():
                failing.append(False)
                raise KeyError("of the model's finally")
            failing.append(False)

    net, model = make(forward)
    with pytest.raises(OwnError) as caught:
        with model.trace(rows()):
            _ = model.a.output
            raise OwnError(1, detail="of the block")
    assert caught.value.__context__ is None
    assert_usable(model, net, rows())


def test_generator_exit_and_system_exit_pass_through():
    net, model = make(lambda self, x: self.b(self.a(x)))
    for kind in (SystemExit, GeneratorExit):
        with pytest.raises(kind):
            with model.trace(rows()):
                _ = model.a.output
                raise kind
        assert_usable(model, net, rows())


# -- a model that will not be taken down


def test_finally_blocks_call_modules_while_unwinding():
    log = []

    def forward(self, x):
        try:
            return self.b(self.a(x))
        finally:
            log.append(self.c(x))

    net, model = make(forward)
    x = rows()
    with pytest.raises(OwnError):
        with model.trace(x):
            _ = model.a.output
            raise OwnError(1, detail="of the block")
    assert torch.equal(log[0], net.c(x))
    assert_usable(model, net, x)


def test_model_that_swallows_everything_is_unwound_at_its_next_visit():
    log = []

    def forward(self, x):
        try:
            x = self.a(x)
        except BaseException:
            log.append("swallowed")
        try:
            x = self.b(x)
            log.append("b ran")
        except BaseException:
            log.append("swallowed again")
        return self.c(x)

    net, model = make(forward)
    with pytest.raises(OwnError):
        with model.trace(rows()):
            _ = model.a.output
            raise OwnError(1, detail="of the block")
    assert log == ["swallowed", "swallowed again"]
    log.clear()
    assert_usable(model, net, rows())


def test_model_that_swallows_and_returns_is_over():
    def forward(self, x):
        try:
            return self.a(x)
        except BaseException:
            return x

    net, model = make(forward)
    with pytest.raises(OwnError):
        with model.trace(rows()):
            _ = model.a.output
            raise OwnError(1, detail="of the block")
    assert_usable(model, net, rows())


def test_handler_that_calls_modules_and_goes_on_is_taken_down_after_it():
    log = []

    def forward(self, x):
        try:
            x = self.a(x)
        except BaseException:
            x = self.b(x)
            log.append("in the handler")
        x = self.c(x)
        log.append("after the handler")
        return x

    net, model = make(forward)
    with pytest.raises(OwnError):
        with model.trace(rows()):
            _ = model.a.output
            raise OwnError(1, detail="of the block")
    assert log == ["in the handler"]
    assert_usable(model, net, rows())


def test_model_that_catches_exceptions_does_not_catch_the_unwinding():
    caught = []

    def forward(self, x):
        try:
            return self.b(self.a(x))
        except Exception as error:
            caught.append(error)
            return x

    net, model = make(forward)
    with model.trace(rows()) as tracer:
        _ = model.a.output
        tracer.stop()
    assert caught == []
    assert_usable(model, net, rows())


def test_context_managers_of_the_model_are_left():
    entered = []

    class Managed:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *error):
            entered.pop()

    def forward(self, x):
        with Managed(), torch.no_grad():
            return self.b(self.a(x))

    net, model = make(forward)
    with pytest.raises(OwnError):
        with model.trace(rows()):
            _ = model.a.output
            assert entered == [1]
            raise OwnError(1, detail="of the block")
    assert entered == []
    assert torch.is_grad_enabled()
    assert_usable(model, net, rows())


# -- interrupts


def interrupt():
    """Do as Ctrl-C does, and wait for it."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(2000):
        time.sleep(0.005)
    raise AssertionError("the interrupt did not come")


def test_interrupt_in_the_model_is_raised_where_the_block_waits():
    net, model, flaky = failing(interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as caught:
        with model.trace(rows()):
            hidden = model.a.output
            _ = model.b.output  # interrupted
    assert time.monotonic() - start < 5
    assert torch.equal(hidden, net.a(rows()))
    assert "_ = model.b.output  # interrupted" in lines_here(caught.value)
    recovers(net, model, flaky)


def test_interrupt_in_the_model_at_the_end_of_the_block():
    net, model, flaky = failing(interrupt)
    with pytest.raises(KeyboardInterrupt):
        with model.trace(rows()):
            pass
    recovers(net, model, flaky)


def test_interrupt_in_the_block_unwinds_the_model():
    log = []

    def forward(self, x):
        try:
            return self.b(self.a(x))
        finally:
            log.append("finally")

    net, model = make(forward)
    with pytest.raises(KeyboardInterrupt) as caught:
        with model.trace(rows()):
            _ = model.a.output
            interrupt()
    assert log == ["finally"]
    assert "interrupt()" in lines_here(caught.value)
    assert_usable(model, net, rows())


def test_interrupts_at_any_moment_leave_the_model_usable():
    net, model = make(lambda self, x: self.c(self.b(self.a(x))))
    x = rows()

    def trace_until_interrupted(delay):
        sender = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            sender.start()
            while True:
                with model.trace(x):
                    _ = model.a.output
                    _ = model.b.output
        except KeyboardInterrupt:
            return

    for delay in range(30):
        trace_until_interrupted(0.005 + delay * 0.0007)
        assert_usable(model, net, x)
