"""The programs of every transport, over one that makes a payload of each block and plays it, and brings back results.

All in one process, on the wrapper itself: what is compared is what is in the bytes, and nothing else reaches the block.
"""

from __future__ import annotations

import contextlib
import linecache
from functools import partial

import pytest
from torch import nn

from nnsight import Capture, Mediator, NNsight, payload
from nnsight.testing import Transport, TransportConformance, dropped


class Played:
    """A place for blocks: what arrives is bytes, and what comes back is bytes."""

    def open_block(self, envoy, method, args, kwargs, function, batched):
        return Playing(envoy, method, args, kwargs, batched)  # `function` is what the other end has, too


class Playing(Capture):
    what = "trace"

    def __init__(self, envoy, method, args, kwargs, batched):
        self._envoy, self._method, self._arguments, self._batched = envoy, method, (args, kwargs), batched

    def _captured(self, block):
        own, scope, root = {}, block.scope, self._envoy.root
        options = {"batched": self._batched}
        sent = b"".join(payload.write_run(self._envoy, self._method, self._arguments, scope, options, own))
        try:
            answer = play(sent, root._module, type(root))
        finally:
            linecache.clearcache()  # what is sent is told to it under its own name, so that lines are those of the file
        scope.give(payload.Results(answer, root, own=own).values)
        scope.close()


def play(data, module, wrapper):
    """What the other end does: it has the bytes, and the module in a wrapper of its own."""
    root = wrapper(module)
    run = payload.Run(data)
    run.check(root)
    modules = {path: envoy._module for path, envoy in root.named_modules()}
    sent = run.open(partial(payload.envoy_at, root), modules.__getitem__)
    block, *edits = sent.blocks
    for path, edit in zip(run.edits, edits, strict=True):
        payload.envoy_at(root, path).edit(inplace=True).take(edit.scope())
    args, kwargs = sent.values["arguments"]
    if run.method != "session":
        kwargs = {**kwargs, "batched": run.options["batched"]}
    method = getattr(payload.envoy_at(root, run.path), run.method)
    with noting() as saved, method(*args, **kwargs) as entered:
        block.run(entered)
    values = {name: value for name, value in block.bound().items() if any(value is kept for kept in saved)}
    return b"".join(payload.write_results(values, root, sent=sent))


@contextlib.contextmanager
def noting():
    """Yield a list of what is saved meanwhile."""
    saved = []
    with NNsight(nn.Identity()).session() as session:
        kinds = Mediator, type(session._block)
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "save", lambda block, value: saved.append(value))
        yield saved


class TestPlayed(TransportConformance):
    transport = Transport("played", {"backend": Played()})

    test_list_of_the_caller_is_filled = dropped("this one brings back what was saved, and nothing else")
    test_function_of_the_caller_counts_in_a_variable_of_the_caller = dropped("it brings back what was saved")
    test_module_is_attached = dropped("a copy of the module arrives")
    test_function_drives_the_model = dropped("the function stays with the caller")
