"""One HTML page about any finished runs: self-contained, without scripts, readable in light, in dark and on paper."""

import colorsys
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from inhibitor import __version__
from inhibitor.errors import RunError
from inhibitor.report import plots
from inhibitor.report.disagreement import disagreements, pairs
from inhibitor.report.integers import (
    Group,
    clipped_table,
    cost_table,
    integers_table,
    parts_figure,
    quantized,
    verdict,
    worst,
)
from inhibitor.report.records import AnyMetrics, Distill, Energy, Finetune, Folder, Quantize, Stage, read_runs
from inhibitor.report.results import (
    STATES,
    TASKS,
    Row,
    Study,
    called,
    results_table,
    retention,
    short,
    studies,
    task_table,
    tasks,
)
from inhibitor.report.tables import Table, duration, number, plain, to_html
from inhibitor.runs import CONFIG, VERSIONS, write_bytes, write_text

CURVES, PARTS = "curves.png", "parts.png"
CAPTIONS = {
    "traces.png": "Inside the student while it was trained, layer by layer: the squared error of its context vectors"
    " relative to the teacher's, the share of the value entries that inhibition sets to zero, and the means over heads"
    " of γ, η, δ, ρ and τ.",
    "context_error.png": "Squared error relative to the teacher, layer by layer, at each step of the recipe: of the"
    " attention's context vectors and of the hidden states. Lower is closer to the teacher.",
    "heads.png": "The finished student, head by head: the squared error relative to the teacher, of context vectors and"
    " of what the output projection makes of them; the share of value entries in sight that inhibition sets to zero;"
    " the effective number of keys in a query's context, the exponential of the entropy of their shares in it.",
    "positions.png": "The finished student's error of context vectors by the position of their query, and of hidden"
    " states by the length of the sequence: a student is good at the lengths that it was distilled on.",
    "parameters.png": "What training made of the inhibitor's own parameters. A point is a head, a dash the mean of a"
    " layer.",
    PARTS: "Each part alone in integers, all others in float: the power of the logits over that of their change"
    " (SQNR, higher is better), and the change of the score. Dotted: all parts in integers.",
}
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def summarise(runs: Sequence[str | Path]) -> list[Table]:
    """The results of finished run folders: one table of training, one of integers, as far as there are such runs.

    Raises:
        RunError: A folder holds no finished run.
    """
    read = read_runs(runs)
    return _overview(studies(read), quantized(read.quantizations))


