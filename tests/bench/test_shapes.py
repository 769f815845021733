"""How shapes are written, read and refused."""

import pytest

from inhibitor.bench.shapes import FULL, QUICK, Shape
from inhibitor.errors import ConfigError


@pytest.mark.parametrize("text", dict.fromkeys((*FULL, *QUICK)))
def test_a_shape_reads_back_as_it_was_written(text):
    assert str(Shape.parse(text)) == text


def test_what_a_shape_says():
    shape = Shape.parse("2x3x1:5x7+masks")
    assert (shape.batch, shape.heads, shape.queries, shape.keys, shape.head_dim) == (2, 3, 1, 5, 7)
    assert shape.masks == ("none", "padding", "causal")
    assert shape.elements == 2 * 3 * 5 * 7
    assert shape.directions == ("forward",)
    assert Shape.parse("2x3x4x7").directions == ("forward", "forward + backward")


@pytest.mark.parametrize(
    "text", ["", "12x64", "1x2x3x4x5", "1x2x0x4", "1x2x3:x4", "1x2x-3x4", "1x2x3x4+mask", "axbxcxd"]
)
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match="For example 1x12x512x64"):
        Shape.parse(text)
