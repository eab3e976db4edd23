"""Find the rotary module in a model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.patching.families import ADAPTERS

ROTARY = "rotary_emb"
"""The name of the rotary module on the base model, the part of a model that computes hidden states."""


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the part of `model` that computes hidden states, inside any wrapper; in a multimodal model, that for text.

    Raises:
        ConfigError: there is no such part with RoPE, or there are several.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model of type {type(model).__name__}: must be a model of transformers")
    bases = [
        module for module in model.modules() if isinstance(module, PreTrainedModel) and module.base_model is module
    ]
    if not bases:
        raise ConfigError(f"model of type {type(model).__name__}: contains no model of transformers")
    with_rotary = [base for base in bases if isinstance(getattr(base, ROTARY, None), nn.Module)]
    text = [base for base in with_rotary if base.config.get_text_config(decoder=True) is base.config]
    known = [base for base in text if base.config.model_type in ADAPTERS]
    if not with_rotary:
        raise unknown("architecture", bases[0].config.model_type, ADAPTERS)
    candidates = known or text or with_rotary
    if len(candidates) > 1:
        names = ", ".join(base.config.model_type for base in candidates)
        raise ConfigError(f"model of type {type(model).__name__}: contains several models with RoPE ({names})")
    return candidates[0]


def device_of(rotary: nn.Module) -> torch.device:
    """The device that holds the frequencies of a rotary module, of a family or ours."""
    buffer = next(rotary.buffers(), None)
    inv_freq: Any = buffer if buffer is not None else rotary.inv_freq
    device: torch.device = inv_freq.device
    return device
