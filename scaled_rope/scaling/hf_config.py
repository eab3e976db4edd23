"""Read the RoPE scaling from a model's config in any dialect; the table of transformers' own rope types.

Input and output are plain dictionaries; the record itself is `scaled_rope.scaling.record.RopeScaling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scaled_rope.errors import ConfigError, is_number, is_positive_whole, unknown
from scaled_rope.scaling.formulas import attention_factor_of, longrope_attention_factor, ntk_theta
from scaled_rope.scaling.known_lengths import DUAL_CHUNK_KEY, KnownLengths, known_lengths

CUSTOM_ROPE_TYPE = "scaled-rope"
"""rope_type of a scaling that transformers cannot express. transformers refuses to build such a model,
which is what we want: the alternative is a model that runs with the wrong frequencies."""
RECORD_KEY = "scaled_rope"
"""Key on the top level of a config for what `rope_parameters` cannot express: a scaling per layer, or a record that
could not be read back from transformers' own keys (NTK-aware is written as a larger base)."""
MAX_THETA = 1e30
"""The largest base of a record: far beyond what makes sense, and such that no formula leaves the range of float64."""
PRIMARY_LAYER_TYPE = "full_attention"
"""The type of layers that see the whole context. A scaling applies to these unless it says otherwise."""
_OTHER_PRIMARY_TYPES = ("compress", "hybrid", "indexed_attention")  # DeepSeek V4; Zaya; Dots 3
_MODEL_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class NativeType:
    """A `rope_type` of transformers: the method it stands for, and its config keys besides the model's own."""

    method: str
    keys: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    """The `keys` whose values go into the record's `params`."""


_YARN_KEYS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
NATIVE: dict[str, NativeType] = {
    "default": NativeType("default"),
    "linear": NativeType("linear", ("factor",)),
    "dynamic": NativeType("dynamic-ntk", ("factor",)),
    "yarn": NativeType("yarn", _YARN_KEYS),
    "llama3": NativeType(
        "llama3", ("factor", "low_freq_factor", "high_freq_factor"), ("low_freq_factor", "high_freq_factor")
    ),
    "longrope": NativeType(
        "longrope", ("factor", "attention_factor", "short_factor", "long_factor"), ("short_factor", "long_factor")
    ),
    "proportional": NativeType("proportional", ("factor",)),
}
"""The rope types of transformers 5.23."""
# Types of configs that were written for code in the checkpoint: that of the released YaRN models, and LongRoPE's first.
_RELEASED_TYPES = {"dynamic-yarn": "yarn", "dynamic-linear": "linear", "ntk-by-parts": "ntk-by-parts"}
_TYPE_ALIASES = {"su": "longrope", "mrope": "default", "xdrope": "dynamic"}  # the last two: Qwen2-VL's, HunYuan-VL's
MISTRAL_CONSTANTS = {"beta_fast": 128.0, "beta_slow": 2.0, "mscale": 0.7}
"""Constants built into the code released with the Yarn-Mistral models; the code for Llama has 32, 1 and 1."""
# Values that a family's config.json may leave out, as transformers 5.23 fills them in; 10000 and 1 where none is given.
FAMILY_THETA: dict[str, float | dict[str, float]] = {
    "cohere": 5e5,
    "falcon": 1e4,
    "gemma": 1e4,
    "gemma2": 1e4,
    "gemma3_text": {"full_attention": 1e6, "sliding_attention": 1e4},
    "glm": 1e4,
    "glm4": 1e4,
    "glm4_moe": 1e4,
    "gpt_neox": 1e4,
    "gpt_oss": 1.5e5,
    "llama": 1e4,
    "cohere2": 1e4,
    "mistral": 1e4,
    "mixtral": 1e6,
    "nemotron": 1e4,
    "olmo": 1e4,
    "olmo2": 1e4,
    "olmo3": 5e5,
    "persimmon": 1e4,
    "phi": 1e4,
    "phi3": 1e4,
    "qwen2": 1e4,
    "qwen2_moe": 1e4,
    "qwen3": 1e4,
    "qwen3_5_moe_text": 1e4,
    "qwen3_5_text": 1e4,
    "qwen3_moe": 1e4,
    "qwen3_next": 1e4,
    "smollm3": 2e6,
    "stablelm": 1e4,
}
FAMILY_PARTIAL = {
    **{"gpt_neox": 0.25, "stablelm": 0.25, "phi": 0.5, "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "nemotron": 0.5},
    **{"persimmon": 0.5, "qwen3_5_moe_text": 0.25, "qwen3_5_text": 0.25, "qwen3_next": 0.25},
}
FAMILY_SCALING: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
}
_FAMILY_ORIGINAL = {"phi3": 4096}
_ALIASES = {  # other names of top-level keys; there the usual names mean nothing
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
}
# Keys of the RoPE dictionary that say nothing about frequencies: the first is read by attention, the other by nobody.
_ATTENTION_KEYS = ("llama_4_scaling_beta", "max_position_embeddings")
_ATTENTION_KEY_FAMILIES = ("ministral3", "mistral4")
# How multimodal models share the frequencies among the axes of time, height and width. All axes of a text token are at
# the same position, so for text this is plain RoPE.
_AXIS_KEYS = ("mrope_section", "mrope_interleaved", "interleaved", "xdrope_section")
_TEXT_PARTS = ("thinker_config", "vlm_config", "text_config", "llm_config", "language_config")
"""Keys of a composite config.json that lead to its text part, each where the ones before are not there."""
_ALPHA_FAMILIES = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hunyuan_vl_text")
"""Families whose type "dynamic" has a fixed factor, `alpha`: NTK-aware scaling at every length."""
_ROTARY_DIM_FAMILIES = ("minimax_m2",)
"""Families whose published configs say the rotated dimensions themselves, `rotary_dim`."""
SOFTMAX_MSCALE_FAMILIES = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    *("hy_v4", "hy_v4_vl_text", "longcat_flash", "minicpm3", "mistral4", "mistral_large4_text", "youtu"),
)
"""Families whose attention, when it is built, multiplies its softmax scale by (0.1·mscale_all_dim·ln s + 1)²."""
_LOCAL_THETA = "rope_local_base_freq"  # Gemma 3's older name for the base of its sliding layers
NESTED_FAMILIES = ("gemma3_text", "olmo3")


