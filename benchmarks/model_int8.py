"""A whole DistilBERT-shaped model in int8 with inhibitor attention, beside what a softmax user would run instead.

    python benchmarks/model_int8.py
    python benchmarks/model_int8.py --shapes 1x128,8x128 --rounds 5

Every rival runs in this process, on the same threads, in turn; the figures are medians of the rounds and of their
ratios. What each says is checked first: against its own model in float32. Rivals whose packages are absent are named
as skipped (`pip install --group bench` brings them all). Weights are random, positions extended to 8192; times do not
depend on them. Writes results/model_int8.json and .png.
"""

import argparse
import copy
import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, PreTrainedModel

from inhibitor import InhibitorConfig, Int8Config, convert, quantize
from inhibitor.bench.machine import machine
from inhibitor.bench.timing import Contestant, calls_for, in_turn, median_and_spread, pairs
from inhibitor.errors import BenchmarkError
from inhibitor.models.int8_layers import Int8Linear
from inhibitor.report import to_rich
from inhibitor.report.look import labelled, limits, style, to_png
from inhibitor.report.tables import MISSING, Table, number

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "8x128,1x128,1x512,1x2048,1x8192"
OURS = "inhibitor int8, compiled"
SECONDS = 20.0  # of a rival's rounds at one shape, about
LARGEST_ERROR = 0.3  # of the hidden states of a random model, relative: int8 gives .01 to .1, a wrong model 1 and more

Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Rival:
    """A model to time: made for a shape, because some are compiled or exported for it."""

    name: str
    family: str  # softmax or inhibitor
    make: Callable[[Tensor], Call]
    needs: tuple[str, ...] = ()


def softmax_model() -> DistilBertModel:
    """The rivals' model: DistilBERT's shape, random weights, positions for 8192 tokens."""
    torch.manual_seed(0)
    return DistilBertModel(DistilBertConfig(max_position_embeddings=8192, attn_implementation="sdpa")).eval()


def states(model: PreTrainedModel) -> Call:
    """The model as a function from tokens to hidden states."""
    return lambda ids: model(input_ids=ids).last_hidden_state


def int8_linear(model: DistilBertModel) -> DistilBertModel:
    """Our linear layers under softmax attention: what only attention separates from ours."""
    for path, module in list(model.transformer.named_modules()):
        if isinstance(module, nn.Linear):
            made = Int8Linear(module.in_features, module.out_features, True)
            made.fill(module, torch.full((module.in_features,), 32.0), torch.tensor(128, dtype=torch.int32))
            model.transformer.set_submodule(path, made)
    return model


def dynamic(model: DistilBertModel, engine: str, ids: Tensor) -> Call:
    """PyTorch's own dynamic quantisation, by one of its engines."""
    torch.backends.quantized.engine = engine
    small = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
        copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
    )
    return states(small)


def compiled(model: PreTrainedModel, ids: Tensor) -> Call:
    """A model as ``torch.compile`` has it for the shape."""
    return states(torch.compile(model, dynamic=False))


def torchao(model: DistilBertModel, ids: Tensor) -> Call:
    """Int8 linear layers of torchao, compiled for the shape."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compiled(model, ids)


def exported(model: DistilBertModel, folder: Path, ids: Tensor) -> Path:
    """The model as an ONNX file for one shape."""
    path = folder / f"softmax-{ids.shape[0]}x{ids.shape[1]}.onnx"
    if not path.exists():
        torch.onnx.export(model, (ids,), path, input_names=["input_ids"], output_names=["states"], dynamo=True)
    return path


def onnx_runtime(model: DistilBertModel, folder: Path, ids: Tensor) -> Call:
    """ONNX Runtime with dynamic int8."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = exported(model, folder, ids)
    small = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, small, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    return lambda tokens: torch.from_numpy(session.run(["states"], {"input_ids": tokens.numpy()})[0])


