"""Blocks at random: captured, they bind and do what Python does with the same statements where they are written."""

import importlib.util
import random
import re
import sys

import pytest
import torch
from torch import nn

from nnsight import NNsight

NAMES = ["a", "b", "c", "d", "e"]
WRONG = (NameError, TypeError, AttributeError, ValueError)


class Statements:
    """Writes statements about a few names, in nested functions, classes, comprehensions, loops and handlers."""

    def __init__(self, seed, is_alone):
        self.choose, self.is_alone = random.Random(seed), is_alone
        self.functions = 0

    def name(self):
        return self.choose.choice(NAMES)

    def expression(self, depth=0):
        if depth > 2:
            return self.choose.choice([str(self.choose.randrange(10)), self.name()])
        one, other, name = self.expression(depth + 1), self.expression(depth + 1), self.name()
        binding = [f"({name} := {one})"] if not depth else []  # Python allows few places
        return self.choose.choice(
            [
                *binding,
                str(self.choose.randrange(10)),
                name,
                self.name(),
                f"({one} + {other}) % 50",
                f"sum([{one} for {name} in range({other} % 3)])",
                f"sum({one} for {name} in range(2) if {other})",
                f"len({{{name}: {one} for {name} in range({name} % 4)}})",
                f"(lambda {name}={one}: {other})()",
                f"(lambda: ({name} := {one}) + {name})()" if not depth else f"(lambda: {one})()",
                f"({one} if {other} else {name})",
            ]
        )

    def block(self, depth, is_inside=False, is_loop=False):
        """Return one to three statements as indented lines."""
        lines = []
        for _ in range(self.choose.randrange(1, 4)):
            lines += self.statement(depth, is_inside, is_loop)
        return ["    " + line for line in lines]

    def statement(self, depth, is_inside, is_loop):
        name, other, value = self.name(), self.name(), self.expression()
        kind = self.choose.randrange((16 if self.is_alone else 14) if depth < 3 else 5)
        if kind < 3:
            return [f"{name} {'+' * (kind == 2)}= {value}"]
        if kind == 3:
            return [f"{name}, {other} = {value}, {self.expression()}"]
        if kind == 4:
            return [f"seen.append({value})"]
        inner = self.block(depth + 1, is_inside, is_loop)
        if kind == 5:
            return [f"if {value}:", *inner, "else:", *self.block(depth + 1, is_inside, is_loop)]
        if kind == 6:
            return [f"for {name} in range(({value}) % 4):", *self.block(depth + 1, is_inside, True)]
        if kind == 7:
            return [f"while {name} and len(seen) < 5:", "    seen.append(0)", *self.block(depth + 1, is_inside, True)]
        if kind in (8, 9):
            return [*self.function(depth), f"{name} = f{self.functions}()"]
        if kind == 10:
            return ["try:", *inner, "except Exception as error:", f"    {name} = len(str(error)[:1])", "finally:",
                    *self.block(depth + 1, is_inside, is_loop)]  # fmt: skip
        if kind == 11:
            body = [f"    {name} = {value}", f"    def get(self, {self.name()}={name}): return {self.expression()}"]
            return ["class Kept:", *body, f"{other} = Kept().get()"]
        if kind == 12:
            return [f"with nullcontext({value}) as {name}:", *inner]
        if kind == 13:
            return [f"match {value}:", f"    case int() as {name}:", f"        {other} = {name}"]
        if kind == 14 and sys.version_info < (3, 12):  # from then on nobody else can delete a function's variable
            return [f"del {name}", f"{name} = {self.choose.randrange(3)}"]
        return [self.choose.choice(["break", "continue"])] if is_loop else ["pass" if is_inside else "_ = model.output"]

    def function(self, depth):
        number = self.functions = self.functions + 1
        shared = self.choose.sample(NAMES, self.choose.randrange(3))
        own = [name for name in self.choose.sample(NAMES, self.choose.randrange(2)) if name not in shared]
        arguments = ", ".join(f"{name}={self.expression(1)}" for name in own)
        head = [f"    nonlocal {', '.join(shared)}"] if shared else []
        begun = [name for name in NAMES if name not in (*shared, *own) and self.choose.random() < 0.6]
        head += [f"    {name} = {self.choose.randrange(5)}" for name in begun]
        lines = [*head, *self.block(depth + 1, True), f"    return {self.expression()}"]
        self.functions = number
        return [f"def f{number}({arguments}):", *lines]


def program(seed, count=1):
    """Return two functions that differ in how their blocks are opened only."""
    write = Statements(seed, is_alone=count == 1)
    blocks = [[line for _ in range(4 - count) for line in write.block(0)] for _ in range(count)]
    helper = ["    def helper(): return a, b"] if write.choose.random() < 0.3 else []
    source = ["from contextlib import nullcontext"]
    for name, opened, header in (
        ("plain", "model.trace(x)", "if 1"),
        ("captured", "model.trace()", "with tracer.invoke(x)"),
    ):
        source += [f"def {name}(model, x, seen):", *(f"    {one} = {i}" for i, one in enumerate(NAMES)), *helper]
        source += [f"    with {opened} as tracer:"]
        for lines in blocks:
            source += [f"        {header}:", *("        " + line for line in lines)]
        source += ["    return {name: value for name, value in locals().items() if name in 'abcde'}"]
    return "\n".join(source) + "\n"


def outcome(function, model):
    """Return what a function returns and has noted, without addresses; or the kind of what it raises."""
    seen = []
    try:
        names = function(model, torch.ones(1, 2), seen)
    except WRONG as error:
        return NameError if isinstance(error, NameError) else type(error)
    return re.sub("0x[0-9a-f]+", "", repr((names, seen)).replace(function.__name__, ""))


def compare(seeds, count, folder):
    """Run programs both ways; return how many of them came to their end."""
    model, good = NNsight(nn.Linear(2, 2)), 0
    for seed in seeds:
        source = program(seed, count)
        try:
            compile(source, "program", "exec")
        except SyntaxError:
            continue  # such as a name that is an argument and nonlocal
        path = folder / f"program_{seed}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        plain, captured = outcome(module.plain, model), outcome(module.captured, model)
        if count == 1 or isinstance(plain, str):
            assert captured == plain, source
        good += isinstance(plain, str)
    return good


@pytest.mark.parametrize("chunk", range(5))
def test_a_captured_block_does_what_the_same_statements_do_in_their_frame(chunk, tmp_path):
    assert compare(range(chunk * 30, chunk * 30 + 30), 1, tmp_path) > 5


@pytest.mark.parametrize("chunk", range(5))
def test_blocks_that_ask_for_nothing_do_what_their_statements_do_one_after_another(chunk, tmp_path):
    assert compare(range(chunk * 30, chunk * 30 + 30), 3, tmp_path) > 5
