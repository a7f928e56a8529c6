"""`remote="local"`: the same program with its block here and in a runner gives the same."""

from __future__ import annotations

import dataclasses
import enum
import gc
import io
import traceback
import warnings
import weakref
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo

from nnsight import InputError, LanguageModel, MissedProviderError, NNsight, NNsightError, OutOfOrderError, save


def here_and_there(program):
    """What a program gives with its block in the caller's frame, and in a runner."""
    return program(False), program("local")


def assert_same(program):
    here, there = here_and_there(program)
    assert type(here) is type(there)
    flat_here, flat_there = list(flat(here)), list(flat(there))
    assert len(flat_here) == len(flat_there)
    for one, other in zip(flat_here, flat_there, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


def flat(value):
    if isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.items()))
    else:
        yield value


# --- Values


def test_read_gives_what_a_hook_sees(net, x):
    seen = []
    handle = net._module[0].register_forward_hook(lambda module, args, output: seen.append(output))
    expected = net._module(x)
    handle.remove()
    with net.trace(x, remote="local"):
        hidden = net[0].output.save()
        result = net.output.save()
    assert torch.equal(hidden, seen[0])
    assert torch.equal(result, expected)


def test_written_output_flows_on_as_in_plain_torch(net, x):
    with net.trace(x, remote="local"):
        net[1].output = net[0].output * 2
        result = net.output.save()
    assert torch.equal(result, net._module[2](net._module[0](x) * 2))


def test_edit_in_place_flows_on(net, x):
    with net.trace(x, remote="local"):
        net[0].output[:, 1] = 7
        result = net.output.save()
    hidden = net._module[0](x).detach().clone()
    hidden[:, 1] = 7
    assert torch.equal(result, net._module[2](F.relu(hidden)))


def test_edit_through_a_view_flows_on(net, x):
    def program(remote):
        with net.trace(x, remote=remote):
            row = net[0].output[1]
            row.mul_(3)
            result = net.output.save()
        return result

    assert_same(program)


def test_edit_behind_the_back_of_torch_flows_on(net, x):
    def program(remote):
        with torch.no_grad():
            with net.trace(x, remote=remote):
                net[0].output.numpy()[0] = 1
                net[1].output.data[1] = 2
                result = net.output.save()
        return result

    assert_same(program)


def test_what_is_only_looked_at_with_numpy_stays(net, x):
    with torch.no_grad(), net.trace(x, remote="local"):
        total = float(net[0].output.numpy().sum()).save()
        result = net.output.save()
    assert total == pytest.approx(float(net._module[0](x).detach().sum()))
    assert torch.equal(result, net._module(x))


def test_tensor_met_again_is_the_same_object(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            hidden = gpt.transformer.h[0].output
            again = gpt.transformer.h[1].input
            is_same = int(again is hidden).save()
            hidden += 1
            logits = gpt.output.logits.save()
        return is_same, logits

    assert_same(program)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "gpt_oss"])
def test_tensor_that_the_block_has_let_go_of_is_shown_again(name):
    """Parts of these models give on what parts of theirs have given, beside another value."""
    model = LanguageModel(zoo.build(name))

    def program(remote):
        with model.trace([[5, 17, 33, 2]], remote=remote) as tracer:
            cache = tracer.cache().save()
        outputs = [step.output for path in sorted(cache.keys()) for step in cache[path].steps]
        return [output for output in outputs if isinstance(output, torch.Tensor | tuple)]

    assert_same(program)


