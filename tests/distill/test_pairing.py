"""Pairs that fit are loaded; pairs that do not are refused before any work, with both sides in the message."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from inhibitor.distill.pairing import load_pair
from inhibitor.distill.recipe import DistillConfig
from inhibitor.errors import ConfigError, ModelError
from inhibitor.models.attention import inhibitor_layers


def saved(folder, source, *, auto_class=AutoModel, tokenizer=None, **changes):
    """A random model like the one in ``source``, with changes to its configuration."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(source, **changes)
    auto_class.from_config(config).save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(source)).save_pretrained(folder)
    return str(folder)


def refused(recipe, match):
    with pytest.raises(ModelError, match=match):
        load_pair(DistillConfig.parse(recipe))


def test_without_a_student_it_gets_the_teachers_weights(recipe, teacher):
    found = load_pair(DistillConfig.parse(recipe))
    assert found.converted
    assert found.layers == {0: 0, 1: 1}
    weights = AutoModel.from_pretrained(teacher).state_dict()
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in found.student.state_dict().items() if name in weights
    )
    assert not any(parameter.requires_grad for parameter in found.teacher.parameters())


def test_a_layer_map_makes_a_shallower_student(recipe, teacher):
    recipe["layer_map"] = [1]
    found = load_pair(DistillConfig.parse(recipe))
    assert found.layers == {0: 1}
    assert list(inhibitor_layers(found.student)) == [0]
    ours, theirs = found.student.encoder.layer[0], found.teacher.encoder.layer[1]
    assert torch.equal(ours.intermediate.dense.weight, theirs.intermediate.dense.weight)
    assert torch.equal(found.student.embeddings.word_embeddings.weight, found.teacher.embeddings.word_embeddings.weight)


def test_only_chosen_layers_are_converted(recipe):
    recipe["inhibitor"]["layers"] = [1]
    assert list(inhibitor_layers(load_pair(DistillConfig.parse(recipe)).student)) == [1]


def test_a_student_takes_the_teachers_head(task_recipe, teacher, classifier):
    task_recipe["student"] = str(teacher)
    found = load_pair(DistillConfig.parse(task_recipe))
    head = AutoModelForSequenceClassification.from_pretrained(classifier).classifier.weight
    assert torch.equal(found.student.classifier.weight, head)
    assert found.student.config.id2label == {0: "negative", 1: "positive"}


def test_a_converted_student_stays_as_it_is(recipe, tmp_path):
    first = load_pair(DistillConfig.parse(recipe))
    with torch.no_grad():
        inhibitor_layers(first.student)[0].gamma.fill_(7.0)
    first.student.save_pretrained(tmp_path / "student")
    first.student_tokenizer.save_pretrained(tmp_path / "student")
    del recipe["calibration"]
    recipe["student"] = str(tmp_path / "student")
    found = load_pair(DistillConfig.parse(recipe))
    assert not found.converted
    assert inhibitor_layers(found.student)[0].gamma.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("asked", [{"inhibitor": {"per": "layer"}}, {"calibration": {"sequences": 2}}])
def test_what_a_recipe_asks_of_the_conversion_is_not_lost_on_a_converted_student(recipe, tmp_path, asked):
    first = load_pair(DistillConfig.parse(recipe))
    first.student.save_pretrained(tmp_path / "student")
    first.student_tokenizer.save_pretrained(tmp_path / "student")
    recipe = {key: value for key, value in recipe.items() if key not in ("inhibitor", "calibration")}
    recipe["student"] = str(tmp_path / "student")
    assert not load_pair(DistillConfig.parse(recipe)).converted
    with pytest.raises(ConfigError, match=f"{next(iter(asked))}: expected nothing, for .*student has inhibitor"):
        load_pair(DistillConfig.parse({**recipe, **asked}))


def moved(source, folder, auto_class=AutoModel, **options):
    """The model in ``source`` with every weight moved a little; the folder, and the weights of the base model."""
    torch.manual_seed(3)
    model = auto_class.from_pretrained(source, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder), model.base_model.state_dict()


