"""Attention of a few queries over many keys that are rotated while they are read: the function and its torch twin.

Shapes: B rows, H query heads, Hkv key heads (each serves H/Hkv query heads), Q queries, K keys, D = head_dim,
R <= D rotated dimensions (the first ones).

Keys that are cached before rotation must be rotated whenever they are read. Rotating a cache in memory reads and writes
it once more and reads tables that are as large as one head of it. Here neither happens. Positions of a row are
consecutive, m = m0 + j in a block that begins at m0. R(j) is the same in every block, and R(m0) can be moved to the
query: q·R(m0 + j)k = (R(m0)ᵀq)·(R(j)k). One table of a block's length serves all keys, and rotated keys are not kept.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from scaled_rope.errors import ConfigError
from scaled_rope.kernels.decode_blocks import blocks_for, device_limits
from scaled_rope.kernels.rotary import frequency_phases, kernel_backend, tables_from_phases

_LOG = logging.getLogger(__name__)

BLOCK = 512
"""Keys that the torch twin rotates at once: few enough to fit the processor's cache, many enough to be worth a call."""


class DecodeAngles:
    """Rotation tables for the queries and keys of one pass, made once for all layers with the same frequencies.

    Args:
        inv_freq: [B, R/2] or [1, R/2], float32, radians per position.
        query_positions: [B, Q] or [1, Q], integers.
        first_key: [B] or [1], the position of key 0, of either sign.
        attention_factor: the multiplier of cos and sin, [B] or [1] or one number.

    Angles are exact to 1e-7 of a radian at any position.
    """

    def __init__(
        self, inv_freq: Tensor, query_positions: Tensor, first_key: Tensor, attention_factor: Tensor | float = 1.0
    ) -> None:
        if inv_freq.dim() != 2:
            raise ConfigError(f"inv_freq {list(inv_freq.shape)}: must be [B or 1, R/2]")
        self.phases = frequency_phases(inv_freq).contiguous()
        self.query_positions = query_positions
        self.first_key = first_key
        self.factors = torch.as_tensor(attention_factor, device=inv_freq.device).float().reshape(-1) ** 2
        """[B or 1]. Squared: queries carry the keys' factor too, whose tables then need none. Unrotated dimensions have
        no factor."""

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return tables_from_phases(self.phases[:, None], positions, 1.0)

    @functools.cached_property
    def query(self) -> tuple[Tensor, Tensor]:
        """cos and sin for queries [B or 1, 1, Q, R/2], with both factors."""
        cos, sin = self._tables(self.query_positions)
        factors = self.factors[:, None, None]
        return (cos * factors)[:, None], (sin * factors)[:, None]

    @functools.cached_property
    def within(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the places within a block [B or 1, 1, BLOCK, R/2]."""
        cos, sin = self._tables(torch.arange(BLOCK, device=self.phases.device)[None])
        return cos[:, None], sin[:, None]

    @functools.cached_property
    def _bases(self) -> dict[int, list[tuple[Tensor, Tensor]]]:
        return {}

    def bases(self, blocks: int) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [B or 1, 1, 1, R/2] of the first position of each block."""
        if blocks not in self._bases:
            starts = self.first_key.reshape(-1, 1) + torch.arange(blocks, device=self.phases.device) * BLOCK
            cos, sin = (table[:, None, :, None] for table in self._tables(starts))
            self._bases[blocks] = list(zip(cos.unbind(2), sin.unbind(2), strict=True))
        return self._bases[blocks]


def rotary_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: DecodeAngles,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(scaling · R(n)q · R(m)k) v for unrotated queries at n and unrotated keys at consecutive m. No gradients.

    Args:
        query: [B, H, Q, D].
        key, value: [B, Hkv, K, D] and [B, Hkv, K, Dv], of query's dtype.
        angles: the rotation tables of these positions.
        mask: [B or 1, 1, Q or 1, K], true (or 0, added to scores) where a query sees a key; None: the queries are the
            last Q of K tokens and see no later key.
        scaling: default D^(-1/2).
        interleaved: pair neighbours instead of halves.
        backend: see `kernel_backend`.

    Returns:
        [B, Q, H, Dv], in query's dtype.

    Raises:
        ConfigError: shapes or dtypes that do not fit together.
    """
    _check(query, key, value, angles.phases, mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kernel_backend(query.device, backend) == "triton":
        half, (limit, multiprocessors, lanes) = angles.phases.shape[-1], device_limits(query.device)
        rows = query.shape[1] // key.shape[1] * query.shape[2]
        tail, itemsize = query.shape[-1] - 2 * half, query.dtype.itemsize
        blocks = blocks_for(half, tail, value.shape[-1], itemsize, rows, limit, lanes)
        if blocks is not None:
            from scaled_rope.kernels.decode_triton import launch

            given = (angles.phases, angles.first_key, angles.query_positions, angles.factors)
            return launch(query, key, value, *given, mask, scale, interleaved, blocks, multiprocessors)
        _say_once(query.shape[-1], query.dtype, limit)
    return _decode_torch(query, key, value, angles, mask, scale, interleaved)


@functools.cache
def _say_once(head_dim: int, dtype: torch.dtype, limit: int) -> None:
    _LOG.warning(
        "decoding: heads of %d in %s do not fit the Triton kernel on this device (%d bytes of shared memory); torch "
        "rotates their keys",
        head_dim, dtype, limit,
    )  # fmt: skip


def _check(query: Tensor, key: Tensor, value: Tensor, phases: Tensor, mask: Tensor | None) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    fits = query.dim() == key.dim() == value.dim() == 4 and key.shape[:3] == value.shape[:3]
    if not fits or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ConfigError(f"{shapes}: must be [B, H, Q, D], [B, Hkv, K, D] and [B, Hkv, K, Dv], H a multiple of Hkv")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ConfigError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: must be one floating dtype")
    if phases.shape[0] not in (1, query.shape[0]) or 2 * phases.shape[1] > query.shape[3]:
        raise ConfigError(f"inv_freq {list(phases.shape)}: must be [{query.shape[0]} or 1, at most D/2]")
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != key.shape[2]):
        raise ConfigError(f"mask {list(mask.shape)}: must be [B or 1, 1, Q or 1, {key.shape[2]}]")


def _parts(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The first and second dimensions of the rotated pairs, [..., R/2] each, and the unrotated rest of each head."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    return x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]


def _decode_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: DecodeAngles,
    mask: Tensor | None,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """`rotary_decode` in torch."""
    batch, heads, count, head_dim = query.shape
    wanted = torch.promote_types(query.dtype, torch.float32)
    cos, sin = angles.query
    a, b, tail = _parts(query.to(wanted) * scale, cos.shape[-1], interleaved)
    # Queries of heads that share keys lie side by side, [B, Hkv, H/Hkv·Q, D]; D holds all a, all b, then the rest, for
    # interleaved pairs too: a product of query and key does not depend on the order of dimensions.
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin, tail), dim=-1).reshape(batch, key.shape[1], -1, head_dim)
    if mask is None and count > 1:
        seen = torch.arange(key.shape[2] - count, key.shape[2], device=query.device)[:, None]
        mask = (torch.arange(key.shape[2], device=query.device) <= seen)[None, None]
    out = _attend(turned, key, value, angles, mask, count, interleaved)
    return out.view(batch, heads, count, -1).transpose(1, 2).to(query.dtype).contiguous()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, angles: DecodeAngles, mask: Tensor | None, count: int, interleaved: bool
) -> Tensor:
    """Attention [B, Hkv, G, Dv] of queries [B, Hkv, G, D] that are rotated and scaled already; G = H/Hkv · Q."""
    half, keys = angles.phases.shape[-1], key.shape[2]
    batch, key_heads, rows, head_dim = query.shape
    cos, sin = (table.to(query.dtype) for table in angles.within)
    bases = angles.bases(-(-keys // BLOCK))
    a, b, tail = query[..., :half], query[..., half : 2 * half], query[..., 2 * half :]
    scores = query.new_empty(batch, key_heads, rows, keys)  # of all blocks: softmax needs them together
    turned = query.new_empty(batch, key_heads, min(BLOCK, keys), head_dim)
    for start, (base_cos, base_sin) in zip(range(0, keys, BLOCK), bases, strict=True):
        size = min(BLOCK, keys - start)
        # R(m0)ᵀ, which rotates the query backwards: hence the signs.
        towards = torch.cat((a * base_cos + b * base_sin, b * base_cos - a * base_sin, tail), dim=-1)
        ka, kb, rest = _parts(key[:, :, start : start + size].to(query.dtype), half, interleaved)
        one, c, s = turned[:, :, :size], cos[:, :, :size], sin[:, :, :size]
        torch.mul(ka, c, out=one[..., :half]).addcmul_(kb, s, value=-1)
        torch.mul(kb, c, out=one[..., half : 2 * half]).addcmul_(ka, s)
        if tail.shape[-1]:
            one[..., 2 * half :] = rest
        scores[..., start : start + size] = towards.to(query.dtype) @ one.transpose(2, 3)
    if mask is not None:
        by_query = scores.view(batch, key_heads, -1, count, keys)
        if mask.dtype == torch.bool:
            # Not -inf: a query of padding sees no key, and softmax of nothing but -inf is NaN.
            by_query.masked_fill_(~mask[:, :, None], torch.finfo(scores.dtype).min)
        else:
            by_query += mask[:, :, None]
    weights = scores.softmax(dim=-1)
    if value.dtype == weights.dtype:
        return weights @ value
    # Block by block, so that no float32 copy of all values is made.
    out = query.new_zeros(batch, key_heads, rows, value.shape[-1])
    for start in range(0, keys, BLOCK):
        out += weights[..., start : start + BLOCK] @ value[:, :, start : start + BLOCK].to(weights.dtype)
    return out
