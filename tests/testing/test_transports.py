"""Every way for a block to get to where it runs keeps to one list of programs.

What `remote="local"` does not do is in docs/isolation.md.
"""

from __future__ import annotations

from nnsight import InputError
from nnsight.testing import CAPTURED, INLINE, Transport, TransportConformance, dropped


class TestInline(TransportConformance):
    transport = INLINE


class TestCaptured(TransportConformance):
    transport = CAPTURED


KEEPS = "a value that is written in a runner keeps its structure, shape and dtype"
MODEL = "a block in a runner cannot change the model"


class TestLocal(TransportConformance):
    transport = Transport("local", {"remote": "local"})

    test_value_of_another_shape_and_dtype_flows_on = dropped(KEEPS, raises=InputError)
    test_weights_are_changed = dropped(MODEL, raises=InputError)
    test_module_is_attached = dropped(MODEL, raises=NotImplementedError)
    test_weights_get_gradients = dropped("weights get no gradients from a runner: they are asked for by autograd.grad")
