"""Teacher and student, loaded and checked against each other before any work starts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inhibitor.data.tasks import get_task
from inhibitor.distill.recipe import (
    CalibrationConfig,
    DistillConfig,
    JointStage,
    LayerwiseStage,
    TaskStage,
    WholeModel,
)
from inhibitor.errors import ConfigError, ModelError
from inhibitor.evaluate.evaluate import check_classes, check_pair
from inhibitor.models.attention import TEACHER, inhibitor_layers
from inhibitor.models.config import InhibitorConfig
from inhibitor.models.convert import convert
from inhibitor.models.families import PREFIX, layer_modules
from inhibitor.models.loading import load_pretrained

SAMPLE = "A tokenizer's sample: 12 naïve cafés, e.g. “Łódź”!"


@dataclass(frozen=True)
class Pair:
    """What a distillation works on.

    Args:
        teacher: Softmax attention with taps, or a student of before.
        student: Inhibitor attention.
        tokenizer: The teacher's; it makes the inputs of both.
        student_tokenizer: The one that is saved with the student.
        layers: The teacher's layer for each of the student's.
        converted: Whether the student was a softmax model until now.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase
    layers: dict[int, int]
    converted: bool


def load_pair(config: DistillConfig) -> Pair:
    """Load both models and their tokenizers.

    Raises:
        ModelError: One of them cannot be loaded, or they do not fit each other or the stages; it prints both sides.
        ConfigError: A student that has inhibitor attention is to be given another, or to be calibrated.
    """
    auto_class = _auto_class(config)
    tokenizer = load_pretrained(AutoTokenizer, config.teacher)
    is_student = load_pretrained(AutoConfig, config.teacher).model_type.startswith(PREFIX)
    taps = {} if is_student else {"attn_implementation": TEACHER}
    teacher, loading = load_pretrained(
        auto_class, config.teacher, dtype=torch.float32, output_loading_info=True, **taps
    )
    if config.task is not None:
        check_classes(config.teacher, teacher, get_task(config.task.task), loading["missing_keys"])
    elif auto_class is AutoModelForMaskedLM and (loading["missing_keys"] or tokenizer.mask_token is None):
        lacking = sorted(loading["missing_keys"])[:3]
        raise ModelError(
            config.teacher,
            expected="a teacher with a masked-language-model head and a mask token, for the logits stage",
            got=f"no weights for {', '.join(lacking)}" if lacking else "a tokenizer without a mask token",
            remedy="Choose another teacher, or leave the logits stage out.",
        )
    _check_map(config, teacher)
    if config.student is None:
        student = _from_teacher(config, auto_class, teacher)
        student_tokenizer = tokenizer
    else:
        student = _load_student(config, config.student, auto_class, teacher)
        student_tokenizer = load_pretrained(AutoTokenizer, config.student)
        _check_tokenizers(config, tokenizer, student_tokenizer)
    layers = _layers(config, teacher, student)
    _check_sizes(config, teacher, student)
    _check_inputs(config, {config.teacher: teacher, config.student or "the student": student}, tokenizer)
    softmax = not student.config.model_type.startswith(PREFIX)
    if softmax:
        convert(student, config.inhibitor)
    else:
        _check_conversion(config, student)
    return Pair(teacher.eval().requires_grad_(False), student.eval(), tokenizer, student_tokenizer, layers, softmax)


def _auto_class(config: DistillConfig) -> Any:
    if config.task is not None:
        return AutoModelForSequenceClassification
    return AutoModelForMaskedLM if any(stage.kind == "logits" for stage in config.stages) else AutoModel


def _from_teacher(config: DistillConfig, auto_class: Any, teacher: PreTrainedModel) -> PreTrainedModel:
    """A softmax model with the teacher's weights: all its layers, or those of the layer map."""
    kept = config.layer_map
    if kept is None:
        return load_pretrained(auto_class, config.teacher, dtype=torch.float32)
    student = load_pretrained(auto_class, config.teacher, dtype=torch.float32, num_hidden_layers=len(kept))
    theirs = layer_modules(teacher)
    for layer, source in zip(layer_modules(student), kept, strict=True):
        layer.load_state_dict(theirs[source].state_dict())
    return student


