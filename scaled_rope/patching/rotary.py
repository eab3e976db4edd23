"""The rotary modules: turn a scaling record and positions into cos and sin tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from scaled_rope.patching.forward_pass import row_lengths
from scaled_rope.scaling.frequencies import compute_rope, compute_rope_batch
from scaled_rope.scaling.record import RopeScaling

Layout = Literal["halves", "interleaved", "half"]
"""The layout of a family's tables over the D rotated dimensions. "halves": all D/2 angles, then all again;
"interleaved": each angle twice in a row (Cohere); "half": each angle once (GPT-OSS)."""


def lay_out(table: Tensor, layout: Layout) -> Tensor:
    """Widen a table [..., D/2] to a layout."""
    if layout == "half":
        return table
    if layout == "interleaved":
        return table.repeat_interleave(2, dim=-1)
    return torch.cat((table, table), dim=-1)


class ScaledRotaryEmbedding(nn.Module):
    """Rotary tables for any `RopeScaling`, in the interface that the models of transformers call.

    Frequencies and tables are float32 whatever the dtype of the model; only the finished tables are rounded.
    The module has no parameters, no buffers and no memory: its output depends only on its inputs, and on row lengths
    that `forward_pass.lengths` gives.
    """

    inv_freq: Tensor
    attention_scaling: float

    def __init__(
        self,
        scaling: RopeScaling,
        head_dim: int,
        device: torch.device | str | None = None,
        layout: Layout = "halves",
        float32_tables: bool = False,
    ) -> None:
        """head_dim: dimensions per head. float32_tables: do not round the tables to the model's dtype.

        Raises:
            ConfigError: as `compute_rope` does.
        """
        super().__init__()
        self.scaling = scaling
        self.head_dim = head_dim
        self.layout = layout
        self.float32_tables = float32_tables
        # Not a buffer, because half() and FSDP's mixed precision cast all buffers of a model.
        self.inv_freq, self.attention_scaling = compute_rope(scaling, head_dim, device=device)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for the given positions.

        Args:
            x: any tensor of the wanted dtype and device.
            position_ids: [B, T] (or [1, T] for all rows), whole numbers from 0.

        Returns:
            cos and sin [B, T, D] ([B, T, D/2] in the "half" layout) in x.dtype or float32, multiplied by the
            attention factor. Under dynamic scaling a row's scale follows from its own largest position, or from
            `forward_pass.lengths`.
        """
        position_ids = position_ids.to(x.device)
        seq_len = row_lengths(position_ids) if self.scaling.is_length_dependent else None
        cos, sin = self.tables(position_ids, seq_len)
        dtype = torch.float32 if self.float32_tables else x.dtype
        return lay_out(cos, self.layout).to(dtype), lay_out(sin, self.layout).to(dtype)

    def tables(self, position_ids: Tensor, seq_len: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of positions in rows of given lengths, before anything is laid out or rounded.

        Args:
            position_ids: [B, T] or [1, T], whole numbers of either sign.
            seq_len: [B] or [1], l' of each row in tokens; only a scaling that depends on the length needs it.

        Returns:
            Two of [B, T, D/2], float32, multiplied by the attention factor; B is 1 where both arguments have one row.
        """
        # Only elementwise products follow, which autocast leaves in float32.
        positions = position_ids.to(torch.float32)[..., None]
        if self.scaling.is_length_dependent:
            assert seq_len is not None
            inv_freq, factor = self.frequencies(seq_len)
            angles = positions * inv_freq[:, None, :]
            return angles.cos() * factor[:, None, None], angles.sin() * factor[:, None, None]
        angles = positions * self.inv_freq.to(position_ids.device)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def frequencies(self, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies [B, D/2] and attention factors [B], float32, of rows of l' = seq_len [B] tokens."""
        return compute_rope_batch(self.scaling, self.head_dim, seq_len)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device, out of "meta" as well, but never to its dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.inv_freq.device)).device
        if device != self.inv_freq.device:
            self.inv_freq, self.attention_scaling = compute_rope(self.scaling, self.head_dim, device=device)
        return self

    def extra_repr(self) -> str:
        return f"{self.scaling.label}, head_dim={self.head_dim}"


class LayeredRotaryEmbedding(nn.Module):
    """One `ScaledRotaryEmbedding` per layer type.

    Called with a layer type, as in Gemma 3 and OLMo 3, it returns the tables of that type. Called without, as in models
    whose layers share one pair of tables, it returns those of all types stacked, [types, B, T, D]; a hook in front of
    each layer takes its own (`layer_tables`).
    """

    def __init__(self, by_type: Mapping[str, ScaledRotaryEmbedding]) -> None:
        super().__init__()
        self.by_type = nn.ModuleDict(by_type)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Tables as from `ScaledRotaryEmbedding.forward`, of one type, or of all types in the order of `by_type`."""
        if layer_type is not None:
            return cast(tuple[Tensor, Tensor], self.by_type[layer_type](x, position_ids))
        tables = [rotary(x, position_ids) for rotary in self.by_type.values()]
        return torch.stack([cos for cos, _ in tables]), torch.stack([sin for _, sin in tables])

    def index(self, layer_type: str) -> int:
        """The index of a layer type's tables in the stack."""
        return list(self.by_type).index(layer_type)

    @property
    def inv_freq(self) -> Tensor:
        """Frequencies of the first layer type."""
        return cast(Tensor, next(iter(self.by_type.values())).inv_freq)
