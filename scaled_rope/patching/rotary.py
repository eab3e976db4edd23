"""The rotary modules: turn a scaling record and positions into cos and sin tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, cast

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


class _ShowsFamily(nn.Module):
    """A rotary module in the place of a family's own, whose plain attributes it shows: some models look there for the
    layer types or for the sections of axes."""

    def show(self, family: nn.Module) -> None:
        vars(self)["_shown"] = family  # not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            family = vars(self).get("_shown")
            if family is None or name.startswith("_") or name not in vars(family):
                raise
            return vars(family)[name]


class ScaledRotaryEmbedding(_ShowsFamily):
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
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
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
        angles = positions * self._static_frequencies(position_ids.device)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def _static_frequencies(self, device: torch.device) -> Tensor:
        """Frequencies [D/2] of a scaling that does not depend on the length, on a device.

        A module on "meta" may be called with numbers from elsewhere: under `torch.func.functional_call`, or after
        `load_state_dict(assign=True)`, which bring weights and buffers only.
        """
        if self.inv_freq.is_meta and device.type != "meta":
            return compute_rope(self.scaling, self.head_dim, device=device)[0]
        return self.inv_freq.to(device)

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


class FamilyRotaryEmbedding(ScaledRotaryEmbedding):
    """A family's own rotary module, computing with the frequencies of a `RopeScaling`.

    For families whose tables have a form of their own, and for positions along several axes, which the family shares
    out among the frequencies. The family's module is a copy that holds no frequencies: they are handed to it in every
    call, in float32. Weights of the family's module (learned factors of frequencies) are this module's. The attention
    factor is multiplied here, because not all families read theirs.
    """

    def __init__(
        self,
        scaling: RopeScaling,
        head_dim: int,
        device: torch.device | str | None,
        layout: Layout,
        float32_tables: bool,
        *,
        family: nn.Module,
        layer_type: str = "",
        order: Tensor | None = None,
        own_tables: bool = False,
    ) -> None:
        """
        Args:
            family: the rotary module of the unpatched model.
            layer_type: which of its tables, where it is called with a layer type.
            order: the family's frequencies are those of the record in this order [D/2]; None: in the same.
            own_tables: whether tables for plain positions, [B, T], have a form of the family's own, not `layout`.
        """
        super().__init__(scaling, head_dim, device, layout, float32_tables)
        vars(self)["family"] = _without_frequencies(family)  # not a submodule: its weights are registered here
        for name, weight in family.named_parameters(recurse=False):
            self.register_parameter(name, weight)
        self.layer_type = layer_type
        self.order = order
        self.own_tables = own_tables

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        """Tables for positions [B, T], or [axes, B, T]: as the family returns them.

        Under dynamic scaling the length of a row is that of its text, the first axis.
        """
        if position_ids.dim() == 2 and not self.own_tables:
            return super().forward(x, position_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self._parameters)):
            return self._tables(x, position_ids.to(x.device))

    def _tables(self, x: Tensor, position_ids: Tensor) -> Any:
        if not self.scaling.is_length_dependent:
            return self._tables_of_family(x, position_ids, self._static_frequencies(x.device), self.attention_scaling)
        text = position_ids if position_ids.dim() == 2 else position_ids[0]
        inv_freq, factor = self.frequencies(row_lengths(text))
        if len(inv_freq) == 1:
            return self._tables_of_family(x, position_ids, inv_freq[0], factor[0])
        rows = [
            self._tables_of_family(x, position_ids[..., row : row + 1, :], inv_freq[row], factor[row])
            for row in range(text.shape[0])
        ]
        if isinstance(rows[0], Tensor):
            return torch.cat(rows)
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    def _tables_of_family(self, x: Tensor, position_ids: Tensor, inv_freq: Tensor, factor: Tensor | float) -> Any:
        prefix, more = (f"{self.layer_type}_", (self.layer_type,)) if self.layer_type else ("", ())
        family = self.family
        if getattr(self, "_is_replica", False):  # of nn.DataParallel, whose replicas run at the same time
            family = copy.copy(family)
            vars(family)["_parameters"] = {name: getattr(self, name) for name in self.family._parameters}
        family._parameters.update(self._parameters)
        setattr(family, f"{prefix}inv_freq", inv_freq if self.order is None else inv_freq[self.order])
        setattr(family, f"{prefix}attention_scaling", 1.0)
        # In float32 until the factor has been multiplied.
        tables = family(x.new_zeros(1, 1, 1, dtype=torch.float32), position_ids, *more)
        if isinstance(tables, Tensor):
            return self._rounded(tables * factor, x)
        return tuple(self._rounded(table * factor, x) for table in tables)

    def _rounded(self, table: Tensor, x: Tensor) -> Tensor:
        return table if self.float32_tables or table.is_complex() else table.to(x.dtype)


def _without_frequencies(family: nn.Module) -> Any:
    """A copy of a family's rotary module without buffers, which leaves the frequencies that it is given alone."""
    copied: Any = copy.copy(family)
    vars(copied).update({"_buffers": {}, "_non_persistent_buffers_set": set(), "_modules": {}, "_parameters": {}})
    types = getattr(family, "rope_type", "default")
    copied.rope_type = dict.fromkeys(types, "default") if isinstance(types, dict) else "default"
    return copied


class LayeredRotaryEmbedding(_ShowsFamily):
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