def _load_student(config: DistillConfig, name: str, auto_class: Any, teacher: PreTrainedModel) -> PreTrainedModel:
    """A student with weights of its own; the head it lacks it takes from the teacher, if that fits."""
    head: dict[str, Any] = {}
    if config.task is not None:
        theirs, ours = teacher.config, load_pretrained(AutoConfig, name)
        trained = any("ForSequenceClassification" in architecture for architecture in ours.architectures or ())
        if trained and ours.id2label != theirs.id2label:
            raise ModelError(
                name,
                expected=f"the labels of {config.teacher}, {_in_order(theirs.id2label)}",
                got=_in_order(ours.id2label),
                remedy="Fine-tune both on the task with the same labels in the same order.",
            )
        head = {
            "id2label": theirs.id2label,
            "label2id": theirs.label2id,
            "problem_type": theirs.problem_type,
        }
    student, loading = load_pretrained(auto_class, name, dtype=torch.float32, output_loading_info=True, **head)
    weights = teacher.state_dict()
    missing = {key: tensor for key, tensor in student.state_dict().items() if key in loading["missing_keys"]}
    fitting = {
        key: weights[key] for key, tensor in missing.items() if key in weights and weights[key].shape == tensor.shape
    }
    student.load_state_dict(fitting, strict=False)
    if config.origin is not None:
        _add_fine_tuning(student, teacher, config.origin, loading["missing_keys"])
    return student


@torch.no_grad()
def _add_fine_tuning(student: PreTrainedModel, teacher: PreTrainedModel, origin: str, taken: Iterable[str]) -> None:
    """Add to a student's weights, but those ``taken`` from its teacher, what fine-tuning changed in the teacher's.

    What the origin's files lack, such as a pooler, is new in the teacher: the student takes it whole.
    """
    model, loading = load_pretrained(AutoModel, origin, dtype=torch.float32, output_loading_info=True)
    before, after, prefix = model.state_dict(), teacher.base_model.state_dict(), f"{student.base_model_prefix}."
    inherited = {name.removeprefix(prefix) for name in taken}
    for name, tensor in student.base_model.state_dict().items():
        if name not in after or name in inherited:
            continue
        shapes = [tuple(weights[name].shape) for weights in (before, after) if name in weights]
        if shapes != [tuple(tensor.shape)] * 2:
            raise ModelError(
                f"origin {origin}",
                expected=f"{name} of shape {tuple(tensor.shape)}, as the student's, here and in the teacher",
                got=f"shapes {shapes}",
                remedy="Name the pretrained model that both were made from.",
            )
        if name in loading["missing_keys"]:
            tensor.copy_(after[name])
        else:
            tensor += after[name] - before[name]


def _in_order(id2label: Mapping[int, str]) -> str:
    return ", ".join(f"{number} ({id2label[number]})" for number in sorted(id2label))


def _check_map(config: DistillConfig, teacher: PreTrainedModel) -> None:
    depth = len(layer_modules(teacher))
    if config.layer_map is not None and not all(0 <= layer < depth for layer in config.layer_map):
        raise ModelError(
            "layer_map",
            expected=f"layers from 0 to {depth - 1} of {config.teacher}",
            got=str(list(config.layer_map)),
            remedy="Name the teacher's layer for each of the student's.",
        )


def _layers(config: DistillConfig, teacher: PreTrainedModel, student: PreTrainedModel) -> dict[int, int]:
    ours, theirs = len(layer_modules(student)), len(layer_modules(teacher))
    if len(config.layer_map or range(theirs)) != ours:
        raise ModelError(
            "layer_map",
            expected=f"one of the teacher's {theirs} layers for each of the student's {ours}",
            got="no layer_map" if config.layer_map is None else str(list(config.layer_map)),
            remedy=f"For example {[theirs * (layer + 1) // ours - 1 for layer in range(ours)]}.",
        )
    return dict(enumerate(config.layer_map or range(theirs)))


