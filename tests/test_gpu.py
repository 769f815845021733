"""What `make gpu` runs, on tiny shapes and under Triton's interpreter: the way is open, limits hold, pieces fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'inhibitor-attention[triton]'")
ROOT = Path(__file__).parent.parent


def run(output, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "gpu" / "run.py", "--device", "cpu", "--output", output, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        check=False,
    )


def test_every_part_leaves_its_results(tmp_path):
    result = run(tmp_path, "--parts", "tests", "attention", "training", "--minutes", "12")
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert result.returncode == 0, logs
    done = json.loads((tmp_path / "parts.json").read_text())
    assert [state["code"] for state in done.values()] == [0, 0, 0]
    attention = json.loads((tmp_path / "attention.json").read_text())["lines"]
    assert {line["name"] for line in attention} >= {"Triton float32", "Triton bfloat16", "SDPA float32, math"}
    assert {line["name"] for line in attention if "forward and backward" not in line} == {"Triton int8"}
    assert all(line["forward"]["ms"] > 0 for line in attention)
    assert (tmp_path / "attention.png").stat().st_size > 1000
    training = json.loads((tmp_path / "training.json").read_text())["lines"]
    assert [line["task"] for line in training] == ["fine-tuning", "E1"]
    assert all(line["inhibitor"]["tokens per second"] > 0 for line in training)


def test_a_part_is_stopped_at_its_limit_and_the_next_has_no_time(tmp_path):
    result = run(tmp_path, "--parts", "attention", "training", "--minutes", "0.05")
    done = json.loads((tmp_path / "parts.json").read_text())
    assert done["attention"]["stopped at its limit"] is True
    assert done["training"] == "no time left"
    assert result.returncode != 0
    assert "training" in result.stderr


def test_pieces_are_the_archive_cut_up(tmp_path):
    archive, pieces = tmp_path / "all.tar", tmp_path / "pieces"
    archive.write_bytes(os.urandom(1000))
    pieces.mkdir()
    program = "import sys; sys.path.insert(0, 'gpu'); import pack; from pathlib import Path; pack.PIECE = 300; "
    program += f"pack.split(Path({str(archive)!r}), Path({str(pieces)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)
    parts = sorted(pieces.glob("piece-*"))
    assert [part.stat().st_size for part in parts] == [300, 300, 300, 100]
    assert b"".join(part.read_bytes() for part in parts) == archive.read_bytes()
    check = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=pieces, capture_output=True, check=False)
    assert check.returncode == 0
