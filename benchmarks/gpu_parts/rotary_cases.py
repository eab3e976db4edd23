"""Shapes and lengths of the rotary parts, their inputs, and the implementations that rotate them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.gpu_parts.models import THETA
from scaled_rope.kernels import (
    apply_rotary,
    apply_rotary_from_frequencies,
    frequency_phases,
    packed_position_ids,
)

Pair = tuple[Any, Any]
"""Queries and keys, or their gradients."""


@dataclass(frozen=True)
class Shape:
    """Attention of a model: query heads, key heads, head_dim, rotated dimensions."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    documents: bool = False
    """Whether the tokens belong to documents of uneven length, one after the other."""

    def elements(self, tokens: int) -> int:
        return tokens * (self.heads + self.kv_heads) * self.head_dim


SHAPES = (
    Shape("Llama-2-7B", 32, 32, 128, 128),
    Shape("Llama-3-8B", 32, 8, 128, 128),
    Shape("SmolLM2-135M", 9, 3, 64, 64),
    Shape("Phi-2, 32 of 80", 32, 32, 80, 32),
    Shape("Llama-3-8B, packed", 32, 8, 128, 128, documents=True),
)
TOKENS = (131072, 1048576, 32768, 4096, 32, 1)
"""The most telling first, should time run out."""


@dataclass
class Inputs:
    """The inputs of a call. q, k: [1, H, T, D] views of token-major memory, as projections give them."""

    q: Any
    k: Any
    cos: Any
    """float32 [T, R/2] by position; `wide_cos` is [1, T, R] in the inputs' dtype, as models make it."""
    sin: Any
    wide_cos: Any
    wide_sin: Any
    phases: Any
    position_ids: Any


def document_positions(tokens: int) -> list[int]:
    """First positions of documents of lengths 1, 3, 9, … up to a third of a row of `tokens`, then `tokens`."""
    bounds, length = [0], 1
    while bounds[-1] < tokens:
        bounds.append(min(bounds[-1] + length, tokens))
        length = length * 3 if length * 9 < tokens else 1
    return bounds


def make_inputs(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    half = shape.rotary_dim // 2
    inv_freq = THETA ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    ids = None
    positions = torch.arange(tokens, device=device)
    if shape.documents:
        bounds = torch.tensor(document_positions(tokens), device=device)
        ids = packed_position_ids(bounds, tokens)
        positions = ids[0]
    by_position = [torch.empty(tokens, half, dtype=torch.float32, device=device) for _ in range(2)]
    wide = [torch.empty(1, tokens, 2 * half, dtype=dtype, device=device) for _ in range(2)]
    for start in range(0, tokens, 2**16):  # float64 in pieces
        piece = slice(start, start + 2**16)
        angles = torch.arange(tokens, device=device)[piece, None] * inv_freq
        used = positions[piece, None] * inv_freq
        for table, row, function in zip(by_position, wide, (torch.cos, torch.sin), strict=True):
            table[piece] = function(angles)
            row[0, piece] = function(used).repeat(1, 2).to(dtype)
    q, k = (
        torch.randn(1, tokens, heads, shape.head_dim, dtype=dtype, device=device).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads)
    )
    return Inputs(q, k, *by_position, *wide, frequency_phases(inv_freq), ids)


def eager(q: Any, k: Any, cos: Any, sin: Any) -> Pair:
    """Rotate as families of transformers do, those with a partial rotary width by splitting and joining."""
    width = cos.shape[-1]
    if width == q.shape[-1]:
        result: Pair = apply_rotary_pos_emb(q, k, cos, sin)
        return result
    rotated = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
    return tuple(torch.cat((a, x[..., width:]), dim=-1) for a, x in zip(rotated, (q, k), strict=True))  # type: ignore


COMPILED = "transformers, compiled"
Variant = Callable[[Any, Any, Inputs], Pair]


def our_variants(backend: str) -> dict[str, Variant]:
    """This package's ways to rotate, by name."""
    return {
        "ours, tables": lambda q, k, x: apply_rotary(q, k, x.cos, x.sin, x.position_ids, backend=backend),
        "ours, no tables": lambda q, k, x: apply_rotary_from_frequencies(
            q, k, x.phases, x.position_ids, backend=backend
        ),
        "ours, in place": lambda q, k, x: apply_rotary(
            q, k, x.cos, x.sin, x.position_ids, inplace=True, backend=backend
        ),
    }


def variants(shape: Shape) -> dict[str, Variant]:
    """Implementations by name, only those that are installed and take the shape."""
    found = our_variants("triton")
    torch.compiler.reset()  # compilations for other shapes count towards its limit
    compiled = torch.compile(eager, dynamic=False)
    found["transformers, eager"] = lambda q, k, x: eager(q, k, x.wide_cos, x.wide_sin)
    found[COMPILED] = lambda q, k, x: compiled(q, k, x.wide_cos, x.wide_sin)
    whole = shape.rotary_dim == shape.head_dim
    if importlib.util.find_spec("liger_kernel") and whole:

        def liger(q: Any, k: Any, x: Inputs) -> Pair:
            from liger_kernel.transformers.rope import liger_rotary_pos_emb  # here, so that a failure is its row's

            result: Pair = liger_rotary_pos_emb(q, k, x.wide_cos, x.wide_sin)
            return result

        found["Liger"] = liger
    if importlib.util.find_spec("flash_attn") and not shape.documents:

        def flash(q: Any, k: Any, x: Inputs) -> Pair:
            from flash_attn.layers.rotary import apply_rotary_emb

            half = x.wide_cos.shape[-1] // 2
            cos, sin = x.wide_cos[0, :, :half], x.wide_sin[0, :, :half]
            a, b = (apply_rotary_emb(y.transpose(1, 2), cos, sin) for y in (q, k))
            return a.transpose(1, 2), b.transpose(1, 2)

        found["flash-attn"] = flash
    return found
