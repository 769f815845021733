"""The documentation runs: every Python block, every docstring example that needs no model."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inhibitor.distill.recipe import DistillConfig

ROOT = Path(__file__).parent.parent
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in path.read_text()
]
EXAMPLES = (
    "inhibitor.bench.count",
    "inhibitor.models.convert",
    "inhibitor.ops.attention",
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
