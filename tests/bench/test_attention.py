"""The benchmark end to end on tiny shapes: what it holds, what it skips and says so, what stops it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from inhibitor.bench import attention
from inhibitor.bench.attention import AttentionBench, run
from inhibitor.bench.implementations import BASELINE, implementations
from inhibitor.bench.shapes import FULL, QUICK
from inhibitor.errors import BenchmarkError, ConfigError
from inhibitor.ops import cpu

NAMES = [implementation.name for implementation in implementations()]
SHAPES = ("1x2x16x8+masks", "1x2x1:64x8", "1x1x8x8")


@pytest.fixture(scope="module")
def results():
    return run(AttentionBench(shapes=SHAPES, quick=True, limit=10.0, threads=1))


def test_everything_is_measured_or_skipped_once(results):
    keys = [(x.shape, x.mask, x.direction, x.implementation) for x in (*results.measurements, *results.skipped)]
    expected = {
        (shape, mask, direction, name)
        for shape in SHAPES
        for mask in (("none", "padding", "causal") if shape.endswith("masks") else ("none",))
        for direction in (("forward",) if "1:" in shape else ("forward", "forward + backward"))
        for name in NAMES
    }
    assert set(keys) == expected
    assert len(keys) == len(expected)
    assert {(x.implementation, x.reason) for x in results.skipped} == {("dense cdist form", "this form has no mask")}


def test_smaller_shapes_come_first(results):
    assert list(dict.fromkeys(m.shape for m in results.measurements)) == ["1x1x8x8", "1x2x1:64x8", "1x2x16x8+masks"]


def test_what_a_measurement_says(results):
    for m in results.measurements:
        assert m.median_ms > 0
        assert m.spread_ms >= 0
        assert 2 <= m.rounds <= 5
        assert m.error < 5e-2
        assert math.isclose(
            m.giga_elements_per_s, m.batch * m.heads * m.queries * m.keys * m.head_dim / m.median_ms / 1e6
        )
        assert (m.delta is None) == (m.positive_share is None) == (m.family == "softmax")
        assert (m.to_unmasked is None) == (m.mask == "none")
        assert m.ratio is not None
        if m.implementation == BASELINE:
            assert (m.ratio, m.difference_us) == (1, 0)
        limited = m.instruction_set == "avx512" and m.direction == "forward" and m.mask == "none"
        assert m.share_of_limit == (m.giga_elements_per_s / 10.0 if limited else None)
    deltas = {m.delta for m in results.measurements if m.implementation.startswith("kernel")}
    assert deltas == ({0.0, 0.5} if cpu.INSTALLED else set())


def test_the_results_are_plain_data_with_the_machine(results):
    plain = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert plain["machine"]["threads"] == 1
    assert plain["machine"]["torch"] == torch.__version__
    assert plain["instruction_sets"] == list(cpu.instruction_sets())
    assert plain["settings"]["shapes"] == ["1x1x8x8", "1x2x1:64x8", "1x2x16x8+masks"]


def test_what_takes_too_long_or_too_much_is_skipped_and_says_why(monkeypatch):
    monkeypatch.setattr(attention, "OVERHEAD", 0)
    config = AttentionBench(shapes=("1x2x16x8", "1x2x64x8"), quick=True, memory_limit=1e-6)
    found = {(x.implementation, x.shape): x.reason for x in run(config).skipped}
    assert "GiB, more than the limit of 1e-06 GiB" in found["dense cdist form", "1x2x64x8"]
    assert "dense tensors" in found["softmax, eager", "1x2x16x8"]
    assert (BASELINE, "1x2x64x8") not in found

    results = run(AttentionBench(shapes=("1x2x16x8", "1x2x64x8"), quick=True, time_limit=1e-9))
    assert not results.measurements
    found = {(x.implementation, x.shape): x.reason for x in results.skipped}
    assert "one call took" in found[BASELINE, "1x2x16x8"]
    assert "estimated" in found[BASELINE, "1x2x64x8"]
    assert "at 1x2x16x8" in found[BASELINE, "1x2x64x8"]


def test_without_the_baseline_there_is_no_ratio(monkeypatch):
    left = [implementation for implementation in implementations() if implementation.name != BASELINE]
    monkeypatch.setattr(attention, "implementations", lambda: left)
    results = run(AttentionBench(shapes=("1x1x8x8",), quick=True))
    assert {(m.ratio, m.difference_us) for m in results.measurements} == {(None, None)}


def test_a_wrong_result_stops_it_before_its_time_is_taken(monkeypatch):
    first = implementations()[0]

    def attend(query, key, value, sight):
        return first.attend(query, key, value, sight) * 1.001

    monkeypatch.setattr(attention, "implementations", lambda: [replace(first, attend=attend)])
    monkeypatch.setattr(attention, "in_turn", lambda *arguments: pytest.fail("timed a wrong result"))
    with pytest.raises(BenchmarkError, match=r"1x1x8x8.*a result within 0\.0001 of float64"):
        run(AttentionBench(shapes=("1x1x8x8",), quick=True))


def test_the_threads_are_those_asked_for_and_put_back():
    before = torch.get_num_threads()
    assert run(AttentionBench(shapes=("1x1x2x2",), quick=True, threads=2)).machine["threads"] == 2
    assert torch.get_num_threads() == before


def test_progress_ends_at_all_steps():
    config = AttentionBench(shapes=("1x1x8x8", "1x1x1:8x8"), quick=True)
    steps: list[float] = []
    run(config, lambda what, further: steps.append(further))
    assert config.steps == 3
    assert sum(steps) == pytest.approx(3)


def test_the_plan():
    assert sorted(map(str, AttentionBench().plan)) == sorted(FULL)
    assert sorted(map(str, AttentionBench(quick=True).plan)) == sorted(QUICK)
    assert len(AttentionBench(shapes=("1x1x8x8", "1x1x8x8")).plan) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"threads": 0}, "threads"),
        ({"time_limit": 0.0}, "time_limit"),
        ({"time_limit": math.nan}, "time_limit"),
        ({"memory_limit": -1.0}, "memory_limit"),
        ({"limit": 0.0}, "limit"),
        ({"output": "attention.txt"}, "ends in .json"),
        ({"shapes": ("8x8",)}, "shape '8x8'"),
        ({"shape": ("8x8",)}, "unknown key"),
    ],
)
def test_settings_that_cannot_be(values, words):
    with pytest.raises(ConfigError, match=words):
        AttentionBench.parse(values)
