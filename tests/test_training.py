"""Training that is stopped, starved of memory or fed with NaN ends as it should, and goes on to the same bits."""

import contextlib
import itertools
import json
import os
import signal
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from inhibitor import training
from inhibitor.checkpoints import load_state
from inhibitor.errors import Interrupted, RunError
from inhibitor.trainer import FiniteTrainer, _Clock
from inhibitor.training import fit, last_checkpoint
from tests.faults import LONG, record
from tests.faults.tiny import STEPS, At, Net, Rows, Stream, build, collate, ending, kill_with, steps, swift  # noqa: F401

WAYS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "in groups of like length": {"train_sampling_strategy": "group_by_length"},
    "two workers": {"dataloader_num_workers": 2},
    "a stream": {"rows": Stream()},
    "a stream, two workers": {"rows": Stream(), "dataloader_num_workers": 2},
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.parametrize("way", WAYS)
def test_stopped_after_any_step_it_goes_on_to_the_same_bits(tmp_path, way):
    def train(folder, *callbacks):
        return fit(lambda *_: build(folder, callbacks=callbacks, **WAYS[way]), folder, 2, 2)

    whole = train(tmp_path / "whole")
    stops = range(STEPS) if LONG or "workers" not in way else (1, 4, 6)
    for step in stops:
        folder = tmp_path / f"{step}"
        with pytest.raises(Interrupted):
            train(folder, At(step, kill_with(signal.SIGTERM)))
        assert last_checkpoint(folder) == str(folder / f"checkpoint-{step + 1}")
        resumed = train(folder)
        assert ending(folder) == ending(tmp_path / "whole"), step
        assert steps(resumed) == steps(whole), step
        assert resumed.state.global_step == STEPS
        assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    record(**{f"resumed ({way})": len(stops)})


def test_stopped_again_and_again_it_knows_how_long_it_trained(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    whole = fit(lambda *_: build(tmp_path / "whole"), tmp_path / "whole", 2, 2)
    folder = tmp_path / "run"
    for step in range(STEPS):
        with pytest.raises(Interrupted):
            fit(lambda *_, step=step: build(folder, callbacks=[At(step, kill_with(15))]), folder, 2, 2)
    trainer = fit(lambda *_: build(folder), folder, 2, 2)
    assert (whole.trained_seconds, trainer.trained_seconds) == (STEPS, STEPS)  # a second from tick to tick
    assert (whole.checkpoint_count, trainer.checkpoint_count) == (1, STEPS)
    assert trainer.checkpoint_seconds == STEPS * whole.checkpoint_seconds - STEPS


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_ends_the_step_and_says_where_to_go_on(tmp_path, number, name, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"{name}.*checkpoint-6; the same command") as stop:
        build(tmp_path, callbacks=[At(5, kill_with(number))]).train()
    assert stop.value.signal_number == number
    assert not isinstance(stop.value, Exception)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"{name}: a checkpoint is written after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, callbacks=[At(5, twice)]).train()
    assert last_checkpoint(tmp_path) is None


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    before, during = signal.getsignal(signal.SIGINT), []
    trainer = build(tmp_path, callbacks=[At(1, lambda: during.append(signal.getsignal(signal.SIGINT)))])
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == STEPS
    assert during == [before]


def test_a_checkpoint_between_epochs_holds_what_the_end_of_the_epoch_logs(tmp_path):
    class Score(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args, state, control, **kwargs):
            state.log_history.append({"score": state.global_step})

    with pytest.raises(Interrupted):
        build(tmp_path, callbacks=[Score(), At(3, kill_with(signal.SIGTERM))]).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][-1] == {"score": 4}


def test_a_finished_training_takes_no_further_step(tmp_path):
    first = fit(lambda *_: build(tmp_path, rows=Stream()), tmp_path, 2, 2)
    again = fit(lambda *_: build(tmp_path, rows=Stream()), tmp_path, 2, 2)
    assert again.state.global_step == STEPS
    assert again.trained_seconds == pytest.approx(first.trained_seconds)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_batch_that_breaks_the_loss_is_kept(tmp_path, number):
    rows = Rows()
    rows.rows[7]["x"][2] = number
    with pytest.raises(RunError, match=r"micro-batch [12] of step [1-4]: .*gradient of \w+\.\w+") as error:
        build(tmp_path, rows=rows).train()
    assert "no checkpoint yet" in str(error.value)
    assert str(tmp_path / "broken-batch.safetensors") in str(error.value)
    batch = load_file(tmp_path / "broken-batch.safetensors")
    assert batch.keys() == {"x", "y"}
    assert not batch["x"].isfinite().all()


