import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from inhibitor.errors import RunError
from inhibitor.report import plots, summarise, write_report
from inhibitor.report.heads import TITLES, heads_figure, positions_figure
from inhibitor.report.look import PARAMETERS, style
from inhibitor.report.page import Svg, _finetuned, _mirrored, _summary
from inhibitor.report.plots import _parameters, finetune_figure
from inhibitor.report.records import Distill, Finetune, read_runs
from inhibitor.report.results import studies, task_table

from . import samples

SMALL = {"layers": 2, "heads": 2, "words": 6}
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a page holds; every element must be closed where it was opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: set[str] = set()
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id" and value:
                self.ids[value] += 1
            if name in ("href", "src", "clip-path") and value:
                self.references.add(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _distill(root: Path) -> list[Path]:
    return [samples.write(root / "e1", samples.distill(**SMALL))]


def _traced(root: Path) -> list[Path]:
    return [samples.write(root / "e1", samples.traced(**SMALL))]


def _teacher(root: Path) -> list[Path]:
    return [samples.write(root / "sst2", samples.finetune())]


def _mixture(root: Path) -> list[Path]:
    return samples.experiment(root, tasks=("sst2",), **SMALL)


def _seeds(root: Path) -> list[Path]:
    return [samples.write(root / f"sst2-{seed}", samples.finetune(seed=seed)) for seed in range(3)]


def _bare(root: Path) -> list[Path]:
    metrics = {**samples.distill(**SMALL), "stages": [], "parameters": {}, "attention": None}
    silent = {**samples.finetune(), "history": [], "evaluations": []}
    return [samples.write(root / "bare", metrics), samples.write(root / "silent", silent)]


def _integers(root: Path) -> list[Path]:
    return [samples.write(root / "int8", samples.quantize())]


def _all_kinds(root: Path) -> list[Path]:
    return [*_mixture(root), *_integers(root)]


def _whole(path: Path, runs: list[Path], figures: int) -> None:
    page = Page(path)
    assert page.tags["figure"] == page.tags["svg"] == page.tags["figcaption"] == figures
    assert page.tags["details"] == len(runs)
    kinds = Counter((run / "config.yaml").read_text().splitlines()[0].removeprefix("kind: ") for run in runs)
    training = (kinds.total() > kinds["quantize"]) + (kinds["finetune"] > 0)
    assert page.tags["table"] == training + 3 * (kinds["quantize"] > 0)  # results, cost, clipped codes
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    text = re.sub(r"data:image/png;base64,[\w+/=\s]+", "", page.text)  # in which two slashes mean nothing
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", text)
    assert str(runs[0].parent) not in page.text
    assert max(page.ids.values(), default=0) == 1
    local = {f"#{name}" for name in page.ids} | {f"url(#{name})" for name in page.ids}
    assert all(name in local or name.startswith("data:image/png;base64,") for name in page.references)


@pytest.mark.parametrize(
    ("make", "figures"),
    [(_teacher, 1), (_traced, 7), (_mixture, 5), (_seeds, 1), (_bare, 1), (_integers, 1), (_all_kinds, 6)],
)
def test_any_mixture_gives_one_whole_page(tmp_path: Path, make: Callable[[Path], list[Path]], figures: int) -> None:
    runs = make(tmp_path)
    _whole(write_report(runs, tmp_path / "out" / "report.html"), runs, figures)


def test_every_picture_lies_beside_the_page_of_its_run_and_in_no_other_folder(tmp_path: Path) -> None:
    runs = [samples.write(tmp_path / "e1", samples.traced(layers=12, words=40)), *_teacher(tmp_path)]
    runs += _integers(tmp_path)
    write_report(runs, tmp_path / "report.html")
    assert not list(tmp_path.rglob("*.png"))
    for run in runs:
        write_report([run], run / "report.html")
    pictures = ["attention", "context_error", "curves", "heads", "parameters", "positions", "traces"]
    assert sorted(path.name for path in runs[0].glob("*.png")) == [f"{name}.png" for name in pictures]
    assert [path.name for path in runs[1].glob("*.png")] == ["curves.png"]
    assert [path.name for path in runs[2].glob("*.png")] == ["parts.png"]
    for path in tmp_path.rglob("*.png"):
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG")
        assert width == 1350
        assert 400 < height < 1000
        assert 10_000 < len(content) < 400_000
    assert not list(tmp_path.rglob(".*"))


def test_one_distillation_gives_a_whole_page_and_always_the_same_bytes(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    runs = _distill(tmp_path)
    written = []
    for _ in range(2):
        _whole(write_report(runs, tmp_path / "report.html"), runs, figures=4)
        written.append([path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))])
    assert written[0] == written[1]
    assert dict(mpl.rcParams) == before


def test_several_studies_share_their_teacher(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"parameters": {}, "attention": None, "stages": []}
    runs = [samples.write(tmp_path / f"e{n}", {**samples.distill(layers=n, heads=1), **bare}) for n in (2, 3)]
    runs += [*_teacher(tmp_path), samples.write(tmp_path / "tuned", samples.finetune(model=str(runs[0] / "model")))]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert re.findall(r"Fine-tuned, the (\w+)", page.text) == ["student"]
    assert page.text.count('<p class="summary">') == 2
    assert page.tags["figure"] == 3
    (last,) = task_table(studies(read_runs(runs))).rows
    assert last[1] == "e2: after full-layer"


