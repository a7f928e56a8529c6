"""An inline block runs where it stands: wherever its code came from, and with every statement Python has."""

import asyncio
import contextlib
import textwrap

import pytest
import torch
from modules import Net, assert_idle, assert_usable, plain, python, rows, run, same, seeded

from nnsight import NNsight


@pytest.fixture
def net():
    return seeded(Net)


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    return rows()


@pytest.fixture
def expected(net, x):
    """The output of every module by path, read by torch's own hooks."""
    return {path: calls[0] for path, calls in plain(net, x).outputs.items()}


# -- where the code comes from


PROGRAM = """\
import torch
from modules import Net, plain, rows, seeded
from nnsight import NNsight

net, x = seeded(Net), rows()
model = NNsight(net)
with model.trace(x) as tracer:
    hidden = model.h[1].output
    model.h[1].output = hidden * 2
    result = tracer.result

expected = plain(net, x, edit=lambda path, output: output * 2 if path == "h.1" else None)
print(torch.equal(hidden * 2, expected.outputs["h.1"][0]), torch.equal(result, expected.result))
"""


def test_python_dash_c():
    assert run(PROGRAM) == "True True"


def test_script_on_stdin():
    done = python("-W", "error", "-", stdin=PROGRAM)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("True True", "", 0)


def test_interactive_session():
    done = python("-i", "-q", stdin=PROGRAM)
    assert done.stdout.strip() == "True True", done.stderr
    assert not done.stderr.replace(">>> ", "").replace("... ", "").strip()  # prompts, no traceback


def test_error_in_an_interactive_session_leaves_the_model_usable():
    failing = "with model.trace(x):\n    late = model.h[0].output\n    early = model.emb.output\n\n"
    done = python("-i", "-q", stdin=PROGRAM.replace("with model", failing + "with model", 1))
    assert done.stdout.strip() == "True True", done.stderr
    assert "OutOfOrderError" in done.stderr


def test_string_that_is_executed(model, x, expected):
    scope = {"model": model, "x": x}
    exec("with model.trace(x):\n    a = model.emb.output\n    b = model.h[2].output", scope)
    assert torch.equal(scope["a"], expected["emb"])
    assert torch.equal(scope["b"], expected["h.2"])


def test_string_executed_with_locals_of_its_own(model, x, expected):
    names = {}
    exec("with model.trace(x):\n    a = model.emb.output", {"model": model, "x": x}, names)
    assert torch.equal(names["a"], expected["emb"])


def test_function_made_from_a_string(model, x, expected):
    scope = {}
    exec("def read(model, x):\n    with model.trace(x): return model.h[0].output", scope)
    assert torch.equal(scope["read"](model, x), expected["h.0"])


def test_block_inside_a_string_that_a_block_executes(model, x, expected):
    scope = {"model": model}
    with model.trace(x):
        exec("a = model.emb.output", scope)
        b = eval("model.h[0].output")
    assert torch.equal(scope["a"], expected["emb"])
    assert torch.equal(b, expected["h.0"])


def test_body_on_the_line_of_its_with(model, x, expected):
    with model.trace(x): a = model.emb.output; b = model.h[0].output  # fmt: skip # noqa: E701, E702
    assert torch.equal(a, expected["emb"])
    assert torch.equal(b, expected["h.0"])


# -- leaving the block


def test_return_inside_the_block(net, model, x, expected):
    def read(path):
        with model.trace(x):
            return model.get(path).output
        return None

    assert torch.equal(read("h.1"), expected["h.1"])
    assert_usable(model, net, x)


def test_return_before_anything_is_read_runs_the_model(net, model, x):
    called = []
    net.lm_head.register_forward_hook(lambda *_: called.append(1))

    def leave():
        with model.trace(x):
            return "left"

    assert leave() == "left"
    assert called == [1]


def test_break_and_continue_inside_the_block(net, model, x, expected):
    seen = []
    for path in ("emb", "h.0", "h.1", "h.2"):
        with model.trace(x):
            if path == "h.0":
                continue
            seen.append((path, model.get(path).output))
            if path == "h.1":
                break
    assert [path for path, _ in seen] == ["emb", "h.1"]
    for path, value in seen:
        assert torch.equal(value, expected[path])
    assert_usable(model, net, x)


def test_loop_inside_the_block(model, x, expected):
    seen = []
    with model.trace(x):
        for block in model.h:
            if block is model.h[1]:
                continue
            seen.append(block.output)
            if block is model.h[2]:
                break
        else:
            seen.append("not left")
    assert same(seen, [expected["h.0"], expected["h.2"]])


def test_yield_inside_the_block(net, model, x, expected):
    def read():
        with model.trace(x):
            for path in ("emb", "h.0", "lm_head"):
                sent = yield model.get(path).output
                assert sent is None

    seen = list(read())
    assert same(seen, [expected["emb"], expected["h.0"], expected["lm_head"]])
    assert_usable(model, net, x)


