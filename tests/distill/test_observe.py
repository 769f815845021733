"""Observation: the right tensors under the right names, no more computed than needed, nothing left behind."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import inhibitor
from inhibitor.distill.observe import observe, on_teacher, readable
from inhibitor.models.attention import TEACHER, contexts
from inhibitor.models.families import attention_modules, layer_modules, output_modules
from tests.models.test_convert import ACTIVE, CONFIGS, batch, softmax_model


def teacher(family="bert", auto_class=AutoModel):
    model = softmax_model(family, auto_class)
    model.set_attn_implementation(TEACHER)
    return model


def student(family="bert"):
    return inhibitor.convert(softmax_model(family, AutoModel), ACTIVE)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_names_are_what_they_say(family):
    model = teacher(family, AutoModelForSequenceClassification)
    found = observe(model, batch(), ["hidden-0", "hidden-2", "context-1", "output-1", "input-1", "logits"])
    whole = model(**batch(), output_hidden_states=True)
    torch.testing.assert_close(found["logits"], whole.logits)
    torch.testing.assert_close(found["hidden-0"], whole.hidden_states[0])
    torch.testing.assert_close(found["hidden-2"], whole.hidden_states[2])
    torch.testing.assert_close(found["input-1"], whole.hidden_states[1])  # of a post-norm family
    torch.testing.assert_close(found["context-1"], contexts(model, batch())[1].context)
    torch.testing.assert_close(found["output-1"], output_modules(model)[1](found["context-1"].flatten(2)))


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_forced_layers_see_what_they_are_given(family):
    model, guide = student(family), teacher(family)
    given = observe(guide, batch(), ["input-0", "input-1"])
    forced = {layer: given[f"input-{layer}"] for layer in (0, 1)}
    found = observe(model, batch(), ["context-0", "context-1", "output-1"], forced=forced)
    torch.testing.assert_close(found["output-1"], output_modules(model)[1](found["context-1"].flatten(2)))
    torch.testing.assert_close(found["context-0"], observe(model, batch(), ["context-0"])["context-0"])
    # layer 1 on the teacher's own states: a student with the teacher's lowest layer computes the same
    half = inhibitor.convert(softmax_model(family, AutoModel), ACTIVE.model_copy(update={"layers": (1,)}))
    torch.testing.assert_close(found["context-1"], observe(half, batch(), ["context-1"])["context-1"])
    assert not torch.allclose(found["context-1"], observe(model, batch(), ["context-1"])["context-1"])


def test_forcing_computes_attention_alone():
    model, entered = student(), []
    for index, layer in enumerate(model.base_model.encoder.layer):
        layer.attention.self.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        layer.intermediate.register_forward_pre_hook(lambda *_: entered.append("feed-forward"))
    observe(model, batch(), ["context-1"], forced={1: torch.randn(2, 9, 32)})
    assert entered == [1]
    assert not any("forward" in vars(layer) for layer in layer_modules(model))


@pytest.mark.parametrize("names", [["context-0"], ["output-0"], ["context-0", "output-0", "input-0"]])
def test_nothing_above_what_is_wanted_is_computed(names):
    model, entered = student(), []
    for index, layer in enumerate(layer_modules(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
        layer.get_submodule("intermediate").register_forward_pre_hook(lambda *_: entered.append("feed-forward"))
    assert list(observe(model, batch(), names)) == names
    assert entered == [0]


def test_nothing_stays_behind_when_the_model_fails():
    model = student()
    with pytest.raises(IndexError):
        observe(model, {"input_ids": torch.full((1, 3), 10_000)}, ["context-1"], forced={1: torch.randn(1, 3, 32)})
    assert not any("tap" in vars(module) or module._forward_pre_hooks for module in attention_modules(model))
    assert not any("forward" in vars(layer) for layer in layer_modules(model))
    assert not any(module._forward_hooks for module in output_modules(model))


def test_gradients_flow_into_forced_layers():
    model = student()
    observe(model, batch(), ["context-0", "context-1"], forced=dict(enumerate(torch.randn(2, 2, 9, 32))))[
        "context-1"
    ].sum().backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients
    assert all(name.startswith("encoder.layer.1.attention.self.") for name in gradients)


def test_a_model_gets_only_what_it_reads():
    values = {"input_ids": 1, "token_type_ids": 2, "labels": 3, "row": 4}
    assert readable(softmax_model("bert"), values) == {"input_ids": 1, "token_type_ids": 2}
    assert readable(softmax_model("distilbert"), values) == {"input_ids": 1}


def test_names_on_the_teacher_follow_the_layer_map():
    layers = {0: 1, 1: 3}
    names = {"context-1": "context-3", "input-0": "input-1", "hidden-1": "hidden-2", "hidden-2": "hidden-4"}
    assert {name: on_teacher(name, layers) for name in names} == names
    assert on_teacher("logits", layers) == "logits"
