"""``inhibitor quantize`` and ``inhibitor count`` as a user meets them."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from inhibitor import convert


@pytest.fixture
def student(tiny_bert, tmp_path):
    """An inhibitor classifier of reviews, untrained."""
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    model = convert(AutoModelForSequenceClassification.from_pretrained(tiny_bert, **names))
    model.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_from_a_float_student_to_an_int8_model(cli, student, tmp_path):
    output = tmp_path / "int8"
    command = ("quantize", student, "--task", "reviews", "--output", output, "--sequences", 32, "--max-length", 32)
    status, shown, error = cli(*command)
    assert status == 0, error
    metrics = json.loads((output / "metrics.json").read_text())
    parts = [part["part"] for part in metrics["parts"]]
    assert parts == ["embeddings", *(f"layer {i}, {kind}" for kind in ("attention", "linear") for i in range(2))]
    assert all(part["sqnr"] > metrics["sqnr"] - 3 for part in metrics["parts"])
    assert metrics["bytes"]["after"] < 0.5 * metrics["bytes"]["before"]
    assert (output / "model" / "model.safetensors").stat().st_size < 1.2 * metrics["bytes"]["after"] + 20000
    assert [entry["batch"] for entry in metrics["latency"]] == [1, 8]
    assert [layer["layer"] for layer in metrics["clipped"]] == [0, 1]
    for words in ("layer 1, attention", "weights, MB", "Attention's clipped codes", "Model:", "Report:"):
        assert words in shown
    page = (output / "report.html").read_text()
    assert "Alone in integers" in page

    status, out, _ = cli("evaluate", "--model", output / "model", "--task", "reviews")
    assert status == 0
    scored = json.loads(out)
    assert scored["attention"] == "inhibitor"
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".json", ".safetensors")}
    (output / "parts.png").unlink()
    (output / "report.html").unlink()
    assert cli(*command)[:2] == (0, shown)  # finished: shown again, pictures and page made again, nothing else
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (output / "parts.png").is_file()
    assert (output / "report.html").read_text() == page
    assert cli(*command, "--seed", 1)[0] == 2  # another run in its folder

    both = tmp_path / "both.html"
    status, out, error = cli("report", output, output, "--output", both)
    assert status == 0, error
    assert "Models in integers" in out
    assert "Quantisation int8, seed 0" in both.read_text()


def test_what_cannot_be_quantized_is_said_in_a_sentence(cli, tiny_bert, student, tmp_path):
    options = ("--task", "reviews", "--output", tmp_path / "x")
    for arguments, words in (
        ((student, *options, "--linear", "int4"), "linear"),
        ((student, *options, "--attention", 5), "attention"),
        ((tmp_path / "nowhere", *options), "config.json"),
        ((tiny_bert, *options), "classes of reviews"),
    ):
        status, _, error = cli("quantize", *arguments)
        assert status == 2
        assert words in error
        assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_count(cli, student, tiny_bert, tmp_path):
    path = tmp_path / "deep" / "count.json"
    status, out, error = cli("count", student, "--length", 24, "--output", path)
    assert status == 0, error
    counted = json.loads(path.read_text())
    assert set(counted["bits_seen"]) <= set(counted["bits"])
    assert counted["bits_seen"]["distance D"] <= counted["bits"]["distance D"]
    assert all(bits <= counted["bits"][name] for name, bits in counted["bits_seen"].items())
    assert min(counted["bits_seen"].values()) > 0
    assert counted["attention"]["inhibitor, int8"]["lookups"] == 2 * 2 * 3  # a gain, and a power of what is heard
    sizes = {"layers": 2, "heads": 2, "head_dim": 16, "intermediate": 64}
    assert counted["shape"] == sizes | {"reach": True, "query_gain": True}
    assert counted["bits_seen"]["sum of what is heard R"] <= (255 * 24).bit_length()
    assert "no measurement" in out
    assert "45 nm" in out

    status, out, _ = cli("count", tiny_bert)
    assert status == 0
    assert "softmax attention" in " ".join(out.split())
    assert cli("count", student, "--length", 1000)[0] == 2
