"""Check the arguments of `patch_model` against the model, and refuse those that do not fit. Nothing is changed here."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from scaled_rope.attention.backends import attention_for, check_attention, resolve_attention
from scaled_rope.errors import ConfigError, is_number, unknown
from scaled_rope.patching.base_model import (
    ROTARY,
    Place,
    buffer_name,
    frequencies_of,
    has_values,
    on_cpu,
    rotary_places,
)
from scaled_rope.patching.effect import used_places
from scaled_rope.patching.families import (
    UNSCALED,
    Adapter,
    adapter_of,
    layers_without_rope,
    rope_layer_type,
    table_types,
)
from scaled_rope.patching.layer_tables import TableForm, check_layers_can_differ
from scaled_rope.patching.region_attention import MASKS_OF, check_carrier, pairing
from scaled_rope.patching.rotary import Layout
from scaled_rope.patching.rotary_kernel import Rotation, fused_rotation, normalising, resolve_kernel
from scaled_rope.patching.softmax_scale import SoftmaxScale, scaled_attention, softmax_scale_of
from scaled_rope.patching.temperature import check_temperature
from scaled_rope.scaling.constants import constants_note
from scaled_rope.scaling.frequencies import compute_rope, rope_values
from scaled_rope.scaling.hf_config import layer_types_of, primary_type
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings

RequestedScaling = RopeScaling | str | Mapping[str, RopeScaling | str | None]
"""A record, a spec, or one of these for each layer type."""


@dataclass(frozen=True)
class Unpatched:
    """A base model as it was before any patch."""

    places: tuple[Place, ...]
    """The rotary modules whose tables reach its layers, the most important first."""
    adapter: Adapter
    settings: RopeSettings
    types: tuple[str, ...]
    """The types of layers that have tables of their own; empty when all share theirs."""
    head_dims: dict[str, int]
    """Layer type -> dimensions per head; "" where all layers share their tables."""
    orders: dict[str, Tensor]
    """Layer type -> the order of the family's frequencies, where it isn't that of the record."""
    thetas: dict[str, float]
    """Path of a rotary module -> its base, where that comes from a config of its own and not from the model's."""

    softmax: SoftmaxScale | None
    """The softmax scale that attention took from the RoPE parameters when it was built; None where it took none."""
    attention: dict[str, float]
    """Path of each attention module that did so -> its softmax scale without that."""

    @property
    def rotary(self) -> nn.Module:
        return self.places[0].module

    @property
    def own(self) -> RopeScaling:
        """The model's own scaling; where layer types differ, that of the primary type."""
        return self.settings.of(primary_type(self.types) if self.types else None)

    def own_of(self, layer_type: str) -> RopeScaling:
        """The model's own scaling of the layers of a type."""
        return self.settings.of(layer_type) if self.adapter.per_layer_type else self.own

    def scaling_at(self, place: Place, scaling: RopeScaling) -> RopeScaling:
        """The scaling of one rotary module, given that of the model: where it keeps the model's base, the module keeps
        its own."""
        theta = self.thetas.get(place.path)
        if theta is None or scaling.rope_theta != self.own.rope_theta:
            return scaling
        return dataclasses.replace(scaling, rope_theta=theta)

    def form(self, place: Place, adapter: Adapter | None = None) -> TableForm:
        """The form of the tables of a rotary module. adapter: another one than the family's."""
        return TableForm(adapter or self.adapter, place.module, self.head_dims, self.orders)

    @classmethod
    def of(cls, base: PreTrainedModel, settings: RopeSettings | None = None, strict: bool = True) -> Unpatched:
        """Inspect a base model that is not patched.

        Args:
            settings: the RoPE settings in its config, if they have been read already.
            strict: whether to refuse a config that says another base than the model computes with.

        Raises:
            ConfigError: an architecture that is not known, or one whose attention a patch could not change completely;
                see `strict`.
        """
        config: Any = base.config
        places = rotary_places(base)
        main = next((place for place in places if place.path == ROTARY), places[0])
        adapter = adapter_of(config, main.module)
        softmax = softmax_scale_of(config)
        attention = scaled_attention(base, softmax) if softmax else {}
        places = used_places(base, [main, *(place for place in places if place is not main)])
        unscaled = UNSCALED.get(config.model_type)
        places = [place for place in places if place.path != unscaled]
        if not places:
            raise ConfigError(
                f"architecture {config.model_type!r}: all its layers take their angles from {unscaled}, which "
                "this family never scales; rope_scaling_layers in its config says which layers are scaled"
            )
        if settings is None:
            settings = RopeSettings(config)
            settings.warn()
        types = tuple(table_types(config, places[0].module)) if adapter.per_layer_type else ()
        for name in types:
            settings.of(name)  # a config that is wrong in one of them is refused now
        found = cls(tuple(places), adapter, settings, types, {}, {}, {}, softmax, attention)
        with _disable_current_modes():  # a caller may be tracing a pass, with tensors that hold no numbers
            for place in places:
                _hold_against_module(found, place, config, strict)
        return found


