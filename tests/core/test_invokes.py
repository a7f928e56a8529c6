"""Several blocks in one forward: who runs when, what they share, and how what goes wrong is told."""

import contextvars
import gc
import weakref

import pytest
import torch
from modules import WIDTH, Calls, Net, assert_idle, assert_usable, plain, rows, seeded

from nnsight import CONFIG, NNsight
from nnsight.errors import (
    BatchError,
    CaptureError,
    DeadlockError,
    InputError,
    InvokeError,
    MissedProviderError,
    NoInputError,
    OutOfOrderError,
    TracerStateError,
)


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def notes(error):
    return " ".join(getattr(error.value, "__notes__", []))


def close(left, right):
    return torch.allclose(left, right, atol=1e-6)


# -- one forward


def test_all_invokes_are_one_forward(net, model):
    calls = []
    net.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    with model.trace() as tracer:
        for i in range(3):
            with tracer.invoke(rows(i)):
                pass
    assert calls == [(6, WIDTH)]


def test_every_invoke_gets_what_its_input_gives_alone(net, model):
    inputs = [rows(0, 1), rows(1, 3), rows(2, 2)]
    hidden, results = [], []
    with model.trace() as tracer:
        for x in inputs:
            with tracer.invoke(x):
                hidden.append((model.h[0].input, model.h[1].output))
                results.append(tracer.result)
    for x, (given, output), result in zip(inputs, hidden, results, strict=True):
        expected = plain(net, x)
        assert close(given, expected.inputs["h.0"][0][0][0])
        assert close(output, expected.outputs["h.1"][0])
        assert close(result, expected.result)


def test_invoke_without_input_sees_the_whole_batch(net, model):
    a, b = rows(0, 1), rows(1, 2)
    with model.trace() as tracer:
        with tracer.invoke(a):
            first = model.lm_head.output
        with tracer.invoke(b):
            second = model.lm_head.output
        with tracer.invoke():
            whole = model.lm_head.output
    assert torch.equal(whole, torch.cat([first, second]))
    assert close(whole, net(torch.cat([a, b])))


def test_one_input_and_several_empty_invokes(net, model):
    x = rows()
    with model.trace() as tracer:
        with tracer.invoke(x):
            a = model.h[0].output
        with tracer.invoke():
            b = model.h[0].output
            late = model.lm_head.output
        with tracer.invoke():
            c = model.h[1].output
    expected = plain(net, x)
    assert torch.equal(a, expected.outputs["h.0"][0])
    assert a is b
    assert torch.equal(c, expected.outputs["h.1"][0])
    assert torch.equal(late, expected.result)


def test_invokes_may_have_keyword_inputs():
    net = seeded(Calls, lambda self, x, scale=1: self.a(x) * scale)
    model = NNsight(net)
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(x=a, scale=3):
            first = tracer.result
        with tracer.invoke(x=b, scale=3):
            second = tracer.result
    assert close(first, net(a, 3))
    assert close(second, net(b, 3))


def test_keywords_of_the_trace_are_for_all_invokes():
    net = seeded(Calls, lambda self, x, scale=1: self.a(x) * scale)
    model, x = NNsight(net), rows()
    with model.trace(scale=3) as tracer:
        with tracer.invoke(x):
            first = tracer.result
    assert close(first, net(x, 3))


