"""Put a scaling into a model of transformers, and take it out again.

A patched model differs in its rotary module, in what its config says about RoPE and, where layers are to differ though
they share one pair of tables, in a hook in front of each layer. What was there before is kept on the base model (the
part that makes hidden states), so it travels with copies of the model. With the rotary kernel, its attention modules
call that instead of their family's function.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from scaled_rope.attention.backends import attention_for, check_attention, resolve_attention
from scaled_rope.attention.methods import attention_regions
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.patching import deferred_rotation
from scaled_rope.patching.cache_owners import CacheOwner
from scaled_rope.patching.families import (
    ADAPTERS,
    Adapter,
    adapter_of,
    check_softmax_scale,
    head_dim_of,
    layer_types_of,
    layers_without_rope,
    rope_layer_type,
)
from scaled_rope.patching.pass_hooks import Passes
from scaled_rope.patching.region_attention import (
    MASKS_OF,
    check_carrier,
    install_region_attention,
    pairing,
    remove_region_attention,
)
from scaled_rope.patching.rotary import LayeredRotaryEmbedding, ScaledRotaryEmbedding
from scaled_rope.patching.rotary_kernel import Rotation, bind_rotation, fused_rotation, resolve_kernel, unbind_rotation
from scaled_rope.patching.saved_config import (
    ABSENT,
    CONFIG_FIELDS,
    config_fields,
    detach_config,
    let_save,
    write_config,
)
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, PRIMARY_LAYER_TYPE
from scaled_rope.scaling.record import LayerPlan, RopeScaling

_STATE = "_scaled_rope_state"
_ROTARY = "rotary_emb"


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
    deferred: list[nn.Module] = field(default_factory=list)
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
            is the model's own; see `patching.rotary_kernel`. Each model, and each copy, has its own.
        attn: attention implementation to set, a name of `attention.backends` or "auto"; None leaves the model's own.

    `config.rope_parameters` and, when it is too small, `config.max_position_embeddings` follow, so that the
    saved model carries its scaling. Models may share a config object, so the change is made on the model's
    own copy; only the config of a bare base model, which may belong to an enclosing model, changes in place.

    Under dynamic scaling caches hold keys before rotation (`patching.deferred_rotation`), or, with `dynamic_step`, are
    made anew when the scale changes; see `patching.pass_hooks`.

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
    check_softmax_scale(config)
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
    said = state.config if state else {name: getattr(config, name, ABSENT) for name in CONFIG_FIELDS}
    fields = config_fields(wanted, plan, head_dim, adapter, config, said, original)

    names = tuple(name for name, module in model.named_modules() if module is replaced)
    if state:
        _restore(base, state)
    elif base is not model:
        config = detach_config(model, base)
    state = _State(
        rotary=getattr(base, _ROTARY),
        config={name: getattr(config, name, ABSENT) for name in CONFIG_FIELDS},
        config_class=type(config),
        adapter=adapter,
        own=own,
        own_layers=own_layers,
        scaling=wanted,
        plan=plan,
        kernel=backend,
    )
    if rotation is not None:
        state.fused = bind_rotation(base, rotation)
    if attention is not None:
        state.attention = config._attn_implementation
        base.set_attn_implementation(attention)
    if regions is not None:
        inv_freq = compute_rope(wanted.of_frequencies, head_dim)[0]
        install_region_attention(base, attention_regions(wanted), inv_freq, regions)
    state.hooks += _watch_passes(base, state, every, half)
    state.hooks += _hook_layers(base, rotary, plan, config, adapter)
    setattr(base, _STATE, state)
    setattr(base, _ROTARY, rotary)
    write_config(config, fields)
    let_save(config)

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
    rotated = rope_layer_type(config, adapter)
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


def _own_layers(config: Any, adapter: Adapter) -> dict[str, RopeScaling]:
    if not adapter.per_layer_type:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the primary one was read
        return {name: RopeScaling.from_config(config, name) for name in layer_types_of(config)}


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
    passes = Passes(CacheOwner(label), state.scaling, dependent, dropped=state.plan.drop_layers, unrotated=unrotated)
    if dependent and not passes.stepped:
        # What a family's own function rotates is asked in the layout that this function wants.
        state.deferred, passes.obstacle = deferred_rotation.defer_rotation(base, state.adapter.layout, half)
        passes.deferrable, state.obstacle = bool(state.deferred), passes.obstacle
    return passes.hook(base)


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


def _restore(base: PreTrainedModel, state: _State) -> None:
    setattr(base, _ROTARY, state.rotary)
    write_config(base.config, state.config)
    base.config.__class__ = state.config_class
    for hook in state.hooks:
        hook.remove()
    deferred_rotation.rotate_before_cache(state.deferred)
    unbind_rotation(state.fused)
    if state.scaling.changes_attention:
        remove_region_attention(base)
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
