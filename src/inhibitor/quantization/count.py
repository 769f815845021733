"""What ``inhibitor count`` says of a model: counts by formula, widths seen on text, energy by published tables."""

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from inhibitor.bench.count import FORMS, TABLES, Shape, attention, attention_energy, linear, linear_energy, widths
from inhibitor.data.labelled import load_task
from inhibitor.data.tasks import get_task
from inhibitor.errors import ConfigError
from inhibitor.models.attention import NAME, inhibitor_layers
from inhibitor.models.config import InhibitorConfig, Int8Config
from inhibitor.models.families import layer_modules, longest_input
from inhibitor.models.int8 import integer_layers
from inhibitor.models.loading import load_pretrained
from inhibitor.quantization.quantize import quantize
from inhibitor.quantization.seen import seen_widths

_CALLS = 5


def count(name: str, length: int) -> dict[str, Any]:
    """Count a model's operations, in each form of attention, whatever form it has.

    Args:
        name: A model folder, a hub id or ``"minilm"``.
        length: Tokens of the input.

    Returns:
        ``attention`` by form and ``linear``: operations per token; ``bits`` of the integer form at worst and, where the
        model has inhibitor attention, ``bits_seen`` on shipped reviews; ``energy`` of an input in microjoules, by
        table, part and form, a model; ``milliseconds`` of an input, measured.

    Raises:
        ModelError: The model cannot be loaded or quantised.
        ConfigError: It does not read so many tokens.
    """
    model = load_pretrained(AutoModel, name, dtype=torch.float32).eval()
    longest = longest_input(model) or length
    if not 1 <= length <= longest:
        raise ConfigError(
            "--length", expected=f"1 to {longest} tokens", got=str(length), remedy="Choose one that the model reads."
        )
    inputs = _text(name, length)
    milliseconds = _milliseconds(model, inputs)
    seen: dict[str, int] = {}
    if inhibitor_layers(model):
        if not integer_layers(model):
            quantize(model, Int8Config(linear="float", embeddings="float"), [inputs])
        seen = seen_widths(model, inputs)
    shape = _shape(model)
    return {
        "model": name,
        "length": length,
        "shape": asdict(shape),
        "attention": {form: asdict(attention(form, shape, length)) for form in FORMS},
        "linear": asdict(linear(shape) * shape.layers),
        "bits": widths(length, shape.head_dim, shape.reach),
        "bits_seen": seen,
        "energy": {table.name: _energy(shape, length, table) for table in TABLES},
        "sources": {table.name: table.source for table in TABLES},
        "milliseconds": milliseconds,
    }


def _shape(model: PreTrainedModel) -> Shape:
    config = model.config
    intermediate = getattr(config, "intermediate_size", None) or config.hidden_dim  # DistilBERT's name for it
    heads = config.num_attention_heads
    attention = InhibitorConfig.parse(getattr(config, NAME, {}), source=NAME)  # of a softmax model, what it would get
    sizes = len(layer_modules(model)), heads, config.hidden_size // heads, intermediate
    return Shape(*sizes, attention.reach is not None, attention.query_gain)


def _energy(shape: Shape, length: int, table: Any) -> dict[str, dict[str, float]]:
    """Microjoules of an input, by part and form; an integer form has integer linear layers."""
    attended = {form: attention_energy(form, shape, length, table) * length / 1e6 for form in FORMS}
    layers = {form: linear_energy(shape, table, int8=form.endswith("int8")) * length / 1e6 for form in FORMS}
    return {"attention": attended, "linear layers": layers}


def _text(name: str, length: int) -> dict[str, Tensor]:
    """As many tokens of the shipped reviews."""
    tokenizer = load_pretrained(AutoTokenizer, name)
    task = get_task("reviews")
    texts = load_task(task, splits=("train",)).splits["train"].rows[task.texts[0]]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return {"input_ids": torch.tensor([(ids * -(-length // len(ids)))[:length]])}


@torch.inference_mode()
def _milliseconds(model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    model(**inputs)
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        model(**inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
