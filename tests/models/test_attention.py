"""Taps: what is seen in a layer is what the layer computed, and nothing above is run."""

import pytest
import torch
from transformers import AutoModel

import inhibitor
from inhibitor.models.attention import TEACHER, contexts, inhibitor_layers
from inhibitor.models.families import attention_modules
from inhibitor.ops import inhibitor_attention
from tests.models.test_convert import ACTIVE, batch, softmax_model


def teacher():
    model = softmax_model(auto_class=AutoModel)
    model.set_attn_implementation(TEACHER)
    return model


def test_a_tapped_teacher_computes_softmax_attention():
    plain = softmax_model(auto_class=AutoModel)
    with torch.no_grad():
        torch.testing.assert_close(teacher()(**batch())[0], plain(**batch())[0])
        tapped = contexts(teacher(), batch((5, 5)))
    assert len(tapped) == 2
    weights = torch.softmax(tapped[1].query @ tapped[1].key.mT * tapped[1].scale, -1)
    torch.testing.assert_close(tapped[1].context, (weights @ tapped[1].value).transpose(1, 2))


def test_a_tapped_student_computes_inhibitor_attention():
    student = inhibitor.convert(softmax_model(auto_class=AutoModel), ACTIVE)
    with torch.no_grad():
        layer = inhibitor_layers(student)[0]
        assert layer.query_gain is not None
        layer.query_gain.copy_(0.3 * torch.randn(layer.query_gain.shape, generator=torch.Generator().manual_seed(0)))
        tapped = contexts(student, batch())[0]
        gain = torch.exp(torch.einsum("bhnd,hd->bhn", tapped.query, layer.query_gain))
        expected = inhibitor_attention(
            tapped.query,
            tapped.key,
            tapped.value,
            gamma=layer.gamma,
            eta=layer.eta.view(-1, 1) * gain,
            delta=layer.delta,
            length_exponent=layer.length_exponent,
            reach=layer.reach,
            attn_mask=tapped.attn_mask,
            backend="reference",
        )
    torch.testing.assert_close(tapped.context, expected.transpose(1, 2))


@pytest.mark.parametrize("make", [teacher, lambda: inhibitor.convert(softmax_model(auto_class=AutoModel), ACTIVE)])
def test_no_layer_above_the_last_is_computed(make):
    model = make()
    layers = model.encoder.layer
    entered = []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        layer.output.register_forward_pre_hook(lambda *_, index=index: entered.append(f"{index} feed-forward"))
    tapped = contexts(model, batch(), last=0)
    assert len(tapped) == 1
    assert entered == [0]
    assert not any("tap" in vars(module) for module in attention_modules(model))


def test_taps_go_when_the_model_fails():
    model = teacher()
    with pytest.raises(IndexError):
        contexts(model, {"input_ids": torch.full((1, 3), 10_000)})
    assert not any("tap" in vars(module) for module in attention_modules(model))
