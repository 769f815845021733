"""``inhibitor bench attention`` as a user meets it."""

import json

import pytest
import torch

from inhibitor.bench import attention
from inhibitor.bench.implementations import implementations

TINY = "1x1x8x8,1x1x16x8+masks,1x1x1:16x8"


def test_it_prints_tables_and_writes_results_and_a_picture(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    output = tmp_path / "deep" / "speed.json"
    status, out, _ = cli("bench", "attention", "--quick", "--shapes", TINY, "--output", output, "--limit", "100")
    assert status == 0
    for words in ("forward + backward", "work under a mask", "the cost of a call", "SDPA bfloat16", "Pairs with Z > 0"):
        assert words in out
    for implementation in implementations():
        assert implementation.name in out
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {"machine", "instruction_sets", "settings", "baseline", "measurements", "skipped"} == found.keys()
    assert {m["shape"] for m in found["measurements"]} == set(TINY.split(","))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["speed.json", "speed.png"]


def test_one_query_has_no_picture(cli, tmp_path):
    status, out, _ = cli("bench", "attention", "--quick", "--shapes", "1x1x1:16x8", "--output", tmp_path / "x.json")
    assert status == 0
    assert "Picture" not in out
    assert not (tmp_path / "x.png").exists()


def test_a_wrong_result_is_one_sentence_and_writes_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(attention.Sample, "_truth", lambda *_: {"result": torch.ones(1, 1, 8, 8, dtype=torch.float64)})
    status, _, err = cli("bench", "attention", "--quick", "--shapes", "1x1x8x8", "--output", tmp_path / "x.json")
    assert status == 2
    assert "expected a result within" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--shapes 8x8", "shape '8x8': expected BATCHxHEADSxLENGTHxHEAD_DIM"),
        ("--shapes 1x1x8x8,", "shape ''"),
        ("--threads 0", "bench attention: threads"),
        ("--limit -1", "bench attention: limit"),
        ("--time-limit 0", "bench attention: time_limit"),
        ("--output {tmp}/x.txt", "ends in .json"),
        ("--output {tmp}", "ends in .json"),
        ("--threads two", "Invalid value"),
        ("--treads 2", "No such option"),
    ],
)
def test_mistakes_end_in_one_sentence(cli, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(attention, "run", lambda *_: pytest.fail("ran"))
    status, _, err = cli("bench", "attention", *arguments.format(tmp=tmp_path).split())
    assert status == 2
    assert words in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named_before_anything_is_measured(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "run", lambda *_: pytest.fail("ran"))
    (tmp_path / "letter").write_text("dear")
    status, _, err = cli("bench", "attention", "--quick", "--output", tmp_path / "letter" / "x.json")
    assert status == 2
    assert err == f"inhibitor: {tmp_path / 'letter'}: File exists\n"
    assert (tmp_path / "letter").read_text() == "dear"


def test_an_unknown_benchmark_is_refused(cli):
    status, _, err = cli("bench", "atention")
    assert status == 2
    assert "No such command" in err
