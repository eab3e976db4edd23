"""Check the arguments of `patch_model` against the model, and refuse those that do not fit. Nothing is changed here."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from scaled_rope.attention.backends import attention_for, check_attention, resolve_attention
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.patching.families import (
    Adapter,
    adapter_of,
    check_softmax_scale,
    layer_types_of,
    layers_without_rope,
    rope_layer_type,
)
from scaled_rope.patching.layer_tables import check_layers_can_differ
from scaled_rope.patching.region_attention import MASKS_OF, check_carrier, pairing
from scaled_rope.patching.rotary import Layout
from scaled_rope.patching.rotary_kernel import Rotation, fused_rotation, resolve_kernel
from scaled_rope.scaling.hf_config import PRIMARY_LAYER_TYPE
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings

RequestedScaling = RopeScaling | str | Mapping[str, RopeScaling | str | None]
"""A record, a spec, or one of these for each layer type."""


@dataclass(frozen=True)
class Unpatched:
    """A base model as it was before any patch."""

    rotary: nn.Module
    adapter: Adapter
    settings: RopeSettings

    @property
    def own(self) -> RopeScaling:
        """The model's own scaling; where layer types differ, that of the primary type."""
        return self.settings.scaling

    def own_of(self, layer_type: str) -> RopeScaling:
        """The model's own scaling of the layers of a type."""
        return self.settings.of(layer_type) if self.adapter.per_layer_type else self.own

    @classmethod
    def of(cls, base: PreTrainedModel, rotary: nn.Module, settings: RopeSettings | None = None) -> Unpatched:
        """Inspect a base model that is not patched.

        settings: the RoPE settings in its config, if they have been read already.

        Raises:
            ConfigError: an architecture that is not known, or one whose attention a patch could not change completely.
        """
        adapter = adapter_of(base.config, rotary)
        check_softmax_scale(base.config)
        if settings is None:
            settings = RopeSettings(base.config)
            settings.warn()
        found = cls(rotary, adapter, settings)
        for name in settings.layer_types if adapter.per_layer_type else ():
            found.own_of(name)  # a config that is wrong in one of them is refused now
        return found


@dataclass(frozen=True)
class PatchRequest:
    """The checked arguments of `patch_model`, resolved for a model."""

    scaling: RopeScaling
    """The scaling; where layer types differ, that of the primary type."""
    plan: LayerPlan
    head_dim: int
    regions_interleaved: bool | None = None
    """Under a method that changes attention, whether neighbouring dimensions are paired; None under others."""
    attention: str | None = None
    """The attention implementation to set; None leaves the model's own."""
    rotation: Rotation | None = None
    """The function for attention modules to call in place of their family's; None leaves the family's."""
    kernel: str | None = None
    """The backend of that rotation."""
    notes: tuple[str, ...] = ()
    """Why the kernel was wanted and cannot be used, if so."""

    @property
    def scalings(self) -> list[RopeScaling]:
        """The scalings of all layer types, or the single one of all layers."""
        return list(self.plan.layers.values()) or [self.scaling]

    @property
    def half(self) -> int:
        """R/2: half of the rotated dimensions."""
        return self.scaling.rotary_dim(self.head_dim) // 2


def read_request(
    base: PreTrainedModel,
    unpatched: Unpatched,
    scaling: RequestedScaling,
    drop_layers: Iterable[int],
    kernel: str,
    attn: str | None,
) -> PatchRequest:
    """Resolve the arguments of `patch_model` for a base model.

    Raises:
        ConfigError: a scaling, a kernel or an attention implementation that does not fit the model or the machine.
    """
    config: Any = base.config
    adapter = unpatched.adapter
    wanted, layers = _resolve(scaling, config, unpatched)
    plan = LayerPlan(layers, _check_layers(drop_layers, base, adapter))
    check_layers_can_differ(plan, base, adapter)
    for name, each in layers.items() or [("", wanted)]:
        _check_width(each, name, unpatched)
    request = PatchRequest(wanted, plan, unpatched.settings.head_dim)
    _check_steps(request.scalings)
    regions = _pairing_of_regions(base, request.scalings, plan, kernel, attn, adapter.layout, request.half)
    if regions is not None:
        return dataclasses.replace(request, regions_interleaved=regions, attention=MASKS_OF)
    attention = _attention(base, attn)
    rotation, backend, notes = _rotation(base, request.half, kernel, adapter.layout)
    return dataclasses.replace(request, attention=attention, rotation=rotation, kernel=backend, notes=notes)


def _resolve(
    scaling: RequestedScaling, config: Any, unpatched: Unpatched
) -> tuple[RopeScaling, dict[str, RopeScaling]]:
    """Return the primary scaling and, where layer types differ, the scaling of each type."""

    def read(one: RopeScaling | str | None, mine: RopeScaling) -> RopeScaling:
        if one is None:
            return mine
        if not isinstance(one, str | RopeScaling):
            raise ConfigError(f"scaling={one!r}: must be a RopeScaling, a text such as 'yarn:8', or a mapping of these")
        return RopeScaling.from_spec(one, mine) if isinstance(one, str) else one

    own, adapter, types = unpatched.own, unpatched.adapter, unpatched.settings.layer_types
    if adapter.per_layer_type and not isinstance(scaling, Mapping):
        scaling = {PRIMARY_LAYER_TYPE if PRIMARY_LAYER_TYPE in types else types[0]: scaling}
    if not isinstance(scaling, Mapping):
        return read(scaling, own), {}
    if not types:
        raise ConfigError(f"architecture {config.model_type!r} has no layer types; give one scaling for all layers")
    rotated = rope_layer_type(config, adapter)
    for name in scaling:
        if name not in types:
            raise unknown("layer type", name, types)
        if rotated not in ("", name) and scaling[name] is not None:
            raise ConfigError(f"layer type {name!r}: these layers of {config.model_type} have no rotary embedding")
    if rotated:
        return read(scaling.get(rotated), own), {}
    layers = {name: read(scaling.get(name), unpatched.own_of(name)) for name in types}
    primary = layers.get(PRIMARY_LAYER_TYPE, layers[types[0]])
    if not adapter.per_layer_type and len(set(map(repr, layers.values()))) == 1:
        layers = {}
    return primary, layers


