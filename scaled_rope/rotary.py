"""The one rotary module: turns a scaling record and positions into cos and sin tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from scaled_rope.config import RopeScaling
from scaled_rope.methods import compute_rope, compute_rope_batch


class ScaledRotaryEmbedding(nn.Module):
    """Rotary tables for any `RopeScaling`, in the interface that the models of transformers call.

    Frequencies and tables are float32 whatever the dtype of the model; only the finished tables are rounded.
    The module has no parameters, no buffers and no memory: its output depends on its inputs alone.
    """

    inv_freq: Tensor
    attention_scaling: float

    def __init__(self, scaling: RopeScaling, head_dim: int, device: torch.device | str | None = None) -> None:
        """head_dim: dimensions per head. Raises ConfigError as `compute_rope` does."""
        super().__init__()
        self.scaling = scaling
        self.head_dim = head_dim
        # Not a buffer, because half() and FSDP's mixed precision cast all buffers of a model.
        self.inv_freq, self.attention_scaling = compute_rope(scaling, head_dim, device=device)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for the given positions.

        Args:
            x: any tensor of the wanted dtype and device.
            position_ids: [B, T] (or [1, T] for all rows), whole numbers from 0.

        Returns:
            cos and sin [B, T, D] in x.dtype, each two equal halves [B, T, D/2] side by side, multiplied by
            the attention factor. Under dynamic scaling a row's scale follows from its own largest position.
        """
        # Only elementwise products follow, which autocast leaves in float32.
        positions = position_ids.to(device=x.device, dtype=torch.float32)[..., None]
        if self.scaling.is_length_dependent:
            seq_len = position_ids.to(x.device).amax(dim=-1) + 1
            inv_freq, factor = compute_rope_batch(self.scaling, self.head_dim, seq_len)
            angles = positions * inv_freq[:, None, :]
            cos, sin = angles.cos() * factor[:, None, None], angles.sin() * factor[:, None, None]
        else:
            angles = positions * self.inv_freq.to(x.device)
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((sin, sin), dim=-1).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device, out of "meta" as well, but never to its dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.inv_freq.device)).device
        if device != self.inv_freq.device:
            self.inv_freq, self.attention_scaling = compute_rope(self.scaling, self.head_dim, device=device)
        return self

    def extra_repr(self) -> str:
        return f"{self.scaling.label}, head_dim={self.head_dim}"
