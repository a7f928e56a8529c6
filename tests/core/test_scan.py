"""`model.scan(...)`: a trace on shapes alone, compared with what the model gives on values."""

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
from modules import WIDTH, Calls, Net, Structured, assert_idle, assert_usable, plain, rows, run, seeded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import nnsight
from nnsight import NNsight, ScanError, save


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def about(value):
    """What a scan can know of a value."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return {key: about(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [about(item) for item in value]
    return about(vars(value)) if hasattr(value, "__dict__") else value


def assert_real():
    """Assert that no fake mode is left on."""
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert torch.ones(2).sum().item() == 2


@pytest.mark.parametrize("kind", [Net, Structured])
def test_shapes_are_those_of_a_run_and_nothing_is_touched(kind):
    net = seeded(kind)
    before = copy.deepcopy(net.state_dict())
    with NNsight(net).scan(rows()) as tracer:
        cache = tracer.cache(include_inputs=True, device=None)
    expected = plain(net, rows())
    assert set(cache.keys()) == {f"model.{path}" if path else "model" for path in expected.outputs}
    for path, (output,) in expected.outputs.items():
        entry = cache[path or "model"]
        assert about(entry.output) == about(output)
        assert about(entry.inputs) == about(expected.inputs[path][0])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert_idle(net)
    assert_real()


def test_the_program_of_the_readme(model):
    with model.scan(rows()):
        width = nnsight.save(model.h[0].output[0].shape[-1])
    assert width == WIDTH


def test_it_needs_no_weights_and_does_not_load_them():
    loaded = []

    class Lazy(NNsight):
        dispatched = False

        def dispatch(self):
            loaded.append(self)

    net = seeded(Net).to("meta")
    model = Lazy(net)
    with model.scan(rows()):
        hidden = model.h[1].mlp.output
        weight = model.h[1].mlp.weight * 2
        made = torch.zeros(2, device=model.h[0].attn.weight.device)
        result = model.output
    assert hidden.shape == (2, WIDTH) and result.shape == (2, 2 * WIDTH) and weight.shape == (WIDTH, WIDTH)
    assert hidden.device.type == made.device.type == "cpu"
    with model.h[1].scan(rows()) as tracer:
        assert tracer.result.shape == (2, WIDTH)
    with model.scan() as tracer:
        with tracer.invoke(rows(n=3)):
            shape = save(model.h[0].output.shape)
    assert shape == (3, WIDTH)
    assert not loaded and all(weight.is_meta for weight in net.parameters())


def test_a_language_model_is_scanned_without_its_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
    full = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    full.save_pretrained(tmp_path)
    model = nnsight.LanguageModel(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    expected = full(**inputs)
    for args, kwargs in (((inputs,), {}), ((), inputs), (([[5, 6, 7], [8, 9, 3]],), {"use_cache": True})):
        with model.scan(*args, **kwargs):
            hidden = model.transformer.h[1].output
            output = model.output
        assert about(hidden)[0] == (2, 3, 16)
        assert about(output.logits) == about(expected.logits)
        assert output.past_key_values.get_seq_length() == 3
    with model.scan() as tracer:
        with tracer.invoke([5, 6, 7]):
            one = save(model.lm_head.output.shape)
        with tracer.invoke([[5, 6], [7, 8]]):
            two = save(model.lm_head.output.shape)
    assert (one, two) == ((1, 3, 64), (2, 3, 64))
    assert not model.dispatched


# -- everything a trace can do


def test_edits_in_place_and_by_assignment(net, model):
    with model.scan(rows()):
        model.h[0].output[:] = 0
        model.h[1].output = torch.zeros(5, WIDTH)
        with torch.no_grad():
            model.h[2].mlp.weight[:] = 7
        model.h[2].mlp.weight.data[:] = 7
        result = model.output
    assert result.shape == (5, 2 * WIDTH)
    assert_usable(model, net, rows())
    assert torch.equal(net.h[2].mlp.weight, seeded(Net).h[2].mlp.weight)


def test_a_shape_that_does_not_fit_is_an_error_of_the_model(net, model):
    handler = logging.Handler()
    handler.emit = (logged := []).append
    logger = logging.getLogger(FakeTensorMode.__module__)
    logger.addHandler(handler)
    with pytest.raises(RuntimeError) as caught, model.scan(rows()):
        model.h[0].output = torch.zeros(2, 3)
        model.output
    assert not isinstance(caught.value, ScanError)
    assert not logged  # torch would log what it raises, with all its frames
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.ones(2, 3) @ torch.ones(4, 2)
    logger.removeHandler(handler)
    assert [record.getMessage()[:6] for record in logged] == ["failed"]  # as ever, outside of a scan
    assert_real()
    assert_usable(model, net, rows())


def test_invokes_see_their_rows(model):
    with model.scan() as tracer:
        with tracer.invoke(rows(n=1)):
            one = save(model.h[0].output.shape)
            model.h[1].output[:] = 0
        with tracer.invoke(rows(n=3)):
            three = save(model.h[0].output.shape)
            table = save(model.emb.bias.shape)
        with tracer.invoke():
            whole = save(model.lm_head.output.shape)
    assert (one, three, whole, table) == ((1, WIDTH), (3, WIDTH), (4, 2 * WIDTH), (WIDTH,))
    with model.scan(batched=False) as tracer:
        with tracer.invoke(rows(n=1)):
            one = save(model.output.shape)
        with tracer.invoke(rows(n=3)):
            three = save(model.output.shape)
    assert (one[0], three[0]) == (1, 3)
    assert_real()


def test_edited_models(net, model):
    with model.edit() as edited:
        model.h[0].output = model.h[0].output[:1]
    with edited.scan(rows(n=4)):
        shape = edited.h[1].output.shape
    with model.scan(rows(n=4)):
        assert model.h[1].output.shape == (4, WIDTH)
    assert shape == (1, WIDTH)


def test_steps_skip_stop_helpers_and_calls(net):
    def thrice(self, x):
        for _ in range(3):
            x = torch.cat([self.a(x), x])
        return self.b(x)

    model = NNsight(Calls(thrice))

    def helper():
        return model.a.output.shape[0]

    with model.scan(rows(n=1)) as tracer:
        sizes = [helper() for _ in tracer.iter[:]]
        after = model.c(torch.zeros(4, WIDTH)).shape
    assert sizes == [1, 2, 4] and after == (4, WIDTH)
    with model.scan(rows(n=1)) as tracer:
        model.a.skip(torch.zeros(6, WIDTH))
        with pytest.raises(AttributeError):
            model.a.nothing
        size = model.a.output.shape[0]
        tracer.stop()
        size = None
    assert size == 6
    assert_real()


def test_other_functions_no_block_and_keyword_inputs(net, model):
    assert model.scan(rows(), trace=False).shape == (2, 2 * WIDTH)
    with model.scan(rows(), fn=lambda x: net.h[0](x)):
        assert model.h[0].output.shape == (2, WIDTH)
    with model.scan(x=rows(), remote=True):
        assert model.output.shape == (2, 2 * WIDTH)
    mapping = Calls(lambda self, batch, scale=1: self.a(batch["x"]) * scale)
    wrapped = NNsight(mapping)
    with wrapped.scan({"x": rows()}, scale=2) as tracer:
        assert isinstance(wrapped.inputs[0][0]["x"], FakeTensor)
        assert tracer.result.shape == (2, WIDTH)


def test_without_an_input_it_asks_for_one(model):
    with pytest.raises(ValueError, match=r"`with model\.scan\(input\):`"), model.scan():
        model.output


def test_constants_of_the_block_have_values(model):
    with model.scan(rows()):
        index = torch.tensor(1)
        width = model.h[0].output.shape[-1] + index.item()
        kept = torch.arange(3).sum() + rows().sum()
    assert width == WIDTH + 1 and kept.shape == ()


def test_gradients_have_shapes_and_leave_none_behind(net, model):
    net.emb.bias.grad = torch.ones(WIDTH)
    with model.scan(rows()):
        model.output.sum().backward()
    assert torch.equal(net.emb.bias.grad, torch.ones(WIDTH)) and net.lm_head.weight.grad is None


def test_scans_and_traces_within_a_scan(net, model):
    with model.scan(rows()):
        with model.scan(rows(n=5)):
            inner = model.h[0].output
        hidden = model.h[1].output + inner[:2]
    assert hidden.shape == (2, WIDTH)
    assert_real()


def test_a_class_attribute_may_shadow_the_method(net):
    class Studied(NNsight):
        scan: str = "a name"

    assert Studied(net).scan == "a name"


# -- nothing remains


def test_what_a_forward_leaves_on_modules_is_put_back():
    def forward(self, x):
        self.mask = torch.ones(len(x))
        self.table = self.table * 2
        self.a.calls = self.a.calls + 1
        return self.norm(self.a(x)) * self.mask[:, None]

    net = Calls(forward)
    net.norm = nn.BatchNorm1d(WIDTH)
    net.register_buffer("table", torch.ones(2))
    net.a.calls = torch.zeros(())
    before = copy.deepcopy(net.state_dict())
    with NNsight(net).scan(rows()):
        pass
    assert not hasattr(net, "mask") and net.a.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(rows())
    assert net.norm.num_batches_tracked == 1


def test_what_is_kept_of_a_scan_keeps_no_weights():
    net = seeded(Net)
    model = NNsight(net)
    with torch.no_grad(), model.scan(rows()):
        hidden = model.h[0].output
        weight = model.h[0].mlp.weight * 1
    alive = weakref.ref(net.h[0].mlp)
    (weight + seeded(nn.Linear, WIDTH, WIDTH).weight).sum()  # the mode of a scan that is over goes on with them
    gc.disable()
    try:
        del model, net
        assert alive() is None
    finally:
        gc.enable()
    assert (hidden + 1).shape == (2, WIDTH) and weight.shape == (WIDTH, WIDTH)


def test_the_mode_ends_however_the_block_does(net, model):
    class Mine(Exception):
        pass

    with pytest.raises(Mine, match="^stay$"), model.scan(rows()):
        model.h[0].output
        raise Mine("stay")
    assert_real()
    failing = NNsight(Calls(lambda self, x: x.shape[7]))
    with pytest.raises(IndexError), failing.scan(rows()):
        pass
    assert_real()
    with pytest.raises(TypeError, match="argument"), model.scan(rows(), wrong=1):
        pass
    assert_real()
    assert_usable(model, net, rows())


def test_other_threads_compute_meanwhile(net, model):
    results = []
    with model.scan(rows()):
        model.h[0].output
        thread = threading.Thread(target=lambda: results.append(net(rows())))
        thread.start()
        thread.join()
    assert torch.equal(results[0], net(rows())) and not isinstance(results[0], FakeTensor)


def test_a_model_side_in_a_thread():
    assert (
        run(
            """
        import torch
        from modules import Net, rows, seeded
        from nnsight import NNsight
        model = NNsight(seeded(Net))
        with model.scan(rows()):
            hidden = model.h[1].output
        print(type(hidden).__name__, tuple(hidden.shape), torch.ones(2).sum().item())
        """,
            NNSIGHT_MODEL_SIDE="thread",
        )
        == "FakeTensor (2, 8) 2.0"
    )


# -- what needs values


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: int(x[0, 0]), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: x.tolist(),
    ],
    ids=["item", "bool", "int", "nonzero", "mask", "tolist"],
)  # fmt: skip
def test_code_that_needs_values_says_so(net, model, use):
    with pytest.raises(ScanError, match=r"needs the values of a tensor, and in a scan there are only shapes"):
        with model.scan(rows()):
            use(model.h[0].output)
    depends = NNsight(Calls(lambda self, x: self.a(x) if use(x) is not None else x))
    with pytest.raises(ScanError, match="`trace`, which computes"), depends.scan(rows()):
        pass
    assert_real()
    assert_usable(model, net, rows())


def test_a_block_can_stop_before_the_model_needs_values():
    model = NNsight(Calls(lambda self, x: self.b(self.a(x)[x[:, 0] > 0])))
    with model.scan(rows()) as tracer:
        shape = model.a.output.shape
        tracer.stop()
    assert shape == (2, WIDTH)


def test_a_scan_error_can_be_caught(model):
    with model.scan(rows()):
        hidden = model.h[0].output
        with pytest.raises(RuntimeError):
            hidden.sum().item()
        shape = model.output.shape
    assert shape == (2, 2 * WIDTH)


# -- shapes of many operations: they are remembered from scan to scan


@pytest.mark.parametrize("is_again", [False, True])
def test_operations_give_the_shapes_and_dtypes_that_they_give_on_values(is_again):
    def many(self, x):
        whole = torch.arange(6).view(2, 3)
        return [
            x + 1, x.int() + 1, x.int() + 1.0, whole / 2, whole * True, x.t(), x.t().contiguous(), x[:, 1:3],
            x[..., None],
            x.expand(3, 2, WIDTH), x.view(-1), x.reshape(4, -1), x.split(3, 1), x.chunk(2), x.unbind(0), x.sum(0),
            x.topk(2), x.sort(), torch.std_mean(x, 0), x.half() @ x.t().half(), torch.cat([x, x]), torch.stack([x, x]),
            x.to(torch.float64), x.to(x.dtype), x.detach(), torch.where(x > 0, x, 0.0), x.softmax(-1), x.max(1),
            x.add_(1), x.transpose_(0, 1), torch.complex(x, x).real, x.new_zeros(3), torch.zeros_like(x),
            nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
            nn.functional.layer_norm(x, x.shape[-1:]), x.unsafe_chunk(2), torch.einsum("ij,kj->ik", x, x),
        ]  # fmt: skip

    net = Calls(many)
    with torch.no_grad():
        expected = about(net(rows()))
        for _ in range(1 + is_again):
            assert about(NNsight(net).scan(rows(), trace=False)) == expected


def test_views_share_memory_and_results_do_not(model):
    with model.scan(rows()):
        x = model.h[0].output.detach()
        for _ in range(2):
            memory = x.untyped_storage()._cdata
            assert all(y.untyped_storage()._cdata == memory for y in (x.t(), x[0], x.view(-1), x.split(3, 1)[1]))
            assert (x + 1).untyped_storage()._cdata != memory
