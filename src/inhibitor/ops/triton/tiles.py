"""What the kernels are made of: tiles of rows, of scores and of sums.

Σ|q − k| has no tensor core, so a tile of scores stays in registers and grows feature by feature: one column of queries,
one of keys, one subtraction and one addition for each element. The same holds for the values, key by key. What the
threads of a program must read across each other, the transposed tiles and one tile of inhibitions, lies in a few tiles
of scratch memory that belong to the program and stay in its first-level cache.

A name in a kernel stands for tiles of one shape: around a branch or a loop Triton gives it one type.

Cutting a number to [0, 1] costs nothing on the way out of an addition, on NVIDIA's hardware and on AMD's: minimum and
maximum with 0 and 1 stand where that is meant.
"""

import triton
import triton.language as tl

# What changes with the length of a batch: no reason to compile a kernel again.
LENGTHS = ("heads", "groups", "queries", "length", "blocks", "mask_batch", "mask_head", "mask_row")
STEP = tl.constexpr(8)  # how far the loops over features, keys and rows are unrolled
STEEP = tl.constexpr(2.0**126)  # turns any difference but the smallest subnormal ones into more than ±½
LARGEST = tl.constexpr(2.0**126)  # of the values that can be scaled by a power of two


@triton.jit
def rows_of(block, heads, queries, ROWS: tl.constexpr):
    """Of a block: the number of its batch and head together, each alone, its rows, and which of these exist.

    The last rows come first: under a causal rule they have the most work.
    """
    row_blocks = tl.cdiv(queries, ROWS)
    pair = (block // row_blocks).to(tl.int64)
    rows = (row_blocks - 1 - block % row_blocks) * ROWS + tl.arange(0, ROWS)
    return pair, pair // heads, pair % heads, rows, rows < queries


@triton.jit
def tile(source, row_stride, feature_stride, rows, present, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """Some rows of one head in float32; 0 where a row is not present and beyond the last feature."""
    features = tl.arange(0, WIDTH).to(tl.int64)
    pointers = source + rows.to(tl.int64)[:, None] * row_stride + features[None, :] * feature_stride
    return tl.load(pointers, mask=present[:, None] & (features < FEATURES)[None, :], other=0.0).to(tl.float32)


@triton.jit
def put(target, row_stride, feature_stride, rows, present, tile, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """Write such rows to a result, rounded to its dtype."""
    features = tl.arange(0, WIDTH).to(tl.int64)
    pointers = target + rows.to(tl.int64)[:, None] * row_stride + features[None, :] * feature_stride
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=present[:, None] & (features < FEATURES)[None, :])


@triton.jit
def column(source, row_stride, feature_stride, rows, FEATURE: tl.constexpr):
    """Pointers to one feature of such rows."""
    feature = tl.full(rows.shape, FEATURE, tl.int64)
    return source + rows.to(tl.int64) * row_stride + feature * feature_stride


@triton.jit
def keep(scratch, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile to scratch, row by row."""
    tl.store(scratch + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)


@triton.jit
def keep_transposed(scratch, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile to scratch, column by column."""
    tl.store(scratch + tl.arange(0, COLUMNS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None], tile)


@triton.jit
def sees(mask, mask_row, mask_key, rows, keys, queries, length, MASKED: tl.constexpr, CAUSAL: tl.constexpr):
    """Which of these rows may see which of these keys."""
    sees = (rows < queries)[:, None] & (keys < length)[None, :]
    if CAUSAL:
        sees &= keys[None, :] <= rows[:, None]
    if MASKED:
        pointers = mask + rows.to(tl.int64)[:, None] * mask_row + keys.to(tl.int64)[None, :] * mask_key
        sees &= tl.load(pointers, mask=sees, other=0) != 0
    return sees


@triton.jit
def present(mask, mask_key, keys, length, MASKED: tl.constexpr, BY_ROW: tl.constexpr):
    """Which keys exist and, where all rows have the same rule, may be seen: the others are read as zeros."""
    present = keys < length
    if MASKED and not BY_ROW:
        present &= tl.load(mask + keys.to(tl.int64) * mask_key, mask=present, other=0) != 0
    return present


@triton.jit
def any_of(sees, MASKED: tl.constexpr):
    """Whether a tile has work; only a mask can leave it without."""
    if MASKED:
        return tl.max(tl.max(sees.to(tl.int32), 1), 0) > 0
    else:
        return tl.full((), 1, tl.int1)


@triton.jit
def zeros(scratch, never, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Zeros of which a thread holds four neighbours, in a column if transposed, else in a row.

    A tensor is spread over the threads as the memory is that it comes from. Plain zeros come from nowhere: every thread
    would get one row or one column, and read 33 numbers for 32 elements, one at a time. ``never`` is false.
    """
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(
        scratch + (j * ROWS + i if TRANSPOSED else i * COLUMNS + j), mask=never & (i >= 0) & (j >= 0), other=0.0
    )


@triton.jit
def distances(queries_t, keys_t, target, never, ROWS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr):
    """Σ_k |q_ik − k_jk| of a tile, from transposed tiles."""
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    distance = zeros(target, never, ROWS, KEYS, True)
    for first in range(0, FEATURES, STEP):
        for step in tl.static_range(STEP):
            query = tl.load(queries_t + (first + step) * ROWS + i)
            key = tl.load(keys_t + (first + step) * KEYS + j)
            distance += tl.abs(query[:, None] - key[None, :])
    return distance


@triton.jit
def inhibition(distance, mean, slope, shift, sees, WHOLE: tl.constexpr):
    """Z of a tile, +inf where a row may not see a key; NaN stays NaN.

    Of whole numbers z, which may go beyond 255: from there on nothing passes.
    """
    if WHOLE:
        excess = tl.minimum(tl.maximum(distance.to(tl.int32) - mean[:, None], 0), 65535)
        result = ((excess.to(tl.uint32) * slope.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.float32)
    else:
        score = slope * (distance - mean[:, None]) + shift
        result = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(sees, result, float("inf"))


@triton.jit
def magnitudes(value, SIGNED: tl.constexpr):
    """Values as magnitude below 1 and sign, and the power of two that scaled them.

    relu(|v| − z) is then one saturating subtraction. A sign carries the scale back, is infinite where v is (or is too
    large to be scaled) and NaN where v is NaN.
    """
    size = tl.abs(value)
    largest = tl.max(tl.max(tl.where(size < LARGEST, size, 0.0), 1), 0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1)
    scale = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
    back = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    magnitude = (size if SIGNED else value) * scale
    sign = tl.where(magnitude >= 1.0, float("inf"), back)
    if SIGNED:
        sign = tl.where(value < 0.0, -sign, sign)
    return magnitude, tl.where(value != value, value, sign), scale


@triton.jit
def steep(magnitude):
    """Magnitudes so large that [|v| > z] is their difference to a steep z, cut to [0, 1]."""
    return tl.where(magnitude < 2.0, magnitude, 2.0) * STEEP


@triton.jit
def directions(value, SIGNED: tl.constexpr):
    """The sign of each value, 1 in the unsigned form; where a value is 0 nothing passes and it does not matter."""
    ones = tl.full(value.shape, 1.0, tl.float32)
    return tl.where(value < 0.0, -ones, ones) if SIGNED else ones


@triton.jit
def inhibited(
    magnitudes,
    signs,
    inhibition_t,
    count,
    never,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Σ_j sign_jl · relu(|v_jl| − z_ij) over the first ``count`` keys of a tile."""
    i, features = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    total = zeros(magnitudes, never, ROWS, WIDTH, False)
    for first in range(0, count, STEP):
        for step in tl.static_range(STEP):
            inhibition = tl.load(inhibition_t + (first + step) * ROWS + i)
            magnitude = tl.load(magnitudes + (first + step) * WIDTH + features)
            sign = tl.load(signs + (first + step) * WIDTH + features)
            left = tl.minimum(tl.maximum(magnitude[None, :] - inhibition[:, None], 0.0), 1.0)
            if BY_ROW:  # 0 · NaN of a key out of sight is NaN
                total += tl.where((inhibition < float("inf"))[:, None], left * sign[None, :], 0.0)
            else:
                total += left * sign[None, :]
    return total


@triton.jit
def grad_inhibition(
    grads_t,
    magnitudes_t,
    directions_t,
    inhibition,
    target,
    never,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """−Σ_l g_il sign(v_jl) [|v_jl| > z_ij] of a tile, from transposed tiles and steep magnitudes and inhibitions."""
    i, j = tl.arange(0, ROWS), tl.arange(0, KEYS)
    total = zeros(target, never, ROWS, KEYS, True)
    for first in range(0, FEATURES, STEP):
        for step in tl.static_range(STEP):
            grad = tl.load(grads_t + (first + step) * ROWS + i)
            magnitude = tl.load(magnitudes_t + (first + step) * KEYS + j)
            direction = tl.load(directions_t + (first + step) * KEYS + j)
            passes = tl.minimum(tl.maximum(magnitude[None, :] - inhibition, 0.0), 1.0)
            total -= passes * (grad[:, None] * direction[None, :])
    return total


@triton.jit
def of_heard(grad, inhibition, reach):
    """g_i [z_ij < τ] of a tile: what Σ_j relu(τ − z_ij) adds to ∂τ and takes from ∂z."""
    return tl.where(inhibition < reach, grad.to(tl.float32)[:, None], 0.0)


@triton.jit
def passed(magnitudes_r, inhibitions, grads, count, never, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Σ_i g_il [|v_jl| > z_ij] over the first ``count`` rows of a tile, from steep magnitudes and inhibitions."""
    j, features = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    magnitude = tl.load(magnitudes_r + j[:, None] * WIDTH + features[None, :])
    total = zeros(magnitudes_r, never, KEYS, WIDTH, False)
    for first in range(0, count, STEP):
        for step in tl.static_range(STEP):
            inhibition = tl.load(inhibitions + (first + step) * KEYS + j)
            grad = tl.load(grads + (first + step) * WIDTH + features)
            total += tl.minimum(tl.maximum(magnitude - inhibition[:, None], 0.0), 1.0) * grad[None, :]
    return total


@triton.jit
def finite(tile):
    """The tile with 0 for NaN and the largest number for infinity: what follows takes differences of it."""
    cut = tl.minimum(tl.maximum(tile, -3.4e38), 3.4e38)
    return tl.where(tile == tile, cut, 0.0)


@triton.jit
def above(
    own_r,
    others,
    weights,
    sees,
    count,
    never,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Σ_j w_ij u and, if counted, Σ_j sees_ij u, with u = 1, ½ or 0 where x_i is above, at or below y_j.

    2 Σ_j w_ij u − Σ_j w_ij is Σ_j w_ij sign(x_i − y_j), and u costs one subtraction and one saturating multiplication.
    """
    i, features = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    own = tl.load(own_r + i[:, None] * WIDTH + features[None, :])
    total = zeros(own_r, never, ROWS, WIDTH, False)
    total_any = total
    for first in range(0, count, STEP):
        for step in tl.static_range(STEP):
            other = tl.load(others + (first + step) * WIDTH + features)
            weight = tl.load(weights + (first + step) * ROWS + i)
            over = tl.minimum(tl.maximum((own - other[None, :]) * STEEP + 0.5, 0.0), 1.0)
            total += weight[:, None] * over
            if COUNTED:
                total_any += tl.load(sees + (first + step) * ROWS + i)[:, None] * over
    return total, total_any