def _overview(found: Sequence[Study], groups: Sequence[Group]) -> list[Table]:
    return [*([results_table(found)] if found else []), *([integers_table(groups)] if groups else [])]


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Write one self-contained HTML page about ``runs``, and each run's pictures as PNG into its own folder.

    Args:
        runs: Finished run folders, distillations, fine-tunings and quantisations in any mixture; repetitions with
            several seeds are shown as mean ± standard deviation.
        output: The page to write; its folder is made where there is none. A run in whose folder it lies gets its
            pictures beside it; nothing is written into others.

    Returns:
        ``output``.

    Raises:
        RunError: A folder holds no finished run, or ``output`` is a folder. Nothing has been written then.
    """
    output, read = Path(output), read_runs(runs)
    if output.is_dir():
        raise RunError(str(output), expected="a file to write", got="a folder", remedy="Add a name, e.g. report.html.")
    found, groups = studies(read), quantized(read.quantizations)
    differing = disagreements(pairs(found))
    svg = Svg()
    sections = [_distilled(folder, svg, study, output) for study in found for folder in study.distillations]
    sections += [_finetuned(task, found, svg) for task in tasks(found)]
    sections += [_quantized(folder, svg, group, output) for group in groups for folder in group]
    sections.append(section(differing))
    for folder in read.finetunings:
        _save(folder, {CURVES: plots.finetune_figure({short(folder.metrics.model): [folder.metrics]})}, output)
    results, *others = _overview(found, groups)
    tables = [replace(results, title="Results"), *([task_table(found)] if tasks(found) else []), *others]
    summary = [*_summary(found), *(verdict(group[0].metrics) for group in groups)]
    page = PAGE.substitute(
        title=html.escape(results.title),
        colours=svg.colours(),
        summary="\n".join(f'<p class="summary">{html.escape(plain(text))}</p>' for text in summary),
        tables="\n".join(map(to_html, tables)),
        sections="\n".join(sections),
        details="\n".join(
            [*map(_details, read.distillations), *map(_details, read.finetunings), *map(_details, read.quantizations)]
        ),
        version=html.escape(__version__),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def section(compared: Sequence[Table]) -> str:
    """The part of a page about rows that teacher and student judge differently; nothing where none were compared."""
    tables = "\n".join(map(to_html, compared))
    return f"<section><h2>Where teacher and student differ</h2>\n{tables}</section>" if compared else ""


def _summary(found: Sequence[Study]) -> list[str]:
    """A paragraph for each study."""
    paragraphs = []
    for study in found:
        sentences = [_distilled_sentence(study)] if study.distillations else []
        if any(row.tasks for row in (study.students if len(found) > 1 else study.rows)):
            sentences.append(_scores_sentence(study))
        paragraphs.append((f"{study.name}: " if len(found) > 1 else "") + " ".join(sentences))
    return paragraphs


def _distilled_sentence(study: Study) -> str:
    metrics, first, last = study.distillations[0].metrics, study.students[0], study.students[-1]
    layers = len(metrics.student.layers or metrics.states[0].context_error)
    kinds = {"context_error": "of the context vectors", "hidden_error": "of the hidden states"}
    found = {kind: what for kind, what in kinds.items() if getattr(metrics.states[0], kind)}
    if first is last:
        parts = [f"{what} is {study.error(first, kind)}" for kind, what in found.items()]
        errors = f"The mean relative error {', '.join(parts)}."
    else:
        parts = [f"{what} from {study.error(first, kind)} to {study.error(last, kind)}" for kind, what in found.items()]
        errors = f"Distillation{_on(metrics.stages)} took the mean relative error {' and '.join(parts)}."
    replaced = f"Inhibitor attention in {layers} layers, taught by {study.taught_by}."
    return f"{replaced} {errors}" if found else replaced


def _on(stages: Sequence[Stage]) -> str:
    tokens, seconds = sum(stage.tokens for stage in stages), sum(stage.seconds for stage in stages)
    return f" on {_count(tokens)} tokens ({duration(seconds)})" if stages else ""


def _scores_sentence(study: Study) -> str:
    row = [row for row in study.rows if row.tasks][-1]
    who = row.label
    if study.distillations:
        who = "the teacher" if row is study.teacher else f"the student ({row.label})"
    kept = retention(row, study.teacher, row.tasks)
    if kept is None or study.teacher is None or row is study.teacher:
        every = [
            f"{number(row.scores(task), 1)} on {TASKS.get(task, task)}" for task in tasks([study]) if row.scores(task)
        ]
        return _sentence(row, f"{who} reaches {', '.join(every)}.")
    shared = [TASKS.get(task, task) for task in tasks([study]) if row.scores(task) and study.teacher.scores(task)]
    of = "the teacher's score" if study.distillations else f"the score of {study.teacher.label}"
    return _sentence(row, f"{who} keeps {number(kept, 1)} % of {of} ({', '.join(shared)}).")


def _sentence(row: Row, words: str) -> str:
    return words[0].upper() + words[1:] if row.distilled else f"Fine-tuned, {words}"


def _distilled(folder: Folder[Distill], svg: "Svg", study: Study, output: Path) -> str:
    """The pictures of one distillation; those of a study's repetitions are folded away."""
    metrics, pictures = folder.metrics, plots.distill_figures(folder.metrics)
    _save(folder, pictures, output)
    captions = {CURVES: _stage_caption(metrics.stages), **CAPTIONS}
    if len({tuple(step.traces.layers) for stage in metrics.stages for step in stage.history if step.traces}) > 1:
        captions["traces.png"] += " A dotted line bridges steps at which the layer was not looked at."
    if metrics.attention:
        captions["attention.png"] = (
            f"Layer {metrics.attention.layer}, head {metrics.attention.head}, on “{plain(metrics.attention.text)}”."
            " Left, dark: the teacher attends. Right, dark: little inhibition, so the student finds the two related."
            " Rows are queries, columns keys; dark places that agree are kept relations."
        )
    parts = [f'<p class="note">{html.escape(plain(_energy(metrics.energy)))}</p>'] if metrics.energy else []
    body = "\n".join([*parts, *(svg.figure(picture, captions[name]) for name, picture in pictures.items())])
    folded = folder is not study.distillations[0]
    return _part(f"Distillation {called(folder) if folded else study.name}, seed {metrics.seed}", body, folded)


def _part(title: str, body: str, folded: bool) -> str:
    title = html.escape(plain(title))
    if folded:
        return f"<details><summary>{title}</summary>\n{body}</details>"
    return f"<section><h2>{title}</h2>\n{body}</section>"


def _finetuned(task: str, found: Sequence[Study], svg: "Svg") -> str:
    runs: dict[str, list[Finetune]] = {}
    drawn: set[Path] = set()  # a teacher may belong to several studies
    for study in found:
        for row in study.rows:
            folders = [folder for folder in row.finetunings.get(task, []) if folder.path not in drawn]
            if folders:
                runs[study.label(row, found)] = [folder.metrics for folder in folders]
                drawn.update(folder.path for folder in folders)
    picture = plots.finetune_figure(runs)
    name = html.escape(plain(TASKS.get(task, task)))
    if not picture:
        return ""
    caption = "Loss while fine-tuning and score after each epoch; one line per run."
    return f"<section><h2>Fine-tuning on {name}</h2>\n{svg.figure(picture, caption)}</section>"


