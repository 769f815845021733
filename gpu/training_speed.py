"""Tokens a second at DistilBERT's size: fine-tuning and E1, inhibitor beside softmax, bfloat16.

    python gpu/training_speed.py --output results/gpu/training.json

A step is forward, backward and AdamW. In E1 the frozen softmax teacher runs too, and the loss is the squared error of
every hidden state. The file is written after every figure.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meter import Gauge
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from inhibitor import InhibitorConfig, convert

SHAPES = ((64, 128), (32, 256), (16, 512))  # batch, length
TINY = ((1, 4),)
SECONDS = 2.0


def model(device: torch.device) -> nn.Module:
    """DistilBERT with random weights, without dropout; two thin layers on the CPU."""
    size = {} if device.type != "cpu" else {"n_layers": 2, "dim": 8, "n_heads": 2, "hidden_dim": 16, "vocab_size": 99}
    torch.manual_seed(0)
    config = DistilBertConfig(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=2, **size)
    made: nn.Module = DistilBertForSequenceClassification(config).to(device)
    return made


def stepper(student: nn.Module, loss: Callable[[nn.Module], Tensor], device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            found = loss(student)
        torch.autograd.backward(found)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("results/gpu/training.json"))
    given = parser.parse_args()
    device = torch.device(given.device)
    gauge = Gauge(device)
    results: dict[str, Any] = {"device": gauge.describe(), "lines": []}
    softmax = model(device)
    students = {"softmax": softmax, "inhibitor": convert(copy.deepcopy(softmax), InhibitorConfig(per="head"))}
    teacher = copy.deepcopy(softmax).eval().requires_grad_(False)
    for batch, length in TINY if device.type == "cpu" else SHAPES:
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(5, 99 if device.type == "cpu" else 20000, (batch, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": (torch.arange(length) < lengths).long()}
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        labels = torch.randint(0, 2, (batch,), generator=generator).to(device)

        def fine_tuning(student: nn.Module, inputs: Any = inputs, labels: Tensor = labels) -> Tensor:
            found: Tensor = student(**inputs, labels=labels).loss
            return found

        def e1(student: nn.Module, inputs: Any = inputs) -> Tensor:
            with torch.no_grad():
                wanted = teacher(**inputs, output_hidden_states=True).hidden_states
            states = student(**inputs, output_hidden_states=True).hidden_states
            return torch.stack([mse_loss(a.float(), b.float()) for a, b in zip(states, wanted, strict=True)]).sum()

        for task, loss in (("fine-tuning", fine_tuning), ("E1", e1)):
            line: dict[str, Any] = {"task": task, "batch": batch, "length": length}
            for name, student in students.items():
                step = stepper(copy.deepcopy(student).train(), loss, device)
                line[name] = gauge.measure(step, SECONDS if device.type != "cpu" else 0.0)
                line[name]["tokens per second"] = batch * length / (line[name]["ms"] / 1000)
            line["inhibitor ÷ softmax"] = line["softmax"]["ms"] / line["inhibitor"]["ms"]
            results["lines"].append(line)
            print(json.dumps(line, ensure_ascii=False), flush=True)
            text = json.dumps(results, indent=2, ensure_ascii=False)
            given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
