"""The Triton kernel behind `scaled_rope.kernels.rotary`.

The rotary embedding is bound by memory: per element of q and k two bytes come and two go (bf16), for three floating-
point operations. What the kernel does about it:

- One program takes BLOCK_T tokens through all heads of q and k, so cos and sin are read (or made) once per token, and
  q and k are read once and written once, 16 bytes per thread and access where strides allow.
- The grid runs over tokens, B·T of them in a line, not over rows of padded length. Few tokens (decoding) are spread
  over the GPU by their heads instead.
- Tables are half as wide as the rotated part. Without tables (phases) nothing but q and k is read.
- Row offsets are 64-bit: q of a Llama-2-7B passes 2^31 elements at 524,288 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scaled_rope.errors import ConfigError

TILE = 2048
"""Pairs of dimensions per tile: with 128 threads and bf16 four 16-byte loads each, all in flight at once."""
PROGRAMS = 1024
"""Programs wanted before heads are no longer spread over programs: about eight for each multiprocessor of an H100."""


@triton.jit
def trial_kernel(out):
    """Grid: (1,). Writes one number."""
    tl.store(out, 1)


def try_out(device: torch.device) -> None:
    """Compile and launch a kernel on a GPU.

    Raises:
        Exception: whatever Triton, a compiler or the driver raises where no kernel runs.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        trial_kernel[(1,)](out)


@triton.jit
def angle_tables(phases, positions, attention_factor, j, in_half):
    """cos and sin [BLOCK_T, HALF] from 64-bit fractions of a turn; `tables_from_phases` in torch."""
    phase = tl.load(phases + j, mask=in_half, other=0)
    # The product wraps around at 2^64, which is a whole turn. Its upper half is a signed fraction of a turn.
    top = ((positions[:, None] * phase[None, :]) >> 32).to(tl.int32)
    quadrant = (top + 536870912) >> 30  # 2^29, an eighth of a turn: rounds to the nearest quarter
    x = (top - (quadrant << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2π / 2^32
    square = x * x
    # Taylor polynomials: |x| <= π/4 here, where the first term left out is below 1e-8, less than float32 resolves.
    s = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    c = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square / 3628800))))
    # In odd quadrants cos and sin change places; signs go + - - + for cos and + + - - for sin.
    odd = (quadrant & 1) == 1
    cos = tl.where(odd, s, c) * (1 - ((quadrant + 1) & 2)).to(tl.float32)
    sin = tl.where(odd, c, s) * (1 - (quadrant & 2)).to(tl.float32)
    return cos * attention_factor, sin * attention_factor


