"""How many operations attention takes, of which width, and what they would cost in energy: by formula.

Every count is of one token at a given length, as a query that sees all keys, of a whole model. The formulas count the
textbook form of each attention, operation by operation; they know no vector instruction and no fused multiply-add.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from inhibitor.errors import ConfigError

Widths = Mapping[str, int]


@dataclass(frozen=True)
class Operations:
    """Operations by kind; a subtraction is an addition, a minimum, maximum, sign or absolute value a comparison.

    Args:
        additions: With what is accumulated.
        comparisons: With clamps: two each.
        multiplications: With rescaling.
        divisions: Of the row's sum, or by the number of keys.
        lookups: Exponentials and logarithms; a power is one of each and a product.
        shifts: Of an integer to the right.
    """

    additions: int = 0
    comparisons: int = 0
    multiplications: int = 0
    divisions: int = 0
    lookups: int = 0
    shifts: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Operations":
        return Operations(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class Shape:
    """What of a model the counts depend on; ``reach`` and ``query_gain`` are those of its inhibitor attention."""

    layers: int
    heads: int
    head_dim: int
    intermediate: int
    reach: bool = False
    query_gain: bool = False

    @property
    def hidden(self) -> int:
        """Features of a hidden state."""
        return self.heads * self.head_dim


def softmax(keys: int, head_dim: int) -> Operations:
    """Softmax attention of one query and head: scores, scale, maximum, exponentials, sum, quotients, mean of values."""
    return Operations(
        additions=keys * (head_dim - 1) + keys + (keys - 1) + (keys - 1) * head_dim,
        comparisons=keys - 1,
        multiplications=keys * head_dim + keys + keys * head_dim,
        divisions=keys,
        lookups=keys,
    )


def inhibitor(keys: int, head_dim: int) -> Operations:
    """Inhibitor attention of one query and head in floating point, centred and signed.

    Distances (difference, absolute value, sum), slope, mean, shift, ReLU; for each value the two halves of the clamp to
    ±Z and what is left, summed; and one rescale.
    """
    distance = Operations(additions=keys * head_dim + keys * (head_dim - 1), comparisons=keys * head_dim)
    inhibition = Operations(additions=(keys - 1) + 1 + keys, comparisons=keys, multiplications=keys, divisions=1)
    value = Operations(additions=keys + keys * head_dim + (keys - 1) * head_dim, comparisons=2 * keys * head_dim)
    return distance + inhibition + value + Operations(multiplications=head_dim)


def integer(keys: int, head_dim: int) -> Operations:
    """Inhibitor attention of one query and head in integers, as docs/integer.md specifies it.

    A rounding mean and its shift (a double is an addition), a saturated excess, a fixed-point product, and for each
    value a subtraction that stops at 0 and is added or subtracted by the value's sign. Putting the query, one key and
    one value on the grid counts a product, a rounding (an addition) and a clamp for each feature, the magnitude and
    sign of the value a comparison each.
    """
    grid = Operations(additions=3 * head_dim, comparisons=8 * head_dim, multiplications=3 * head_dim)
    distance = Operations(additions=keys * head_dim + keys * (head_dim - 1), comparisons=keys * head_dim)
    inhibition = Operations(
        additions=(keys - 1) + 3 + 1 + keys,
        comparisons=2 + 2 * keys + keys,
        multiplications=keys,
        divisions=1,
        shifts=keys,
    )
    value = Operations(additions=keys * head_dim + (keys - 1) * head_dim, comparisons=keys * head_dim)
    return grid + distance + inhibition + value + Operations(multiplications=head_dim)


def heard(keys: int) -> Operations:
    """What a reach adds to a query and head of inhibitor attention, in floats or integers.

    For each key what is left of the reach; the sum of that, in reaches, and a half; its power, and the product with η.
    """
    return Operations(additions=keys + (keys - 1) + 1, comparisons=keys, multiplications=2, divisions=1, lookups=2)


def gain(head_dim: int) -> Operations:
    """What a gain of each query's own adds: a scalar product, its exponential, and the product with η."""
    return Operations(additions=head_dim - 1, multiplications=head_dim + 1, lookups=1)


def linear(shape: Shape) -> Operations:
    """The linear layers of one layer: four projections and two of the feed-forward part, with their biases."""
    products = 4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate
    return Operations(additions=products, multiplications=products)


FORMS: dict[str, Callable[[int, int], Operations]] = {
    "softmax, float32": softmax,
    "inhibitor, float32": inhibitor,
    "inhibitor, int8": integer,
}


def attention(form: str, shape: Shape, length: int) -> Operations:
    """The attention of a whole model, for one token.

    Args:
        form: A key of ``FORMS``.
        shape: Of the model.
        length: Keys that the token sees.

    Raises:
        ConfigError: Another form, or a length below 1.

    Example:
        >>> attention("inhibitor, int8", Shape(6, 12, 64, 3072), 128).lookups
        0
    """
    if form not in FORMS or length < 1:
        raise ConfigError(
            "count",
            expected=f"one of {', '.join(FORMS)} and a length of 1 at least",
            got=f"{form!r}, {length}",
            remedy="Correct them.",
        )
    operations = FORMS[form](length, shape.head_dim)
    if form.startswith("inhibitor"):
        operations += heard(length) * shape.reach + gain(shape.head_dim) * shape.query_gain
    return operations * (shape.layers * shape.heads)


