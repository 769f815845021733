"""Test input: run folders with invented but plausible metrics. None of these numbers was measured."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
TEXT = "the quick brown fox jumps over the lazy dog because it wants to reach the other side of the river"


def distill(*, layers: int = 6, heads: int = 12, words: int = 20, seed: int = 0) -> dict[str, Any]:
    """Metrics of a distillation in two stages."""
    rng = random.Random(seed)
    errors = {"converted": (0.59, 0.48), "calibrated": (0.37, 0.30), "layerwise": (0.157, 0.12), "full": (0.17, 0.04)}
    tokens = ["[CLS]", *[TEXT.split()[i % 19] for i in range(words - 2)], "[SEP]"]
    return {
        "kind": "distill",
        "teacher": TEACHER,
        "student": {"family": "bert", "layers": list(range(layers)), "heads": heads},
        "seed": seed,
        "states": [
            {
                "name": name,
                "context_error": [context * rng.uniform(0.7, 1.4) for _ in range(layers)],
                "hidden_error": [hidden * (0.5 + layer / layers) * rng.uniform(0.9, 1.1) for layer in range(layers)],
            }
            for name, (context, hidden) in errors.items()
        ],
        "stages": [
            _stage("layerwise", [layer for layer in range(layers) for _ in range(60)], rng),
            _stage("full", [None] * 300, rng),
        ],
        "parameters": {
            "calibrated": _parameters(layers, heads, rng, spread=0.02),
            "full": _parameters(layers, heads, rng, spread=0.15),
        },
        "attention": {
            "text": TEXT,
            "tokens": tokens,
            "layer": layers // 2,
            "head": 3,
            **_attention(len(tokens), rng),
        },
    }


def traced(*, layers: int = 6, seed: int = 0, **options: Any) -> dict[str, Any]:
    """``distill`` as it is written now: with gradient norms, traces, heads, positions, losses, checkpoints and energy.

    Each layer's unit counts its steps from one and traces that layer; the full stage traces all.
    """
    rng = random.Random(seed)
    metrics = distill(layers=layers, seed=seed, **options)
    for stage, loss in zip(metrics["stages"], ("context", "hidden_states"), strict=True):
        stage |= {"kind": stage["name"], "losses": {loss: 1.0}, "checkpoints": {"count": 5, "seconds": 2.5}}
        first: dict[int | None, int] = {}
        for entry in stage["history"]:
            layer = entry["layer"]
            entry["step"] -= first.setdefault(layer, entry["step"]) - 10
            entry |= {"grad_norm": entry["loss"] * rng.lognormvariate(0, 0.3), "learning_rate": 5e-4}
            entry["traces"] = _traces(range(layers) if layer is None else [layer], entry["loss"], rng)
    heads = len(metrics["parameters"]["full"]["gamma"][0])
    for state in metrics["states"]:
        state |= _diagnosis(layers, heads, rng)
    return {**metrics, "energy": {"joules": None, "reason": "zeus is not installed"}}


def finetune(
    task: str = "sst2", *, model: str = TEACHER, attention: str = "softmax", score: float = 0.909, seed: int = 0
) -> dict[str, Any]:
    """Metrics of fine-tuning for three epochs."""
    rng = random.Random(f"{task}{model}{seed}")
    return {
        "kind": "finetune",
        "task": task,
        "model": model,
        "attention": attention,
        "seed": seed,
        "scores": {"validation": {"accuracy": score, "f1": score + 0.01}},
        "headline": score,
        "rows": {"train": 67349, "validation": 872},
        "history": [
            {"step": 100 * step, "loss": 0.65 * math.exp(-step / 20) + 0.12 + rng.uniform(-0.04, 0.04)}
            for step in range(1, 64)
        ],
        "evaluations": [
            {"epoch": epoch, "scores": {"validation": {"accuracy": score - 0.012 * (3 - epoch), "f1": score}}}
            for epoch in (1, 2, 3)
        ],
        "seconds": 640.0,
        "tokens_per_second": 9100.0,
    }


def distill_on(
    task: str = "rte", *, teacher: str, scores: Sequence[float] = (0.5, 0.55, 0.6), taught: float = 0.625, seed: int = 0
) -> dict[str, Any]:
    """Metrics of a distillation on a task: what each state of the student scores, and its teacher."""
    metrics = distill(layers=2, heads=2, words=6, seed=seed)
    names = ("converted", "calibrated", "task")
    states = [
        {**state, "name": name, "scores": {"validation": {"accuracy": score}}}
        for name, score, state in zip(names, scores, metrics["states"], strict=False)
    ]
    return {
        **metrics,
        "teacher": teacher,
        "task": task,
        "states": states,
        "stages": [],
        "parameters": {},
        "attention": None,
        "teacher_scores": {"validation": {"accuracy": taught}},
        "rows": {"train": 2490, "validation": 277},
        "truncated": {"train": 30, "validation": 4},
    }


def quantize(
    task: str = "sst2", *, model: str = "runs/e1/model", before: float = 0.894, after: float = 0.889, seed: int = 0
) -> dict[str, Any]:
    """Metrics of turning a student of two layers into integers; its second layer's linear layers cost most."""
    rng = random.Random(f"{task}{model}{seed}")
    names = ["embeddings", *(f"layer {layer}, {kind}" for layer in range(2) for kind in ("attention", "linear"))]
    parts = [{"part": name, "score": before - 0.001 * cost, "sqnr": 40.0 - 3 * cost} for cost, name in enumerate(names)]
    return {
        "kind": "quantize",
        "task": task,
        "model": model,
        "seed": seed,
        "int8": {"attention": 8, "linear": "int8", "embeddings": "int8"},
        "scores": {"validation": {"accuracy": after, "f1": after + 0.01}},
        "headline": after,
        "scores_before": {"validation": {"accuracy": before, "f1": before + 0.01}},
        "headline_before": before,
        "sqnr": 24.3,
        "bytes": {"before": 90_857_096, "after": 23_543_880},
        "latency": [
            {
                "batch": batch,
                "length": 128,
                "before": {"median": 0.03 * batch, "spread": 0.001 * rng.uniform(1, 2)},
                "after": {"median": 0.018 * batch, "spread": 0.002},
                "ratio": ratio,
            }
            for batch, ratio in ((1, 0.62), (8, 0.58))
        ],
        "parts": parts,
        "clipped": [{"layer": layer, "query_key": 0.002 * (layer + 1), "value": 0.0} for layer in range(2)],
        "machine": {"cpu": "Processor <1>", "threads": 2, "torch": "2.13.0"},
        "rows": {"train": 67349, "validation": 872},
    }


