# ruff: noqa: PLW0120 - loops as users write them
"""Steps: which occurrence a block's requests mean, in generation and on modules called several times in a forward."""

import warnings

import pytest
import torch
from modules import WIDTH, Calls, assert_idle, assert_usable, rows, seeded
from torch import nn

from nnsight import NNsight, traceable
from nnsight.errors import CaptureError, InputError, MissedProviderError, OutOfOrderError


class Cell(nn.Module):
    """One step of a toy generation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.second(torch.relu(self.first(x))))


class Gather(nn.Module):
    def forward(self, x):
        return x


class Generating(NNsight):
    """A model class with a method that calls the model step by step."""

    def __init__(self, module):
        super().__init__(module)
        self.mount("generator", Gather(), ends_steps=True)

    @traceable
    def generate(self, x, steps=4):
        for _ in range(steps):
            x = self._module(x)
        return self.generator(x)


class Loop(nn.Module):
    """A forward that calls one module several times."""

    def __init__(self, times=5):
        super().__init__()
        self.times = times
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return self.after(x)


@pytest.fixture
def net():
    return seeded(Cell)


@pytest.fixture
def model(net):
    return Generating(net)


def steps_of(net, x, count=4, edit=None):
    """What every step gives: inputs, first, second and output, by plain torch; `edit` changes what `first` gives."""
    found = []
    for step in range(count):
        first = net.first(x)
        first = first if edit is None else edit(step, first)
        second = net.second(torch.relu(first))
        output = torch.tanh(second)
        found.append((x, first, second, output))
        x = output
    return found


def close(left, right):
    return torch.allclose(left, right, atol=1e-6)


# -- which steps


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (slice(None), [0, 1, 2, 3]),
        (slice(3), [0, 1, 2]),
        (slice(1, 3), [1, 2]),
        (slice(2, None), [2, 3]),
        (slice(0, 4, 2), [0, 2]),
        (slice(None, None, 2), [0, 2]),
        (slice(1, None, 2), [1, 3]),
        (slice(2, 2), []),
        (2, [2]),
        ([0, 2, 3], [0, 2, 3]),
        ((1, 3), [1, 3]),
        ([], []),
        (torch.tensor(1), [1]),
    ],
)
def test_loop_gives_the_values_of_its_steps(net, model, steps, expected):
    x = rows()
    got = []
    with model.generate(x) as tracer:
        for step in tracer.iter[steps]:
            got.append((step, model.first.output, model.output))
        result = tracer.result
    plain = steps_of(net, x)
    assert [step for step, _, _ in got] == expected
    for step, first, output in got:
        assert torch.equal(first, plain[step][1])
        assert torch.equal(output, plain[step][3])
    assert torch.equal(result, plain[-1][3])


def test_all_is_every_step(net, model):
    x = rows()
    with model.generate(x) as tracer:
        got = [model.second.output for _ in tracer.all()]
    assert [torch.equal(value, plain[2]) for value, plain in zip(got, steps_of(net, x), strict=True)] == [True] * 4


def test_iter_itself_is_every_step(model):
    with model.generate(rows()) as tracer:
        got = [step for step in tracer.iter if model.first.output is not None]
    assert got == [0, 1, 2, 3]


def test_request_without_a_loop_means_the_first_step(net, model):
    x = rows()
    with model.generate(x):
        value = model.second.output
    assert torch.equal(value, steps_of(net, x)[0][2])


def test_edits_in_a_loop_change_their_steps_only(net, model):
    x = rows()
    with model.generate(x) as tracer:
        for _ in tracer.iter[1:3]:
            model.first.output[:] = 0
        result = tracer.result
    plain = steps_of(net, x, edit=lambda step, first: first * 0 if step in (1, 2) else first)
    assert torch.equal(result, plain[-1][3])


def test_condition_in_a_loop(net, model):
    x = rows()
    got = []
    with model.generate(x) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                model.first.output = model.first.output * 0
            got.append(model.second.output)
    plain = steps_of(net, x, edit=lambda step, first: first * 0 if step == 2 else first)
    assert all(torch.equal(value, expected[2]) for value, expected in zip(got, plain, strict=True))


def test_body_that_asks_for_something_on_some_steps_only(net, model):
    x = rows()
    got = []
    with model.generate(x) as tracer:
        for step in tracer.iter[:]:
            if step % 2:
                got.append((step, model.first.output))
    plain = steps_of(net, x)
    assert [step for step, _ in got] == [1, 3]
    assert all(torch.equal(value, plain[step][1]) for step, value in got)


def test_input_of_the_root_is_read_at_every_step(net, model):
    x = rows()
    with model.generate(x) as tracer:
        got = [model.input for _ in tracer.iter[:]]
    assert all(torch.equal(value, expected[0]) for value, expected in zip(got, steps_of(net, x), strict=True))


def test_modules_called_several_times_in_one_forward():
    net = seeded(Loop)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        got = [model.inner.output for _ in tracer.iter[:]]
        result = tracer.result
    value = x
    for output in got:
        value = net.inner(value)
        assert torch.equal(output, value)
    assert len(got) == 5
    assert torch.equal(result, net(x))


def test_stride_on_modules_called_several_times():
    net = seeded(Loop)
    model, x = NNsight(net), rows()
    with model.trace(x) as tracer:
        got = [(step, model.inner.input) for step in tracer.iter[1:5:2]]
        after = model.after.output
    assert [step for step, _ in got] == [1, 3]
    assert torch.equal(got[1][1], net.inner(net.inner(net.inner(x))))
    assert torch.equal(after, net(x))


# -- next


def test_next_of_the_tracer(net, model):
    x = rows()
    with model.generate(x) as tracer:
        zero = model.first.output
        one = tracer.next() and model.first.output
        tracer.next(2)
        three = model.first.output
    plain = steps_of(net, x)
    assert all(torch.equal(value, plain[step][1]) for step, value in ((0, zero), (1, one), (3, three)))


def test_next_of_an_envoy(net, model):
    x = rows()
    with model.generate(x):
        zero = model.first.output
        one = model.first.next().output
        same = model.second.output
        three = model.second.next(2).output
    plain = steps_of(net, x)
    assert torch.equal(zero, plain[0][1])
    assert torch.equal(one, plain[1][1])
    assert torch.equal(same, plain[1][2])
    assert torch.equal(three, plain[3][2])


def test_what_comes_once_after_all_steps_is_read_at_whatever_step(net, model):
    x = rows()
    with model.generate(x) as tracer:
        _ = model.first.next(2).output
        gathered = model.generator.output
        result = tracer.result
    assert torch.equal(gathered, steps_of(net, x)[-1][3])
    assert result is gathered


def test_next_after_a_loop_counts_from_its_last_step(net, model):
    x = rows()
    with model.generate(x) as tracer:
        for _ in tracer.iter[:2]:
            _ = model.second.output
        two = model.first.next().output
    assert torch.equal(two, steps_of(net, x)[2][1])


@pytest.mark.parametrize("count", [0, -1, "1", 1.5, True])
def test_next_of_an_absurd_number_is_refused(net, model, count):
    with pytest.raises(InputError, match="`next` takes 1 or more"):
        with model.generate(rows()) as tracer:
            tracer.next(count)
    assert_usable(model, net, rows())


# -- the end of a loop


def test_code_after_an_open_loop_runs_and_reads_the_result(net, model):
    x = rows()
    with model.generate(x) as tracer:
        count = 0
        for _ in tracer.iter[:]:
            _ = model.first.output
            count += 1
        gathered = model.generator.output
        result = tracer.result
    assert count == 4
    assert gathered is result
    assert torch.equal(result, steps_of(net, x)[-1][3])


def test_open_loop_that_asks_for_nothing_ends(net, model):
    x = rows()
    turns = []
    with model.generate(x) as tracer:
        for step in tracer.iter[:]:
            turns.append(step)
        result = tracer.result
    assert turns == [0, 1, 2, 3]
    assert torch.equal(result, steps_of(net, x)[-1][3])


def test_open_loop_that_asks_for_nothing_ends_in_one_forward():
    model = NNsight(seeded(Loop))
    turns = []
    with model.trace(rows()) as tracer:
        for step in tracer.iter[:]:
            turns.append(step)
    assert turns == [0]


def test_after_a_bounded_loop_a_request_means_the_next_visit(net, model):
    x = rows()
    with model.generate(x) as tracer:
        for _ in tracer.iter[:2]:
            _ = model.second.output
        first, second = model.first.output, model.second.output
    plain = steps_of(net, x)
    assert torch.equal(first, plain[2][1])
    assert torch.equal(second, plain[2][2])


def test_after_a_loop_a_request_at_the_same_visit_is_that_visit(net, model):
    with model.generate(rows()) as tracer:
        for _ in tracer.iter[:2]:
            last = model.second.output
        again = model.second.output
    assert again is last


def test_two_loops_one_after_the_other(net, model):
    x = rows()
    with model.generate(x) as tracer:
        early = [model.first.output for _ in tracer.iter[:2]]
        late = [model.second.output for _ in tracer.iter[2:4]]
    plain = steps_of(net, x)
    assert all(torch.equal(early[i], plain[i][1]) for i in range(2))
    assert all(torch.equal(late[i], plain[i + 2][2]) for i in range(2))


def loop_warnings(caught):
    return [(warning.filename, warning.lineno) for warning in caught]


def test_bounded_loop_that_the_run_cuts_short_warns_once_at_its_line_and_goes_on(net, model):
    x = rows()
    after = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with model.generate(x) as tracer:
                for _ in tracer.iter[:9]:
                    line = tracer_line()
                    _ = model.first.output
                after.append(tracer.result)
    assert loop_warnings(caught) == [(__file__, line - 1)] * 3
    assert "ended before step 4: this loop goes up to step 8" in str(caught[0].message)
    assert len(after) == 3


def test_bounded_loop_run_twice_in_one_run_warns_once_for_each_at_its_line(net, model):
    x = rows()
    got = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with model.generate(x) as tracer:
            for turn in range(3):
                for step in tracer.iter[:9]:
                    line = tracer_line()
                    got.append((turn, step, model.first.output))
            result = tracer.result
    assert [(turn, step) for turn, step, _ in got] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert close(got[-1][2], steps_of(net, x)[3][1])
    assert close(result, steps_of(net, x)[3][3])
    assert loop_warnings(caught) == [(__file__, line - 1)] * 3
    assert "ended before step 4" in str(caught[0].message)
    assert all("ended before step 0: this loop goes up to step 8" in str(found.message) for found in caught[1:])


@pytest.mark.parametrize("steps", [slice(9), slice(None), 0, [1, 2]])
def test_loop_that_begins_after_the_last_pass_makes_no_step(net, model, steps):
    x = rows()
    got = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with model.generate(x) as tracer:
            ids = model.generator.output
            for step in tracer.iter[steps]:
                got.append(step)
            with tracer.iter[steps] as step:
                got.append(step)
            result = tracer.result
            for step in tracer.iter[steps]:
                got.append(step)
    assert got == []
    assert result is ids
    assert len(caught) == (0 if steps == slice(None) else 3)
    assert_idle(net)


def test_second_loop_over_steps_that_have_passed_fails_at_once_while_there_are_more(net, model):
    with pytest.raises(OutOfOrderError, match="occurrence 0 of it was asked for"):
        with model.generate(rows()) as tracer:
            for _ in range(2):
                for _ in tracer.iter[:2]:
                    _ = model.first.output
    assert_idle(net)


def tracer_line():
    import sys

    return sys._getframe(1).f_lineno


def test_list_of_steps_that_the_run_cuts_short_warns(model):
    with pytest.warns(UserWarning, match="ended before step 7: this loop goes up to step 9"):
        with model.generate(rows()) as tracer:
            got = [step for step in tracer.iter[[1, 7, 9]] if model.first.output is not None]
    assert got == [1]


def test_open_loop_does_not_warn(model):
    with model.generate(rows()) as tracer:
        for _ in tracer.iter[1::2]:
            _ = model.first.output


def test_loop_that_begins_after_the_end_of_the_run_is_an_error_of_the_request(net, model):
    with pytest.raises(MissedProviderError, match=r"`model\.first\.output` was not provided \(occurrence 7"):
        with model.generate(rows()) as tracer:
            for _ in tracer.iter[7:]:
                _ = model.first.output
    assert_idle(net)


def test_break_and_continue(net, model):
    x = rows()
    got = []
    with model.generate(x) as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                continue
            got.append(model.first.output)
            if step == 2:
                break
        later = model.first.next().output
        result = tracer.result
    plain = steps_of(net, x)
    assert [torch.equal(value, plain[i][1]) for i, value in zip((1, 2), got, strict=True)] == [True, True]
    assert torch.equal(later, plain[3][1])
    assert torch.equal(result, plain[-1][3])


def test_else_of_a_loop_runs(model):
    ran = []
    with model.generate(rows()) as tracer:
        for _ in tracer.iter[:]:
            _ = model.first.output
        else:
            ran.append("else")
    assert ran == ["else"]


def test_stop_in_a_loop(net, model):
    x, got, after = rows(), [], []
    with model.generate(x) as tracer:
        for step in tracer.iter[:]:
            got.append(model.first.output)
            if step == 1:
                tracer.stop()
        after.append(1)
    assert len(got) == 2
    assert after == []
    assert_idle(net)


# -- order


def test_backward_order_in_a_step_fails_at_once(net, model):
    steps = []
    with pytest.raises(OutOfOrderError, match=r"`model\.first\.output`: occurrence 0"):
        with model.generate(rows()) as tracer:
            for step in tracer.iter[:]:
                steps.append(step)
                _ = model.second.output
                _ = model.first.output
    assert steps == [0]
    assert_idle(net)


def test_backward_order_in_a_step_can_be_caught(net, model):
    x, got = rows(), []
    with model.generate(x) as tracer:
        for _ in tracer.iter[:]:
            got.append(model.second.output)
            with pytest.raises(OutOfOrderError):
                _ = model.first.output
    assert len(got) == 4


def test_step_that_has_passed_fails_at_once(model):
    with pytest.raises(OutOfOrderError, match="occurrence 1 "):
        with model.generate(rows()) as tracer:
            for _ in tracer.iter[[3, 1]]:
                _ = model.first.output


# -- loops in loops


class Outer(nn.Module):
    """A model that calls a part three times in each of its own calls."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(WIDTH, WIDTH)
        self.end = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(3):
            x = self.part(x)
        return self.end(x)


