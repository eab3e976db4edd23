"""The arithmetic of training: FLOPs of a step by part, and peak rates of devices. Formulas only, nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaled_rope.scaling.hf_config import text_config
from scaled_rope.training.ring import head_dims

#: dense bf16 FLOP/s without sparsity, by a part of the device's name; vendors' data sheets
_PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, None where it is not known (every CPU)."""
    return next((rate for part, rate in _PEAKS.items() if part in device_name), None)


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_flops` of a torch device; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add counted as two; forward and backward, nothing computed twice."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.linear * times, self.attention * times)


@dataclass(frozen=True)
class ModelCost:
    """The sizes in a model's shape that determine its FLOPs.

    Attributes:
        multiplied: number of weights that every token is multiplied by (matrices; of experts, the active share).
        trained: number of those that get a gradient.
        heads_width: query heads times head_dim (the mean of that of keys and of values), summed over layers of one
            kind: {window or None: width}. Layers of another kind than attention have none, and what their state costs
            is left out; chunks of Llama 4 count as windows of half their size, which sees as many pairs in long texts.
    """

    multiplied: float
    trained: float
    heads_width: dict[int | None, int]

    @classmethod
    def of(cls, model: nn.Module) -> ModelCost:
        """Read the sizes off a transformers causal language model, on any device, with or without adapters."""
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        config = text_config(base.config)
        active = _active_share(config)
        embedding = base.get_input_embeddings().weight
        tied = base.get_output_embeddings() is None or base.get_output_embeddings().weight is embedding
        multiplied = trained = 0.0
        for name, parameter in model.named_parameters():
            size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a shard in its place
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            if matrix and (parameter is not embedding or tied):
                size *= active if ".experts." in name else 1.0
                multiplied += size
                trained += size if parameter.requires_grad else 0.0
        width = config.num_attention_heads * sum(head_dims(config)) // 2
        layers: dict[int | None, int] = {}
        for index in range(config.num_hidden_layers):
            if not _attends(config, index):
                continue
            window = _window(config, index)
            layers[window] = layers.get(window, 0) + width
        return cls(multiplied, trained, layers)

    def sequence(self, length: int) -> Flops:
        """FLOPs of training on one sequence of `length` tokens.

        In the forward pass a token meets every weight once, 2 FLOP each, and each query meets each key that it may see
        in two products of `head_dim` terms. The backward pass does the same twice: for the inputs, and for the weights
        that are trained.
        """
        forward = self.reading(length)
        backward = (2.0 * self.multiplied + 2.0 * self.trained) * length
        return Flops(forward.linear + backward, 3 * forward.attention)

    def reading(self, length: int) -> Flops:
        """FLOPs of the forward pass alone over one sequence of `length` tokens."""
        attention = sum(4.0 * width * _pairs(length, window) for window, width in self.heads_width.items())
        return Flops(2.0 * self.multiplied * length, attention)


def _pairs(length: int, window: int | None) -> float:
    """The number of (query, key) pairs under a causal mask, within a window."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def _active_share(config: Any) -> float:
    """The share of a mixture of experts that is active for a token; 1 without experts."""

    def first(*names: str) -> int | None:
        return next((number for name in names if (number := getattr(config, name, None))), None)

    experts = first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = first("num_experts_per_tok", "moe_k")
    return chosen / experts if experts and chosen else 1.0


def _attends(config: Any, layer: int) -> bool:
    """Whether a layer has attention, as far as the config says of what type its layers are."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return types is None or not any(part in str(types[layer]) for part in ("linear", "mamba", "conv", "recurrent"))


def _window(config: Any, layer: int) -> int | None:
    """The attention window of a layer in tokens; None: no window."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] == "chunked_attention":
        return max(1, int(config.attention_chunk_size) // 2)
    if types is not None and types[layer] != "sliding_attention":
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return window
