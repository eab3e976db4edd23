"""The Triton kernel behind `scaled_rope.kernels.decode`.

Decoding is bound by memory: of each key 2·D bytes are read (bf16) for 2·D·H/Hkv products. So a key is read once, by the
program that also holds all queries that share it, rotated in registers and never written. The table of rotations within
a block, [BLOCK_N, R/2], is made once per program, from 64-bit fractions of a turn (`angle_tables`), without a load;
the block's own rotation is moved to the query, [G, R/2]. The keys of a row are cut into stretches, one program each.
Each program computes a softmax over its own stretch; torch merges the results.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaled_rope.kernels.rotary_triton import angle_tables

BLOCK_N = 64


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


@triton.jit(do_not_specialize=["keys", "stretch"])
def decode_kernel(
    query,
    key,
    value,
    phases,
    first_key,
    mask,
    out,
    maxima,
    sums,
    keys,
    stretch,
    query_stride_b,
    query_stride_h,
    query_stride_g,
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
    HAS_MASK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (rows times key heads, stretches). ROWS queries [B, Hkv, ROWS, D] share the keys, COUNT from each head."""
    pair, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = (pair // KEY_HEADS).to(tl.int64), (pair % KEY_HEADS).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    j = tl.arange(0, HALF_BLOCK)
    d = tl.arange(0, WIDTH_BLOCK)
    n = tl.arange(0, BLOCK_N)
    in_rows, in_half, in_width = g < ROWS, j < HALF, d < WIDTH
    source = query + b * query_stride_b + h * query_stride_h + g[:, None] * query_stride_g
    there = in_rows[:, None] & in_half[None, :]
    q_a = tl.load(source + j[None, :], mask=there, other=0.0)
    q_b = tl.load(source + HALF + j[None, :], mask=there, other=0.0)
    if TAIL > 0:
        t = tl.arange(0, TAIL_BLOCK)
        q_t = tl.load(source + 2 * HALF + t[None, :], mask=in_rows[:, None] & (t[None, :] < TAIL), other=0.0)
    kind = key.dtype.element_ty
    row_phases = phases + b * phases_stride_b
    # Rotations within a block, the same for every block.
    cos, sin = angle_tables(row_phases, n, 1.0, j, in_half)
    first = tl.load(first_key + b * first_stride_b).to(tl.int64)
    step = 2 if INTERLEAVED else 1
    other_half = 1 if INTERLEAVED else HALF
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
        places = keys_here + at[:, None] * key_stride_n
        k_mask = valid[:, None] & in_half[None, :]
        a = tl.load(places + (j * step)[None, :] * key_stride_d, mask=k_mask, other=0.0).to(tl.float32)
        c = tl.load(places + (j * step + other_half)[None, :] * key_stride_d, mask=k_mask, other=0.0).to(tl.float32)
        k_a, k_b = (a * cos - c * sin).to(kind), (c * cos + a * sin).to(kind)
        # "ieee": the default would round float32 to TF32.
        scores = tl.dot(to_a.to(kind), tl.trans(k_a), input_precision="ieee")
        scores += tl.dot(to_b.to(kind), tl.trans(k_b), input_precision="ieee")
        if TAIL > 0:
            t = tl.arange(0, TAIL_BLOCK)
            k_t = tl.load(
                places + (2 * HALF + t)[None, :] * key_stride_d,
                mask=valid[:, None] & (t[None, :] < TAIL),
                other=0.0,
            )
            scores += tl.dot(q_t.to(kind), tl.trans(k_t), input_precision="ieee")
        seen = in_rows[:, None] & valid[None, :]
        if HAS_MASK:
            marks = mask + b * mask_stride_b + (g % COUNT)[:, None] * mask_stride_q + at[None, :] * mask_stride_n
            seen = seen & (tl.load(marks, mask=seen, other=0) != 0)
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
    place = (pair * parts + part) * ROWS + g
    tl.store(maxima + place, top, mask=in_rows)
    tl.store(sums + place, total, mask=in_rows)
    tl.store(out + place[:, None] * WIDTH + d[None, :], found, mask=in_rows[:, None] & in_width[None, :])


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phases: Tensor,
    first_key: Tensor,
    mask: Tensor | None,
    count: int,
    interleaved: bool,
) -> Tensor:
    """Attention [B, Hkv, G, Dv], float32, of queries [B, Hkv, G, D], float32, rotated and scaled; a boolean mask."""
    batch, key_heads, rows, head_dim = query.shape
    keys, width, half = key.shape[2], value.shape[3], phases.shape[-1]
    tail = head_dim - 2 * half
    query = query.float().contiguous()
    parts = splits_of(keys, batch * key_heads, block=BLOCK_N)
    stretch = triton.cdiv(triton.cdiv(keys, parts), BLOCK_N) * BLOCK_N
    parts = triton.cdiv(keys, stretch)
    out = query.new_empty(batch, key_heads, parts, rows, width)
    maxima, sums = (query.new_empty(batch, key_heads, parts, rows) for _ in range(2))
    first_key = first_key.reshape(-1).contiguous()
    mask_strides = [0, 0, 0]
    if mask is not None:
        mask_strides = [0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in (0, 2, 3)]
        mask = mask.view(torch.uint8)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        decode_kernel[(batch * key_heads, parts)](
            query,
            key,
            value,
            phases.contiguous(),
            first_key,
            mask,
            out,
            maxima,
            sums,
            keys,
            stretch,
            *query.stride()[:3],
            *key.stride(),
            *value.stride(),
            half if phases.shape[0] > 1 else 0,
            1 if first_key.shape[0] > 1 else 0,
            *mask_strides,
            KEY_HEADS=key_heads,
            ROWS=rows,
            COUNT=count,
            BLOCK_G=max(16, triton.next_power_of_2(rows)),  # tl.dot takes no side shorter than 16
            HALF=half,
            HALF_BLOCK=max(16, triton.next_power_of_2(half)),
            TAIL=tail,
            TAIL_BLOCK=max(16, triton.next_power_of_2(max(tail, 1))),
            WIDTH=width,
            WIDTH_BLOCK=max(16, triton.next_power_of_2(width)),
            HAS_MASK=mask is not None,
            INTERLEAVED=interleaved,
            BLOCK_N=BLOCK_N,
            num_warps=4,
        )
    top = maxima.amax(dim=2, keepdim=True)
    share = torch.exp(maxima - torch.where(top.isinf(), 0.0, top))
    merged: Tensor = (out * share[..., None]).sum(dim=2) / (sums * share).sum(dim=2)[..., None]
    return merged


def splits_of(keys: int, rows: int, programs: int = 264, block: int = 64) -> int:
    """The number of stretches to cut the keys of each of `rows` = B · Hkv into, so that a GPU is kept busy.

    programs: the programs wanted, two for each multiprocessor of an H100. A stretch is at least four blocks.
    """
    return max(1, min(math.ceil(programs / rows), math.ceil(keys / (4 * block))))
