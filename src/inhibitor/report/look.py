"""The one look of every picture: type, colours, axes; and how a picture becomes a file."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, FAINT = "#22262e", "#d9dce2"
# Okabe and Ito's colour-blind-safe hues, in the order in which the recipe's states appear.
COLOURS = ("#8a8f98", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00")
PARAMETERS = {
    "gamma": "score scale γ",
    "eta": "output scale η",
    "delta": "shift δ",
    "length_exponent": "length exponent ρ",
    "reach": "reach τ",
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a token is a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "svg.hashsalt": "inhibitor",
    "image.interpolation": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """The one look of every picture; a token that the font lacks is shown as a box, without a warning."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_png(figure: Figure) -> bytes:
    """The picture on white at 150 dots per inch."""
    return _saved(figure, format="png", dpi=150)


def to_svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element without background, metadata or references to elsewhere.

    Images have no ids: matplotlib makes them of their content, and colour bars are alike.
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    text = _saved(figure, format="svg", transparent=True, metadata=nothing).decode()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    return re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"| id="image\w+"|<!--.*?-->\s*', "", text, flags=re.DOTALL)


def labelled(axis: Axes, title: str, x: str, y: str) -> None:
    """Name the panel and its axes."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def limits(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the values span much, from zero where they do not."""
    values = [value for value in values if math.isfinite(value)]
    if not values or min(values) <= 0 or max(values) < 4 * min(values):
        axis.set_ylim(bottom=min([0.0, *values]))
        return
    decades = math.log10(max(values) / min(values))
    axis.set_yscale("log")
    steps = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def layer_colours(layers: Sequence[int]) -> dict[int, Any]:
    """A colour for each layer, dark to light from the first to the last, told apart by the colour-blind too."""
    colours = mpl.colormaps["viridis"]
    return {layer: colours(0.05 + 0.8 * index / max(len(layers) - 1, 1)) for index, layer in enumerate(layers)}


def layer_bar(figure: Figure, axes: Sequence[Axes], layers: Sequence[int], aspect: float = 25) -> None:
    """Which colour is which layer, beside the lines and never over them."""
    count = len(layers)
    norm = BoundaryNorm([index - 0.5 for index in range(count + 1)], count)
    shown = range(0, count, math.ceil(count / 24))
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(list(layer_colours(layers).values()))),
        ax=list(axes),
        aspect=aspect,
        pad=0.02,
        ticks=shown,
    )
    bar.ax.set_yticklabels([str(layers[index]) for index in shown], fontsize=7)
    bar.ax.tick_params(which="both", length=0)
    bar.ax.set_title("layer", fontsize=8, fontweight="normal", loc="left")
    bar.ax.invert_yaxis()  # the first layer on top, as it is read
    bar.outline.set_visible(False)


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, **options)
        figure.set_layout_engine("none")  # laid out once, so that PNG and SVG agree
    return buffer.getvalue()