def widths(keys: int, head_dim: int, reach: bool = False) -> dict[str, int]:
    """Bits of every intermediate of the integer form at worst, sign included, by the bounds of docs/integer.md.

    Example:
        >>> widths(128, 64)["distance D"]
        14
    """
    distance = 255 * head_dim
    return {
        "query and key q, k": 8,
        "value v": 8,
        "difference |q − k|": 8,
        "distance D": distance.bit_length(),
        "sum of distances T": (distance * keys).bit_length(),
        "2T + n": (2 * distance * keys + keys).bit_length(),
        "shift t": 17,
        "excess e": 16,
        "product e · m": 32,
        "inhibition z": 8,
        "difference |v| − z": 9,
        "sum of values H": (127 * keys).bit_length() + 1,
    } | ({"difference w − z": 9, "sum of what is heard R": (255 * keys).bit_length()} if reach else {})


@dataclass(frozen=True)
class Table:
    """Published energies per operation, in picojoules, by the width of the operands.

    Args:
        name: The process.
        source: Where they are from.
        add: Integer additions by bits.
        multiply: Integer multiplications by bits.
        float_add: An addition in float32.
        float_multiply: A multiplication in float32.
    """

    name: str
    source: str
    add: Mapping[int, float]
    multiply: Mapping[int, float]
    float_add: float
    float_multiply: float


TABLES = (
    Table(
        "45 nm",
        "Horowitz, Computing's energy problem, ISSCC 2014",
        {8: 0.03, 16: 0.05, 32: 0.1},
        {8: 0.2, 32: 3.1},
        0.9,
        3.7,
    ),
    Table(
        "7 nm",
        "Jouppi et al., Ten lessons from three generations shaped Google's TPUv4i, ISCA 2021",
        {8: 0.007, 32: 0.03},
        {8: 0.07, 32: 1.48},
        0.38,
        1.31,
    ),
)
# No table has these. A division: an estimate of the reciprocal, two Newton steps, a product. An exponential: a
# polynomial of degree five and the split of its argument.
_DIVISION = Operations(additions=2, multiplications=5)
_EXPONENTIAL = Operations(additions=6, multiplications=6)


def float_energy(operations: Operations, table: Table) -> float:
    """Picojoules of operations in float32; a comparison is taken for an addition."""
    simple = operations + _DIVISION * operations.divisions + _EXPONENTIAL * operations.lookups
    return table.float_add * (simple.additions + simple.comparisons) + table.float_multiply * simple.multiplications


def integer_energy(keys: int, head_dim: int, table: Table, reach: bool = False) -> float:
    """Picojoules of the integer form of one query and head, each operation at the width of its operands.

    A width that the table lacks is charged as the next wider one. What enters and leaves the integers is in float32.
    """
    bits = widths(keys, head_dim, reach)
    total, product = bits["2T + n"], bits["product e · m"]
    pairs = keys * head_dim
    additions = [
        (8, pairs + pairs),  # differences of codes, and of values and inhibition
        (bits["distance D"], keys * (head_dim - 1)),
        (total, keys - 1 + 3),
        (17, 1 + keys),
        (bits["sum of values H"], (keys - 1) * head_dim),
    ]
    comparisons = [(8, pairs + pairs), (17, 2 + 2 * keys), (product, keys + keys)]  # the shift among them
    if reach:
        additions += [(8, keys), (bits["sum of what is heard R"], keys - 1)]
        comparisons.append((8, keys))
    energy = sum(count * _at(table.add, width) for width, count in (*additions, *comparisons))
    energy += keys * _at(table.multiply, 16) + _at(table.multiply, total) * _DIVISION.multiplications
    grid = Operations(additions=3 * head_dim, comparisons=8 * head_dim, multiplications=4 * head_dim)
    after = Operations(additions=1, multiplications=2, divisions=1, lookups=2) * reach
    return energy + float_energy(grid + after, table)


def attention_energy(form: str, shape: Shape, length: int, table: Table) -> float:
    """Picojoules of a whole model's attention for one token: a model of the arithmetic alone, memory left out."""
    times = shape.layers * shape.heads
    if form == "inhibitor, int8":
        scale = gain(shape.head_dim) * shape.query_gain
        return times * (integer_energy(length, shape.head_dim, table, shape.reach) + float_energy(scale, table))
    return float_energy(attention(form, shape, length), table)


def linear_energy(shape: Shape, table: Table, *, int8: bool) -> float:
    """Picojoules of a whole model's linear layers for one token; in int8 the sums are of 32 bits."""
    operations = linear(shape) * shape.layers
    if not int8:
        return float_energy(operations, table)
    return table.add[32] * operations.additions + table.multiply[8] * operations.multiplications


def _at(energies: Mapping[int, float], width: int) -> float:
    """The energy at a width, or at the next wider one in the table; beyond the widest, in as many words of it."""
    wider = [bits for bits in sorted(energies) if bits >= width]
    widest = max(energies)
    return energies[wider[0]] if wider else energies[widest] * -(-width // widest)
