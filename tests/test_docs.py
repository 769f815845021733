"""The documentation runs, every Python block, every docstring example that needs no model; its scores are the runs'."""

import doctest
import importlib
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inhibitor.distill.recipe import DistillConfig
from inhibitor.report.tables import number
from inhibitor.reproduce import accuracy
from inhibitor.reproduce.tables import LABELS, columns, overall

ROOT = Path(__file__).parent.parent
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]
EXPERIMENTS = {"teacher (softmax)": "e0"} | {label: experiment for experiment, label in LABELS.items()}
EXAMPLES = (
    "inhibitor.bench.count",
    "inhibitor.models.convert",
    "inhibitor.ops.attention",
    "inhibitor.ops.backends",
    "inhibitor.ops.cpu",
    "inhibitor.quantization.calibrate",
    "inhibitor.quantization.quantize",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    program = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_recipes_in_the_documentation_are_valid():
    page = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        DistillConfig.parse(yaml.safe_load(block))


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("page", "place", "records"),
    [
        ("README.md", 0, "results/accuracy.jsonl"),
        ("results/README.md", 0, "results/accuracy.jsonl"),
        ("results/README.md", 1, "results/curve/without-reach.jsonl"),
    ],
)
def test_scores_are_those_of_the_runs(page, place, records):
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = re.findall(r"^\| task \|.* teacher \(softmax\) \|.*(?:\n\|.*)+", text, flags=re.MULTILINE)
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables[place].splitlines())
    by_name = {column.name: column for column in columns(accuracy.read(ROOT / records))}
    every = [by_name[row[0]] for row in rows if row[0] in by_name]
    assert len(every) >= 5
    for row in rows:
        tasks = every if row[0] == "mean" else [by_name[row[0].removesuffix(", apart")]]
        experiment = ""
        for name, cell in zip(header, row, strict=True):
            experiment = EXPERIMENTS.get(name, experiment)
            if cell == "" or experiment == "":
                continue
            scores = [task.scores(experiment) for task in tasks]
            if cell == "–":
                assert not all(scores), f"{name} of {row[0]} is known"
            elif name == "kept":
                pairs = [pair for task in tasks if (pair := task.of_teacher(experiment)) is not None]
                assert cell == f"{overall(pairs):.1f} %", f"{experiment} of {row[0]}"
            else:
                mean = scores[0] if len(tasks) == 1 else statistics.fmean(map(statistics.fmean, scores))
                assert cell == number(mean, 1), f"{name} of {row[0]}"