def _quantized(folder: Folder[Quantize], svg: "Svg", group: Group, output: Path) -> str:
    """What one quantisation costs and gains; a group's repetitions are folded away."""
    metrics, picture = folder.metrics, parts_figure(folder.metrics)
    _save(folder, {PARTS: picture}, output)
    parts = [to_html(cost_table(metrics))]
    if picture:
        parts += [f"<p>{html.escape(plain(worst(metrics)))}</p>", svg.figure(picture, CAPTIONS[PARTS])]
    if metrics.clipped:
        parts.append(to_html(clipped_table(metrics)))
    title = f"Quantisation {called(folder)}, seed {metrics.seed}"
    return _part(title, "\n".join(parts), folder is not group[0])


def _stage_caption(stages: Sequence[Stage]) -> str:
    text = f"Loss while training, tokens of all stages in order ({'; '.join(map(_stage_cost, stages))})."
    if any(step.grad_norm is not None for stage in stages for step in stage.history):
        text += " The gradient's norm is that before clipping."
    return plain(text)


def _stage_cost(stage: Stage) -> str:
    name = STATES.get(stage.name, stage.name).removeprefix("after ")
    losses = " + ".join(loss if weight == 1 else f"{weight:g} × {loss}" for loss, weight in stage.losses.items())
    saved = stage.checkpoints
    return (
        f"{name}{f' on {losses}' if losses else ''}: {_count(stage.tokens)} tokens in {duration(stage.seconds)},"
        f" {_count(stage.tokens_per_second)} per second"
        f"{f', {saved.count} checkpoints in {duration(saved.seconds)}' if saved else ''}"
    )


def _energy(energy: Energy) -> str:
    if energy.joules is None:
        return f"Energy: not measured: {energy.reason}."
    parts = ", ".join(f"{name} {_watt_hours(joules)}" for name, joules in energy.by_device.items())
    carbon = "" if energy.co2_grams is None else f"; {number(energy.co2_grams)} g of CO₂ at the recipe's intensity"
    absent = "" if any(name.startswith("cpu") for name in energy.by_device) else ", without the processor"
    return (
        f"Energy: {_watt_hours(energy.joules)} in {duration(energy.seconds)}{f' ({parts})' if parts else ''}{carbon}."
        f" Measured by {energy.source}{absent}: what the devices drew meanwhile, whoever used them."
    )


def _watt_hours(joules: float) -> str:
    hours = joules / 3600
    return f"{number(hours / 1000)} kWh" if hours >= 1000 else f"{number(hours)} Wh"


def _count(value: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{number(value / size)}{unit}"
    return f"{value:,.0f}"


def _details(folder: Folder[AnyMetrics]) -> str:
    metrics, verbs = folder.metrics, {"distill": "distillation", "finetune": "fine-tuning", "quantize": "quantisation"}
    task = "" if metrics.task is None else f" on {TASKS.get(metrics.task, metrics.task)}"
    name = f"{called(folder)}: {verbs[metrics.kind]}{task}, seed {metrics.seed}"
    return details(name, {CONFIG: folder.config, VERSIONS: folder.versions})


def details(title: str, files: Mapping[str, str]) -> str:
    """Files by their names, folded away."""
    texts = {name: "\n".join(map(plain, text.strip().splitlines())) for name, text in files.items()}
    shown = "".join(f"<h3>{name}</h3><pre>{html.escape(text)}</pre>" for name, text in texts.items())
    return f"<details><summary>{html.escape(plain(title))}</summary>{shown}</details>"


def _save(folder: Folder[AnyMetrics], pictures: Mapping[str, Figure | None], output: Path) -> None:
    """Lay a run's pictures beside its own page, and nothing into the folder of a run that is only shown."""
    if output.parent.resolve() != folder.path.resolve():
        return
    for name, picture in pictures.items():
        if picture:
            write_bytes(folder.path / name, plots.to_png(picture))


class Svg:
    """Pictures within the page: ids made unique, colours made to follow the reader's scheme."""

    def __init__(self) -> None:
        self._count = 0
        self._used: set[str] = set()

    def figure(self, picture: Figure, caption: str) -> str:
        """One picture with its caption."""
        self._count += 1
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{self._count}-", plots.to_svg(picture))
        svg = re.sub(r"(?<=[ :])#([0-9a-f]{6})\b(?=[;\"])", self._variable, svg)
        text = html.escape(caption)
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
        return f"<figure>{svg}<figcaption>{text}</figcaption></figure>"

    def colours(self) -> str:
        """The style sheet of every colour used: as drawn, and with its lightness mirrored for a dark page."""
        light = "".join(f"--c{colour}:#{colour};" for colour in sorted(self._used))
        dark = "".join(f"--c{colour}:#{_mirrored(colour)};" for colour in sorted(self._used))
        return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"

    def _variable(self, match: re.Match[str]) -> str:
        self._used.add(match[1])
        return f"var(--c{match[1]})"


def _mirrored(colour: str) -> str:
    """The colour for a dark page: greys swap light and dark, hues stay themselves and become light enough to read."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)))
    mirrored = 0.2 + 0.75 * (1 - lightness) if saturation < 0.25 else max(1 - lightness, 0.6)
    return "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, mirrored, saturation))
