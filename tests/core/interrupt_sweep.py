"""The program of `test_interrupts.py`: Ctrl-C at any moment of a trace, again and again.

A timer raises KeyboardInterrupt after a few microseconds more in every round, in the block, in the model, and in the
library between them. Run with the name of a function here and how many seconds to go on; prints how often it hit.
"""

import gc
import signal
import sys
import time
import weakref

import torch
from modules import Net, rows, seeded

from nnsight import NNsight
from nnsight.kernel.blocks import open_blocks


def inline(model, x):
    with model.trace(x) as tracer:
        hidden = model.h[0].output
        hidden = model.h[1].output + hidden
        result = tracer.result
    return result


def early(model, x):
    with model.trace(x):
        model.h[0].output = model.h[0].output + 1


def invokes(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            first = model.h[0].output
        with tracer.invoke(x):
            model.h[1].output[:] = first


def steps(model, x):
    with model.trace(x) as tracer:
        seen = []
        for _ in tracer.iter[:]:
            seen.append(model.h[1].output)
        result = tracer.result
    return seen, result


def edited(model, x):
    with model.edit() as changed:
        model.h[0].output[:] = 0
    with changed.trace(x):
        _ = changed.lm_head.output


def gradient(model, x):
    with model.trace(x), torch.enable_grad():
        hidden = model.h[0].output
        with model.lm_head.output.sum().backward():
            _ = hidden.grad


def interrupted(program, model, x, microseconds):
    """Run a program that a timer interrupts; return whether it was."""
    try:
        signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
        program(model, x)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for _ in range(3):  # what is pending comes here
            time.perf_counter()
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return True
    return False


def check(model, x, expected):
    """Fail unless the model is as it was, and nothing of what was interrupted remains."""
    with model.trace(x) as tracer:
        result = tracer.result
    assert torch.equal(result, expected)
    assert not open_blocks
    assert not [name for name, module in model._module.named_modules() if "_compiled_call_impl" in vars(module)]
    assert sys.gettrace() is None
    assert "grad" not in torch.Tensor.__dict__
    assert torch._C._current_graph_task_id() == -1


def sweep(program, seconds):
    """Interrupt a program for some seconds; return how often, and a reference to a weight of the model."""
    net, x = seeded(Net), rows()
    with torch.no_grad():
        expected = net(x)
    model = NNsight(net)
    program(model, x)
    start = time.perf_counter()
    program(model, x)
    span = int((time.perf_counter() - start) * 1e6) + 50
    hits, rounds, end = 0, 0, time.monotonic() + seconds
    while time.monotonic() < end:
        rounds += 1
        hits += interrupted(program, model, x, 5 + rounds * 7 % span)
        check(model, x, expected)
    return hits, weakref.ref(net.lm_head.weight)


def interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, interrupt)
    hits, weight = sweep(globals()[sys.argv[1]], float(sys.argv[2]))
    gc.collect()
    print(hits, "freed" if weight() is None else "kept")
