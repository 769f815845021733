"""What each choice in recipes/e1.yaml buys: its joint stage with one choice changed at a time, on the same few tokens.

    python benchmarks/ablation.py ../shared/data runs/ablation
    python benchmarks/ablation.py ../shared/data runs/ablation "as in" heard gain neither  # parts of their names

Each variant is an `inhibitor distill` run of its own, in the given folder, and is taken up again where it stopped. All
are measured on the same held-out text, cut into blocks of each length: the error is that of hidden states, each model
fed by its own layers, mean of layers. Writes results/ablation.json, of all variants that the folder has.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from inhibitor.bench.machine import machine
from inhibitor.data.corpus import TextConfig, packed
from inhibitor.distill.measure import errors
from inhibitor.distill.rows import cutting
from inhibitor.distill.teacher import Teacher
from inhibitor.models.attention import TEACHER
from inhibitor.models.loading import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
TOKENS, STEP = 409_600, 512
LENGTHS = (8, 16, 64, 256)
MEASURED = 32  # rows of 256 tokens for each length
JOINT = {"kind": "joint", "learning_rate": 1e-3, "losses": {"output_relative": 1}}
LAYERWISE = {"kind": "layerwise", "learning_rate": 1e-3, "losses": {"output_relative": 1}}
INHIBITOR = {"center": False}
TEXT = {"max_length": 256, "min_length": 8}
SHORT = {"max_length": 64}

VARIANTS: dict[str, dict[str, Any]] = {
    "as in recipes/e1.yaml": {},
    "blocks of 64 tokens alone": {"text": SHORT},
    "blocks of 256 tokens alone": {"text": {"max_length": 256}},
    "contexts compared, not outputs": {"stage": {**JOINT, "losses": {"context_relative": 1}}},
    "squared, not relative errors": {"stage": {**JOINT, "losses": {"output_mse": 1}}},
    "γ, η, δ, ρ by layer, not by head": {"inhibitor": {"per": "layer"}},
    "keys in sight counted, not keys heard": {"inhibitor": {"reach": None}},
    "no gain of the query's own": {"inhibitor": {"query_gain": False}},
    "neither": {"inhibitor": {"reach": None, "query_gain": False}},
    "scores centred": {"inhibitor": {"center": True}},
    "scores centred, not calibrated first": {"inhibitor": {"center": True}, "calibration": None},
    "one layer after the other, fed by the student": {"stage": {**LAYERWISE, "inputs": "student"}},
    "one layer after the other, fed by the teacher": {"stage": {**LAYERWISE, "inputs": "teacher"}},
    "half the learning rate": {"stage": {**JOINT, "learning_rate": 5e-4}},
    "twice the text": {"tokens": 2 * TOKENS},
    "steps of 256 tokens": {"step": 256},
    "steps of 1,024 tokens": {"step": 1024},
    "steps of 2,048 tokens": {"step": 2048},
}


def recipe(files: list[str], output: Path, variant: dict[str, Any]) -> dict[str, Any]:
    """The joint stage of recipes/e1.yaml on fewer tokens, with what a variant changes."""
    text = variant.get("text", TEXT)
    stage = {
        **variant.get("stage", JOINT),
        "tokens": variant.get("tokens", TOKENS),
        "batch_size": variant.get("step", STEP) // text["max_length"],
    }
    return {
        "teacher": "minilm",
        "output": str(output),
        "text": {"files": files, **text},
        "inhibitor": {**INHIBITOR, **variant.get("inhibitor", {})},
        "calibration": variant.get("calibration", {"lengths": [16, 64]}),
        "stages": [stage],
        "validation_sequences": 16,
    }


def measure(model: Path, teacher: Teacher, files: tuple[str, ...]) -> dict[str, float]:
    """The mean of layers' hidden errors at each length."""
    student, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    found = {}
    for length in LENGTHS:
        text = TextConfig(files=files, max_length=length)
        rows = list(packed(text, tokenizer, 1, held_out=True).take(MEASURED * 256 // length))
        batch = cutting(tokenizer)(rows)
        with torch.no_grad():
            hidden = errors(student, teacher, [batch], {layer: layer for layer in range(6)})["hidden_error"]
        found[str(length)] = round(sum(hidden) / len(hidden), 4)
    return found


def main(data: Path, folder: Path, wanted: list[str]) -> None:
    """Train each variant that is wanted, measure, print, write."""
    files = [str(data / name) for name in ("wikipedia/train.parquet", "imdb/unsupervised.parquet")]
    teacher = Teacher(load_pretrained(AutoModel, "minilm", attn_implementation=TEACHER, dtype=torch.float32))
    results: dict[str, Any] = {"machine": machine(), "model": "MiniLM-L6", "tokens": TOKENS, "hidden error": {}}
    for number, (name, variant) in enumerate(VARIANTS.items()):
        output = folder / str(number)
        if wanted and not any(part in name for part in wanted) and not (output / "model").is_dir():
            continue
        file = output.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe(files, output, variant)))
        subprocess.run([sys.executable, "-m", "inhibitor", "distill", str(file)], check=True)  # noqa: S603 - our own
        results["hidden error"][name] = measure(output / "model", teacher, tuple(files))
        print(f"{name:48}", results["hidden error"][name], flush=True)
        path = ROOT / "results" / "ablation.json"
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