@triton.jit
def _rotate_heads(
    x,
    out,
    row,
    out_row,
    cos,
    sin,
    valid,
    stride_h,
    stride_d,
    out_stride_h,
    out_stride_d,
    part,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotate every PARTS-th block of BLOCK_H heads; row, out_row: offsets of the tokens in memory, [BLOCK_T, 1, 1]."""
    # A constant number of iterations: bounds that differ by program fail in Triton 3.6's interpreter with NumPy 2.4.
    for turn in range((HEADS + PARTS * BLOCK_H - 1) // (PARTS * BLOCK_H)):
        head = ((turn * PARTS + part) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        if HEADS % (PARTS * BLOCK_H) != 0:
            there = valid & (head < HEADS)
        else:
            there = valid
        source, target = x + row + head * stride_h, out + out_row + head * out_stride_h
        if INTERLEAVED:
            d = tl.arange(0, 2 * HALF_BLOCK)[None, None, :]
            mask = there & (d < 2 * HALF)
            both = tl.load(source + d * stride_d, mask=mask).to(cos.dtype)
            a, b = tl.split(tl.reshape(both, (both.shape[0], BLOCK_H, HALF_BLOCK, 2)))
            rotated = tl.join(a * cos - b * sin, b * cos + a * sin)
            rotated = tl.reshape(rotated, (both.shape[0], BLOCK_H, 2 * HALF_BLOCK))
            tl.store(target + d * out_stride_d, rotated.to(out.dtype.element_ty), mask=mask)
        else:
            d = tl.arange(0, HALF_BLOCK)[None, None, :]
            mask = there & (d < HALF)
            a = tl.load(source + d * stride_d, mask=mask).to(cos.dtype)
            b = tl.load(source + (d + HALF) * stride_d, mask=mask).to(cos.dtype)
            tl.store(target + d * out_stride_d, (a * cos - b * sin).to(out.dtype.element_ty), mask=mask)
            tl.store(target + (d + HALF) * out_stride_d, (b * cos + a * sin).to(out.dtype.element_ty), mask=mask)
        if TAIL > 0:
            d = tl.arange(0, TAIL_BLOCK)[None, None, :]
            mask = there & (d < TAIL)
            rest = tl.load(source + (d + 2 * HALF) * stride_d, mask=mask)
            tl.store(target + (d + 2 * HALF) * out_stride_d, rest, mask=mask)


# Numbers that change from call to call must not make new versions of the kernel.
@triton.jit(do_not_specialize=["tokens", "seq_len", "offset", "table_rows", "attention_factor"])
def rotary_kernel(
    q,
    k,
    q_out,
    k_out,
    cos_table,
    sin_table,
    phases,
    position_ids,
    tokens,
    seq_len,
    offset,
    table_rows,
    attention_factor,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_d,
    q_out_stride_b,
    q_out_stride_t,
    q_out_stride_h,
    q_out_stride_d,
    k_out_stride_b,
    k_out_stride_t,
    k_out_stride_h,
    k_out_stride_d,
    table_stride_b,
    table_stride_t,
    ids_stride_b,
    ids_stride_t,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (blocks of tokens, parts of the heads). A token reads the table of its row of the batch at its position."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = token < tokens
    b, t = (token // seq_len).to(tl.int64), (token % seq_len).to(tl.int64)
    if HAS_IDS:
        position = tl.load(position_ids + b * ids_stride_b + t * ids_stride_t, mask=valid, other=0).to(tl.int64)
    else:
        position = t + offset
    j = tl.arange(0, HALF_BLOCK)
    in_half = j < HALF
    if HAS_TABLES:
        known = (position >= 0) & (position < table_rows)
        at = (b * table_stride_b + position * table_stride_t)[:, None] + j[None, :]
        mask = (valid & known)[:, None] & in_half[None, :]
        # A position outside the table gives NaN, so that it cannot pass for a right one.
        cos = tl.load(cos_table + at, mask=mask, other=float("nan"))
        sin = tl.load(sin_table + at, mask=mask, other=float("nan"))
    else:
        cos, sin = angle_tables(phases, position, attention_factor, j, in_half)
    if INVERSE:
        sin = -sin
    cos, sin = cos[:, None, :], sin[:, None, :]
    valid, b, t = valid[:, None, None], b[:, None, None], t[:, None, None]
    part = tl.program_id(1)
    _rotate_heads(
        q, q_out, b * q_stride_b + t * q_stride_t, b * q_out_stride_b + t * q_out_stride_t, cos, sin, valid,
        q_stride_h, q_stride_d, q_out_stride_h, q_out_stride_d, part,
        Q_HEADS, PARTS, BLOCK_H, HALF, HALF_BLOCK, TAIL, TAIL_BLOCK, INTERLEAVED,
    )  # fmt: skip
    _rotate_heads(
        k, k_out, b * k_stride_b + t * k_stride_t, b * k_out_stride_b + t * k_out_stride_t, cos, sin, valid,
        k_stride_h, k_stride_d, k_out_stride_h, k_out_stride_d, part,
        K_HEADS, PARTS, BLOCK_H, HALF, HALF_BLOCK, TAIL, TAIL_BLOCK, INTERLEAVED,
    )  # fmt: skip


def blocks(tokens: int, q_heads: int, k_heads: int, half: int, heads_first: bool) -> tuple[int, int, int, int]:
    """BLOCK_T, BLOCK_H, parts of the heads, and warps for a shape.

    heads_first: whether the heads of a token lie further apart in memory than neighbouring tokens. Blocks then run
    along tokens, otherwise along the heads, which lie side by side; a block never covers heads that do not exist.
    """
    rows = max(1, TILE // triton.next_power_of_2(half))
    common = math.gcd(q_heads, k_heads)
    block_h = 1 if heads_first else min(common & -common, rows, 16)  # the largest power of two that divides `common`
    block_t = min(rows // block_h, triton.next_power_of_2(tokens))
    programs = triton.cdiv(tokens, block_t)
    # A power of two, so that few versions of the kernel are compiled as T changes.
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, programs))
    parts = max(1, min(max(q_heads, k_heads) // block_h, wanted))
    warps = max(1, min(4, block_t * block_h * triton.next_power_of_2(half) // 512))
    return block_t, block_h, parts, warps


@dataclass(frozen=True)
class Geometry:
    """A call's launch, by its shapes, strides and flags: kept, since working it out takes as long as a call."""

    grid: tuple[int, int, int]
    tokens: int
    seq_len: int
    table_rows: int
    strides: tuple[int, ...]
    constants: dict[str, Any]
    """The kernel's compile-time arguments, in their order."""
    warps: int
    compiled: dict[tuple[int, bool], Any] = field(default_factory=dict)
    """The compiled kernel by what else Triton distinguishes: the alignment of pointers, the size of an offset."""


_GEOMETRIES: dict[tuple[Any, ...], Geometry] = {}
_KEPT = 4096
"""Geometries that are kept; a program that has more begins anew."""


def launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    phases: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    attention_factor: float,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Rotate q and k into q_out and k_out, which may be q and k. The operator's other arguments, already checked.

    Raises:
        ConfigError: 2^31 tokens or more.
    """
    flags = (heads_first, interleaved, inverse, q_out is q)
    # Queries and keys are described whole, outputs by their strides: the rest of them is the same.
    key = (
        q.shape, q.stride(), k.shape, k.stride(), q_out.stride(), k_out.stride(), q.dtype, q.device,
        None if cos is None else (cos.shape, cos.stride(), cos.dtype),
        None if phases is None else phases.shape,
        None if position_ids is None else (position_ids.shape, position_ids.stride(), position_ids.dtype),
        flags,
    )  # fmt: skip
    found = _GEOMETRIES.get(key)
    if found is None:
        if len(_GEOMETRIES) >= _KEPT:
            _GEOMETRIES.clear()
        found = _GEOMETRIES[key] = _geometry(q, k, q_out, k_out, cos, phases, position_ids, *flags)
    tensors = (q, k, q_out, k_out, cos, sin, phases, position_ids)
    numbers = (found.tokens, found.seq_len, offset, found.table_rows, attention_factor)
    if q.device.type != "cuda":
        _launch(found, tensors, numbers)
    elif q.device.index == torch.cuda.current_device():
        _launch_known(found, tensors, numbers)
    else:
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
            _launch_known(found, tensors, numbers)


def _launch_known(found: Geometry, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
    """Launch the kernel that is compiled already, past Triton's search for it, which takes most of a short call."""
    aligned = 0
    for tensor in tensors:
        aligned = 2 * aligned + (tensor is None or tensor.data_ptr() % 16 == 0)
    key = aligned, -(2**31) <= numbers[2] < 2**31
    compiled = found.compiled.get(key)
    if compiled is None:
        found.compiled[key] = _launch(found, tensors, numbers)
    else:
        compiled[found.grid](*tensors, *numbers, *found.strides, *found.constants.values())


def _launch(found: Geometry, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> Any:
    """Launch the kernel by Triton's own way; return what it compiled."""
    return rotary_kernel[found.grid](
        *tensors, *numbers, *found.strides, **found.constants, num_warps=found.warps, enable_fp_fusion=True
    )


def _geometry(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor | None,
    phases: Tensor | None,
    position_ids: Tensor | None,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
) -> Geometry:
    token_axis, head_axis = (2, 1) if heads_first else (1, 2)
    batch, seq_len, head_dim = q.shape[0], q.shape[token_axis], q.shape[3]
    tokens, q_heads, k_heads = batch * seq_len, q.shape[head_axis], k.shape[head_axis]
    if tokens >= 2**31:
        raise ConfigError(f"tokens={tokens}: must be below 2^31 in one call")
    half = (cos if cos is not None else phases).shape[-1]  # type: ignore[union-attr]
    tail = 0 if inplace else head_dim - 2 * half  # in place, the dimensions that are not rotated stay
    larger = q if q_heads else k
    apart = larger.stride(head_axis) > larger.stride(token_axis)
    block_t, block_h, parts, warps = blocks(tokens, q_heads, k_heads, half, apart)
    axes = (0, token_axis, head_axis, 3)
    strides = [x.stride(axis) for x in (q, k, q_out, k_out) for axis in axes]
    if cos is not None:
        rows, by_token = cos.shape[-2], cos.dim() == 3
        strides += [cos.stride(0) if by_token and cos.shape[0] > 1 else 0, cos.stride(-2)]
    else:
        rows = 0
        strides += [0, 0]
    if position_ids is not None:
        strides += [position_ids.stride(0) if position_ids.shape[0] > 1 else 0, position_ids.stride(1)]
    else:
        strides += [0, 0]
    constants = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HALF": half,
        "HALF_BLOCK": triton.next_power_of_2(half),
        "TAIL": tail,
        "TAIL_BLOCK": triton.next_power_of_2(max(tail, 1)),
        "HAS_IDS": position_ids is not None,
        "HAS_TABLES": cos is not None,
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "PARTS": parts,
        "BLOCK_T": block_t,
        "BLOCK_H": block_h,
    }
    grid = (triton.cdiv(tokens, block_t), parts, 1)
    return Geometry(grid, tokens, seq_len, rows, tuple(strides), constants, warps)
