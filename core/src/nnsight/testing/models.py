"""The conformance suite for model plugins.

A plugin's own tests subclass it and say how its model is made; every test compares with the bare module and torch's own
hooks:

    class TestPixels(ModelConformance):
        def make_module(self): ...
        def make_model(self): ...
        def inputs(self): ...
"""

from __future__ import annotations

from nnsight.testing._features import Features
from nnsight.testing._idle import Idle
from nnsight.testing._joining import Joining
from nnsight.testing._reading import Reading
from nnsight.testing._running import Running
from nnsight.testing._writing import Writing


class ModelConformance(Reading, Writing, Running, Features, Joining, Idle):
    """What every model class must keep to. `ModelSuite` says what a subclass may define."""
