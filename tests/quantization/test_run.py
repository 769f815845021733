"""``inhibitor quantize`` killed at work: the same command begins anew and ends as if nothing had been."""

import json
import signal
import time

from safetensors.torch import load_file

from tests.faults.zygote import Zygote


def test_a_killed_run_begins_anew_and_ends_the_same(student, tokenizer, tmp_path):
    student.config.id2label = {0: "negative", 1: "positive"}
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    killed, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log.txt"
    zygote = Zygote()

    def start(output):
        options = ("--task", "reviews", "--sequences", "32", "--max-length", "32")
        return zygote.start("quantize", str(tmp_path / "student"), *options, "--output", str(output), log=log)

    try:
        child, patience = start(killed), time.monotonic() + 120
        while not (killed / "versions.json").exists():
            assert not child.ended(0.001), log.read_text()[-3000:]
            assert time.monotonic() < patience
        child.kill(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not (killed / "metrics.json").exists()
        (killed / "model").mkdir()  # what a kill while files are written leaves
        (killed / "model" / "model.safetensors").write_bytes(b"half")
        (killed / ".metrics.json.x.writing").write_text("{")
        for output in (killed, whole):
            assert start(output).wait() == 0, log.read_text()[-3000:]
    finally:
        zygote.close()

    metrics = [json.loads((output / "metrics.json").read_text()) for output in (killed, whole)]
    for found in metrics:
        del found["latency"]
    assert metrics[0] == metrics[1]
    tensors = [load_file(output / "model" / "model.safetensors") for output in (killed, whole)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(bool((tensors[0][name] == tensor).all()) for name, tensor in tensors[1].items())
    names = [{path.relative_to(output) for path in output.rglob("*")} for output in (killed, whole)]
    assert names[0] == names[1]
    assert {"parts.png", "report.html"} <= {path.name for path in names[0]}
