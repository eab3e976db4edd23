"""The RoPE settings of a config, read from two views of it: the dictionary that its author wrote, and the object that
transformers makes of it. Nothing is judged here; what cannot be read is kept as an error for the checks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers

from scaled_rope.errors import ConfigError, first_line, is_number, shortened
from scaled_rope.patching.families import ADAPTERS, layers_without_rope
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import (
    CUSTOM_ROPE_TYPE,
    FAMILY_THETA,
    NATIVE,
    PRIMARY_LAYER_TYPE,
    RECORD_KEY,
    ConfigNote,
    attention_keys,
    config_head_dim,
    family_keys,
    has_rope,
    nested_types,
    split_config,
    text_path,
    usual_name,
)
from scaled_rope.scaling.known_lengths import KnownLengths
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.inspect_report import Dimension, quiet, refusal_of
from scaled_rope.serving.rotary_module import rotates_images
from scaled_rope.serving.scaling_plots import regimes_of

TOP_LEVEL_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
"""Keys on the top level of a config.json that say something about RoPE."""
RELEASED_TYPES = ("dynamic-yarn", "dynamic-linear", "ntk-by-parts")
"""Values of rope_type that the code released with YaRN knows, and transformers does not."""
_SHARED_KEYS = ("rope_type", "type", "finetuned", "rope_theta", "partial_rotary_factor")
_MAX_HEAD_DIM = 65536
"""No model has heads so wide; a number beyond it is a slip, and a table that long would only fill the memory."""
_UNREADABLE = (ConfigError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError)
"""Exceptions of reading a config with types that no reader expects, such as a list for a number."""
_SIZES = (
    *("max_position_embeddings", "original_max_position_embeddings", "sliding_window"),
    *("head_dim", "qk_rope_head_dim", "hidden_size", "num_attention_heads"),
    *("layer_types", "num_hidden_layers", "model_type"),
)
"""Values that the config class of a family fills in when a config.json leaves them out."""


@dataclass(frozen=True)
class ConfigFacts:
    """All that the checks look at. The defaults are a config that says nothing."""

    raw: dict[str, Any] = field(default_factory=dict)
    """The whole config, as written."""
    path: tuple[str, ...] = ()
    """The keys that lead from `raw` to its text part; empty for a flat config."""
    text: dict[str, Any] = field(default_factory=dict)
    """The text part of `raw`; empty for a RoPE dictionary without a model."""
    rope: dict[str, Any] = field(default_factory=dict)
    """The RoPE dictionary that counts, as written."""
    rope_error: str = ""
    """Why there is no RoPE dictionary, where something else stands in its place."""
    built: Any = None
    """The config object that transformers makes of `raw`, text part only; None where it makes none."""
    refusal: str = ""
    """Why transformers makes none of a family that it knows."""
    model_type: str | None = None
    complete: dict[str, Any] = field(default_factory=dict)
    """`text` with the sizes that the config class fills in."""
    layer_type: str | None = None
    """The layers that were asked for; None: the full-attention ones."""
    ignored: dict[str, Any] = field(default_factory=dict)
    """Keys of the RoPE dictionary that its rope_type does not have, and their values."""
    own: RopeScaling | None = None
    """The scaling that the config means; None when it cannot be read."""
    known: KnownLengths | None = None
    """The lengths that are known of the model where the config does not say L; `own` has this L."""
    read_error: Exception | None = None
    """Why it cannot."""
    notes: tuple[ConfigNote, ...] = ()
    """Assumptions made, and keys ignored, when `own` was read."""
    spec: str | None = None
    """The scaling that was asked for instead of `own`, as it was written."""
    scaling: RopeScaling | None = None
    """The scaling of the report: `own`, or the meaning of `spec` for this model."""
    head_dim: int | None = None
    """Dimensions per head, the rotated part of them where that is kept apart."""
    shown: int | None = None
    """Tokens of the sequence that `dimensions` is for; None when the frequencies do not depend on it."""
    dimensions: tuple[Dimension, ...] = ()
    dimensions_error: str = ""
    """Why the frequencies cannot be computed."""
    dropped: tuple[int, ...] = ()
    """Layers that `patch_model` left without RoPE."""
    without_rope: tuple[int, ...] = ()
    """All layers without RoPE, by design of the family, without an entry for their type, or dropped."""
    layers: dict[str, RopeScaling] = field(default_factory=dict)
    """Layer type -> its scaling, where there is more than one."""
    layer_errors: dict[str, str] = field(default_factory=dict)
    """Layer type -> why its scaling cannot be read."""

    @property
    def nested(self) -> list[str]:
        """The layer types that the RoPE dictionary tells apart."""
        return nested_types(self.rope)

    @property
    def entry(self) -> dict[str, Any]:
        """The RoPE dictionary of the layers in question, as written."""
        if not self.nested:
            return self.rope
        entry = self.rope.get(self.layer_type or PRIMARY_LAYER_TYPE)
        return dict(entry) if isinstance(entry, Mapping) else {}

    @property
    def rope_type(self) -> Any:
        """As written, of whatever type; "default" where nothing is said."""
        return self.entry.get("rope_type", self.entry.get("type", "default"))

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer; empty when the config does not list them."""
        types = self.complete.get("layer_types")
        return [kind for kind in types if isinstance(kind, str)] if isinstance(types, list | tuple) else []

    @property
    def context(self) -> int | None:
        """max_position_embeddings, in tokens."""
        return _whole(self.complete.get("max_position_embeddings"))

    @property
    def reach(self) -> int | None:
        """How far the scaling extends the model, in tokens: factor times L, unless the model is known for another
        length; None without a scaling, or without L."""
        if self.spec is None and self.known is not None and self.known.extended is not None:
            return self.known.extended
        return None if self.scaling is None else self.scaling.max_position_embeddings

    @property
    def window(self) -> int | None:
        """The sliding window in use, in tokens."""
        used = self.complete.get("use_sliding_window", True) is not False
        return _whole(self.complete.get("sliding_window")) if used else None

    @property
    def original_is_written(self) -> bool:
        """Whether the config says L, or its family does."""
        name = "original_max_position_embeddings"
        return any(place.get(name) is not None for place in (self.entry, self.complete))

    @functools.cached_property
    def of_images(self) -> bool:
        """Whether the rotary embedding is that of the patches of an image, which has no context to extend."""
        return self.built is not None and rotates_images(self.built)

    @property
    def known_to_transformers(self) -> bool:
        """Whether transformers has a config class for the model_type."""
        return self.model_type is not None and self.model_type in transformers.CONFIG_MAPPING


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) and value >= 1 and value % 1 == 0 else None


