"""Raise torch errors at random depths on both sides of a greenlet: `python guard_fuzz.py SEED [guarded]`.

Without the guard the process dies of SIGSEGV for nearly every seed; a pass prints ok.
"""

import functools
import json
import random
import sys

import torch
from greenlet import getcurrent, greenlet

RANDOM = random.Random(int(sys.argv[1]))
if sys.argv[2:] == ["guarded"]:
    from nnsight.kernel import guard

    assert guard.install(), guard.status()


class Through:
    """Calls a function from C code that looks up an attribute or an item."""

    def __init__(self, function):
        self.function = function

    @property
    def prop(self):
        return self.function()

    def __getattr__(self, name):
        return self.function()

    def __getitem__(self, index):
        return self.function()


def through(depth, function):
    """Call a function beneath a number of C frames."""
    if depth == 0:
        return function()

    def deeper(*_):
        return through(depth - 1, function)

    kind = RANDOM.randrange(6)
    if kind == 0:
        return Through(deeper).prop
    if kind == 1:
        return Through(deeper).missing
    if kind == 2:
        return Through(deeper)[0]
    if kind == 3:
        return next(map(deeper, [0]))
    if kind == 4:
        return sorted([0], key=lambda _: (deeper(), 0)[1])
    return functools.reduce(deeper, [0, 0])


def error():
    try:
        torch.ones(2, 3) @ torch.ones(2, 3)
    except RuntimeError:
        return
    sys.exit("torch raised nothing")


def scribble():
    """Leave bytes on the stack below the greenlet."""
    for _ in range(RANDOM.randrange(3)):
        through(RANDOM.randrange(25), lambda: torch.randn(8, 8).sum().item())
    if RANDOM.random() < 0.5:
        through(RANDOM.randrange(25), error)
    if RANDOM.random() < 0.5:
        json.dumps(sorted(RANDOM.random() for _ in range(1000)))


MAIN = getcurrent()


def model():
    for i in range(6):
        through(RANDOM.randrange(12), functools.partial(MAIN.switch, i))
        through(RANDOM.randrange(12), error)


for _ in range(60):
    carried = greenlet(model)
    through(RANDOM.randrange(20), carried.switch)
    for _ in range(7):
        scribble()
        if carried.dead:
            break
        through(RANDOM.randrange(20), carried.switch)
print("ok")