def test_hostile_texts_do_nothing(tmp_path: Path) -> None:
    hostile = "</title><script>alert(1)</script> $x$ \x1b[31m --> ]]> =1+1 字"
    metrics = {**samples.traced(layers=2, heads=2, words=5), "teacher": hostile, "parameters": {}}
    metrics["states"][0]["name"] = hostile
    metrics["stages"][0] |= {"name": hostile, "losses": {hostile: 2.0}}
    metrics["energy"] = {"joules": 1.0, "by_device": {hostile: 1.0}, "seconds": 1.0, "source": hostile}
    metrics["attention"]["tokens"] = [hostile, "$", "$a^{$", "\n", "\ud7ff"]
    metrics["attention"]["text"] = hostile
    runs = [samples.write(tmp_path / "e1", metrics)]
    runs.append(samples.write(tmp_path / "sst2", samples.finetune(hostile, model=hostile)))
    integers = samples.quantize(hostile, model=hostile)
    integers["parts"][0]["part"] = integers["machine"]["cpu"] = integers["int8"]["linear"] = hostile
    runs.append(samples.write(tmp_path / "int8", integers))
    (runs[0] / "config.yaml").write_text(f"seed: 0\nx: {hostile}\n", encoding="utf-8")
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert not page.tags["script"]
    assert "\x1b" not in page.text
    assert "&lt;script&gt;alert(1)" in page.text
    assert page.tags["title"] == 1


