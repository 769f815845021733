"""The forward pass of the integer operator, of the tiles of the float operator and with its ``row_means``.

What these add up are whole numbers below 2²⁴, which float32 holds exactly: distances are at most 65280, sums of values
up to 127 · 2¹⁷ (docs/integer.md). So the loops are the float operator's, and the results are the reference's, bit by
bit, in whatever order they are added.
"""

import triton
import triton.language as tl

from inhibitor.ops.triton import tiles


@triton.jit(do_not_specialize=tiles.LENGTHS)
def integer_forward(
    query, key, value, mask, means, multipliers, shifts, thresholds, output, scratch,
    query_batch, query_head, query_row, query_feature,
    key_batch, key_head, key_row, key_feature,
    value_batch, value_head, value_row, value_feature,
    mask_batch, mask_head, mask_row, mask_key,
    output_batch, output_head, output_row, output_feature,
    heads, groups, queries, length, blocks,
    HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BY_ROW: tl.constexpr, SIGNED: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Σ_j of the inhibited values, whole numbers in float32, from the rounded means of ``row_means``."""
    never = queries < 0
    queries_t = scratch + tl.program_id(0).to(tl.int64) * SIZE
    keys_t = queries_t + ROWS * HEAD_WIDTH
    magnitudes = keys_t + KEYS * HEAD_WIDTH
    signs = magnitudes + KEYS * VALUE_WIDTH
    inhibition_t = signs + KEYS * VALUE_WIDTH
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        pair, batch, head, rows, exist = tiles.rows_of(block, heads, queries, ROWS)
        key_base = key + batch * key_batch + head // groups * key_head
        value_base = value + batch * value_batch + head // groups * value_head
        mask_base = mask + batch * mask_batch + head * mask_head
        multiplier, shift = tl.load(multipliers + head), tl.load(shifts + head)
        base = query + batch * query_batch + head * query_head
        tile = tiles.tile(base, query_row, query_feature, rows, exist, HEAD_DIM, HEAD_WIDTH)
        tiles.keep_transposed(queries_t, tile, ROWS, HEAD_WIDTH)
        middle = tl.zeros((ROWS,), tl.int32) - tl.load(thresholds + head)
        if CENTER:
            middle += tl.load(means + pair * queries + rows, mask=exist, other=0)
        total = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
        last = tl.minimum(length, tl.max(rows, 0) + 1) if CAUSAL else length
        for first in range(0, last, KEYS):
            keys = first + tl.arange(0, KEYS)
            sees = tiles.sees(mask_base, mask_row, mask_key, rows, keys, queries, length, MASKED, CAUSAL)
            if tiles.any_of(sees, MASKED):
                present = tiles.present(mask_base, mask_key, keys, length, MASKED, BY_ROW)
                tile = tiles.tile(key_base, key_row, key_feature, keys, present, HEAD_DIM, HEAD_WIDTH)
                tiles.keep_transposed(keys_t, tile, KEYS, HEAD_WIDTH)
                tile = tiles.tile(value_base, value_row, value_feature, keys, present, VALUE_DIM, VALUE_WIDTH)
                magnitude, sign = tiles.integer_magnitudes(tile, SIGNED)
                tiles.keep(magnitudes, magnitude, KEYS, VALUE_WIDTH)
                tiles.keep(signs, sign, KEYS, VALUE_WIDTH)
                tl.debug_barrier()
                distance = tiles.distances(queries_t, keys_t, inhibition_t, never, ROWS, KEYS, HEAD_DIM)
                inhibition = tiles.integer_inhibition(distance, middle, multiplier, shift, sees)
                tiles.keep_transposed(inhibition_t, inhibition, ROWS, KEYS)
                tl.debug_barrier()
                count = tl.minimum(last - first, KEYS)
                total += tiles.inhibited(magnitudes, signs, inhibition_t, count, never, ROWS, VALUE_WIDTH, False)
                tl.debug_barrier()
        target = output + batch * output_batch + head * output_head
        tiles.put(target, output_row, output_feature, rows, exist, total, VALUE_DIM, VALUE_WIDTH)
