"""What a distillation reads: fixed blocks with numbers, masks that depend on nothing but the block and the seed."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from inhibitor.data import corpus
from inhibitor.data.labelled import load_task
from inhibitor.data.tasks import get_task
from inhibitor.distill.recipe import DistillConfig, JointStage, LogitsStage
from inhibitor.distill.rows import ROW, Material, _Masking
from inhibitor.errors import ConfigError

LOGITS = LogitsStage(tokens=1)


def material(recipe, **text):
    recipe["text"] |= text
    return Material(DistillConfig.parse(recipe), AutoTokenizer.from_pretrained(recipe["teacher"]), None)


def ids(rows, count):
    return [row["input_ids"] for row in rows.dataset.take(count)]


def test_a_stage_of_its_own_has_text_of_its_own(recipe):
    found = material(recipe)
    first, second = (ids(found.rows(index, JointStage(tokens=1)), 20) for index in (0, 1))
    assert first == ids(found.rows(0, JointStage(tokens=1)), 20)
    assert first != second


def test_fixed_blocks_are_the_streams_first(recipe):
    fixed, stream = material(recipe, blocks=12), material(recipe, blocks=None)
    rows = fixed.rows(0, JointStage(tokens=1))
    assert rows.dataset["input_ids"] == ids(stream.rows(0, JointStage(tokens=1)), 12)
    assert rows.dataset[ROW] == list(range(12))
    assert fixed.rows(3, JointStage(tokens=1)) is rows  # every stage reads the same, so that a cache serves all


@pytest.mark.parametrize("blocks", [None, 40])
def test_masking_depends_on_block_and_seed_alone(recipe, blocks):
    found = material(recipe, blocks=blocks)
    first, again = (ids(found.rows(0, LOGITS), 40) for _ in range(2))
    assert first == again
    plain = ids(found.rows(0, JointStage(tokens=1)), 40)
    changed = np.asarray(first) != np.asarray(plain)
    special = np.isin(plain, found.tokenizer.all_special_ids)
    assert not changed[special].any()
    assert 0.08 < changed[~special].mean() < 0.20  # 15 %, of which a tenth stays as it is
    to_mask = np.asarray(first)[changed] == found.tokenizer.mask_token_id
    assert 0.7 < to_mask.mean() < 1.0
    assert len({tuple(row) for row in changed.tolist()}) > 30


def test_another_seed_masks_other_tokens(recipe):
    tokenizer = AutoTokenizer.from_pretrained(recipe["teacher"])
    block = {"input_ids": [list(range(5, 105))]}
    first, again, other = (_Masking(tokenizer, 0.15, seed)(block) for seed in (1, 1, 2))
    assert first == again != other


def test_it_is_measured_on_text_held_out(recipe):
    found = material(recipe, blocks=None)
    (held_out,) = found.validation
    assert held_out["input_ids"].shape == (4, 16)
    config = DistillConfig.parse(recipe)
    assert config.text is not None
    expected = corpus.packed(config.text, found.tokenizer, config.seed, held_out=True).take(4)
    assert held_out["input_ids"].tolist() == [row["input_ids"] for row in expected]


@pytest.mark.parametrize("blocks", [None, 100])
def test_a_row_becomes_its_blocks(recipe, blocks):
    found = material(recipe, blocks=blocks, min_length=8).rows(0, JointStage(tokens=1))
    cuts = [row for row in found.dataset.take(100) if row["length"] == 8][:3]
    batch = found.collate(cuts)
    assert batch["input_ids"].tolist() == [
        half for row in cuts for half in (row["input_ids"][:8], row["input_ids"][8:])
    ]
    assert batch["attention_mask"].all()


@pytest.mark.parametrize("blocks", [None, 100])
def test_a_stage_may_ask_for_shorter_blocks(recipe, blocks):
    found = material(recipe, blocks=blocks)
    whole, shorter = (found.rows(0, JointStage(tokens=1, min_length=shortest)) for shortest in (None, 8))
    assert {row["length"] for row in whole.dataset.take(100)} == {16}
    assert {row["length"] for row in shorter.dataset.take(100)} == {16, 8}
    stages = [{"kind": "joint", "tokens": 1024}, {"kind": "full", "tokens": 1024, "min_length": 8}]
    measured = material(recipe | {"stages": stages, "validation_sequences": 40}, blocks=blocks).validation
    assert {length for batch in measured for length in batch["attention_mask"].sum(1).tolist()} == {16, 8}
    with pytest.raises(ConfigError, match=r"text.min_length: expected at most max_length, 16, got 32"):
        DistillConfig.parse(recipe | {"stages": [{"kind": "joint", "tokens": 1024, "min_length": 32}]})


def test_blocks_of_two_lengths_are_padded(recipe):
    found = material(recipe, blocks=100, min_length=8).rows(0, JointStage(tokens=1))
    whole, cut = (next(row for row in found.dataset if row["length"] == length) for length in (16, 8))
    batch = found.collate([whole, cut])
    assert batch["attention_mask"].sum(1).tolist() == [16, 8, 8]
    assert batch["input_ids"][1, :8].tolist() == cut["input_ids"][:8]
    assert batch[ROW].tolist() == [whole[ROW], cut[ROW]]


def test_it_is_measured_on_blocks_of_every_length(recipe):
    recipe["validation_sequences"] = 32
    assert [tuple(batch["input_ids"].shape) for batch in material(recipe, min_length=8).validation] == [
        (16, 16),
        (32, 8),
    ]


def test_it_is_measured_on_every_length_where_there_are_more_than_four(recipe):
    recipe["validation_sequences"] = 64
    recipe["stages"] = [{"kind": "full", "tokens": 4096, "batch_size": 4}]
    shapes = [tuple(batch["input_ids"].shape) for batch in material(recipe, max_length=128, min_length=8).validation]
    assert {length for _, length in shapes} == {128, 64, 32, 16, 8}


def test_calibration_reads_several_lengths(recipe):
    config = DistillConfig.parse(recipe)
    assert config.calibration is not None
    batches = material(recipe).calibration(config.calibration)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8), (2, 16)]
    assert all(torch.all(batch["attention_mask"] == 1) for batch in batches)


def test_each_share_of_masks_has_blocks_of_its_own(recipe):
    found = material(recipe, blocks=12)
    more = LOGITS.model_copy(update={"mask_probability": 0.6})
    assert ids(found.rows(0, LOGITS), 12) != ids(found.rows(0, more), 12)


def test_a_task_without_text(task_recipe):
    task_recipe["stages"][0]["max_length"] = 128  # longer than some rows, so that a batch has padding
    config = DistillConfig.parse(task_recipe)
    assert config.task is not None
    assert config.calibration is not None
    labelled = load_task(get_task("reviews"), config.task.data)
    found = Material(config, AutoTokenizer.from_pretrained(config.teacher), labelled)
    rows = found.rows(0, config.task)
    assert rows.steps(config.task) == 2 * 6
    joint = JointStage(tokens=9000, batch_size=4)
    assert found.rows(0, joint) is rows
    tokens = sum(map(len, rows.dataset["input_ids"]))
    assert rows.steps(joint) == 9000 * len(rows.dataset) // (4 * tokens)
    batch = rows.collate([rows.dataset[row] for row in (5, 7)])
    assert batch[ROW].tolist() == [5, 7]
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= set(batch)
    assert sum(len(part["input_ids"]) for part in found.validation) == 8
    assert all(torch.all(batch["attention_mask"] == 1) for batch in found.calibration(config.calibration))