def test_nested_loops(net):
    net = seeded(Outer)
    model, x = Generating(net), rows()
    got, ends = [], []
    with model.generate(x, steps=2) as tracer:
        for step in tracer.iter[:]:
            for call in tracer.iter[3 * step : 3 * step + 3]:
                got.append((step, call, model.part.output))
            ends.append((step, model.end.output))
        result = tracer.result
    value, expected, expected_ends = x, [], []
    for step in range(2):
        for call in range(3):
            value = net.part(value)
            expected.append((step, 3 * step + call, value))
        value = net.end(value)
        expected_ends.append((step, value))
    assert [entry[:2] for entry in got] == [entry[:2] for entry in expected]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(got, expected, strict=True))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(ends, expected_ends, strict=True))
    assert torch.equal(result, value)


def test_inner_loop_over_the_same_steps(net, model):
    x, got = rows(), []
    with model.generate(x) as tracer:
        for step in tracer.iter[:]:
            for inner in tracer.iter[step]:
                got.append((step, inner, model.first.output))
    plain = steps_of(net, x)
    assert [entry[:2] for entry in got] == [(i, i) for i in range(4)]
    assert all(torch.equal(value, plain[step][1]) for step, _, value in got)


# -- the block form


def test_block_form_runs_its_body_once_per_step(net, model):
    x, got = rows(), []
    with model.generate(x) as tracer:
        with tracer.iter[:3] as step:
            got.append((step, model.first.output))
        result = tracer.result
    plain = steps_of(net, x)
    assert [step for step, _ in got] == [0, 1, 2]
    assert all(torch.equal(value, plain[i][1]) for i, value in got)
    assert torch.equal(result, plain[-1][3])


