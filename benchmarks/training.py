"""Tokens a second of fine-tuning and of both E1 stages: teacher, student before (PyTorch backend) and now (native).

    python benchmarks/training.py

One step is forward, backward and AdamW on MiniLM-L6; all variants take their steps in turn in one process, and the
figures are medians. The teacher is timed as it is fine-tuned, with attention dropout, which PyTorch's fast softmax
attention does not have on a CPU, and without. Writes results/training.json.
"""

import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from inhibitor import InhibitorConfig, convert
from inhibitor.bench.machine import machine
from inhibitor.distill.recipe import AnyStage, FullStage, JointStage, LayerwiseStage
from inhibitor.distill.stages import Objective
from inhibitor.distill.teacher import Teacher
from inhibitor.models.attention import TEACHER
from inhibitor.models.loading import load_pretrained
from inhibitor.ops import cpu

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((16, 128), (32, 64), (4, 512))  # batch, length
ROUNDS = 9
SLOW = "student, PyTorch backend"
SLOW_ROUNDS = 2


@contextmanager
def pytorch_backend() -> Iterator[None]:
    """As if the package had been installed without its native kernels."""
    cpu.INSTALLED, installed = False, cpu.INSTALLED
    try:
        yield
    finally:
        cpu.INSTALLED = installed


def batch(size: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens; a quarter of the rows' ends is padding, as in a fine-tuning batch."""
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(length // 2, length + 1, (size,), generator=generator)
    return {
        "input_ids": torch.randint(1000, 20000, (size, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths.unsqueeze(1)).long(),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }


def stepper(model: nn.Module, inputs: dict[str, torch.Tensor], bf16: bool) -> Callable[[], float]:
    """One optimizer step; returns its loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**inputs)
        loss = output["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(steps: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of every step, taken in turn; then, by itself, the PyTorch backend, which would disturb the others."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def take(name: str) -> float:
        start = time.perf_counter()
        loss = steps[name]()
        if loss != loss:
            raise ArithmeticError(f"{name}: the loss is not a number")
        return time.perf_counter() - start

    fast = [name for name in steps if name != SLOW]
    for _ in range(2):  # not counted
        for name in fast:
            take(name)
    for _ in range(ROUNDS):
        for name in fast:
            times[name].append(take(name))
    with pytorch_backend():
        times[SLOW] = [take(SLOW) for _ in range(SLOW_ROUNDS + 1)][1:]
    return times


def report(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Medians; a ratio is the median of those of one round's steps."""
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        found[name] = {"ms": round(1000 * middle, 1), "tokens_per_second": round(tokens / middle)}
        for other in times:
            if other.startswith("teacher") and name == "student":
                pairs = [a / b for a, b in zip(seconds, times[other], strict=False)]
                found[name][f"ratio to {other}"] = round(statistics.median(pairs), 3)
    return found


def main() -> None:
    """Measure, print, write."""
    warnings.simplefilter("ignore")  # the slow way is meant
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, Any] = {"machine": machine(), "model": "MiniLM-L6", "fine-tuning": {}, "E1": {}}
    classifier = load_pretrained(AutoModelForSequenceClassification, "minilm", num_labels=2)
    encoder = load_pretrained(AutoModel, "minilm", attn_implementation=TEACHER)
    config = InhibitorConfig(per="head")
    no_dropout = load_pretrained(
        AutoModelForSequenceClassification, "minilm", num_labels=2, attention_probs_dropout_prob=0.0
    )
    for size, length in SHAPES:
        inputs = batch(size, length)
        tokens = size * length
        for bf16 in (False, True):
            models = {
                "teacher": copy.deepcopy(classifier),
                "teacher without attention dropout": copy.deepcopy(no_dropout),
                "student": convert(copy.deepcopy(classifier), config),
                SLOW: convert(copy.deepcopy(classifier), config),
            }
            steps = {name: stepper(model.train(), inputs, bf16) for name, model in models.items()}
            key = f"{size}x{length} {'bfloat16 linear layers' if bf16 else 'float32'}"
            results["fine-tuning"][key] = report(measure(steps), tokens)
            print("fine-tuning", key, json.dumps(results["fine-tuning"][key]), flush=True)
    size, length = 32, 64
    inputs = {name: tensor for name, tensor in batch(size, length).items() if name != "labels"}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # packed text
    stages: dict[str, tuple[AnyStage, int | None]] = {
        "layer-wise, last layer": (LayerwiseStage(tokens=1), 5),
        "joint": (JointStage(tokens=1), None),
        "full": (FullStage(tokens=1), None),
    }
    layers = {layer: layer for layer in range(encoder.config.num_hidden_layers)}
    for name, (stage, layer) in stages.items():
        steps = {}
        for variant in ("student", SLOW):
            student = convert(load_pretrained(AutoModel, "minilm"), config)
            objective = Objective(student, Teacher(encoder), stage, layers, layer)
            objective.unfreeze()
            steps[variant] = stepper(objective, inputs, True)
        results["E1"][f"{name} {size}x{length}"] = report(measure(steps), size * length)
        print("E1", name, json.dumps(results["E1"][f"{name} {size}x{length}"]), flush=True)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (ROOT / "results" / "training.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