def test_body_of_the_trace_may_read_beside_the_invokes(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            hidden = model.h[0].output
        with tracer.invoke(b):
            pass
        whole = model.h[1].output
        result = tracer.result
    expected = plain(net, torch.cat([a, b]))
    assert close(hidden, expected.outputs["h.0"][0][:2])
    assert torch.equal(whole, expected.outputs["h.1"][0])
    assert torch.equal(result, expected.result)


def test_part_of_a_model_is_traced_with_invokes(net, model):
    a, b = rows(0, 1), rows(1, 2)
    with model.h[1].trace() as tracer:
        with tracer.invoke(a):
            first = model.h[1].attn.output
        with tracer.invoke(b):
            second = model.h[1].output
    assert close(first, net.h[1].attn(a))
    assert close(second, net.h[1](b))


def test_names_are_there_after_the_trace(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows()) as entered:
            inside = entered
            shape = model.h[0].output.shape
    assert shape == (2, WIDTH)
    assert inside is not None


def test_blocks_of_a_helper_function_see_its_variables(net, model):
    def add(tracer, x, into):
        scale = 2
        with tracer.invoke(x):
            into.append(model.h[0].output * scale)

    got = []
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        add(tracer, a, got)
        add(tracer, b, got)
    assert close(got[0], plain(net, a).outputs["h.0"][0] * 2)
    assert close(got[1], plain(net, b).outputs["h.0"][0] * 2)


def test_blocks_run_up_to_their_first_request_in_the_order_they_are_written(model):
    order = []
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            order.append("a starts")
            _ = model.h[0].output
            order.append("a at h.0")
            _ = model.h[1].output
            order.append("a at h.1")
        with tracer.invoke(rows(1)):
            order.append("b starts")
            _ = model.h[0].output
            order.append("b at h.0")
    assert order == ["a starts", "b starts", "a at h.0", "b at h.0", "a at h.1"]


def test_generators_comprehensions_and_lambdas_read_values(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            outputs = [block.output for block in model.h]
            lazily = sum(value.sum() for value in outputs)
        with tracer.invoke(b):
            get = lambda index: model.h[index].output
            got = [get(index) for index in range(3)]
            by = {index: value * 1 for index, value in enumerate(got)}
    expected = plain(net, a).outputs
    assert all(close(outputs[i], expected[f"h.{i}"][0]) for i in range(3))
    assert close(lazily, sum(expected[f"h.{i}"][0].sum() for i in range(3)))
    assert all(close(by[i], plain(net, b).outputs[f"h.{i}"][0]) for i in range(3))


def test_trace_inside_an_invoke(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            hidden = model.h[0].output
            with model.trace(b):
                other = model.h[0].output
            later = model.h[1].output
    assert close(hidden, plain(net, a).outputs["h.0"][0])
    assert close(other, plain(net, b).outputs["h.0"][0])
    assert close(later, plain(net, a).outputs["h.1"][0])


def test_contexts_around_the_invoke_in_its_header_wrap_its_body(net, model):
    with model.trace() as tracer:
        with torch.enable_grad(), tracer.invoke(rows()), torch.no_grad():
            hidden = model.h[0].output
            inside = torch.is_grad_enabled()
            mine = hidden * 2
            result = model.lm_head.output
    assert not inside
    assert not mine.requires_grad
    assert result.requires_grad
    assert torch.is_grad_enabled()


def test_no_grad_in_a_block_does_not_reach_the_model_or_its_siblings(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            with torch.no_grad():
                first = model.h[0].output
                again = model.h[1].output
        with tracer.invoke(rows(1)):
            _ = model.h[0].output
            enabled = torch.is_grad_enabled()
            second = model.h[1].output * 1
    assert first.requires_grad
    assert again.requires_grad
    assert enabled
    assert second.requires_grad


def test_context_variables_are_those_of_the_callers_code(model):
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("caller")
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            _ = model.h[0].output
            seen = variable.get()
    assert seen == "caller"


# -- names


def test_invokes_that_bind_the_same_names_never_see_each_others(net, model):
    a, b = rows(0), rows(1)
    kept = {}
    with model.trace() as tracer:
        with tracer.invoke(a):
            hs = model.h[0].output
            h1 = model.h[1].output
            got = hs + h1
            kept["a"] = got
        with tracer.invoke(b):
            hs = model.h[0].output
            h1 = model.h[1].output
            got = hs + h1
            kept["b"] = got
    for name, x in (("a", a), ("b", b)):
        expected = plain(net, x).outputs
        assert close(kept[name], expected["h.0"][0] + expected["h.1"][0])
    assert got is kept["b"]


def test_name_of_an_earlier_invoke_is_read_at_the_same_module_without_a_barrier(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            embeddings = model.emb.output
        with tracer.invoke(b):
            model.emb.output = embeddings
            result = tracer.result
    assert close(result, net(a))


def test_name_of_an_earlier_invoke_is_read_after_a_later_module(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        with tracer.invoke(a):
            late = model.h[1].output
        with tracer.invoke(b):
            _ = model.h[0].output
            model.h[1].output = late
            result = tracer.result
    assert close(result, net(a))


def test_rerun_takes_the_new_runs_value_and_not_the_last_ones(net, model):
    embeddings = "stale"
    for seed in (0, 1):
        a, b = rows(seed), rows(seed + 10)
        with model.trace() as tracer:
            with tracer.invoke(a):
                embeddings = model.emb.output
            with tracer.invoke(b):
                model.emb.output = embeddings
                result = tracer.result
        assert close(result, net(a))


def test_names_of_several_earlier_invokes(net, model):
    inputs = [rows(i) for i in range(3)]
    with model.trace() as tracer:
        with tracer.invoke(inputs[0]):
            one = model.emb.output
        with tracer.invoke(inputs[1]):
            two = model.emb.output
        with tracer.invoke(inputs[2]):
            model.emb.output = (one + two) / 2
            result = tracer.result
    mean = (net.emb(inputs[0]) + net.emb(inputs[1])) / 2
    assert close(result, seeded_tail(net, mean))


def seeded_tail(net, hidden):
    for block in net.h:
        hidden = block(hidden)
    return net.lm_head(hidden)


def test_objects_made_outside_are_shared(model):
    shared = {}
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            shared["a"] = model.h[0].output.sum().item()
        with tracer.invoke(rows(1)):
            _ = model.h[1].output
            shared["b"] = shared["a"] + 1
    assert shared["b"] == shared["a"] + 1


def test_name_that_no_sibling_binds_is_a_name_error_in_the_invoke(net, model):
    with pytest.raises(NameError, match="'nowhere_bound' is not defined") as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                bound = model.h[0].output
            with tracer.invoke(rows(1)):
                nowhere_bound + bound  # noqa: F821
    assert "in the invoke opened at" in notes(caught)
    assert_usable(model, net, rows())


def test_name_that_a_sibling_may_bind_but_does_not(net, model):
    flag = False
    with pytest.raises(NameError, match="'value' is not defined: no block before this one has bound it"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                hidden = model.h[0].output
                if flag:
                    value = hidden
            with tracer.invoke(rows(1)):
                model.h[1].output = value
    assert_usable(model, net, rows())


def test_name_of_a_later_invoke_cannot_be_read(net, model):
    with pytest.raises(NameError, match="later"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                model.h[1].output = later  # noqa: F821
            with tracer.invoke(rows(1)):
                later = model.h[0].output  # noqa: F841
    assert_usable(model, net, rows())


def test_names_can_be_kept_apart(net, model, monkeypatch):
    monkeypatch.setattr(CONFIG.APP, "CROSS_INVOKER", False)
    shared = []
    with pytest.raises(NameError, match="embeddings"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                embeddings = model.emb.output
                shared.append(embeddings)
            with tracer.invoke(rows(1)):
                model.emb.output = embeddings
    assert_usable(model, net, rows())
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            shared.append(model.h[0].output)
        with tracer.invoke(rows(1)):
            _ = model.h[1].output
            shared.append(shared[-1])  # objects stay shared
    assert shared[0] is shared[1]


def test_loop_variables_are_each_invokes_own(net, model):
    inputs = [rows(i) for i in range(4)]
    got = {}
    with model.trace() as tracer:
        for i, x in enumerate(inputs):
            with tracer.invoke(x):
                model.h[0].output = model.h[0].output * i
                got[i] = model.h[1].input
    for i, x in enumerate(inputs):
        assert close(got[i], plain(net, x).outputs["h.0"][0] * i)


# -- barriers


def test_barrier_lets_blocks_meet(net, model):
    log = []
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(rows(0)):
            log.append("a waits")
            barrier()
            log.append("a goes on")
        with tracer.invoke(rows(1)):
            _ = model.h[1].output
            log.append("b comes")
            barrier()
    assert log == ["a waits", "b comes", "a goes on"]


def test_barrier_is_used_round_after_round(net, model):
    a, b = rows(0), rows(1)
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(a):
            kept = []
            for block in model.h:
                kept.append(block.output)
                barrier()
        with tracer.invoke(b):
            for i, block in enumerate(model.h):
                _ = block.input
                barrier()
                block.output = kept[i]
            result = tracer.result
    assert close(result, net(a))


def test_barrier_for_more_blocks_than_exist_says_what_waits_for_what(net, model):
    with pytest.raises(DeadlockError, match="waits for a barrier of 3 blocks, at which . had come") as caught:
        with model.trace() as tracer:
            barrier = tracer.barrier(3)
            with tracer.invoke(rows(0)):
                barrier()
            with tracer.invoke(rows(1)):
                _ = model.h[0].output
                barrier()
    assert str(caught.value).count("invoke at") == 2
    assert_usable(model, net, rows())


def test_every_block_at_a_barrier_says_how_many_had_come_in_the_end(model):
    with pytest.raises(DeadlockError) as caught:
        with model.trace() as tracer:
            barrier = tracer.barrier(4)
            for number in range(3):
                with tracer.invoke(rows(number)):
                    _ = model.h[number].output
                    barrier()
    assert str(caught.value).count("waits for a barrier of 4 blocks, at which 3 had come") == 3


def test_a_later_round_of_a_barrier_counts_its_own_arrivals(model):
    with pytest.raises(DeadlockError) as caught:
        with model.trace() as tracer:
            barrier = tracer.barrier(3)
            for number in range(3):
                with tracer.invoke(rows(number)):
                    barrier()
                    if number:
                        barrier()
    assert str(caught.value).count("waits for a barrier of 3 blocks, at which 2 had come") == 2


def test_blocks_that_wait_for_each_other_are_a_deadlock(net, model):
    with pytest.raises(DeadlockError, match=r"waits for a barrier.*The block .* waits for the name 'value'"):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(rows(0)):
                barrier()
                value = 1
            with tracer.invoke(rows(1)):
                _ = model.h[0].output
                got = value  # noqa: F841
                barrier()
    assert_usable(model, net, rows())


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True])
def test_barrier_of_an_absurd_number_is_refused(model, count):
    with pytest.raises(InputError, match="number of blocks"):
        with model.trace(rows()) as tracer:
            tracer.barrier(count)


def test_barrier_of_one_waits_for_nobody(model):
    with model.trace(rows()) as tracer:
        barrier = tracer.barrier(1)
        barrier()
        _ = model.h[0].output
        barrier()


def test_barrier_in_an_inline_block_alone_is_an_error(net, model):
    with pytest.raises(DeadlockError, match="barrier of 2"):
        with model.trace(rows()) as tracer:
            _ = model.h[0].output
            tracer.barrier(2)()
    assert_usable(model, net, rows())


# -- stopping


def test_stop_in_one_invoke_ends_the_run_after_its_siblings_at_this_visit(model):
    after = []
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            first = model.h[0].output
            tracer.stop()
            after.append("a")
        with tracer.invoke(rows(1)):
            second = model.h[0].output
            _ = model.h[1].output
            after.append("b")
    assert first.shape == second.shape == (2, WIDTH)
    assert after == []


# -- errors


def test_error_in_a_block_is_the_users_and_names_the_invoke(net, model):
    def boom():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                _ = model.h[0].output
            with tracer.invoke(rows(1)):
                _ = model.h[0].output
                boom()
    line = caught.traceback[-2].lineno + 1  # of the call of `boom`
    assert notes(caught) == f"in the invoke opened at {__file__}:{line - 2}"
    assert_usable(model, net, rows())


def test_error_in_a_block_runs_the_finally_blocks_of_its_siblings(net, model):
    log = []
    with pytest.raises(KeyError):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                try:
                    _ = model.lm_head.output
                finally:
                    log.append("a")
            with tracer.invoke(rows(1)):
                _ = model.h[0].output
                raise KeyError
    assert log == ["a"]
    assert_usable(model, net, rows())


def test_error_of_the_model_is_raised_with_invokes(net, model):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(2, WIDTH + 1)):
                _ = model.h[0].output
    assert_usable(model, net, rows())


def test_error_of_the_model_can_be_caught_in_a_block(net, model):
    caught = []
    with model.trace() as tracer:
        with tracer.invoke(torch.ones(2, WIDTH + 1)):
            try:
                _ = model.h[0].output
            except RuntimeError as error:
                caught.append(str(error))
    assert "shapes cannot be multiplied" in caught[0]
    assert_usable(model, net, rows())


def test_requests_out_of_order_are_errors_of_their_invoke(net, model):
    with pytest.raises(OutOfOrderError, match=r"`model\.h\.0\.output`") as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                _ = model.h[1].output
                _ = model.h[0].output
            with tracer.invoke(rows(1)):
                _ = model.h[0].output
    assert "in the invoke opened at" in notes(caught)
    assert_usable(model, net, rows())


def test_out_of_order_can_be_caught_and_the_block_goes_on(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            _ = model.h[1].output
            with pytest.raises(OutOfOrderError):
                _ = model.h[0].output
            late = model.h[2].output
        with tracer.invoke(rows(1)):
            pass
    assert close(late, plain(net, rows(0)).outputs["h.2"][0])


def test_location_that_is_never_reached_is_an_error_of_the_invoke(net):
    net = seeded(Calls, lambda self, x: self.a(x))
    model = NNsight(net)
    with pytest.raises(MissedProviderError, match=r"`model\.b\.output` was not provided") as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                _ = model.b.output
    assert "in the invoke opened at" in notes(caught)
    assert_usable(model, net, rows())


def test_invoke_in_a_running_trace_is_refused(net, model):
    with pytest.raises(InvokeError, match="Cannot invoke during an active model execution / interleaving"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                _ = model.h[0].output
                with tracer.invoke(rows(1)):
                    pass
    assert_usable(model, net, rows())


def test_invoke_in_the_first_line_of_an_invoke_is_refused(net, model):
    with pytest.raises(InvokeError, match="Cannot invoke during"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                with tracer.invoke(rows(1)):
                    pass
    assert_usable(model, net, rows())


def test_invoke_after_something_was_read_is_refused(net, model):
    with pytest.raises(InvokeError, match="before anything is read"):
        with model.trace() as tracer:
            with tracer.invoke(rows(0)):
                pass
            _ = model.h[0].output
            with tracer.invoke(rows(1)):
                pass
    assert_usable(model, net, rows())


def test_input_given_twice_is_refused(net, model):
    with pytest.raises(InvokeError, match="was given an input of its own"):
        with model.trace(rows()) as tracer:
            with tracer.invoke(rows()):
                pass
    assert_usable(model, net, rows())


def test_invoke_after_the_run_is_refused(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows()):
            pass
    with pytest.raises(TracerStateError, match="not open"):
        tracer.invoke(rows())
    assert_usable(model, net, rows())


def test_invoke_that_cannot_be_captured_says_why_and_nothing_runs(net, model):
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))

    def run():
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                return model.h[0].output

    with pytest.raises(CaptureError, match="`return` at .* return it after the block"):
        run()
    assert calls == []
    assert_usable(model, net, rows())


def test_inputs_of_different_shape_cannot_join(net, model):
    with pytest.raises(BatchError, match=r"\(2, 8\), \(2, 9\)"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                pass
            with tracer.invoke(rows(width=9)):
                pass
    assert_usable(model, net, rows())


def test_inputs_of_different_kinds_cannot_join(net, model):
    with pytest.raises(BatchError, match="float64"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                pass
            with tracer.invoke(rows().double()):
                pass
    assert_usable(model, net, rows())


def test_different_arguments_cannot_join(net, model):
    with pytest.raises(BatchError, match="`x` was given in some of them and not in others.*batched=False"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                pass
            with tracer.invoke(x=rows()):
                pass
    assert_usable(model, net, rows())


def test_different_numbers_of_arguments_cannot_join():
    model = NNsight(seeded(Calls, lambda self, x, *more: self.a(x)))
    with pytest.raises(BatchError, match="one was given 1 positional arguments, another 2"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                pass
            with tracer.invoke(rows(), rows()):
                pass


def test_keywords_may_come_in_any_order():
    net = seeded(Calls, lambda self, x, y: self.a(x) - y)
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(x=rows(1), y=rows(2)):
            first = model.output
        with tracer.invoke(y=rows(3), x=rows(4)):
            second = model.output
    assert close(first, net(rows(1), rows(2)))
    assert close(second, net(rows(4), rows(3)))


def test_options_that_differ_between_invokes_cannot_join():
    net = seeded(Calls, lambda self, x, scale=1: self.a(x) * scale)
    model = NNsight(net)
    with pytest.raises(BatchError, match="different values for `scale`"):
        with model.trace() as tracer:
            with tracer.invoke(rows(), scale=2):
                pass
            with tracer.invoke(rows(), scale=3):
                pass


def test_invoke_with_options_and_no_input_is_refused(net, model):
    with pytest.raises(InvokeError, match="scale but no input"):
        with model.trace() as tracer:
            with tracer.invoke(scale=2):
                pass
    assert_usable(model, net, rows())


def test_empty_invokes_alone_have_nothing_to_run(net, model):
    with pytest.raises(NoInputError, match="Cannot return output of Envoy"):
        with model.trace() as tracer:
            with tracer.invoke():
                _ = model.h[0].output
    assert_usable(model, net, rows())


def test_empty_invokes_run_a_forward_that_takes_no_arguments():
    net = seeded(Calls, lambda self: self.a(torch.ones(2, WIDTH)))
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke():
            got = model.a.output
        with tracer.invoke():
            also = tracer.result
    assert torch.equal(got, net())
    assert got is also


# -- what is left


def run_and_reference(net, model, fails):
    x = rows()
    extra = torch.ones(1)
    try:
        with model.trace() as tracer:
            with tracer.invoke(x):
                hidden = model.h[0].output + extra
                if fails:
                    raise KeyError
            with tracer.invoke(x):
                _ = model.h[1].output + hidden
    except KeyError:
        pass
    return weakref.ref(extra)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_remains_of_blocks_without_the_cyclic_collector(net, model, fails):
    run_and_reference(net, model, fails)
    gc.collect()
    gc.disable()
    try:
        reference = run_and_reference(net, model, fails)
        assert reference() is None
    finally:
        gc.enable()
    assert_idle(net)


def model_reference():
    net = seeded(Net)
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(rows(0)):
            embeddings = model.emb.output
        with tracer.invoke(rows(1)):
            model.emb.output = embeddings
    return weakref.ref(net)


def test_model_is_freed_after_invokes():
    model_reference()
    gc.collect()
    gc.disable()
    try:
        assert model_reference()() is None
    finally:
        gc.enable()


# -- one after another


def test_unbatched_invokes_are_bit_identical_to_runs_alone(net, model):
    inputs = [rows(0, 1), rows(1, 3), rows(2, 2)]
    got = []
    with model.trace(batched=False) as tracer:
        for x in inputs:
            with tracer.invoke(x):
                model.h[0].output = model.h[0].output * 2
                got.append((model.h[1].output, tracer.result))
    for x, (hidden, result) in zip(inputs, got, strict=True):
        expected = plain(net, x, edit=lambda path, output: output * 2 if path == "h.0" else None)
        assert torch.equal(hidden, expected.outputs["h.1"][0])
        assert torch.equal(result, expected.result)


def test_unbatched_invokes_may_have_different_shapes():
    net = seeded(Calls, lambda self, x: self.a(x).sum())
    model = NNsight(net)
    got = []
    with model.trace(batched=False) as tracer:
        for x in (rows(0, 2), torch.ones(3, 4, WIDTH)):
            with tracer.invoke(x):
                got.append(model.a.output.shape)
    assert got == [(2, WIDTH), (3, 4, WIDTH)]


def test_unbatched_invokes_read_names_of_earlier_ones(net, model):
    a, b = rows(0), rows(1)
    with model.trace(batched=False) as tracer:
        with tracer.invoke(a):
            late = model.h[2].output
        with tracer.invoke(b):
            model.emb.output = late  # an earlier module: the other run is over
            result = tracer.result
    assert torch.equal(result, seeded_tail(net, plain(net, a).outputs["h.2"][0]))


def test_unbatched_error_names_the_invoke_and_the_rest_does_not_run(net, model):
    ran = []
    with pytest.raises(KeyError) as caught:
        with model.trace(batched=False) as tracer:
            with tracer.invoke(rows(0)):
                first = model.h[0].output
            with tracer.invoke(rows(1)):
                raise KeyError
            with tracer.invoke(rows(2)):
                ran.append(1)
    assert "in the invoke opened at" in notes(caught)
    assert first.shape == (2, WIDTH)
    assert ran == []
    assert_usable(model, net, rows())


def test_unbatched_empty_invoke_is_refused(net, model):
    with pytest.raises(InvokeError, match="with batched=False there is none"):
        with model.trace(batched=False) as tracer:
            with tracer.invoke(rows()):
                pass
            with tracer.invoke():
                pass
    assert_usable(model, net, rows())


def test_unbatched_barrier_is_a_deadlock(net, model):
    with pytest.raises(DeadlockError, match="barrier of 2"):
        with model.trace(batched=False) as tracer:
            barrier = tracer.barrier(2)
            for i in range(2):
                with tracer.invoke(rows(i)):
                    barrier()
    assert_usable(model, net, rows())
