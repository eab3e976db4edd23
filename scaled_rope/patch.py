"""Put a scaling into a model of transformers, and take it out again.

A patched model differs in two places: its rotary module, and what its config says about RoPE. What was there
before is kept on the base model (the part that makes hidden states), so it travels with copies of the model.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from scaled_rope.config import RopeScaling
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.rotary import ScaledRotaryEmbedding

_STATE = "_scaled_rope_state"


@dataclass(frozen=True)
class Adapter:
    """What differs between model families. The defaults are the common layout: one rotary module on the base
    model that is called as rotary_emb(x, position_ids) and returns (cos, sin) over whole heads."""

    rotary: str = "rotary_emb"
    """Name of the rotary module on the base model."""
    partial_rotary: bool = False
    """Whether attention can rotate a part of each head only."""


ADAPTERS: dict[str, Adapter] = {"llama": Adapter(), "mistral": Adapter()}
"""Supported families by `config.model_type`."""


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` changed."""

    model_type: str
    modules: tuple[str, ...]
    """Names, inside the model that was given, of the modules that were replaced."""
    scaling: RopeScaling
    head_dim: int
    attention_factor: float
    """The multiplier of cos and sin at s = factor."""
    before: RopeScaling
    """The scaling in effect before."""
    notes: tuple[str, ...]
    """What the caller may not have meant; empty when all is plain."""


@dataclass
class _State:
    """What a patched base model was before its first patch, and what it is now."""

    rotary: nn.Module
    rope_parameters: Any
    max_position_embeddings: int
    own: RopeScaling
    """The scaling that its config said."""
    scaling: RopeScaling
    hook: RemovableHandle | None


def patch_model(model: nn.Module, scaling: RopeScaling | str) -> PatchReport:
    """Give `model` another RoPE scaling, in place.

    Args:
        model: a causal language model, a bare base model, or a wrapper around one (PEFT).
        scaling: a record, or a spec such as "yarn:8" (see `RopeScaling.from_spec`) relative to the model as
            it was before any patch. Patching a patched model replaces the scaling.

    `config.rope_parameters` and, when it is too small, `config.max_position_embeddings` follow, so that the
    saved model carries its scaling. Models may share a config object, so the change is made on the model's
    own copy; only the config of a bare base model, which may belong to an enclosing model, changes in place.

    Raises:
        ConfigError: an unknown architecture or a scaling that does not fit the model. Nothing changes then.
    """
    base = _base_model(model)
    config: Any = base.config
    adapter = _adapter(config.model_type)
    state: _State | None = getattr(base, _STATE, None)
    own = state.own if state else RopeScaling.from_config(config)
    before = state.scaling if state else own
    if isinstance(scaling, str):
        scaling = RopeScaling.from_spec(scaling, own)
    if scaling.partial_rotary_factor != 1.0 and not adapter.partial_rotary:
        share = f"{scaling.partial_rotary_factor:g}"
        raise ConfigError(f"partial_rotary_factor={share}: must be 1, {config.model_type} models rotate whole heads")
    head_dim = head_dim_of(config)
    replaced = getattr(base, adapter.rotary)
    rope_parameters = scaling.to_config(head_dim=head_dim)
    names = tuple(name for name, module in model.named_modules() if module is replaced)
    rotary = ScaledRotaryEmbedding(scaling, head_dim, device=replaced.inv_freq.device)

    if state:
        _restore(base, state)
    elif base is not model:
        config = _detach_config(model, base)
    hook = None
    if scaling.is_length_dependent:
        hook = base.register_forward_pre_hook(_prepare_dynamic_pass, with_kwargs=True)
    state = _State(
        rotary=getattr(base, adapter.rotary),
        rope_parameters=config.rope_parameters,
        max_position_embeddings=config.max_position_embeddings,
        own=own,
        scaling=scaling,
        hook=hook,
    )
    setattr(base, _STATE, state)
    setattr(base, adapter.rotary, rotary)
    config.rope_parameters = rope_parameters
    config.max_position_embeddings = max(config.max_position_embeddings, scaling.max_position_embeddings or 0)

    notes = _notes(own, scaling, config)
    return PatchReport(config.model_type, names, scaling, head_dim, rotary.attention_scaling, before, notes)


def unpatch_model(model: nn.Module) -> None:
    """Undo every `patch_model` on `model`: the rotary module and the config's fields are what they were.

    Raises ConfigError when the model is not patched.
    """
    base = _base_model(model)
    state: _State | None = getattr(base, _STATE, None)
    if state is None:
        raise ConfigError(f"unpatch_model: this {type(model).__name__} is not patched")
    _restore(base, state)


def patched_scaling(model: nn.Module) -> RopeScaling | None:
    """The scaling that `patch_model` gave to `model`, or None when it is not patched."""
    state: _State | None = getattr(_base_model(model), _STATE, None)
    return state.scaling if state else None


def head_dim_of(config: Any) -> int:
    """Dimensions per attention head, from a transformers config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _base_model(model: nn.Module) -> PreTrainedModel:
    """The part of `model` that makes hidden states, whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            return module
    raise ConfigError(f"model of type {type(model).__name__}: contains no model of transformers")


def _adapter(model_type: str) -> Adapter:
    if model_type not in ADAPTERS:
        raise unknown("architecture", model_type, ADAPTERS)
    return ADAPTERS[model_type]


def _detach_config(model: nn.Module, base: PreTrainedModel) -> Any:
    """Give every part of `model` that uses the base model's config one private copy of it."""
    shared = base.config
    private = copy.deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:  # vars: wrappers forward attributes that they do not have
            module.config = private
    return private


def _restore(base: PreTrainedModel, state: _State) -> None:
    setattr(base, _adapter(base.config.model_type).rotary, state.rotary)
    config: Any = base.config
    config.rope_parameters = state.rope_parameters
    config.max_position_embeddings = state.max_position_embeddings
    if state.hook is not None:
        state.hook.remove()
    delattr(base, _STATE)


def _prepare_dynamic_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a dynamically scaled base model."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    cache = given.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ConfigError(
            "past_key_values: dynamic scaling cannot read cached keys, which were rotated at another scale; "
            "pass use_cache=False"
        )
    mask = given.get("attention_mask")
    if given.get("position_ids") is None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # Count real tokens only, as generate() does: padding must not make a row look longer than it is.
        position_ids = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        more = given.pop("kwargs", {})  # what forward() takes as **kwargs
        return (), {**given, **more, "position_ids": position_ids}
    return None


def _notes(own: RopeScaling, scaling: RopeScaling, config: Any) -> tuple[str, ...]:
    """Remarks on a scaling that fits the model but may not be what the caller meant."""
    notes = []
    if scaling.rope_theta != own.rope_theta:
        notes.append(f"rope_theta={scaling.rope_theta:g} differs from the model's own {own.rope_theta:g}")
        warnings.warn(notes[-1], stacklevel=3)
    original = own.original_max_position_embeddings
    if scaling.original_max_position_embeddings not in (None, original):
        given = scaling.original_max_position_embeddings
        notes.append(f"original_max_position_embeddings={given} differs from the model's own {original}")
    if own.method != "default":
        notes.append(f"replaces the scaling of the checkpoint: {own.label}")
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    if window is not None and window < context:
        notes.append(f"sliding_window={window} is shorter than the context of {context} tokens")
    return tuple(notes)