def _check_sizes(config: DistillConfig, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    ours, theirs = student.config, teacher.config
    shapes = [(side.num_attention_heads, side.hidden_size // side.num_attention_heads) for side in (ours, theirs)]
    for stage in config.stages:
        fed = isinstance(stage, JointStage) or (isinstance(stage, LayerwiseStage) and stage.inputs == "teacher")
        fed = fed or any(loss.startswith("output") for loss in stage.losses)
        hidden = any(loss.startswith("hidden") for loss in stage.losses)
        projected = isinstance(stage, WholeModel) and stage.projection
        if ours.hidden_size != theirs.hidden_size and (fed or (hidden and not projected)):
            raise ModelError(
                f"the {stage.kind} stage",
                expected=f"a student of the teacher's hidden size {theirs.hidden_size}",
                got=str(ours.hidden_size),
                remedy="Compare contexts, and feed layers from the student's own."
                if fed
                else "Set projection in that stage.",
            )
        contexts = any(loss.startswith("context") for loss in stage.losses)
        if contexts and shapes[0] != shapes[1]:
            raise ModelError(
                f"the {stage.kind} stage",
                expected=f"a student with the teacher's {shapes[1][0]} heads of {shapes[1][1]} values",
                got=f"{shapes[0][0]} heads of {shapes[0][1]}",
                remedy="Compare hidden states or logits instead of contexts.",
            )
    if config.calibration is not None and shapes[0] != shapes[1] and not inhibitor_layers(student):
        raise ModelError(
            "calibration",
            expected=f"a student with the teacher's {shapes[1][0]} heads of {shapes[1][1]} values",
            got=f"{shapes[0][0]} heads of {shapes[0][1]}",
            remedy="Set calibration: null; the student's attention then begins as inhibitor says.",
        )


def _check_inputs(
    config: DistillConfig, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    tasks = [stage for stage in config.stages if isinstance(stage, TaskStage)]
    lengths = [stage.max_length or get_task(stage.task).max_length for stage in tasks]
    if config.text is not None:
        lengths.append(config.text.max_length)
    for name, model in models.items():
        check_pair(name, model, tokenizer, max(lengths))


def _check_conversion(config: DistillConfig, student: PreTrainedModel) -> None:
    """A student that has inhibitor attention keeps it: what a recipe asks of the conversion would be lost."""
    has = next(iter(inhibitor_layers(student).values())).config
    allowed = {"inhibitor": (InhibitorConfig(), has), "calibration": (CalibrationConfig(), None)}
    for what, values in allowed.items():
        if getattr(config, what) not in values:
            raise ConfigError(
                what,
                expected=f"nothing, for {config.student or config.teacher} has inhibitor attention already",
                got=str(getattr(config, what)),
                remedy=f"Leave {what} out, or begin with a softmax student.",
            )


def _check_tokenizers(config: DistillConfig, theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> None:
    views: dict[str, Callable[[PreTrainedTokenizerBase], Any]] = {
        "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
        "special tokens": lambda tokenizer: {
            name: tokenizer.convert_tokens_to_ids(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        },
        "ids of a sample": lambda tokenizer: tokenizer(SAMPLE)["input_ids"],
    }
    for what, view in views.items():
        left, right = view(theirs), view(ours)
        if left != right:
            if isinstance(left, dict):
                differing = sorted({*left.items()} ^ {*right.items()})[0][0]
                left, right = (f"{len(side)} entries, {differing!r} as {side.get(differing)}" for side in (left, right))
            raise ModelError(
                f"the tokenizer of {config.student}",
                expected=f"the {what} of {config.teacher}'s, {left}",
                got=str(right),
                remedy="A student reads the teacher's tokens; train one that shares its tokenizer.",
            )
