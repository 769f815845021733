import re
import struct
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from inhibitor.errors import RunError
from inhibitor.report import write_report
from inhibitor.report.page import _mirrored, _summary
from inhibitor.report.records import read_runs
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


def _whole(path: Path, runs: list[Path], figures: int) -> None:
    page = Page(path)
    assert page.tags["figure"] == page.tags["svg"] == page.tags["figcaption"] == figures
    assert page.tags["details"] == len(runs)
    assert page.tags["table"] == 1 + any("finetune" in (run / "config.yaml").read_text() for run in runs)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", page.text)
    assert str(runs[0].parent) not in page.text
    assert max(page.ids.values(), default=0) == 1
    local = {f"#{name}" for name in page.ids} | {f"url(#{name})" for name in page.ids}
    assert all(name in local or name.startswith("data:image/png;base64,") for name in page.references)


@pytest.mark.parametrize(("make", "figures"), [(_teacher, 1), (_mixture, 5), (_seeds, 1), (_bare, 1)])
def test_any_mixture_gives_one_whole_page(tmp_path: Path, make: Callable[[Path], list[Path]], figures: int) -> None:
    runs = make(tmp_path)
    _whole(write_report(runs, tmp_path / "out" / "report.html"), runs, figures)


def test_every_picture_lies_in_its_run_folder(tmp_path: Path) -> None:
    runs = [samples.write(tmp_path / "e1", samples.distill(layers=12, words=40)), *_teacher(tmp_path)]
    write_report(runs, tmp_path / "report.html")
    pictures = ["attention.png", "context_error.png", "curves.png", "parameters.png"]
    assert sorted(path.name for path in runs[0].glob("*.png")) == pictures
    assert [path.name for path in runs[1].glob("*.png")] == ["curves.png"]
    for path in tmp_path.rglob("*.png"):
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG")
        assert width == 1350
        assert 400 < height < 900
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
    metrics = {**samples.distill(layers=2, heads=2, words=5), "teacher": hostile, "parameters": {}}
    metrics["states"][0]["name"] = hostile
    metrics["stages"][0]["name"] = hostile
    metrics["attention"]["tokens"] = [hostile, "$", "$a^{$", "\n", "\ud7ff"]
    metrics["attention"]["text"] = hostile
    runs = [samples.write(tmp_path / "e1", metrics)]
    runs.append(samples.write(tmp_path / "sst2", samples.finetune(hostile, model=hostile)))
    (runs[0] / "config.yaml").write_text(f"seed: 0\nx: {hostile}\n", encoding="utf-8")
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert not page.tags["script"]
    assert "\x1b" not in page.text
    assert "&lt;script&gt;alert(1)" in page.text
    assert page.tags["title"] == 1


def test_repetitions_are_folded_away(tmp_path: Path) -> None:
    every = [{**samples.distill(seed=seed, **SMALL), "parameters": {}, "attention": None} for seed in (0, 1)]
    runs = [samples.write(tmp_path / f"e1-{metrics['seed']}", metrics) for metrics in every]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert page.tags["figure"] == 4
    assert page.tags["details"] == 3
    assert "± " in page.text


def test_the_summary_says_the_key_numbers(tmp_path: Path) -> None:
    (summary,) = _summary(studies(read_runs(samples.experiment(tmp_path))))
    assert "in 6 layers of sentence-transformers/all-MiniLM-L6-v2" in summary
    assert "12.0 million tokens (60 min)" in summary
    assert summary.endswith("the student (after full-layer) keeps 98.3 % of the teacher's score (MRPC, SST-2).")


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
