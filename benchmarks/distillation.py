"""What distilling MiniLM-L6 costs: tokens/s of each stage, with and without the cache, in one process and in two.

    python benchmarks/distillation.py

Runs `inhibitor distill` on a fixed set of blocks of Python's own documentation, twice over, then times the bare step of
the same objective beside the trainer's. Writes results/distillation.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModel

from inhibitor import convert
from inhibitor.bench.machine import machine
from inhibitor.distill.recipe import FullStage, JointStage
from inhibitor.distill.rows import Rows
from inhibitor.distill.stages import Objective, train
from inhibitor.distill.teacher import Teacher
from inhibitor.models.attention import TEACHER
from inhibitor.models.loading import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
BLOCKS, LENGTH, BATCH, EPOCHS = 512, 64, 32, 2
STAGES: dict[str, dict[str, str]] = {
    "layerwise": {"kind": "layerwise"},
    "layerwise, fed by the teacher": {"kind": "layerwise", "inputs": "teacher"},
    "joint": {"kind": "joint"},
    "full": {"kind": "full"},
}
STEPS = 16  # of the comparison with a bare loop
PAIRS = 3


def recipe(folder: Path, text: Path, *, cache: bool, processes: int) -> dict[str, Any]:
    """Every stage on the same blocks, twice over."""
    stage = {"tokens": BLOCKS * LENGTH * EPOCHS, "batch_size": BATCH // processes, "bf16": True, "checkpoints": 2}
    return {
        "teacher": "minilm",
        "output": str(folder / f"run-{processes}-{'cached' if cache else 'plain'}"),
        "text": {"files": [str(text)], "max_length": LENGTH, "blocks": BLOCKS},
        "cache": str(folder / f"cache-{processes}") if cache else None,
        "stages": [{**kind, **stage} for kind in STAGES.values()],
        "validation_sequences": 16,
    }


def run(values: dict[str, Any], processes: int) -> dict[str, Any]:
    """One distillation, as a user starts it; tokens/s of its stages and what its checkpoints cost."""
    file = Path(values["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    started = time.perf_counter()
    command = [sys.executable, *launcher, "-m", "inhibitor", "distill", str(file)]
    subprocess.run(command, check=True, env={**os.environ, **threads})  # noqa: S603 - our own command
    seconds = time.perf_counter() - started
    metrics = json.loads((Path(values["output"]) / "metrics.json").read_text())
    found: dict[str, Any] = {"seconds in all": round(seconds, 1)}
    for name, stage in zip(STAGES, metrics["stages"], strict=True):
        saves = stage["checkpoints"]
        found[name] = {
            "tokens_per_second": round(stage["tokens"] / stage["seconds"]),
            "seconds a checkpoint": round(saves["seconds"] / saves["count"], 3),
            "share of checkpoints": round(saves["seconds"] / (stage["seconds"] + saves["seconds"]), 3),
        }
    return found


def overhead() -> dict[str, float]:
    """Time of a step by the trainer ÷ time of the bare step, medians of pairs taken in turn."""
    teacher = Teacher(load_pretrained(AutoModel, "minilm", attn_implementation=TEACHER, dtype=torch.float32))
    layers = {layer: layer for layer in range(6)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (STEPS * BATCH, LENGTH), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    fixed = Rows(rows, lambda chosen: {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}, LENGTH)
    found: dict[str, float] = {}
    for stage in (JointStage(tokens=ids.numel(), batch_size=BATCH), FullStage(tokens=ids.numel(), batch_size=BATCH)):
        student = convert(load_pretrained(AutoModel, "minilm", dtype=torch.float32))
        objective = Objective(student, teacher, stage, layers)
        ratios = []
        for _ in range(PAIRS):
            bare = bare_loop(objective, fixed)
            with tempfile.TemporaryDirectory() as folder:
                trainer = train(objective, fixed, seed=0, folder=Path(folder), title=f"overhead, {stage.kind}")
            ratios.append(trainer.trained_seconds / bare)
        found[stage.kind] = round(statistics.median(ratios), 3)
    return found


def bare_loop(objective: Objective, rows: Rows) -> float:
    """Seconds of as many steps as the trainer takes, without it."""
    objective.unfreeze()
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    batches = [rows.collate(rows.dataset[start : start + BATCH]) for start in range(0, len(rows.dataset), BATCH)]
    started = time.perf_counter()
    for batch in batches:
        objective(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print, write."""
    results: dict[str, Any] = {"machine": machine(), "model": "MiniLM-L6", "blocks": BLOCKS, "length": LENGTH}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "python-docs.txt"
        subprocess.run([sys.executable, str(ROOT / "examples" / "python_docs_text.py"), str(text)], check=True)  # noqa: S603
        for processes, cache in ((1, False), (1, True), (2, False)):
            key = f"{processes} process{'es' * (processes > 1)}, {'cached' if cache else 'without cache'}"
            values = recipe(folder, text, cache=cache, processes=processes)
            results[key] = run(values, processes)
            print(key, json.dumps(results[key]), flush=True)
    results["trainer ÷ bare step"] = overhead()
    print("trainer ÷ bare step", results["trainer ÷ bare step"])
    path = ROOT / "results" / "distillation.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
