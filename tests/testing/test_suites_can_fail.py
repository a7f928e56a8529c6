"""A plugin that is broken in one way is found by the tests that are about it, and by no others."""

from __future__ import annotations

import copy

import torch
from outcomes import failing
from torch import nn

from nnsight import BatchError, NNsight, traceable
from nnsight.protocols import Inputs
from nnsight.testing import LazyConformance, ModelConformance, StepsConformance
from nnsight.testing.tiny import WIDTH, Net, Repeats, Stepping, repeat, rows, seeded

REPEATED = "test_a_run_of_the_bare_module_can_be_repeated"
EVERY_JOINT = {
    "test_joint_invokes_are_the_inputs_alone",
    "test_change_in_one_invoke_stays_there",
    "test_value_goes_from_one_invoke_to_the_next",
    "test_invoke_without_input_beside_others_sees_all_rows",
}


class OfNet(ModelConformance):
    """A suite that pytest does not collect."""

    kind = NNsight

    def make_module(self):
        return seeded(Net, 2).eval()

    def make_model(self):
        return self.kind(self.make_module())

    def inputs(self):
        return [rows(0, 2), rows(1, 3)]


def broken(**members):
    """Return the suite for a model class with other methods, which can be pickled by its name."""
    kind = type("Broken", (NNsight,), {**members, "__module__": __name__})
    globals()["Broken"] = kind
    return type("Suite", (OfNet,), {"kind": kind})


def test_the_suite_itself_finds_nothing():
    assert failing(OfNet) == set()


def test_prepare_that_changes_the_input():
    def prepare(self, method, args, kwargs):
        return Inputs((args[0] + 1e-3,), kwargs, args[0].shape[0])

    failed = failing(broken(prepare=prepare))
    assert {"test_inputs_are_what_forward_pre_hooks_see", "test_result_is_what_the_bare_module_returns"} <= failed
    assert not failed & {REPEATED, "test_the_tree_mirrors_the_module", "test_wrapping_changes_nothing_on_the_module"}


def test_prepare_that_takes_anything():
    def prepare(self, method, args, kwargs):
        given = args[0] if args and isinstance(args[0], torch.Tensor) else torch.zeros(1, WIDTH)
        return Inputs((given,), kwargs, given.shape[0])

    assert failing(broken(prepare=prepare)) == {
        "test_bad_input_is_refused", "test_trace_without_input_runs_what_needs_none_and_says_so_otherwise",
        "test_invoke_without_input_sees_the_whole_run", "test_invoke_without_input_beside_others_sees_all_rows",
        "test_invokes_one_after_another_are_the_inputs_alone", "test_one_invoke_is_the_input_alone", *EVERY_JOINT,
    }  # fmt: skip


def test_prepare_that_counts_no_rows():
    def prepare(self, method, args, kwargs):
        return Inputs(args, kwargs, None)

    assert "test_prepare_says_how_many_rows_an_input_has" in failing(broken(prepare=prepare))


def test_join_that_mixes_up_the_rows():
    def join(self, inputs):
        joint = NNsight.join(self, inputs)
        return Inputs(tuple(value.flip(0) for value in joint.args), joint.kwargs, joint.rows)

    assert failing(broken(join=join)) == (
        EVERY_JOINT - {"test_invoke_without_input_beside_others_sees_all_rows"} | {"test_one_invoke_is_the_input_alone"}
    )


def test_join_that_refuses():
    def join(self, inputs):
        if len(inputs) > 1:
            raise BatchError("one at a time")
        return NNsight.join(self, inputs)

    suite = broken(join=join)
    assert failing(suite) == EVERY_JOINT
    suite.joins_invokes = False
    assert failing(suite) == set()


def test_rows_that_are_the_neighbours():
    def rows_of(self, tensor, batch):
        mine = NNsight.rows(self, tensor, batch)
        return mine and slice(0, batch.size)

    assert "test_joint_invokes_are_the_inputs_alone" in failing(broken(rows=rows_of))


