"""The plugin keeps to the conformance suite, and its names are found."""

import numpy as np
import pytest
import torch

import glyphnet
import nnsight
from nnsight.testing import ModelConformance
from nnsight_glyphnet.model import GlyphClassifier

LABELS = ["circle", "cross", "square"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("glyphs")
    torch.manual_seed(0)
    glyphnet.save(glyphnet.Classifier(LABELS), glyphnet.Processor(), path)
    return path


def image(seed, height, width):
    return np.random.default_rng(seed).random((height, width), dtype="float32")


class TestGlyphClassifier(ModelConformance):
    bad_inputs = ("a text", [], np.zeros((3, 3, 3, 3)), 7, [image(0, 8, 8), None])

    @pytest.fixture(autouse=True)
    def _from_folder(self, folder):
        self.folder = folder

    def make_module(self):
        return glyphnet.load(self.folder)[0]

    def make_model(self):
        return GlyphClassifier(self.folder)

    def inputs(self):
        return [image(0, 16, 16), [image(1, 30, 20), image(2, 8, 12)]]

    def run_plainly(self, module, images):
        return module(glyphnet.Processor()(images))


def test_names_are_found():
    from nnsight.modeling.glyphnet import GlyphClassifier as Same

    assert nnsight.GlyphClassifier is Same is GlyphClassifier


def test_labels_are_those_of_the_largest_logits(folder):
    model = nnsight.GlyphClassifier(folder)
    images = [image(seed, 16, 16) for seed in range(4)]
    with model.trace(images) as tracer:
        found = tracer.labels()
    module, processor = glyphnet.load(folder)
    assert found == [LABELS[row] for row in module(processor(images)).argmax(1)]


def test_a_loaded_model_is_wrapped_as_it_is(folder):
    module, _ = glyphnet.load(folder)
    model = nnsight.GlyphClassifier(module, rename={"stages": "layers"})
    with model.trace(image(0, 16, 16)):
        hidden = model.layers[1].output
    assert hidden.shape == (1, 16, 4, 4)