@dataclass(frozen=True)
class ConfigNote:
    """A remark on a config: what was assumed, or what does not do what its author may have meant."""

    code: str
    text: str
    level: Literal["info", "warning"] = "warning"


@dataclass
class Reading:
    """The result of reading a config: the fields of a record, and remarks."""

    values: dict[str, Any]
    notes: list[ConfigNote] = field(default_factory=list)
    known: KnownLengths | None = None
    """The lengths that are known of the model where the config does not say L; the record has this L."""

    def note(self, code: str, text: str, level: Literal["info", "warning"] = "warning") -> None:
        self.notes.append(ConfigNote(code, text, level))


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its decoder of text; the config itself where it has no parts, or
    is no object of transformers."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def split_config(config: Any) -> tuple[dict[str, Any], Any]:
    """Split a config (object of transformers or dictionary) into its top level, text part only, and RoPE dictionary.

    Raises:
        ConfigError: the config is neither of the two.
    """
    config = text_config(config)
    if isinstance(config, Mapping):
        model: dict[str, Any] = {str(key): value for key, value in config.items()}
        nested = bool(model) and len(nested_types(model)) == len(model) and not text_path(model)
        by_itself = "rope_type" in model or "type" in model or "factor" in model or nested
        if "model_type" not in model and by_itself and not (model.keys() & _ROPE_KEYS):
            return {}, model  # a RoPE dictionary without a model
        for name in text_path(model):
            model = {str(key): value for key, value in model[name].items()}
    elif hasattr(config, "model_type"):
        names = [*_MODEL_KEYS, "max_position_embeddings", "rope_parameters", "model_type", RECORD_KEY]
        names += ["head_dim", "qk_rope_head_dim", "hidden_size", "num_attention_heads"]
        names += ["layer_types", "num_hidden_layers", "rotary_dim", DUAL_CHUNK_KEY]
        model = {name: _single(config, name) for name in names}
    else:
        raise ConfigError(f"config of type {type(config).__name__}: must be a model's config or a dictionary")
    # Both dialects present: transformers lets the older one win.
    for name in _ROPE_KEYS:
        if model.get(name) is not None and not isinstance(model[name], Mapping):
            raise ConfigError(f"{name}={model[name]!r}: must be a dictionary")
    rope = model.get("rope_scaling") or model.get("rope_parameters") or {}
    rope = {str(key): value for key, value in rope.items()}
    unused = unused_types(rope, model.get("layer_types"))
    return model, {key: value for key, value in rope.items() if key not in unused}


def unused_types(rope: Mapping[str, Any], layer_types: Any) -> set[str]:
    """The layer types of a RoPE dictionary that no layer has, so that nothing computes their entries.

    transformers' classes write them all the same: Gemma 3's one for full attention where the few layers all slide.
    Where no layer has any of them they are no layer types, but uses of another kind, as in DeepSeek V4.
    """
    nested = nested_types(rope)
    present = {name for name in nested if isinstance(layer_types, list | tuple) and name in layer_types}
    return set(nested) - present if present else set()