def _hold_against_module(unpatched: Unpatched, place: Place, config: Any, strict: bool) -> None:
    """Compare the frequencies in a rotary module with those that the config was read as, and note in `unpatched` how
    wide its tables are, in which order, and from which base.

    It is the base that counts. The scaling may be another one: a config may have been changed since the module was
    built, and the constants of the released Yarn-Mistral models are known here alone.

    Raises:
        ConfigError: strict, and they differ.
    """
    family: Any = place.module
    if not all(map(has_values, family.buffers())):
        with contextlib.suppress(Exception):  # where it can't be built its numbers stay unknown
            family = on_cpu(family)
    for name in unpatched.types or ("",):
        own = unpatched.own_of(name) if name else unpatched.own
        inv_freq = frequencies_of(family, name)
        if inv_freq is not None and not has_values(inv_freq):
            inv_freq = None
        width = None if inv_freq is None else 2 * len(inv_freq)
        head_dim = _head_dim(unpatched.settings, own, width if unpatched.types else None)
        unpatched.head_dims.setdefault(name, head_dim)
        kind = getattr(family, "rope_type", "default")
        kind = kind.get(name, "default") if isinstance(kind, dict) else kind
        if inv_freq is None or own.rotary_dim(head_dim) != width or "dynamic" in str(kind) or own.is_length_dependent:
            continue  # other widths are refused with the scaling, where the message can say more
        actual = inv_freq.detach().float().cpu()
        wanted = compute_rope(own.of_frequencies, head_dim)[0]
        theta = _own_theta(family, config)
        if theta is not None and theta == own.rope_theta:
            unpatched.thetas[place.path] = theta
        if _same(actual, wanted) or _scaled_from(actual, own, head_dim):
            continue
        if theta is not None and _same(actual, compute_rope(dataclasses.replace(own, rope_theta=theta), head_dim)[0]):
            unpatched.thetas[place.path] = theta
            continue
        if _same(actual.sort().values, wanted.sort().values):
            unpatched.orders[name] = wanted.argsort()[actual.argsort().argsort()]
            continue
        if strict:
            raise ConfigError(
                f"architecture {config.model_type!r}: its config is read as {own.label} with the frequencies "
                f"{_first(wanted)}, but {place.path} computes with {_first(actual)}; what to scale is not clear"
            )


def _same(actual: Tensor, wanted: Tensor) -> bool:
    # transformers computes in float32 throughout: its frequencies are off by some ln(b) units of 6e-8. In a model that
    # was cast to bfloat16 they are off by 2^-9.
    return torch.allclose(actual, wanted, rtol=4e-3, atol=1e-12)


def _scaled_from(actual: Tensor, own: RopeScaling, head_dim: int) -> bool:
    """Whether frequencies may come from the base of a record, under whatever scaling by its factor or less."""
    unscaled = compute_rope(RopeScaling.from_spec("default", own), head_dim)[0]
    slowest = unscaled / own.factor * (1 - 4e-3)
    return bool(((actual <= unscaled * (1 + 4e-3)) & (actual >= slowest)).all())


def _first(inv_freq: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in inv_freq[:4].tolist()) + (", …" if len(inv_freq) > 4 else "")


