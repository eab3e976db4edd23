"""MLPs that work on a sequence one stretch after another, and so need less memory for their inner activations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scaled_rope.errors import ConfigError
from scaled_rope.patching.output_head import decoder_of, without_adapters
from scaled_rope.scaling.hf_config import text_config

_MLPS = ("mlp", "feed_forward", "ffn")
"""Names of the MLP in a decoder layer."""


def tile_mlps(model: Any, tiles: int) -> None:
    """Let each MLP work on `tiles` stretches of a sequence, one after another, and again in the backward pass.

    An MLP looks at each token by itself, so the result is the same to rounding, but its inner activations, the largest
    of a layer, are there for one stretch at a time. Each stretch is a checkpoint of torch, which the hooks of DDP, FSDP
    and ZeRO know, unlike the functions of DeepSpeed and Liger that sum gradients by themselves.

    tiles: 1 leaves the model as it is.

    Raises:
        ConfigError: a model without such MLPs, or with one that does not treat tokens alike, such as experts behind a
            router.
    """
    if tiles == 1:
        return
    layers = decoder_of(without_adapters(model)).layers
    found = [getattr(layer, name) for layer in layers for name in _MLPS if hasattr(layer, name)]
    if len(found) != len(layers):
        family = model.config.model_type
        raise ConfigError(f"mlp_tiles {tiles} is not possible: layers of {family} have no MLP of a known name")
    checked: set[type] = set()
    for mlp in found:
        if type(mlp) not in checked:
            with _gathered(mlp):
                _check_tokenwise(mlp, model.config, tiles)
            checked.add(type(mlp))
        mlp.forward = functools.partial(_tiled, mlp.forward, tiles)


def _tiled(forward: Callable[[torch.Tensor], torch.Tensor], tiles: int, hidden: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return torch.cat([forward(part) for part in hidden.chunk(tiles, dim=-2)], dim=-2)
    parts = [checkpoint(forward, part, use_reentrant=False) for part in hidden.chunk(tiles, dim=-2)]
    return torch.cat(parts, dim=-2)


def _gathered(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within this context, weights that ZeRO-3 has spread over ranks are whole. Every rank must enter it."""
    spread = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        return contextlib.nullcontext()
    import deepspeed

    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(spread)
    return context


@torch.no_grad()
def _check_tokenwise(mlp: Any, config: Any, tiles: int) -> None:
    """Raise a ConfigError unless the output for some tokens is that for these tokens alone."""
    weight = next(mlp.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 6, text_config(config).hidden_size, generator=generator, device="cpu")
    hidden = hidden.to(weight.device, weight.dtype)
    try:
        whole, part = mlp(hidden), mlp(hidden[:, 4:])
        alike = isinstance(whole, torch.Tensor) and whole.shape == hidden.shape
        # While planning, tensors have shapes and no values.
        if alike and type(whole) is torch.Tensor and not whole.is_meta:
            alike = torch.allclose(whole[:, 4:], part, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    except (TypeError, ValueError, RuntimeError):
        alike = False
    if not alike:
        name = type(mlp).__name__
        raise ConfigError(f"mlp_tiles {tiles} is not possible: {name} does not treat each token by itself")
