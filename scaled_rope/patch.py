"""Put a scaling into a model of transformers, and take it out again.

A patched model differs in its rotary module, in what its config says about RoPE and, where layers are to differ though
they share one pair of tables, in a hook in front of each layer. What was there before is kept on the base model (the
part that makes hidden states), so it travels with copies of the model. With the rotary kernel, its attention modules
call that instead of their family's function.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from scaled_rope import late
from scaled_rope.backends import attention_for, check_attention, resolve_attention
from scaled_rope.caches import Patch
from scaled_rope.config import LayerPlan, RopeScaling, config_head_dim
from scaled_rope.dialects import (
    CUSTOM_ROPE_TYPE,
    NATIVE,
    PRIMARY_LAYER_TYPE,
    RECORD_KEY,
    SOFTMAX_MSCALE_FAMILIES,
    read_by_attention,
)
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.fused import Rotation, fused_rotation, install, resolve_kernel, uninstall
from scaled_rope.methods import attention_regions, compute_rope
from scaled_rope.passes import Passes
from scaled_rope.relocated import MASKS_OF, check_carrier, pairing
from scaled_rope.relocated import install as install_regions
from scaled_rope.relocated import uninstall as uninstall_regions
from scaled_rope.rotary import LayeredRotaryEmbedding, Layout, ScaledRotaryEmbedding

_STATE = "_scaled_rope_state"
_ROTARY = "rotary_emb"
_CONFIG_FIELDS = ("rope_parameters", "max_position_embeddings", RECORD_KEY)
_ABSENT = object()


@dataclass(frozen=True)
class Adapter:
    """What differs between model families. The defaults are the common layout: one rotary module `rotary_emb` on the
    base model that is called as rotary_emb(x, position_ids) and returns (cos, sin) over the rotated dimensions."""

    layout: Layout = "halves"
    float32_tables: bool = False
    """Whether attention wants float32 tables whatever the model's dtype."""
    per_layer_type: bool = False
    """Whether the module is called with a layer type, and `rope_parameters` is nested by it."""
    partial_rotary: bool = False
    """Whether attention can rotate a part of each head only."""
    layers: str = "layers"
    """Name of the list of decoder layers on the base model."""
    alibi: str = ""
    """The config field that is true when the model uses ALiBi and its rotary module is idle."""
    rope_flags: str = ""
    """The config field that holds, layer by layer, whether the layer uses RoPE."""
    rope_layer_type: str = ""
    """The only layer type that uses RoPE."""
    rope_window: str = ""
    """The config field that, when null, makes all layers use RoPE in spite of `rope_layer_type`."""


