"""Conformance of transports: programs whose values come back, of many kinds and belonging together."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any, NamedTuple

import torch

from nnsight.testing._model import same
from nnsight.testing._transport import TransportSuite
from nnsight.tracing.saving import save


class _Mode(enum.Enum):
    DOUBLED = "doubled"


class _Pair(NamedTuple):
    value: torch.Tensor
    norm: float


@dataclasses.dataclass
class _Found:
    layer: int
    value: torch.Tensor
    mode: _Mode
    notes: list[str]


class Saved(TransportSuite):
    """What was saved, in the caller's frame."""

    def test_saved_values_have_their_types(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad():
            with self.transport.around(model.trace) as run, run(x) as _:
                hidden = model.h[0].output * 2
                pair = save(_Pair(hidden, float(hidden.norm())))
                found = save(_Found(0, hidden, _Mode.DOUBLED, ["a"]))
                best = save(hidden.topk(2))
                ordered = save(collections.OrderedDict(b=[hidden], a={1, 2}))
                size = save(hidden.shape)
            bare = model._module
            expected = bare.h[0](bare.emb(x)) * 2
        assert type(pair) is _Pair and pair.norm == float(expected.norm())
        same(pair.value, expected, "a value in a named tuple")
        assert type(found) is _Found and (found.layer, found.mode, found.notes) == (0, _Mode.DOUBLED, ["a"])
        same(found.value, expected, "a value in a dataclass")
        assert type(best) is torch.return_types.topk
        same(tuple(best), tuple(expected.topk(2)), "what topk returns")
        assert type(ordered) is collections.OrderedDict and list(ordered) == ["b", "a"] and ordered["a"] == {1, 2}
        assert type(size) is torch.Size and size == expected.shape

    def test_saved_values_share_what_they_shared(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad(), self.transport.around(model.trace) as run, run(x) as _:
            hidden = save(model.h[0].output + 1)
            row = save(hidden[1])
            both: list[Any] = save([hidden, hidden])
            again = save({"both": both})
        assert both[0] is hidden and both[1] is hidden and again["both"] is both
        row.zero_()
        assert bool(hidden[1].eq(0).all()) and not bool(hidden[0].eq(0).all())

    def test_computed_value_can_be_edited_afterwards(self) -> None:
        model, x = self.net(), self.x()
        with self.transport.around(model.trace) as run, run(x) as _:
            doubled = save(model.h[0].output * 2)
        assert doubled.requires_grad and not doubled.is_leaf
        doubled += 1
        bare = model._module
        same(doubled.detach(), (bare.h[0](bare.emb(x)) * 2 + 1).detach(), "a value that was edited after the run")

    def test_value_is_saved_between_the_traces_of_a_session(self) -> None:
        model, x = self.net(), self.x()
        with torch.no_grad(), model.session(**self.transport.options):
            with model.trace(x):
                first = model.h[0].output
            with model.trace(x):
                second = model.h[1].output
            difference = save(second - first)
        bare = model._module
        with torch.no_grad():
            hidden = bare.h[0](bare.emb(x))
            same(difference, bare.h[1](hidden) - hidden, "a value between two traces")