def _own_theta(family: Any, config: Any) -> float | None:
    """The base that a rotary module of its own config was built with; None where it has the model's."""
    own = getattr(family, "config", None)
    rope = getattr(own, "rope_parameters", None)
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) and own is not config else None
    return float(theta) if theta is not None and is_number(theta) else None


def _head_dim(settings: RopeSettings, own: RopeScaling, width: int | None) -> int:
    """Dimensions per head: as the config says, or where layers differ, as the width of their tables says."""
    try:
        said = settings.head_dim
    except ConfigError:
        if width is None:
            raise
        said = 0
    if width is None or (said and int(said * own.partial_rotary_factor) == width):
        return said
    fitting = round(width / own.partial_rotary_factor)
    return fitting if int(fitting * own.partial_rotary_factor) == width else said


@dataclass(frozen=True)
class PatchRequest:
    """The checked arguments of `patch_model`, resolved for a model."""

    scaling: RopeScaling
    """The scaling; where layer types differ, that of the primary type."""
    plan: LayerPlan
    head_dim: int
    """Dimensions per head of the primary type."""
    regions_interleaved: bool | None = None
    """Under a method that changes attention, whether neighbouring dimensions are paired; None under others."""
    attention: str | None = None
    """The attention implementation to set; None leaves the model's own."""
    rotation: Rotation | None = None
    """The function for attention modules to call in place of their family's; None leaves the family's."""
    kernel: str | None = None
    """The backend of that rotation."""
    softmax_factor: float = 1.0
    """The multiplier of the softmax scale, in families that make it of the RoPE parameters."""
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
    wanted, softmax_factor = _with_softmax(wanted, unpatched)
    plan = LayerPlan(layers, layer_indices(drop_layers, len(getattr(base, adapter.layers, ()))))
    check_layers_can_differ(plan, base, adapter)
    for name, each in layers.items() or [("", wanted)]:
        _check_width(each, name, unpatched)
    head_dim = unpatched.head_dims[primary_type(unpatched.types) if unpatched.types else ""]
    request = PatchRequest(wanted, plan, head_dim, softmax_factor=softmax_factor)
    _check_steps(request.scalings)
    check_temperature(base, wanted, plan, softmax=unpatched.softmax is not None)
    regions = _pairing_of_regions(base, request.scalings, plan, kernel, attn, adapter.layout, request.half)
    if regions is not None:
        return dataclasses.replace(request, regions_interleaved=regions, attention=MASKS_OF)
    attention = _attention(base, attn)
    rotation, backend, notes = _rotation(base, request.half, kernel, adapter)
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

    own, adapter = unpatched.own, unpatched.adapter
    types = list(unpatched.types) or unpatched.settings.layer_types
    if adapter.per_layer_type and not isinstance(scaling, Mapping):
        scaling = {primary_type(types): scaling}
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
    primary = layers[primary_type(types)]
    if not adapter.per_layer_type and len(set(map(repr, layers.values()))) == 1:
        layers = {}
    return primary, layers


def _with_softmax(scaling: RopeScaling, unpatched: Unpatched) -> tuple[RopeScaling, float]:
    """Share the temperature of YaRN between tables and softmax as the model's own scaling does.

    A temperature that was asked for by number, and any other method, stay as they are, and the softmax scale is that of
    the unscaled model.

    Returns:
        The scaling with its attention factor, and the multiplier of the softmax scale.
    """
    softmax, own = unpatched.softmax, unpatched.own
    if softmax is None or scaling.method != "yarn" or not scaling.is_native() or scaling.mscale is not None:
        return scaling, 1.0
    if scaling.attention_factor not in (None, own.attention_factor, softmax.of_tables(scaling.factor)):
        return scaling, 1.0
    shared = dataclasses.replace(scaling, attention_factor=softmax.of_tables(scaling.factor))
    return shared, softmax.of_softmax(scaling.factor)


def layer_indices(drop_layers: Iterable[int], count: int) -> tuple[int, ...]:
    """The value of `drop_layers` for a model of `count` layers, each index once and in order.

    Raises:
        ConfigError: no list of whole numbers, or an index that no layer has.
    """
    given: Any = drop_layers
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"drop_layers={given!r}: must be a list of layers' indices, 0 to {count - 1}")
    indices = list(given)
    for index in indices:
        if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= int(index) < count:
            raise ConfigError(f"drop_layers={index!r}: must be a layer's index, 0 to {count - 1}")
    return tuple(sorted(set(map(int, indices))))


