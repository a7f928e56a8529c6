"""Tiny random models, and a way to look into a forward without asking for anything in it."""

from __future__ import annotations

import contextlib

import pytest
import torch
import zoo

from nnsight import NNsight


@pytest.fixture(scope="session")
def random_model():
    return zoo.build


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are():
    yield
    changed = zoo.changed()
    assert not changed, f"this test has changed models that others share: {changed}"


@pytest.fixture
def gpt2():
    return zoo.build("gpt2")


@pytest.fixture
def llama():
    return zoo.build("llama")


@pytest.fixture
def ids():
    return torch.tensor([[5, 17, 33, 2, 90, 41]])


@pytest.fixture(scope="session")
def smollm2_folder():
    from nnsight_hf import LoadError, smollm2_path

    try:
        return smollm2_path()
    except LoadError as error:
        pytest.skip(str(error))


def _looked_into(net, *args, **kwargs):
    """Run a module with all of its operations passing through visits; return its result and its source."""
    model = NNsight(net)
    source = model.source
    with model.trace(*args, **kwargs) as tracer:
        with contextlib.suppress(ValueError):  # whether or not it is reached
            source.returns[0].output
        result = tracer.result
    return result, source


@pytest.fixture(scope="session")
def looked_into():
    return _looked_into