def test_block_form_binds_names_for_the_next_step_and_after(model):
    with model.generate(rows()) as tracer:
        count = 10
        with tracer.iter[:] as step:
            _ = model.first.output
            count += 1
            last = step
    assert (count, last) == (14, 3)


def test_block_form_without_as(model):
    got = []
    with model.generate(rows()) as tracer:
        with tracer.iter[:1]:
            got.append(model.first.output)
    assert len(got) == 1


def test_block_form_that_the_run_cuts_short_warns_at_its_line(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with model.generate(rows()) as tracer:
            with tracer.iter[:9]:
                line = tracer_line()
                _ = model.first.output
    assert loop_warnings(caught) == [(__file__, line - 1)]


def test_block_form_raises_the_users_error_alone(net, model):
    with pytest.raises(ValueError, match="mine") as caught:
        with model.generate(rows()) as tracer:
            with tracer.iter[:] as step:
                bound = step
                _ = model.first.output
                if step == 1:
                    raise ValueError("mine")
    assert bound == 1
    assert caught.value.__context__ is None
    assert_usable(model, net, rows())


def test_block_form_with_a_stop(model):
    got, after = [], []
    with model.generate(rows()) as tracer:
        with tracer.iter[:] as step:
            got.append(model.first.output)
            if step == 1:
                tracer.stop()
        after.append(1)
    assert len(got) == 2
    assert after == []


def test_block_form_refuses_break(net, model):
    with pytest.raises(CaptureError, match="`break` at"):
        for _ in [1]:
            with model.generate(rows()) as tracer:
                with tracer.iter[:]:
                    break
    assert_usable(model, net, rows())


# -- loops in invokes


def test_loops_in_invokes_see_their_rows(net, model):
    a, b = rows(0, 1), rows(1, 2)
    got = {"a": [], "b": []}
    with model.generate() as tracer:
        with tracer.invoke(a):
            for step in tracer.iter[:]:
                if step == 1:
                    model.first.output[:] = 0
                got["a"].append(model.second.output)
        with tracer.invoke(b):
            for _ in tracer.iter[:]:
                got["b"].append(model.second.output)
            result = tracer.result
    edited = steps_of(net, a, edit=lambda step, first: first * 0 if step == 1 else first)
    assert all(close(value, plain[2]) for value, plain in zip(got["a"], edited, strict=True))
    assert all(close(value, plain[2]) for value, plain in zip(got["b"], steps_of(net, b), strict=True))
    assert close(result, steps_of(net, b)[-1][3])


def test_loop_in_one_invoke_and_the_result_in_another(net, model):
    x = rows()
    with model.generate(steps=3) as tracer:
        with tracer.invoke(x):
            hidden = [model.first.output for _ in tracer.iter[:]]
        with tracer.invoke():
            final = model.generator.output
            result = tracer.result
    assert len(hidden) == 3
    assert final is result
    assert torch.equal(final, steps_of(net, x, 3)[-1][3])


def test_block_form_in_invokes_keeps_names_apart(model):
    a, b = rows(0, 1), rows(1, 2)
    with model.generate() as tracer:
        with tracer.invoke(a):
            total = 0
            with tracer.iter[:] as step:
                total += model.first.output.shape[0] + step
            first = total
        with tracer.invoke(b):
            total = 0
            with tracer.iter[:] as step:
                total += model.first.output.shape[0] + step
            second = total
    assert (first, second) == (4 + 6, 8 + 6)


def test_block_form_reads_the_name_of_an_earlier_invoke(net, model):
    a, b = rows(0), rows(1)
    with model.generate() as tracer:
        with tracer.invoke(a):
            hidden = model.first.output
        with tracer.invoke(b):
            with tracer.iter[:1]:
                model.first.output = hidden
            result = model.output
    assert close(result, steps_of(net, a)[0][3])


def test_steps_of_different_invokes_do_not_disturb_each_other(net, model):
    a, b = rows(0), rows(1)
    with model.generate() as tracer:
        with tracer.invoke(a):
            odd = [model.first.output for _ in tracer.iter[1::2]]
        with tracer.invoke(b):
            _ = model.first.output
            two = model.first.next(2).output
    assert all(close(value, steps_of(net, a)[step][1]) for step, value in zip((1, 3), odd, strict=True))
    assert close(two, steps_of(net, b)[2][1])


def test_cut_short_loop_in_an_invoke_warns_at_its_line(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with model.generate() as tracer:
            with tracer.invoke(rows()):
                for _ in tracer.iter[:9]:
                    line = tracer_line()
                    _ = model.first.output
    assert loop_warnings(caught) == [(__file__, line - 1)]


# -- bad steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (-1, "tracer.iter step cannot be negative: -1"),
        (slice(-2, None), "cannot be negative: -2"),
        (slice(None, -1), "cannot be negative: -1"),
        (slice(None, None, -1), "cannot be negative: -1"),
        (slice(None, None, 0), "cannot have the step 0"),
        ([0, -3], "cannot be negative: -3"),
        (1.5, "1.5 is no step"),
        ("12", "'1' is no step"),
        (None, "None is no step"),
        (True, "True is no step"),
        ([1.0], "1.0 is no step"),
        (slice("a", None), "'a' is no step"),
        ((slice(None), 2), "is no step"),
    ],
)
def test_bad_steps_are_refused(net, model, steps, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")) as caught:
        with model.generate(rows()) as tracer:
            for _ in tracer.iter[steps]:
                pass
    assert "a slice such as" in str(caught.value)
    assert_usable(model, net, rows())


def test_step_far_beyond_the_run_ends_with_it(net, model):
    with pytest.raises(MissedProviderError, match="the run reached it 4 times"):
        with model.generate(rows()) as tracer:
            for _ in tracer.iter[10**9]:
                _ = model.first.output
    assert_idle(net)


# -- methods that are traced only in a `with`


def test_traceable_method_runs_plainly_elsewhere(net, model):
    x = rows()
    expected = steps_of(net, x)[-1][3]
    assert torch.equal(model.generate(x), expected)
    with torch.no_grad():
        assert torch.equal(model.generate(x, steps=4), expected)


def test_steps_of_a_module_that_calls_itself_by_hand():
    net = seeded(Calls, lambda self, x: self.b(self.a(self.a(x))))
    model, x = NNsight(net), rows()
    with model.trace(x):
        one = model.a.output
        two = model.a.next().output
    assert torch.equal(one, net.a(x))
    assert torch.equal(two, net.a(net.a(x)))
