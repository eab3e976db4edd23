"""The scaling record: what to do to a model's rotary embedding, as plain validated data (no torch here)."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scaled_rope.errors import ConfigError, is_number, is_positive_whole, unknown
from scaled_rope.scaling.formulas import attention_factor_of, longrope_attention_factor, ntk_theta
from scaled_rope.scaling.hf_config import (
    CUSTOM_ROPE_TYPE,
    MAX_THETA,
    NATIVE,
    RECORD_KEY,
    ConfigNote,
    comparable,
    config_head_dim,
    head_dim_of,
    layer_types_of,
    nested_types,
    primary_type,
    read_rope,
    split_config,
    unread_keys,
)
from scaled_rope.scaling.known_lengths import KnownLengths
from scaled_rope.scaling.registry import METHODS, Method
from scaled_rope.scaling.spec import Spec, shown

_DEFAULT_ROPE_THETA = 10000.0
_RAMPS = ("dimension", "rotations")
_TEMPERATURES = ("constant", "log", "llama4", "ministral")

_LARGEST_HEAD_DIM = 2**16
"""Far above any model's; beyond it a table alone would fill the memory."""


@dataclass(frozen=True)
class RopeScaling:
    """How to scale rotary position embeddings.

    `None` means the method's own default. A field that the method does not take is an error, as is any
    value that could not work: every record that exists can be used.

    Raises:
        ConfigError: in `__post_init__`, one line that names the field, its value and what is allowed.
    """

    method: str
    """A name in `METHODS`."""
    factor: float = 1.0
    """s = L'/L, at least 1. With `dynamic`, the smallest s (1 unless the model was fine-tuned with more)."""
    original_max_position_embeddings: int | None = None
    """L: the context length, in tokens, that the model was pre-trained with."""
    rope_theta: float = _DEFAULT_ROPE_THETA
    """b: the base of the unscaled frequencies b^(-2d/D)."""
    partial_rotary_factor: float = 1.0
    """The share of each head's dimensions that is rotated."""
    turning_fraction: float = 1.0
    """The share of the D/2 frequencies, from the highest, that the model turns at all; the others are 0 under every
    method. Below 1 in models with proportional RoPE (Gemma 4, LFM3)."""
    dynamic: bool = False
    """Section 3.3 of the YaRN paper: s = max(factor, l'/L), l' the length of the sequence at hand."""
    dynamic_step: float | None = None
    """With `dynamic`: s grows by steps, s = factor·stepᵏ with the least k >= 0 that covers l'/L, so that rotated keys
    stay right between steps. None: s follows l' token by token."""
    attention_factor: float | None = None
    """An explicit sqrt(1/t) that multiplies cos and sin. It stays constant under `dynamic`."""
    attention_temperature: str | None = None
    """A multiplier of attention logits besides the attention factor, on the query alone: "constant", "log", "llama4" or
    "ministral", see `scaled_rope.scaling.temperature`; None is 1. Composes with any method."""
    temperature_slope: float | None = None
    """The slope or beta in the formula of `attention_temperature`. Default: 1/ln L for "log", 0.1 for "llama4" and
    "ministral"; "constant" has none."""
    resonance: bool = False
    """Whether every wavelength is rounded to a whole number of tokens, on top of any method (Resonance RoPE)."""
    beta_fast: float | None = None
    """Rotations over L above which a frequency is kept (the paper's beta). Default 32."""
    beta_slow: float | None = None
    """Rotations over L below which a frequency is divided by s (the paper's alpha). Default 1."""
    mscale: float | None = None
    """m in the attention factor 0.1·m·ln(s) + 1. Default 1; the released Yarn-Mistral models use 0.7."""
    ramp: str | None = None
    """The quantity in which the blend between kept and divided frequencies is linear: "dimension" (default, the
    released code) or "rotations" (the paper's equations 18-20)."""
    truncate: bool | None = None
    """Whether the ends of the "dimension" ramp are rounded outwards to whole dimensions. Default True."""
    extrapolation_factor: float | None = None
    """Multiplies the kept share of every frequency, 0 to 1. Default 1; 0 is position interpolation."""
    params: dict[str, Any] = field(default_factory=dict, hash=False)
    """Parameters of this method alone, by name; see `scaled_rope.scaling.parameters`."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        row = METHODS[self.method]
        self._check_values()
        if self.dynamic and row.no_dynamic:
            raise ConfigError(f"dynamic=True: method {self.method!r} has no dynamic form, {row.no_dynamic}")
        if self.dynamic_step is not None and not self.dynamic:
            raise ConfigError(f"dynamic_step={self.dynamic_step:g}: is for dynamic scaling, such as dynamic-yarn")
        for name in _METHOD_FIELDS:
            value = getattr(self, name)
            modifies_any = (name == "resonance" and row.kind == "frequency") or name in _OF_ANY_METHOD
            if value != _DEFAULTS[name] and name not in row.fields and not modifies_any:
                taken = ", ".join(sorted(row.fields)) or "no such field"
                raise ConfigError(f"{name}={value!r}: not for method {self.method!r}, which takes {taken}")
        if self.original_max_position_embeddings is None and (row.needs_original or self.dynamic):
            raise ConfigError(
                f"original_max_position_embeddings is missing: {self._name!r} needs the length, in "
                "tokens, that the model was pre-trained with"
            )
        self._check_ramp()
        self._check_params(row)
        self._check_temperature(row)
        if row.below_original and getattr(self.method_params, row.below_original) >= self._trained_length:
            raise ConfigError(
                f"{row.below_original}={getattr(self.method_params, row.below_original)}: must be below the trained "
                f"length, {self._trained_length} tokens"
            )

    def _check_values(self) -> None:
        """Check each field by itself; store numbers as float, so that equal records are written equally."""
        for name, (low, low_is_allowed, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and _DEFAULTS[name] is None:
                continue
            if not is_number(value) or value < low or value > high or (value == low and not low_is_allowed):
                above = f"{'at least' if low_is_allowed else 'above'} {low:g}"
                below = f" and at most {high:g}" if math.isfinite(high) else ""
                raise ConfigError(f"{name}={value!r}: must be a finite number {above}{below}")
            object.__setattr__(self, name, float(value))
        for name in ("dynamic", "resonance", "truncate"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and _DEFAULTS[name] is None):
                raise ConfigError(f"{name}={value!r}: must be true or false")
        length: Any = self.original_max_position_embeddings
        if length is not None:
            if isinstance(length, float) and length.is_integer():  # JSON written by way of a float: 1200.0
                length = int(length)
            if not is_positive_whole(length) or length > MAX_LENGTH:
                raise ConfigError(
                    f"original_max_position_embeddings={length!r}: must be a whole number, at least 1 and at most 2^53"
                )
            object.__setattr__(self, "original_max_position_embeddings", int(length))
        if self.ramp is not None and self.ramp not in _RAMPS:
            raise unknown("ramp", self.ramp, _RAMPS)
        if self.attention_temperature is not None and self.attention_temperature not in _TEMPERATURES:
            raise unknown("attention_temperature", self.attention_temperature, ("none", *_TEMPERATURES))

    def _check_ramp(self) -> None:
        if self.ramp == "rotations" and self.truncate is not None:
            raise ConfigError(
                f"truncate={self.truncate!r}: ramp 'rotations' has no ends to round; it goes with ramp 'dimension'"
            )
        fast, slow = self.ramp_bounds
        if fast < slow:  # Kimi K2 has both at 1: the narrowest ramp there is
            raise ConfigError(f"beta_fast={fast:g}: must be at least beta_slow={slow:g}")

    def _check_temperature(self, row: Method) -> None:
        if self.params.get("logn"):  # the older name, of two methods, for the same thing
            if self.attention_temperature not in (None, "log"):
                raise ConfigError(f"logn=True: is attention_temperature 'log', not {self.attention_temperature!r}")
            object.__setattr__(self, "attention_temperature", "log")
            object.__setattr__(self, "params", {name: v for name, v in self.params.items() if name != "logn"})
        kind, slope, original = (
            self.attention_temperature,
            self.temperature_slope,
            self.original_max_position_embeddings,
        )
        if kind is None:
            if slope is not None:
                raise ConfigError(
                    f"temperature_slope={slope:g}: belongs to an attention_temperature, and there is none"
                )
            return
        if kind == "constant":
            if slope is None:
                raise ConfigError("temperature_slope is missing: attention_temperature 'constant' is 1 + slope·ln s")
            if "factor" not in row.fields or row.factor_times_original == "nothing":
                raise ConfigError(
                    f"attention_temperature='constant': is 1 + slope·ln s, and method {self.method!r} has no factor s "
                    "that is a ratio of lengths"
                )
            if slope and self.factor == 1 and not self.dynamic:
                raise ConfigError(
                    "factor=1: attention_temperature 'constant' is 1 + slope·ln s, so it is 1 whatever the slope; must "
                    f"be above 1, as in '{self.method}:8'"
                )
            return
        if original is None:
            raise ConfigError(
                f"original_max_position_embeddings is missing: attention_temperature {kind!r} needs the length, in "
                "tokens, that the model was pre-trained with"
            )
        if kind == "log" and slope is None and original < 2:
            raise ConfigError("original_max_position_embeddings=1: must be at least 2 for attention_temperature 'log'")

    def _check_params(self, row: Method) -> None:
        if not isinstance(self.params, Mapping):
            raise ConfigError(f"params={self.params!r}: must be a mapping of names to values")
        names = [f.name for f in dataclasses.fields(row.params_type)] if row.params_type else []
        for name in self.params:
            if name not in names:
                raise unknown(f"parameter of method {self.method!r}", name, names or ["(it has none)"])
        if row.params_type is None:
            object.__setattr__(self, "params", {})
            return
        for required in dataclasses.fields(row.params_type):
            if required.default is dataclasses.MISSING and required.name not in self.params:
                raise ConfigError(f"{required.name} is missing: method {self.method!r} needs it")
        parsed = row.params_type(**self.params)
        # Canonical: what differs from the defaults, so that equal scalings are equal records.
        fields = {f.name: f.default for f in dataclasses.fields(parsed)}
        values = {name: getattr(parsed, name) for name in fields}
        object.__setattr__(self, "params", {name: value for name, value in values.items() if value != fields[name]})

    @property
    def _trained_length(self) -> int:
        assert self.original_max_position_embeddings is not None  # checked for methods that need it
        return self.original_max_position_embeddings

    @property
    def ramp_bounds(self) -> tuple[float, float]:
        """(beta_fast, beta_slow) in rotations over L, defaults filled in."""
        fast = 32.0 if self.beta_fast is None else self.beta_fast
        slow = 1.0 if self.beta_slow is None else self.beta_slow
        return fast, slow

    @property
    def method_params(self) -> Any:
        """`params` as the method's own dataclass, defaults filled in; None when the method has none."""
        params_type = METHODS[self.method].params_type
        return None if params_type is None else params_type(**self.params)

    @property
    def static_attention_factor(self) -> float:
        """The multiplier of cos and sin at s = factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.method == "yarn":
            return attention_factor_of(math.log(self.factor), 1.0 if self.mscale is None else self.mscale)
        if self.method == "longrope":
            assert self.original_max_position_embeddings is not None  # validated
            return longrope_attention_factor(self.factor, self.original_max_position_embeddings)
        return 1.0

    @property
    def changes_attention(self) -> bool:
        """Whether the method changes attention itself and leaves the frequencies alone."""
        return METHODS[self.method].kind == "attention"

    @property
    def beyond_tables(self) -> str:
        """Why tables of cos and sin alone cannot express this scaling, in a few words; "" where they can."""
        if self.changes_attention:
            return "changes attention itself"
        if self.attention_temperature is not None:
            return f"with attention_temperature={self.attention_temperature} multiplies queries"
        return ""

    @property
    def effective_temperature_slope(self) -> float:
        """`temperature_slope`, the default filled in. 0 without an attention temperature."""
        if self.attention_temperature is None or self.temperature_slope is not None:
            return self.temperature_slope or 0.0
        if self.attention_temperature == "log":
            return 1 / math.log(self._trained_length)
        return _BETA

    @property
    def of_frequencies(self) -> RopeScaling:
        """The scaling of the frequencies: this one, or "default" (unscaled) under a method that changes attention."""
        if not self.changes_attention:
            return self
        return RopeScaling("default", **{name: getattr(self, name) for name in _MODEL_FIELDS})

    @property
    def is_length_dependent(self) -> bool:
        """Whether the frequencies change with the length of the sequence at hand."""
        return self.dynamic or METHODS[self.method].length_dependent

    @property
    def max_position_embeddings(self) -> int | None:
        """L' = factor·L in tokens, or None when L is not known. L for "dynamic-ntk", whose factor is no length.

        A checkpoint that carries "llama3" may be for more, see `RopeSettings.length_for`.
        """
        length = self.original_max_position_embeddings
        if length is None or METHODS[self.method].factor_times_original == "nothing":
            return length
        return int(self.factor * length)

    def rotary_dim(self, head_dim: int) -> int:
        """D, the number of rotated dimensions of a head. Raises ConfigError unless even and positive."""
        if not is_positive_whole(head_dim) or head_dim > _LARGEST_HEAD_DIM:
            raise ConfigError(
                f"head_dim={head_dim!r}: must be a whole number, at least 2 and at most {_LARGEST_HEAD_DIM}"
            )
        dim = int(head_dim * self.partial_rotary_factor)
        if dim < 2 or dim % 2:
            share = f" at partial_rotary_factor={self.partial_rotary_factor:g}" if dim != head_dim else ""
            raise ConfigError(f"head_dim={head_dim}: {dim} rotated dimensions{share}; must be even, at least 2")
        return dim

    @property
    def _name(self) -> str:
        # "dynamic-ntk" with a factor is a method of its own.
        name = f"dynamic-{self.method}" if self.dynamic else self.method
        return self.method if self.dynamic and name in METHODS and self.factor != 1 else name

    @property
    def label(self) -> str:
        """A short name for tables: "unscaled", "yarn x8", "dynamic-yarn", "yarn x8 (ramp=rotations)"."""
        name = "unscaled" if self.method == "default" else self._name
        no_factor = "factor" not in METHODS[self.method].fields or METHODS[self.method].factor_optional
        if not (self.factor == 1 and (self.dynamic or no_factor or self.method == "dynamic-ntk")):
            name = f"{name} x{shown(self.factor)}"
        values = {n: getattr(self, n) for n in _METHOD_FIELDS if n not in ("factor", "dynamic")} | self.params
        if self.dynamic and self._name == self.method:
            values["dynamic"] = True
        options = [f"{n}={shown(v)}" for n, v in values.items() if v != _DEFAULTS.get(n)]
        return f"{name} ({', '.join(options)})" if options else name

    def __repr__(self) -> str:
        return f"RopeScaling({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """The method and every field that differs from its default; fit for JSON."""
        values = dataclasses.asdict(self)
        return {n: v for n, v in values.items() if n == "method" or v != _DEFAULTS[n]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """The inverse of `to_dict`. Raises ConfigError on an unknown field."""
        known = ["method", *_DEFAULTS]
        for name in values:
            if name not in known:
                raise unknown("scaling field", name, known)
        if "method" not in values:
            raise ConfigError(f"method is missing; known: {', '.join(sorted(METHODS))}")
        return cls(**values)

    @classmethod
    def from_spec(cls, text: str, base: RopeScaling) -> RopeScaling:
        """Read "[dynamic-]METHOD[:FACTOR][,field=value...]", for example "yarn:8,ramp=rotations".

        `base` describes the model as it was pre-trained and lends `rope_theta`, `partial_rotary_factor`,
        `turning_fraction` and `original_max_position_embeddings` where the text does not give them. "none" is
        "default". The method's own parameters are fields as well; a list is written "1+1.5+2".
        """
        values = Spec.parse(text).values(known_fields=[name for name in _DEFAULTS if name != "params"])
        lent = {name: getattr(base, name) for name in _MODEL_FIELDS}
        if base.method == "proportional":
            lent["turning_fraction"] = base.method_params.fraction
        return cls(**(lent | values))

    def to_spec(self, model: RopeScaling | None = None) -> str:
        """The text that `from_spec` turns back into this static record.

        model: what the checkpoint carries that the text is for. Fields of the model in which this record differs, such
            as a corrected L, are written too; None: the record has them from the model.
        """
        same = [name for name in _MODEL_FIELDS if model is None or getattr(self, name) == getattr(model, name)]
        values = {
            name: value for name, value in self.to_dict().items() if name not in ("method", "factor", "params", *same)
        }

        def written(value: Any) -> str:
            if isinstance(value, list):
                return "+".join(map(written, value))
            if isinstance(value, bool):
                return str(value).lower()
            return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)

        fields = [(name, written(value)) for name, value in (values | self.params).items()]
        return str(Spec(self.method, f"{self.factor!r}".removesuffix(".0"), tuple(fields)))

    def is_native(self, head_dim: int | None = None) -> bool:
        """Whether transformers itself can express this scaling in `rope_parameters`.

        head_dim: dimensions per head of the model; given it, NTK-aware scaling is a change of `rope_theta`.
        """
        return native_type(self, head_dim) is not None

    def to_config(
        self,
        head_dim: int | None = None,
        rope_types: Container[str] = NATIVE,
    ) -> dict[str, Any]:
        """Return the dictionary to write into a model's config as `rope_parameters`.

        head_dim: dimensions per head of the model, see `is_native`.
        rope_types: the types of transformers that may be used.

        A scaling that transformers can express is written with its keys, YaRN always with its attention factor:
        NTK-by-parts is "yarn" with attention factor 1, NTK-aware is "default" with the base b'. Everything
        else gets `rope_type` "scaled-rope", which `from_config` reads without loss and transformers refuses.
        """
        rope_type = native_type(self, head_dim)
        if rope_type in rope_types and rope_type is not None:
            return native_words(self, rope_type, head_dim)
        return {"rope_type": CUSTOM_ROPE_TYPE, **self.to_dict(), "rope_theta": self.rope_theta}

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None) -> RopeScaling:
        """Read a model's config: an object of transformers, a config.json as a dict, or `to_config`'s result.

        layer_type: which entry to read where `rope_parameters` is nested per layer type; by default that of the
            full-attention layers.

        Follows transformers 5.23: a missing original length is `max_position_embeddings`; `mscale` and
        `mscale_all_dim` count as their ratio when both are given; one alone is ignored. The released YaRN
        checkpoints are read as the code that came with them would. What had to be assumed is warned about.
        A config without a scaling gives method "default". Raises ConfigError on an unknown type or key.
        """
        settings = RopeSettings(config)
        settings.warn(layer_type)
        return settings.of(layer_type)

    @classmethod
    def read_config(cls, config: Any, layer_type: str | None = None) -> tuple[RopeScaling, list[ConfigNote]]:
        """`from_config` with its remarks as values instead of warnings."""
        settings = RopeSettings(config)
        return settings.of(layer_type), settings.notes(layer_type)


@dataclass(frozen=True)
class LayerPlan:
    """Differences between the layers of a model: scalings by layer type, and layers without rotary embedding."""

    layers: dict[str, RopeScaling] = field(default_factory=dict, hash=False)
    """Layer type -> its scaling; empty when all layers have the same."""
    drop_layers: tuple[int, ...] = ()
    """Indices of the layers, from 0, that work without rotary embedding."""

    @classmethod
    def from_config(cls, config: Any) -> LayerPlan:
        """The plan that a config carries, in `rope_parameters` nested per layer type or in our own record.

        Raises:
            ConfigError: as `RopeScaling.from_config`, or our record in the config is malformed.
        """
        return RopeSettings(config).plan


_L = "original_max_position_embeddings"
_SIZES = (
    *("model_type", "head_dim", "qk_rope_head_dim", "hidden_size", "num_attention_heads", "num_hidden_layers"),
    *("layer_types", "rotary_dim", "max_position_embeddings"),
)
"""Sizes that the class of a family fills in where a config.json does not say them."""


def length_made_for(scaling: RopeScaling, own: RopeScaling, context: int | None) -> int | None:
    """`RopeSettings.length_for`, of a model whose config says the scaling `own` and the length `context` in tokens."""
    length = scaling.max_position_embeddings
    if length is None or METHODS[scaling.method].factor_times_original != "least":
        return length
    as_carried = replace(
        scaling, factor=own.factor, original_max_position_embeddings=own.original_max_position_embeddings
    )
    return length if as_carried != own else max(length, int((context or 0) * scaling.factor / own.factor))


class RopeSettings:
    """The settings of the rotary embedding in a model's config, which is read once, when this object is made.

    Raises:
        ConfigError: on creation, something that is no config; when a setting is asked for, as
            `RopeScaling.from_config`.
    """

    def __init__(self, config: Any, written: Mapping[str, Any] | None = None) -> None:
        """Read a config.

        config: as for `RopeScaling.from_config`.
        written: the config.json that an object of transformers was made from. Remarks are about this one, because
            transformers fills in values that it does not say.
        """
        self._model, self._rope = split_config(config)
        self._unread = unread_keys(config) if isinstance(config, Mapping) else {}
        self._filled_in = not isinstance(config, Mapping)
        self._written = None if written is None else self._as_written(written)
        self._read: dict[str | None, tuple[RopeScaling, list[ConfigNote], KnownLengths | None]] = {}

    def _as_written(self, written: Mapping[str, Any]) -> RopeSettings | None:
        """The settings of a config.json, with the sizes that the class of the family fills in; None for another
        model's."""
        try:
            text, _ = split_config(written)
        except ConfigError:  # transformers leaves out what cannot be read
            return None
        if text.get("model_type") not in (None, self._model.get("model_type")):
            return None
        said = {name: value for name, value in text.items() if value is not None}
        settings = RopeSettings({name: v for name, v in self._model.items() if name in _SIZES and v is not None} | said)
        for name, place in unread_keys(written).items():  # some classes of older families hand it on
            outer: Any = written
            for part in ("", *place.split(".")):
                outer = outer[part] if part else outer
                value = outer.get(name)
                if value is not None and not self._has(name, value):
                    settings._unread[name] = place
        return settings

    def _has(self, name: str, value: Any) -> bool:
        """Whether the RoPE dictionary says what a key of a config.json says."""
        said = {name: value} if name == "rope_theta" else comparable(value)
        here = comparable(self._rope) | {"rope_theta": self._rope.get("rope_theta")}
        return isinstance(said, Mapping) and all(here.get(key) == one for key, one in said.items())

    @property
    def model_type(self) -> str:
        return str(self._model.get("model_type"))

    @property
    def layer_types(self) -> list[str]:
        """The distinct layer types, in the order of their first layers; empty when the config lists none."""
        return layer_types_of(self._model)

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest text that the model is for, in tokens; None when the config doesn't say."""
        length = self._model.get("max_position_embeddings")
        return length if is_positive_whole(length) else None

    def length_for(self, scaling: RopeScaling) -> int | None:
        """The length in tokens that the model is for under a scaling; None when L is not known.

        Where factor·L is the least only ("llama3"), the config counts: under the scaling that it carries the model is
        for at least what it claims, under the same with k times the factor for k times as much. Under the scaling that
        it carries, a model is for the length that it is known for.

        Raises:
            ConfigError: as `RopeScaling.from_config`.
        """
        if scaling == self.scaling and self.reach is not None:
            return self.reach
        return length_made_for(scaling, self.scaling, self.max_position_embeddings)

    def known_lengths(self, layer_type: str | None = None) -> KnownLengths | None:
        """The lengths that are known of the model where the config does not say L; `of(layer_type)` has this L."""
        return self._reading(layer_type)[2]

    @property
    def reach(self) -> int | None:
        """How far the model reaches by the scaling that it carries, where that is known not to be factor times L."""
        known = self.known_lengths()
        return None if known is None else known.extended

    @property
    def num_hidden_layers(self) -> int:
        return int(self._model["num_hidden_layers"])

    @property
    def head_dim(self) -> int:
        """Dimensions per attention head. Raises ConfigError when the config doesn't say."""
        return head_dim_of(self._model)

    @property
    def scaling(self) -> RopeScaling:
        """The scaling of all layers, or of those of the primary type."""
        return self.of(None)

    def of(self, layer_type: str | None) -> RopeScaling:
        """The scaling of a layer type; for None, `scaling`."""
        return self._reading(layer_type)[0]

    def notes(self, layer_type: str | None = None) -> list[ConfigNote]:
        """Remarks on the config, among them what had to be assumed."""
        own = self._reading(layer_type)[1]
        try:
            said = [] if self._written is None else self._written.notes(layer_type)
        except ConfigError:  # transformers reads something in it that we do not
            return own
        if self._written is None:
            return own
        # The class of a family may have a base that is not known here.
        return [note for note in said if note.code not in ("no-theta", "family-theta") or note in own]

    def warn(self, layer_type: str | None = None) -> None:
        """Issue a Python warning for each remark of level "warning": an assumption that may be wrong."""
        for note in self.notes(layer_type):
            if note.level == "warning":
                warnings.warn(note.text, stacklevel=3)

    @functools.cached_property
    def plan(self) -> LayerPlan:
        """The differences between layers, see `LayerPlan.from_config`."""
        record = self._model.get(RECORD_KEY) or {}
        if not isinstance(record, Mapping):
            raise ConfigError(f"{RECORD_KEY}={record!r}: must be a dictionary")
        dropped = record.get("drop_layers", ())
        if not isinstance(dropped, list | tuple) or not all(
            index == 0 or is_positive_whole(index) for index in dropped
        ):
            raise ConfigError(f"drop_layers={dropped!r}: must be a list of layers' indices")
        layers = record.get("layers", {})
        if not isinstance(layers, Mapping):
            raise ConfigError(f"layers={layers!r}: must be a dictionary of layer types")
        types = nested_types(self._rope) or list(layers)
        return LayerPlan({name: self.of(name) for name in types}, tuple(map(int, dropped)))

    def _reading(self, layer_type: str | None) -> tuple[RopeScaling, list[ConfigNote], KnownLengths | None]:
        if layer_type not in self._read:
            reading = read_rope(self._model, self._rope, layer_type)
            if self._filled_in:  # max_position_embeddings in the place of an L that is on the top level alone
                filled = f"{_L}={self._model.get('max_position_embeddings')!r} in the RoPE dictionary is ignored"
                reading.notes = [note for note in reading.notes if not note.text.startswith(filled)]
            for name, place in self._unread.items():
                reading.note(
                    "outside-text", f"{name} outside of {place} is read by nobody: the model's text part counts"
                )
            scaling = RopeScaling.from_dict(reading.values)
            record = self._record(layer_type)
            if record is not None and record != scaling:
                if self._says(record, scaling, layer_type):
                    scaling = record
                else:
                    text = f"{RECORD_KEY} says {record.label!r}, but rope_parameters was changed since then"
                    reading.note("stale-record", f"{text}: the latter counts")
            self._read[layer_type] = scaling, reading.notes, reading.known
        return self._read[layer_type]

    def _record(self, layer_type: str | None) -> RopeScaling | None:
        """The record that `patch_model` put beside RoPE parameters from which it cannot be read back; None without."""
        record = self._model.get(RECORD_KEY)
        if isinstance(record, Mapping) and "layers" in record:
            layers = record["layers"]
            named = isinstance(layers, Mapping) and bool(layers)
            record = layers.get(layer_type or primary_type(list(layers))) if named else None
        if record is None:
            return None
        if not isinstance(record, Mapping):
            raise ConfigError(f"{RECORD_KEY}={record!r}: must be a dictionary")
        return RopeScaling.from_dict(record)

    def _says(self, record: RopeScaling, scaling: RopeScaling, layer_type: str | None) -> bool:
        """Whether the config's RoPE dictionary, which was read as `scaling`, is the one that `record` is written as."""
        nested = nested_types(self._rope)
        entry = self._rope[layer_type or primary_type(nested)] if nested else self._rope
        if entry.get("rope_type") == CUSTOM_ROPE_TYPE:
            # It is a record itself: that of this layer type, or of the primary one where all share a dictionary.
            return not nested and self._record(None) == scaling
        said = record.to_config(head_dim=config_head_dim(self._model))
        return all(entry.get(name) == said[name] for name in said)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RopeScaling)} | {"params": {}}