def write(folder: Path, metrics: dict[str, Any], config: str = "") -> Path:
    """A run folder that holds ``metrics``."""
    folder.mkdir(parents=True)
    config = config or f"kind: {metrics['kind']}\nseed: {metrics['seed']}\n"
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps({"python": "3.12.1", "torch": "2.10.0"}), encoding="utf-8")
    return folder


def experiment(root: Path, *, tasks: tuple[str, ...] = ("sst2", "mrpc"), seeds: int = 1, **options: Any) -> list[Path]:
    """A distillation with the fine-tuned teacher and two fine-tuned states of the student."""
    runs = [write(root / "e1", distill(**options))]
    for task in tasks:
        for seed in range(seeds):
            shift = 0.003 * seed - 0.02 * tasks.index(task)
            for name, model, attention, score in (
                ("teacher", TEACHER, "softmax", 0.909),
                ("calibrated", str(root / "e1/stages/calibrated"), "inhibitor", 0.861),
                ("student", str(root / "e1/model"), "inhibitor", 0.894),
            ):
                metrics = finetune(task, model=model, attention=attention, score=score + shift, seed=seed)
                runs.append(write(root / f"{task}-{name}-{seed}", metrics))
    return runs


def taught(root: Path, task: str = "rte", seeds: Sequence[int] = (0, 1)) -> list[Path]:
    """A grid's distillations on a task, each seed taught by a run of its own, which is not written."""
    runs = []
    for seed in seeds:
        teacher = f"{root.name}/e0/{task}/seed-{seed}/model"
        metrics = distill_on(task, teacher=teacher, scores=(0.5, 0.55, 0.6 + 0.02 * seed), seed=seed)
        folder = root / "e2" / task / f"seed-{seed}"
        runs.append(write(folder, metrics, f"teacher: {teacher}\noutput: {folder}\nseed: {seed}\n"))
    return runs


def _stage(name: str, layers: list[int | None] | list[int] | list[None], rng: random.Random) -> dict[str, Any]:
    history, begun = [], dict[int | None, int]()
    for step, layer in enumerate(layers):
        age = begun[layer] = begun.get(layer, 0) + 1
        floor = 0.05 + 0.01 * (layer or 0)
        loss = (floor + 0.6 * math.exp(-age / 9)) * rng.uniform(0.93, 1.07)
        history.append({"step": 10 * (step + 1), "layer": layer, "loss": loss})
    return {"name": name, "tokens": 6_000_000, "seconds": 1800.0, "tokens_per_second": 3333.3, "history": history}


def _traces(layers: Sequence[int], loss: float, rng: random.Random) -> dict[str, Any]:
    values = {
        "context_error": loss,
        "inhibited": 0.3,
        "gamma": 0.8,
        "eta": 1.3,
        "delta": 1.1,
        "length_exponent": 0.5,
        "reach": 1.2,
    }
    drawn = {name: [value * rng.uniform(0.9, 1.1) for _ in layers] for name, value in values.items()}
    return {"layers": list(layers), **drawn}


def _diagnosis(layers: int, heads: int, rng: random.Random) -> dict[str, Any]:
    tops = {"context_error": 0.5, "output_error": 0.3, "inhibited": 1.0, "keys": 30.0, "teacher_keys": 40.0}
    first = [0, 1, 2, 4, 8, 16, 32]
    return {
        "heads": {
            name: [[top * rng.random() for _ in range(heads)] for _ in range(layers)] for name, top in tops.items()
        },
        "positions": {"first": first, "context_error": [[rng.random() for _ in first] for _ in range(layers)]},
    }


def _parameters(layers: int, heads: int, rng: random.Random, spread: float) -> dict[str, list[list[float]]]:
    centres = {"gamma": 0.75, "eta": 1.3, "delta": 1.2, "length_exponent": 0.55, "reach": 1.0}
    return {
        name: [[rng.gauss(centre + spread * layer / layers, spread) for _ in range(heads)] for layer in range(layers)]
        for name, centre in centres.items()
    }


def _attention(size: int, rng: random.Random) -> dict[str, list[list[float]]]:
    softmax, inhibition = [], []
    for query in range(size):
        scores = [rng.gauss(0, 0.8) + 2.5 * (key == query - 1) + 3.0 * (key == size - 1) for key in range(size)]
        total = sum(map(math.exp, scores))
        softmax.append([math.exp(score) / total for score in scores])
        mean = sum(scores) / size
        inhibition.append([max(0.0, 0.8 * (mean - score) + 1.1 + rng.gauss(0, 0.1)) for score in scores])
    return {"softmax": softmax, "inhibition": inhibition}
