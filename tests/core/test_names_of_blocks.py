"""Each captured block has variables of its own, wherever it stands: in a function, in another block."""

from __future__ import annotations

import runpy
import textwrap

import pytest
import torch

from nnsight import NNsight
from nnsight.testing.tiny import Net, rows, seeded

X, Y = rows(0, 1), rows(1, 1)


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def hidden(net, x):
    return net.h[0](net.emb(x))


def close(left, right):
    return torch.allclose(left, right, atol=1e-6)


def test_a_comprehension_that_uses_the_name_elsewhere_does_not_join_the_blocks(net, model):
    with model.trace() as tracer:
        with tracer.invoke(X):
            h = model.h[0].output
            _ = model.output
            first = h * 1
        with tracer.invoke(Y):
            h = model.h[0].output
            _ = model.output
            second = h * 1
    found = [h for _ in range(1)], {h for _ in range(1)}, {key: h for key in range(1)}
    assert close(first, hidden(net, X)) and close(second, hidden(net, Y))
    assert found[0][0] is h and found[2][0] is h and close(h, hidden(net, Y))


def test_functions_in_one_block_do_not_join_the_others(net, model):
    """A lambda or a generator that reads a name belongs to its block: the same name elsewhere is another variable."""
    with model.trace() as tracer:
        with tracer.invoke(X):
            h = model.h[0].output
            _ = model.output
            first = sum(row.sum() for row in h), sorted([0, 1], key=lambda index: h[0, index].item())
        with tracer.invoke(Y):
            h = model.h[0].output
            _ = model.output
            second = sum(row.sum() for row in h)
        with tracer.invoke(X):
            h = model.h[0].output
            _ = model.output
            third = sum(h[index].sum() for index in range(1))
    assert close(first[0], hidden(net, X).sum()) and close(second, hidden(net, Y).sum())
    assert close(third, hidden(net, X).sum()) and close(h, hidden(net, X))


def test_a_function_in_a_comprehension_shares_its_variables_with_the_block(model):
    total = 0
    adders = [lambda by: by + total for _ in range(1)]
    with model.trace() as tracer:
        with tracer.invoke(X):
            total = model.h[0].output.shape[1]
            found = adders[0](1)
    assert found == 9


def test_blocks_in_a_block_have_variables_of_their_own(net, model):
    with model.trace() as tracer:
        with tracer.invoke(X):
            with model.trace() as inner:
                with inner.invoke(X):
                    h = model.h[0].output
                    _ = model.output
                    first = h * 1
                with inner.invoke(Y):
                    h = model.h[0].output
                    _ = model.output
                    second = h * 1
            third = h * 1
    assert close(first, hidden(net, X)) and close(second, hidden(net, Y)) and close(third, hidden(net, Y))


def test_a_block_in_a_block_waits_for_what_its_sibling_binds(net, model):
    with model.trace() as tracer:
        with tracer.invoke(X):
            with model.trace() as inner:
                with inner.invoke(X):
                    h = model.h[0].output
                with inner.invoke(Y):
                    model.h[1].output = h * 2
                    result = model.output
    assert close(result, net.lm_head(net.h[2](hidden(net, X) * 2)))


def test_a_block_in_a_block_waits_for_what_a_sibling_of_the_outer_one_binds(net, model):
    with model.trace() as tracer:
        with tracer.invoke(X):
            h = model.h[0].output
        with tracer.invoke(Y):
            with model.trace() as inner:
                with inner.invoke(X):
                    model.h[1].output = h * 2
                    result = model.output
                with inner.invoke(Y):
                    h = model.h[0].output
                    own = h * 1
            last = h * 1
    assert close(result, net.lm_head(net.h[2](hidden(net, X) * 2)))
    assert close(own, hidden(net, Y)) and close(last, hidden(net, Y)) and close(h, hidden(net, Y))


def test_a_block_in_a_block_begins_with_the_values_around_it(net, model):
    factor = 2
    with model.trace() as tracer:
        with tracer.invoke(X):
            factor += 1
            with model.trace() as inner:
                with inner.invoke(X):
                    factor += 1
                    first = factor
                with inner.invoke(Y):
                    second = factor
            third = factor
    assert (first, second, third, factor) == (4, 4, 4, 4)


def test_a_function_in_a_block_shares_the_variable_with_blocks_in_it(model):
    with model.trace() as tracer:
        with tracer.invoke(X):
            count = 0

            def add():
                nonlocal count
                count += 1

            with model.trace() as inner:
                with inner.invoke(X):
                    add()
                    count += 10
                with inner.invoke(Y):
                    add()
            found = count
    assert found == count == 12


def test_a_function_in_a_block_may_hold_blocks(net, model):
    with model.trace() as tracer:
        with tracer.invoke(X):

            def patched(x, y):
                with model.trace() as inner:
                    with inner.invoke(x):
                        h = model.h[0].output
                    with inner.invoke(y):
                        model.h[1].output = h * 2
                        result = model.output
                return result

            found = [patched(X, Y), patched(Y, X)]
    assert close(found[0], net.lm_head(net.h[2](hidden(net, X) * 2)))
    assert close(found[1], net.lm_head(net.h[2](hidden(net, Y) * 2)))


@pytest.mark.parametrize("remote", [False, "local"])
def test_names_in_a_process_of_its_own_are_as_here(net, model, remote):
    with model.trace(remote=remote) as tracer:
        with tracer.invoke(X):
            h = model.h[0].output
            first = (model.output * 0 + h.repeat(1, 2)).save()
        with tracer.invoke(Y):
            model.h[1].output = h * 2
            second = model.output.save()
        with tracer.invoke(Y):
            h = model.h[0].output
            third = (model.output * 0 + h.repeat(1, 2)).save()
    assert close(first[:, :8], hidden(net, X)) and close(third[:, :8], hidden(net, Y))
    assert close(second, net.lm_head(net.h[2](hidden(net, X) * 2)))


def test_a_function_in_a_block_of_a_module_declares_its_variables_global(model, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent("""
        count = 1
        with model.trace() as tracer:
            with tracer.invoke(x):
                count = 2

                def add(by):
                    global count, new
                    count += by
                    new = model.h[0].output

                class Kept:
                    global other
                    other = count
                add(3)
                seen = count, other, new
    """)
    )
    found = runpy.run_path(str(path), {"model": model, "x": X})
    assert found["seen"][:2] == (5, 2) and found["seen"][2] is found["new"]
    assert (found["count"], found["other"]) == (5, 2)