def test_what_fine_tuning_changed_in_the_teacher_is_added(task_recipe, teacher, classifier, tmp_path):
    task_recipe["teacher"], tuned = moved(classifier, tmp_path / "teacher", AutoModelForSequenceClassification)
    task_recipe["student"], distilled = moved(teacher, tmp_path / "student")
    task_recipe["origin"] = str(teacher)
    found = load_pair(DistillConfig.parse(task_recipe)).student.bert.state_dict()
    before = AutoModel.from_pretrained(teacher).state_dict()
    for name, weight in distilled.items():
        torch.testing.assert_close(found[name], weight + (tuned[name] - before[name]))


def test_weights_that_the_student_takes_from_its_teacher_are_not_moved(task_recipe, teacher, classifier, tmp_path):
    task_recipe["teacher"], tuned = moved(classifier, tmp_path / "teacher", AutoModelForSequenceClassification)
    task_recipe["student"], _ = moved(teacher, tmp_path / "student", add_pooling_layer=False)
    task_recipe["origin"] = str(teacher)
    found = load_pair(DistillConfig.parse(task_recipe)).student.bert.pooler.dense.weight
    assert torch.equal(found, tuned["pooler.dense.weight"])


def test_what_the_origin_does_not_have_the_student_takes_from_its_teacher(task_recipe, teacher, classifier, tmp_path):
    task_recipe["teacher"], tuned = moved(classifier, tmp_path / "teacher", AutoModelForSequenceClassification)
    task_recipe["student"], _ = moved(teacher, tmp_path / "student")
    task_recipe["origin"], _ = moved(teacher, tmp_path / "origin", add_pooling_layer=False)
    found = load_pair(DistillConfig.parse(task_recipe)).student.bert.pooler.dense.weight
    assert torch.equal(found, tuned["pooler.dense.weight"])


def test_an_origin_of_fewer_layers(task_recipe, teacher, tmp_path):
    task_recipe["student"] = str(teacher)
    task_recipe["origin"] = saved(tmp_path / "origin", teacher, num_hidden_layers=1)
    refused(task_recipe, r"origin .*expected encoder\.layer\.1\..* got shapes \[\(")


