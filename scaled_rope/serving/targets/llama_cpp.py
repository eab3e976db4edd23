"""llama.cpp: its flags and GGUF keys for a scaling, and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.gguf import GgufRope
from scaled_rope.serving.targets.common import (
    LONG_LIST_NOTE,
    Expressed,
    Restated,
    ServedModel,
    blend,
    config_of,
    correction_range,
    divisors,
    native_keys,
    powers,
    restate_llama3,
    yarn_attention,
)

_GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama"}
"""model_type -> architecture in the GGUF; those that read a tensor of rotary divisors."""
_GGUF_OTHERS = {
    "cohere": "command-r",
    "falcon": "falcon",
    "gemma": "gemma",
    "gpt_neox": "gptneox",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
}


def express(request: ServedModel) -> Iterator[Expressed]:
    scaling = request.scaling
    model_type = str(getattr(request.config, "model_type", None))
    arch = _GGUF_ARCHITECTURES.get(model_type) or _GGUF_OTHERS.get(model_type)
    if arch is None:
        raise unknown("model_type", model_type, [*_GGUF_ARCHITECTURES, *_GGUF_OTHERS])
    scale = f"{arch}.rope.scaling."

    def words(
        given: dict[str, Any], rope: dict[str, Any], notes: tuple[str, ...] = (), gguf: GgufRope | None = None
    ) -> Expressed:
        flags = [
            part for key, value in given.items() if key in _LLAMA_FLAGS for part in (_LLAMA_FLAGS[key], f"{value}")
        ]
        factor = given.get("attn_factor", 1.0)
        if factor != 1.0 and gguf is None:
            flags += ["--override-kv", f"{scale}attn_factor=float:{factor:.9g}"]
        flags += ["-c", str(request.length)]
        return Expressed(given, config_of(request, rope, request.length), tuple(flags), notes, gguf)

    rope = native_keys(request)
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": scaling.rope_theta}
    if scaling.partial_rotary_factor != 1.0:
        plain["partial_rotary_factor"] = scaling.partial_rotary_factor
    kind = rope["rope_type"] if rope is not None else None
    if rope is not None and kind == "default":
        yield words({"scaling": "none", "freq_base": rope["rope_theta"]}, rope)
    elif rope is not None and kind == "linear":
        yield words({"scaling": "linear", "scale": rope["factor"], "freq_base": rope["rope_theta"]}, rope)
    elif rope is not None and kind == "llama3" and arch == "llama":
        note = "convert from this config.json: the converter computes llama3's divisors and stores them in the GGUF"
        yield words({"scaling": "none", "freq_base": rope["rope_theta"], "converted": rope}, rope, (note,))
    if scaling.method in ("yarn", "ntk-by-parts") and scaling.ramp != "rotations":
        yield from _yarn_llama_cpp(scaling, words, rope or plain)
    if arch not in _GGUF_ARCHITECTURES.values():
        raise ConfigError(f"it has no flags for {scaling.label!r}, and its {arch} models read no tensor of divisors")
    _, attention_factor = compute_rope(scaling, request.head_dim, request.length)
    gguf = GgufRope(
        metadata={
            f"{scale}type": "none",
            f"{arch}.rope.freq_base": scaling.rope_theta,
            f"{scale}attn_factor": attention_factor,
        },
        divisors=tuple(divisors(scaling, request.head_dim, request.length)),
    )
    given = {"scaling": "none", "freq_base": scaling.rope_theta, "attn_factor": attention_factor}
    notes: tuple[str, ...] = (
        "flags have no words for this: the GGUF must hold a tensor of divisors; --gguf adds it to a GGUF",
    )
    if scaling.is_length_dependent:
        notes = (*notes, LONG_LIST_NOTE)
    yield words(given | {"divisors": gguf.divisors}, plain, notes, gguf)


_LLAMA_FLAGS = {
    "scaling": "--rope-scaling",
    "scale": "--rope-scale",
    "freq_base": "--rope-freq-base",
    "orig_ctx": "--yarn-orig-ctx",
    "ext_factor": "--yarn-ext-factor",
    "beta_fast": "--yarn-beta-fast",
    "beta_slow": "--yarn-beta-slow",
}


def _yarn_llama_cpp(scaling: RopeScaling, words: Callable[..., Expressed], rope: dict[str, Any]) -> Iterator[Expressed]:
    extrapolation = 1.0 if scaling.extrapolation_factor is None else scaling.extrapolation_factor
    fast, slow = scaling.ramp_bounds
    given: dict[str, Any] = {"scaling": "yarn", "scale": scaling.factor, "freq_base": scaling.rope_theta}
    wanted = scaling.static_attention_factor
    if extrapolation == 0:  # nothing is kept, and the program leaves its own attention factor out as well
        yield words(given | {"scaling": "linear", "attn_factor": wanted}, rope)
        return
    given |= {"orig_ctx": scaling.original_max_position_embeddings, "ext_factor": extrapolation}
    notes: tuple[str, ...] = (
        "the flags are needed at every start: a converted Llama or Mistral does not read these from its GGUF",
    )
    if wanted != yarn_attention(scaling.factor):
        given["attn_factor"] = wanted / yarn_attention(scaling.factor)
        notes += ("--yarn-attn-factor is overwritten by this version; the metadata attn_factor multiplies its own",)
    told = (fast, slow) != (32.0, 1.0) or extrapolation != 1 or "attn_factor" in given
    yield words(given | {"beta_fast": fast, "beta_slow": slow}, rope, notes if told else ())


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """llama.cpp 0c1e570 (llama-cpp-python 0.3.36): `ggml/src/ggml-cpu/ops.cpp`, `ggml/src/ggml.c` (`rope_yarn`, its
    `corr_dims`), `src/llama-context.cpp` (flags and metadata), `conversion/llama.py` (the divisors of llama3).

    The ends of the ramp are always rounded outwards; its width is at least 0.001. With YaRN the context overwrites the
    given attention factor by one that cancels ggml's own 1 + 0.1·ln(s); the metadata key `rope.scaling.attn_factor`
    multiplies what results.
    """
    given, dim = words.given, request.dim
    own = powers(given["freq_base"], dim)
    if "converted" in given:
        return Restated(restate_llama3(given["converted"], dim), 1.0)
    if "divisors" in given:
        own = [theta / divisor for theta, divisor in zip(own, given["divisors"], strict=True)]
    scale = given.get("scale", 1.0) if given["scaling"] != "none" else 1.0
    factor = given.get("attn_factor", 1.0)
    if given["scaling"] != "yarn":
        return Restated([theta / scale for theta in own], factor)
    fast, slow = given["beta_fast"], given["beta_slow"]
    low, high = correction_range(dim, given["freq_base"], given["orig_ctx"], fast, slow, truncate=True)
    inv_freq = blend(own, scale, low, max(0.001, high - low), given["ext_factor"])
    return Restated(inv_freq, factor * yarn_attention(scale))
