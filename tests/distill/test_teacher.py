"""The teacher's cache: what it gives is what the teacher says, computed once, for these rows and this teacher only."""

import datasets
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from inhibitor.distill import teacher as teacher_module
from inhibitor.distill.rows import ROW, Rows
from inhibitor.distill.teacher import Cache, Teacher
from inhibitor.errors import ConfigError, ModelError
from inhibitor.models.attention import TEACHER
from tests.models.test_convert import batch, softmax_model

LENGTHS = (9, 4, 6, 1, 9)
NAMES = ["context-1", "hidden-2", "input-0"]


def teacher(auto_class=AutoModel):
    model = softmax_model(auto_class=auto_class)
    model.set_attn_implementation(TEACHER)
    return Teacher(model)


def rows(lengths=LENGTHS, seed=0):
    columns = {name: tensor.tolist() for name, tensor in batch(lengths, seed).items()}
    cut = {
        name: [row[:length] for row, length in zip(values, lengths, strict=True)] for name, values in columns.items()
    }
    dataset = datasets.Dataset.from_dict({**cut, ROW: list(range(len(lengths)))})
    return Rows(dataset, pad, sum(lengths) / len(lengths))


def pad(chosen):
    longest = max(len(row["input_ids"]) for row in chosen)
    padded = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in chosen])
        for name, fill in (("input_ids", 1), ("attention_mask", 0))
    }
    return {**padded, ROW: torch.tensor([row[ROW] for row in chosen])}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(teacher_module, "FILL_BATCH", 2)
    monkeypatch.setattr(teacher_module, "FLUSHED", 1)
    monkeypatch.setenv("TQDM_DISABLE", "1")


def cached(root, names=NAMES, auto_class=AutoModel, **changes):
    found = teacher(auto_class)
    cache = Cache(root, found, rows(**changes))
    cache.complete(names, "test")
    found.cache = cache
    return found


def counted(monkeypatch):
    """One entry for each time a teacher computes something."""
    calls: list[int] = []
    compute = Teacher.compute

    def count(self, *args):
        calls.append(1)
        return compute(self, *args)

    monkeypatch.setattr(Teacher, "compute", count)
    return calls


def no_computing(monkeypatch):
    def refuse(*_):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Teacher, "compute", refuse)


def test_it_gives_what_the_teacher_says(tmp_path):
    chosen = pad([rows().dataset[row] for row in (2, 0, 3)])
    found, expected = cached(tmp_path).targets(chosen, NAMES), teacher().compute(chosen, NAMES)
    real = chosen["attention_mask"].bool()
    for name in NAMES:
        assert found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name][real], expected[name][real].bfloat16().float(), rtol=2**-7, atol=1e-3)
        assert not found[name][~real].any()


def test_logits_have_one_entry_a_row(tmp_path):
    auto_class = AutoModelForSequenceClassification
    chosen = pad([rows().dataset[row] for row in (4, 1)])
    found = cached(tmp_path, ["logits", "hidden-1"], auto_class).targets(chosen, ["logits"])["logits"]
    expected = teacher(auto_class).compute(chosen, ["logits"])["logits"]
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_a_second_student_asks_no_teacher(tmp_path, monkeypatch):
    chosen = pad([rows().dataset[0]])
    first = cached(tmp_path).targets(chosen, NAMES)
    calls = counted(monkeypatch)
    second = cached(tmp_path)
    assert len(calls) == 1  # the first row, for the shapes
    no_computing(monkeypatch)
    for name, tensor in second.targets(chosen, NAMES).items():
        assert torch.equal(tensor, first[name])


def test_more_outputs_are_added_to_those_there(tmp_path):
    cached(tmp_path, ["context-1"])
    (folder,) = tmp_path.iterdir()
    before = (folder / "context-1.bin").stat().st_mtime_ns
    cached(tmp_path, ["context-0", "context-1"])
    assert (folder / "context-1.bin").stat().st_mtime_ns == before
    assert {path.name for path in folder.iterdir()} >= {"context-0.bin", "context-0.json", "context-1.json"}


