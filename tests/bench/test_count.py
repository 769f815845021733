"""The formulas count what is done: each attention written out number by number, with every operation counted."""

import math

import pytest
import torch

from inhibitor import inhibitor_attention, inhibitor_attention_int8
from inhibitor.bench.count import (
    FORMS,
    TABLES,
    Operations,
    Shape,
    attention,
    attention_energy,
    float_energy,
    gain,
    heard,
    integer_energy,
    linear,
    linear_energy,
    widths,
)
from inhibitor.errors import InhibitorError
from inhibitor.ops.integer import integer_attention
from inhibitor.ops.integer_grid import IntegerGrid, quantize_query_key, quantize_value

SCALE = 0.25


class Machine:
    """Does one operation at a time and counts it."""

    def __init__(self):
        self.counts = dict.fromkeys(Operations.__dataclass_fields__, 0)

    def _counted(self, kind, result):
        self.counts[kind] += 1
        return result

    def add(self, a, b):
        return self._counted("additions", a + b)

    def sub(self, a, b):
        return self._counted("additions", a - b)

    def low(self, a, b):
        return self._counted("comparisons", min(a, b))

    def high(self, a, b):
        return self._counted("comparisons", max(a, b))

    def magnitude(self, a):
        return self._counted("comparisons", abs(a))

    def sign(self, a):
        return self._counted("comparisons", (a > 0) - (a < 0))

    def mul(self, a, b):
        return self._counted("multiplications", a * b)

    def div(self, a, b):
        return self._counted("divisions", a // b if isinstance(a, int) else a / b)

    def exp(self, a):
        return self._counted("lookups", math.exp(a))

    def log(self, a):
        return self._counted("lookups", math.log(a))

    def power(self, a, exponent):
        return self.exp(self.mul(self.log(a), exponent))

    def shift(self, a, by):
        return self._counted("shifts", a >> by)

    def clamp(self, a, low, high):
        return self.low(self.high(a, low), high)

    def round(self, a):
        return self._counted("additions", round(a))  # as vector units do: by adding a large number

    def sum(self, terms):
        total, *rest = terms
        for term in rest:
            total = self.add(total, term)
        return total


def softmax(m, query, keys, values):
    scores = [m.mul(m.sum([m.mul(q, k) for q, k in zip(query, key, strict=True)]), SCALE) for key in keys]
    largest = scores[0]
    for score in scores[1:]:
        largest = m.high(largest, score)
    powers = [m.exp(m.sub(score, largest)) for score in scores]
    total = m.sum(powers)
    weights = [m.div(power, total) for power in powers]
    return [m.sum([m.mul(w, v) for w, v in zip(weights, column, strict=True)]) for column in zip(*values, strict=True)]


def scaled(m, factor, z, query, reach, exponent, u):
    """η · n^(−ρ) or what else is known beforehand, times what a reach and a query's own gain make of it."""
    if u is not None:
        factor = m.mul(factor, m.exp(m.sum([m.mul(q, w) for q, w in zip(query, u, strict=True)])))
    if reach is not None:
        left = m.sum([m.high(m.sub(reach, one), 0) for one in z])
        factor = m.mul(factor, m.power(m.add(m.div(float(left), reach), 0.5), -exponent))
    return factor


def inhibitor(m, query, keys, values, slope, delta, factor, reach=None, exponent=0.0, u=None):
    distances = [m.sum([m.magnitude(m.sub(q, k)) for q, k in zip(query, key, strict=True)]) for key in keys]
    scores = [m.mul(slope, distance) for distance in distances]
    shift = m.sub(m.div(m.sum(scores), float(len(keys))), delta)
    z = [m.high(m.sub(score, shift), 0.0) for score in scores]
    minus = [m.sub(0.0, one) for one in z]
    factor = scaled(m, factor, z, query, reach, exponent, u)
    result = []
    for column in zip(*values, strict=True):
        clamped = [m.clamp(v, low, high) for v, low, high in zip(column, minus, z, strict=True)]
        result.append(m.mul(m.sum([m.sub(v, c) for v, c in zip(column, clamped, strict=True)]), factor))
    return result


def integers(m, query, keys, values, grid, one, reach=None, exponent=0.0, u=None):
    """Of a query among keys and values that were put on the grid before it; its own, ``one``, are put there now."""
    inverse, value_inverse, multiplier, shift, threshold, factor = grid
    given = query

    def code(x):
        return m.clamp(m.round(m.mul(x, inverse)), -128, 127)

    query = [code(x) for x in query]
    keys[one] = [code(x) for x in keys[one]]
    values[one] = [m.clamp(m.round(m.mul(x, value_inverse)), -127, 127) for x in values[one]]
    signs = [[(v > 0) - (v < 0) for v in row] for row in values]
    sizes = [[abs(v) for v in row] for row in values]
    signs[one], sizes[one] = [m.sign(v) for v in values[one]], [m.magnitude(v) for v in values[one]]

    distances = [m.sum([m.magnitude(m.sub(q, k)) for q, k in zip(query, key, strict=True)]) for key in keys]
    total, count = m.sum(distances), len(keys)
    middle = m.div(m.add(m.add(total, total), count), 2 * count)
    level = m.clamp(m.sub(middle, threshold), -65535, 65535)
    m.counts["additions"] += 1  # 2n, which depends on the mask alone
    z = []
    for distance in distances:
        excess = m.clamp(m.sub(distance, level), 0, 65535)
        z.append(m.low(m.shift(m.mul(excess, multiplier), shift), 255))
    factor = scaled(m, factor, z, given, reach, exponent, u)
    result = []
    for column, sign in zip(zip(*sizes, strict=True), zip(*signs, strict=True), strict=True):
        left = [m.high(m.sub(v, inhibition), 0) for v, inhibition in zip(column, z, strict=True)]
        total = sign[0] * left[0]
        for s, x in zip(sign[1:], left[1:], strict=True):
            total = m.add(total, s * x)  # an addition or a subtraction, as the sign says
        result.append(m.mul(total, factor))
    return result


@pytest.fixture(params=[(5, 4), (1, 3), (9, 8)], ids=str)
def case(request):
    """Query, keys and values as plain numbers, and as tensors of the operators."""
    keys, head_dim = request.param
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, head_dim, generator=generator) for n in (1, keys, keys))
    return (query, key, value), (query[0, 0, 0].tolist(), key[0, 0].tolist(), value[0, 0].tolist())


