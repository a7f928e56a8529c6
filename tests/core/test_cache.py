"""`tracer.cache(...)`: what it keeps, compared with torch's own hooks, and how it is reached."""

import copy
import gc
import json
import os
import random
import resource
import stat
import struct
import weakref

import pytest
import safetensors.torch
import torch
from modules import WIDTH, Calls, Net, Structured, assert_usable, plain, rows, run, same, seeded
from torch import nn

import nnsight
from nnsight import (
    Cache,
    CacheError,
    CacheFileError,
    CacheWarning,
    InputError,
    NNsight,
    NotCachedError,
    register_container,
)


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


def full(path):
    return f"model.{path}" if path else "model"


def loops(module, x):
    """Call `a` three times and `b` after each."""
    for _ in range(3):
        x = module.b(torch.relu(module.a(x)))
    return x


# -- what is kept


@pytest.mark.parametrize("kind", [Net, Structured])
def test_outputs_and_inputs_are_those_that_hooks_see(kind):
    net = seeded(kind)
    model = NNsight(net)
    with model.trace(rows()) as tracer:
        cache = tracer.cache(include_inputs=True)
    expected = plain(net, rows())
    assert set(cache.keys()) == {full(path) for path in expected.outputs}
    for path, (output,) in expected.outputs.items():
        assert same(cache[full(path)].output, output)
        assert same(cache[full(path)].inputs, expected.inputs[path][0])
        assert torch.equal(cache[full(path)].input, expected.inputs[path][0][0][0])
    assert_usable(model, net, rows())


def test_values_are_those_after_interventions(net, model):
    def edit(path, output):
        return torch.zeros_like(output) if path == "h.0" else output + 1 if path == "h.1.mlp" else None

    with model.trace(rows()) as tracer:
        cache = tracer.cache()
        model.h[0].output[:] = 0
        model.h[1].mlp.output = model.h[1].mlp.output + 1
    expected = plain(net, rows(), edit=edit)
    for path, (output,) in expected.outputs.items():
        assert torch.equal(cache[full(path)].output, output), path