def test_a_checkpoint_never_holds_weights_that_are_not_finite(tmp_path):
    trainer = build(tmp_path, save_steps=2)

    def poison():
        trainer.model.last.bias.data[0] = float("nan")

    trainer.add_callback(At(4, poison, "on_step_end"))
    with pytest.raises(
        RunError, match=r"step 4: expected finite weights, got last\.bias .*checkpoint is \S+checkpoint-2"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


NOW: list[Any] = [None]  # the trainer at work


def starving(monkeypatch, error, *, step, rows):
    """From a step on there is no memory for micro-batches of more than some rows."""
    real = Net.forward

    def forward(self, x, y, **unused):
        if len(x) > rows and NOW[0].state.global_step >= step:
            raise error
        return real(self, x, y)

    monkeypatch.setattr(Net, "forward", forward)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("save_steps", [2, 100])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_course(
    tmp_path, monkeypatch, capsys, error, step, save_steps
):
    model = build(tmp_path / "model", dropout=0).model  # one model for every trainer, as distillation has it

    def make(folder):
        def made(micro_batch, accumulation):
            trainer = build(
                folder, micro_batch=micro_batch, accumulation=accumulation, logging_steps=1, save_steps=save_steps
            )
            NOW[0] = trainer
            trainer.model = trainer.model_wrapped = model
            return trainer

        return made

    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undisturbed = fit(make(tmp_path / "whole"), tmp_path / "whole", 4)
    expected, losses = {k: v.clone() for k, v in model.state_dict().items()}, steps(undisturbed)
    model.load_state_dict(start)
    starving(monkeypatch, error, step=step, rows=1)
    folder = tmp_path / "run"
    trainer = fit(make(folder), folder, 4)
    assert trainer.args.per_device_train_batch_size == 1
    assert trainer.args.gradient_accumulation_steps == 4
    assert capsys.readouterr().err.count("going on with micro-batches of") == 2
    for ours, theirs in zip(steps(trainer), losses, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert json.loads((folder / "micro_batch.json").read_text()) == {"batch_size": 1, "gradient_accumulation": 4}


def test_a_restarted_run_begins_with_the_micro_batch_that_fits(tmp_path):
    asked = []

    def made(micro_batch, accumulation):
        asked.append((micro_batch, accumulation))
        return build(tmp_path, micro_batch=micro_batch, accumulation=accumulation, max_steps=1)

    for found, expected in [
        ('{"batch_size": 2, "gradient_accumulation": 3}', (2, 3)),
        ('{"batch_size": 2, "gradient_accumulation": 4}', (6, 1)),  # of a run that asked for another batch
        ('{"batch_size": -2, "gradient_accumulation": -3}', (6, 1)),
        ('{"batch_size"', (6, 1)),
        ("[]", (6, 1)),
    ]:
        (tmp_path / "micro_batch.json").write_text(found)
        fit(made, tmp_path, 6)
        assert asked[-1] == expected


def test_no_memory_for_one_row_is_said_and_other_errors_pass(tmp_path, monkeypatch):
    def made(folder):
        def make(micro_batch, accumulation):
            NOW[0] = build(folder, micro_batch=micro_batch, accumulation=accumulation)
            return NOW[0]

        return make

    starving(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), step=0, rows=0)
    with pytest.raises(RunError, match="memory for a micro-batch of one row, got CUDA out of memory"):
        fit(made(tmp_path), tmp_path, 3)
    assert json.loads((tmp_path / "micro_batch.json").read_text()) == {"batch_size": 1, "gradient_accumulation": 3}
    starving(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), step=0, rows=0)
    with pytest.raises(RuntimeError, match="mat1"):
        fit(made(tmp_path / "other"), tmp_path / "other", 3)
    assert list((tmp_path / "other").iterdir()) == []


