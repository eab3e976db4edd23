"""The Triton kernels behind `scaled_rope.kernels.decode`.

Decoding is bound by memory: of each key 2·D bytes are read (bf16) for 2·D·H/Hkv products. So a key is read once, by the
program that also holds the queries that share it, rotated in registers and never written. The table of rotations within
a block, [BLOCK_N, R/2], is made once per program, from 64-bit fractions of a turn (`angle_tables`), without a load;
queries are rotated by the program that reads them, and the block's own rotation is taken off them, [G, R/2].

The keys of a row are cut into stretches, one program each, as many as fill the multiprocessors in whole waves
(`splits_of`). Each program computes a softmax over its own stretch; a second kernel merges them. How many keys and
queries a program holds follows from what they need and from the shared memory of the device (`blocks_for`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaled_rope.kernels.decode_blocks import Blocks, padded, splits_of
from scaled_rope.kernels.rotary_triton import angle_tables


def _mend_interpreter() -> None:
    """Let Triton's interpreter, where it is in use, read the bounds of a loop with any numpy.

    Triton 3.6 and earlier read them as int(array of one element), which numpy refuses since 2.5.
    """
    from triton.runtime import interpreter

    inner = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        inner(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if triton.knobs.runtime.interpret and triton.__version__.startswith("3.6."):
    _mend_interpreter()


# Triton's own library functions run in the interpreter only if it was chosen before triton was imported.
@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _load_pairs(place, stride_d, valid, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both members of the rotated pairs of vectors at `place` [N, 1], [N, HALF_BLOCK] each, in float32."""
    if INTERLEAVED:
        # Neighbours are loaded together and then parted: half of 16-byte loads would otherwise be thrown away.
        d = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        both = tl.load(place + d * stride_d, mask=valid & (d < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(both, (both.shape[0], HALF_BLOCK, 2)))
    else:
        j = tl.arange(0, HALF_BLOCK)[None, :]
        a = tl.load(place + j * stride_d, mask=valid & (j < HALF), other=0.0)
        b = tl.load(place + (j + HALF) * stride_d, mask=valid & (j < HALF), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


# Numbers that change from token to token must not make new versions of the kernel.
@triton.jit(do_not_specialize=["keys", "stretch", "scaling"])
def decode_kernel(
    query,
    key,
    value,
    phases,
    first_key,
    query_positions,
    factors,
    mask,
    out,
    maxima,
    sums,
    scaling,
    keys,
    stretch,
    query_stride_b,
    query_stride_h,
    query_stride_q,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    phases_stride_b,
    first_stride_b,
    positions_stride_b,
    positions_stride_q,
    factors_stride_b,
    mask_stride_b,
    mask_stride_q,
    mask_stride_n,
    KEY_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (rows of the batch times key heads times blocks of queries, stretches).

    ROWS queries share the keys of a key head, COUNT from each of its query heads. MASK: 0 without, 1 boolean, 2 added
    to scores. SPLIT: several stretches, whose maxima, sums and weighted values are left for `merge_kernel`; otherwise
    `out` is the result [B, COUNT, H, WIDTH].
    """
    part, parts = tl.program_id(1), tl.num_programs(1)
    g_blocks: tl.constexpr = (ROWS + BLOCK_G - 1) // BLOCK_G
    # Programs that read the same keys are neighbours, so that all but one of them find these in the L2 cache.
    pair = tl.program_id(0) // g_blocks
    b, h = (pair // KEY_HEADS).to(tl.int64), (pair % KEY_HEADS).to(tl.int64)
    g = (tl.program_id(0) % g_blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    j = tl.arange(0, HALF_BLOCK)
    t = tl.arange(0, TAIL_BLOCK)
    d = tl.arange(0, WIDTH_BLOCK)
    n = tl.arange(0, BLOCK_N)
    in_rows, in_half, in_width = g < ROWS, j < HALF, d < WIDTH
    head, turn = h * (ROWS // COUNT) + g // COUNT, g % COUNT
    row_phases = phases + b * phases_stride_b
    factor = tl.load(factors + b * factors_stride_b) * scaling
    source = (query + b * query_stride_b + head * query_stride_h + turn * query_stride_q)[:, None]
    a, c = _load_pairs(source, query_stride_d, in_rows[:, None], HALF, HALF_BLOCK, INTERLEAVED)
    at_query = tl.load(query_positions + b * positions_stride_b + turn * positions_stride_q, mask=in_rows, other=0).to(
        tl.int64
    )
    q_cos, q_sin = angle_tables(row_phases, at_query, factor, j, in_half)
    q_a, q_b = a * q_cos - c * q_sin, c * q_cos + a * q_sin
    kind = key.dtype.element_ty
    if TAIL > 0:
        q_t = tl.load(
            source + (2 * HALF + t)[None, :] * query_stride_d, mask=in_rows[:, None] & (t[None, :] < TAIL), other=0.0
        )
        q_t = (q_t.to(tl.float32) * scaling).to(kind)
    # Rotations within a block, the same for every block.
    cos, sin = angle_tables(row_phases, n, 1.0, j, in_half)
    first = tl.load(first_key + b * first_stride_b).to(tl.int64)
    keys_here = key + b * key_stride_b + h * key_stride_h
    values_here = value + b * value_stride_b + h * value_stride_h
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_G,), 0.0, tl.float32)
    found = tl.full((BLOCK_G, WIDTH_BLOCK), 0.0, tl.float32)
    begin = part * stretch
    for start in range(begin, tl.minimum(begin + stretch, keys), BLOCK_N):
        at = (start + n).to(tl.int64)
        valid = at < keys
        base_cos, base_sin = angle_tables(row_phases, first + start + tl.full((1,), 0, tl.int64), 1.0, j, in_half)
        # R(m0)ᵀ, which rotates the query backwards: hence the signs.
        to_a, to_b = q_a * base_cos + q_b * base_sin, q_b * base_cos - q_a * base_sin
        places = (keys_here + at * key_stride_n)[:, None]
        one, two = _load_pairs(places, key_stride_d, valid[:, None], HALF, HALF_BLOCK, INTERLEAVED)
        k_a, k_b = (one * cos - two * sin).to(kind), (two * cos + one * sin).to(kind)
        # "ieee": the default would round float32 to TF32.
        scores = tl.dot(to_a.to(kind), tl.trans(k_a), input_precision="ieee")
        scores += tl.dot(to_b.to(kind), tl.trans(k_b), input_precision="ieee")
        if TAIL > 0:
            k_t = tl.load(
                places + (2 * HALF + t)[None, :] * key_stride_d,
                mask=valid[:, None] & (t[None, :] < TAIL),
                other=0.0,
            )
            scores += tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
        seen = in_rows[:, None] & valid[None, :]
        if MASK > 0:
            marks = mask + b * mask_stride_b + turn[:, None] * mask_stride_q + at[None, :] * mask_stride_n
            if MASK == 1:
                seen = seen & (tl.load(marks, mask=seen, other=0) != 0)
            else:
                scores += tl.load(marks, mask=seen, other=0.0).to(tl.float32)
        elif COUNT > 1:
            seen = seen & (at[None, :] <= (keys - COUNT + turn)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.reduce(scores, 1, _larger))
        # Where nothing was seen yet, any finite number stands for the maximum.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        fade = tl.exp(top - safe)
        v = tl.load(
            values_here + at[:, None] * value_stride_n + d[None, :] * value_stride_d,
            mask=valid[:, None] & in_width[None, :],
            other=0.0,
        )
        total = total * fade + tl.reduce(weights, 1, _add)
        found = found * fade[:, None] + tl.dot(weights.to(kind), v, input_precision="ieee")
        top = higher
    inside = in_rows[:, None] & in_width[None, :]
    if SPLIT:
        place = (pair.to(tl.int64) * parts + part) * ROWS + g
        tl.store(maxima + place, top, mask=in_rows)
        tl.store(sums + place, total, mask=in_rows)
        tl.store(out + place[:, None] * WIDTH + d[None, :], found, mask=inside)
    else:
        # A query that sees no key, as padding may be, gets zeros.
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        place = ((b * COUNT + turn) * KEY_HEADS * (ROWS // COUNT) + head) * WIDTH
        tl.store(out + place[:, None] + d[None, :], found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(
    partial,
    maxima,
    sums,
    out,
    parts,
    KEY_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (queries [B, Hkv, ROWS]). Softmax over all keys from those over `parts` stretches."""
    pair, g = (tl.program_id(0) // ROWS).to(tl.int64), tl.program_id(0) % ROWS
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, WIDTH_BLOCK)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.full((1,), 0.0, tl.float32)
    found = tl.full((WIDTH_BLOCK,), 0.0, tl.float32)
    for start in range(0, parts, BLOCK_P):
        there = start + p < parts
        place = (pair * parts + start + p) * ROWS + g
        tops = tl.load(maxima + place, mask=there, other=float("-inf"))
        higher = tl.maximum(top, tl.reduce(tops, 0, _larger))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        share, fade = tl.exp(tops - safe), tl.exp(top - safe)
        some = tl.load(
            partial + place[:, None] * WIDTH + d[None, :], mask=there[:, None] & (d < WIDTH)[None, :], other=0.0
        )
        total = total * fade + tl.reduce(tl.load(sums + place, mask=there, other=0.0) * share, 0, _add)
        found = found * fade + tl.reduce(some * share[:, None], 0, _add)
        top = higher
    b, h = pair // KEY_HEADS, pair % KEY_HEADS
    head, turn = h * (ROWS // COUNT) + g // COUNT, g % COUNT
    place = ((b * COUNT + turn) * KEY_HEADS * (ROWS // COUNT) + head) * WIDTH
    found = found / tl.where(total == 0.0, 1.0, total)
    tl.store(out + place + d, found.to(out.dtype.element_ty), mask=d < WIDTH)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phases: Tensor,
    first_key: Tensor,
    query_positions: Tensor,
    factors: Tensor,
    mask: Tensor | None,
    scaling: float,
    interleaved: bool,
    blocks: Blocks,
    multiprocessors: int,
) -> Tensor:
    """Attention [B, Q, H, Dv], in query's dtype, of unrotated queries [B, H, Q, D] over unrotated keys.

    query_positions: [B or 1, Q]; factors: [B or 1], float32, of the scores of rotated dimensions; blocks: from
    `blocks_for`. The rest is as in `rotary_decode`.
    """
    batch, heads, count, head_dim = query.shape
    key_heads, keys, width, half = key.shape[1], key.shape[2], value.shape[3], phases.shape[-1]
    rows, tail = heads // key_heads * count, head_dim - 2 * half
    programs = batch * key_heads * -(-rows // blocks.queries)
    parts = splits_of(-(-keys // blocks.keys), programs, multiprocessors * blocks.resident)
    stretch = -(-keys // (parts * blocks.keys)) * blocks.keys
    parts = -(-keys // stretch)
    result = query.new_empty(batch, count, heads, width)
    out, maxima, sums = result, None, None
    if parts > 1:
        out = query.new_empty(batch * key_heads * parts * rows, width, dtype=torch.float32)
        maxima, sums = query.new_empty(2, batch * key_heads * parts * rows, dtype=torch.float32)
    mask_strides, mask_kind = [0, 0, 0], 0
    if mask is not None:
        mask_strides = [0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in (0, 2, 3)]
        mask_kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if mask_kind == 1 else mask
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        decode_kernel[(programs, parts)](
            query,
            key,
            value,
            phases,
            first_key,
            query_positions,
            factors,
            mask,
            out,
            maxima,
            sums,
            scaling,
            keys,
            stretch,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            phases.stride(0) if phases.shape[0] > 1 else 0,
            first_key.stride(0) if first_key.shape[0] > 1 else 0,
            query_positions.stride(0) if query_positions.shape[0] > 1 else 0,
            query_positions.stride(1),
            factors.stride(0) if factors.shape[0] > 1 else 0,
            *mask_strides,
            KEY_HEADS=key_heads,
            ROWS=rows,
            COUNT=count,
            BLOCK_G=blocks.queries,
            HALF=half,
            HALF_BLOCK=padded(half),
            TAIL=tail,
            TAIL_BLOCK=max(16, padded(tail)),
            WIDTH=width,
            WIDTH_BLOCK=padded(width),
            MASK=mask_kind,
            INTERLEAVED=interleaved,
            SPLIT=parts > 1,
            BLOCK_N=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,
        )
        if parts > 1:
            merge_kernel[(batch * key_heads * rows,)](
                out,
                maxima,
                sums,
                result,
                parts,
                KEY_HEADS=key_heads,
                ROWS=rows,
                COUNT=count,
                WIDTH=width,
                WIDTH_BLOCK=padded(width),
                BLOCK_P=16,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return result