def read_facts(
    raw: dict[str, Any],
    source: str = "config",
    layer_type: str | None = None,
    spec: str | None = None,
    length: int | None = None,
) -> ConfigFacts:
    """Read a config; the arguments are those of `inspect_config.inspect`, `source` being a name for messages.

    Raises:
        ConfigError: a config that says nothing about a model, a layer type that it does not have, or a bad spec.
    """
    facts = _with_scaling(_with_layer_type(_read_views(raw, source, layer_type), layer_type))
    scaling = resolve_scaling(spec, facts.own) if spec is not None and facts.own is not None else facts.own
    facts = replace(facts, spec=spec, scaling=scaling, head_dim=_head_dim(facts.complete))
    return _with_layers(_with_dimensions(facts, length))


# ---------------------------------------------------------------------------------------------------- the two views


def _read_views(raw: dict[str, Any], source: str, layer_type: str | None) -> ConfigFacts:
    """The config as written and as transformers has it."""
    built, path, refusal = build_text_config(raw)
    path = text_path(raw) if path is None else path
    rope_error, part = "", _part(raw, path)
    try:
        text, rope = split_config(part)
    except ConfigError as error:
        # A RoPE dictionary that is none: the rest can still be looked at.
        text, rope = {k: v for k, v in part.items() if k not in ("rope_parameters", "rope_scaling")}, {}
        rope_error = str(error)
    for kind in (raw.get("model_type"), text.get("model_type")):
        if not isinstance(kind, str | None):
            raise ConfigError(f"config {source!r}: model_type {shortened(repr(kind), 80)} is not allowed; a text")
    kind = text.get("model_type") or getattr(built, "model_type", None)
    model_type = kind if isinstance(kind, str) else None
    if model_type is None and not rope and not text.keys() & set(TOP_LEVEL_KEYS) and not rope_error:
        raise ConfigError(f"config {source!r} says nothing about a model: no model_type, no key of RoPE")
    written = {name: value for name, value in text.items() if value is not None}
    complete = _sizes(built, written, layer_type) if built is not None else written
    if built is not None and has_rope(built) and str(model_type) not in FAMILY_THETA and not rope_error:
        rope = _rope_of_the_class(built, written, rope)
        complete["rope_parameters" if not written.get("rope_scaling") else "rope_scaling"] = rope
    return ConfigFacts(
        raw=raw,
        path=path,
        text=text,
        rope=rope,
        rope_error=rope_error,
        built=built,
        refusal=refusal,
        model_type=model_type,
        complete=complete,
    )


