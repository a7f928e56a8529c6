"""Invokes: one forward for all inputs, a block and rows for each, names of their own."""

from __future__ import annotations

import pytest
import torch
from modules import WIDTH, Calls, Net
from torch import nn

from nnsight import BatchError, DeadlockError, InputError, InvokeError, NNsight, OutOfOrderError, TracerStateError


def rows(count=1, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def model(net):
    return NNsight(net)


def parts(net, x):
    """What each layer of a net gives for an input, computed by hand."""
    seen = []
    x = net.emb(x)
    for block in net.h:
        x = block(x)
        seen.append(x)
    return seen, net.lm_head(x)


def close(left, right):
    return torch.allclose(left, right, atol=1e-5)


def test_every_block_sees_its_rows(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            first = model.h[1].output
        with tracer.invoke(rows(3, 2)):
            second = model.h[1].output
            result = tracer.result
        with tracer.invoke():
            whole = model.h[1].output
    assert close(first, parts(net, rows(1, 1))[0][1])
    assert close(second, parts(net, rows(3, 2))[0][1])
    assert close(result, net(rows(3, 2)))
    assert close(whole, torch.cat([first, second]))


def test_the_model_runs_once(net, model):
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with model.trace() as tracer:
        for seed in range(5):
            with tracer.invoke(rows(1, seed)):
                _ = model.output
    assert calls == [1]


def test_blocks_that_bind_the_same_names_do_not_see_each_others(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            hs = model.h[0].output
            h1 = model.h[1].output
            first = hs + h1
        with tracer.invoke(rows(1, 2)):
            hs = model.h[0].output
            h1 = model.h[1].output
            second = hs + h1
    for got, seed in ((first, 1), (second, 2)):
        layers, _ = parts(net, rows(1, seed))
        assert close(got, layers[0] + layers[1])
    assert close(hs, parts(net, rows(1, 2))[0][0])  # written back in the order the blocks were written


def test_a_name_of_an_earlier_block_needs_no_barrier(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            taken = model.h[2].output
        with tracer.invoke(rows(1, 2)):
            model.h[2].output = taken
            patched = model.output
    assert close(patched, net(rows(1, 1)))


def test_a_name_may_come_from_any_earlier_block(model):
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            a = model.h[0].output
        with tracer.invoke(rows(1, 2)):
            b = model.h[0].output
        with tracer.invoke(rows(1, 3)):
            total = a + b
    assert torch.equal(total, a + b)


def test_turns_of_a_loop_stay_apart(net, model):
    seen = []
    with model.trace() as tracer:
        for seed in range(4):
            with tracer.invoke(rows(1, seed)):
                seen.append((seed, (lambda: seed)(), [seed for _ in range(1)], model.output))
    for turn, (seed, from_lambda, from_list, output) in enumerate(seen):
        assert (seed, from_lambda, from_list) == (turn, turn, [turn])
        assert close(output, net(rows(1, turn)))


def test_variables_shared_with_functions_of_the_caller_are_live(model):
    count = 0

    def bump():
        nonlocal count
        count += 1

    with model.trace() as tracer:
        with tracer.invoke(rows()):
            bump()
            count += 10
            bump()
    assert count == 12


def test_values_in_place_reach_only_their_rows(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(2, 1)):
            model.h[1].output[:] = 0
            edited = model.output
        with tracer.invoke(rows(2, 2)):
            untouched = model.output
    zero = torch.zeros(2, WIDTH)
    assert close(edited, net.lm_head(net.h[2](zero)))
    assert close(untouched, net(rows(2, 2)))


def test_values_assigned_reach_only_their_rows(net, model):
    with model.trace() as tracer:
        for seed in range(3):
            with tracer.invoke(rows(1, seed)):
                model.h[0].output = torch.full((1, WIDTH), float(seed))
                got = model.h[0].output
                assert torch.equal(got, torch.full((1, WIDTH), float(seed)))
        with tracer.invoke():
            everything = model.output
    expected = torch.cat([torch.full((1, WIDTH), float(seed)) for seed in range(3)])
    for block in net.h[1:]:
        expected = block(expected)
    assert close(everything, net.lm_head(expected))


def test_one_copy_per_visit_however_many_blocks_write(model):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Clones(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += function is torch.ops.aten.clone.default
            return function(*args, **(kwargs or {}))

    counts = []
    for invokes in (2, 8):
        with torch.no_grad(), Clones() as clones, model.trace() as tracer:
            for seed in range(invokes):
                with tracer.invoke(rows(1, seed)):
                    model.h[0].output = torch.zeros(1, WIDTH)
        counts.append(clones.seen)
    assert counts == [1, 1]


def test_two_reads_at_one_visit_give_the_same_object(model):
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            same = model.h[0].output is model.h[0].output
        with tracer.invoke(rows(1, 2)):
            _ = model.h[0].output
    assert same


def test_inputs_are_split_too(net, model):
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            first = model.h[1].input
        with tracer.invoke(rows(1, 2)):
            model.h[1].input = first
            (second,), _ = model.h[1].inputs
    assert torch.equal(first, second)


def test_containers_are_split(net):
    class Wrapped(nn.Module):
        def forward(self, x):
            return {"pair": (x, [x * 2]), "flag": "as it is"}

    model = NNsight(Wrapped())
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            first = model.output
        with tracer.invoke(rows(2, 2)):
            second = model.output
            second["pair"][1][0][:] = 0
        with tracer.invoke():
            whole = model.output
    assert first["flag"] == "as it is"
    assert torch.equal(first["pair"][0], rows(1, 1))
    assert torch.equal(second["pair"][0], rows(2, 2))
    assert torch.equal(whole["pair"][1][0], torch.cat([rows(1, 1) * 2, torch.zeros(2, WIDTH)]))


@pytest.mark.parametrize("how", ["parameter", "buffer", "view"])
def test_a_table_that_looks_like_the_batch_is_not_split(how):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            table = torch.tensor([[1.0], [2.0]])
            if how == "buffer":
                self.register_buffer("table", table)
            else:
                self.table = nn.Parameter(table if how == "parameter" else torch.cat([table, table]))

        def forward(self):
            return self.table if how != "view" else self.table[:2]

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = Table()

        def forward(self, x):  # (B, 2, 1)
            return x + self.positions()

    net = Added()
    model = NNsight(net)
    x = torch.zeros(1, 2, 1)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(x):
            table = model.positions.output
        with tracer.invoke(x + 1):
            output = model.output
    assert table.shape == (2, 1)
    assert torch.equal(output, net(x + 1))
    with torch.no_grad(), pytest.raises(BatchError, match=r"model.positions.output.*\(2, 1\)"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.positions.output = torch.zeros(1, 1)
            with tracer.invoke(x):
                pass


def flattened(self, x):  # (B, S, WIDTH) as (B * S, WIDTH), as routers see it
    return self.b(self.a(x.reshape(-1, WIDTH))).reshape(x.shape)


def test_a_flattened_value_is_whole_and_not_to_be_written_by_one_invoke():
    net = Calls(flattened)
    model = NNsight(net)
    x = torch.randn(1, 3, WIDTH)
    with model.trace() as tracer:
        with tracer.invoke(x):
            flat = model.a.output
        with tracer.invoke(x * 2):
            output = model.output
    assert flat.shape == (6, WIDTH)
    assert close(output, net(x * 2))
    with pytest.raises(BatchError, match="model.a.output"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.a.output = torch.zeros(3, WIDTH)
            with tracer.invoke(x):
                pass
    with pytest.raises(BatchError, match="edited in place"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.a.output[:] = 0
            with tracer.invoke(x):
                _ = model.output


def test_shapes_that_do_not_fit_are_named(model):
    with pytest.raises(BatchError, match=r"`model.h.0.output` has shape \(1, 8\).*\(1, 3\)"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                model.h[0].output = torch.zeros(1, 3)
            with tracer.invoke(rows()):
                pass


def test_gradients_flow_through_written_rows(net, model):
    given = torch.zeros(1, WIDTH, requires_grad=True)
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            model.h[1].output = given * 2
            loss = model.output.sum()
        with tracer.invoke(rows(1, 2)):
            other = model.output
    loss.backward()
    alone = torch.zeros(1, WIDTH, requires_grad=True)
    net.lm_head(net.h[2](alone * 2)).sum().backward()
    assert close(given.grad, alone.grad)
    assert other.requires_grad


def test_a_skip_covers_every_row_or_is_an_error(net, model):
    with model.trace() as tracer:
        for seed in (1, 2):
            with tracer.invoke(rows(1, seed)):
                model.h[1].skip(model.h[1].input)
        with tracer.invoke():
            output = model.output
    x = torch.cat([rows(1, 1), rows(1, 2)])
    assert close(output, net.lm_head(net.h[2](net.h[0](net.emb(x)))))
    with pytest.raises(BatchError, match=r"batched .skip\(\) has to cover every row.*1 of 2"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                model.h[1].skip(model.h[1].input)
            with tracer.invoke(rows()):
                _ = model.output


def test_one_after_another_is_bit_identical_to_alone(net, model):
    outputs = []
    with model.trace(batched=False) as tracer:
        for seed in range(3):
            with tracer.invoke(rows(seed + 1, seed)):
                outputs.append(model.output)
    assert all(torch.equal(output, net(rows(seed + 1, seed))) for seed, output in enumerate(outputs))
    with pytest.raises(InvokeError, match="sees? the whole batch|whole batch"):
        with model.trace(batched=False) as tracer:
            with tracer.invoke(rows()):
                pass
            with tracer.invoke():
                pass


def test_stop_serves_the_siblings_at_this_visit_first(model):
    after = []
    with model.trace() as tracer:
        with tracer.invoke(rows(1, 1)):
            first = model.h[1].output
            tracer.stop()
            after.append("never")
        with tracer.invoke(rows(1, 2)):
            second = model.h[1].output
            third = model.h[2].output
    assert first.shape == second.shape == (1, WIDTH)
    assert after == []
    assert "third" not in locals()


def test_an_error_names_the_invoke_and_leaves_the_model_usable(net, model):
    with pytest.raises(ZeroDivisionError) as caught:
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                _ = model.output
            with tracer.invoke(rows()):
                _ = model.h[0].output
                1 / 0
    assert any("invoke" in note and "test_invoked_blocks.py" in note for note in caught.value.__notes__)
    with model.trace(rows()):
        output = model.output
    assert torch.equal(output, net(rows()))


def test_out_of_order_in_an_invoke(model):
    with pytest.raises(OutOfOrderError, match="model.h.0.output"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                _ = model.h[1].output
                _ = model.h[0].output
            with tracer.invoke(rows()):
                pass


def test_a_name_that_no_block_binds(model):
    with pytest.raises(NameError, match="nowhere"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                print(nowhere)  # noqa: F821
            with tracer.invoke(rows()):
                pass


def test_a_name_that_the_earlier_block_did_not_come_to_bind(model):
    with pytest.raises(NameError, match="bound_never"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                if model.output.numel() == 0:
                    bound_never = 1
            with tracer.invoke(rows()):
                print(bound_never)


def test_blocks_that_wait_for_each_other_for_ever(model):
    with pytest.raises(DeadlockError, match="barrier of 2 blocks"):
        with model.trace() as tracer:
            meet = tracer.barrier(2)
            with tracer.invoke(rows()):
                meet()
            with tracer.invoke(rows()):
                _ = model.output


def test_invoke_where_none_can_be(model):
    with pytest.raises(InvokeError, match="Cannot invoke during an active model execution.*input of its own"):
        with model.trace(rows()) as tracer:
            with tracer.invoke(rows()):
                pass
    with pytest.raises(InvokeError, match="Cannot invoke during an active model execution"):
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                with tracer.invoke(rows()):
                    pass
    with model.trace(rows()) as tracer:
        pass
    with pytest.raises(TracerStateError, match="not open"):
        with tracer.invoke(rows()):
            pass


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, WIDTH), torch.zeros(1, 3), "shapes"),
        (torch.zeros(1, WIDTH), torch.zeros(1, WIDTH, dtype=torch.float64), "float64"),
    ],
)
def test_inputs_that_cannot_be_joined(model, first, second, message):
    with pytest.raises(InputError, match=f"cannot be joined.*{message}"):
        with model.trace() as tracer:
            with tracer.invoke(first):
                pass
            with tracer.invoke(second):
                pass


def test_no_input_at_all(model):
    with pytest.raises(ValueError, match="Cannot return output of Envoy `model`"):
        with model.trace() as tracer:
            with tracer.invoke():
                _ = model.output


def test_header_items_after_the_invoke_wrap_its_body(model):
    with model.trace() as tracer:
        with torch.no_grad(), tracer.invoke(rows()), torch.enable_grad() as _:
            inside = torch.is_grad_enabled()
            value = model.output * 1
        with tracer.invoke(rows()):
            outside = torch.is_grad_enabled()
    assert inside
    assert outside
    assert value.requires_grad


def test_a_return_in_a_block_says_what_to_do(model):
    def run():
        with model.trace() as tracer:
            with tracer.invoke(rows()):
                return model.output

    with pytest.raises(ValueError, match="`return` at .*test_invoked_blocks.py"):
        run()


def test_names_are_not_shared_when_switched_off(model):
    from nnsight import CONFIG

    CONFIG.APP.CROSS_INVOKER = False
    try:
        with pytest.raises(NameError, match="only_here"):
            with model.trace() as tracer:
                with tracer.invoke(rows()):
                    only_here = 1
                with tracer.invoke(rows()):
                    print(only_here)
    finally:
        CONFIG.APP.CROSS_INVOKER = True