_PARTIAL = Adapter(partial_rotary=True)
_EXAONE = Adapter(rope_layer_type="sliding_attention", rope_window="sliding_window")
ADAPTERS: dict[str, Adapter] = {
    "afmoe": Adapter(rope_layer_type="sliding_attention"),
    "cohere": Adapter(layout="interleaved"),
    "cohere2": Adapter(layout="interleaved", rope_layer_type="sliding_attention"),
    "exaone4": _EXAONE,
    "exaone_moe": _EXAONE,
    "falcon": Adapter(layers="h", alibi="alibi"),
    "gemma": Adapter(),
    "gemma2": Adapter(),
    "gemma3_text": Adapter(per_layer_type=True),
    "gpt_neox": _PARTIAL,
    "gpt_oss": Adapter(layout="half"),
    "llama": Adapter(),
    "mistral": Adapter(),
    "mixtral": Adapter(),
    "olmo": Adapter(float32_tables=True),
    "olmo2": Adapter(float32_tables=True),
    "olmo3": Adapter(float32_tables=True, per_layer_type=True),
    "phi": _PARTIAL,
    "phi3": _PARTIAL,
    "qwen2": Adapter(),
    "qwen2_moe": Adapter(),
    "qwen3": Adapter(),
    "qwen3_moe": Adapter(),
    "smollm3": Adapter(rope_flags="no_rope_layers"),
    "stablelm": _PARTIAL,
}
"""Supported families by `config.model_type`. Others are recognised by what their rotary module returns."""


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` changed."""

    model_type: str
    modules: tuple[str, ...]
    """Names, inside the model that was given, of the modules that were replaced."""
    scaling: RopeScaling
    """The scaling; where layer types differ, that of the full-attention layers (or else of the first type)."""
    head_dim: int
    attention_factor: float
    """The multiplier of cos and sin at s = factor."""
    before: RopeScaling
    """The scaling in effect before."""
    notes: tuple[str, ...]
    """What the caller may not have meant; empty when all is plain."""
    plan: LayerPlan = LayerPlan()
    """The scaling of each layer type, where they differ, and the layers that were left without RoPE."""
    native: bool = True
    """Whether transformers alone reads the scaling from the saved config; otherwise use `scaled_rope.load_model`."""
    kernel: str | None = None
    """The backend of the rotary kernel that was installed ("auto": decided call by call); None: the model's own."""
    attention: str | None = None
    """The attention implementation that was set; None: the model's own was left."""


@dataclass
class _State:
    """What a patched base model was before its first patch, and what it is now."""

    rotary: nn.Module
    config: dict[str, Any]
    """The fields that are changed, as they were."""
    config_class: type[Any]
    adapter: Adapter
    own: RopeScaling
    own_layers: dict[str, RopeScaling]
    scaling: RopeScaling
    plan: LayerPlan
    kernel: str | None
    attention: str | None = None
    """The implementation before, where another one was set."""
    hooks: list[RemovableHandle] = field(default_factory=list)
    fused: list[nn.Module] = field(default_factory=list)
    """Attention modules that call the rotary kernel."""
    late: list[nn.Module] = field(default_factory=list)
    """Attention modules that can rotate after the cache."""
    obstacle: str = ""
    """Why none can, where they must."""


def patch_model(
    model: nn.Module,
    scaling: RopeScaling | str | Mapping[str, RopeScaling | str | None],
    *,
    drop_layers: Iterable[int] = (),
    kernel: str = "auto",
    attn: str | None = None,
) -> PatchReport:
    """Give `model` another RoPE scaling, in place.

    Args:
        model: a causal language model, a bare base model, or a wrapper around one (PEFT).
        scaling: a record, or a spec such as "yarn:8" (see `RopeScaling.from_spec`) relative to the model as
            it was before any patch. Patching a patched model replaces the scaling. It is for all layers, in families
            with RoPE parameters per layer type for the full-attention layers. A mapping from layer types
            ("full_attention", "sliding_attention") says it for each; None and what is missing stay as they are.
        drop_layers: indices of layers, from 0, that are to work without rotary embedding.
        kernel: what rotates queries and keys. "auto": the fused Triton kernel on a machine with a GPU, where the family
            allows it; without one the model's own function, untouched. "triton" and "torch" (its twin) insist, "none"
            is the model's own; see `scaled_rope.fused.resolve_kernel`. Each model, and each copy, has its own.
        attn: attention implementation to set, a name of `scaled_rope.backends` or "auto"; None leaves the model's own.

    `config.rope_parameters` and, when it is too small, `config.max_position_embeddings` follow, so that the
    saved model carries its scaling. Models may share a config object, so the change is made on the model's
    own copy; only the config of a bare base model, which may belong to an enclosing model, changes in place.

    Under dynamic scaling caches hold keys before rotation (`scaled_rope.late`), or, with `dynamic_step`, are made anew
    when the scale changes; see `scaled_rope.passes`.

    Raises:
        ConfigError: an unknown architecture; a scaling, a kernel or an attention implementation that does not fit the
            model or the machine. Nothing changes then.
    """
    base = _base_model(model)
    config: Any = base.config
    state: _State | None = getattr(base, _STATE, None)
    replaced = getattr(base, _ROTARY)
    original = state.rotary if state else replaced
    # A module may read its config when called, and that has changed when the model is patched.
    adapter = state.adapter if state else adapter_of(config, original)
    _check_softmax_scale(config)
    own = state.own if state else RopeScaling.from_config(config)
    own_layers = state.own_layers if state else _own_layers(config, adapter)
    before = state.scaling if state else own

    wanted, layers = _resolve(scaling, own, own_layers, config, adapter)
    plan = LayerPlan(layers, _check_layers(drop_layers, base, adapter))
    _check_hooks(plan, base, adapter)
    head_dim = head_dim_of(config)
    every = list(layers.values()) or [wanted]
    for name, each in layers.items() or [("", wanted)]:
        _check_width(each, original, head_dim, adapter, config, name)
    _check_steps(every)
    half = wanted.rotary_dim(head_dim) // 2
    regions = _regions(every, plan, base, half, kernel, attn, adapter)
    if regions is None:
        attention = _attention(base, attn)
        rotation, backend, note = _fused(base, half, kernel, adapter)
    else:
        attention, (rotation, backend, note) = MASKS_OF, (None, None, ())
    lay_out = adapter if rotation is None else replace(adapter, layout="half", float32_tables=True)
    rotary = _build(wanted, layers, head_dim, _device_of(replaced), lay_out)
    said = state.config if state else {name: getattr(config, name, _ABSENT) for name in _CONFIG_FIELDS}
    fields = _config_fields(wanted, plan, head_dim, adapter, config, said, original)

    names = tuple(name for name, module in model.named_modules() if module is replaced)
    if state:
        _restore(base, state)
    elif base is not model:
        config = _detach_config(model, base)
    state = _State(
        rotary=getattr(base, _ROTARY),
        config={name: getattr(config, name, _ABSENT) for name in _CONFIG_FIELDS},
        config_class=type(config),
        adapter=adapter,
        own=own,
        own_layers=own_layers,
        scaling=wanted,
        plan=plan,
        kernel=backend,
    )
    if rotation is not None:
        state.fused = install(base, rotation)
    if attention is not None:
        state.attention = config._attn_implementation
        base.set_attn_implementation(attention)
    if regions is not None:
        inv_freq = compute_rope(wanted.of_frequencies, head_dim)[0]
        install_regions(base, attention_regions(wanted), inv_freq, regions)
    state.hooks += _watch_passes(base, state, every, half)
    state.hooks += _hook_layers(base, rotary, plan, config, adapter)
    setattr(base, _STATE, state)
    setattr(base, _ROTARY, rotary)
    _write_config(config, fields)
    _let_save(config)

    notes = _notes(own, wanted, config, adapter) + note
    factor = compute_rope(wanted.of_frequencies, head_dim)[1]
    native = CUSTOM_ROPE_TYPE not in str(fields["rope_parameters"])
    return PatchReport(
        config.model_type, names, wanted, head_dim, factor, before, notes, plan, native, backend, attention
    )


def unpatch_model(model: nn.Module) -> None:
    """Undo every `patch_model` on `model`: the rotary module and the config's fields are what they were.

    Raises ConfigError when the model is not patched.
    """
    base = _base_model(model)
    state: _State | None = getattr(base, _STATE, None)
    if state is None:
        raise ConfigError(f"unpatch_model: this {type(model).__name__} is not patched")
    device = _device_of(getattr(base, _ROTARY))
    _restore(base, state)
    if any(buffer.is_meta for buffer in state.rotary.buffers()) and device.type != "meta":
        # It was taken out before the model got its weights, so nothing has filled its buffers.
        setattr(base, _ROTARY, type(state.rotary)(config=base.config).to(device))


def patched_scaling(model: nn.Module) -> RopeScaling | None:
    """The scaling that `patch_model` gave to `model`, or None when it is not patched."""
    state = _state_of(model)
    return state.scaling if state else None


def patched_plan(model: nn.Module) -> LayerPlan:
    """What `patch_model` made differ between layers; empty when the model is not patched."""
    state = _state_of(model)
    return state.plan if state else LayerPlan()


def patched_kernel(model: nn.Module) -> str | None:
    """The backend of the rotary kernel that `patch_model` put into `model`, or None."""
    state = _state_of(model)
    return state.kernel if state else None


def cache_obstacle(model: nn.Module) -> str:
    """Why `model`, under the scaling that `patch_model` gave it, can use no key/value cache, in a few words; "" when it
    can."""
    state = _state_of(model)
    return state.obstacle if state else ""


def _state_of(model: nn.Module) -> _State | None:
    return next((vars(module)[_STATE] for module in model.modules() if _STATE in vars(module)), None)


def computes(model: nn.Module, scaling: RopeScaling) -> bool:
    """Whether an unpatched model computes with a static scaling already, by the numbers in its rotary module.

    Its config is not asked: families drop, rewrite or ignore parts of it. Models whose rotary module is not understood
    count by their config.
    """
    try:
        base = _base_model(model)
        rotary = getattr(base, _ROTARY)
        adapter = adapter_of(base.config, rotary)
    except ConfigError:
        return RopeScaling.from_config(getattr(model, "config", {})) == scaling
    if (
        scaling.changes_attention
        or scaling.is_length_dependent
        or "dynamic" in (own := str(getattr(rotary, "rope_type", "")))
        or "longrope" in own
    ):
        return False
    prefix = f"{PRIMARY_LAYER_TYPE}_" if adapter.per_layer_type else ""
    inv_freq, factor = getattr(rotary, f"{prefix}inv_freq", None), getattr(rotary, f"{prefix}attention_scaling", None)
    if inv_freq is None or factor is None or inv_freq.is_meta:
        return RopeScaling.from_config(base.config) == scaling
    wanted, wanted_factor = compute_rope(scaling, head_dim_of(base.config))
    if inv_freq.shape != wanted.shape:
        return False
    # transformers computes in float32 throughout: its frequencies are off by up to some ln(b) units of 6e-8.
    close = torch.allclose(inv_freq.float().cpu(), wanted, rtol=5e-6, atol=0)
    return close and abs(float(factor) - wanted_factor) < 1e-6


def head_dim_of(config: Any) -> int:
    """Dimensions per attention head, from a transformers config."""
    head_dim = config_head_dim(config)
    if head_dim is None:
        raise ConfigError(f"model_type {config.model_type!r}: its config says neither head_dim nor hidden_size")
    return head_dim


def adapter_of(config: Any, rotary: nn.Module | None = None) -> Adapter:
    """The adapter of a family, by name or, given its rotary module, by what that returns.

    Raises:
        ConfigError: not recognised, or a model that does not use its rotary module.
    """
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None and rotary is not None:
        adapter = detect_adapter(config, rotary)
    if adapter is None:
        raise unknown("architecture", config.model_type, ADAPTERS)
    if adapter.alibi and getattr(config, adapter.alibi, False):
        raise ConfigError(f"architecture {config.model_type!r} with {adapter.alibi}=true uses no rotary embedding")
    return adapter


def detect_adapter(config: Any, rotary: nn.Module) -> Adapter | None:
    """The adapter of a standard rotary module of transformers by what it returns for a few positions, or None."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "RotaryEmbedding" not in type(rotary).__name__:
        return None
    if getattr(config, "is_heterogeneous", False):
        return None  # its layers differ in more than their type, for example in the size of heads
    parameters = list(inspect.signature(rotary.forward).parameters)
    if parameters == ["x", "position_ids"]:
        return _probe(rotary, None)
    types = layer_types_of(config)
    nested = all(isinstance(rope.get(name), dict) for name in types)
    if parameters != ["x", "position_ids", "layer_type"] or PRIMARY_LAYER_TYPE not in types or not nested:
        return None
    found = {_probe(rotary, name) for name in types}
    return found.pop() if len(found) == 1 else None


def _probe(rotary: nn.Module, layer_type: str | None) -> Adapter | None:
    """The adapter that a rotary module's tables for positions 0, 1 and 3 speak for."""
    # A copy: the module's own memory of lengths, if it has one, must not learn of the probe.
    probe: Any = copy.deepcopy(rotary)
    more = () if layer_type is None else (layer_type,)
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(probe, f"{prefix}inv_freq", None)
    if not isinstance(inv_freq, Tensor) or inv_freq.dim() != 1 or inv_freq.is_meta:
        return None
    x = torch.zeros(2, 1, 1, dtype=torch.bfloat16, device=inv_freq.device)
    positions = torch.tensor([[0, 1, 3]], device=inv_freq.device)
    try:
        cos, sin = probe(x, positions, *more)
    except Exception:
        return None  # whatever it wants, it is not the common layout
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or _takes_axes(probe, x, positions, more):
        return None
    # What it computes with for so short a text, which need not be what a longer one left behind.
    inv_freq = getattr(probe, f"{prefix}inv_freq")
    angles = positions[..., None].float() * inv_freq.float()
    scale = float(getattr(probe, f"{prefix}attention_scaling", 1.0))
    layouts: dict[Layout, Callable[[Tensor], Tensor]] = {
        "halves": lambda table: torch.cat((table, table), dim=-1),
        "interleaved": lambda table: table.repeat_interleave(2, dim=-1),
        "half": lambda table: table,
    }
    for layout, lay_out in layouts.items():
        wanted = lay_out(angles.cos() * scale), lay_out(angles.sin() * scale)
        if all(
            table.shape == right.shape and torch.allclose(table.float(), right, rtol=0, atol=0.02 * scale)
            for table, right in zip((cos, sin), wanted, strict=True)
        ):
            return Adapter(
                layout=layout,
                float32_tables=cos.dtype == torch.float32,
                per_layer_type=layer_type is not None,
                # Whether a part of each head is rotated shows in the table's width, see `_check_width`.
                partial_rotary=True,
            )
    return None


def _takes_axes(rotary: Any, x: Tensor, positions: Tensor, more: tuple[str, ...]) -> bool:
    """Whether a rotary module takes positions along several axes (multimodal RoPE): [axes, B, T] instead of [B, T]."""
    try:
        cos, _ = rotary(x, positions.expand(3, 2, -1), *more)
    except Exception:
        return False
    return bool(cos.dim() == 3)  # the axes have gone into one table


def layers_without_rope(config: Any) -> list[int]:
    """Indices of the layers of a family that use no rotary embedding by design."""
    adapter = ADAPTERS.get(config.model_type, Adapter())
    if adapter.rope_flags:
        return [index for index, used in enumerate(getattr(config, adapter.rope_flags) or ()) if not used]
    if rotated := _rope_layer_type(config, adapter):
        return [index for index, kind in enumerate(config.layer_types or ()) if kind != rotated]
    return []


def _rope_layer_type(config: Any, adapter: Adapter) -> str:
    """The only layer type that uses RoPE in this model; empty when none is alone in that."""
    everywhere = adapter.rope_window and getattr(config, adapter.rope_window, None) is None
    return "" if everywhere else adapter.rope_layer_type


def _resolve(
    scaling: RopeScaling | str | Mapping[str, RopeScaling | str | None],
    own: RopeScaling,
    own_layers: dict[str, RopeScaling],
    config: Any,
    adapter: Adapter,
) -> tuple[RopeScaling, dict[str, RopeScaling]]:
    """The primary scaling and, where layer types are told apart, that of each type."""

    def read(one: RopeScaling | str | None, mine: RopeScaling) -> RopeScaling:
        if one is None:
            return mine
        return RopeScaling.from_spec(one, mine) if isinstance(one, str) else one

    types = layer_types_of(config)
    if adapter.per_layer_type and not isinstance(scaling, Mapping):
        scaling = {PRIMARY_LAYER_TYPE if PRIMARY_LAYER_TYPE in types else types[0]: scaling}
    if not isinstance(scaling, Mapping):
        return read(scaling, own), {}
    if not types:
        raise ConfigError(f"architecture {config.model_type!r} has no layer types; give one scaling for all layers")
    rotated = _rope_layer_type(config, adapter)
    for name in scaling:
        if name not in types:
            raise unknown("layer type", name, types)
        if rotated not in ("", name) and scaling[name] is not None:
            raise ConfigError(f"layer type {name!r}: these layers of {config.model_type} have no rotary embedding")
    if rotated:
        return read(scaling.get(rotated), own), {}
    layers = {name: read(scaling.get(name), own_layers.get(name, own)) for name in types}
    primary = layers.get(PRIMARY_LAYER_TYPE, layers[types[0]])
    if not adapter.per_layer_type and len(set(map(repr, layers.values()))) == 1:
        layers = {}
    return primary, layers


def layer_types_of(config: Any) -> list[str]:
    """The distinct layer types of a model, in the order of their first layers; empty when it has no such thing."""
    return list(dict.fromkeys(getattr(config, "layer_types", None) or ()))


def _own_layers(config: Any, adapter: Adapter) -> dict[str, RopeScaling]:
    if not adapter.per_layer_type:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the primary one was read
        return {name: RopeScaling.from_config(config, name) for name in layer_types_of(config)}


def _check_softmax_scale(config: Any) -> None:
    """A softmax scale that attention took from the RoPE parameters when it was built would stay when they change."""
    rope = getattr(config, "rope_parameters", None) or {}
    given = rope.get("mscale_all_dim") if rope.get("rope_type") != "default" else None
    if given and config.model_type in SOFTMAX_MSCALE_FAMILIES:
        raise ConfigError(
            f"architecture {config.model_type!r} with mscale_all_dim={given!r}: its attention took a softmax scale "
            "from that and the factor when it was built, which a patch cannot follow; edit config.json and load again"
        )


def _check_layers(layers: Iterable[int], base: nn.Module, adapter: Adapter) -> tuple[int, ...]:
    indices = tuple(sorted(set(layers)))
    if indices:
        count = len(getattr(base, adapter.layers, ()))
        for index in indices:
            if not 0 <= index < count:
                raise ConfigError(f"drop_layers={index}: must be a layer's index, 0 to {count - 1}")
    return indices


def _check_hooks(plan: LayerPlan, base: PreTrainedModel, adapter: Adapter) -> None:
    """What `_hook_layers` needs of a model."""
    if not plan.drop_layers and (adapter.per_layer_type or not plan.layers):
        return
    layers = getattr(base, adapter.layers, None)
    if not isinstance(layers, nn.ModuleList) or "position_embeddings" not in str(inspect.signature(layers[0].forward)):
        raise ConfigError(f"architecture {base.config.model_type!r}: its layers cannot be told apart")


def _check_width(
    scaling: RopeScaling, original: nn.Module, head_dim: int, adapter: Adapter, config: Any, layer_type: str
) -> None:
    """A table must be as wide as the one that attention is built for."""
    width = scaling.rotary_dim(head_dim)
    if width != head_dim and not adapter.partial_rotary:
        share = f"{scaling.partial_rotary_factor:g}"
        raise ConfigError(f"partial_rotary_factor={share}: must be 1, {config.model_type} models rotate whole heads")
    name = f"{layer_type}_inv_freq" if adapter.per_layer_type else "inv_freq"
    inv_freq = getattr(original, name, None)
    if isinstance(inv_freq, Tensor) and 2 * inv_freq.shape[-1] != width:
        raise ConfigError(
            f"partial_rotary_factor={scaling.partial_rotary_factor:g}: gives {width} rotated dimensions of {head_dim}, "
            f"this {config.model_type} model rotates {2 * inv_freq.shape[-1]}"
        )


def _check_steps(every: list[RopeScaling]) -> None:
    """A cache is made anew as a whole."""
    ways = {
        (one.dynamic_step, one.factor, one.original_max_position_embeddings) for one in every if one.is_length_dependent
    }
    if len(ways) > 1 and any(step is not None for step, _, _ in ways):
        labels = "; ".join(one.label for one in every)
        raise ConfigError(f"dynamic_step: all layers that scale dynamically must share their steps, got {labels}")


def _build(
    scaling: RopeScaling, layers: dict[str, RopeScaling], head_dim: int, device: torch.device, adapter: Adapter
) -> ScaledRotaryEmbedding | LayeredRotaryEmbedding:
    def one(scaling: RopeScaling) -> ScaledRotaryEmbedding:
        return ScaledRotaryEmbedding(scaling.of_frequencies, head_dim, device, adapter.layout, adapter.float32_tables)

    if not layers:
        return one(scaling)
    return LayeredRotaryEmbedding({name: one(each) for name, each in layers.items()})


def _regions(
    every: list[RopeScaling],
    plan: LayerPlan,
    base: PreTrainedModel,
    half: int,
    kernel: str,
    attn: str | None,
    adapter: Adapter,
) -> bool | None:
    """For a method that changes attention, whether it is to pair neighbouring dimensions; None for others."""
    method = next((each.method for each in every if each.changes_attention), None)
    if method is None:
        return None
    model_type = base.config.model_type
    if plan.layers or plan.drop_layers or layers_without_rope(base.config):
        raise ConfigError(f"method {method!r}: is for all layers alike, those of this {model_type} model differ")
    if kernel not in ("auto", "none"):
        raise ConfigError(f"kernel={kernel!r}: method {method!r} rotates inside attention; must be auto or none")
    if attn is not None:
        check_carrier(method, attn)
    return pairing(base, method, adapter.layout, half)


def _attention(base: PreTrainedModel, attn: str | None) -> str | None:
    """The attention implementation to set, one that works."""
    if attn is None:
        return None
    config: Any = base.config
    weight = next(base.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    if attn == "auto":
        return attention_for(config, resolve_attention(attn, weight.device, dtype), weight.device)
    check_attention(config, attn, weight.device, dtype)
    return attn


def _fused(
    base: PreTrainedModel, half: int, kernel: str, adapter: Adapter
) -> tuple[Rotation | None, str | None, tuple[str, ...]]:
    """The rotation to install, its backend, and a note where the kernel was wanted and cannot be had."""
    backend = resolve_kernel(kernel)
    if backend is None:
        return None, None, ()
    rotation, reason = fused_rotation(base, adapter.layout, half, backend)
    if rotation is None:
        said = f"kernel={kernel!r}: not for this {base.config.model_type} model, {reason}"
        if kernel != "auto":
            raise ConfigError(said)
        return None, None, (said,)
    return rotation, backend, ()


def _watch_passes(base: PreTrainedModel, state: _State, every: list[RopeScaling], half: int) -> list[RemovableHandle]:
    """Hooks that know of positions and caches; where frequencies change with every token, keys can be cached before
    rotation from then on."""
    dependent = any(each.is_length_dependent for each in every)
    label = state.scaling.label
    if len(set(map(repr, every))) > 1:
        label = ", ".join(f"{name}: {each.label}" for name, each in state.plan.layers.items())
    unrotated = state.scaling.changes_attention
    passes = Passes(Patch(label), state.scaling, dependent, dropped=state.plan.drop_layers, unrotated=unrotated)
    if dependent and not passes.stepped:
        # What a family's own function rotates is asked in the layout that this function wants.
        state.late, passes.obstacle = late.install(base, state.adapter.layout, half)
        passes.late, state.obstacle = bool(state.late), passes.obstacle
    return passes.install(base)


def _hook_layers(
    base: nn.Module, rotary: nn.Module, plan: LayerPlan, config: Any, adapter: Adapter
) -> list[RemovableHandle]:
    """Hooks that give each layer its tables, where the model passes the same to all."""
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
    """Forward pre-hook of a decoder layer: its entry of stacked tables, or tables that rotate nothing."""

    place: int | None
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


def _config_fields(
    scaling: RopeScaling,
    plan: LayerPlan,
    head_dim: int,
    adapter: Adapter,
    config: Any,
    before: dict[str, Any],
    original: nn.Module,
) -> dict[str, Any]:
    """What the config is to say, by field; `_ABSENT` for a field that is to go. before: what it said unpatched."""
    context = 0 if before["max_position_embeddings"] is _ABSENT else before["max_position_embeddings"]
    # Where a family has a share of its own, leaving out a share of 1 would mean that.
    says_share = "partial_rotary_factor" in str(before["rope_parameters"])
    kept = read_by_attention(before["rope_parameters"])

    def words(one: RopeScaling, rope_types: Iterable[str]) -> dict[str, Any]:
        # Inside a layer type transformers does not see `truncate`.
        unseen = {"yarn"} if adapter.per_layer_type and one.truncate is False else set()
        values = one.to_config(head_dim=head_dim, rope_types=frozenset(rope_types) - unseen)
        if says_share:
            values.setdefault("partial_rotary_factor", one.partial_rotary_factor)
        return kept | values

    def said(rope_types: Iterable[str]) -> dict[str, Any]:
        by_type = {name: words(one, rope_types) for name, one in plan.layers.items()}
        return {
            "rope_parameters": by_type if adapter.per_layer_type else words(scaling, rope_types),
            "max_position_embeddings": max(context, scaling.max_position_embeddings or 0),
        }

    # A plan that transformers has no words for must not be built by it.
    beyond_words = bool(plan.drop_layers) or (bool(plan.layers) and not adapter.per_layer_type)
    fields = said(() if beyond_words else NATIVE)
    scalings = plan.layers if adapter.per_layer_type else {"": scaling}
    if not beyond_words and not _is_understood(fields, scalings, head_dim, config, original):
        fields = said(())
    layers = {name: one.to_dict() for name, one in plan.layers.items()}
    if beyond_words:
        fields[RECORD_KEY] = {"layers": layers, "drop_layers": list(plan.drop_layers)}
    else:
        fields[RECORD_KEY] = _record(scaling, plan, fields, config, layers)
    return fields


def _is_understood(
    fields: dict[str, Any], scalings: Mapping[str, RopeScaling], head_dim: int, config: Any, original: nn.Module
) -> bool:
    """Whether transformers, reading a config with these fields, computes the scalings (by layer type, "" for all).

    It need not: config classes reject or rewrite rope types and take lengths from elsewhere, and some formulas fail on
    some families. So its own rotary module is built and asked.
    """
    if CUSTOM_ROPE_TYPE in str(fields["rope_parameters"]):
        return False
    if not type(original).__module__.startswith("transformers."):
        return True  # somebody's own module: there is nothing to ask
    said = {**copy.deepcopy(config.to_dict()), **copy.deepcopy(fields)}
    try:
        with _silent_transformers(), torch.device("cpu"):
            rotary = type(original)(config=type(config).from_dict(said))
            return all(_agrees(rotary, name, scaling, head_dim) for name, scaling in scalings.items())
    except Exception:  # each family has its own ways to refuse
        return False


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """transformers logs every key that a rope_type has no use for, and ours."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _agrees(rotary: Any, layer_type: str, scaling: RopeScaling, head_dim: int) -> bool:
    """Whether a rotary module of transformers has the frequencies of a scaling, for short texts and beyond L."""
    prefix, more = (f"{layer_type}_", (layer_type,)) if layer_type else ("", ())
    original = scaling.original_max_position_embeddings or 1
    for length in (1, original, 3 * original + 1) if scaling.is_length_dependent else (1,):
        rotary(torch.zeros(1), torch.tensor([[length - 1]]), *more)
        wanted, factor = compute_rope(scaling, head_dim, length)
        inv_freq = getattr(rotary, f"{prefix}inv_freq")
        # Computed in float32, off by some ln(b) + 3·s units of 6e-8.
        if inv_freq.shape != wanted.shape or not torch.allclose(inv_freq, wanted, rtol=1e-3, atol=0):
            return False
        if abs(float(getattr(rotary, f"{prefix}attention_scaling")) - factor) > 1e-6 * factor:
            return False
    return True


def _record(scaling: RopeScaling, plan: LayerPlan, fields: dict[str, Any], config: Any, layers: dict[str, Any]) -> Any:
    """The record itself, when the words of transformers would be read back as another one."""
    said = {"model_type": config.model_type, **{name: fields[name] for name in _CONFIG_FIELDS[:2]}}
    if hasattr(config, "original_max_position_embeddings"):
        said["original_max_position_embeddings"] = config.original_max_position_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.layers:
            same = all(RopeScaling.from_config(said, name) == one for name, one in plan.layers.items())
            return _ABSENT if same else {"layers": layers}
        return _ABSENT if RopeScaling.from_config(said) == scaling else scaling.to_dict()


def _write_config(config: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value is not _ABSENT:
            setattr(config, name, value)
        elif hasattr(config, name):
            delattr(config, name)


def _let_save(config: Any) -> None:
    """Make a config that its class rejects savable. transformers checks configs before it writes them as well."""
    if CUSTOM_ROPE_TYPE not in str(config.rope_parameters):
        return
    try:
        with _silent_transformers():
            copy.deepcopy(config).validate()  # some change what they check
    except Exception:  # each family has its own ways to refuse
        family: Any = type(config)
        config.__class__ = _lenient(family)


@functools.cache
def _lenient(family: Any) -> type[Any]:
    """A config class that saves our rope type where `family` rejects it. Reading a saved one still is up to `family`,
    so that transformers refuses it."""

    def validate(self: Any) -> None:
        pass  # the config was valid before ours were written into it

    def reduce(self: Any, protocol: Any) -> Any:
        return _revive, (family, vars(self).copy())

    return type(family.__name__, (family,), {"validate": validate, "__reduce_ex__": reduce})


def _revive(family: Any, state: dict[str, Any]) -> Any:
    """A copied or unpickled `_lenient` config."""
    config = object.__new__(_lenient(family))
    vars(config).update(state)
    return config


def _base_model(model: nn.Module) -> PreTrainedModel:
    """The part of `model` that makes hidden states, whatever wraps it; of a multimodal model, that for text."""
    bases = [
        module for module in model.modules() if isinstance(module, PreTrainedModel) and module.base_model is module
    ]
    if not bases:
        raise ConfigError(f"model of type {type(model).__name__}: contains no model of transformers")
    with_rotary = [base for base in bases if isinstance(getattr(base, _ROTARY, None), nn.Module)]
    text = [base for base in with_rotary if base.config.get_text_config(decoder=True) is base.config]
    known = [base for base in text if base.config.model_type in ADAPTERS]
    if not with_rotary:
        raise unknown("architecture", bases[0].config.model_type, ADAPTERS)
    candidates = known or text or with_rotary
    if len(candidates) > 1:
        names = ", ".join(base.config.model_type for base in candidates)
        raise ConfigError(f"model of type {type(model).__name__}: contains several models with RoPE ({names})")
    return candidates[0]


def _device_of(rotary: nn.Module) -> torch.device:
    buffer = next(rotary.buffers(), None)
    inv_freq: Any = buffer if buffer is not None else rotary.inv_freq
    device: torch.device = inv_freq.device
    return device


def _detach_config(model: nn.Module, base: PreTrainedModel) -> Any:
    """Give every part of `model` that uses the base model's config one private copy of it."""
    shared = base.config
    private = copy.deepcopy(shared)
    for module in model.modules():
        own: Any = vars(module).get("config")  # vars: wrappers forward attributes that they do not have
        if own is shared:
            module.config = private
        elif getattr(own, "text_config", None) is shared:
            whole: Any = copy.copy(own)  # the config of a multimodal model holds it as a part
            whole.text_config = private
            module.config = whole
    return private


def _restore(base: PreTrainedModel, state: _State) -> None:
    setattr(base, _ROTARY, state.rotary)
    _write_config(base.config, state.config)
    base.config.__class__ = state.config_class
    for hook in state.hooks:
        hook.remove()
    late.uninstall(state.late)
    uninstall(state.fused)
    if state.scaling.changes_attention:
        uninstall_regions(base)
    if state.attention is not None:
        base.set_attn_implementation(state.attention)
    delattr(base, _STATE)


def _notes(own: RopeScaling, scaling: RopeScaling, config: Any, adapter: Adapter) -> tuple[str, ...]:
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
    types = layer_types_of(config)
    all_slide = not types or types == ["sliding_attention"]
    if window is not None and window < context and getattr(config, "use_sliding_window", True) and all_slide:
        notes.append(f"sliding_window={window} is shorter than the context of {context} tokens")
    if without := layers_without_rope(config):
        shown = ", ".join(map(str, without[:4])) + (", …" if len(without) > 4 else "")
        notes.append(f"{len(without)} of {config.num_hidden_layers} layers have no rotary embedding ({shown})")
    return tuple(notes)
