"""The kernels of the backward pass: one goes by rows for ∂Q, one by keys for ∂K and ∂V.

Each recomputes the scores. Nothing is added up by two programs at once, so the bits are the same in every run.
"""

import triton
import triton.language as tl

from inhibitor.ops.triton import tiles


@triton.jit(do_not_specialize=tiles.LENGTHS)
def by_rows(
    grad, query, key, value, mask, means, counts, slopes, shifts, grad_query,
    shares, slope_sums, shift_sums, reach_sums, scratch,
    grad_batch, grad_head, grad_row, grad_feature,
    query_batch, query_head, query_row, query_feature,
    key_batch, key_head, key_row, key_feature,
    value_batch, value_head, value_row, value_feature,
    mask_batch, mask_head, mask_row, mask_key,
    target_batch, target_head, target_row, target_feature,
    heads, groups, queries, length, blocks, reaches,
    HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BY_ROW: tl.constexpr, SIGNED: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """∂Q and, for each row, the mean of ∂S over its keys (``shares``) and its parts of ∂γ/scale, ∂δ and ∂τ.

    With ``reaches`` τ, else None, ``grad`` has one feature more, that of Σ_j relu(τ − z_ij).
    """
    never = queries < 0
    queries_t = scratch + tl.program_id(0).to(tl.int64) * SIZE
    queries_r = queries_t + ROWS * HEAD_WIDTH
    grads_t = queries_r + ROWS * HEAD_WIDTH
    keys_t = grads_t + ROWS * VALUE_WIDTH
    keys_r = keys_t + KEYS * HEAD_WIDTH
    magnitudes_t = keys_r + KEYS * HEAD_WIDTH
    directions_t = magnitudes_t + KEYS * VALUE_WIDTH
    weights_t = directions_t + KEYS * VALUE_WIDTH
    sees_t = weights_t + ROWS * KEYS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        pair, batch, head, rows, exist = tiles.rows_of(block, heads, queries, ROWS)
        key_base = key + batch * key_batch + head // groups * key_head
        value_base = value + batch * value_batch + head // groups * value_head
        mask_base = mask + batch * mask_batch + head * mask_head
        slope, shift = tl.load(slopes + head), tl.load(shifts + head)
        base = query + batch * query_batch + head * query_head
        query_tile = tiles.tile(base, query_row, query_feature, rows, exist, HEAD_DIM, HEAD_WIDTH)
        tiles.keep_transposed(queries_t, query_tile, ROWS, HEAD_WIDTH)
        tiles.keep(queries_r, tiles.finite(query_tile), ROWS, HEAD_WIDTH)
        base = grad + batch * grad_batch + head * grad_head
        grad_tile = tiles.tile(base, grad_row, grad_feature, rows, exist, VALUE_DIM, VALUE_WIDTH)
        tiles.keep_transposed(grads_t, grad_tile, ROWS, VALUE_WIDTH)
        if reaches is not None:
            reach = tl.load(reaches + head)
            heard = tl.load(tiles.column(base, grad_row, grad_feature, rows, VALUE_DIM), mask=exist, other=0.0)
            reach_sum = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS,), tl.float32)
        if CENTER:
            mean = tl.load(means + pair * queries + rows, mask=exist, other=0.0)
        above = tl.zeros((ROWS, HEAD_WIDTH), tl.float32)
        above_any = above
        weight_sum, slope_sum = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        last = tl.minimum(length, tl.max(rows, 0) + 1) if CAUSAL else length
        for first in range(0, last, KEYS):
            keys = first + tl.arange(0, KEYS)
            sees = tiles.sees(mask_base, mask_row, mask_key, rows, keys, queries, length, MASKED, CAUSAL)
            if tiles.any_of(sees, MASKED):
                present = tiles.present(mask_base, mask_key, keys, length, MASKED, BY_ROW)
                key_tile = tiles.tile(key_base, key_row, key_feature, keys, present, HEAD_DIM, HEAD_WIDTH)
                tiles.keep_transposed(keys_t, key_tile, KEYS, HEAD_WIDTH)
                tiles.keep(keys_r, tiles.finite(key_tile), KEYS, HEAD_WIDTH)
                value_tile = tiles.tile(value_base, value_row, value_feature, keys, present, VALUE_DIM, VALUE_WIDTH)
                magnitude, _, scale = tiles.magnitudes(value_tile, SIGNED)
                tiles.keep_transposed(magnitudes_t, tiles.steep(magnitude), KEYS, VALUE_WIDTH)
                tiles.keep_transposed(directions_t, tiles.directions(value_tile, SIGNED), KEYS, VALUE_WIDTH)
                tl.debug_barrier()
                distance = tiles.distances(queries_t, keys_t, weights_t, never, ROWS, KEYS, HEAD_DIM)
                inhibition = tiles.inhibition(distance, mean, slope, shift, sees, False)
                steep = inhibition * scale * tiles.STEEP
                weight = tiles.grad_inhibition(
                    grads_t, magnitudes_t, directions_t, steep, weights_t, never, ROWS, KEYS, VALUE_DIM
                )
                if reaches is not None:
                    of_heard = tiles.of_heard(heard, inhibition, reach)
                    reach_sum += tl.sum(of_heard, 1)
                    weight -= of_heard
                weight = tl.where(sees & (inhibition > 0.0), weight, 0.0)
                weight_sum += tl.sum(weight, 1)
                slope_sum += tl.sum(tl.where(sees, weight * (distance - mean[:, None]), 0.0), 1)
                tiles.keep_transposed(weights_t, weight, ROWS, KEYS)
                if CENTER:
                    tiles.keep_transposed(sees_t, sees.to(tl.float32), ROWS, KEYS)
                tl.debug_barrier()
                count = tl.minimum(last - first, KEYS)
                more, more_any = tiles.above(
                    queries_r, keys_r, weights_t, sees_t, count, never, ROWS, HEAD_WIDTH, CENTER
                )
                above += more
                above_any += more_any
                tl.debug_barrier()
        result = 2.0 * above - weight_sum[:, None]
        if CENTER:
            seen = tl.load(counts + pair * queries + rows, mask=exist, other=0.0)
            share = weight_sum / tl.maximum(seen, 1.0)
            result -= share[:, None] * (2.0 * above_any - seen[:, None])
            tl.store(shares + pair * queries + rows, share, mask=exist)
        target = grad_query + batch * target_batch + head * target_head
        tiles.put(target, target_row, target_feature, rows, exist, slope * result, HEAD_DIM, HEAD_WIDTH)
        tl.store(slope_sums + pair * queries + rows, slope_sum, mask=exist)
        tl.store(shift_sums + pair * queries + rows, weight_sum, mask=exist)
        if reaches is not None:
            tl.store(reach_sums + pair * queries + rows, reach_sum, mask=exist)