def _check_width(scaling: RopeScaling, layer_type: str, unpatched: Unpatched) -> None:
    """Raise a ConfigError unless a scaling rotates as many dimensions as the model's attention does."""
    adapter, family = unpatched.adapter, unpatched.settings.model_type
    head_dim = unpatched.form(unpatched.places[0]).head_dim(layer_type)
    width = scaling.rotary_dim(head_dim)
    if width != head_dim and not adapter.partial_rotary:
        share = f"{scaling.partial_rotary_factor:g}"
        raise ConfigError(f"partial_rotary_factor={share}: must be 1, {family} models rotate whole heads")
    inv_freq = getattr(unpatched.rotary, buffer_name("inv_freq", layer_type if adapter.per_layer_type else ""), None)
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
    for each in scalings:
        if each.method == "dpe" and (count := len(each.method_params.groups)) > half:
            raise ConfigError(
                f"groups holds {count} numbers: must be at most {half}, as many as pairs of dimensions are rotated"
            )
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
    base: PreTrainedModel, half: int, kernel: str, adapter: Adapter
) -> tuple[Rotation | None, str | None, tuple[str, ...]]:
    """The rotation to install, its backend, and a note if the kernel was wanted and cannot be used."""
    backend = resolve_kernel(kernel)
    if backend is None:
        return None, None, ()
    if adapter.axes or adapter.own_tables:  # the family's module makes whole tables
        rotation, reason = None, "its rotary tables have a form of their own"
    else:
        rotation, reason = fused_rotation(base, adapter.layout, half, backend)
    if rotation is None:
        said = f"kernel={kernel!r}: not for this {base.config.model_type} model, {reason}"
        if kernel != "auto":
            raise ConfigError(said)
        return None, None, (said,)
    return rotation, backend, ()


def remarks(unpatched: Unpatched, request: PatchRequest, base: PreTrainedModel) -> tuple[str, ...]:
    """Remarks on a scaling that fits the model but may not be what the caller meant, or cannot act."""
    config: Any = base.config
    own, scaling = unpatched.own, request.scaling
    notes = list(_without_effect(unpatched, request, base))
    if scaling.rope_theta != own.rope_theta:
        notes.append(f"rope_theta={scaling.rope_theta:g} differs from the model's own {own.rope_theta:g}")
        warnings.warn(notes[-1], stacklevel=4)  # names the caller of `patch_model`
    original = own.original_max_position_embeddings
    if scaling.original_max_position_embeddings not in (None, original):
        given = scaling.original_max_position_embeddings
        notes.append(f"original_max_position_embeddings={given} differs from the model's own {original}")
    head_dim = unpatched.head_dims[primary_type(unpatched.types) if unpatched.types else ""]
    if (note := constants_note(scaling, head_dim)) is not None:
        notes.append(note)
    if unpatched.softmax is not None:
        notes.append(
            f"the softmax scale is multiplied by {request.softmax_factor:.6g}, in place of the checkpoint's "
            f"{unpatched.softmax.of_softmax(unpatched.softmax.factor):.6g}"
        )
    if own.method != "default":
        notes.append(f"replaces the scaling of the checkpoint: {own.label}")
    window, context = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    types = layer_types_of(config)
    all_slide = not types or types == ["sliding_attention"]
    if not (isinstance(window, int) and isinstance(context, int)):
        window = context = 0  # no numbers, so nothing to compare
    if 0 < window < context and getattr(config, "use_sliding_window", True) and all_slide:
        notes.append(f"sliding_window={window} is shorter than the context of {context} tokens")
    notes += _in_windows(unpatched, request, config)
    for place in unpatched.places:
        held = vars(place.module)
        if "forward" in held and "_hf_hook" not in held:  # accelerate's, which only moves tensors
            notes.append(f"{place.path} has a forward of its own, which does not act while the model is patched")
        stacked = bool(request.plan.layers) and not unpatched.adapter.per_layer_type
        if place.module._forward_hooks and (stacked or request.rotation is not None):
            notes.append(f"hooks on {place.path} see tables of another form while the model is patched")
    if without := layers_without_rope(config):
        shown = ", ".join(map(str, without[:4])) + (", …" if len(without) > 4 else "")
        notes.append(f"{len(without)} of {config.num_hidden_layers} layers have no rotary embedding ({shown})")
    return tuple(notes)