class Aliases(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()

    def forward(self, value):
        whole = self.first(value * 1)
        flat = self.second(whole.view(-1))
        whole.add_(1)
        return self.third(whole), flat


@pytest.mark.parametrize("has_gradients", [False, True])
def test_tensors_that_share_memory_are_brought_up_to_date(has_gradients):
    model = NNsight(Aliases())
    given = torch.zeros(2, 3, requires_grad=has_gradients)

    def program(remote):
        with model.trace(given, remote=remote):
            whole = model.first.output
            flat = model.second.output
            flat[1] = 5
            last = model.third.output
            found = [whole.detach().clone(), flat.detach().clone(), last.detach().clone()].save()
        return found

    assert_same(program)
    with pytest.raises(InputError, match="share their memory"):
        with model.trace(given, remote="local"):
            whole = model.first.output
            flat = model.second.output
            flat[1] = 5
            whole[1] = 3
            model.third.output


def test_model_is_freed_without_the_collector():
    module = torch.nn.Linear(2, 2)
    model, reference = NNsight(module), weakref.ref(module)
    with model.trace(torch.ones(1, 2), remote="local"):
        result = model.output.detach().clone().save()
    with pytest.raises(ValueError, match="no"):
        with model.trace(torch.ones(1, 2), remote="local"):
            model.output
            raise ValueError("no")
    gc.collect()
    with model.trace(torch.ones(1, 2), remote="local"):
        result = model.output.detach().clone().save()
    gc.disable()
    try:
        del module, model
        assert reference() is None
    finally:
        gc.enable()
    assert result.shape == (1, 2)


def test_method_of_the_model_cannot_drive_it_from_a_runner(gpt, ids):
    with pytest.raises(NotImplementedError, match="fn='generate'.*stays with the model|fn='generate'.*a method"):
        gpt.trace(ids, remote="local", fn="generate")


def test_argument_is_replaced(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            args, kwargs = gpt.transformer.h[1].inputs
            gpt.transformer.h[1].inputs = ((args[0] * 2, *args[1:]), kwargs)
            gpt.transformer.h[2].input = gpt.transformer.h[2].input + 1
            logits = gpt.output.logits.save()
        return logits

    assert_same(program)


def test_object_of_the_model_comes_back_with_its_class(gpt, ids):
    with gpt.trace(ids, remote="local"):
        output = gpt.output.save()
    expected = gpt._module(ids)
    assert type(output) is type(expected)
    assert torch.equal(output.logits, expected.logits)


def test_item_put_into_an_object_flows_on(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            gpt.transformer.output.last_hidden_state = gpt.transformer.output.last_hidden_state * 0.5
            logits = gpt.lm_head.output.save()
        return logits

    assert_same(program)


def test_skipped_module_does_not_run(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            gpt.transformer.h[1].skip(gpt.transformer.h[0].output)
            logits = gpt.output.logits.save()
        return logits

    assert_same(program)


def test_modules_parameters_and_settings_are_the_models(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote):
            early = gpt.lm_head(gpt.transformer.ln_f(gpt.transformer.h[0].output)).save()
            weight = gpt.lm_head.weight[3].save()
            layers = gpt.config.n_layer.save()
            dtype = str(gpt.dtype).save()
        return early, weight, layers, dtype

    assert_same(program)


# --- Blocks


def test_block_on_one_line_and_with_other_items(net, x):
    # fmt: off
    with net.trace(x, remote="local"): first = net[0].output.save(); second = net.output.save()  # noqa: E701, E702
    # fmt: on
    with net.trace(x, remote="local") as tracer, torch.no_grad():
        third = (tracer.result * 2).save()
        is_enabled = torch.is_grad_enabled().save()
    with (
        net.trace(
            x,
            remote="local",
        )
    ):  # fmt: skip
        fourth = net.output.save()
    assert torch.equal(first, net._module[0](x))
    assert torch.equal(second * 2, third) and torch.equal(second, fourth)
    assert is_enabled is False


def test_only_what_was_saved_comes_back(net, x):
    kept = lost = None
    with net.trace(x, remote="local"):
        lost = net[0].output
        kept = (lost + 1).save()
    assert lost is None
    assert torch.equal(kept, net._module[0](x) + 1)


def test_list_of_tensors_and_numbers_comes_back(net, x):
    def program(remote):
        with net.trace(x, remote=remote):
            found = [net[index].output for index in range(3)].save()
            named = {"shape": tuple(found[0].shape), "mean": found[1].mean().item()}.save()
        return found, named

    assert_same(program)


def test_variables_of_the_caller_are_there(net, x):
    scale, table = torch.full((8,), 3.0), np.arange(8, dtype=np.float32)

    def program(remote):
        with net.trace(x, remote=remote):
            hidden = net[0].output * scale + torch.from_numpy(table)
            net[0].output = F.relu(hidden)
            result = net.output.save()
        return result

    assert_same(program)


FACTOR = 3.0


class Kind(enum.Enum):
    DOUBLE = 2


@dataclasses.dataclass
class Settings:
    kind: Kind
    bias: torch.Tensor

    def apply(self, hidden):
        return scaled(hidden) * self.kind.value + self.bias


def scaled(hidden, by=FACTOR):
    return twice(hidden, 1) * by


def twice(hidden, depth):
    return hidden * 2 if not depth else twice(hidden, depth - 1)


def test_functions_and_classes_of_the_users_files_travel(net, x):
    shift = 0.5

    def shifted(hidden, *, again=True):
        return shifted(hidden, again=False) if again else hidden + shift

    settings = Settings(Kind.DOUBLE, torch.ones(8))

    def program(remote):
        with net.trace(x, remote=remote):
            net[0].output = settings.apply(shifted(net[0].output))
            result = net.output.save()
            is_own = isinstance(settings, Settings).save()
        return result, is_own

    assert_same(program)


def fails(value):
    note = "here"
    raise OwnError(value, note)


def test_exception_from_a_helper_has_its_line_and_class(net, x):
    with pytest.raises(OwnError) as caught:
        with net.trace(x, remote="local"):
            fails(1)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.name, warnings_line(last.lineno)) == (__file__, "fails", "raise OwnError(value, note)")
    assert caught.value.args == (1, "here")


def test_function_without_source_says_what_to_do(net, x):
    double = eval("lambda value: value * 2")
    with pytest.raises(NNsightError, match=r"'double'.*`<lambda>`, whose source cannot be found.*put it in a file"):
        with net.trace(x, remote="local"):
            double(net.output)


def test_variable_deep_in_a_helper_is_named(net, x):
    handle = io.StringIO()

    def write(value):
        handle.write(str(value))

    with pytest.raises(NNsightError, match=r"'write': `handle`, which `write` uses.*StringIO"):
        with net.trace(x, remote="local"):
            write(net.output)


def test_unused_variables_do_not_travel(net, x):
    unsendable = (value for value in "abc")
    with net.trace(x, remote="local"):
        result = net.output.save()
    assert torch.equal(result, net._module(x))
    assert next(unsendable) == "a"


def test_variable_that_cannot_travel_is_named(net, x):
    handle = io.StringIO()
    with pytest.raises(NNsightError, match=r"'handle'.*StringIO"):
        with net.trace(x, remote="local"):
            handle.write(str(net.output))


def test_invokes_see_their_rows(net, x):
    def program(remote):
        with net.trace(remote=remote) as tracer:
            with tracer.invoke(x[:1]):
                first = net[0].output.save()
                net[1].output[:] = 1
                result = net.output.save()
            with tracer.invoke(x[1:]):
                second = net[0].output.save()
                other = net.output.save()
            with tracer.invoke():
                whole = net.output.save()
        return first, second, result, other, whole

    assert_same(program)


def test_prompts_of_different_length_are_joined(gpt, ids):
    def program(remote):
        with gpt.trace(remote=remote) as tracer:
            with tracer.invoke(ids[:1]):
                first = gpt.lm_head.output.save()
            with tracer.invoke(ids[1:, :3]):
                gpt.transformer.h[0].output[:] *= 2
                second = gpt.lm_head.output.save()
        return first, second

    assert_same(program)


def test_invokes_one_after_another(gpt, ids):
    def program(remote):
        with gpt.trace(remote=remote, batched=False) as tracer:
            with tracer.invoke(ids[:1]):
                first = gpt.lm_head.output.save()
            with tracer.invoke(ids[1:]):
                second = gpt.lm_head.output.save()
        return first, second

    assert_same(program)


def test_names_and_barriers_between_invokes(net, x):
    def program(remote):
        with net.trace(remote=remote) as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                hidden = net[0].output
                barrier()
                first = net.output.save()
            with tracer.invoke(x):
                barrier()
                net[0].output = hidden * 2
                second = net.output.save()
        return first, second

    assert_same(program)


def test_steps_of_a_generation(gpt, ids):
    def program(remote):
        with gpt.generate(ids, max_new_tokens=4, do_sample=False, remote=remote) as tracer:
            found = [].save()
            for step in tracer.iter[:]:
                if step == 2:
                    gpt.transformer.h[1].output[:] = 0
                found.append(gpt.lm_head.output[:, -1])
            result = tracer.result.save()
        return found, result

    assert_same(program)


def test_bounded_steps_next_and_all(gpt, ids):
    def program(remote):
        found = None
        with gpt.generate(ids, max_new_tokens=4, do_sample=False, remote=remote) as tracer:
            found = [].save()
            for _ in tracer.iter[1:4:2]:
                found.append(gpt.transformer.h[0].output)
        with gpt.generate(ids, max_new_tokens=3, do_sample=False, remote=remote) as tracer:
            second = gpt.lm_head.next().output.save()
        return found, second

    assert_same(program)


def test_stop_ends_run_and_block(gpt, ids):
    after = None
    with gpt.trace(ids, remote="local") as tracer:
        hidden = gpt.transformer.h[0].output.save()
        tracer.stop()
        after = 1
    assert after is None
    expected = []
    handle = gpt._module.transformer.h[0].register_forward_hook(lambda module, args, output: expected.append(output))
    gpt._module(ids)
    handle.remove()
    assert torch.equal(hidden, expected[0])


def test_cache_comes_back(gpt, ids):
    def program(remote):
        with gpt.trace(ids, remote=remote) as tracer:
            cache = tracer.cache(modules=[gpt.transformer.h[0], gpt.lm_head], include_inputs=True)
        return list(cache.keys()), cache["model.lm_head"].output, cache.model.transformer.h[0].input

    assert_same(program)


def test_session_runs_its_traces_there(net, x):
    def program(remote):
        with net.session(remote=remote):
            with net.trace(x):
                hidden = net[0].output
            with net.trace(x):
                net[0].output = hidden * 3
                result = net.output.save()
        return result

    assert_same(program)


def test_part_of_a_model_is_traced(gpt):
    def program(remote):
        with gpt.transformer.h[0].trace(torch.ones(1, 2, 32), remote=remote):
            hidden = gpt.transformer.h[0].mlp.output.save()
        return hidden

    assert_same(program)


def test_edits_of_the_model_take_part(net, x):
    with net.edit() as edited:
        edited[0].output[:] = 1

    with edited.trace(x, remote="local"):
        result = edited.output.save()
    assert torch.equal(result, net._module[2](F.relu(torch.ones(3, 8))))


def test_block_that_asks_for_nothing_runs(net, x):
    with net.trace(x, remote="local"):
        found = sum(range(5)).save()
    assert found == 10


def test_random_numbers_follow_from_the_callers_seed(net, x):
    def program():
        torch.manual_seed(5)
        with net.trace(x, remote="local"):
            drawn = torch.rand(3).save()
        return drawn, torch.rand(1)

    (first, after), (second, again) = program(), program()
    assert torch.equal(first, second)
    assert torch.equal(after, again)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # none was used up


# --- What is told


def test_prints_and_warnings_arrive(net, x):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with net.trace(x, remote="local"):
            print("shape", tuple(net[0].output.shape))
            warnings.warn("careful", FutureWarning, stacklevel=1)
    assert out.getvalue() == "shape (3, 8)\n"
    (warning,) = caught
    assert warning.category is FutureWarning and str(warning.message) == "careful"
    assert warning.filename == __file__
    assert warnings_line(warning.lineno) == 'warnings.warn("careful", FutureWarning, stacklevel=1)'


def warnings_line(number):
    with open(__file__, encoding="utf-8") as file:
        return file.read().splitlines()[number - 1].strip()


class OwnError(LookupError):
    def __init__(self, one, two):
        super().__init__(one, two)


def test_exception_arrives_with_class_chain_and_line(net, x):
    with pytest.raises(KeyError, match="missing") as caught:
        with net.trace(x, remote="local"):
            try:
                1 / 0
            except ZeroDivisionError as error:
                raise KeyError("missing") from error
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, warnings_line(last.lineno)) == (__file__, 'raise KeyError("missing") from error')


def test_model_can_be_traced_after_an_exception(net, x):
    with pytest.raises(ValueError, match="no"):
        with net.trace(x, remote="local"):
            net[0].output
            raise ValueError("no")
    with net.trace(x, remote="local"):
        result = net.output.save()
    assert torch.equal(result, net._module(x))


def test_error_in_the_model_is_raised_at_the_request_that_waited(net, x):
    with net.trace(x, remote="local"):
        try:
            net[2].input = torch.ones(3, 8, dtype=torch.float32)
            net[0].skip(torch.ones(3, 5))
            caught = "".save()
        except MissedProviderError:
            caught = "order".save()
    assert caught == "order"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with net.trace(torch.ones(2, 5), remote="local"):
            net[0].output


def test_location_already_passed_is_out_of_order(net, x):
    with net.trace(x, remote="local"):
        net[2].output
        try:
            net[0].output
        except OutOfOrderError as error:
            told = str(error).save()
    assert "model.0.output" in told


def test_shape_or_dtype_that_does_not_fit_is_an_error(net, x):
    with pytest.raises(InputError, match=r"model\.0\.output.*\(3, 8\).*\(2, 8\)"):
        with net.trace(x, remote="local"):
            net[0].output = net[0].output[:2]
            net.output
    with pytest.raises(InputError, match="float64"):
        with net.trace(x, remote="local"):
            net[0].output = net[0].output.double()
            net.output


def test_weights_cannot_be_edited(net, x):
    before = net._module[0].weight.detach().clone()
    with pytest.raises(InputError, match="weights"):
        with net.trace(x, remote="local"):
            with torch.no_grad():
                net[0].weight[:] = 0
            net[0].output
    with pytest.raises(NotImplementedError, match="cannot change the model"):
        with net.trace(x, remote="local"):
            net[0].weight = torch.zeros(8, 4)
    assert torch.equal(net._module[0].weight, before)


def test_index_out_of_range_is_refused_before_the_lookup(gpt, ids):
    with pytest.raises(InputError, match="128 entries"):
        with gpt.trace(ids, remote="local"):
            gpt.transformer.wte.input = gpt.transformer.wte.input + 1000
            gpt.output
    with pytest.raises(InputError, match="128 entries"):
        with gpt.trace(ids, remote="local"):
            gpt.transformer.wte(torch.tensor([-5]))
    with pytest.raises(IndexError, match="128 entries"):
        with gpt.transformer.trace(torch.tensor([[3, 128]]), remote="local"):
            gpt.transformer.output


def test_bag_of_indices_is_checked():
    model = NNsight(torch.nn.Sequential(torch.nn.EmbeddingBag(4, 2)))
    with model.trace(torch.tensor([[0, 1], [2, 3]]), remote="local"):
        result = model.output.save()
    assert torch.equal(result, model._module(torch.tensor([[0, 1], [2, 3]])))
    with pytest.raises(IndexError, match="4 entries"):
        with model.trace(torch.tensor([[0, 1], [2, 4]]), remote="local"):
            model.output


@pytest.mark.parametrize("remote", [False, "local"])
def test_argument_is_added(gpt, ids, remote):
    with gpt.trace(ids, remote=remote):
        args, kwargs = gpt.transformer.inputs
        gpt.transformer.inputs = args, {**kwargs, "output_hidden_states": True}
        hidden = save(gpt.transformer.output.hidden_states[1])
    assert torch.equal(hidden, gpt._module(ids, output_hidden_states=True).hidden_states[1])


def test_unknown_place_is_an_error(net, x):
    with pytest.raises(InputError, match="mars"):
        net.trace(x, remote="mars")


def test_model_is_shown_as_it_is(gpt, ids):
    with gpt.trace(ids, remote="local"):
        shown = save([str(gpt), str(gpt.transformer.h[0].mlp), str(gpt.lm_head._module)])
    assert shown == [str(gpt), str(gpt.transformer.h[0].mlp), str(gpt.lm_head._module)]