def test_two_generators_take_turns(model, x):
    def read(given):
        with model.trace(given):
            yield model.emb.output
            yield model.h[1].output

    other = rows(seed=1)
    turns = list(zip(read(x), read(other), strict=True))
    for path, pair in zip(("emb", "h.1"), turns, strict=True):
        for value, given in zip(pair, (x, other), strict=True):
            assert torch.equal(value, plain(model._module, given).outputs[path][0])


def test_yield_from_inside_the_block(model, x, expected):
    def parts():
        yield model.emb.output
        yield model.h[0].output

    def read():
        with model.trace(x):
            yield from parts()

    assert same(list(read()), [expected["emb"], expected["h.0"]])


def test_await_inside_the_block(net, model, x, expected):
    async def read():
        with model.trace(x):
            first = model.emb.output
            await asyncio.sleep(0)
            second = model.h[2].output
        return first, second

    async def both():
        return await asyncio.gather(read(), read())

    for first, second in asyncio.run(both()):
        assert torch.equal(first, expected["emb"])
        assert torch.equal(second, expected["h.2"])
    assert_usable(model, net, x)


def test_async_comprehension_and_async_with_inside_the_block(model, x, expected):
    async def paths():
        for path in ("emb", "h.0"):
            await asyncio.sleep(0)
            yield path

    @contextlib.asynccontextmanager
    async def around():
        await asyncio.sleep(0)
        yield

    async def read():
        with model.trace(x):
            async with around():
                return [model.get(path).output async for path in paths()]

    assert same(asyncio.run(read()), [expected["emb"], expected["h.0"]])


def test_exception_handled_inside_the_block(model, x, expected):
    with model.trace(x):
        try:
            raise KeyError("mine")
        except KeyError as error:
            caught = error.args
        finally:
            a = model.emb.output
    assert caught == ("mine",)
    assert torch.equal(a, expected["emb"])


def test_exception_leaves_the_block_as_it_was_raised(net, model, x):
    raised = KeyError("mine")

    def fail():
        with model.trace(x):
            model.h[0].output
            raise raised

    with pytest.raises(KeyError) as caught:
        fail()
    assert caught.value is raised
    assert raised.__context__ is None
    assert raised.__cause__ is None
    assert_usable(model, net, x)


# -- names


class Base:
    def __init__(self, model, x):
        self.model, self.x = model, x

    def read(self):
        return self.model.emb.output


class Derived(Base):
    __path = "h.1"

    def read(self):
        with self.model.trace(self.x):
            first = super().read()
            self.__second = self.model.get(self.__path).output
            name = __class__.__name__
        return first, self.__second, name


def test_super_and_private_names(model, x, expected):
    reader = Derived(model, x)
    first, second, name = reader.read()
    assert torch.equal(first, expected["emb"])
    assert torch.equal(second, expected["h.1"])
    assert name == "Derived"
    assert reader._Derived__second is second


def test_block_in_a_class_body(model, x, expected):
    class Values:
        with model.trace(x):
            a = model.emb.output
        b = a

    assert torch.equal(Values.a, expected["emb"])
    assert Values.b is Values.a


def test_nonlocal_variable(model, x, expected):
    count, value = 0, None

    def read():
        nonlocal count, value
        with model.trace(x):
            count += 1
            value = model.h[0].output

    read()
    read()
    assert count == 2
    assert torch.equal(value, expected["h.0"])


def test_global_variable(model, x, expected):
    def read():
        global found
        with model.trace(x):
            found = model.h[0].output

    read()
    assert torch.equal(globals().pop("found"), expected["h.0"])


def test_walrus_comprehensions_and_lambdas(model, x, expected):
    with model.trace(x):
        if (a := model.emb.output) is not None:
            b = [last := block.output for block in model.h]
        c = {name: read() for name, read in {"lm_head": lambda: model.lm_head.output}.items()}
    assert torch.equal(a, expected["emb"])
    assert same(b, [expected[f"h.{i}"] for i in range(3)])
    assert last is b[-1]
    assert same(c, {"lm_head": expected["lm_head"]})


def test_functions_and_generators_read_for_the_block(model, x, expected):
    def helper(envoy):
        return envoy.output

    def stream():
        for block in model.h:
            yield helper(block)

    with model.trace(x):
        a = helper(model.emb)
        b = list(stream())

        def defined_inside(scale=2):
            return model.lm_head.output * scale

        c = defined_inside()
    assert torch.equal(a, expected["emb"])
    assert same(b, [expected[f"h.{i}"] for i in range(3)])
    assert torch.equal(c, expected["lm_head"] * 2)


def test_unpacking_deleting_and_augmented_assignment(model, x, expected):
    total = torch.zeros(())
    with model.trace(x):
        first, *rest = (block.output for block in model.h)
        total += first.sum()
        del first
    assert same(rest, [expected["h.1"], expected["h.2"]])
    assert torch.equal(total, expected["h.0"].sum())
    assert "first" not in locals()