@pytest.mark.parametrize(
    ("energy", "line"),
    [
        ({"joules": None, "reason": "no <meter>"}, "Energy: not measured: no &lt;meter&gt;."),
        (
            {
                "joules": 7.2e6,
                "by_device": {"gpu 0": 3.6e6, "cpu 0": 3.6e6},
                "seconds": 3000.0,
                "source": "zeus (RAPL, NVML)",
                "co2_grams": 250.0,
            },
            "Energy: 2.00 kWh in 50 min (gpu 0 1.00 kWh, cpu 0 1.00 kWh); 250 g of CO₂ at the recipe&#x27;s intensity."
            " Measured by zeus (RAPL, NVML):",
        ),
        (
            {"joules": 360.0, "by_device": {"gpu 0": 360.0}, "seconds": 9.0, "source": "zeus (NVML)"},
            "Energy: 0.100 Wh in 9 s (gpu 0 0.100 Wh). Measured by zeus (NVML), without the processor:",
        ),
    ],
)
def test_the_energy_is_one_line(tmp_path: Path, energy: dict[str, Any], line: str) -> None:
    runs = [samples.write(tmp_path / "e1", {**samples.traced(**SMALL), "energy": energy})]
    assert line in write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_costs_of_the_stages_are_told(tmp_path: Path) -> None:
    metrics = samples.traced(**SMALL)
    metrics["stages"][1]["losses"] = {"hidden_states": 1.0, "attention": 0.5}
    text = write_report([samples.write(tmp_path / "e1", metrics)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "layer-wise on context: 6.00 million tokens in 30 min, 3,333 per second, 5 checkpoints in 2 s;" in text
    assert "full-layer on hidden_states + 0.5 × attention: " in text


def test_an_older_run_says_nothing_of_what_it_did_not_log(tmp_path: Path) -> None:
    text = write_report(_distill(tmp_path), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "(layer-wise: 6.00 million tokens in 30 min, 3,333 per second; full-layer: 6.00" in text
    assert not re.search("Energy|checkpoints|gradient|dotted", text)
    assert not (tmp_path / "e1" / "traces.png").exists()


def test_repetitions_are_folded_away(tmp_path: Path) -> None:
    every = [{**samples.distill(seed=seed, **SMALL), "parameters": {}, "attention": None} for seed in (0, 1)]
    runs = [samples.write(tmp_path / f"e1-{metrics['seed']}", metrics) for metrics in every]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert page.tags["figure"] == 4
    assert page.tags["details"] == 3
    assert "± " in page.text


def test_the_summary_says_the_key_numbers(tmp_path: Path) -> None:
    (summary,) = _summary(studies(read_runs(samples.experiment(tmp_path))))
    assert "Inhibitor attention in 6 layers, taught by sentence-transformers/all-MiniLM-L6-v2." in summary
    assert "12.0 million tokens (60 min)" in summary
    assert summary.endswith("the student (after full-layer) keeps 98.3 % of the teacher's score (MRPC, SST-2).")


def test_the_summary_says_what_a_distillation_on_a_task_keeps(tmp_path: Path) -> None:
    runs = samples.taught(tmp_path / "grid")
    (summary,) = _summary(studies(read_runs(runs)))
    assert "taught by e0/rte." in summary
    assert summary.endswith("The student (after task) keeps 97.6 % of the teacher's score (RTE).")
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert page.tags["table"] == 2
    assert "<h2>Distillation e2/rte, seed 0</h2>" in page.text
    assert "<summary>e2/rte/seed-1: distillation on RTE, seed 1</summary>" in page.text


def test_two_models_of_one_name_are_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, int] = {}

    def draw(runs: Mapping[str, Sequence[Finetune]]) -> None:
        drawn.update({label: len(group) for label, group in runs.items()})

    runs = [samples.write(tmp_path / name, samples.finetune(model=f"/data/{name}/e1/model")) for name in "ab"]
    found = studies(read_runs(runs))
    monkeypatch.setattr(plots, "finetune_figure", draw)
    _finetuned("sst2", found, Svg())
    assert drawn == {"a/e1 (softmax)": 1, "b/e1 (softmax)": 1}


def test_epochs_and_steps_are_whole_numbers() -> None:
    metrics = samples.finetune()
    metrics |= {"history": metrics["history"][:1], "evaluations": metrics["evaluations"][:1]}
    metrics["history"][0]["step"] = 1
    figure = finetune_figure({"one": [Finetune.model_validate(metrics)]})
    assert figure is not None
    for axis in figure.axes:
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize("missing", [{"hidden_error"}, {"context_error"}, {"context_error", "hidden_error"}])
def test_a_student_of_another_shape_lacks_errors_only(tmp_path: Path, missing: set[str]) -> None:
    metrics = samples.traced(**SMALL)
    for state in metrics["states"]:
        state |= {name: [] for name in missing}
    runs = [samples.write(tmp_path / "e1", metrics)]
    _whole(write_report(runs, tmp_path / "report.html"), runs, figures=7 - (len(missing) > 1))
    (summary,) = _summary(studies(read_runs(runs)))
    assert ("of the hidden states" in summary) is ("hidden_error" not in missing)
    assert ("of the context vectors" in summary) is ("context_error" not in missing)
    row = summarise(runs)[0].rows[1]
    assert [cell == "-" for cell in row[1:]] == [name in missing for name in ("context_error", "hidden_error")]


def test_nothing_is_written_when_a_run_is_bad(tmp_path: Path) -> None:
    runs = [*_teacher(tmp_path), tmp_path]
    with pytest.raises(RunError):
        write_report(runs, tmp_path / "report.html")
    with pytest.raises(RunError, match=r"report\.html"):
        write_report(runs[:1], tmp_path)
    assert not list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.glob("*.html"))


def test_dark_colours_stay_apart_from_the_dark_page() -> None:
    assert _mirrored("22262e") > "c0"
    assert _mirrored("d9dce2") < "60"
    assert max(bytes.fromhex(_mirrored("0072b2"))) > 0x90


def test_a_map_shows_what_was_measured_layer_by_layer_and_head_by_head() -> None:
    metrics = Distill.model_validate(samples.traced(layers=3, heads=4))
    heads = metrics.states[-1].heads
    with style():
        figure = heads_figure(metrics)
    assert heads is not None
    assert figure is not None
    shown = {axis.get_title(loc="left"): axis.images[0] for axis in figure.axes if axis.images}
    for name, title in TITLES.items():
        assert np.asarray(shown[title].get_array()).tolist() == getattr(heads, name)
    keys = [shown[TITLES[name]].norm for name in ("keys", "teacher_keys")]
    assert keys[0].vmax == keys[1].vmax  # one scale for both


@pytest.mark.parametrize("left_out", [0, 1, 3])
def test_a_panel_for_each_parameter_and_no_empty_one(left_out: int) -> None:
    metrics = samples.distill(**SMALL)
    for state in metrics["parameters"].values():
        for name in list(PARAMETERS)[:left_out]:
            state[name] = []
    with style():
        figure = _parameters(Distill.model_validate(metrics))
    assert figure is not None
    shown = [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]
    assert shown == list(PARAMETERS.values())[left_out:]


def test_positions_are_named_by_their_intervals() -> None:
    metrics = samples.traced(layers=3, heads=4)
    metrics["student"]["layers"] = [0, 2, 5]
    figure = positions_figure(Distill.model_validate(metrics))
    assert figure is not None
    axis, bar = figure.axes
    names = [label.get_text() for label in axis.get_xticklabels()]
    assert names == ["0", "1", "2–3", "4–7", "8–15", "16–31", "32 and on"]
    expected = metrics["states"][-1]["positions"]["context_error"]
    assert [list(map(float, line.get_ydata())) for line in axis.lines] == expected  # type: ignore[arg-type]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0", "2", "5"]


def test_lengths_stand_beside_positions() -> None:
    metrics = samples.traced(layers=3)
    lengths = {"first": [8, 16, 64], "hidden_error": [[0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3, 0.1, 0.4]]}
    metrics["states"][-1]["lengths"] = lengths
    figure = positions_figure(Distill.model_validate(metrics))
    assert figure is not None
    _, axis, _ = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["8–15", "16–31", "64 and on"]
    found = [list(map(float, line.get_ydata())) for line in axis.lines]  # type: ignore[arg-type]
    assert found == lengths["hidden_error"]