def check(machine, form, case, reach=False, query_gain=False):
    (_, key, _), _ = case
    shape = Shape(1, 1, key.shape[3], 1, reach, query_gain)
    assert Operations(**machine.counts) == attention(form, shape, key.shape[2])


def test_softmax(case):
    tensors, numbers = case
    machine = Machine()
    found = softmax(machine, *numbers)
    query, key, value = tensors
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    torch.testing.assert_close(torch.tensor(found), expected.flatten())
    check(machine, "softmax, float32", case)


def test_inhibitor(case):
    tensors, numbers = case
    machine = Machine()
    (query, key, value), (q, k, v) = tensors, numbers
    found = inhibitor(machine, q, k, v, 1.3 * SCALE, 0.4, 0.7)
    expected = inhibitor_attention(query, key, value, gamma=1.3, delta=0.4, eta=0.7, scale=SCALE)
    torch.testing.assert_close(torch.tensor(found), expected.flatten())
    check(machine, "inhibitor, float32", case)


@pytest.mark.parametrize(("reach", "query_gain"), [(1.7, False), (None, True), (1.7, True)])
def test_what_a_reach_and_a_gain_add(case, reach, query_gain):
    (query, key, value), (q, k, v) = case
    u = torch.linspace(-0.3, 0.5, query.shape[3]) if query_gain else None
    eta = 0.7 if u is None else 0.7 * (query @ u).exp()
    machine, exponent = Machine(), 0.6
    more = {"reach": reach, "exponent": exponent, "u": None if u is None else u.tolist()}
    found = inhibitor(machine, q, k, v, 1.3 * SCALE, 0.4, 0.7 if reach else 0.7 * len(k) ** -exponent, **more)
    parameters = {"eta": eta, "reach": reach, "length_exponent": exponent}
    expected = inhibitor_attention(query, key, value, gamma=1.3, delta=0.4, scale=SCALE, backend="torch", **parameters)
    torch.testing.assert_close(torch.tensor(found), expected.flatten())
    check(machine, "inhibitor, float32", case, reach is not None, query_gain)

    grid = IntegerGrid.of(0.02, 0.03, torch.tensor([1.3]), 0.4, SCALE, reach)
    numbers, (keys, values) = on_grid(grid, case)
    machine = Machine()
    step = 0.03 if reach else 0.03 * len(k) ** -exponent
    far = None if grid.reach is None else int(grid.reach)
    found = integers(machine, q, keys, values, (*numbers, 0.7 * step), len(k) - 1, **(more | {"reach": far}))
    del parameters["reach"]
    expected = inhibitor_attention_int8(query, key, value, grid, **parameters)
    torch.testing.assert_close(torch.tensor(found), expected.flatten())
    check(machine, "inhibitor, int8", case, reach is not None, query_gain)


def on_grid(grid, case):
    """The numbers of a grid, and keys and values on it but for the last, which is as it comes."""
    (_, key, value), (_, k, v) = case
    keys = (quantize_query_key(key, grid.query_key_step).int() - 128)[0, 0].tolist()
    values = quantize_value(value, grid.value_step)[0, 0].tolist()
    keys[-1], values[-1] = k[-1], v[-1]
    inverse = (1 / grid.query_key_step).item(), (1 / grid.value_step).item()
    return (*inverse, int(grid.multiplier), int(grid.shift), int(grid.threshold)), (keys, values)