del _DEFAULTS["method"]
_MODEL_FIELDS = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "turning_fraction")
"""Fields that describe the model rather than the scaling."""
_METHOD_FIELDS = tuple(name for name in _DEFAULTS if name not in (*_MODEL_FIELDS, "params"))
# Far beyond what makes sense, and near enough that no formula leaves the range of float64.
MAX_LENGTH = 2**53
_OF_ANY_METHOD = ("dynamic_step", "attention_temperature", "temperature_slope")
"""Fields that no method has in its row and every method takes; others check that they make sense."""
_BETA = 0.1
"""The beta of Llama 4 and of Ministral 3."""
_RANGES = {  # field: (lower limit, whether the limit itself is allowed, upper limit)
    "factor": (1.0, True, 1e9),
    "dynamic_step": (1.0, False, 1e9),
    "rope_theta": (1.0, False, MAX_THETA),
    "partial_rotary_factor": (0.0, False, 1.0),
    "turning_fraction": (0.0, False, 1.0),
    "attention_factor": (1e-6, True, 1e6),
    "temperature_slope": (0.0, True, 1e3),
    "beta_fast": (1e-6, True, 1e9),
    "beta_slow": (1e-6, True, 1e9),
    "mscale": (0.0, True, 1e5),
    "extrapolation_factor": (0.0, True, 1.0),
}


