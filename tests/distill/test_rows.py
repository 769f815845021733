"""What a distillation reads: fixed blocks with numbers, masks that depend on nothing but the block and the seed."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from inhibitor.data.labelled import load_task
from inhibitor.data.tasks import get_task
from inhibitor.distill.recipe import DistillConfig, JointStage, LogitsStage
from inhibitor.distill.rows import ROW, Material

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


def test_a_task_without_text(task_recipe):
    config = DistillConfig.parse(task_recipe)
    assert config.task is not None
    assert config.calibration is not None
    labelled = load_task(get_task("reviews"), config.task.data)
    found = Material(config, AutoTokenizer.from_pretrained(config.teacher), labelled)
    rows = found.rows(0, config.task)
    assert rows.steps(config.task) == 2 * 6
    batch = rows.collate([rows.dataset[row] for row in (5, 7)])
    assert batch[ROW].tolist() == [5, 7]
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= set(batch)
    assert sum(len(part["input_ids"]) for part in found.validation) == 8
    assert all(torch.all(batch["attention_mask"] == 1) for batch in found.calibration(config.calibration))
