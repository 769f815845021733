"""One distillation from recipe to report: resumable stage by stage, layer by layer, checkpoint by checkpoint."""

import json
import shutil
import time
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from inhibitor.data import corpus
from inhibitor.distill import measure
from inhibitor.distill.calibrate import calibrate
from inhibitor.distill.recipe import CalibrationConfig, DistillConfig
from inhibitor.distill.stages import objectives, train
from inhibitor.errors import ModelError
from inhibitor.models.attention import TEACHER, contexts, inhibitor_layers
from inhibitor.models.convert import convert
from inhibitor.models.loading import load_pretrained
from inhibitor.runs import METRICS, Run
from inhibitor.training import processes

STAGES, PROGRESS, CHECKPOINTS = "stages", "progress.json", "checkpoints"
MEASURE_BATCH = 16


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run a recipe and return its metrics; an interrupted run goes on where it stopped.

    The folder ends with ``model/`` (the student and its tokenizer), ``stages/<state>/`` (the student before and
    between stages), ``metrics.json`` and the report.

    Raises:
        ConfigError, DataError, ModelError, RunError: Before any work, where the recipe, the text, the teacher or
            the folder cannot be used.
    """
    corpus.check(config.text)
    tokenizer, teacher = _load_teacher(config)
    with processes().main_process_first():
        run = Run.start(config.output, config)
    if run.finished:
        return run.metrics()
    set_seed(config.seed)
    return _Distillation(run, config, tokenizer, teacher).complete()


def _load_teacher(config: DistillConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    tokenizer = load_pretrained(AutoTokenizer, config.teacher)
    teacher = load_pretrained(AutoModel, config.teacher, attn_implementation=TEACHER, dtype=torch.float32)
    longest = getattr(teacher.config, "max_position_embeddings", config.text.max_length)
    if config.text.max_length > longest:
        raise ModelError(
            config.teacher,
            expected=f"text.max_length of at most {longest}",
            got=str(config.text.max_length),
            remedy="Shorten the blocks.",
        )
    return tokenizer, teacher.eval().requires_grad_(False)


class _Distillation:
    """The run while it goes on. ``progress.json`` holds what is done; it is written after each unit of work."""

    def __init__(
        self, run: Run, config: DistillConfig, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel
    ) -> None:
        self.run, self.config, self.tokenizer, self.teacher = run, config, tokenizer, teacher
        self.processes = processes()
        self.teacher.to(self.processes.device)
        softmax = load_pretrained(AutoModel, config.teacher, dtype=torch.float32)
        self.student = convert(softmax, config.inhibitor).eval().to(self.processes.device)
        held_out = corpus.packed(config.text, tokenizer, config.seed, held_out=True)
        self.validation = self._batches(held_out, config.validation_sequences)
        self.progress: dict[str, Any] = {"states": [], "stages": [], "parameters": {}, "weights": None}
        self._resume()

    def complete(self) -> dict[str, Any]:
        """Do what is left to do."""
        self._state("converted")
        if self.config.calibration is not None and not self._known("calibrated"):
            self._calibrate(self.config.calibration)
        if self.config.calibration is not None:
            self._state("calibrated")
        names: list[str] = []
        for index, stage in enumerate(self.config.stages):
            repeated = sum(earlier.kind == stage.kind for earlier in self.config.stages[:index])
            names.append(stage.kind if not repeated else f"{stage.kind}-{repeated + 1}")
            if not self._known(names[-1]):
                self._train(index, names[-1])
            self._state(names[-1])
        return self._finish()

    def _train(self, index: int, name: str) -> None:
        stage = self.config.stages[index]
        if len(self.progress["stages"]) <= index:
            self.progress["stages"].append({"name": name, "units": 0, "tokens": 0, "seconds": 0.0, "history": []})
        record = self.progress["stages"][index]
        units = list(objectives(stage, self.student, self.teacher))
        for unit in range(record["units"], len(units)):
            layer, objective = units[unit]
            folder = self.run.path / CHECKPOINTS / f"{index}-{unit}"
            blocks = corpus.packed(self.config.text, self.tokenizer, self.config.seed + 1 + index)
            started = time.perf_counter()
            title = name if layer is None else f"{name}, layer {layer}"
            history = train(objective, stage, blocks, self.config.text.max_length, self.config.seed, folder, title)
            record["seconds"] += time.perf_counter() - started
            record["history"] += [{**entry, "layer": layer} for entry in history]
            blocks_per_step = stage.batch_size * stage.gradient_accumulation * self.processes.num_processes
            step = blocks_per_step * self.config.text.max_length
            record["tokens"] += stage.tokens // step * step
            record["units"] = unit + 1
            self._save(f"{name}-{unit}")
            if self.processes.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)

    def _calibrate(self, calibration: CalibrationConfig) -> None:
        blocks = corpus.packed(self.config.text, self.tokenizer, self.config.seed)
        batch = self._batches(blocks, calibration.sequences)
        whole = self.config.text.max_length
        cuts = [length for length in calibration.lengths if length < whole]
        taps = [
            contexts(self.teacher, {name: tensor[:, :length] for name, tensor in inputs.items()})
            for inputs in batch
            for length in (*cuts, whole)
        ]
        layers = inhibitor_layers(self.student).items()
        for layer, attention in tqdm(layers, desc="calibrated, layers", dynamic_ncols=True):
            calibrate(attention, [tapped[layer] for tapped in taps])

    def _state(self, name: str) -> None:
        """Measure and keep the student as it is now, once."""
        if self._known(name):
            return
        self.student.requires_grad_(True)
        errors = measure.errors(self.student, self.teacher, self.validation)
        self.progress["states"].append({"name": name, **errors})
        self.progress["parameters"][name] = measure.parameters(self.student)
        self._save(name)

    def _known(self, name: str) -> bool:
        return any(state["name"] == name for state in self.progress["states"])

    def _save(self, name: str) -> None:
        """Weights first, then the progress that names them, then away with those it no longer names."""
        self.progress["weights"] = name
        if self.processes.is_main_process:
            folder = self.run.path / STAGES / name
            self.student.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.run.write_json(PROGRESS, self.progress)
            kept = {name, *(state["name"] for state in self.progress["states"])}
            for other in (self.run.path / STAGES).iterdir():
                if other.name not in kept:
                    shutil.rmtree(other)
        self.processes.wait_for_everyone()

    def _resume(self) -> None:
        path = self.run.path / PROGRESS
        if path.is_file():
            self.progress = json.loads(path.read_text(encoding="utf-8"))
            weights = load_file(self.run.path / STAGES / self.progress["weights"] / "model.safetensors")
            self.student.load_state_dict(weights)
        self.processes.wait_for_everyone()  # all have read what was there before any writes on

    def _finish(self) -> dict[str, Any]:
        stages = [
            {
                "name": stage["name"],
                "tokens": stage["tokens"],
                "seconds": stage["seconds"],
                "tokens_per_second": stage["tokens"] / stage["seconds"],
                "history": stage["history"],
            }
            for stage in self.progress["stages"]
        ]
        metrics = {
            "kind": "distill",
            "teacher": self.config.teacher,
            "student": {
                "family": self.teacher.config.model_type,
                "layers": list(inhibitor_layers(self.student)),
                "heads": self.student.config.num_attention_heads,
            },
            "seed": self.config.seed,
            "states": self.progress["states"],
            "stages": stages,
            "parameters": self.progress["parameters"],
            "attention": measure.attention_example(self.student, self.teacher, self.tokenizer, self.config.example),
        }
        if self.processes.is_main_process:
            shutil.rmtree(self.run.model, ignore_errors=True)
            shutil.copytree(self.run.path / STAGES / self.progress["weights"], self.run.model)
            self.run.write_json(METRICS, metrics)
            shutil.rmtree(self.run.path / CHECKPOINTS, ignore_errors=True)
            (self.run.path / PROGRESS).unlink()
        self.processes.wait_for_everyone()
        return metrics

    def _batches(self, blocks: Any, count: int) -> list[dict[str, Tensor]]:
        rows = list(blocks.take(count))
        return [
            {
                name: torch.tensor([row[name] for row in part], device=self.processes.device)
                for name in ("input_ids", "attention_mask")
            }
            for part in (rows[start : start + MEASURE_BATCH] for start in range(0, count, MEASURE_BATCH))
        ]
