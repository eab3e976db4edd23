"""Put a scaling into a model of transformers, and take it out again.

A patched model has another rotary module, other RoPE parameters in its config and, where layers differ although they
share one pair of tables, a hook in front of each layer. The previous state is kept on the base model (the part that
computes hidden states), so copies of the model have it too. With the rotary kernel, attention modules call that instead
of their family's function.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from scaled_rope.attention.methods import attention_regions
from scaled_rope.errors import ConfigError
from scaled_rope.patching.base_model import Place, base_model, buffer_name, device_of, has_values, on_cpu
from scaled_rope.patching.cache_owners import CacheOwner
from scaled_rope.patching.deferred_rotation import defer_rotation, rotate_before_cache
from scaled_rope.patching.families import rotating_layers
from scaled_rope.patching.layer_tables import build_rotary, hook_layers
from scaled_rope.patching.pass_hooks import Passes
from scaled_rope.patching.patch_request import PatchRequest, RequestedScaling, Unpatched, read_request, remarks
from scaled_rope.patching.rebind import APPLY, INTERFACE, callers, is_rebound
from scaled_rope.patching.region_attention import install_region_attention, remove_region_attention
from scaled_rope.patching.rotary import LayeredRotaryEmbedding, ScaledRotaryEmbedding
from scaled_rope.patching.rotary_kernel import bind_rotation, rotations, unbind_rotation
from scaled_rope.patching.saved_config import (
    agrees,
    config_fields,
    detach_config,
    fields_of,
    let_save,
    write_config,
)
from scaled_rope.patching.temperature import install_temperature, needs_positions, remove_temperature
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, RECORD_KEY, primary_type
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings

_STATE = "_scaled_rope_state"
_SAYS_SCALING = ("rope_parameters", RECORD_KEY)
"""The fields of a config that say the scaling."""


@dataclass(frozen=True)
class PatchReport:
    """A report of the changes that `patch_model` made."""

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
    """Remarks on what the caller may not have meant; empty without any."""
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
    """The state of a patched base model before its first patch, and the patch in effect."""

    unpatched: Unpatched
    request: PatchRequest
    config: dict[str, Any]
    """The config's values before the patch, of the fields that it changes."""
    config_class: type[Any]
    written: dict[str, Any] = field(default_factory=dict)
    """The values that the patch gave those fields."""
    attention: str | None = None
    """The attention implementation before the patch, if the patch set another one."""
    hooks: list[RemovableHandle] = field(default_factory=list)
    rotating: list[nn.Module] = field(default_factory=list)
    """Attention modules that call the rotary kernel."""
    deferred: list[nn.Module] = field(default_factory=list)
    """Attention modules that can rotate after the cache."""
    obstacle: str = ""
    """Why no attention module can, where one must; else ""."""
    tempered: list[nn.Module] = field(default_factory=list)
    """Attention modules that multiply queries by a temperature."""


