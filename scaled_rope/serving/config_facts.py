"""The RoPE settings of a config, read from two views of it: the dictionary that its author wrote, and the object that
transformers makes of it. Nothing is judged here; what cannot be read is kept as an error for the checks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers

from scaled_rope.errors import ConfigError, is_positive_whole
from scaled_rope.patching.families import ADAPTERS, layers_without_rope
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import (
    CUSTOM_ROPE_TYPE,
    NATIVE,
    PRIMARY_LAYER_TYPE,
    RECORD_KEY,
    ConfigNote,
    attention_keys,
    config_head_dim,
    nested_types,
    split_config,
    usual_name,
)
from scaled_rope.scaling.record import LayerPlan, RopeScaling, resolve_scaling
from scaled_rope.serving.inspect_report import Dimension, one_line, quiet
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
    """All layers without RoPE, by design of the family or dropped."""
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
    def window(self) -> int | None:
        """The sliding window in use, in tokens."""
        used = self.complete.get("use_sliding_window", True) is not False
        return _whole(self.complete.get("sliding_window")) if used else None

    @property
    def original_is_written(self) -> bool:
        """Whether the config says L, or its family does."""
        name = "original_max_position_embeddings"
        return any(place.get(name) is not None for place in (self.entry, self.complete))

    @property
    def known_to_transformers(self) -> bool:
        """Whether transformers has a config class for the model_type."""
        return self.model_type is not None and self.model_type in transformers.CONFIG_MAPPING


def _whole(value: Any) -> int | None:
    return int(value) if is_positive_whole(value) else None


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
    facts = _with_scaling(_with_layer_type(_read_views(raw, source), layer_type))
    scaling = resolve_scaling(spec, facts.own) if spec is not None and facts.own is not None else facts.own
    facts = replace(facts, spec=spec, scaling=scaling, head_dim=_head_dim(facts.complete))
    return _with_layers(_with_dimensions(facts, length))


# ---------------------------------------------------------------------------------------------------- the two views


def _read_views(raw: dict[str, Any], source: str) -> ConfigFacts:
    """The config as written and as transformers has it."""
    rope_error = ""
    try:
        text, rope = split_config(raw)
    except ConfigError as error:
        # A RoPE dictionary that is none: the rest can still be looked at.
        text, rope = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_scaling")}, {}
        rope_error = str(error)
    built, refusal = _build(raw)
    kind = text.get("model_type") or getattr(built, "model_type", None)
    model_type = kind if isinstance(kind, str) else None
    if model_type is None and not rope and not text.keys() & set(TOP_LEVEL_KEYS) and not rope_error:
        raise ConfigError(f"config {source!r} says nothing about a model: no model_type, no key of RoPE")
    filled = {name: getattr(built, name, None) for name in _SIZES} if built is not None else {}
    written = {name: value for name, value in text.items() if value is not None}
    return ConfigFacts(
        raw=raw,
        text=text,
        rope=rope,
        rope_error=rope_error,
        built=built,
        refusal=refusal,
        model_type=model_type,
        complete={name: value for name, value in filled.items() if value is not None} | written,
    )


def _build(raw: Mapping[str, Any]) -> tuple[Any, str]:
    """The config object that transformers makes of a dictionary, text part only, and why it makes none."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return None, ""
    own = copy.deepcopy(dict(raw))
    for values in (own, own.get("text_config")):
        if isinstance(values, dict) and CUSTOM_ROPE_TYPE in str(values.get("rope_parameters")):
            # Its numbers are ours to read; the rest of the config is of interest.
            del values["rope_parameters"]
    with quiet():
        try:
            config = transformers.CONFIG_MAPPING[model_type].from_dict(own).get_text_config()
            return (config, "") if isinstance(config, transformers.PreTrainedConfig) else (None, "no text config")
        except Exception as error:  # a config class raises whatever its checks raise, some wrapped in a headline
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            return None, reason.strip().removeprefix("ValueError: ").rstrip(".")


def _with_layer_type(facts: ConfigFacts, layer_type: str | None) -> ConfigFacts:
    """Raises ConfigError for a layer type that the model does not have."""
    known = list(dict.fromkeys([*facts.nested, *facts.layer_types]))
    if layer_type is not None and layer_type not in known:
        if not known:
            raise ConfigError(f"layer_type={layer_type!r}: this config tells no layer types apart")
        raise ConfigError(f"layer_type={layer_type!r}: must be one of {', '.join(known)}")
    return replace(facts, layer_type=layer_type)


def _head_dim(complete: Mapping[str, Any]) -> int | None:
    # The first is the rotated part of DeepSeek's heads.
    sizes = [_whole(complete.get(name)) for name in ("qk_rope_head_dim", "head_dim")]
    size = next((size for size in sizes if size is not None), None) or config_head_dim(complete)
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
    return {*own, *_SHARED_KEYS, "original_max_position_embeddings", *attention_keys(facts.model_type)}


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
    try:
        own, notes = RopeScaling.read_config(_without_ignored(facts), facts.layer_type)
    except _UNREADABLE as error:
        return replace(facts, read_error=error)
    return replace(facts, own=own, notes=tuple(notes))


# --------------------------------------------------------------------------------------------- layers and dimensions


def _with_layers(facts: ConfigFacts) -> ConfigFacts:
    """The differences between layers: which use RoPE, and with which scaling."""
    try:
        dropped = LayerPlan.from_config(facts.complete).drop_layers
    except _UNREADABLE:
        dropped = ()  # `read_error` says why
    by_design = layers_without_rope(facts.built) if facts.built is not None else []
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
    for name in list(dict.fromkeys(facts.layer_types)) or facts.nested:
        try:
            found[name] = RopeScaling.read_config(config, name)[0]
        except _UNREADABLE as error:
            errors[name] = one_line(error)
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
            wavelength=2 * math.pi / a,
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
