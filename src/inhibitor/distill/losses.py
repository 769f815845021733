"""Losses and errors between student and teacher, as pure functions.

Every loss is a mean over the rows of a batch, and within a row a mean over its real tokens: padding never counts, and
a batch taken in parts costs just what it costs as a whole. An empty row costs nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional

from inhibitor.errors import ModelError


def mse(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of (student − teacher)²: of contexts (METHOD, E1 stage 1) and of hidden states (stage 2).

    Args:
        student: (batch, length, …): a context (batch, length, heads, value_dim) or hidden states.
        teacher: The same shape.
        attention_mask: (batch, length), nonzero for real tokens.

    Raises:
        ModelError: The shapes differ, here and in every other loss.
    """
    _check("mse", student, teacher)
    return _by_row(_real(student - teacher, attention_mask).square().flatten(2).mean(-1), attention_mask).mean()


def relative(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """Σ(student − teacher)² / Σ teacher² over the real tokens of a row: layers of any size weigh the same."""
    _check("relative", student, teacher)
    error, size = (_real(values, attention_mask).square().flatten(1).sum(-1) for values in (student - teacher, teacher))
    return (error / size.clamp(min=torch.finfo(size.dtype).tiny)).mean()


def cosine(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """1 − cos(student, teacher) of hidden states (batch, length, hidden_size), as DistilBERT's (arXiv 1910.01108)."""
    _check("cosine", student, teacher)
    student, teacher = (_real(values, attention_mask) for values in (student, teacher))
    return _by_row(1 - functional.cosine_similarity(student, teacher, dim=-1), attention_mask).mean()


def soft_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) of logits (batch, classes) (arXiv 1503.02531, section 2)."""
    _check("soft_probabilities", student, teacher)
    return _divergence(student, teacher, temperature).mean()


def masked_lm(student: Tensor, teacher: Tensor, attention_mask: Tensor, temperature: float) -> Tensor:
    """``soft_probabilities`` over the vocabulary at every real token; logits (batch, length, vocabulary)."""
    _check("masked_lm", student, teacher)
    student, teacher = (_real(values, attention_mask) for values in (student, teacher))
    return _by_row(_divergence(student, teacher, temperature), attention_mask).mean()


def predictions_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of (student − teacher)² of a regression's predictions (batch, 1)."""
    _check("predictions_mse", student, teacher)
    return (student - teacher).square().mean()


def hard_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The task's own loss: cross entropy of (batch, classes) and class ids, or squared error of (batch, 1) and numbers.

    A class id of −100 is no label, and its row costs nothing.
    """
    if len(labels) != len(logits):
        raise ModelError(
            "hard_labels", expected=f"{len(logits)} labels", got=str(len(labels)), remedy="Give one label to each row."
        )
    if logits.shape[-1] == 1:
        return (logits[:, 0] - labels.to(logits)).square().mean()
    return functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none").mean()


def squared_errors(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """(2,) in float64: Σ(student − teacher)² and Σ teacher², to be added up over batches.

    Their ratio is the relative squared error: 0 for a perfect student, 1 for one that always says 0.
    """
    parts = (_real(values, attention_mask).double().square().sum() for values in (student - teacher, teacher))
    return torch.stack(list(parts))


def _real(values: Tensor, attention_mask: Tensor) -> Tensor:
    """(batch, length, …) values with padding set to 0 before anything is done with it, so that no NaN there counts."""
    return values.masked_fill(~attention_mask.bool().view(*attention_mask.shape, *[1] * (values.dim() - 2)), 0)


def _by_row(values: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of (batch, length) values over the real tokens of each row, (batch,); 0 where there are none."""
    real = attention_mask.bool()
    return values.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL over the last dimension."""
    ours, theirs = (functional.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * temperature**2


def _check(loss: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            loss,
            expected=f"the teacher's shape {tuple(teacher.shape)}",
            got=f"the student's {tuple(student.shape)}",
            remedy="Choose a loss that this pair allows; for hidden states of another size, set projection.",
        )
