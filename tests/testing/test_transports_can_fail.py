"""A transport that is broken in one way is found by the programs that are about it."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from outcomes import failing

from nnsight.testing import CAPTURED, INLINE, Transport, TransportConformance


def suite_of(around, options=None):
    """Return the suite for a transport that opens programs with `around`, a context manager over the method."""

    class Broken(Transport):
        @contextlib.contextmanager
        def around(self, method):
            with around(method) as opened:
                yield opened

    return type("Suite", (TransportConformance,), {"transport": Broken("broken", options or {})})


@pytest.mark.parametrize("transport", [INLINE, CAPTURED], ids=lambda one: one.name)
def test_the_suite_itself_finds_nothing(transport):
    assert failing(type("Suite", (TransportConformance,), {"transport": transport})) == set()


def test_an_input_that_is_changed_on_the_way():
    @contextlib.contextmanager
    def around(method):
        yield lambda x, **kwargs: method(x.half().float() if x.shape[1] == 8 else x, **kwargs)

    failed = failing(suite_of(around))
    assert {"test_outputs_are_what_hooks_see", "test_inputs_are_what_pre_hooks_see"} <= failed
    assert not failed & {"test_block_that_asks_for_nothing_runs", "test_prints_and_warnings_are_told"}


def test_errors_that_are_swallowed():
    @contextlib.contextmanager
    def around(method):
        with contextlib.suppress(Exception):
            yield method

    assert failing(suite_of(around)) == {
        "test_error_in_a_block_keeps_class_chain_and_line",
        "test_error_in_a_function_keeps_class_arguments_and_line",
        "test_error_in_the_model_is_raised_at_the_request",
        "test_name_that_is_not_in_the_tree_is_an_error",
        "test_request_for_what_is_not_reached_is_missed",
    }


def test_errors_that_come_as_others():
    @contextlib.contextmanager
    def around(method):
        try:
            yield method
        except Exception as error:
            raise type(error)("something went wrong") from None

    failed = failing(suite_of(around))
    assert {
        "test_error_in_a_block_keeps_class_chain_and_line",
        "test_error_in_a_function_keeps_class_arguments_and_line",
        "test_request_for_what_is_not_reached_is_missed",
    } <= failed


def test_gradients_that_are_left_off():
    @contextlib.contextmanager
    def around(method):
        with torch.no_grad():
            yield method

    assert failing(suite_of(around)) == {
        "test_assigned_gradient_flows_on",
        "test_computed_value_can_be_edited_afterwards",
        "test_gradient_of_what_the_block_made_of_values",
        "test_gradients_are_off_where_the_caller_has_them_off",
        "test_gradients_of_values_are_those_of_autograd",
        "test_weights_get_gradients",
    }


def test_prints_that_are_lost():
    @contextlib.contextmanager
    def around(method):
        with contextlib.redirect_stdout(io.StringIO()):
            yield method

    assert failing(suite_of(around)) == {"test_prints_and_warnings_are_told"}


def test_edits_of_the_model_that_are_left_behind():
    @contextlib.contextmanager
    def around(method):
        envoy = method.__self__
        yield method if envoy.parent is not None else getattr(type(envoy)(envoy._module), method.__name__)

    assert failing(suite_of(around)) == {"test_edit_of_the_model_takes_part"}


def test_invokes_that_are_never_one_batch():
    """Options reach what a program opens without `around`, too."""

    @contextlib.contextmanager
    def around(method):
        yield method

    failed = failing(suite_of(around, {"batched": False}))
    assert {"test_invokes_see_and_change_their_rows", "test_barrier_lets_invokes_meet"} <= failed
    assert "test_invokes_one_after_another_are_runs_of_their_own" in failed  # it says batched=False itself