def test_a_skipped_module_is_cached_with_what_it_was_skipped_with(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
        model.h[1].skip(model.h[0].output * 2)
    assert torch.equal(cache["h.1"].output, cache["h.0"].output * 2)
    assert "h.1.mlp" not in cache


def test_values_do_not_change_with_later_edits_of_the_block(net, model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache(include_inputs=True)
        hidden = model.h[0].output
        given = model.h[1].mlp.input
        model.h[1].mlp.output
        hidden[:], given[:] = 7, 8
    expected = plain(net, rows())
    assert torch.equal(cache["h.0"].output, expected.outputs["h.0"][0])
    assert torch.equal(cache["h.1.mlp"].input, expected.inputs["h.1.mlp"][0][0][0])
    assert (hidden == 7).all()


def test_values_do_not_change_with_later_edits_of_the_model():
    net = Calls(lambda self, x: self.b(self.a(x).mul_(3)))
    with NNsight(net).trace(rows()) as tracer:
        cache = tracer.cache()
    assert torch.equal(cache["a"].output, net.a(rows()))


def test_containers_are_copied_with_what_is_in_them():
    class Store:
        def __init__(self, tensor):
            self.kept = [tensor]
            self.name = "store"

    class Storing(nn.Module):
        def forward(self, x):
            return {"x": (x,), "store": Store(x)}

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Storing()

        def forward(self, x):
            found = self.inner(x + 0)
            found["x"][0].zero_()
            found["store"].kept.append(x)
            return x

    with NNsight(Outer()).trace(rows()) as tracer:
        cache = tracer.cache()
    found = cache["inner"].output
    assert torch.equal(found["x"][0], rows())
    assert len(found["store"].kept) == 1 and found["store"].name == "store"
    assert found["store"].kept[0] is found["x"][0]  # one tensor is copied once


def test_a_block_that_waits_for_another_still_edits_before_the_cache_looks(model):
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        one, two = tracer.cache(modules=["h.0"]), tracer.cache(modules=["h.0"])
        with tracer.invoke(rows(n=1)):
            hidden = model.h[0].output
            barrier()
            hidden[:] = 5
        with tracer.invoke(rows(n=1)):
            model.h[0].output
            barrier()
    for cache in (one, two):
        assert (cache["h.0"].output[0] == 5).all() and not (cache["h.0"].output[1] == 5).any()


def test_options_device_dtype_and_detach(net, model):
    with model.trace(rows()) as tracer:
        half = tracer.cache(dtype=torch.float16)
        attached = tracer.cache(detach=False, device=None)
        inputs = tracer.cache(include_output=False, include_inputs=True)
    expected = plain(net, rows()).outputs["h.1"][0]
    assert torch.equal(half["h.1"].output, expected.half())
    assert attached["h.1"].output.grad_fn is not None and half["h.1"].output.grad_fn is None
    gradient = torch.autograd.grad(attached.model.output.sum(), net.h[1].mlp.weight)[0]
    assert torch.equal(gradient, torch.autograd.grad(net(rows()).sum(), net.h[1].mlp.weight)[0])
    with pytest.raises(CacheError, match="include_output=True"):
        inputs["h.1"].output
    with pytest.raises(CacheError, match="include_inputs=True"):
        half["h.1"].input


def test_whole_numbers_keep_their_dtype():
    net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with NNsight(net).trace(torch.tensor([1, 2])) as tracer:
        cache = tracer.cache(dtype=torch.float64, include_inputs=True)
    assert cache["0"].input.dtype == torch.int64 and cache["0"].output.dtype == torch.float64


# -- blocks


def test_in_an_invoke_it_holds_the_rows_of_that_invoke(net, model):
    first, second = rows(1, n=1), rows(2, n=3)
    with model.trace() as tracer:
        whole = tracer.cache()
        with tracer.invoke(first):
            cache_a = tracer.cache(include_inputs=True)
            model.h[0].output[:] = 0
        with tracer.invoke(second):
            cache_b = tracer.cache()
        with tracer.invoke():
            cache_all = tracer.cache()
    zeroed = plain(net, first, edit=lambda path, output: torch.zeros_like(output) if path == "h.0" else None)
    alone = plain(net, second)
    for path in alone.outputs:
        torch.testing.assert_close(cache_a[full(path)].output, zeroed.outputs[path][0])
        torch.testing.assert_close(cache_b[full(path)].output, alone.outputs[path][0])
        joint = torch.cat([zeroed.outputs[path][0], alone.outputs[path][0]])
        torch.testing.assert_close(cache_all[full(path)].output, joint)
        torch.testing.assert_close(whole[full(path)].output, joint)
    assert torch.equal(cache_a.model.input, first)


def test_with_batched_false_it_belongs_into_the_invokes(net, model):
    with model.trace(batched=False) as tracer:
        with pytest.raises(CacheError, match="inside the invokes"):
            tracer.cache()
        with tracer.invoke(rows(1)):
            one = tracer.cache()
        with tracer.invoke(rows(2)):
            two = tracer.cache()
    assert torch.equal(one["h.2"].output, plain(net, rows(1)).outputs["h.2"][0])
    assert torch.equal(two["h.2"].output, plain(net, rows(2)).outputs["h.2"][0])


def test_a_part_traced_on_its_own(net, model):
    with model.h[1].trace(rows()) as tracer:
        cache = tracer.cache()
    assert cache.keys() == ["model.h.1.attn", "model.h.1.mlp", "model.h.1"]
    assert torch.equal(cache.h[1].output, net.h[1](rows()))


def test_stop_and_errors_leave_what_was_recorded_so_far(net, model):
    with model.trace(rows()) as tracer:
        stopped = tracer.cache()
        model.h[0].output
        tracer.stop()
    with pytest.raises(ZeroDivisionError), model.trace(rows()) as tracer:
        failed = tracer.cache()
        model.h[1].output
        1 / 0
    assert "h.0.mlp" in stopped and "h.1.attn" not in stopped
    assert torch.equal(failed["h.0"].output, plain(net, rows()).outputs["h.0"][0])
    assert_usable(model, net, rows())


def test_it_can_be_read_while_the_run_goes_on(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
        hidden = model.h[1].mlp.output
        assert "h.0" in cache and "h.1" not in cache and len(cache) == 5
        seen = cache["h.0"].output
        model.output
    assert cache["h.0"].output is seen
    assert torch.equal(cache["h.1.mlp"].output, hidden) and "lm_head" in cache


def test_nothing_keeps_the_model():
    net = seeded(Net)
    model = NNsight(net, rename={"h": "layers"})
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
    alive = weakref.ref(net)
    gc.disable()
    try:
        del net, model, tracer
        assert alive() is None
    finally:
        gc.enable()
    assert cache.layers[0].mlp.output.shape == (2, WIDTH)


def test_a_model_side_in_a_thread():
    assert (
        run(
            """
        import torch
        from modules import Net, plain, rows, seeded
        from nnsight import NNsight
        net = seeded(Net)
        model = NNsight(net)
        with model.trace(rows()) as tracer:
            cache = tracer.cache()
            model.h[0].output[:] = 0
        print(float(cache["h.0"].output.abs().sum()), len(cache))
        """,
            NNSIGHT_MODEL_SIDE="thread",
        )
        == "0.0 12"
    )


# -- steps


def test_one_type_whether_one_visit_or_many():
    net = seeded(Calls, loops)
    with NNsight(net).trace(rows()) as tracer:
        cache = tracer.cache()
    expected = plain(net, rows())
    assert type(cache["a"]) is type(cache["model"])
    assert [step.occurrence for step in cache["a"].steps] == [0, 1, 2]
    for path in ("a", "b"):
        assert all(same(step.output, out) for step, out in zip(cache[path].steps, expected.outputs[path], strict=True))
        assert same(cache.step(2)[path].output, expected.outputs[path][2])
    (only,) = cache["model"].steps
    assert same(only.output, cache.model.output) and same(only.output, expected.result)
    assert "model" not in cache.step(1)
    with pytest.raises(CacheError, match=r"`model.a` was visited 3 times.*`\.steps\[i\]\.output`"):
        cache["a"].output
    with pytest.raises(NotCachedError, match="no step 3: its last is 2"):
        cache.step(3)
    assert [list(visit) for visit in cache.to_dict()["model.a"]] == [["output"]] * 3
    assert len(cache.to_dict()["model"]) == 1


def test_a_container_that_is_filled_later_is_copied_as_it_was(monkeypatch):
    class Store:
        def __init__(self):
            self.kept = []

    def look_into(store, function):
        new = Store()
        new.kept = [function(item) for item in store.kept]
        return new

    monkeypatch.setattr("nnsight.joint.containers._special", [])
    register_container(Store, look_into)

    class Filling(nn.Module):
        def forward(self, x, store):
            store.kept.append(x)
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Filling()

        def forward(self, x):
            return self.inner(x, Store())

    with NNsight(Outer()).trace(rows()) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert cache["inner"].inputs[0][1].kept == []


def test_generation_step_by_step_and_the_model_s_own_cache():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=None))
    net = net.eval()
    ids = torch.tensor([[5, 6, 7]])
    logits, lengths = [], []

    def keep(_module, _args, output):
        logits.append(output.logits.clone())
        lengths.append(output.past_key_values.get_seq_length())

    handle = net.register_forward_hook(keep)
    call = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    net.generate(ids, **call)
    handle.remove()
    with NNsight(net).trace(ids, fn="generate", **call) as tracer:
        cache = tracer.cache(modules=["model", "lm_head"])
    steps = cache["model"].steps
    assert len(steps) == 3
    for step, expected, length in zip(steps, logits, lengths, strict=True):
        assert torch.equal(step.output.logits, expected)
        assert step.output.past_key_values.get_seq_length() == length


# -- reaching


def test_every_way_to_reach_an_entry(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
    output = cache["model.h.0.mlp"].output
    ways = (
        cache["h.0.mlp"], cache.model.h[0].mlp, cache.h[0].mlp, cache.h[-3].mlp, cache["h"][0]["mlp"],
        cache.model["h.0.mlp"], cache[model.h[0].mlp],
    )  # fmt: skip
    assert all(entry.output is output for entry in ways)
    assert output[0].shape == (WIDTH,)
    assert [entry.path for entry in cache.h] == ["model.h.0", "model.h.1", "model.h.2"]
    assert "h.0" in cache and "model.h.0" in cache and model.h[0] in cache and "h" not in cache and "x" not in cache
    assert len(cache) == 12 and list(cache) == cache.keys() and cache.keys()[0] == "model.emb"
    assert [path for path, _ in cache.items()] == cache.keys()
    assert all(entry.path == path for path, entry in cache.items())
    assert not hasattr(cache, "nothing") and not hasattr(cache.h, "nothing") and hasattr(cache, "h")


def test_a_child_that_is_called_model(net):
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net

        def forward(self, x):
            return self.model(x)

    model = NNsight(Causal())
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
        some = tracer.cache(modules=["model.h.0", "model.model.h.1"])
    path = "model.model.h.0"
    output = cache[path].output
    assert cache["model.h.0"].output is output and cache.model.h[0].output is output
    assert cache.model.model.h[0].output is output
    assert some.keys() == ["model.model.h.0", "model.model.h.1"]


def test_other_names_lead_to_the_same_entries():
    model = NNsight(seeded(Net), rename={"h": "layers", "attn": ["self_attn", "attention"]})
    with model.trace(rows()) as tracer:
        cache = tracer.cache(modules=[model.layers[0], "layers.1.self_attn", "model.layers.2.attention"])
    assert cache.keys() == ["model.h.0", "model.h.1.attn", "model.h.2.attn"]
    assert cache.keys(alias=True) == ["model.layers.0", "model.layers.1.self_attn", "model.layers.2.self_attn"]
    output = cache["model.h.1.attn"].output
    for entry in (cache["layers.1.attention"], cache.layers[1].self_attn, cache.model.layers[1].attn, cache.h[1].attn):
        assert entry.output is output
    with pytest.raises(NotCachedError, match=r"Nearest: .*layers\.1\.self_attn"):
        cache["model.layers.1.self_atn"]


def test_a_module_under_two_names():
    net = seeded(Calls, lambda self, x: self.b(self.a(x)))
    net.d = net.a
    model = NNsight(net)
    with model.trace(rows()) as tracer:
        cache = tracer.cache(modules=["d"])
    assert cache.keys() == ["model.a"] and cache["d"].output is cache.a.output


def test_the_repr_and_the_tree_show_shapes_and_sizes(model):
    with model.trace(rows()) as tracer:
        assert "0 modules, 0 visits, 0 B" in repr(cache := tracer.cache(modules=[model.h[0]]))
    size = rows().numel() * 4
    assert cache.nbytes == size
    assert repr(cache).startswith(
        f"Cache of 1 modules, 1 visits, {size} B\n  model.h.0: Visit(0: output=float32[2, 8])"
    )
    assert cache.tree() == f"model\n  h\n    0: output float32[2, 8], {size} B"


# -- bad input


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["h.0.mpl"], r"'h\.0\.mpl'.*Nearest: model\.h\.0\.mlp"),
        (["model.lm_haed"], r"Nearest: model\.lm_head"),
        (["h"], "`model.h` cannot be cached: a ModuleList only holds modules"),
        ([], "would record nothing"),
        ([3], "not 'int'"),
        ([nn.Linear(2, 2)], "not a module of the model traced"),
        ([NNsight(Net()).h[0]], "another model"),
    ],
)
def test_modules_that_match_nothing_are_errors(net, model, modules, message):
    with pytest.raises(InputError, match=message), model.trace(rows()) as tracer:
        tracer.cache(modules=modules)
    assert_usable(model, net, rows())


