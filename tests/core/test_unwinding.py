"""A model is taken down where it stands when its block ends early, whatever it does against that."""

import pytest
import torch
from modules import Calls, assert_usable, rows, seeded

from nnsight import NNsight


class OwnError(Exception):
    pass


def make(forward):
    net = seeded(Calls, forward)
    return net, NNsight(net)


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
            raise OwnError("of the block")
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
            raise OwnError("of the block")
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
            raise OwnError("of the block")
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
            raise OwnError("of the block")
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
            raise OwnError("of the block")
    assert entered == []
    assert torch.is_grad_enabled()
    assert_usable(model, net, rows())
