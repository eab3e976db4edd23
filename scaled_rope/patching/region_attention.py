"""Install methods that change attention in a model of transformers.

The attention modules of a patched model rotate nothing themselves: they cache unrotated keys and pass them, with the
queries, to `region_attention`, which rotates both by the distance of each pair. So caches of any class work if they
keep all keys. Masks come in the form of `sdpa_blocked`, [B, T] instead of [B, 1, T, T].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scaled_rope.attention.backends import by_stretch, has_window, refusal
from scaled_rope.attention.composed import composed_attention, flash, is_composable
from scaled_rope.attention.interface import AttentionCall, AttentionFunction, attention_function
from scaled_rope.attention.regions import Regions, region_attention
from scaled_rope.errors import ConfigError
from scaled_rope.patching.deferred_rotation import is_untouched
from scaled_rope.patching.forward_pass import current_pass
from scaled_rope.patching.rebind import APPLY, INTERFACE, callers, rebind
from scaled_rope.patching.rotary import Layout
from scaled_rope.patching.rotary_kernel import normalising, pairing_of, rotated_last

MASKS_OF = "sdpa_blocked"
"""The attention implementation that is set on a patched model, so that masks come in its form."""
CARRIERS = ("auto", "sdpa", "sdpa_blocked", "blockwise")
"""Implementations that regions may replace: all compute the same, in float32 or with bfloat16 factors."""


def check_carrier(method: str, attention: str) -> None:
    """Raise an error for an attention implementation that a method cannot replace.

    Raises:
        ConfigError: it is none of `CARRIERS`.
    """
    if attention not in CARRIERS:
        raise ConfigError(
            f"attention {attention!r}: cannot carry method {method!r}, which computes attention itself; "
            f"must be one of {', '.join(CARRIERS)}"
        )


def pairing(base: nn.Module, method: str, layout: Layout, half: int) -> bool:
    """Whether the attention of a base model pairs neighbouring dimensions.

    Args:
        half: half of the rotated dimensions.

    Raises:
        ConfigError: a family with whose attention the method does not work.
    """
    config: Any = base.config
    reason = refusal(config, MASKS_OF)
    if not reason and has_window(config):
        reason = "whose layers have a sliding window"
    if not reason and (normaliser := normalising(base)):
        reason = f"{normaliser} normalises queries and keys after it has rotated them"
    attention = callers(base, INTERFACE)
    if not reason and any(map(rotated_last, attention)):
        reason = "whose latent attention rotates the last dimensions of each head"
    if not reason and not (getattr(config, "is_causal", True) and all(map(_is_causal, attention))):
        reason = "whose queries attend to later keys"
    interleaved = None
    if not reason:
        interleaved, reason = pairing_of(base, layout, half)
    if not reason and callers(base, APPLY) != callers(base, INTERFACE):
        reason = "they do not use transformers' attention interface"
    if interleaved is None:
        raise ConfigError(f"method {method!r}: cannot be used with {config.model_type} models, {reason}")
    return interleaved


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True))


class _Only:
    """Stands in for the registry of attention implementations; always returns one function."""

    def __init__(self, function: AttentionFunction) -> None:
        self._function = function

    def get_interface(self, *_: Any) -> AttentionFunction:
        return self._function

    __getitem__ = get_interface


def install_region_attention(base: nn.Module, regions: Regions, inv_freq: Tensor, interleaved: bool) -> None:
    """Make all attention modules of a base model attend in regions. `Passes.unrotated` must be set as well.

    inv_freq: [R/2], unscaled.
    """

    @attention_function
    def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.dropout:
            raise ConfigError(f"attention_dropout={call.dropout:g}: must be 0 for a method that changes attention")
        if name := call.has("softcap", "s_aux", "position_bias"):
            raise ConfigError(f"{name}: {type(call.module).__name__} uses it, a method that changes attention has none")
        if call.may_see_later_keys:
            raise ConfigError(
                f"is_causal=False: {type(call.module).__name__} attends to keys that come after the query, it must be "
                "True for a method that changes attention"
            )
        _check_untouched(call)
        mask: Tensor | None = call.attention_mask
        if mask is not None and mask.dim() != 2:
            raise ConfigError(f"attention_mask of shape {list(mask.shape)}: must be [rows, tokens]")

        def regional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if is_composable(q, k, v):
                found = composed_attention(q, k, v, inv_freq, regions, call.scale, flash, interleaved=interleaved)
            else:
                found = region_attention(q, k, v, inv_freq, regions, call.scale, interleaved=interleaved)
            return found.transpose(1, 2)

        return by_stretch(regional, call).contiguous(), None

    for module in callers(base, APPLY):
        rebind(module, APPLY, _as_they_are)
        rebind(module, INTERFACE, _Only(attend))


def remove_region_attention(base: nn.Module) -> None:
    """Undo `install_region_attention`."""
    for module in callers(base, INTERFACE):
        rebind(module, INTERFACE, None)
        rebind(module, APPLY, None)


def _as_they_are(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling() and (current := current_pass()) is not None:
        current.handed = q, k
    return q, k


def _check_untouched(call: AttentionCall) -> None:
    """Raise a ConfigError if a module changes queries or keys after the place where it was to rotate them, since they
    are rotated only now. Passes behind a cache are not looked at, and compiled ones."""
    if torch.compiler.is_compiling() or (current := current_pass()) is None:
        return
    handed, current.handed = current.handed, None
    if current.contents is not None or handed is None:
        return
    q, k = handed
    if not (is_untouched(q, call.query) and is_untouched(k, call.key[:, :, : k.shape[2]])):
        raise ConfigError(
            f"{type(call.module).__name__} changes queries or keys between rotation and attention, so a method that "
            "changes attention cannot be used with it"
        )