@triton.jit(do_not_specialize=tiles.LENGTHS)
def by_keys(
    grad, query, key, value, mask, means, shares, slopes, shifts, grad_key, grad_value, scratch,
    grad_batch, grad_head, grad_row, grad_feature,
    query_batch, query_head, query_row, query_feature,
    key_batch, key_head, key_row, key_feature,
    value_batch, value_head, value_row, value_feature,
    mask_batch, mask_head, mask_row, mask_key,
    target_batch, target_head, target_row, target_feature,
    other_batch, other_head, other_row, other_feature,
    heads, groups, queries, length, blocks, reaches,
    HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BY_ROW: tl.constexpr, SIGNED: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """∂K (``target``) and ∂V (``other``): for each block of keys, the rows of every head that shares them."""
    key_blocks, row_blocks = tl.cdiv(length, KEYS), tl.cdiv(queries, ROWS)
    key_heads = heads // groups
    never = queries < 0
    queries_t = scratch + tl.program_id(0).to(tl.int64) * SIZE
    queries_r = queries_t + ROWS * HEAD_WIDTH
    grads_t = queries_r + ROWS * HEAD_WIDTH
    grads_r = grads_t + ROWS * VALUE_WIDTH
    keys_t = grads_r + ROWS * VALUE_WIDTH
    keys_r = keys_t + KEYS * HEAD_WIDTH
    magnitudes_t = keys_r + KEYS * HEAD_WIDTH
    magnitudes_r = magnitudes_t + KEYS * VALUE_WIDTH
    directions_t = magnitudes_r + KEYS * VALUE_WIDTH
    weights_r = directions_t + KEYS * VALUE_WIDTH
    inhibitions_r = weights_r + ROWS * KEYS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        pair = (block // key_blocks).to(tl.int64)
        batch, key_head_index = pair // key_heads, pair % key_heads
        keys = block % key_blocks * KEYS + tl.arange(0, KEYS)
        total_key = tl.zeros((KEYS, HEAD_WIDTH), tl.float32)
        total_value = tl.zeros((KEYS, VALUE_WIDTH), tl.float32)
        weight_sum = tl.zeros((KEYS,), tl.float32)
        start = block % key_blocks * KEYS // ROWS if CAUSAL else 0
        for head in range(key_head_index * groups, (key_head_index + 1) * groups):
            mask_base = mask + batch * mask_batch + head * mask_head
            slope, shift = tl.load(slopes + head), tl.load(shifts + head)
            present = tiles.present(mask_base, mask_key, keys, length, MASKED, BY_ROW)
            base = key + batch * key_batch + key_head_index * key_head
            key_tile = tiles.tile(base, key_row, key_feature, keys, present, HEAD_DIM, HEAD_WIDTH)
            tiles.keep_transposed(keys_t, key_tile, KEYS, HEAD_WIDTH)
            tiles.keep(keys_r, tiles.finite(key_tile), KEYS, HEAD_WIDTH)
            base = value + batch * value_batch + key_head_index * value_head
            value_tile = tiles.tile(base, value_row, value_feature, keys, present, VALUE_DIM, VALUE_WIDTH)
            magnitude, _, scale = tiles.magnitudes(value_tile, SIGNED)
            magnitude = tiles.steep(magnitude)
            tiles.keep_transposed(magnitudes_t, magnitude, KEYS, VALUE_WIDTH)
            tiles.keep(magnitudes_r, magnitude, KEYS, VALUE_WIDTH)
            tiles.keep_transposed(directions_t, tiles.directions(value_tile, SIGNED), KEYS, VALUE_WIDTH)
            query_base = query + batch * query_batch + head * query_head
            grad_base = grad + batch * grad_batch + head * grad_head
            of_rows = (batch * heads + head) * queries
            if reaches is not None:
                reach = tl.load(reaches + head)
            for row_block in range(start, row_blocks):
                rows = row_block * ROWS + tl.arange(0, ROWS)
                exist = rows < queries
                sees = tiles.sees(mask_base, mask_row, mask_key, rows, keys, queries, length, MASKED, CAUSAL)
                if tiles.any_of(sees, MASKED):
                    query_tile = tiles.tile(query_base, query_row, query_feature, rows, exist, HEAD_DIM, HEAD_WIDTH)
                    tiles.keep_transposed(queries_t, query_tile, ROWS, HEAD_WIDTH)
                    tiles.keep(queries_r, tiles.finite(query_tile), ROWS, HEAD_WIDTH)
                    grad_tile = tiles.tile(grad_base, grad_row, grad_feature, rows, exist, VALUE_DIM, VALUE_WIDTH)
                    tiles.keep_transposed(grads_t, grad_tile, ROWS, VALUE_WIDTH)
                    tiles.keep(grads_r, grad_tile, ROWS, VALUE_WIDTH)
                    if reaches is not None:
                        pointers = tiles.column(grad_base, grad_row, grad_feature, rows, VALUE_DIM)
                        heard = tl.load(pointers, mask=exist, other=0.0)
                    mean, share = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
                    if CENTER:
                        mean = tl.load(means + of_rows + rows, mask=exist, other=0.0)
                        share = tl.load(shares + of_rows + rows, mask=exist, other=0.0)
                    tl.debug_barrier()
                    distance = tiles.distances(queries_t, keys_t, weights_r, never, ROWS, KEYS, HEAD_DIM)
                    inhibition = tiles.inhibition(distance, mean, slope, shift, sees, False)
                    steep = inhibition * scale * tiles.STEEP
                    weight = tiles.grad_inhibition(
                        grads_t, magnitudes_t, directions_t, steep, weights_r, never, ROWS, KEYS, VALUE_DIM
                    )
                    if reaches is not None:
                        weight -= tiles.of_heard(heard, inhibition, reach)
                    weight = tl.where(inhibition > 0.0, weight, 0.0) - share[:, None]
                    weight = tl.where(sees, slope * weight, 0.0)
                    weight_sum += tl.sum(weight, 0)
                    tiles.keep(weights_r, weight, ROWS, KEYS)
                    tiles.keep(inhibitions_r, steep, ROWS, KEYS)
                    tl.debug_barrier()
                    count = tl.minimum(queries - row_block * ROWS, ROWS)
                    total_value += tiles.passed(magnitudes_r, inhibitions_r, grads_r, count, never, KEYS, VALUE_WIDTH)
                    above, _uncounted = tiles.above(
                        keys_r, queries_r, weights_r, weights_r, count, never, KEYS, HEAD_WIDTH, False
                    )
                    total_key += above
                    tl.debug_barrier()
            tl.debug_barrier()
        base = grad_key + batch * target_batch + key_head_index * target_head
        total_key = 2.0 * total_key - weight_sum[:, None]
        tiles.put(base, target_row, target_feature, keys, keys < length, total_key, HEAD_DIM, HEAD_WIDTH)
        base = grad_value + batch * other_batch + key_head_index * other_head
        tiles.put(base, other_row, other_feature, keys, keys < length, total_value, VALUE_DIM, VALUE_WIDTH)
