"""`tracer.cache` of operations: what it keeps is what the code computes, under the operations' paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnsight import CacheError, InputError, NNsight, NotCachedError
from nnsight.builtin.cached import Cache

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def doubled(x):
    return torch.mul(x, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        for index in range(3):
            x = torch.add(x, index)
        if x.ndim == 3:
            x = torch.neg(x)
        return doubled(x) @ x.T


@pytest.fixture
def net():
    return Net()


def by_hand(net):
    with torch.no_grad():
        relu = torch.relu(net.first(X))
    adds = [relu, relu + 1, relu + 1 + 2]
    return relu, adds, adds[-1] * 2, adds[-1] * 2 @ adds[-1].T


def test_operations_of_every_kind_by_attribute_path_and_themselves(net):
    relu, adds, double, result = by_hand(net)
    model = NNsight(net)
    source = model.source
    chosen = [source.torch_relu_0, source.vars.x_0, source.ops.matmul_0, source.returns[0], "first", source.doubled_0]
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=chosen, include_inputs=True)
    assert torch.equal(cache.model.source.torch_relu_0.output, relu)
    assert torch.equal(cache["model.source.vars.x_0"].output, relu)
    assert torch.equal(cache["source.ops.matmul_0"].output, result)
    assert torch.equal(cache[source.returns[0]].output, result)
    assert torch.equal(cache["model.source.returns[0]"].output, result)
    assert torch.equal(cache.model.source.doubled_0.output, double)
    assert torch.equal(cache.model.source.torch_relu_0.input, cache.model.first.output)
    assert all(map(torch.equal, cache.model.source.ops.matmul_0.inputs[0], (double, adds[-1].T)))
    assert source.returns[0] in cache
    assert source.torch_add_0 not in cache
    assert len(cache) == 6
    with pytest.raises(CacheError, match=r"holds no `.inputs` of `model.source.vars.x_0`"):
        cache[source.vars.x_0].inputs


def test_all_operations_of_a_source(net):
    relu, adds, double, _ = by_hand(net)
    model = NNsight(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=model.source)
    found = cache.model.source
    assert torch.equal(found.torch_relu_0.output, relu)
    assert all(torch.equal(visit.output, one) for visit, one in zip(found.torch_add_0.steps, adds, strict=True))
    assert torch.equal(found.doubled_0.output, double)
    with pytest.raises(NotCachedError, match="the run did not call it"):
        found.torch_neg_0


def test_all_of_one_kind_beside_modules(net):
    relu, _, _, result = by_hand(net)
    model = NNsight(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model.source.vars, model.source.returns, model])
    assert torch.equal(cache.model.source.vars.x_0.output, relu)
    assert torch.equal(cache.model.output, result)
    assert torch.equal(cache[model.source.returns[0]].output, result)


def test_what_a_call_calls(net):
    _, _, double, _ = by_hand(net)
    model = NNsight(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model.source.doubled_0.source.torch_mul_0])
    assert torch.equal(cache.model.source.doubled_0.source.torch_mul_0.output, double)


def test_edits_are_in_it_and_later_ones_do_not_reach_it(net):
    model = NNsight(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model.source.torch_relu_0, model.source.vars.x_1])
        model.source.torch_relu_0.output = torch.ones(4, 4)
        model.source.torch_add_0.output[:] = 7
    assert torch.equal(cache.model.source.torch_relu_0.output, torch.ones(4, 4))
    assert cache.model.source.vars.x_1.steps[0].output.mean() == 7


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x):
        return torch.relu(self.model(x))


def test_an_operation_is_no_other_of_the_same_name_further_in():
    """A path may leave out the root's name; an operation means itself."""
    model = NNsight(Around())
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model.model.source.torch_relu_0])
    assert model.source.torch_relu_0 not in cache
    assert model.model.source.torch_relu_0 in cache
    with pytest.raises(NotCachedError, match=r"`model.source.torch_relu_0` was not cached"):
        cache[model.source.torch_relu_0]


def test_rows_of_an_invoke(net):
    relu, *_ = by_hand(net)
    model = NNsight(net)
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = tracer.cache(modules=[model.source.torch_relu_0, model.source.vars.x_0])
        with tracer.invoke(X[1:]):
            rest = tracer.cache(modules=[model.source.torch_relu_0])
    assert torch.equal(first.model.source.torch_relu_0.output, relu[:1])
    assert torch.equal(first.model.source.vars.x_0.output, relu[:1])
    assert torch.equal(rest.model.source.torch_relu_0.output, relu[1:])


def test_steps_of_a_generation(gpt2, ids):
    hidden = []
    handle = gpt2.transformer.h[1].attn.c_proj.register_forward_hook(lambda *call: hidden.append(call[2].clone()))
    gpt2.generate(ids, max_new_tokens=3, do_sample=False)
    handle.remove()
    model = NNsight(gpt2)
    with model.trace(ids, max_new_tokens=3, do_sample=False, fn="generate") as tracer:
        cache = tracer.cache(modules=[model.transformer.h[1].attn.source.self_c_proj_0])
    found = cache.model.transformer.h[1].attn.source.self_c_proj_0.steps
    assert [visit.occurrence for visit in found] == [0, 1, 2]
    assert all(torch.equal(visit.output, one) for visit, one in zip(found, hidden, strict=True))
    assert torch.equal(cache.step(2).model.transformer.h[1].attn.source.self_c_proj_0.output, hidden[2])


def test_saved_to_a_file_and_read_again(net, tmp_path):
    model = NNsight(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model.source.torch_relu_0, model.source.returns])
    cache.save(tmp_path / "cache.safetensors")
    again = Cache.load(tmp_path / "cache.safetensors")
    assert torch.equal(again["model.source.torch_relu_0"].output, cache.model.source.torch_relu_0.output)
    assert torch.equal(again["model.source.returns[0]"].output, cache["model.source.returns[0]"].output)


def test_an_operation_of_another_model_and_one_without_inputs_are_refused(net):
    model, other = NNsight(net), NNsight(Net())
    with model.trace(X) as tracer:
        with pytest.raises(InputError, match="has no input of its own"):
            tracer.cache(modules=[model.source.vars], include_inputs=True, include_output=False)
        with pytest.raises(ValueError, match="no block of this model is open"):
            tracer.cache(modules=[other.source.torch_relu_0])
        with other.trace(X):
            with pytest.raises(InputError, match=r"`model.source` is of another model than the one traced"):
                tracer.cache(modules=[other.source.torch_relu_0])
        with pytest.raises(InputError, match="takes paths, envoys, torch modules and operations, not 'int'"):
            tracer.cache(modules=[3])
        kept = model.output
    assert torch.equal(kept, net(X))
