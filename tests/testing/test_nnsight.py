"""`NNsight` keeps to its own conformance suite, on models of several shapes."""

from __future__ import annotations

from torch import nn

from nnsight.testing import ModelConformance, given
from nnsight.testing.tiny import WIDTH, Net, Structured, rows, seeded


class TestNet(ModelConformance):
    def make_module(self):
        return seeded(Net).eval()

    def inputs(self):
        return [rows(0, 2), rows(1, 3)]


class TestContainers(ModelConformance):
    """Tuples, dicts and dataclasses pass between its parts, and its inputs are given by keyword."""

    def make_module(self):
        return seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Structured())).eval()

    def inputs(self):
        return [given(input=rows(0, 2)), given(input=rows(1, 1))]