def test_integers(case):
    (query, key, value), (q, *_) = case
    grid = IntegerGrid.of(0.02, 0.03, torch.tensor([1.3]), 0.4, SCALE)
    numbers, (keys, values) = on_grid(grid, case)
    machine = Machine()
    found = integers(machine, q, keys, values, (*numbers, 1), len(keys) - 1)
    assert found == integer_attention(query, key, value, grid).flatten().tolist()
    check(machine, "inhibitor, int8", case)


def test_linear_layers():
    shape = Shape(layers=2, heads=2, head_dim=3, intermediate=5)
    weights = [(6, 6)] * 4 + [(5, 6), (6, 5)]
    machine = Machine()
    for outputs, inputs in weights:
        for _ in range(outputs):
            machine.add(machine.sum([machine.mul(1.0, 1.0) for _ in range(inputs)]), 1.0)
    assert Operations(**machine.counts) == linear(shape)


def test_a_model_is_its_layers_and_heads():
    once = attention("inhibitor, int8", Shape(1, 1, 64, 1), 128)
    assert attention("inhibitor, int8", Shape(6, 12, 64, 1), 128) == once * 72
    assert once.lookups == 0
    assert once.divisions == 1
    assert attention("softmax, float32", Shape(1, 1, 64, 1), 128).lookups == 128


@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_no_intermediate_is_wider_than_its_bound(head_dim):
    """The worst inputs there are: codes at both ends, values at one."""
    keys = 40
    query = torch.zeros(1, 1, 1, head_dim, dtype=torch.uint8)
    key = torch.full((1, 1, keys, head_dim), 255, dtype=torch.uint8)
    value = torch.full((1, 1, keys, head_dim), 127, dtype=torch.int8)
    bits = widths(keys, head_dim, reach=True)
    assert (255 * head_dim).bit_length() == bits["distance D"] <= 16
    assert int(keys * 255 * head_dim).bit_length() == bits["sum of distances T"]
    grid = IntegerGrid.of(1e-4, 1.0, torch.ones(1), -1e3, 1.0, reach=1e3)
    total = integer_attention(query, key, value, grid).flatten().tolist()
    assert total == [127 * keys] * head_dim + [255 * keys]
    assert (127 * keys).bit_length() + 1 == bits["sum of values H"]
    assert (255 * keys).bit_length() == bits["sum of what is heard R"]
    assert bits.keys() - widths(keys, head_dim).keys() == {"difference w − z", "sum of what is heard R"}


def test_energy_of_one_of_each():
    table = TABLES[0]
    assert float_energy(Operations(additions=2, comparisons=1), table) == pytest.approx(3 * 0.9)
    assert float_energy(Operations(multiplications=2), table) == pytest.approx(2 * 3.7)
    shape = Shape(1, 1, 2, 3)
    products = 4 * 4 + 2 * 2 * 3
    assert linear_energy(shape, table, int8=True) == pytest.approx(products * (0.1 + 0.2))
    assert linear_energy(shape, table, int8=False) == pytest.approx(products * (0.9 + 3.7))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_integers_cost_less_than_floats(table):
    shape = Shape(6, 12, 64, 3072)
    energy = {form: attention_energy(form, shape, 512, table) for form in FORMS}
    assert energy["inhibitor, int8"] < energy["inhibitor, float32"]
    assert energy["inhibitor, int8"] < energy["softmax, float32"]
    assert energy["inhibitor, int8"] == 72 * integer_energy(512, 64, table)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_reach_and_a_gain_cost_what_they_add(table):
    def energy(form, **more):
        return attention_energy(form, Shape(1, 1, 64, 1, **more), 64, table)

    floats = "inhibitor, float32"
    assert energy(floats, reach=True) - energy(floats) == pytest.approx(float_energy(heard(64), table))
    for form in (floats, "inhibitor, int8"):
        added = energy(form, query_gain=True) - energy(form)
        assert added == pytest.approx(float_energy(gain(64), table))
    # In integers 64 differences and comparisons of 8 bits, 63 sums of 14; then a half, a quotient, a power, a product
    after = Operations(additions=1, multiplications=2, divisions=1, lookups=2)
    wide = min(bits for bits in table.add if bits >= 14)
    expected = 2 * 64 * table.add[8] + 63 * table.add[wide] + float_energy(after, table)
    assert energy("inhibitor, int8", reach=True) - energy("inhibitor, int8") == pytest.approx(expected)


def test_unknown_forms_are_refused():
    with pytest.raises(InhibitorError, match="softmax, float32"):
        attention("cosine", Shape(1, 1, 1, 1), 1)
