"""Programs of 0.6 and 0.7 that scan a language model: it never loads weights, and code of helpers works in it."""

from __future__ import annotations

import pytest
import torch

import nnsight
from nnsight import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"


def test_scan_never_loads_weights(lazy):
    with lazy.scan(PROMPT):
        dim = nnsight.save(lazy.transformer.h[0].output.shape[-1])
        logits = nnsight.save(lazy.output.logits.shape)
    assert dim == 32
    assert logits == (1, 10, 50257)
    assert not lazy.dispatched
    assert all(parameter.is_meta for parameter in lazy.parameters())


def test_scan_on_a_dict_and_on_keywords(lazy, tokenizer):
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    for given in (lambda: lazy.scan({"input_ids": ids}), lambda: lazy.scan(input_ids=ids, use_cache=False)):
        with given() as tracer:
            shape = nnsight.save(lazy.transformer.h[3].output.shape)
            tracer.stop()
        assert shape == (1, 10, 32)
    assert not lazy.dispatched


def test_subclass_checks_its_layers_when_it_is_made(gpt2_folder):
    class Checked(LanguageModel):
        def __init__(self, name):
            super().__init__(name, rename={"transformer": "model", "h": "layers"})
            self.shapes = self._check()

        def _check(self):
            found = {}
            with self.scan("a") as tracer:
                for index in range(len(self.model.layers)):
                    found[index] = self._shape_of(index)
                tracer.stop()
            return found

        def _shape_of(self, index):
            output = self.model.layers[index].output
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[-1] != self.config.n_embd:
                raise ValueError(f"layer {index} has the wrong width")
            return tuple(hidden.shape)

    assert set(Checked(str(gpt2_folder)).shapes.values()) == {(1, 1, 32)}


def test_exception_in_a_helper_keeps_class_and_message(lazy):
    def refuse(shape):
        raise NotImplementedError(f"shapes such as {tuple(shape)}")

    with pytest.raises(NotImplementedError, match=r"shapes such as \(1, 10, 32\)"):
        with lazy.scan(PROMPT):
            refuse(lazy.transformer.h[0].output.shape)
    assert not lazy.dispatched