def _check_layers(layers: Iterable[int], base: nn.Module, adapter: Adapter) -> tuple[int, ...]:
    indices = tuple(sorted(set(layers)))
    if indices:
        count = len(getattr(base, adapter.layers, ()))
        for index in indices:
            if not 0 <= index < count:
                raise ConfigError(f"drop_layers={index}: must be a layer's index, 0 to {count - 1}")
    return indices


def _check_width(scaling: RopeScaling, layer_type: str, unpatched: Unpatched) -> None:
    """Raise a ConfigError unless a scaling rotates as many dimensions as the model's attention does."""
    settings, adapter = unpatched.settings, unpatched.adapter
    head_dim, family = settings.head_dim, settings.model_type
    width = scaling.rotary_dim(head_dim)
    if width != head_dim and not adapter.partial_rotary:
        share = f"{scaling.partial_rotary_factor:g}"
        raise ConfigError(f"partial_rotary_factor={share}: must be 1, {family} models rotate whole heads")
    name = f"{layer_type}_inv_freq" if adapter.per_layer_type else "inv_freq"
    inv_freq = getattr(unpatched.rotary, name, None)
    if isinstance(inv_freq, Tensor) and 2 * inv_freq.shape[-1] != width:
        raise ConfigError(
            f"partial_rotary_factor={scaling.partial_rotary_factor:g}: gives {width} rotated dimensions of {head_dim}, "
            f"this {family} model rotates {2 * inv_freq.shape[-1]}"
        )


def _check_steps(scalings: Sequence[RopeScaling]) -> None:
    """Raise a ConfigError if layers scale in different steps: a cache can only be computed anew as a whole."""
    ways = {
        (one.dynamic_step, one.factor, one.original_max_position_embeddings)
        for one in scalings
        if one.is_length_dependent
    }
    if len(ways) > 1 and any(step is not None for step, _, _ in ways):
        labels = "; ".join(one.label for one in scalings)
        raise ConfigError(f"dynamic_step: all layers that scale dynamically must share their steps, got {labels}")


def _pairing_of_regions(
    base: PreTrainedModel,
    scalings: Sequence[RopeScaling],
    plan: LayerPlan,
    kernel: str,
    attn: str | None,
    layout: Layout,
    half: int,
) -> bool | None:
    """Whether a method that changes attention must pair neighbouring dimensions; None for other methods."""
    method = next((each.method for each in scalings if each.changes_attention), None)
    if method is None:
        return None
    model_type = base.config.model_type
    if plan.layers or plan.drop_layers or layers_without_rope(base.config):
        raise ConfigError(f"method {method!r}: is for all layers alike, those of this {model_type} model differ")
    if kernel not in ("auto", "none"):
        raise ConfigError(f"kernel={kernel!r}: method {method!r} rotates inside attention; must be auto or none")
    if attn is not None:
        check_carrier(method, attn)
    return pairing(base, method, layout, half)


def _attention(base: PreTrainedModel, attn: str | None) -> str | None:
    """The attention implementation to set, once it is clear that it can run; None to leave the model's own."""
    if attn is None:
        return None
    config: Any = base.config
    weight = next(base.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    if attn == "auto":
        return attention_for(config, resolve_attention(attn, weight.device, dtype), weight.device)
    check_attention(config, attn, weight.device, dtype)
    return attn


def _rotation(
    base: PreTrainedModel, half: int, kernel: str, layout: Layout
) -> tuple[Rotation | None, str | None, tuple[str, ...]]:
    """The rotation to install, its backend, and a note if the kernel was wanted and cannot be used."""
    backend = resolve_kernel(kernel)
    if backend is None:
        return None, None, ()
    rotation, reason = fused_rotation(base, layout, half, backend)
    if rotation is None:
        said = f"kernel={kernel!r}: not for this {base.config.model_type} model, {reason}"
        if kernel != "auto":
            raise ConfigError(said)
        return None, None, (said,)
    return rotation, backend, ()


def remarks(own: RopeScaling, scaling: RopeScaling, config: Any, adapter: Adapter) -> tuple[str, ...]:
    """Remarks on a scaling that fits the model but may not be what the caller meant."""
    notes = []
    if scaling.rope_theta != own.rope_theta:
        notes.append(f"rope_theta={scaling.rope_theta:g} differs from the model's own {own.rope_theta:g}")
        warnings.warn(notes[-1], stacklevel=4)  # names the caller of `patch_model`
    original = own.original_max_position_embeddings
    if scaling.original_max_position_embeddings not in (None, original):
        given = scaling.original_max_position_embeddings
        notes.append(f"original_max_position_embeddings={given} differs from the model's own {original}")
    if own.method != "default":
        notes.append(f"replaces the scaling of the checkpoint: {own.label}")
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    types = layer_types_of(config)
    all_slide = not types or types == ["sliding_attention"]
    if window is not None and window < context and getattr(config, "use_sliding_window", True) and all_slide:
        notes.append(f"sliding_window={window} is shorter than the context of {context} tokens")
    if without := layers_without_rope(config):
        shown = ", ".join(map(str, without[:4])) + (", …" if len(without) > 4 else "")
        notes.append(f"{len(without)} of {config.num_hidden_layers} layers have no rotary embedding ({shown})")
    return tuple(notes)
