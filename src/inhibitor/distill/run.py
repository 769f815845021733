"""One distillation from recipe to report: resumable stage by stage, layer by layer, checkpoint by checkpoint."""

import shutil
from itertools import islice
from typing import Any

from tqdm.auto import tqdm
from transformers import set_seed

from inhibitor import energy
from inhibitor.data import corpus
from inhibitor.data.files import write_quarantine
from inhibitor.data.labelled import LabelledData, load_task
from inhibitor.data.tasks import get_task
from inhibitor.distill import measure, trackers
from inhibitor.distill.calibrate import calibrate
from inhibitor.distill.diagnosis import diagnose
from inhibitor.distill.observe import readable
from inhibitor.distill.pairing import Pair, load_pair
from inhibitor.distill.recipe import AnyStage, CalibrationConfig, DistillConfig, IntegersConfig, TaskStage, WholeModel
from inhibitor.distill.rows import MEASURE_BATCH, Material, Rows
from inhibitor.distill.stages import Objective, rehearse, train, units
from inhibitor.distill.states import States
from inhibitor.distill.teacher import Cache, Teacher
from inhibitor.errors import ModelError, RunError, notice
from inhibitor.evaluate.agreement import PREDICTIONS, as_json
from inhibitor.evaluate.evaluate import headline, score
from inhibitor.models.attention import contexts, inhibitor_layers
from inhibitor.models.config import Int8Config
from inhibitor.models.int8 import attach_int8
from inhibitor.quantization import quantize
from inhibitor.quantization.quantize import check as check_quantizable
from inhibitor.runs import METRICS, Run, check_folder, sha256
from inhibitor.training import processes