def test_match_statement(model, x, expected):
    with model.trace(x):
        match {"path": "h.1"}:
            case {"path": str(path)}:
                a = model.get(path).output
    assert torch.equal(a, expected["h.1"])


# -- other context managers


def test_trace_is_entered_by_an_exit_stack(net, model, x, expected):
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(model.trace(x))
        a = model.emb.output
        result = tracer.result
    assert torch.equal(a, expected["emb"])
    assert torch.equal(result, expected[""])
    assert_usable(model, net, x)


def test_block_around_the_body_of_a_context_manager(net, model, x, expected):
    @contextlib.contextmanager
    def traced(*args):
        with model.trace(*args) as tracer:
            yield tracer

    with traced(x) as tracer:
        a = model.h[0].output
        result = tracer.result
    assert torch.equal(a, expected["h.0"])
    assert torch.equal(result, expected[""])
    assert_usable(model, net, x)


def test_context_manager_that_works_before_and_after_the_callers_body(net, model, x):
    @contextlib.contextmanager
    def doubled(path):
        with model.trace(x) as tracer:
            model.get(path).output *= 2
            yield tracer

    with doubled("h.0") as tracer:
        result = tracer.result
    edit = lambda path, output: output * 2 if path == "h.0" else None
    assert torch.equal(result, plain(net, x, edit=edit).result)


def test_context_managers_in_one_header(net, model, x):
    log = []

    @contextlib.contextmanager
    def noted(name):
        log.append(f"enter {name}")
        yield name
        log.append(f"leave {name}")

    with noted("before"), model.trace(x) as tracer, noted("after") as after, torch.no_grad():
        log.append(after)
        result = tracer.result
        scaled = model._module.lm_head.weight * 2
    assert log == ["enter before", "enter after", "after", "leave after", "leave before"]
    assert torch.equal(result, net(x))
    assert not scaled.requires_grad
    assert result.requires_grad  # the model side keeps what held when the trace was entered


def test_error_while_entering_a_later_item_of_the_header(net, model, x):
    @contextlib.contextmanager
    def broken():
        raise OSError("broken")
        yield

    with pytest.raises(OSError, match="broken"):
        with model.trace(x), broken():
            pytest.fail("the body must not run")
    assert_usable(model, net, x)


def test_later_item_of_the_header_swallows_an_error(net, model, x):
    with model.trace(x) as tracer, contextlib.suppress(KeyError):
        a = model.emb.output
        raise KeyError
    assert torch.equal(a, plain(net, x).outputs["emb"][0])
    with pytest.raises(RuntimeError, match="not open"):
        tracer.result


def test_tracer_is_made_before_its_with(model, x, expected):
    tracer = model.trace(x)
    with tracer:
        a = model.emb.output
    assert torch.equal(a, expected["emb"])
    with pytest.raises(RuntimeError, match="run"):
        with tracer:
            pytest.fail("a tracer is one run")


def test_tracer_that_is_never_entered_changes_nothing(net, model, x):
    model.trace(x)
    assert_idle(net)
    assert_usable(model, net, x)


def test_tracer_bound_to_an_attribute_and_an_item(model, x, expected):
    class Holder:
        pass

    holder, table = Holder(), {}
    with model.trace(x) as holder.tracer:
        a = holder.tracer.result
    with model.trace(x) as table["tracer"]:
        b = table["tracer"].result
    assert torch.equal(a, expected[""])
    assert torch.equal(b, expected[""])


# -- a debugger


DEBUGGED = """\
import torch
from modules import Net, plain, rows, seeded
from nnsight import NNsight

net, x = seeded(Net), rows()
model = NNsight(net)
expected = plain(net, x).outputs
with model.trace(x) as tracer:
    a = model.emb.output
    breakpoint()
    b = model.h[2].output
    result = tracer.result
print("equal", torch.equal(b, expected["h.2"][0]), torch.equal(result, expected[""][0]))
"""


def test_breakpoint_inside_the_block(tmp_path):
    script = tmp_path / "debugged.py"
    script.write_text(DEBUGGED)
    commands = """\
        p torch.equal(a, expected["emb"][0])
        p torch.equal(model.h[0].output, expected["h.0"][0])
        next
        next
        p torch.equal(b, expected["h.2"][0])
        where
        continue
        """
    done = python(str(script), stdin=textwrap.dedent(commands))
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("(Pdb) ") for line in done.stdout.splitlines()]
    assert said.count("True") == 3, done.stdout
    assert said[-1] == "equal True True"
    assert any("debugged.py(12)" in line for line in said)


def test_program_run_under_pdb_steps_through_the_block(tmp_path):
    script = tmp_path / "debugged.py"
    script.write_text(DEBUGGED.replace("    breakpoint()\n", ""))
    done = python("-m", "pdb", str(script), stdin="break 10\ncontinue\nnext\nnext\np 6 * 7\ncontinue\nquit\n")
    assert "equal True True" in done.stdout, done.stdout + done.stderr
    assert "(Pdb) 42" in done.stdout