def test_an_origin_of_another_shape(task_recipe, teacher, tmp_path):
    task_recipe["student"] = str(teacher)
    task_recipe["origin"] = saved(tmp_path / "origin", teacher, intermediate_size=20)
    refused(
        task_recipe,
        r"origin .*expected .*weight of shape \(\d+, 32\).* got shapes .* Name the pretrained model that both",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": None}, "origin: expected a student .* got no student"),
        ({"layer_map": [0, 1]}, r"origin: expected layers that .* got layer_map \[0, 1\]"),
    ],
)
def test_an_origin_that_has_no_use(task_recipe, teacher, changes, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig.parse(task_recipe | {"student": str(teacher), "origin": str(teacher)} | changes)


def test_an_origin_without_a_task(recipe, teacher):
    with pytest.raises(ConfigError, match=r"origin: expected .* and a task stage, got a layerwise stage"):
        DistillConfig.parse(recipe | {"student": str(teacher), "origin": str(teacher)})


@pytest.mark.parametrize("layers", [[0, 1, 1], [0], [0, 2], [-1, 0]])
def test_layer_maps_that_do_not_fit(recipe, teacher, layers):
    recipe["student"] = str(teacher)
    recipe["layer_map"] = layers
    refused(recipe, "layer_map: expected")


def test_a_shallower_student_needs_a_layer_map(recipe, teacher, tmp_path):
    recipe["student"] = saved(tmp_path / "small", teacher, num_hidden_layers=1)
    refused(recipe, r"one of the teacher's 2 layers for each of the student's 1, got no layer_map. For example \[1\]")


def test_labels_in_another_order(task_recipe, classifier, tmp_path):
    swapped = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    auto_class = AutoModelForSequenceClassification
    task_recipe["student"] = saved(tmp_path / "swapped", classifier, auto_class=auto_class, **swapped)
    refused(task_recipe, r"0 \(negative\), 1 \(positive\), got 0 \(positive\), 1 \(negative\)")


def test_a_teacher_of_another_task(task_recipe, classifier, tmp_path):
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    auto_class = AutoModelForSequenceClassification
    task_recipe["teacher"] = saved(tmp_path / "other", classifier, auto_class=auto_class, **names)
    refused(task_recipe, "expected the classes of reviews, negative, positive, got a model of a, b, c")


def test_a_teacher_that_was_never_fine_tuned(task_recipe, teacher):
    task_recipe["teacher"] = str(teacher)
    refused(task_recipe, "a classifier with all its weights, got none for classifier")


def test_a_teacher_without_a_language_model_head(recipe, teacher):
    recipe["stages"] = [{"kind": "logits", "tokens": 256, "batch_size": 4}]
    refused(recipe, "a teacher with a masked-language-model head")


def test_a_teacher_whose_tokenizer_masks_nothing(recipe, masked_lm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(masked_lm)
    AutoModelForMaskedLM.from_pretrained(masked_lm).save_pretrained(tmp_path / "teacher")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "teacher")
    recipe["teacher"] = str(tmp_path / "teacher")
    recipe["stages"] = [{"kind": "logits", "tokens": 256, "batch_size": 4}]
    refused(recipe, "got a tokenizer without a mask token")


def test_another_vocabulary(recipe, teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    vocabulary = tokenizer.get_vocab()
    vocabulary["film"], vocabulary["plot"] = vocabulary["plot"], vocabulary["film"]
    recipe["student"] = saved(
        tmp_path / "s", teacher, tokenizer=type(tokenizer)(vocab=vocabulary, model_max_length=128)
    )
    refused(recipe, f"the vocabulary of {teacher}'s, 122 entries, 'film' as ")


def test_another_way_to_cut_the_same_vocabulary(recipe, teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    cased = type(tokenizer)(vocab=tokenizer.get_vocab(), do_lower_case=False, model_max_length=128)
    recipe["student"] = saved(tmp_path / "s", teacher, tokenizer=cased)
    refused(recipe, "the ids of a sample of")


def test_other_special_tokens(recipe, teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_special_tokens({"mask_token": "[UNK]"})
    recipe["student"] = saved(tmp_path / "s", teacher, tokenizer=tokenizer)
    refused(recipe, "'mask_token' as 4, got 5 entries, 'mask_token' as 1")


def test_more_tokens_than_a_model_knows(recipe, teacher, tmp_path):
    recipe["student"] = saved(tmp_path / "s", teacher, vocab_size=100)
    refused(recipe, "a tokenizer of at most 100 tokens, got one of 122")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kind": "full"}, "hidden size 32, got 64. Set projection"),
        ({"kind": "joint"}, "hidden size 32, got 64. Compare contexts, and feed layers from the student's own"),
        ({"kind": "layerwise"}, "teacher's 2 heads of 16 values, got 2 heads of 32"),
    ],
)
def test_another_size(recipe, teacher, tmp_path, stage, message):
    recipe |= {"student": saved(tmp_path / "wide", teacher, hidden_size=64), "calibration": None}
    recipe["stages"] = [{**stage, "tokens": 256, "batch_size": 4}]
    refused(recipe, message)


def test_other_heads_are_not_calibrated_on_the_teachers(recipe, teacher, tmp_path):
    recipe["student"] = saved(tmp_path / "narrow", teacher, num_attention_heads=4)
    recipe["stages"] = [{"kind": "full", "tokens": 256, "batch_size": 4}]
    refused(recipe, r"calibration: expected .* 2 heads of 16 values, got 4 heads of 8\. Set calibration: null")


def test_rows_longer_than_a_model_reads(task_recipe):
    task_recipe["stages"][0]["max_length"] = 200
    refused(task_recipe, "a max_length of at most 128, got 200")
