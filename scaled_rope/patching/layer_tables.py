"""Tables of cos and sin for layers that differ: one rotary module for all, and hooks that give each layer its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError
from scaled_rope.patching.families import Adapter
from scaled_rope.patching.rotary import FamilyRotaryEmbedding, LayeredRotaryEmbedding, ScaledRotaryEmbedding
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import LayerPlan, RopeScaling


@dataclass(frozen=True)
class TableForm:
    """The properties of a rotary module's tables that a scaling leaves alone."""

    adapter: Adapter
    family: nn.Module
    """The rotary module of the unpatched model."""
    head_dims: dict[str, int]
    """Layer type -> dimensions per head; "" where all layers share their tables."""
    orders: dict[str, Tensor]
    """Layer type -> the order of the family's frequencies, [D/2], where it isn't that of the record."""

    def head_dim(self, layer_type: str) -> int:
        """Dimensions per head in the layers of a type."""
        return self.head_dims.get(layer_type, next(iter(self.head_dims.values())))

    def frequencies(self, scaling: RopeScaling, layer_type: str, length: int | None = None) -> tuple[Tensor, float]:
        """Frequencies [D/2] in the order of the family, and the attention factor; length: as for `compute_rope`."""
        inv_freq, factor = compute_rope(scaling, self.head_dim(layer_type), length)
        order = self.orders.get(layer_type)
        return (inv_freq if order is None else inv_freq[order]), factor


def build_rotary(
    scaling: RopeScaling, layers: dict[str, RopeScaling], device: torch.device, form: TableForm
) -> ScaledRotaryEmbedding | LayeredRotaryEmbedding:
    """The rotary module of a patched model.

    Args:
        scaling: the scaling of all layers, where `layers` is empty.
        layers: layer type -> its scaling.
    """
    adapter = form.adapter

    def one(scaling: RopeScaling, layer_type: str = "") -> ScaledRotaryEmbedding:
        values = scaling.of_frequencies, form.head_dim(layer_type), device, adapter.layout, adapter.float32_tables
        if not (adapter.axes or adapter.own_tables):
            return ScaledRotaryEmbedding(*values)
        return FamilyRotaryEmbedding(
            *values,
            family=form.family,
            layer_type=layer_type if adapter.per_layer_type else "",
            order=form.orders.get(layer_type),
            own_tables=adapter.own_tables,
        )

    if not layers:
        return one(scaling)
    return LayeredRotaryEmbedding({name: one(each, name) for name, each in layers.items()})


def check_layers_can_differ(plan: LayerPlan, base: PreTrainedModel, adapter: Adapter) -> None:
    """Raise an error for a plan whose layers `hook_layers` could not tell apart in this model.

    Raises:
        ConfigError: the model's layers are no list, or are not passed any tables.
    """
    if not plan.drop_layers and (adapter.per_layer_type or not plan.layers):
        return
    layers = getattr(base, adapter.layers, None)
    takes = (
        isinstance(layers, nn.ModuleList) and "position_embeddings" in inspect.signature(layers[0].forward).parameters
    )
    if not takes or adapter.own_tables:
        raise ConfigError(f"architecture {base.config.model_type!r}: its layers cannot be told apart")


def hook_layers(
    base: nn.Module, rotary: nn.Module, plan: LayerPlan, config: Any, adapter: Adapter
) -> list[RemovableHandle]:
    """Hook the layers of a model that passes the same tables to all, so that each gets its own; return the hooks."""
    stacked = bool(plan.layers) and not adapter.per_layer_type
    if not stacked and not plan.drop_layers:
        return []
    hooks = []
    for index, layer in enumerate(getattr(base, adapter.layers)):
        place = None
        if stacked:
            assert isinstance(rotary, LayeredRotaryEmbedding)
            place = rotary.index(config.layer_types[index])
        dropped = index in plan.drop_layers
        if stacked or dropped:
            hooks.append(layer.register_forward_pre_hook(_TableChoice(place, dropped), with_kwargs=True))
    return hooks


@dataclass(frozen=True)
class _TableChoice:
    """Forward pre-hook of a decoder layer: passes on its entry of stacked tables, or tables that rotate nothing."""

    place: int | None
    """Index of the layer's tables in the stack; None when tables are not stacked."""
    dropped: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_embeddings" not in kwargs:
            raise ConfigError(f"{type(module).__name__} gets no position_embeddings: its layers cannot be told apart")
        if kwargs["position_embeddings"] is None:  # a layer without attention
            return None
        tables = kwargs["position_embeddings"]
        if not isinstance(tables, tuple | list) or len(tables) != 2:
            raise ConfigError(f"{type(module).__name__} gets no pair of tables: its layers cannot be told apart")
        cos, sin = tables
        if self.place is not None:
            cos, sin = cos[self.place], sin[self.place]
        if self.dropped:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        return args, {**kwargs, "position_embeddings": (cos, sin)}
