"""Causal attention in blocks of queries, for bfloat16 on CPUs that multiply it but have no AMX tiles.

PyTorch's fused CPU kernel multiplies bfloat16 no faster than float32 there. Plain matrix products do, through oneDNN,
if they are float32 products that are told to round their factors to bfloat16; scores and sums stay in float32 then,
which is what the fused kernel does too. Memory grows with block x T, never with T x T. The products are small: give a
process one thread (OMP_NUM_THREADS=1) where other programs keep the cores busy.

Registered with transformers as "blockwise" (`register`). It computes plain causal attention in bfloat16 without
gradients; all else, such as padding or a sliding window, goes to PyTorch's own kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from scaled_rope.attention.interface import AttentionCall, attention_function
from scaled_rope.errors import ConfigError

_BLOCK = 128  # queries; of 64 to 256 the fastest at 8192 positions, by little


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Within this context, float32 matrix products round their factors to bfloat16 and sum in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = _BLOCK) -> Tensor:
    """softmax(scale * q k^T) v over the keys up to each query's own position; no gradients.

    Args:
        q: [B, H, T, D].
        k, v: [B, K, T, D], where K divides H: each of them serves H / K neighbouring heads.
        scale: usually 1 / sqrt(D).
        block: number of queries whose scores are in memory at once.

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    out = torch.empty_like(q)
    grouped, into = (rearrange(x, "b (k group) t d -> b k group t d", k=k.shape[1]) for x in (q, out))  # views
    batch, kv_heads, groups, length, dim = grouped.shape
    above = torch.full((block, block), -torch.inf, device=q.device).triu(1)  # hides later keys of the same block
    with bfloat16_products():
        for row in range(batch):
            for head in range(kv_heads):
                # Contiguous: the products below read the same keys once per block.
                keys, values = k[row, head].float().t().contiguous(), v[row, head].float()
                queries = grouped[row, head].float() * scale
                for first in range(0, length, block):
                    end = min(first + block, length)
                    size = end - first
                    scores = torch.mm(queries[:, first:end].reshape(-1, dim), keys[:, :end])
                    scores.view(groups, size, end)[:, :, first:] += above[:size, :size]
                    torch.softmax(scores, dim=-1, out=scores)
                    found = torch.mm(scores, values[:end]).view(groups, size, dim)
                    into[row, head, :, first:end] = found.to(q.dtype)
    return out


@attention_function
def _forward(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    query = call.query
    borders: Tensor | None = call.options.get("cu_seq_lens_q")
    if borders is not None and len(borders) != 2 and call.attention_mask is None:
        raise ConfigError(
            "cu_seq_lens_q: attention 'blockwise' takes no borders of documents; give position_ids that start again "
            "in each, or use 'sdpa_blocked'"
        )
    plain = call.is_causal and call.attention_mask is None and query.shape[2] == call.key.shape[2] and not call.dropout
    if (
        not plain
        or call.has("cache", "position_bias", "softcap")
        or query.dtype != torch.bfloat16
        or query.device.type != "cpu"
        or (torch.is_grad_enabled() and query.requires_grad)
    ):
        return call.handed_to(sdpa_attention_forward)
    return blockwise_attention(query, call.key, call.value, call.scale).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "blockwise" an attention implementation of transformers."""
    AttentionInterface.register("blockwise", _forward)
    AttentionMaskInterface.register("blockwise", sdpa_mask)
