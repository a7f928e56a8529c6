"""Where a model looks up its tokens, also after that has changed."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from nnsight import InputError, LanguageModel
from nnsight_hf.embeddings import embeddings_of, input_device


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "opt"])
def test_they_are_what_transformers_says(name, random_model):
    module = random_model(name)
    for _ in range(2):
        assert embeddings_of(module) is module.get_input_embeddings()


def test_embeddings_that_were_replaced_count(random_model):
    module = copy.deepcopy(random_model("llama"))
    model = LanguageModel(module)
    with pytest.raises(InputError, match="go from 0 to 127"), model.trace([128]):
        pass
    module.resize_token_embeddings(200)
    assert embeddings_of(module) is module.get_input_embeddings()
    with model.trace([128]) as tracer:
        logits = tracer.result.logits
    assert logits.shape == (1, 1, 200)
    module.model.embed_tokens = nn.Embedding(50, module.config.hidden_size)
    with pytest.raises(InputError, match="go from 0 to 49"), model.trace([128]):
        pass


def test_model_is_not_kept(random_model):
    module = copy.deepcopy(random_model("llama"))
    reference = weakref.ref(module)
    assert embeddings_of(module) is not None
    del module
    gc.collect()
    assert reference() is None


def test_module_without_embeddings():
    assert embeddings_of(nn.Linear(2, 2)) is None
    assert input_device(nn.Linear(2, 2, device="meta"), None) is None
    assert input_device(nn.Linear(2, 2), None) == torch.device("cpu")
    assert input_device(nn.Identity(), None) is None