STAGES, CHECKPOINTS = "stages", "checkpoints"
PROBED = 4  # rows that the traces are taken on


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run a recipe and return its metrics; an interrupted run goes on where it stopped.

    The folder ends with ``model/`` (the student and its tokenizer), ``stages/<state>/`` (the student before and
    between stages), ``metrics.json`` and the report.

    Raises:
        ConfigError, DataError, ModelError, RunError: Before any work, where the recipe, the data, the models or the
            folder cannot be used; RunError also where training cannot go on.
        Interrupted: SIGTERM or Ctrl-C while training, with a checkpoint to go on from.
    """
    Run(config.output).check(config)
    if Run(config.output).finished:
        return Run.start(config.output, config).metrics()
    trackers.check(config.report_to)
    if config.cache is not None:
        check_folder(config.cache)
    task = config.task
    text = {} if config.text is None else corpus.check(config.text)
    labelled = None
    if task is not None:
        labelled = load_task(get_task(task.task), task.data, on_bad_row=task.on_bad_row, held_out=task.held_out)
    pair = load_pair(config)
    with processes().main_process_first():
        run = Run.start(config.output, config)
    tallies = [contents.tally for contents in text.values()]
    tallies += [split.tally for split in labelled.splits.values()] if labelled is not None else []
    if processes().is_main_process:
        run.hold_to({str(path): sha256(path) for path in text} | (labelled.digests() if labelled is not None else {}))
        write_quarantine(run.path, tallies)
    set_seed(config.seed)
    with energy.Meter(carbon_intensity=config.carbon_intensity) as meter:
        counts = {str(path): contents.tally.counts() for path, contents in text.items()}
        return _Distillation(run, config, pair, labelled, counts, meter).complete()


def _rounded(integers: IntegersConfig) -> Int8Config:
    """The parts in their forms for training."""
    return Int8Config(
        attention=integers.attention,
        linear="fake" if integers.linear else "float",
        weights=integers.weights,
        embeddings="fake" if integers.embeddings else "float",
    )


class _Distillation:
    """The run while it goes on. ``progress`` says what is done; it is kept with the weights of each state."""

    def __init__(
        self,
        run: Run,
        config: DistillConfig,
        pair: Pair,
        labelled: LabelledData | None,
        counts: dict[str, dict[str, int]],
        meter: energy.Meter,
    ) -> None:
        self.run, self.config, self.pair, self.labelled = run, config, pair, labelled
        self.counts, self.meter = counts, meter
        self.processes = processes()
        self.teacher, self.student, self.layers = Teacher(pair.teacher), pair.student, pair.layers
        for model in (pair.teacher, pair.student):
            model.to(self.processes.device)
        self.material = Material(config, pair.tokenizer, labelled)
        self.states = States(run.path / STAGES)
        self.progress: dict[str, Any] = {
            "saves": 0,
            "teacher": {"sha256": self.teacher.digest()},
            "states": [],
            "stages": [],
            "parameters": {},
            "energy": None,
        }
        self.newest = self._resume()
        self.energy_before = self.progress["energy"]
        self.teacher.check_repeats(self.material.validation[0], self.layers.values())
        self._check_score()
        self._rehearse()
        probe = {name: tensor[:PROBED] for name, tensor in self.material.validation[0].items()}
        self.trace = measure.Trace(self.student, self.teacher, probe, self.layers)

    def complete(self) -> dict[str, Any]:
        """Do what is left to do."""
        calibration = self.config.calibration if self.pair.converted else None
        self._state("converted" if self.pair.converted else "given")
        if calibration is not None:
            if not self._known("calibrated"):
                self._calibrate(calibration)
            self._state("calibrated")
        for index, stage in enumerate(self.config.stages):
            repeated = sum(earlier.kind == stage.kind for earlier in self.config.stages[:index])
            name = stage.kind if not repeated else f"{stage.kind}-{repeated + 1}"
            if isinstance(stage, WholeModel) and stage.integers is not None:
                self._quantize(stage.integers, index, stage, name)
            if not self._known(name):
                self._train(index, stage, name)
            self._state(name)
        return self._finish()

    def _quantize(self, integers: IntegersConfig, index: int, stage: AnyStage, name: str) -> None:
        """Put the student on integers before a stage that trains it for them, and keep that state."""
        if "int8" not in self.progress:
            config = _rounded(integers)
            rows = self.material.rows(index, stage)
            chosen = list(islice(rows.dataset, integers.sequences))
            starts = range(0, len(chosen), MEASURE_BATCH)
            batches = [rows.collate(chosen[start : start + MEASURE_BATCH]) for start in starts]
            device = self.processes.device
            inputs = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
            quantize(self.student, config, [readable(self.student, batch) for batch in inputs])
            self.progress["int8"] = config.model_dump(mode="json")
            self._state(f"{name}-rounded")

    def _train(self, index: int, stage: AnyStage, name: str) -> None:
        if len(self.progress["stages"]) <= index:
            self.progress["stages"].append(
                {
                    "name": name,
                    "kind": stage.kind,
                    "losses": dict(stage.losses),
                    "units": 0,
                    "tokens": 0,
                    "seconds": 0.0,
                    "checkpoints": {"count": 0, "seconds": 0.0},
                    "history": [],
                }
            )
        record = self.progress["stages"][index]
        rows = self.material.rows(index, stage)
        layers = units(stage, self.student)
        self.teacher.cache = self._cache(stage, rows, name)
        for unit in range(record["units"], len(layers)):
            layer = layers[unit]
            folder = self.run.path / CHECKPOINTS / f"{index}-{unit}"
            trainer = train(
                self._objective(stage, layer),
                rows,
                seed=self.config.seed,
                folder=folder,
                title=name if layer is None else f"{name}, layer {layer}",
                report_to=self.config.report_to,
                trace=self.trace,
            )
            self.student.eval()
            record["seconds"] += trainer.trained_seconds
            record["tokens"] += int(trainer.state.num_input_tokens_seen)
            record["checkpoints"]["count"] += trainer.checkpoint_count
            record["checkpoints"]["seconds"] += trainer.checkpoint_seconds
            record["history"] += [measure.step(logs, layer) for logs in trainer.state.log_history if "loss" in logs]
            record["units"] = unit + 1
            self._save(f"{name}-{unit}")
            if self.processes.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
        self.teacher.cache = None

    def _objective(self, stage: AnyStage, layer: int | None) -> Objective:
        return Objective(self.student, self.teacher, stage, self.layers, layer)

    def _cache(self, stage: AnyStage, rows: Rows, name: str) -> Cache | None:
        if self.config.cache is None:
            return None
        cache = Cache(self.config.cache, self.teacher, rows)
        cache.complete(
            set().union(*(self._objective(stage, unit).targets() for unit in units(stage, self.student))), name
        )
        return cache

    def _calibrate(self, calibration: CalibrationConfig) -> None:
        taps = [contexts(self.pair.teacher, batch) for batch in self.material.calibration(calibration)]
        layers = inhibitor_layers(self.student).items()
        for layer, attention in tqdm(layers, desc="calibrated, layers", dynamic_ncols=True):
            calibrate(attention, [tapped[self.layers[layer]] for tapped in taps])

    def _check_score(self) -> None:
        """Measure the teacher on its task, say its score, and refuse one below the recipe's floor."""
        if self.labelled is None:
            return
        task, teacher = self.labelled.task, self.progress["teacher"]
        if "scores" not in teacher:
            teacher["scores"], _ = score(self.pair.teacher, self.pair.tokenizer, task, self.material.evaluation)
            teacher["headline"] = headline(task, teacher["scores"])
        points = 100 * teacher["headline"]
        if self.processes.is_main_process:
            split = next(iter(teacher["scores"]))
            notice(f"the teacher's {task.metrics[0]} on {task.name}, {split}, is {points:.1f}.")
        tasks = (stage for stage in self.config.stages if isinstance(stage, TaskStage))
        floors = [stage.floor for stage in tasks if stage.floor is not None]
        if floors and points < max(floors):
            raise ModelError(
                self.config.teacher,
                expected=f"a teacher whose {task.metrics[0]} on {task.name} is at least {max(floors)}",
                got=f"{points:.1f}",
                remedy="Fine-tune it better, or lower the floor.",
            )

    def _rehearse(self) -> None:
        for index, stage in enumerate(self.config.stages):
            if isinstance(stage, WholeModel) and stage.integers is not None and "int8" not in self.progress:
                check_quantizable(self.student, _rounded(stage.integers))
            row = {name: tensor[:1] for name, tensor in self.material.validation[0].items()}
            if isinstance(stage, TaskStage):  # whose losses may want labels
                rows = self.material.rows(index, stage)
                row = rows.collate([rows.dataset[0]])
            batch = {name: tensor.to(self.processes.device) for name, tensor in row.items()}
            for layer in units(stage, self.student):
                rehearse(self._objective(stage, layer), batch)
        self.student.eval()

    def _state(self, name: str) -> None:
        """Measure and keep the student as it is now, once."""
        if self._known(name):
            return
        self.student.requires_grad_(True)
        pair, batches = (self.student, self.teacher), self.material.validation
        errors, diagnosis = measure.errors(*pair, batches, self.layers), diagnose(*pair, batches, self.layers)
        state: dict[str, Any] = {"name": name, **errors, **diagnosis}
        if self.labelled is not None:
            state["scores"], logits = score(
                self.student, self.pair.tokenizer, self.labelled.task, self.material.for_student(self.student)
            )
            if self.processes.is_main_process:  # of the last state, in the end
                self.run.write_json(PREDICTIONS, as_json(self.labelled, logits))
        self.progress["states"].append(state)
        self.progress["parameters"][name] = measure.parameters(self.student)
        self._save(name)

    def _known(self, name: str) -> bool:
        return any(state["name"] == name for state in self.progress["states"])

    def _save(self, name: str) -> None:
        self.progress["saves"] += 1
        self.progress["energy"] = energy.add(self.energy_before, self.meter.read())
        if self.processes.is_main_process:
            keep = [state["name"] for state in self.progress["states"]]
            self.states.save(name, self.student, self.pair.student_tokenizer, self.progress, keep)
        self.processes.wait_for_everyone()
        self.newest = name

    def _resume(self) -> str:
        with self.processes.main_process_first():  # which renames what is damaged
            found = self.states.newest()
        if found is None:
            return ""
        name, progress = found
        if progress["teacher"]["sha256"] != self.progress["teacher"]["sha256"]:
            raise RunError(
                self.config.teacher,
                expected="the teacher that this run began with",
                got="other weights under its name",
                remedy="Put the old weights back, or choose another output.",
            )
        self.progress = progress
        if "int8" in progress:
            self.student.config.int8 = progress["int8"]
            attach_int8(self.student)
        self.states.load(name, self.student)
        return name

    def _finish(self) -> dict[str, Any]:
        if self.teacher.digest() != self.progress["teacher"]["sha256"]:
            raise RunError(
                "the teacher", expected="frozen weights", got="weights that changed", remedy="Please report this."
            )
        example = None
        if not inhibitor_layers(self.pair.teacher):
            models = self.student, self.pair.teacher, self.pair.tokenizer
            example = measure.attention_example(*models, self.config.example, self.layers)
        metrics = {
            "kind": "distill",
            "teacher": self.config.teacher,
            "student_from": self.config.student,
            "teacher_sha256": self.progress["teacher"]["sha256"],
            "student": {
                "family": self.student.config.model_type.removeprefix("inhibitor-"),
                "layers": list(inhibitor_layers(self.student)),
                "heads": self.student.config.num_attention_heads,
            },
            "seed": self.config.seed,
            "text": self.counts,
            "states": self.progress["states"],
            "stages": [
                {**stage, "tokens_per_second": stage["tokens"] / stage["seconds"]} for stage in self.progress["stages"]
            ],
            "parameters": self.progress["parameters"],
            "attention": example,
            "energy": self.progress["energy"],
            **self._task_metrics(),
        }
        if self.processes.is_main_process:
            self.states.publish(self.newest, self.run.model)
            shutil.rmtree(self.run.path / CHECKPOINTS, ignore_errors=True)
            self.run.write_json(METRICS, metrics)
        self.processes.wait_for_everyone()
        return metrics

    def _task_metrics(self) -> dict[str, Any]:
        """What a run with a task stage says of the student's score; the same keys as ``finetune``."""
        if self.labelled is None:
            return {}
        scores = self.progress["states"][-1]["scores"]
        return {
            "task": self.labelled.task.name,
            "scores": scores,
            "headline": headline(self.labelled.task, scores),
            "teacher_scores": self.progress["teacher"]["scores"],
            "teacher_headline": self.progress["teacher"]["headline"],
            **self.labelled.describe(),
            "truncated": self.material.truncated,
        }