def _part(raw: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The part of a config at a path, or as far as it goes: older configs keep the text part on the top level."""
    part: Mapping[str, Any] = raw
    for name in path:
        if not isinstance(part.get(name), Mapping):
            break
        part = part[name]
    return {str(key): value for key, value in part.items()}


def _sizes(built: Any, written: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    """The sizes of a config, with those that its class fills in and those that layers of a type have for themselves."""
    filled, own = {}, {}
    for name in _SIZES:
        try:
            filled[name] = getattr(built, name, None)
        except RuntimeError:  # differs between layers, as in Gemma 4
            own[name] = _of_layers(built, name, layer_type)
    return {**{name: value for name, value in filled.items() if value is not None}, **written, **own}


def _of_layers(built: Any, name: str, layer_type: str | None) -> Any:
    """The value of a field that differs between layers for those of a type; None where these differ as well."""
    types = list(dict.fromkeys(getattr(built, "layer_types", None) or ()))
    chosen = layer_type or (PRIMARY_LAYER_TYPE if PRIMARY_LAYER_TYPE in types else next(iter(types), None))
    try:
        return getattr(built.per_layer_config[chosen], name, None)
    except (KeyError, RuntimeError, ValueError):
        return None


def _rope_of_the_class(built: Any, written: Mapping[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """The RoPE dictionary with what the class of an otherwise unknown family fills in: its base and its share."""
    theirs = built.rope_parameters
    if not isinstance(theirs, Mapping) or CUSTOM_ROPE_TYPE in str(rope):
        return rope
    if not rope and not written.keys() & {"rope_theta", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"}:
        return copy.deepcopy(dict(theirs))
    if nested_types(theirs) or nested_types(rope):
        return rope
    filled = {name: theirs.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return {name: v for name, v in filled.items() if v is not None and written.get(name) is None} | rope


def build_text_config(raw: Mapping[str, Any]) -> tuple[Any, tuple[str, ...] | None, str]:
    """The config object that transformers makes of a config.json, text part only; the keys that lead to that part; and
    why transformers makes none. None for what there is not.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return None, None, ""
    own = copy.deepcopy(dict(raw))
    place: Any = own
    for name in ("", *text_path(own)):
        place = place[name] if name else place
        if CUSTOM_ROPE_TYPE in str(place.get("rope_parameters")):
            # Its numbers are ours to read; the rest of the config is of interest.
            del place["rope_parameters"]
    with quiet():
        try:
            whole = transformers.CONFIG_MAPPING[model_type].from_dict(own)
            config = _text_part(whole)
        except Exception as error:  # a config class raises whatever its checks raise, some wrapped in a headline
            return None, None, refusal_of(error)
    if not isinstance(config, transformers.PreTrainedConfig):
        return None, None, "no text config"
    if not isinstance(config.model_type, str):
        return None, None, f"model_type={config.model_type!r} is no text"
    return config, _path_to(whole, config), ""


def text_part(whole: Any) -> tuple[Any, tuple[str, ...]]:
    """The text part of a config object of transformers, and the fields that lead to it."""
    part = _text_part(whole) if hasattr(whole, "get_text_config") else whole
    return part, _path_to(whole, part) or ()


def _text_part(whole: Any) -> Any:
    """The text part of a config object: of two, as in MusicGen, that of the decoder."""
    try:
        part = whole.get_text_config()
    except ValueError:
        part = whole.get_text_config(decoder=True)
    if part is not whole:
        return _text_part(part)
    if not has_rope(whole):  # it does not know its own text part, as in pi0
        for name in text_path({name: {} for name in vars(whole) if name.endswith("_config")}):
            part = _text_part(getattr(whole, name))
    return part


def _path_to(whole: Any, part: Any) -> tuple[str, ...] | None:
    """The fields that lead from a config object to a part of it; None when they do not."""
    if whole is part:
        return ()
    for name, value in vars(whole).items():
        if isinstance(value, transformers.PreTrainedConfig):
            rest = _path_to(value, part)
            if rest is not None:
                return (name, *rest)
    return None


def _with_layer_type(facts: ConfigFacts, layer_type: str | None) -> ConfigFacts:
    """Raises ConfigError for a layer type that the model does not have."""
    nested = facts.nested
    known = list(dict.fromkeys([*nested, *facts.layer_types]))
    beside = {*facts.rope} - {
        *nested,
        *_SHARED_KEYS,
    }  # with other keys it is a flat dictionary with something odd in it
    if layer_type is None and nested and PRIMARY_LAYER_TYPE not in nested and not beside:
        layer_type = nested[0]
    if layer_type is not None and layer_type not in known:
        if not known:
            raise ConfigError(f"layer_type={layer_type!r}: this config tells no layer types apart")
        raise ConfigError(f"layer_type={layer_type!r}: must be one of {', '.join(known)}")
    return replace(facts, layer_type=layer_type)


def _head_dim(complete: Mapping[str, Any]) -> int | None:
    size = config_head_dim(complete)
    return size if size is not None and size <= _MAX_HEAD_DIM else None


# ------------------------------------------------------------------------------------------------------- the scaling


def native_keys_of(rope_type: str) -> tuple[str, ...]:
    """The keys that a rope_type of transformers or of the released YaRN code has, beside those that all have."""
    released = "linear" if rope_type == "dynamic-linear" else "yarn"
    return NATIVE[released if rope_type in RELEASED_TYPES else rope_type].keys


def known_keys(facts: ConfigFacts) -> set[str] | None:
    """All keys that the RoPE dictionary may have; None where its rope_type says nothing about that."""
    rope_type = usual_name(facts.rope_type)
    if not isinstance(rope_type, str) or rope_type not in (*NATIVE, *RELEASED_TYPES):
        return None
    own = native_keys_of(rope_type)
    of_family = (*attention_keys(facts.model_type), *family_keys(facts.model_type, facts.entry))
    return {*own, *_SHARED_KEYS, "original_max_position_embeddings", *of_family}


def keys_that_nothing_reads(facts: ConfigFacts) -> list[str]:
    """Keys of RoPE in the config of a family whose class has no field for them."""
    fields = {f.name for f in dataclasses.fields(facts.built)}
    return sorted({*facts.text} & {"rope_scaling", "rope_parameters", "rope_theta"} - fields)


def _ignored_keys(facts: ConfigFacts) -> dict[str, Any]:
    """Keys of the RoPE dictionary that its rope_type does not have; transformers goes on without them."""
    known = known_keys(facts)
    if known is None:
        return {}
    if facts.nested:
        known |= {"truncate"}  # read_config itself says what becomes of it inside a layer type
    return {key: value for key, value in facts.entry.items() if key not in known and not isinstance(value, Mapping)}


def _without_ignored(facts: ConfigFacts) -> dict[str, Any]:
    """The completed config without the keys that are ignored in its RoPE dictionary."""
    if not facts.text:  # a RoPE dictionary without a model
        return {key: value for key, value in facts.rope.items() if key not in facts.ignored}
    config = copy.deepcopy(facts.complete)
    for place in ("rope_scaling", "rope_parameters"):
        rope = config.get(place)
        if isinstance(rope, dict):
            for part in (rope, *(rope[name] for name in nested_types(rope))):
                for name in facts.ignored:
                    part.pop(name, None)
    return config


def _with_scaling(facts: ConfigFacts) -> ConfigFacts:
    """The scaling that the config means, or why it means none."""
    facts = replace(facts, ignored=_ignored_keys(facts))
    if facts.built is not None and not has_rope(facts.built) and not keys_that_nothing_reads(facts):
        return facts  # nothing is said about RoPE, and there is none
    if facts.of_images:
        return facts
    try:
        settings = RopeSettings(_without_ignored(facts))
        own, notes = settings.of(facts.layer_type), settings.notes(facts.layer_type)
        known = settings.known_lengths(facts.layer_type)
    except _UNREADABLE as error:
        return replace(facts, read_error=error)
    return replace(facts, own=own, known=known, notes=tuple(notes))


# --------------------------------------------------------------------------------------------- layers and dimensions


def _with_layers(facts: ConfigFacts) -> ConfigFacts:
    """The differences between layers: which use RoPE, and with which scaling."""
    try:
        dropped = LayerPlan.from_config(facts.complete).drop_layers
    except _UNREADABLE:
        dropped = ()  # `read_error` says why
    by_design = layers_without_rope(facts.built) if facts.built is not None else []
    if set(facts.layer_types) & set(facts.nested):
        by_design += [index for index, kind in enumerate(facts.layer_types) if kind not in facts.nested]
    layers, errors = _layer_scalings(facts)
    return replace(
        facts,
        dropped=dropped,
        without_rope=tuple(sorted({*by_design, *dropped})),
        layers=layers if len(layers) > 1 else {},
        layer_errors=errors,
    )


def _layer_scalings(facts: ConfigFacts) -> tuple[dict[str, RopeScaling], dict[str, str]]:
    """The scaling of each layer type, where layer types are told apart, and what cannot be read."""
    record = facts.complete.get(RECORD_KEY)
    by_record = record.get("layers") if isinstance(record, Mapping) else None
    by_family = facts.model_type in ADAPTERS and ADAPTERS[facts.model_type].per_layer_type
    if not by_family and not facts.nested and not isinstance(by_record, Mapping):
        return {}, {}
    config = _without_ignored(facts)
    found: dict[str, RopeScaling] = {}
    errors: dict[str, str] = {}
    types = list(dict.fromkeys(facts.layer_types))
    if facts.nested:  # others have no RoPE; DeepSeek-V4's entries are called otherwise than its layers
        types = [name for name in types if name in facts.nested] or facts.nested
    for name in types:
        try:
            found[name] = RopeSettings(config).of(name)
        except _UNREADABLE as error:
            errors[name] = first_line(error)
    return found, errors


def _with_dimensions(facts: ConfigFacts, length: int | None) -> ConfigFacts:
    """The table of frequencies, at `length` tokens where they depend on it."""
    scaling = facts.scaling
    if scaling is None:
        return facts
    facts = replace(facts, shown=_shown_length(facts, scaling, length))
    if facts.head_dim is None:
        return facts
    try:
        theta = compute_rope(RopeScaling.from_spec("default", scaling), facts.head_dim)[0].double().tolist()
        scaled = compute_rope(scaling.of_frequencies, facts.head_dim, facts.shown)[0].double().tolist()
    except ConfigError as error:
        return replace(facts, dimensions_error=str(error))
    names = regimes_of(scaling, facts.head_dim, facts.shown)
    original = scaling.original_max_position_embeddings
    dimensions = (
        Dimension(
            index=index,
            wavelength=2 * math.pi / a if a else math.inf,  # a pair that the model does not turn at all
            rotations=None if original is None else original * a / (2 * math.pi),
            theta=a,
            scaled=b,
            divisor=a / b if b else None,
            regime=name,
        )
        for index, (a, b, name) in enumerate(zip(theta, scaled, names, strict=True))
    )
    return replace(facts, dimensions=tuple(dimensions))


def _shown_length(facts: ConfigFacts, scaling: RopeScaling, length: int | None) -> int | None:
    """The sequence length that the table of a length-dependent scaling is for."""
    original = scaling.original_max_position_embeddings
    if not scaling.is_length_dependent or original is None:
        return None
    if length is not None:
        return length
    longest = max(scaling.max_position_embeddings or 0, facts.context or 0)
    return longest if longest > original else 2 * original