def test_each_row_of_a_step_counts_the_same(tmp_path):
    """An epoch of six rows in micro-batches of four and two is one step; its loss is the mean over the rows."""
    losses = []
    for micro_batch, accumulation in ((6, 1), (4, 2), (2, 3), (1, 6)):
        folder = tmp_path / f"{micro_batch}"
        trainer = build(
            folder, micro_batch=micro_batch, accumulation=accumulation, dropout=0, rows=Rows(6), logging_steps=1
        )
        trainer.train()
        losses.append([entry["loss"] for entry in steps(trainer)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-6)


def test_labels_in_a_batch_do_not_multiply_the_loss_by_the_accumulation(tmp_path):
    """Trainer takes the loss of a model with **kwargs for one that it divided itself, once it sees labels."""

    def labelled(rows):
        return collate(rows) | {"labels": torch.zeros(len(rows), dtype=torch.long)}

    losses = []
    for collator in (collate, labelled):
        trainer = build(tmp_path / collator.__name__, dropout=0, logging_steps=1)
        trainer.data_collator = collator
        trainer.train()
        losses.append([entry["loss"] for entry in steps(trainer)])
    assert losses[0] == losses[1]


def test_the_bar_shows_this_process_s_own_pace(tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    with pytest.raises(Interrupted):
        build(tmp_path, callbacks=[At(5, kill_with(15))], logging_steps=1).train()
    trainer = build(tmp_path, disable_tqdm=False, logging_steps=1)
    trainer._bar.tokens_per_step = 1000
    shown: list[Any] = []
    trainer.add_callback(
        At(8, lambda: shown.extend((trainer._bar.training_bar.initial, str(trainer._bar.training_bar))), "on_log")
    )
    trainer.train(last_checkpoint(tmp_path))
    assert shown[0] == 6
    assert shown[1].startswith("test: ")
    assert "loss=" in shown[1]
    seconds = (
        trainer.trained_seconds - load_state(tmp_path / "checkpoint-6" / "process-0.safetensors")["trained_seconds"]
    )
    rate = float(shown[1].partition("tokens/s=")[2].rstrip("]").replace(",", ""))
    assert rate > 0.3 * 1000 / seconds


def test_the_clock_leaves_out_evaluation_and_checkpoints(monkeypatch):
    times = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("inhibitor.trainer.time.perf_counter", lambda: next(times))
    trainer = type("Trainer", (), {"trained_seconds": 0.0})()
    clock = _Clock(trainer)
    for event in ("epoch_begin", "step_begin", "step_end", "save", "step_begin", "step_end", "epoch_end"):
        getattr(clock, f"on_{event}")(None, None, None)
    assert trainer.trained_seconds == 2.0 + 3.0
    assert trainer._epoch_over


def test_of_several_gpus_one_is_used_and_it_says_so(tmp_path, capsys):
    arguments = build(tmp_path).args
    arguments._n_gpu = 2
    trainer = FiniteTrainer(model=Net(), args=arguments, title="tiny")
    assert trainer.args.n_gpu == 1
    assert "one of 2 GPUs is used; torchrun --nproc_per_node 2" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(tmp_path):
    with contextlib.suppress(Interrupted):
        build(tmp_path, callbacks=[At(1, kill_with(15))]).train()
    manifest = tmp_path / "checkpoint-2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(RunError, match="expected 2 processes, as those that wrote it, got 1"):
        build(tmp_path).train(str(manifest.parent))


@pytest.mark.parametrize(
    ("bf16", "capabilities", "said"),
    [
        (True, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "no instructions for bfloat16"),
        (True, {"avx512_bf16": True}, ""),
        (True, {"sve": True, "bf16": True}, ""),
        (True, {}, ""),  # nothing is known
        (False, {"avx512_f": True}, ""),
    ],
)
def test_bfloat16_on_a_processor_that_imitates_it_is_said_once(monkeypatch, capsys, bf16, capabilities, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    training._tell_of_slow_bfloat16.cache_clear()
    for _ in range(2):
        assert training.on_this_machine(bf16=bf16)["bf16"] is bf16
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == (1 if said else 0)
