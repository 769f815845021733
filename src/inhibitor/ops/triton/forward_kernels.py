"""The kernels of the forward pass. A program takes blocks of rows in turn and goes through the keys tile by tile."""

import triton
import triton.language as tl

from inhibitor.ops.triton import tiles


@triton.jit(do_not_specialize=tiles.LENGTHS)
def row_means(
    query, key, mask, means, counts, scratch,
    query_batch, query_head, query_row, query_feature,
    key_batch, key_head, key_row, key_feature,
    mask_batch, mask_head, mask_row, mask_key,
    heads, groups, queries, length, blocks,
    HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BY_ROW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """For each row, the mean of Σ|q − k| over the keys that it may see, and how many these are.

    That of whole numbers is exact, and rounded half up.
    """
    never = queries < 0
    queries_t = scratch + tl.program_id(0).to(tl.int64) * SIZE
    keys_t = queries_t + ROWS * HEAD_WIDTH
    target = keys_t + KEYS * HEAD_WIDTH
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        pair, batch, head, rows, exist = tiles.rows_of(block, heads, queries, ROWS)
        key_base = key + batch * key_batch + head // groups * key_head
        mask_base = mask + batch * mask_batch + head * mask_head
        base = query + batch * query_batch + head * query_head
        query_tile = tiles.tile(base, query_row, query_feature, rows, exist, HEAD_DIM, HEAD_WIDTH)
        tiles.keep_transposed(queries_t, query_tile, ROWS, HEAD_WIDTH)
        total = tl.zeros((ROWS,), tl.int64 if WHOLE else tl.float32)
        count = total
        last = tl.minimum(length, tl.max(rows, 0) + 1) if CAUSAL else length
        for first in range(0, last, KEYS):
            keys = first + tl.arange(0, KEYS)
            sees = tiles.sees(mask_base, mask_row, mask_key, rows, keys, queries, length, MASKED, CAUSAL)
            if tiles.any_of(sees, MASKED):
                present = tiles.present(mask_base, mask_key, keys, length, MASKED, BY_ROW)
                key_tile = tiles.tile(key_base, key_row, key_feature, keys, present, HEAD_DIM, HEAD_WIDTH)
                tiles.keep_transposed(keys_t, key_tile, KEYS, HEAD_WIDTH)
                tl.debug_barrier()
                distance = tiles.distances(queries_t, keys_t, target, never, ROWS, KEYS, HEAD_DIM)
                total += tl.sum(tl.where(sees, distance, 0.0), 1).to(total.dtype)
                count += tl.sum(sees.to(tl.float32), 1).to(total.dtype)
                tl.debug_barrier()
        seen = tl.maximum(count, 1)
        mean = (2 * total + seen) // (2 * seen) if WHOLE else total / seen
        tl.store(means + pair * queries + rows, mean.to(means.dtype.element_ty), mask=exist)
        tl.store(counts + pair * queries + rows, count.to(counts.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=tiles.LENGTHS)
def forward(
    query, key, value, mask, means, slopes, shifts, output, scratch,
    query_batch, query_head, query_row, query_feature,
    key_batch, key_head, key_row, key_feature,
    value_batch, value_head, value_row, value_feature,
    mask_batch, mask_head, mask_row, mask_key,
    output_batch, output_head, output_row, output_feature,
    heads, groups, queries, length, blocks, reaches,
    HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BY_ROW: tl.constexpr, SIGNED: tl.constexpr, CENTER: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Σ_j of the inhibited values, from the means of ``row_means``.

    Of whole numbers these are t, ``slopes`` the multipliers, and the sum is exact: integers below 2²⁴ in float32.
    With ``reaches`` τ, else None, the result has one feature more: Σ_j relu(τ − z_ij).
    """
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
        slope, shift = tl.load(slopes + head), tl.load(shifts + head)
        base = query + batch * query_batch + head * query_head
        query_tile = tiles.tile(base, query_row, query_feature, rows, exist, HEAD_DIM, HEAD_WIDTH)
        tiles.keep_transposed(queries_t, query_tile, ROWS, HEAD_WIDTH)
        mean = tl.zeros((ROWS,), means.dtype.element_ty)
        if CENTER or WHOLE:
            mean = tl.load(means + pair * queries + rows, mask=exist, other=0)
        total = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
        if reaches is not None:
            reach = tl.load(reaches + head)
            heard = tl.zeros((ROWS,), tl.int32 if WHOLE else tl.float32)
        last = tl.minimum(length, tl.max(rows, 0) + 1) if CAUSAL else length
        for first in range(0, last, KEYS):
            keys = first + tl.arange(0, KEYS)
            sees = tiles.sees(mask_base, mask_row, mask_key, rows, keys, queries, length, MASKED, CAUSAL)
            if tiles.any_of(sees, MASKED):
                present = tiles.present(mask_base, mask_key, keys, length, MASKED, BY_ROW)
                key_tile = tiles.tile(key_base, key_row, key_feature, keys, present, HEAD_DIM, HEAD_WIDTH)
                tiles.keep_transposed(keys_t, key_tile, KEYS, HEAD_WIDTH)
                value_tile = tiles.tile(value_base, value_row, value_feature, keys, present, VALUE_DIM, VALUE_WIDTH)
                magnitude, sign, scale = tiles.magnitudes(value_tile, SIGNED)
                tiles.keep(magnitudes, magnitude, KEYS, VALUE_WIDTH)
                tiles.keep(signs, sign, KEYS, VALUE_WIDTH)
                tl.debug_barrier()
                distance = tiles.distances(queries_t, keys_t, inhibition_t, never, ROWS, KEYS, HEAD_DIM)
                inhibition = tiles.inhibition(distance, mean, slope, shift, sees, WHOLE)
                tiles.keep_transposed(inhibition_t, inhibition * scale, ROWS, KEYS)
                total += tl.sum(tl.where(inhibition != inhibition, inhibition, 0.0), 1)[:, None]  # saturation drops NaN
                if reaches is not None:
                    left = tl.maximum(reach - inhibition, 0.0, propagate_nan=tl.PropagateNan.ALL)
                    heard += tl.sum(left, 1).to(heard.dtype)
                tl.debug_barrier()
                count = tl.minimum(last - first, KEYS)
                if BY_ROW and tiles.any_of(~(tl.abs(sign) < float("inf")), True):
                    total += tiles.inhibited(magnitudes, signs, inhibition_t, count, never, ROWS, VALUE_WIDTH, True)
                else:
                    total += tiles.inhibited(magnitudes, signs, inhibition_t, count, never, ROWS, VALUE_WIDTH, False)
                tl.debug_barrier()
        target = output + batch * output_batch + head * output_head
        tiles.put(target, output_row, output_feature, rows, exist, total, VALUE_DIM, VALUE_WIDTH)
        if reaches is not None:
            pointers = tiles.column(target, output_row, output_feature, rows, VALUE_DIM)
            tl.store(pointers, heard.to(output.dtype.element_ty), mask=exist)
