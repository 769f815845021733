"""A small inhibitor classifier whose attention says something, and batches with padding."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from inhibitor import InhibitorConfig, convert

SENTENCES = [
    "the film is good .",
    "a dull plot and it was not great",
    "i was fine",
    "bad",
    "not a good film , not fine",
]


def make_student(folder, **config):
    """An inhibitor model in evaluation mode, with weights large enough that heads differ."""
    inhibitor = InhibitorConfig(delta=0.2, **config)
    model = convert(AutoModelForSequenceClassification.from_pretrained(folder), inhibitor).eval()
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                projection.weight.mul_(15)
                projection.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def student(tiny_bert):
    return make_student(tiny_bert)


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def batches(tokenizer):
    """Two batches, their rows of different lengths."""
    texts = (SENTENCES, [" ".join(reversed(text.split())) for text in SENTENCES])
    return [dict(tokenizer(list(part), padding=True, return_tensors="pt")) for part in texts]
