"""When the model or the block raises, is interrupted, or will not be taken down: who sees what, and what is left."""

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