def test_another_teacher_text_or_mask_has_another_folder(tmp_path):
    cached(tmp_path)
    cached(tmp_path, seed=1)
    cached(tmp_path, lengths=(9, 4, 6, 2, 9))
    changed = teacher()
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0].add_(1e-3)
    Cache(tmp_path, changed, rows()).complete(NAMES, "test")
    ids, ones = list(range(5, 15)), [1] * 10
    for cut in (4, 6):  # the same tokens one after another
        columns = {"input_ids": [ids[:cut], ids[cut:]], "attention_mask": [ones[:cut], ones[cut:]], ROW: [0, 1]}
        Cache(tmp_path, teacher(), Rows(datasets.Dataset.from_dict(columns), pad, 5)).complete(NAMES, "test")
    assert len(list(tmp_path.iterdir())) == 6


def interrupted(root, monkeypatch, batches, names=NAMES):
    """A cache whose filling ends after some batches."""
    compute, count = Teacher.compute, 0

    def dies(self, *args):
        nonlocal count
        count += 1
        if count == batches + 2:  # the first tells the shapes
            raise KeyboardInterrupt
        return compute(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "compute", dies)
        with pytest.raises(KeyboardInterrupt):
            cached(root, names)


@pytest.mark.parametrize("batches", [1, 2])
def test_an_interrupted_filling_goes_on(tmp_path, monkeypatch, batches):
    expected = cached(tmp_path / "whole").targets(pad(list(rows().dataset)), NAMES)
    interrupted(tmp_path / "cut", monkeypatch, batches)
    asked = counted(monkeypatch)
    found = cached(tmp_path / "cut").targets(pad(list(rows().dataset)), NAMES)
    assert len(asked) == 1 + 3 - batches
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])


def test_other_outputs_are_filled_from_the_first_row(tmp_path, monkeypatch):
    chosen = pad(list(rows().dataset))
    expected = cached(tmp_path / "whole").targets(chosen, NAMES)
    interrupted(tmp_path / "cut", monkeypatch, 2, NAMES[:1])
    for name, tensor in cached(tmp_path / "cut").targets(chosen, NAMES).items():
        assert torch.equal(tensor, expected[name])


def test_a_file_that_lost_its_end_is_filled_again(tmp_path):
    chosen = pad(list(rows().dataset))
    expected = cached(tmp_path).targets(chosen, NAMES)
    (folder,) = tmp_path.iterdir()
    file = folder / "context-1.bin"
    file.write_bytes(file.read_bytes()[:-2])
    for name, tensor in cached(tmp_path).targets(chosen, NAMES).items():
        assert torch.equal(tensor, expected[name])


def test_rows_of_several_blocks(tmp_path):
    found = teacher()
    dataset = rows((8,) * 6).dataset
    parted = Rows(dataset, lambda chosen: halves(pad(chosen)), 8)
    cache = Cache(tmp_path, found, parted)
    cache.complete(NAMES, "test")
    batch = parted.collate([dataset[row] for row in (5, 2)])
    expected = found.compute({name: batch[name] for name in ("input_ids", "attention_mask")}, NAMES)
    for name, tensor in cache.read(batch[ROW], batch["attention_mask"], NAMES).items():
        assert tensor.shape == expected[name].shape
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-2)


def halves(chosen):
    return {name: tensor if name == ROW else tensor.reshape(-1, 4) for name, tensor in chosen.items()}


def test_another_configuration_has_another_folder(tmp_path):
    cached(tmp_path)
    other = teacher()
    other.model.config.hidden_act = "relu"
    Cache(tmp_path, other, rows()).complete(NAMES, "test")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "ROOM_LEFT", 1 << 60)
    with pytest.raises(ConfigError, match=r"room for 0.00 GiB of context-1, hidden-2, input-0, got .* GiB free"):
        cached(tmp_path)


def test_a_teacher_that_answers_in_two_ways_is_refused():
    found = teacher()
    found.check_repeats(batch(), [0, 1])
    found.model.encoder.layer[1].train()  # and the lower layer answers as before
    with pytest.raises(ModelError, match="two answers"):
        found.check_repeats(batch(), [0, 1])