def test_wrapping_that_puts_a_hook_on_the_module():
    def init(self, module):
        module.h[0].register_forward_hook(lambda *_: None)
        NNsight.__init__(self, module)

    failed = failing(broken(__init__=init))
    assert failed == {
        "test_wrapping_changes_nothing_on_the_module", "test_copies_of_the_module_during_a_trace_are_clean",
        "test_pickled_model_is_the_same",  # the hook cannot be pickled
    }  # fmt: skip


def test_wrapping_that_sets_an_attribute():
    def init(self, module):
        module.lm_head.seen = True
        NNsight.__init__(self, module)

    assert failing(broken(__init__=init)) == {
        "test_wrapping_changes_nothing_on_the_module", "test_copies_of_the_module_during_a_trace_are_clean",
    }  # fmt: skip


def test_wrapping_that_draws_random_numbers():
    def init(self, module):
        torch.rand(1)
        NNsight.__init__(self, module)

    assert failing(broken(__init__=init)) == {"test_wrapping_uses_no_random_numbers"}


def test_wrapping_that_casts_the_weights():
    def init(self, module):
        NNsight.__init__(self, module.double().float().requires_grad_(False))

    failed = failing(broken(__init__=init))
    assert {"test_wrapping_changes_nothing_on_the_module", "test_gradients_are_those_of_autograd"} <= failed
    assert "test_outputs_are_what_forward_hooks_see" not in failed


def test_wrapping_twice():
    def init(self, module):
        NNsight.__init__(self, module)
        NNsight.__init__(self, module)

    assert failing(broken(__init__=init)) == {"test_hooks_of_plugins_fire_once"}


KEPT = []


def test_model_that_something_keeps():
    def init(self, module):
        KEPT.append(module)
        NNsight.__init__(self, module)

    failed = failing(broken(__init__=init))
    KEPT.clear()
    assert failed == {"test_dropping_the_model_frees_it"}


def test_model_in_a_cycle():
    def init(self, module):
        NNsight.__init__(self, module)
        self.me = self

    assert "test_dropping_the_model_frees_it" in failing(broken(__init__=init))


def test_copy_that_shares_the_weights():
    def twin(self, memo):
        return type(self)(self._module)

    assert failing(broken(__deepcopy__=twin)) == {"test_deepcopy_is_a_model_of_its_own"}


def test_state_that_is_lost_when_pickled():
    def init(self, module):
        NNsight.__init__(self, module)
        self.scale = 1

    def prepare(self, method, args, kwargs):
        return Inputs((args[0] * self.__dict__["scale"],), kwargs, args[0].shape[0])

    def state(self):
        return {"module": self._module, "own": {}}

    failed = failing(broken(__init__=init, prepare=prepare, __getstate__=state))
    assert "test_deepcopy_is_a_model_of_its_own" in failed
    assert "test_outputs_are_what_forward_hooks_see" not in failed


def test_model_that_runs_twice():
    class Twice(NNsight):
        def _open(self, *args):
            self._module(*args[2])
            return super()._open(*args)

    suite = type("Suite", (OfNet,), {"kind": Twice})
    assert "test_block_that_asks_for_nothing_still_runs_the_model" in failing(suite)


def test_trace_that_leaves_gradients_off():
    class Off(NNsight):
        def _open(self, *args):
            torch.set_grad_enabled(False)
            return super()._open(*args)

    suite = type("Suite", (OfNet,), {"kind": Off})
    try:
        failed = failing(suite, "test_gradient_mode_of_the_caller_holds_in_the_model", REPEATED)
    finally:
        torch.set_grad_enabled(True)
    assert failed == set()  # a mode that is restored by the caller's own `with` is none of the model's business


def test_module_in_training_mode_with_other_random_numbers():
    class Noisy(OfNet):
        def make_module(self):
            return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout())

    assert failing(Noisy, REPEATED) == {REPEATED}