@pytest.mark.parametrize(
    "options", [{"device": "nowhere"}, {"dtype": "half"}, {"include_output": False}], ids=lambda o: next(iter(o))
)
def test_options_that_cannot_be_used_are_errors(model, options):
    with pytest.raises(InputError, match=next(iter(options))), model.trace(rows()) as tracer:
        tracer.cache(**options)


def test_modules_already_passed_are_told(net, model):
    with model.trace(rows()) as tracer:
        model.h[1].output
        with pytest.warns(CacheWarning, match=r"has passed `model\.h\.0\.output`") as told:
            cache = tracer.cache(modules=[model.h[0], model.h[1], model.h[2]])
        silent = tracer.cache()
    assert told[0].filename == __file__
    assert cache.keys() == ["model.h.1", "model.h.2"]  # the model stood at h.1
    assert torch.equal(cache["h.2"].output, plain(net, rows()).outputs["h.2"][0])
    assert "h.0" not in silent and "lm_head" in silent


def test_a_cache_after_the_run_is_an_error(model):
    with model.trace(rows()) as tracer:
        tracer.result
        with pytest.raises(CacheError, match="run of this trace is over"):
            tracer.cache()


def test_what_was_not_cached_says_so(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache(modules=["h.0", "h.1"])
        with pytest.raises(NotCachedError, match="the cache is empty"):
            cache["h.0"]
    with pytest.raises(KeyError, match=r"`h\.7` was not cached.*Nearest: model\.h\.1"):
        cache["h.7"]
    with pytest.raises(AttributeError, match="was not cached"):
        cache.lm_head
    with pytest.raises(CacheError, match=r"`model\.h` was not cached"):
        cache.h.output
    with pytest.raises(IndexError, match="has 2 modules"):
        cache.h[-3]


# -- files


def test_a_file_gives_back_what_was_saved(tmp_path):
    model = NNsight(seeded(Structured), rename={"pair": "two"})
    with model.trace(rows()) as tracer:
        cache = tracer.cache(include_inputs=True)
    file = tmp_path / "run.safetensors"
    assert cache.save(file) is cache
    loaded = Cache.load(file)
    assert loaded.keys() == cache.keys() and loaded.nbytes == cache.nbytes
    assert same(loaded["model.pair"].output, cache["model.pair"].output)
    assert same(loaded.two.inputs, cache.two.inputs)
    assert same(dict(loaded["mapping"].output), cache["mapping"].output)
    answer = loaded["answering"].output
    assert same(answer.logits, cache["answering"].output.logits) and answer["hidden"][1].shape == (2, WIDTH)
    tensors = safetensors.torch.load_file(file)
    assert torch.equal(tensors["model.mapping.output:0.extra.0"], cache["mapping"].output["extra"][0])


def test_every_dtype_and_shape_survives_a_file(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]
    given = {str(dtype): torch.randint(0, 2, (3, 2)).to(dtype).T for dtype in dtypes}
    given |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "none": None, "word": "x", "list": [1, (2.0,)]}

    class Giving(nn.Module):
        def forward(self, x):
            return given

    with NNsight(Giving()).trace(rows()) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "c")
    loaded = Cache.load(tmp_path / "c").model.output
    assert same(loaded, given)
    assert all(loaded[str(dtype)].dtype == dtype for dtype in dtypes)