def patch_model(
    model: nn.Module,
    scaling: RequestedScaling,
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
            ("full_attention", "sliding_attention") gives one for each; None and missing types leave theirs as it is.
        drop_layers: indices of layers, from 0, that are to work without rotary embedding.
        kernel: the implementation that rotates queries and keys. "auto": the fused Triton kernel on a machine with a
            GPU, where the family allows it; without a GPU the model's own function, untouched. "triton" and "torch"
            (its twin) insist, "none" is the model's own; see `patching.rotary_kernel`. Each model, and each copy, has
            its own.
        attn: attention implementation to set, a name of `attention.backends` or "auto"; None leaves the model's own.

    `config.rope_parameters` and, when it is too small, `config.max_position_embeddings` follow, so that the
    saved model carries its scaling. Models may share a config object, so the change is made on the model's
    own copy; only the config of a bare base model, which may belong to an enclosing model, changes in place.

    Under dynamic scaling caches hold keys before rotation (`patching.deferred_rotation`), or, with `dynamic_step`, are
    computed anew when the scale changes; see `patching.pass_hooks`.

    Raises:
        ConfigError: an unknown architecture; a scaling, a kernel or an attention implementation that does not fit the
            model or the machine. The model is then unchanged.
    """
    return patch_as_read(model, None, scaling, drop_layers, kernel, attn)


def patch_as_read(
    model: nn.Module,
    settings: RopeSettings | None,
    scaling: RequestedScaling,
    drop_layers: Iterable[int] = (),
    kernel: str = "auto",
    attn: str | None = None,
) -> PatchReport:
    """`patch_model` for a model whose config has been read.

    settings: the RoPE settings in its config without a patch; None: they are read here, with warnings of assumptions.
    """
    base = base_model(model)
    state: _State | None = getattr(base, _STATE, None)
    # Kept since the first patch: the original module may read its config when called, and the config has changed.
    unpatched = state.unpatched if state else Unpatched.of(base, settings)
    before = state.request.scaling if state else unpatched.own
    request = read_request(base, unpatched, scaling, drop_layers, kernel, attn)
    rotaries = [_rotary_for(request, unpatched, place, base) for place in unpatched.places]
    said = state.config if state else fields_of(base.config)
    fields = config_fields(request, unpatched, base.config, said)
    if state is None and base is not model:
        detach_config(model, base)
    # Nothing is refused from here on, and whatever else goes wrong leaves the model as it was.
    replaced, shown = [place.current(base) for place in unpatched.places], fields_of(base.config)
    if "head_dim" in said:
        shown["head_dim"] = base.config.head_dim  # an earlier patch may have said it
    names = tuple(name for name, module in model.named_modules() if any(module is each for each in replaced))
    if state:
        _restore(base, state)
    try:
        _install(base, unpatched, request, rotaries)
        write_config(base.config, fields)
        let_save(base.config)
        getattr(base, _STATE).written = copy.deepcopy(fields)
        notes = remarks(unpatched, request, base) + request.notes
    except BaseException:
        if (half := getattr(base, _STATE, None)) is not None:
            _restore(base, half)
        if state:
            _install(base, unpatched, state.request, replaced)
            write_config(base.config, shown)
            let_save(base.config)
            getattr(base, _STATE).written = state.written
        raise
    return PatchReport(
        model_type=base.config.model_type,
        modules=names,
        scaling=request.scaling,
        head_dim=request.head_dim,
        attention_factor=compute_rope(request.scaling.of_frequencies, request.head_dim)[1],
        before=before,
        notes=notes,
        plan=request.plan,
        native=CUSTOM_ROPE_TYPE not in str(fields["rope_parameters"]),
        kernel=request.kernel,
        attention=request.attention,
    )


def _rotary_for(request: PatchRequest, unpatched: Unpatched, place: Place, base: PreTrainedModel) -> Any:
    """The rotary module for a request; the rotary kernel takes half-width float32 tables in any family."""
    adapter = unpatched.adapter
    if request.rotation is not None:
        adapter = replace(adapter, layout="half", float32_tables=True)
    scaling = unpatched.scaling_at(place, request.scaling)
    layers = {name: unpatched.scaling_at(place, each) for name, each in request.plan.layers.items()}
    rotary: Any = build_rotary(scaling, layers, device_of(place.current(base)), unpatched.form(place, adapter))
    rotary.show(place.module)
    return rotary


def _install(base: PreTrainedModel, unpatched: Unpatched, request: PatchRequest, rotaries: list[Any]) -> None:
    """Apply a request to an unpatched base model, all but the config."""
    config: Any = base.config
    state = _State(unpatched, request, fields_of(config), type(config))
    setattr(base, _STATE, state)  # first, so that a half-made patch can be undone
    if request.rotation is not None:
        state.rotating = bind_rotation(base, request.rotation)
    if request.attention is not None:
        state.attention = config._attn_implementation
        base.set_attn_implementation(request.attention)
    if request.regions_interleaved is not None:
        inv_freq = compute_rope(request.scaling.of_frequencies, request.head_dim)[0]
        install_region_attention(base, attention_regions(request.scaling), inv_freq, request.regions_interleaved)
    for path, plain in unpatched.attention.items():
        module: Any = base.get_submodule(path)
        module.scaling = plain * request.softmax_factor
    state.hooks += _watch_passes(base, state)
    state.tempered = install_temperature(base, request.scaling, request.plan)
    state.hooks += hook_layers(base, rotaries[0], request.plan, config, unpatched.adapter)
    for place, rotary in zip(unpatched.places, rotaries, strict=True):
        place.exchange(base, rotary)


def _watch_passes(base: PreTrainedModel, state: _State) -> list[RemovableHandle]:
    """Put hooks on a base model that keep track of positions and caches. Where frequencies change with every token,
    also prepare its attention modules to cache keys before rotation."""
    request = state.request
    dependent = any(each.is_length_dependent for each in request.scalings)
    label = request.scaling.label
    if len(set(map(repr, request.scalings))) > 1:
        label = ", ".join(f"{name}: {each.label}" for name, each in request.plan.layers.items())
    passes = Passes(
        CacheOwner(label),
        request.scaling,
        dependent,
        positional=needs_positions(request.scalings),
        dropped=request.plan.drop_layers,
        unrotated=request.scaling.changes_attention,
        rotating=rotating_layers(base.config),
        rotary_path=state.unpatched.places[0].path,
    )
    if dependent and not passes.stepped and (obstacle := _obstacle(state.unpatched)):
        passes.obstacle = state.obstacle = obstacle
    elif dependent and not passes.stepped:
        # The pairing is probed with tables in the layout of the family's own function, not in the kernel's.
        state.deferred, passes.obstacle = defer_rotation(base, state.unpatched.adapter.layout, request.half)
        passes.deferrable, state.obstacle = bool(state.deferred), passes.obstacle
        indices: set[Any] = {module.layer_idx for module in state.deferred}
        passes.layers = tuple(sorted(indices))
    return passes.hook(base)


def _obstacle(unpatched: Unpatched) -> str:
    """Why the rotation of keys cannot be put off until they are read from a cache; "" where it can, as far as the
    rotary modules are concerned."""
    if len(unpatched.places) > 1:
        return f"it has {len(unpatched.places)} rotary modules"
    return "its rotary tables have a form of their own" if unpatched.adapter.own_tables else ""


def _restore(base: PreTrainedModel, state: _State) -> None:
    for place in state.unpatched.places:
        place.exchange(base, place.module)
    for path, plain in state.unpatched.attention.items():
        module: Any = base.get_submodule(path)
        softmax = state.unpatched.softmax
        assert softmax is not None
        module.scaling = plain * softmax.of_softmax(softmax.factor)
    write_config(base.config, state.config)
    base.config.__class__ = state.config_class
    for hook in state.hooks:
        hook.remove()
    remove_temperature(state.tempered)
    rotate_before_cache(state.deferred)
    unbind_rotation(state.rotating)
    if state.request.scaling.changes_attention:
        remove_region_attention(base)
    if state.attention is not None:
        base.set_attn_implementation(state.attention)
    delattr(base, _STATE)


def unpatch_model(model: nn.Module) -> None:
    """Undo every `patch_model` on `model`: the rotary module and the config's fields are what they were.

    Raises ConfigError when the model is not patched.
    """
    base = base_model(model)
    state: _State | None = getattr(base, _STATE, None)
    if state is None:
        raise ConfigError(f"unpatch_model: this {type(model).__name__} is not patched")
    devices = [device_of(place.current(base)) for place in state.unpatched.places]
    # Weights may have been put into a model on "meta" one by one, and then the rotary module is there still.
    devices = [base.device if device.type == "meta" else device for device in devices]
    _restore(base, state)
    for place, device in zip(state.unpatched.places, devices, strict=True):
        if any(buffer.is_meta for buffer in place.module.buffers()) and device.type != "meta":
            # It was taken out before the model got its weights, so nothing has filled its buffers.
            own: Any = getattr(place.module, "config", base.config)
            place.exchange(base, type(place.module)(config=own).to(device))


def patched_scaling(model: nn.Module) -> RopeScaling | None:
    """The scaling that `patch_model` gave to `model`, or None when it is not patched."""
    state = _state_of(model)
    return state.request.scaling if state else None


def patched_plan(model: nn.Module) -> LayerPlan:
    """The differences between layers that `patch_model` made; empty when the model is not patched."""
    state = _state_of(model)
    return state.request.plan if state else LayerPlan()


def patched_kernel(model: nn.Module) -> str | None:
    """The backend of the rotary kernel that `patch_model` put into `model`, or None."""
    state = _state_of(model)
    return state.request.kernel if state else None


def settings_without_patch(model: nn.Module) -> RopeSettings | None:
    """The RoPE settings in a patched model's config before the patch; None when the model is not patched."""
    state = _state_of(model)
    return state.unpatched.settings if state else None


def cache_obstacle(model: nn.Module) -> str:
    """Say in a few words why `model` can use no key/value cache under the scaling that `patch_model` gave it; "" when
    it can."""
    state = _state_of(model)
    return state.obstacle if state else ""


def _state_of(model: nn.Module) -> _State | None:
    return next((vars(module)[_STATE] for module in model.modules() if _STATE in vars(module)), None)


def lost_part(model: nn.Module, of_modules: bool = False) -> str:
    """Say in a few words which part of a patch a model has no more, as its modules and its config show; "" where all of
    it is there, and for a model that is not patched.

    A rotary module may have been exchanged since, or a layer; another program may have given attention a forward of
    its own, and pickling loses those that a patch binds. The config may have been edited: the model does not follow it,
    and would be saved with it.

    of_modules: whether to leave the config aside.
    """
    base = next((module for module in model.modules() if _STATE in vars(module)), None)
    if base is None:
        return ""
    assert isinstance(base, PreTrainedModel)
    state: _State = vars(base)[_STATE]
    request, unpatched, inside = state.request, state.unpatched, set(base.modules())
    for place in unpatched.places:
        try:
            rotary = place.current(base)
        except AttributeError:
            return f"{place.path} is gone"
        with _disable_current_modes():
            if difference := _other_tables(rotary, _rotary_for(request, unpatched, place, base)):
                return f"{place.path} {difference}"
    bound_names = [(state.rotating, APPLY)]
    for module in state.deferred:
        bound_names += [([module], name) for name in (*(rotations(module) or [APPLY]), INTERFACE)]
    bound_names.append((state.tempered, INTERFACE))
    if request.scaling.changes_attention:
        attention = callers(base, INTERFACE)
        if not attention:
            return "attention does not use transformers' attention interface"
        bound_names += [(attention, APPLY), (attention, INTERFACE)]
    for modules, name in bound_names:
        for module in modules:
            if module not in inside or not is_rebound(module, name):
                return f"{type(module).__name__} does not call the {name} of the patch"
    for path, plain in unpatched.attention.items():
        if not math.isclose(base.get_submodule(path).scaling, plain * request.softmax_factor, rel_tol=1e-6):
            return f"{path} has another softmax scale"
    hooks = [id(hooks) for module in inside for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    for handle in state.hooks:
        held = handle.hooks_dict_ref()
        if held is None or handle.id not in held or id(held) not in hooks:
            return "a hook of the patch is gone"
    return "" if of_modules else _other_config(base.config, state.written)


def _other_config(config: Any, written: dict[str, Any]) -> str:
    """How a config differs from what a patch wrote into it, in a few words; "" where it says the same scaling."""
    now = fields_of(config)
    if all(now[name] == written.get(name, now[name]) for name in _SAYS_SCALING):
        return ""
    before = copy.deepcopy(config)
    write_config(before, {name: written[name] for name in _SAYS_SCALING})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, wanted = RopeSettings(config), RopeSettings(before)
            alike = found.scaling == wanted.scaling and found.plan == wanted.plan
            said = found.scaling.label
    except ConfigError as error:
        return f"its config was edited and cannot be read, {error}"
    # Words may have been added that say the same, as transformers does itself.
    return "" if alike else f"the rope_parameters of its config were edited and say {said}"


def _other_tables(found: nn.Module, wanted: nn.Module) -> str:
    """How a rotary module differs from the one that a patch made, in a few words; "" where it makes the same tables."""
    if type(found) is not type(wanted):
        return f"is a {type(found).__name__}"
    if isinstance(found, LayeredRotaryEmbedding) and isinstance(wanted, LayeredRotaryEmbedding):
        if list(found.by_type) != list(wanted.by_type):
            return f"has tables for {', '.join(found.by_type)}"
        pairs = zip(found.by_type.values(), wanted.by_type.values(), strict=True)
        return next((text for one, other in pairs if (text := _other_tables(one, other))), "")
    assert isinstance(found, ScaledRotaryEmbedding) and isinstance(wanted, ScaledRotaryEmbedding)
    if found.scaling != wanted.scaling:
        return f"computes {found.scaling.label}"
    if (found.head_dim, found.layout, found.float32_tables) != (wanted.head_dim, wanted.layout, wanted.float32_tables):
        return "lays out its tables in another way"
    frequencies, others = found.inv_freq, wanted.inv_freq
    if has_values(frequencies) and has_values(others):
        same = frequencies.shape == others.shape and frequencies.dtype == others.dtype
        if not same or not torch.allclose(frequencies, others.to(frequencies.device), rtol=1e-6, atol=0):
            return "holds other frequencies"
    return "" if found.attention_scaling == wanted.attention_scaling else "holds another attention factor"


def computes(
    model: nn.Module, scaling: RopeScaling, settings: RopeSettings | None = None, by_length: bool = False
) -> bool:
    """Whether an unpatched model computes with a scaling already, judged by the numbers in its rotary modules.

    The config is not trusted, because families drop, rewrite or ignore parts of it. Only an unscaled model whose rotary
    module is not understood is judged by its config, and one that has no numbers yet.

    Args:
        settings: the RoPE settings in its config, if they have been read already.
        by_length: whether a scaling that depends on the length is looked for as well, by running copies of the modules
            at several lengths. Otherwise no model is said to compute it, since a module of transformers remembers
            lengths.

    Raises:
        ConfigError: the scaling is one that the model has no rotary module for, or none that is understood.
    """
    try:
        base = base_model(model)
        unpatched = Unpatched.of(base, settings or RopeSettings(base.config), strict=False)
    except ConfigError:
        if scaling.method != "default":
            raise
        return (settings or RopeSettings(getattr(model, "config", {}))).scaling == scaling
    if scaling.beyond_tables or (scaling.is_length_dependent and not by_length):
        return False
    wanted = {name: unpatched.own_of(name) for name in unpatched.types} or {"": scaling}
    if unpatched.types:
        wanted[primary_type(unpatched.types)] = scaling
    with _disable_current_modes():  # a caller may be tracing a pass, with tensors that hold no numbers
        return all(
            _module_computes(unpatched, place, name, unpatched.scaling_at(place, one))
            for place in unpatched.places
            for name, one in wanted.items()
        )


def _module_computes(unpatched: Unpatched, place: Place, layer_type: str, scaling: RopeScaling) -> bool:
    rotary: Any = place.module
    if scaling.is_length_dependent:
        try:
            rotary = on_cpu(rotary)
        except Exception:  # each family has its own ways to refuse
            return False
        return agrees(rotary, layer_type, scaling, unpatched)
    kind = getattr(rotary, "rope_type", "")
    kind = str(kind.get(layer_type, "") if isinstance(kind, dict) else kind)
    if "dynamic" in kind or "longrope" in kind:
        return False
    inv_freq, factor = (
        getattr(rotary, buffer_name(name, layer_type), None) for name in ("inv_freq", "attention_scaling")
    )
    said = unpatched.scaling_at(place, unpatched.own_of(layer_type)) == scaling
    if inv_freq is None or not has_values(inv_freq):
        return said
    wanted, wanted_factor = unpatched.form(place).frequencies(scaling, layer_type)
    if inv_freq.shape != wanted.shape:
        return False
    # transformers computes in float32 throughout: its frequencies are off by up to some ln(b) units of 6e-8.
    close = torch.allclose(inv_freq.float().cpu(), wanted, rtol=5e-6, atol=0)
    return close and (said if factor is None else abs(float(factor) - wanted_factor) < 1e-6)
