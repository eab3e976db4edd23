"""The scaling record: what to do to a model's rotary embedding, as plain validated data (no torch here)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from scaled_rope.errors import ConfigError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    MethodFn = Callable[["RopeScaling", int, Tensor, Tensor | None], tuple[Tensor, Tensor]]

Dialect = Literal["rope_parameters", "rope_scaling"]
Number = TypeVar("Number", float, "Tensor")

CUSTOM_ROPE_TYPE = "scaled-rope"
"""rope_type of a scaling that transformers cannot express. transformers refuses to build such a model,
which is what we want: the alternative is a model that runs with the wrong frequencies."""

_DEFAULT_ROPE_THETA = 10000.0
_RAMPS = ("dimension", "rotations")
_SPEC_ALIASES = {"none": "default", "unscaled": "default"}


@dataclass(frozen=True)
class Method:
    """One row of the registry `METHODS`: a scaling method and what it needs."""

    name: str
    fn: MethodFn
    """(scaling, dim, factor [...], seq_len [...] | None) -> (inv_freq [..., dim/2], attention [...])."""
    fields: frozenset[str]
    """The optional fields of `RopeScaling` that the method takes; any other one that is set is an error."""
    source: str
    """Where the formula is from."""
    summary: str
    """One line for tables and error messages."""
    params_type: type | None = None
    """A frozen dataclass that `RopeScaling.params` must fit, or None when the method has no parameters."""
    kind: Literal["frequency", "attention"] = "frequency"
    """"attention" methods change attention itself and have no table of frequencies."""
    length_dependent: bool = False
    """Whether frequencies depend on the sequence length even without `dynamic`."""
    needs_original: bool = False
    """Whether the formula contains L, that is `original_max_position_embeddings`."""


METHODS: dict[str, Method] = {}
"""Every method by name. Filled by the `@register` decorators of `scaled_rope.methods`."""


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
    dynamic: bool = False
    """Section 3.3 of the YaRN paper: s = max(factor, l'/L), l' the length of the sequence at hand."""
    dynamic_step: float | None = None
    """Reserved for stepped dynamic scaling; must be None."""
    attention_factor: float | None = None
    """An explicit sqrt(1/t) that multiplies cos and sin. It stays constant under `dynamic`."""
    resonance: bool = False
    """Reserved for rounding wavelengths to integers; must be False."""
    beta_fast: float | None = None
    """Rotations over L above which a frequency is kept (the paper's beta). Default 32."""
    beta_slow: float | None = None
    """Rotations over L below which a frequency is divided by s (the paper's alpha). Default 1."""
    mscale: float | None = None
    """m in the attention factor 0.1·m·ln(s) + 1. Default 1; the released Yarn-Mistral models use 0.7."""
    ramp: str | None = None
    """What the blend between kept and divided is linear in: "dimension" (default, the released code) or
    "rotations" (the paper's equations 18-20)."""
    truncate: bool | None = None
    """Whether the ends of the "dimension" ramp are rounded outwards to whole dimensions. Default True."""
    extrapolation_factor: float | None = None
    """Multiplies the kept share of every frequency, 0 to 1. Default 1; 0 is position interpolation."""
    params: dict[str, Any] = field(default_factory=dict, hash=False)
    """The method's own parameters, those that no other method shares."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        row = METHODS[self.method]
        self._check_values()
        if self.dynamic_step is not None:
            raise ConfigError(
                f"dynamic_step={self.dynamic_step!r}: only continuous dynamic scaling is available; use None"
            )
        for name in _METHOD_FIELDS:
            value = getattr(self, name)
            if value != _DEFAULTS[name] and name not in row.fields:
                taken = ", ".join(sorted(row.fields)) or "no such field"
                raise ConfigError(f"{name}={value!r}: not for method {self.method!r}, which takes {taken}")
        if self.original_max_position_embeddings is None and (row.needs_original or self.dynamic):
            raise ConfigError(
                f"original_max_position_embeddings is missing: {self._name!r} needs the length, in "
                "tokens, that the model was pre-trained with"
            )
        self._check_ramp()
        self._check_params(row)

    def _check_values(self) -> None:
        """Check each field by itself; store numbers as float, so that equal records are written equally."""
        for name, (low, low_is_allowed, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and _DEFAULTS[name] is None:
                continue
            is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < low or value > high or (value == low and not low_is_allowed):
                above = f"{'at least' if low_is_allowed else 'above'} {low:g}"
                below = f" and at most {high:g}" if math.isfinite(high) else ""
                raise ConfigError(f"{name}={value!r}: must be a finite number {above}{below}")
            object.__setattr__(self, name, float(value))
        for name in ("dynamic", "resonance", "truncate"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and _DEFAULTS[name] is None):
                raise ConfigError(f"{name}={value!r}: must be true or false")
        length = self.original_max_position_embeddings
        if length is not None:
            if not _is_positive_whole(length):
                raise ConfigError(f"original_max_position_embeddings={length!r}: must be a whole number, at least 1")
            object.__setattr__(self, "original_max_position_embeddings", int(length))
        if self.ramp is not None and self.ramp not in _RAMPS:
            raise unknown("ramp", self.ramp, _RAMPS)

    def _check_ramp(self) -> None:
        if self.ramp == "rotations" and self.truncate is not None:
            raise ConfigError(
                f"truncate={self.truncate!r}: ramp 'rotations' has no ends to round; it goes with ramp 'dimension'"
            )
        fast, slow = self.ramp_bounds
        if fast <= slow:
            raise ConfigError(f"beta_fast={fast:g}: must be above beta_slow={slow:g}")

    def _check_params(self, row: Method) -> None:
        if not isinstance(self.params, Mapping):
            raise ConfigError(f"params={self.params!r}: must be a mapping of names to values")
        names = [f.name for f in dataclasses.fields(row.params_type)] if row.params_type else []
        for name in self.params:
            if name not in names:
                raise unknown(f"parameter of method {self.method!r}", name, names or ["(it has none)"])
        object.__setattr__(self, "params", dict(self.params))
        if row.params_type is not None:
            row.params_type(**self.params)

    @property
    def ramp_bounds(self) -> tuple[float, float]:
        """(beta_fast, beta_slow) in rotations over L, defaults filled in."""
        fast = 32.0 if self.beta_fast is None else self.beta_fast
        slow = 1.0 if self.beta_slow is None else self.beta_slow
        return fast, slow

    @property
    def is_length_dependent(self) -> bool:
        """Whether the frequencies change with the length of the sequence at hand."""
        return self.dynamic or METHODS[self.method].length_dependent

    @property
    def max_position_embeddings(self) -> int | None:
        """L' = factor·L in tokens, or None when L is not known."""
        length = self.original_max_position_embeddings
        return None if length is None else int(self.factor * length)

    def rotary_dim(self, head_dim: int) -> int:
        """D, the number of rotated dimensions of a head. Raises ConfigError unless even and positive."""
        if not _is_positive_whole(head_dim):
            raise ConfigError(f"head_dim={head_dim!r}: must be a positive whole number")
        dim = int(head_dim * self.partial_rotary_factor)
        if dim < 2 or dim % 2:
            share = f" at partial_rotary_factor={self.partial_rotary_factor:g}" if dim != head_dim else ""
            raise ConfigError(f"head_dim={head_dim}: {dim} rotated dimensions{share}; must be even, at least 2")
        return dim

    @property
    def _name(self) -> str:
        return f"dynamic-{self.method}" if self.dynamic else self.method

    @property
    def label(self) -> str:
        """A short name for tables: "unscaled", "yarn x8", "dynamic-yarn", "yarn x8 (ramp=rotations)"."""
        if self.method == "default":
            return "unscaled"
        name = self._name if self.dynamic and self.factor == 1 else f"{self._name} x{self.factor:g}"
        shown = {n: getattr(self, n) for n in _METHOD_FIELDS if n not in ("factor", "dynamic")} | self.params
        options = [
            f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in shown.items() if v != _DEFAULTS.get(n)
        ]
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

        `base` describes the model as it was pre-trained and lends `rope_theta`, `partial_rotary_factor` and
        `original_max_position_embeddings` where the text does not give them. "none" is "default".
        """
        head, *options = [part.strip() for part in text.split(",")]
        name, _, factor = head.partition(":")
        method = name.removeprefix("dynamic-")
        method = _SPEC_ALIASES.get(method, method)
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        values: dict[str, Any] = {n: getattr(base, n) for n in _MODEL_FIELDS} | {"method": method}
        if name.startswith("dynamic-"):
            values["dynamic"] = True
        if factor or ":" in head:
            values["factor"] = _parse("factor", factor)
        for option in options:
            key, _, value = option.partition("=")
            if key not in _DEFAULTS or key == "params":
                raise unknown("scaling field", key, [n for n in _DEFAULTS if n != "params"])
            values[key] = _parse(key, value)
        takes_factor = "factor" in METHODS[method].fields
        if takes_factor and "factor" not in values and not values.get("dynamic"):
            raise ConfigError(f"scaling {text!r}: factor is missing; write for example '{method}:8'")
        return cls(**values)

    def is_native(self, head_dim: int | None = None) -> bool:
        """Whether transformers itself can express this scaling in `rope_parameters`.

        head_dim: dimensions per head of the model; given it, NTK-aware scaling is a change of `rope_theta`.
        """
        if self.is_length_dependent:
            return False
        if self.method in ("ntk-by-parts", "yarn"):
            return self.ramp in (None, "dimension") and self.extrapolation_factor in (None, 1.0)
        return self.method in ("default", "linear") or (self.method == "ntk" and head_dim is not None)

    def to_config(self, dialect: Dialect = "rope_parameters", head_dim: int | None = None) -> dict[str, Any]:
        """What to write into a model's config.

        dialect: "rope_parameters" (transformers 5) or "rope_scaling" (older, and other programs), in which
            `rope_theta` stays outside, on the config's top level.
        head_dim: dimensions per head of the model, see `is_native`.

        What transformers can express is written in its own words, YaRN always with its attention factor:
        NTK-by-parts is "yarn" with attention factor 1, NTK-aware is "default" with the base b'. Everything
        else gets `rope_type` "scaled-rope", which `from_config` reads without loss and transformers refuses.
        """
        if dialect not in ("rope_parameters", "rope_scaling"):
            raise unknown("dialect", dialect, ("rope_parameters", "rope_scaling"))
        # b' can only be told to a reader that takes rope_theta from the same dictionary.
        in_other_base = self.method == "ntk" and dialect == "rope_scaling"
        if self.is_native(head_dim) and not in_other_base:
            values = self._native_config(head_dim)
        else:
            values = {"rope_type": CUSTOM_ROPE_TYPE, **self.to_dict(), "rope_theta": self.rope_theta}
        if dialect == "rope_scaling":
            del values["rope_theta"]
            values["type"] = values["rope_type"]
        return values

    def _native_config(self, head_dim: int | None) -> dict[str, Any]:
        rope_type = {"ntk-by-parts": "yarn", "ntk": "default"}.get(self.method, self.method)
        theta = self.rope_theta
        if self.method == "ntk":
            assert head_dim is not None  # is_native said so
            theta = ntk_theta(theta, self.factor, self.rotary_dim(head_dim))
        values: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
        if self.partial_rotary_factor != 1.0:
            values["partial_rotary_factor"] = self.partial_rotary_factor
        if rope_type == "default":
            return values
        values["factor"] = self.factor
        if self.original_max_position_embeddings is not None:
            values["original_max_position_embeddings"] = self.original_max_position_embeddings
        if rope_type == "yarn":
            values["attention_factor"] = self._yarn_attention_factor()
            for name in ("beta_fast", "beta_slow", "truncate"):
                if getattr(self, name) is not None:
                    values[name] = getattr(self, name)
        return values

    def _yarn_attention_factor(self) -> float:
        if self.method == "ntk-by-parts":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return attention_factor_of(math.log(self.factor), 1.0 if self.mscale is None else self.mscale)

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None) -> RopeScaling:
        """Read a model's config: an object of transformers, a config.json as a dict, or `to_config`'s result.

        layer_type: which entry to read where `rope_parameters` is nested per layer type.

        Follows transformers 5.23: a missing original length is `max_position_embeddings`; `mscale` and
        `mscale_all_dim` count as their ratio when both are given; one alone is ignored, with a warning.
        A config without a scaling gives method "default". Raises ConfigError on an unknown type or key.
        """
        model, params = _split_config(config)
        params = _select_layer_type(params, layer_type)
        params = {key: value for key, value in params.items() if value is not None or key == "factor"}
        rope_type = params.pop("rope_type", params.get("type", "default"))
        for ignored in ("type", "finetuned"):
            params.pop(ignored, None)
        for name in ("rope_theta", "partial_rotary_factor"):
            if model.get(name) is not None:
                params.setdefault(name, model[name])
        if rope_type == CUSTOM_ROPE_TYPE:
            return cls.from_dict(params)
        if rope_type not in _NATIVE_KEYS:
            raise unknown("rope_type", rope_type, [*_NATIVE_KEYS, CUSTOM_ROPE_TYPE])
        known = {*_MODEL_FIELDS, *_NATIVE_KEYS[rope_type]}
        for name in params:
            if name not in known:
                raise unknown(f"key in the config of rope_type {rope_type!r}:", name, known)
        values = params | {"method": rope_type}
        # The top level wins over the RoPE dictionary, as in transformers, because Phi-3 keeps L there.
        lengths = (
            model.get("original_max_position_embeddings"),
            params.get("original_max_position_embeddings"),
            model.get("max_position_embeddings"),
        )
        values["original_max_position_embeddings"] = next((n for n in lengths if n is not None), None)
        if "factor" in known:
            values["factor"] = _read_factor(values, model.get("max_position_embeddings"))
        if rope_type == "yarn":
            told = {"beta_fast", "beta_slow", "attention_factor", "mscale"} & set(params)
            if model.get("model_type") == "mistral" and not told:
                warnings.warn(
                    "a Mistral config without beta_fast, beta_slow and attention_factor is read with Llama's constants;"
                    " the released Yarn-Mistral models need yarn:FACTOR,beta_fast=128,beta_slow=2,mscale=0.7",
                    stacklevel=2,
                )
            _read_attention_factor(values)
        return cls(**values)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RopeScaling)} | {"params": {}}
del _DEFAULTS["method"]
_MODEL_FIELDS = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
"""Fields that describe the model rather than the scaling."""
_METHOD_FIELDS = tuple(name for name in _DEFAULTS if name not in (*_MODEL_FIELDS, "params"))
_RANGES = {  # field: (lower limit, whether the limit itself is allowed, upper limit)
    "factor": (1.0, True, math.inf),
    "rope_theta": (1.0, False, math.inf),
    "partial_rotary_factor": (0.0, False, 1.0),
    "attention_factor": (0.0, False, math.inf),
    "beta_fast": (0.0, False, math.inf),
    "beta_slow": (0.0, False, math.inf),
    "mscale": (0.0, True, math.inf),
    "extrapolation_factor": (0.0, True, 1.0),
}
_NATIVE_KEYS: dict[str, tuple[str, ...]] = {  # rope_type of transformers: its keys beside the model's own
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


def ntk_theta(theta: float, factor: Number, dim: int) -> Number:
    """b' = b·s^(D/(D-2)), equation 16 of the YaRN paper; `factor` may be a tensor of any shape."""
    if dim < 4:
        raise ConfigError(f"{dim} rotated dimensions: method 'ntk' needs at least 4")
    base: Number = theta * factor ** (dim / (dim - 2))
    return base


def attention_factor_of(log_factor: Number, mscale: float) -> Number:
    """sqrt(1/t) = 0.1·mscale·ln(s) + 1 from ln(s), equation 22 of the YaRN paper (there mscale = 1)."""
    return 0.1 * mscale * log_factor + 1.0


def _is_positive_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _split_config(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's config as (its top level, its RoPE dictionary)."""
    if isinstance(config, Mapping):
        model = dict(config)
        if "model_type" not in model and ("rope_type" in model or "type" in model):
            return {}, model  # a RoPE dictionary by itself
    elif hasattr(config, "model_type"):
        names = (*_MODEL_FIELDS, "max_position_embeddings", "rope_parameters", "rope_scaling", "model_type")
        model = {name: getattr(config, name, None) for name in names}
    else:
        raise ConfigError(f"config of type {type(config).__name__}: must be a model's config or a dictionary")
    params = model.get("rope_parameters") or model.get("rope_scaling") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"rope_parameters={params!r}: must be a dictionary")
    return model, dict(params)


def _select_layer_type(params: dict[str, Any], layer_type: str | None) -> dict[str, Any]:
    nested = {key: value for key, value in params.items() if isinstance(value, Mapping) and key != "params"}
    if not nested:
        return params
    if layer_type not in nested:
        raise unknown("layer_type", layer_type, nested)
    return dict(nested[layer_type])


def _read_factor(values: dict[str, Any], max_position_embeddings: int | None) -> Any:
    """The factor; in yarn a null one is the ratio of the two lengths, as in transformers."""
    if "factor" not in values:
        raise ConfigError(f"factor is missing in the config of rope_type {values['method']!r}")
    original = values["original_max_position_embeddings"]
    if values["factor"] is None and values["method"] == "yarn" and original and max_position_embeddings:
        return max_position_embeddings / original
    return values["factor"]


def _read_attention_factor(values: dict[str, Any]) -> None:
    """Turn the two mscales of transformers into an attention factor; drop a factor that is the default."""
    mscale, mscale_all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if not isinstance(values["factor"], Real) or values["factor"] < 1:
        return  # RopeScaling reports it
    log_factor = math.log(values["factor"])
    if mscale and mscale_all_dim:
        ratio = attention_factor_of(log_factor, mscale) / attention_factor_of(log_factor, mscale_all_dim)
        values.setdefault("attention_factor", ratio)
    elif (mscale or mscale_all_dim) and "attention_factor" not in values:
        given = "mscale" if mscale else "mscale_all_dim"
        other = "mscale_all_dim" if mscale else "mscale"
        warnings.warn(f"{given} is ignored without {other}, as in transformers", stacklevel=3)
    if values.get("attention_factor") == attention_factor_of(log_factor, 1.0):
        del values["attention_factor"]  # the method's default, spelled out by to_config


def _parse(name: str, text: str) -> Any:
    """One value of a spec, by the type of its field."""
    try:
        if name in ("dynamic", "resonance", "truncate"):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if name == "original_max_position_embeddings":
            return int(text)
        return text if name == "ramp" else float(text)
    except (KeyError, ValueError):
        kind = "true or false" if name in ("dynamic", "resonance", "truncate") else "a number"
        raise ConfigError(f"{name}={text!r}: must be {kind}") from None
