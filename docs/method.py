"""Draw docs/method.png: one query, six keys, step by step; run as ``python docs/method.py``."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from inhibitor import inhibitor_attention

QUERY = torch.tensor([0.2, -0.4, 0.6])
KEYS = QUERY + torch.tensor(
    [[0.1, 0.1, 0.0], [1.2, -0.9, 0.7], [0.2, -0.1, 0.3], [-1.0, 1.1, 0.9], [0.9, 0.2, -0.8], [0.0, 0.2, 0.1]]
)
VALUES = torch.tensor([0.9, 0.7, -1.1, -0.8, 1.2, 0.3])
DELTA = 0.5
INK, QUIET, BLUE, ORANGE = "#1b1f24", "#b7bec7", "#2f6fb0", "#d9822b"


def main() -> None:
    """Compute each step with plain arithmetic, check the end against the operator, and draw it."""
    score = (QUERY - KEYS).abs().sum(-1) / 3**0.5
    inhibition = (score - score.mean() + DELTA).clamp(min=0)
    kept = VALUES - VALUES.clamp(-inhibition, inhibition)
    context = inhibitor_attention(QUERY.view(1, 1, 1, 3), KEYS.view(1, 1, 6, 3), VALUES.view(1, 1, 6, 1), delta=DELTA)
    if not torch.allclose(context.flatten(), kept.sum()):
        raise RuntimeError("the picture does not show what the operator computes")

    figure = Figure(figsize=(11, 3.3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    places = range(1, 7)
    axes[0].bar(places, score, color=QUIET, width=0.62)
    axes[0].axhline(score.mean(), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes[0].text(6.4, score.mean() + 0.03, "mean", ha="right", va="bottom", color=INK, fontsize=9)
    _title(axes[0], "1  Score: how far is each key?", r"$S_j = \gamma\,\sum_k |Q_k - K_{jk}|\,/\,\sqrt{d}$")
    axes[1].bar(places, inhibition, color=ORANGE, width=0.62)
    _title(axes[1], "2  Inhibition: far keys inhibit", r"$Z_j = \mathrm{ReLU}(S_j - \overline{S} + \delta)$")
    axes[2].bar(places, VALUES, color="none", edgecolor=QUIET, width=0.62, linewidth=1.2, label="value")
    axes[2].bar(places, kept, color=BLUE, width=0.62, label="what is left of it")
    axes[2].axhline(0, color=INK, linewidth=0.8)
    _title(axes[2], "3  Values lose Z, never past zero", r"$H = \eta\,\sum_j (V_j^+ - Z_j)^+ + (V_j^- + Z_j)^-$")
    axes[2].set_ylim(-1.75, 1.35)
    axes[2].legend(frameon=False, fontsize=9, loc="lower right")
    for ax in axes:
        ax.set_xlabel("key j")
        ax.set_xticks(list(places))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=INK)
    figure.savefig(Path(__file__).parent / "method.png", dpi=160)


def _title(ax: Axes, title: str, formula: str) -> None:
    ax.set_title(title, fontsize=11, pad=34)
    ax.text(0.5, 1.08, formula, ha="center", va="center", fontsize=11, transform=ax.transAxes)


if __name__ == "__main__":
    main()