def _in_windows(unpatched: Unpatched, request: PatchRequest, config: Any) -> Iterator[str]:
    """Say if a scaling acts in no layer but those that see less than the text that it is for."""
    types, plan = list(getattr(config, "layer_types", None) or ()), request.plan
    original = unpatched.own.original_max_position_embeddings
    if len(set(types)) < 2 or len(types) != config.num_hidden_layers or original is None:
        return
    without = {*layers_without_rope(config), *plan.drop_layers}
    acting: dict[str, RopeScaling] = {}
    for index, name in enumerate(types):
        own = plan.layers.get(name, request.scaling)
        if plan.layers and name not in plan.layers and unpatched.adapter.per_layer_type:
            return  # the types of attention are not those of the tables
        changed = not plan.layers or own != unpatched.own_of(name)
        if index not in without and changed and not any(word in name for word in _NO_ATTENTION):
            acting[name] = own
    windows = {name: _window_of(config, name) for name in acting}
    for name, window in windows.items():
        if None in windows.values() or window is None or window >= original * acting[name].factor:
            return
    if seen := [window for window in windows.values() if window is not None]:
        label = next(iter(acting.values())).label
        yield f"{label} acts only in layers that see {max(seen)} tokens; L = {original}"


_NO_ATTENTION = ("linear", "conv", "mamba", "recurrent", "mlp")
"""Parts of the names of types of layers that have no attention to rotate for."""


def _window_of(config: Any, layer_type: str) -> int | None:
    """The tokens that layers of a type see at most; None where they see all, or where it is not known."""
    field = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
    name = next((field[word] for word in field if word in layer_type), "")
    window = getattr(config, name, None) if name else None
    return window if isinstance(window, int) else None


def _without_effect(unpatched: Unpatched, request: PatchRequest, base: PreTrainedModel) -> Iterator[str]:
    """Say which parts of a request cannot act on this model."""
    config: Any = base.config
    scaling = request.scaling
    rotating = set(range(config.num_hidden_layers)) - set(layers_without_rope(config))
    if request.plan.drop_layers and rotating <= set(request.plan.drop_layers):
        factor = 1.0 if scaling.changes_attention else scaling.static_attention_factor
        more = f", so attention_factor={factor:.5g} multiplies nothing" if factor != 1.0 else ""
        by_temperature = scaling.attention_temperature is not None
        acts = "acts by its attention_temperature alone" if by_temperature else "acts in no layer"
        yield f"{scaling.label} {acts}: drop_layers leaves none with rotary embedding{more}"
    elif not scaling.is_length_dependent and not scaling.beyond_tables and _computes_alike(unpatched, scaling):
        yield f"{scaling.label} computes what the model computed before"
    if not scaling.changes_attention and (scaling.static_attention_factor != 1.0 or scaling.dynamic):
        if (name := normalising(base)) and not (scaling.dynamic and scaling.method != "yarn"):
            yield f"the attention factor of {scaling.label} has no effect: {name} normalises after it has rotated"
    context = unpatched.settings.max_position_embeddings  # the config's own has grown with the patch
    original = scaling.original_max_position_embeddings
    if scaling.dynamic and scaling.factor == 1 and original is not None and context is not None and original > context:
        yield (
            f"{scaling.label} acts beyond original_max_position_embeddings={original} tokens only, more than the "
            f"{context} that the model was made for"
        )


def _computes_alike(unpatched: Unpatched, scaling: RopeScaling) -> bool:
    """Whether a static scaling has the frequencies and the factor of the model's own scaling."""
    own = unpatched.own
    if own.is_length_dependent or own.beyond_tables or scaling.beyond_tables:
        return False
    head_dim = unpatched.head_dims[primary_type(unpatched.types) if unpatched.types else ""]
    return rope_values(scaling, head_dim) == rope_values(own, head_dim)