def test_inputs_that_are_alike():
    class Alike(OfNet):
        def inputs(self):
            return [rows(0), rows(0)]

    assert failing(Alike, REPEATED) == {REPEATED}


# -- steps


class OfRepeats(OfNet, StepsConformance):
    kind = Repeats
    step_method = "repeat"
    step_options = {"times": 4}  # noqa: RUF012

    def make_module(self):
        return seeded(Stepping).eval()

    def run_steps_plainly(self, module, x):
        return repeat(module, x, **self.step_options)


STEPS = {name for name in vars(StepsConformance) if name.startswith("test")}


def test_the_suite_for_steps_itself_finds_nothing():
    assert failing(OfRepeats) == set()


def test_steps_that_are_one_short():
    class Short(NNsight):
        @traceable
        def repeat(self, x, times):
            return repeat(self._module, x, times - 1)

    suite = type("Suite", (OfRepeats,), {"kind": Short})
    failed = failing(suite, *STEPS)
    assert {
        "test_result_of_steps_is_what_the_bare_module_gives", "test_every_step_is_what_hooks_see_in_it",
        "test_steps_without_a_with_simply_run",
    } <= failed  # fmt: skip
    assert not failed & {
        "test_bounded_loop_sees_its_steps",
        "test_request_without_a_loop_means_the_first_step_and_next_the_one_after",
    }


def test_steps_of_a_method_that_is_not_traceable():
    class Untraceable(NNsight):
        def repeat(self, x, times):
            return repeat(self._module, x, times)

    suite = type("Suite", (OfRepeats,), {"kind": Untraceable})
    assert failing(suite, *STEPS) == STEPS - {"test_steps_without_a_with_simply_run"}


def test_one_step_is_not_enough():
    suite = type("Suite", (OfRepeats,), {"step_options": {"times": 1}})
    assert "test_every_step_is_what_hooks_see_in_it" in failing(suite, *STEPS)


# -- weights that are loaded later


class Later(NNsight):
    """Loads what it is told to when it is first needed."""

    def __init__(self, make, is_eager):
        with torch.device("meta"):
            empty = make()
        NNsight.__init__(self, empty.eval())
        self.make = make
        self.is_loaded = False
        if is_eager:
            self.dispatch()

    @property
    def dispatched(self):
        return self.is_loaded

    def dispatch(self):
        if not self.is_loaded:
            self.rebind(self.make().eval())
            self.is_loaded = True


def make_net():
    return seeded(Net, 2)


class OfLater(OfNet, LazyConformance):
    kind = Later

    def make_model(self):
        return self.kind(make_net, True)

    def make_lazy_model(self):
        return self.kind(make_net, False)


LAZY = {name for name in vars(LazyConformance) if name.startswith("test")}


def test_the_suite_for_lazy_weights_itself_finds_nothing():
    assert failing(OfLater) == set()


def test_weights_that_are_there_at_once():
    suite = type("Suite", (OfLater,), {"make_lazy_model": OfLater.make_model})
    assert failing(suite, *LAZY) == {"test_tree_is_there_before_the_weights", "test_scan_loads_no_weights"}


def test_weights_that_are_loaded_again():
    class Again(Later):
        def dispatch(self):
            self.rebind(self.make().eval())
            self.is_loaded = True

    suite = type("Suite", (OfLater,), {"kind": Again})
    assert failing(suite, *LAZY) == {"test_dispatch_loads_the_weights_once"}


def test_other_weights_than_the_bare_model():
    class Other(Later):
        def dispatch(self):
            if not self.is_loaded:
                self.rebind(copy.deepcopy(self.make()).requires_grad_(True).eval())
                with torch.no_grad():
                    self._module.lm_head.weight.add_(1)
                self.is_loaded = True

    suite = type("Suite", (OfLater,), {"kind": Other})
    assert failing(suite, *LAZY) == {"test_dispatch_loads_the_weights_once", "test_first_run_loads_the_weights"}
