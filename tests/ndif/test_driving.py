"""`trace(fn=...)` in a runner: the user's function is run there, and every call of the model is one here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnsight import OutOfOrderError, save

both = pytest.mark.parametrize("remote", [False, "local"])


@both
def test_function_calls_the_model_several_times(gpt, ids, remote):
    def generate(input_ids, **kwargs):
        for _ in range(3):
            logits = gpt._module(input_ids).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
        return input_ids

    with gpt.trace(ids, fn=generate, remote=remote) as tracer:
        found = save([])
        for step in tracer.iter[:]:
            if step == 1:
                gpt.transformer.h[0].output[:] = 0
            found.append(gpt.lm_head.output)
        result = save(tracer.result)
    plain = gpt._module
    one = plain(ids).logits
    longer = torch.cat([ids, one[:, -1:].argmax(-1)], 1)
    handle = plain.transformer.h[0].register_forward_hook(lambda module, args, output: output * 0)
    two = plain(longer).logits
    handle.remove()
    last = torch.cat([longer, two[:, -1:].argmax(-1)], 1)
    three = plain(last).logits
    torch.testing.assert_close(found, [one, two, three])
    assert torch.equal(result, torch.cat([last, three[:, -1:].argmax(-1)], 1))


@both
def test_function_calls_parts_and_computes(net, x, remote):
    def forward(value):
        return net._module[2](F.gelu(net._module[0](value))) * 2

    with net.trace(x, fn=forward, remote=remote) as tracer:
        hidden = net[0].output
        net[0].output = hidden + 1
        result = tracer.result
        loss = result.sum()
        (gradient,) = torch.autograd.grad(loss, [hidden])
        gradient, result = save(gradient), save(result)
    plain = net._module[0](x).detach().requires_grad_()
    expected = net._module[2](F.gelu(plain + 1)) * 2
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), [plain])[0])


@both
def test_error_in_the_function_is_raised_and_the_model_stays_usable(net, x, remote):
    def fails(value):
        net._module[0](value)
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        with net.trace(x, fn=fails, remote=remote) as tracer:
            _ = tracer.result
    with net.trace(x, remote=remote):
        result = save(net.output)
    assert torch.equal(result, net._module(x))


@both
def test_stop_and_later_calls_in_a_function(net, x, remote):
    called = []

    def twice(value):
        once = net._module(value)
        called.append(1)
        return net._module[2](net._module[0](value)) + once

    with net.trace(x, fn=twice, remote=remote) as tracer:
        hidden = save(net[0].output)
        tracer.stop()
    assert torch.equal(hidden, net._module[0](x)) and called == []
    with net.trace(x, fn=twice, remote=remote) as tracer:
        first = net[2].output
        second = net[2].next().output
        with pytest.raises(OutOfOrderError, match=r"model\.0\.output"):
            _ = net[0].output
        total = save(first + second)
    with net.trace(x, fn=twice, remote=remote) as tracer:
        result = save(tracer.result)
    expected = net._module(x) + net._module[2](net._module[0](x))
    torch.testing.assert_close([total, result], [expected, expected])
    assert called == [1, 1]