def openvino(model: DistilBertModel, folder: Path, ids: Tensor) -> Call:
    """OpenVINO with int8 weights and activations by NNCF, calibrated on random tokens."""
    import nncf
    import openvino

    core = openvino.Core()
    graph = core.read_model(exported(model, folder, ids))
    generator = np.random.default_rng(0)
    samples = [generator.integers(0, 30000, tuple(ids.shape)) for _ in range(4)]
    quantized = nncf.quantize(graph, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
    compiled = core.compile_model(quantized, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda tokens: torch.from_numpy(compiled([tokens.numpy()])[0])


def rivals(folder: Path) -> list[Rival]:
    """Everything that is timed; models are made once, calls for each shape."""
    model = softmax_model()
    half = softmax_model().bfloat16()
    linear = int8_linear(softmax_model())
    student = convert(softmax_model(), InhibitorConfig(delta=1.0)).eval()
    batch = {"input_ids": torch.randint(0, 30000, (8, 128), generator=torch.Generator().manual_seed(1))}
    ours = quantize(copy.deepcopy(student), Int8Config(), [batch])
    narrow = quantize(copy.deepcopy(student), Int8Config(weights=7), [batch])
    onnx = ("onnx", "onnxscript")
    return [
        Rival(OURS, "inhibitor", partial(compiled, ours)),
        Rival("inhibitor int8", "inhibitor", lambda ids: states(ours)),
        Rival("inhibitor int8, weights of 7 bits, compiled", "inhibitor", partial(compiled, narrow)),
        Rival("inhibitor float32", "inhibitor", lambda ids: states(student)),
        Rival("softmax float32", "softmax", lambda ids: states(model)),
        Rival("softmax bfloat16", "softmax", lambda ids: states(half)),
        Rival("softmax, our int8 linear layers", "softmax", lambda ids: states(linear)),
        Rival("PyTorch dynamic int8 (x86)", "softmax", partial(dynamic, model, "x86")),
        Rival("PyTorch dynamic int8 (onednn)", "softmax", partial(dynamic, model, "onednn")),
        Rival("torchao int8, compiled", "softmax", partial(torchao, model), ("torchao",)),
        Rival("ONNX Runtime int8", "softmax", partial(onnx_runtime, model, folder), ("onnxruntime", *onnx)),
        Rival("OpenVINO int8", "softmax", partial(openvino, model, folder), ("openvino", "nncf", *onnx)),
    ]


def error(found: Tensor, true: Tensor) -> float:
    """Relative error of hidden states."""
    return float((found.float() - true).norm() / true.norm())


@torch.inference_mode()
def measure(shape: tuple[int, int], found: list[Rival], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Check and time all rivals at one shape."""
    batch, length = shape
    torch._dynamo.reset()
    ids = torch.randint(0, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
    truth = {rival.family: rival.make(ids)(ids) for rival in found if rival.name.endswith("float32")}
    contestants, errors, failed = [], {}, []
    for rival in found:
        try:
            call = rival.make(ids)
            errors[rival.name] = error(call(ids), truth[rival.family])
        except Exception as fault:  # a rival that fails is reported, not ours to mend
            if rival.family == "inhibitor":
                raise
            failed.append(
                f"{rival.name} at {batch}x{length}: {type(fault).__name__}: {str(fault).splitlines()[0][:120]}"
            )
            continue
        if not errors[rival.name] < LARGEST_ERROR:
            raise BenchmarkError(
                rival.name,
                expected=f"hidden states within {LARGEST_ERROR} of float32's",
                got=f"{errors[rival.name]:.3g}",
                remedy="It is not timed.",
            )
        once = in_turn([Contestant("", partial(call, ids), nullcontext, 1, 1)], lambda total: None)[""][0]
        turns = max(3, min(rounds, int(SECONDS / once)))
        contestants.append(
            Contestant(rival.name, partial(call, ids), nullcontext, turns, calls_for(once), warm_up=once < 1)
        )
    times = in_turn(contestants, lambda total: None)
    results = []
    for name, seconds in times.items():
        median, spread = median_and_spread(list(seconds.values()))
        ratio, _ = median_and_spread([ours / theirs for ours, theirs in pairs(times[OURS], seconds)])
        results.append(
            {
                "batch": batch,
                "length": length,
                "name": name,
                "milliseconds": 1e3 * median,
                "spread": 1e3 * spread,
                "ours_divided_by_it": ratio,
                "error": errors[name],
                "rounds": len(seconds),
            }
        )
    return results, failed


def table(results: list[dict[str, Any]]) -> Table:
    """Milliseconds by shape, and ours as a share of each."""
    shapes = list(dict.fromkeys((entry["batch"], entry["length"]) for entry in results))
    by = {(entry["name"], entry["batch"], entry["length"]): entry for entry in results}
    rows = []
    for name in dict.fromkeys(entry["name"] for entry in results):
        cells = []
        for shape in shapes:
            entry = by.get((name, *shape))
            cells.append(MISSING if entry is None else number(entry["milliseconds"]))
            cells.append(MISSING if entry is None else number(entry["ours_divided_by_it"], 2))
        rows.append([name, *cells])
    columns = ["", *(text for batch, length in shapes for text in (f"{batch}×{length}, ms", "ours ÷"))]
    return Table("DistilBERT's shape, one forward pass", columns, rows)


def figure(results: list[dict[str, Any]]) -> Figure:
    """Time against length at batch 1."""
    with style():
        drawn = Figure(figsize=(9, 4.5))
        axis = drawn.subplots()
        axis.set_prop_cycle(color=[*TABLEAU_COLORS, "black"])
        shown = [entry for entry in results if entry["batch"] == 1]
        for name in dict.fromkeys(entry["name"] for entry in shown):
            points = sorted((entry["length"], entry["milliseconds"]) for entry in shown if entry["name"] == name)
            line, width, marker = ("-", 2.5, "o") if name.startswith("inhibitor") else ("--", 1.2, "s")
            axis.plot(*zip(*points, strict=True), line, linewidth=width, marker=marker, label=name)
        lengths = sorted({entry["length"] for entry in shown})
        labelled(axis, "DistilBERT's shape, batch 1", "tokens", "milliseconds")
        limits(axis, [entry["milliseconds"] for entry in shown])
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        drawn.legend(loc="outside right upper")
        return drawn


def main() -> None:
    """Measure, print, write after every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="BATCHxLENGTH, parted by commas")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rivals", default="", help="names to keep, parted by commas, each in part; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "model_int8.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    wanted = [name for name in arguments.rivals.split(",") if name]
    results: dict[str, Any] = {"machine": machine(), "skipped": [], "measurements": []}
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for rival in rivals(Path(folder)):
            missing = [package for package in rival.needs if find_spec(package) is None]
            if missing:
                results["skipped"].append(f"{rival.name}: {missing[0]} is not installed")
            elif not wanted or rival.family == "inhibitor" or any(name in rival.name for name in (*wanted, "float32")):
                found.append(rival)
        for shape in arguments.shapes.split(","):
            batch, length = (int(part) for part in shape.split("x"))
            measured, failed = measure((batch, length), found, arguments.rounds)
            results["measurements"] += measured
            results["skipped"] += failed
            gc.collect()
            Console().print(to_rich(table(measured)))
            arguments.output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".png").write_bytes(to_png(figure(results["measurements"])))
    Console().print(to_rich(table(results["measurements"])), *results["skipped"], sep="\n")


if __name__ == "__main__":
    main()
