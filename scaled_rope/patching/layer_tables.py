"""Tables of cos and sin for layers that differ: one rotary module for all, and hooks that give each layer its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError
from scaled_rope.patching.families import Adapter
from scaled_rope.patching.rotary import LayeredRotaryEmbedding, ScaledRotaryEmbedding
from scaled_rope.scaling.record import LayerPlan, RopeScaling


def build_rotary(
    scaling: RopeScaling, layers: dict[str, RopeScaling], head_dim: int, device: torch.device, adapter: Adapter
) -> ScaledRotaryEmbedding | LayeredRotaryEmbedding:
    """The rotary module of a patched model.

    Args:
        scaling: the scaling of all layers, where `layers` is empty.
        layers: layer type -> its scaling.
        adapter: gives the layout and the dtype of the tables.
    """

    def one(scaling: RopeScaling) -> ScaledRotaryEmbedding:
        return ScaledRotaryEmbedding(scaling.of_frequencies, head_dim, device, adapter.layout, adapter.float32_tables)

    if not layers:
        return one(scaling)
    return LayeredRotaryEmbedding({name: one(each) for name, each in layers.items()})


def check_layers_can_differ(plan: LayerPlan, base: PreTrainedModel, adapter: Adapter) -> None:
    """Raise an error for a plan whose layers `hook_layers` could not tell apart in this model.

    Raises:
        ConfigError: the model's layers are no list, or are not passed any tables.
    """
    if not plan.drop_layers and (adapter.per_layer_type or not plan.layers):
        return
    layers = getattr(base, adapter.layers, None)
    if not isinstance(layers, nn.ModuleList) or "position_embeddings" not in str(inspect.signature(layers[0].forward)):
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
        cos, sin = kwargs["position_embeddings"]
        if self.place is not None:
            cos, sin = cos[self.place], sin[self.place]
        if self.dropped:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        return args, {**kwargs, "position_embeddings": (cos, sin)}