def test_what_cannot_be_written_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x, print

    with NNsight(Odd()).trace(rows()) as tracer:
        cache = tracer.cache()
    with pytest.warns(CacheWarning, match="without pickle: builtin_function_or_method"):
        cache.save(tmp_path / "c")
    assert torch.equal(Cache.load(tmp_path / "c").model.output[0], rows())


def test_a_full_disk_leaves_nothing_behind_and_the_old_file_in_place(tmp_path, model):
    with model.trace(rows(n=500)) as tracer:
        cache = tracer.cache()
    file = tmp_path / "c"
    cache.step(0).save(file)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CacheFileError, match=r"The cache \(\d.* KiB\) cannot be written to .*: File too large"):
            cache.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(OSError, match="No such file or directory"):
        cache.save(tmp_path / "nowhere" / "c")


def test_a_saved_file_is_one_like_any_other(tmp_path, model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
    (plain := tmp_path / "plain").touch()
    cache.save(file := tmp_path / "c")
    assert file.stat().st_mode == plain.stat().st_mode
    file.chmod(0o640)
    cache.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    (link := tmp_path / "link").symlink_to(file)
    file.write_bytes(b"")
    cache.save(link)
    assert link.is_symlink()
    assert torch.equal(Cache.load(file)["h.0"].output, cache["h.0"].output)


def test_what_is_no_file_is_not_replaced_by_one(tmp_path, model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
    os.mkfifo(pipe := tmp_path / "pipe")
    for place in (pipe, tmp_path):
        with pytest.raises(CacheFileError, match="cannot be written to .*: (Not a regular file|Is a directory)"):
            cache.save(place)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_device_that_is_not_there_is_told_at_once(model):
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with model.trace(rows()) as tracer, pytest.raises(InputError, match=f"device='{absent}'.: that is no device here"):
        tracer.cache(device=absent)


def test_files_that_are_no_cache_are_errors(tmp_path, model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
    cache.save(good := tmp_path / "good")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    files = {
        "short": (b"abc", "no safetensors file"),
        "text": (b"this is no such file at all", "no safetensors file"),
        "other": (struct.pack("<Q", len(header)) + header + b"1234", "has no .nnsight.cache. in its metadata"),
        "cut": (good.read_bytes()[:-8], "too few"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CacheFileError, match=message):
            Cache.load(tmp_path / name)
    with pytest.raises(CacheFileError, match="No such file"):
        Cache.load(tmp_path / "absent")
    with pytest.raises(CacheFileError, match="directory"):
        Cache.load(tmp_path)


def test_save_without_a_file_marks_the_cache(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache().save()
        assert nnsight.save(cache) is cache
    assert "h.0" in cache
    with pytest.raises(nnsight.SaveError):
        cache.save()


def test_a_copy_of_a_cache_is_a_cache(model):
    with model.trace(rows()) as tracer:
        cache = tracer.cache()
    other = copy.copy(cache)
    assert other["h.0"].output is cache["h.0"].output


def _places(value, path=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))
    if path:
        yield path


def _damaged(value, path, new):
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if new is None:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_an_error_of_the_file_or_still_a_cache(tmp_path, model, seed):
    with model.trace(rows()) as tracer:
        cache = tracer.cache(include_inputs=True)
    cache.save(file := tmp_path / "c")
    good = file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    about = json.loads(header["__metadata__"]["nnsight.cache"])
    junk = [None, -1, 0, 10**30, "x", "tensor", [], {}, [1, 2], True, 1.5, ["tensor", "nope"], ["dict", []], ["fields"]]
    chance = random.Random(seed)
    refused = 0
    for round_ in range(200):
        if round_ % 3 == 0:
            content = bytearray(good)
            for _ in range(3):
                content[chance.randrange(8 + length)] = chance.randrange(256)
        else:
            new = dict(header)
            if round_ % 3 == 1:
                new = _damaged(header, chance.choice(list(_places(header))), chance.choice(junk))
            else:
                text = json.dumps(_damaged(about, chance.choice(list(_places(about))), chance.choice(junk)))
                new["__metadata__"] = {"nnsight.cache": text}
            content = json.dumps(new).encode()
            content = struct.pack("<Q", len(content)) + content + good[8 + length :]
        file.write_bytes(content)
        try:
            loaded = Cache.load(file)
        except CacheFileError:
            refused += 1
        else:
            assert isinstance(loaded.to_dict(), dict) and repr(loaded) and loaded.tree()
    assert refused > 100