def comparable(rope: Any) -> Any:
    """A RoPE dictionary without the base, in a form to compare; other values as they are."""
    if not isinstance(rope, Mapping):
        return rope
    values = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    return values | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}


def text_path(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that lead from the top of a config.json to its text part; empty where the top is the text part.

    What a composite config says about RoPE outside of its text part is read by nobody.
    """
    path: tuple[str, ...] = ()
    while True:
        name = next((name for name in _TEXT_PARTS if isinstance(model.get(name), Mapping)), None)
        if name is None:
            return path
        path, model = (*path, name), model[name]


def unread_keys(model: Mapping[str, Any], path: tuple[str, ...] | None = None) -> dict[str, str]:
    """Keys of RoPE outside of the text part of a composite config.json, and the name of that part.

    path: where the text part is, if not at `text_path`.
    """
    path = text_path(model) if path is None else path
    place = ".".join(path)
    found: dict[str, str] = {}
    for name in path:
        if not isinstance(model.get(name), Mapping):
            return {}  # an older config, with the text part on the top level
        found |= {key: place for key in (*_ROPE_KEYS, "rope_theta") if model.get(key)}
        model = model[name]
    return found


def _single(config: Any, name: str) -> Any:
    """A field of a config object; None also where it differs between the layers (head_dim in Gemma 4)."""
    try:
        return attribute(config, name)
    except ConfigError:
        return None


def attribute(config: Any, name: str) -> Any:
    """A field of a config object of transformers; None when it has no such field.

    Raises:
        ConfigError: the field differs between layers (Gemma 4), so transformers gives no single value.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError as error:
        raise ConfigError(f"{name} differs between the layers of this {config.model_type} model") from error


def config_head_dim(config: Any) -> int | None:
    """Dimensions per attention head, from a model's config (object or dictionary); None when it doesn't say."""

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else attribute(config, name)

    rotated, head_dim = get("qk_rope_head_dim"), get("head_dim")
    if rotated is not None:  # multi-head latent attention rotates a part that is kept apart
        if is_positive_whole(rotated) and is_positive_whole(head_dim) and rotated != head_dim:
            # Mistral 4 says the share of that part in the whole head as well.
            shares = [part.get("partial_rotary_factor") for part in _rope_dictionaries(get)]
            if any(is_number(share) and int(head_dim * share) == rotated for share in shares):
                return int(head_dim)
        return int(rotated) if is_positive_whole(rotated) else None
    if head_dim is not None:
        return int(head_dim) if is_positive_whole(head_dim) else None
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    return int(hidden) // int(heads) if is_positive_whole(hidden) and is_positive_whole(heads) else None


def head_dim_of(config: Any) -> int:
    """Dimensions per attention head, from a model's config (object or dictionary).

    Raises:
        ConfigError: the config does not say.
    """
    head_dim = config_head_dim(config)
    if head_dim is None:
        kind = config.get("model_type") if isinstance(config, Mapping) else config.model_type
        raise ConfigError(f"model_type {str(kind)!r}: its config says neither head_dim nor hidden_size")
    return head_dim


def layer_types_of(config: Any) -> list[str]:
    """The distinct layer types of a model's config (object or dictionary), in the order of their first layers; empty
    when it lists none."""
    types = config.get("layer_types") if isinstance(config, Mapping) else getattr(config, "layer_types", None)
    return list(dict.fromkeys(types or ()))


def _rope_dictionaries(get: Callable[[str], Any]) -> list[Mapping[str, Any]]:
    """The RoPE dictionaries of a config, one per layer type where they are nested."""
    found: list[Mapping[str, Any]] = []
    for rope in map(get, _ROPE_KEYS):
        if isinstance(rope, Mapping):
            found += [rope, *(rope[name] for name in nested_types(rope))]
    return found


def nested_types(rope: Mapping[str, Any]) -> list[str]:
    """The layer types that a RoPE dictionary has an entry for; empty when it is flat."""
    return [key for key, value in rope.items() if isinstance(value, Mapping) and key != "params"]


def primary_type(types: Sequence[str]) -> str:
    """Of the types of layers of a model, the one that a scaling is for where nothing else is said: the layers that see
    the whole context, or else the first type."""
    return next((name for name in (PRIMARY_LAYER_TYPE, *_OTHER_PRIMARY_TYPES) if name in types), types[0])


def has_rope(config: Any) -> bool:
    """Whether a config of transformers has RoPE parameters; those of GPT-2 and BERT, for example, have none."""
    if hasattr(type(config), "rope_parameters"):
        return True
    # Cohere 2 MoE's class makes them from rope_theta and rope_scaling, its own fields.
    return hasattr(type(config), "rope_theta") and isinstance(vars(config).get("rope_parameters"), Mapping)


def attention_keys(model_type: object) -> tuple[str, ...]:
    """Keys of a family's RoPE dictionary that do not affect frequencies; for None, those of all families."""
    attention = _ATTENTION_KEYS if model_type is None or model_type in _ATTENTION_KEY_FAMILIES else ()
    return (*attention, *_AXIS_KEYS)


def own_temperature(config: Any) -> str:
    """The key of a config of transformers by which the family's own attention multiplies queries as they get further,
    as KEY=VALUE; "" where it does not."""
    rope = attribute(config, "rope_parameters")
    beta = rope.get("llama_4_scaling_beta") if isinstance(rope, Mapping) else None
    if beta and "llama_4_scaling_beta" in attention_keys(attribute(config, "model_type")):
        return f"llama_4_scaling_beta={beta}"
    tuned = attribute(config, "attn_temperature_tuning")
    return f"attn_temperature_tuning={tuned}" if tuned else ""


def family_keys(model_type: object, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a RoPE dictionary that its rope_type has in this family alone, or that repeat what another key says."""
    rope_type = usual_name(entry.get("rope_type", entry.get("type", "default")))
    if rope_type == "dynamic" and model_type in _ALPHA_FAMILIES and entry.get("alpha"):
        return ("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    names = ("short_mscale", "long_mscale")
    factor = entry.get("attention_factor")
    repeated = rope_type == "longrope" and all(entry.get(name, factor) == factor for name in names)
    return names if (model_type == "phimoe" and rope_type != "default") or repeated else ()


def read_by_attention(rope: Any) -> dict[str, Any]:
    """Entries of the RoPE dictionary that attention reads in every pass, or the rotary module for images and video.

    With `llama_4_scaling_beta`, attention reads L as well. Empty for most families.
    """
    if not isinstance(rope, Mapping):
        return {}
    names: tuple[str, ...] = _AXIS_KEYS
    if _ATTENTION_KEYS[0] in rope:
        names += (*_ATTENTION_KEYS, "original_max_position_embeddings")
    return {name: rope[name] for name in names if name in rope}


def read_rope(model: Mapping[str, Any], rope: Mapping[str, Any], layer_type: str | None = None) -> Reading:
    """Read the fields of a `RopeScaling` and remarks from a model's config; see `RopeScaling.from_config`.

    model, rope: the two parts that `split_config` returns.

    Raises:
        ConfigError: a type or key is unknown or missing.
    """
    reading = Reading({})
    if model.get("rope_scaling") and model.get("rope_parameters"):
        same = comparable(model["rope_scaling"]) == comparable(model["rope_parameters"])
        text = "rope_scaling and rope_parameters are both present; rope_scaling counts"
        reading.note("both-dialects", text, "info" if same else "warning")
    model = _rename(dict(model), reading)
    entry, layer_type = _entry(model, dict(rope), layer_type, reading)
    entry = {key: value for key, value in entry.items() if value is not None or key == "factor"}
    for name in attention_keys(model.get("model_type")):
        if name in entry:
            text = f"{name}={entry.pop(name)!r} says nothing about frequencies: it is left to the model's attention"
            if name in _AXIS_KEYS:
                text = text.replace("it is left", "all axes of a text token are alike, and it is left")
            reading.note("attention-key", text, "info")
    rope_type, finetuned = _type_of(entry, reading)
    if rope_type == CUSTOM_ROPE_TYPE:
        entry.setdefault("partial_rotary_factor", 1.0)  # a record leaves out what is 1
    _fill_from_top_level(entry, model, layer_type, reading)
    if rope_type == CUSTOM_ROPE_TYPE:
        reading.values = entry
        return reading
    if rope_type == "axial":
        raise ConfigError("rope_type 'axial' is of two dimensions, for images: there is no context to extend")
    if usual_name(rope_type) == "dynamic" and model.get("model_type") in _ALPHA_FAMILIES and entry.get("alpha"):
        reading.values = _read_alpha(entry, model, reading)
        return reading
    _read_mscales(entry, model, usual_name(rope_type), reading)
    if rope_type == "yarn":
        _check_attn_factor(entry)
    native = _native_of(rope_type)
    known = {*_MODEL_KEYS, *native.keys}
    for name in entry:
        if name not in known:
            raise unknown(f"key in the config of rope_type {usual_name(rope_type)!r}:", name, known)
    _fill_values(entry, model, native, rope_type, layer_type is not None, finetuned, reading)
    return reading


def _type_of(entry: dict[str, Any], reading: Reading) -> tuple[str, bool]:
    """Take out of a RoPE dictionary its rope_type, and whether the model was fine-tuned with it; return both."""
    older_type = entry.pop("type", "default")
    rope_type = entry.pop("rope_type", older_type)
    if usual_name(older_type) not in ("default", usual_name(rope_type)):
        reading.note("two-values", f"type={older_type!r} is ignored: rope_type={rope_type!r} counts")
    finetuned = False if rope_type == CUSTOM_ROPE_TYPE else entry.pop("finetuned", False)
    if not isinstance(finetuned, bool):
        raise ConfigError(f"finetuned={finetuned!r}: must be true or false")
    return rope_type, finetuned


def usual_name(rope_type: Any) -> Any:
    """The name that transformers has for a rope_type with another name in older configs; others as they are."""
    return _TYPE_ALIASES.get(rope_type, rope_type) if isinstance(rope_type, str) else rope_type


def _native_of(rope_type: object) -> NativeType:
    """The method and the keys of a rope_type. Raises ConfigError on an unknown one."""
    known = [*NATIVE, *_RELEASED_TYPES, *_TYPE_ALIASES, CUSTOM_ROPE_TYPE]
    if not isinstance(rope_type, str) or rope_type not in known:
        raise unknown("rope_type", rope_type, known)
    if rope_type in _RELEASED_TYPES:
        method = _RELEASED_TYPES[rope_type]
        return NativeType(method, NATIVE["yarn" if method != "linear" else "linear"].keys)
    return NATIVE[usual_name(rope_type)]


def _fill_values(
    entry: dict[str, Any],
    model: dict[str, Any],
    native: NativeType,
    rope_type: str,
    is_nested: bool,
    finetuned: bool,
    reading: Reading,
) -> None:
    """Set the fields of a record in `reading`: from the RoPE dictionary of a known type, missing ones filled in."""
    dynamic = rope_type.startswith("dynamic-")
    rope_type = usual_name(rope_type)
    values = {name: value for name, value in entry.items() if name not in native.params}
    values["method"] = native.method
    params = {name: entry[name] for name in native.params if name in entry}
    _fill_original(values, model, rope_type, is_nested, reading)
    if "factor" in native.keys:
        _fill_factor(values, model, rope_type)
    if native.method == "proportional":
        # There the factor is the share of turning pairs in a table over the whole head.
        params["fraction"] = values.pop("partial_rotary_factor", 1.0)
    if params:
        values["params"] = params
    if dynamic:
        _fill_dynamic(values, finetuned, reading)
    if native.method == "yarn" and not dynamic:
        _apply_mistral_constants(values, model, finetuned, reading)
    if native.method in ("yarn", "ntk-by-parts"):
        _fill_attention_factor(values, rope_type, reading)
    elif native.method == "longrope":
        _drop_default_longrope_factor(values)
    reading.values = values


def _read_alpha(entry: dict[str, Any], model: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The record of HunYuan's NTK-aware scaling with a fixed factor, as a change of the base."""
    alpha, dim = entry["alpha"], config_head_dim(model)
    if not is_number(alpha) or alpha < 1:
        raise ConfigError(f"alpha={alpha!r}: must be a finite number, at least 1")
    if dim is None:
        raise ConfigError(f"alpha={alpha!r}: needs the model's head_dim, from which the base follows")
    theta = float(entry["rope_theta"])
    base = ntk_theta(theta, float(alpha), dim)
    reading.note("alpha", f"alpha={alpha!r} is NTK-aware scaling at every length: the base is {base:.6g}", "info")
    for name in sorted(entry.keys() - {"alpha", "rope_theta"}):
        if entry[name] != 1:
            reading.note("two-values", f"{name}={entry[name]!r} is ignored: alpha counts", "info")
    original = model.get("max_position_embeddings")
    return {
        "method": "abf",
        "rope_theta": theta,
        "original_max_position_embeddings": original,
        "params": {"theta": base},
    }


def _read_mscales(entry: dict[str, Any], model: dict[str, Any], rope_type: object, reading: Reading) -> None:
    """Turn LongRoPE's `short_mscale` and `long_mscale` into an attention factor, or take them out where they are one.

    Phi-3.5-MoE multiplies cos and sin by them instead of the attention factor, up to L and beyond. vLLM and SGLang read
    them in all families; transformers in no other.
    """
    names = ("short_mscale", "long_mscale")
    given = {name: entry[name] for name in names if name in entry}
    if model.get("model_type") == "phimoe" and rope_type != "default":
        if len(given) < 2:
            return  # an unknown key, or a config that its class refuses
        if given["short_mscale"] != given["long_mscale"]:
            said = " and ".join(f"{name}={value!r}" for name, value in given.items())
            raise ConfigError(f"{said}: a record has one attention factor for all lengths, so they must be equal")
        if rope_type not in ("longrope", "yarn"):
            if given["short_mscale"] != 1:
                raise ConfigError(f"short_mscale={given['short_mscale']!r}: not for rope_type {rope_type!r}, only 1")
            for name in given:
                del entry[name]
            return
        other = entry.get("attention_factor")
        if other not in (None, given["short_mscale"]):
            reading.note("two-values", f"attention_factor={other!r} is ignored: short_mscale and long_mscale count")
        entry["attention_factor"] = given["short_mscale"]
    elif rope_type != "longrope" or any(value != entry.get("attention_factor") for value in given.values()):
        return
    for name in given:
        del entry[name]


def _check_attn_factor(entry: dict[str, Any]) -> None:
    """Take out YaRN's `attn_factor`, a multiplier of 0.1·ln(s) + 1 for SGLang, where it says the same as other keys.

    Raises:
        ConfigError: it says something else, so programs differ in the attention factor.
    """
    value: Any = entry.get("attn_factor")
    factor: Any = entry.get("factor")
    whole: Any = entry.get("attention_factor", 1.0)
    if not is_number(value) or not is_number(factor) or not is_number(whole) or factor < 1:
        return  # unknown keys and bad values are reported where all are
    default = attention_factor_of(math.log(factor), 1.0)
    if not math.isclose(value * default, entry.get("attention_factor", default), rel_tol=1e-5):
        raise ConfigError(
            f"attn_factor={value!r}: SGLang multiplies 0.1·ln(s) + 1 by it, transformers ignores it; "
            "`scaled-rope repair` writes which of the two is meant"
        )
    del entry["attn_factor"]


def _fill_dynamic(values: dict[str, Any], finetuned: bool, reading: Reading) -> None:
    """Make the scaling dynamic. The smallest s of the released types is 1 unless the model was fine-tuned with more."""
    values["dynamic"] = True
    if not finetuned and is_number(values["factor"]):
        if values["factor"] != 1:
            reading.note(
                "dynamic-factor", f"factor={values['factor']!r} has no effect without finetuned: s = max(1, l'/L)"
            )
        values["factor"] = 1.0


def _rename(model: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Rename a family's top-level keys to the names that most families use."""
    family = model.get("model_type")
    for old, new in _ALIASES.get(str(family), {}).items():
        ignored = model.pop(new, None)
        if ignored not in (None, model.get(old)):
            reading.note("other-name", f"{new}={ignored!r} is ignored: its name in {family} models is {old}")
        model[new] = model.get(old)
    return model


def _entry(
    model: dict[str, Any], rope: dict[str, Any], layer_type: str | None, reading: Reading
) -> tuple[dict[str, Any], str | None]:
    """Return the RoPE dictionary of one layer type, and the name of that type (None: all layers share it)."""
    family = model.get("model_type")
    nested = nested_types(rope)
    if not nested:
        if family not in NESTED_FAMILIES:
            types = model.get("layer_types")
            if layer_type is not None and isinstance(types, list | tuple) and types and layer_type not in types:
                raise unknown("layer_type", layer_type, _printable(types))
            says_nothing = not model.get("rope_scaling") and model.get("rope_parameters") is None and not rope
            return dict(FAMILY_SCALING.get(str(family), {})) if says_nothing else rope, None
        # The older dialect of these families: a flat rope_scaling is for the full-attention layers.
        if rope and not model.get("rope_scaling"):
            reading.note(
                "flat-parameters",
                f"rope_parameters of model_type {family!r} is not nested per layer type: transformers drops it",
            )
            rope = {}
        if rope.get("rope_type") is None and rope.get("type") not in (None, "default"):
            reading.note("older-type", f"type={rope['type']!r}: transformers only sees rope_type in {family} models")
        rope = {PRIMARY_LAYER_TYPE: rope, "sliding_attention": {}}
        nested = list(rope)
    if layer_type is None:
        layer_type = primary_type(nested)
    if layer_type not in nested:
        raise unknown("layer_type", layer_type, _printable(nested))
    entry = {str(key): value for key, value in rope[layer_type].items()}
    _read_beside(entry, rope, layer_type, family in NESTED_FAMILIES, reading)
    return entry, layer_type


def _printable(names: Iterable[Any]) -> list[str]:
    """Names from a config for a message of one line."""
    return list(dict.fromkeys(str(name) if str(name).isprintable() else repr(name) for name in names))


def _read_beside(
    entry: dict[str, Any], rope: dict[str, Any], layer_type: str, nested_family: bool, reading: Reading
) -> None:
    """Add to `entry` the keys that stand next to the layer types instead of inside one of them."""
    beside = {key: value for key, value in rope.items() if not isinstance(value, Mapping) and value is not None}
    outside = beside.pop("truncate", None)
    if nested_family and beside:
        reading.note(
            "flat-parameters", f"{', '.join(_printable(beside))} next to the layer types: transformers drops it"
        )
        beside = {}
    # transformers puts these there when it reads a family whose layers all have the same scaling.
    if beside.get("rope_type") == "default":
        del beside["rope_type"]
    for name in ("rope_theta", "partial_rotary_factor"):
        said = beside.pop(name, None)
        if said is not None and entry.get(name) is None:
            entry[name] = said
        elif said not in (None, entry.get(name)):
            reading.note("two-values", f"{name}={said!r} is ignored: {name}={entry[name]!r} of {layer_type!r} counts")
    if beside:
        raise unknown(
            "key next to the layer types of rope_parameters:", next(iter(beside)), _printable(nested_types(rope))
        )
    if (entry.get("rope_type") or entry.get("type")) != "yarn":
        return
    inside = entry.pop("truncate", None)
    if inside not in (None, True if outside is None else outside):
        reading.note(
            "nested-truncate",
            f"truncate={inside!r} inside {layer_type!r} has no effect: transformers reads it outside the layer types",
        )
    if outside is not None:
        entry["truncate"] = outside


def _fill_from_top_level(
    entry: dict[str, Any], model: dict[str, Any], layer_type: str | None, reading: Reading
) -> None:
    """Fill in base and rotated share that the RoPE dictionary lacks, from where the family keeps them."""
    family = model.get("model_type")
    for name in ("rope_theta", "partial_rotary_factor"):
        outside = model.get(name)
        if name == "partial_rotary_factor" and outside is None and family in _ROTARY_DIM_FAMILIES:
            rotated, head_dim = model.get("rotary_dim"), config_head_dim(model)
            outside = rotated / head_dim if rotated is not None and is_number(rotated) and head_dim else None
        if name == "rope_theta" and layer_type == "sliding_attention" and family in NESTED_FAMILIES:
            outside = model.get(_LOCAL_THETA) if family == "gemma3_text" else None
        if outside is None:
            continue
        if entry.setdefault(name, outside) != outside:
            reading.note("two-values", f"{name}={outside!r} on the top level is ignored: {name}={entry[name]!r} counts")
    if "rope_theta" not in entry:
        says_something = bool(entry)  # a model without any RoPE key may have no RoPE at all
        theta = FAMILY_THETA.get(str(family), 1e4)
        if isinstance(theta, dict):
            theta = theta.get(layer_type or PRIMARY_LAYER_TYPE, 1e4)
        entry["rope_theta"] = theta
        if family is not None and str(family) not in FAMILY_THETA and says_something:
            reading.note("no-theta", f"rope_theta is missing and model_type {family!r} is not known: 10000 is assumed")
        elif str(family) in FAMILY_THETA:
            reading.note("family-theta", f"rope_theta is missing: {theta:g}, that of {family} models, is used", "info")
    if str(family) in FAMILY_PARTIAL:
        entry.setdefault("partial_rotary_factor", FAMILY_PARTIAL[str(family)])


def _fill_original(
    values: dict[str, Any], model: dict[str, Any], rope_type: str, nested: bool, reading: Reading
) -> None:
    """Fill in L. The top level wins over a flat RoPE dictionary, as in transformers, because Phi-3 keeps L there."""
    name = "original_max_position_embeddings"
    inside, outside, context = values.get(name), model.get(name), model.get("max_position_embeddings")
    if outside is None:
        outside = _FAMILY_ORIGINAL.get(str(model.get("model_type")))
    said = {f"{name}={outside!r} on the top level": outside, f"{name}={inside!r} in the RoPE dictionary": inside}
    if rope_type == "dynamic" and context is not None:
        chosen, where = context, f"max_position_embeddings={context!r}"
    elif nested:
        chosen, where = (context if inside is None else inside), "what the layer type says, or max_position_embeddings,"
    else:
        chosen, where = (inside if outside is None else outside), "the top level"
    for what, value in said.items():
        if value not in (None, chosen):
            reading.note("two-values", f"{what} is ignored: {where} counts in rope_type {rope_type!r}")
    if inside is None and (nested or outside is None) and context is not None:
        reading.known = known_lengths(model, rope_type, values.get("factor"))
        chosen = context if reading.known is None else reading.known.original
        if rope_type in ("yarn", "llama3", "longrope"):
            reading.note(
                "no-original",
                f"{name} is missing: max_position_embeddings={context!r} is taken for it, as transformers does; "
                "wrong if that is the extended length",
            )
    values[name] = chosen


def _fill_factor(values: dict[str, Any], model: dict[str, Any], rope_type: str) -> None:
    """Fill in the factor; where transformers allows a null one, it is the ratio of the two lengths."""
    context, original = model.get("max_position_embeddings"), values["original_max_position_embeddings"]
    if values.get("factor") is None and rope_type == "proportional":
        values["factor"] = 1.0
    may_be_null = rope_type == "longrope" or (rope_type == "yarn" and "factor" in values)
    if values.get("factor") is None and may_be_null and is_number(context) and is_number(original) and original > 0:
        values["factor"] = max(context / original, 1.0) if rope_type == "longrope" else context / original
    if "factor" not in values:
        raise ConfigError(f"factor is missing in the config of rope_type {rope_type!r}")


def _apply_mistral_constants(values: dict[str, Any], model: dict[str, Any], finetuned: bool, reading: Reading) -> None:
    """Fill in the constants of the released Yarn-Mistral models: not the paper's, and missing from their configs."""
    told = {"beta_fast", "beta_slow", "attention_factor", "mscale"} & set(values)
    if model.get("model_type") != "mistral" or told:
        return
    if finetuned:
        values.update(MISTRAL_CONSTANTS)
        reading.note(
            "mistral-constants",
            "a released Yarn-Mistral model: beta_fast=128, beta_slow=2 and 0.07·ln(s) + 1, the constants of its own "
            "code, are used; other programs read this config with Llama's",
        )
    else:
        reading.note(
            "mistral-llama-constants",
            "a Mistral config without beta_fast, beta_slow and attention_factor is read with Llama's constants;"
            " the released Yarn-Mistral models need yarn:FACTOR,beta_fast=128,beta_slow=2,mscale=0.7",
        )


def _fill_attention_factor(values: dict[str, Any], rope_type: str, reading: Reading) -> None:
    """Turn the two mscales of transformers into an attention factor; drop a factor that is the default."""
    dynamic = bool(values.get("dynamic"))
    refused = ("mscale", "mscale_all_dim", *(() if dynamic else ("attention_factor",)))
    for name in refused if dynamic or values["method"] == "ntk-by-parts" else ():
        if name in values:
            raise ConfigError(f"{name}={values[name]!r}: not for rope_type {rope_type!r}")
    if values["method"] == "ntk-by-parts":
        return
    mscale, mscale_all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if not is_number(values["factor"]) or values["factor"] < 1:
        return  # RopeScaling reports it
    for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
        if value is not None and not is_number(value):
            raise ConfigError(f"{name}={value!r}: must be a number")
    log_factor = math.log(values["factor"])
    if mscale == MISTRAL_CONSTANTS["mscale"] and any(note.code == "mistral-constants" for note in reading.notes):
        values["mscale"] = mscale
    elif mscale and mscale_all_dim:
        if "attention_factor" in values:
            reading.note("two-values", "mscale and mscale_all_dim are ignored: attention_factor counts", "info")
        else:
            below = attention_factor_of(log_factor, mscale_all_dim)
            values["attention_factor"] = attention_factor_of(log_factor, mscale) / below if below else math.inf
    elif (mscale or mscale_all_dim) and "attention_factor" in values:
        given = "mscale" if mscale else "mscale_all_dim"
        reading.note("two-values", f"{given} is ignored: attention_factor counts", "info")
    elif mscale or mscale_all_dim:
        given = "mscale" if mscale else "mscale_all_dim"
        other = "mscale_all_dim" if mscale else "mscale"
        reading.note("lone-mscale", f"{given} is ignored without {other}, as in transformers")
    if values.get("attention_factor") == attention_factor_of(log_factor, 1.0) and not dynamic:
        del values["attention_factor"]  # the method's default, spelled out by native_words


def _drop_default_longrope_factor(values: dict[str, Any]) -> None:
    factor, original = values["factor"], values["original_max_position_embeddings"]
    if is_number(factor) and factor >= 1 and is_number(original) and original >= 1 and "attention_factor" in values:
        if values["attention_factor"] == longrope_attention_factor(float(factor), int(original)):
            del values["attention_factor"]
