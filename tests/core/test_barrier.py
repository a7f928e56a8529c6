"""A barrier counts the blocks that come to it, and nobody else."""

import threading

import pytest
import torch
from modules import Net, rows, seeded

from nnsight import NNsight, WrongThreadError


def test_a_refused_call_does_not_count_as_an_arrival():
    net = seeded(Net)
    model = NNsight(net)
    refused, order = [], []

    def call(barrier):
        try:
            barrier()
        except WrongThreadError as error:
            refused.append(error)

    with model.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(rows(1)):
            thread = threading.Thread(target=call, args=(meet,))
            thread.start()
            thread.join()
            meet()
            order.append("first goes on")
        with tracer.invoke(rows(2)):
            hidden = model.h[0].output
            order.append("second comes")
            meet()
    assert len(refused) == 1
    assert order == ["second comes", "first goes on"]
    assert torch.allclose(hidden, net.h[0](net.emb(rows(2))), atol=1e-6)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match="A barrier is for a number of blocks"):
        with NNsight(seeded(Net)).trace() as tracer:
            tracer.barrier(count)