def native_type(scaling: RopeScaling, head_dim: int | None) -> str | None:
    """The rope_type by which transformers can express a scaling, or None."""
    if scaling.dynamic or scaling.resonance or scaling.attention_temperature is not None:
        return None
    if scaling.turning_fraction != 1.0:
        as_proportional = scaling.method in ("default", "linear", "proportional")
        return "proportional" if as_proportional and scaling.partial_rotary_factor == 1.0 else None
    if scaling.method in ("ntk-by-parts", "yarn"):
        return "yarn" if scaling.ramp in (None, "dimension") and scaling.extrapolation_factor in (None, 1.0) else None
    if scaling.method == "abf":
        return "default"
    if scaling.method == "ntk":  # another base, which depends on the width
        if head_dim is None:
            return None
        theta = ntk_theta(scaling.rope_theta, scaling.factor, scaling.rotary_dim(head_dim))
        return "default" if theta <= MAX_THETA else None
    if scaling.method == "proportional" and scaling.partial_rotary_factor != 1.0:
        return None
    return next((name for name, native in NATIVE.items() if native.method == scaling.method), None)


def native_words(scaling: RopeScaling, rope_type: str, head_dim: int | None) -> dict[str, Any]:
    """Return `rope_parameters` for a scaling that transformers can express as `rope_type`."""
    theta = scaling.rope_theta
    if scaling.method == "ntk":
        assert head_dim is not None  # native_type said so
        theta = ntk_theta(theta, scaling.factor, scaling.rotary_dim(head_dim))
    elif scaling.method == "abf":
        theta = float(scaling.method_params.theta)
    values: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    if scaling.partial_rotary_factor != 1.0:
        values["partial_rotary_factor"] = scaling.partial_rotary_factor
    if rope_type == "default":
        return values
    values["factor"] = scaling.factor
    if scaling.original_max_position_embeddings is not None:
        # Where transformers has no use for it, it says so in its log and goes on.
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if rope_type == "yarn":
        values["attention_factor"] = scaling.static_attention_factor
        for name in ("beta_fast", "beta_slow", "truncate"):
            if getattr(scaling, name) is not None:
                values[name] = getattr(scaling, name)
    elif rope_type == "longrope":
        values["attention_factor"] = scaling.static_attention_factor
    elif rope_type == "proportional":
        fraction = scaling.method_params.fraction if scaling.method == "proportional" else 1.0
        values["partial_rotary_factor"] = min(fraction, scaling.turning_fraction)
    for name in NATIVE[rope_type].params:
        values[name] = getattr(scaling.method_params, name)
    return values
