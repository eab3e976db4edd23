"""llama.cpp: its flags and GGUF keys for a scaling, and its arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.serving.gguf import GgufRope
from scaled_rope.serving.targets.arithmetic import blend, correction_range, powers, restate_llama3, yarn_attention
from scaled_rope.serving.targets.common import (
    LONG_LIST_NOTE,
    Expressed,
    Restated,
    ServedModel,
    Target,
    config_of,
    divisors,
    native_keys,
    with_older,
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
"""Others, which hand all that flags say on to ggml's rotation, but no tensor (`src/models/` at 0c1e570)."""
_LLAMA_FLAGS = {
    "scaling": "--rope-scaling",
    "scale": "--rope-scale",
    "freq_base": "--rope-freq-base",
    "orig_ctx": "--yarn-orig-ctx",
    "ext_factor": "--yarn-ext-factor",
    "beta_fast": "--yarn-beta-fast",
    "beta_slow": "--yarn-beta-slow",
}


_CONVERT = (
    "flags alone leave a GGUF unscaled: convert from this config.json, whose divisors the converter stores in the "
    "GGUF, or let --gguf write them into a copy of a GGUF"
)
_HOLDS_OTHERS = (
    "a GGUF of this checkpoint holds the divisors of the scaling that the checkpoint carries: convert from this "
    "config.json, or let --gguf take them out of a copy"
)


def express(request: ServedModel) -> Iterator[Expressed]:
    """By flags where it has some, then by a tensor of divisors in the GGUF.

    Raises:
        ConfigError: a family that llama.cpp does not know here, or neither flags nor a tensor.
    """
    scaling, arch = request.scaling, architecture(request)
    rope = native_keys(request)
    if rope is not None:
        yield from _by_name(request, arch, rope)
    if scaling.method in ("yarn", "ntk-by-parts") and scaling.ramp != "rotations":
        yield _by_yarn_flags(request, arch, rope or plain_keys(request))
    if not reads_divisors(arch):
        raise ConfigError(f"it has no flags for {scaling.label!r}, and its {arch} models read no tensor of divisors")
    yield _by_divisors(request, arch)


def architecture(request: ServedModel) -> str:
    """llama.cpp's name for the family."""
    model_type = str(getattr(request.config, "model_type", None))
    arch = _GGUF_ARCHITECTURES.get(model_type) or _GGUF_OTHERS.get(model_type)
    if arch is None:
        raise unknown("model_type", model_type, [*_GGUF_ARCHITECTURES, *_GGUF_OTHERS])
    return arch


def reads_divisors(arch: str) -> bool:
    """Whether an architecture reads a tensor of rotary divisors."""
    return arch in _GGUF_ARCHITECTURES.values()


def plain_keys(request: ServedModel) -> dict[str, Any]:
    """`rope_parameters` of the unscaled model."""
    scaling = request.scaling
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": scaling.rope_theta}
    if scaling.partial_rotary_factor != 1.0:
        plain["partial_rotary_factor"] = scaling.partial_rotary_factor
    return plain


def _words(
    request: ServedModel,
    arch: str,
    given: dict[str, Any],
    rope: dict[str, Any],
    notes: tuple[str, ...] = (),
    gguf: GgufRope | None = None,
    converts: bool = False,
) -> Expressed:
    """given: what llama.cpp is to be told; rope: `rope_parameters` to convert from."""
    flags = [part for key, value in given.items() if key in _LLAMA_FLAGS for part in (_LLAMA_FLAGS[key], f"{value}")]
    factor = given.get("attn_factor", 1.0)
    if request.carried.get("rope_type") in ("llama3", "longrope") and gguf is None:
        # The GGUF of the checkpoint holds a tensor of divisors, which no flag takes away.
        gguf, converts = GgufRope(divisors=(1.0,) * (request.dim // 2)), True
        notes = (*notes, _HOLDS_OTHERS)
    if factor != 1.0 and (gguf is None or converts):
        flags += ["--override-kv", f"{arch}.rope.scaling.attn_factor=float:{factor:.12g}"]
    flags += _longer_context(request, arch, given)
    flags += ["-c", str(request.length)]
    config = with_older(request, config_of(request, rope, request.length))
    return Expressed(given, config, tuple(flags), notes, gguf, converts)


def _longer_context(request: ServedModel, arch: str, given: dict[str, Any]) -> list[str]:
    """The flag without which the server cuts its context to that of the GGUF, as converted from the checkpoint.

    `tools/server/server-context.cpp`, `n_ctx_slot`. With YaRN's flags it takes scale · L instead, see `restate`.
    """
    if given["scaling"] == "yarn" or request.length <= int(
        getattr(request.config, "max_position_embeddings", None) or 0
    ):
        return []
    return ["--override-kv", f"{arch}.context_length=int:{request.length}"]


def _by_name(request: ServedModel, arch: str, rope: dict[str, Any]) -> Iterator[Expressed]:
    """The rope types of transformers that llama.cpp has as well; YaRN is `_by_yarn_flags`."""
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "default":
        yield _words(request, arch, {"scaling": "none", "freq_base": theta}, rope)
    elif kind == "linear":
        yield _words(request, arch, {"scaling": "linear", "scale": rope["factor"], "freq_base": theta}, rope)
    elif kind == "llama3" and arch == "llama":
        table = divisors(request.scaling, request.head_dim, request.length)
        gguf = GgufRope({f"{arch}.rope.freq_base": theta}, tuple(table))
        given = {"scaling": "none", "freq_base": theta, "converted": rope}
        yield _words(request, arch, given, rope, (_CONVERT,), gguf, converts=True)


def _by_yarn_flags(request: ServedModel, arch: str, rope: dict[str, Any]) -> Expressed:
    scaling = request.scaling
    extrapolation = 1.0 if scaling.extrapolation_factor is None else scaling.extrapolation_factor
    fast, slow = scaling.ramp_bounds
    given: dict[str, Any] = {"scaling": "yarn", "scale": scaling.factor, "freq_base": scaling.rope_theta}
    wanted = scaling.static_attention_factor
    if extrapolation == 0:  # nothing is kept, and the program leaves its own attention factor out as well
        return _words(request, arch, given | {"scaling": "linear", "attn_factor": wanted}, rope)
    given |= {"orig_ctx": scaling.original_max_position_embeddings, "ext_factor": extrapolation}
    notes: tuple[str, ...] = (
        "the flags are needed at every start: a converted Llama or Mistral does not read these from its GGUF",
    )
    if wanted != yarn_attention(scaling.factor):
        given["attn_factor"] = wanted / yarn_attention(scaling.factor)
        notes += ("--yarn-attn-factor is overwritten by this version; the metadata attn_factor multiplies its own",)
    told = (fast, slow) != (32.0, 1.0) or extrapolation != 1 or "attn_factor" in given
    return _words(request, arch, given | {"beta_fast": fast, "beta_slow": slow}, rope, notes if told else ())


def _by_divisors(request: ServedModel, arch: str) -> Expressed:
    """Every frequency spelled out in the GGUF."""
    scaling = request.scaling
    _, attention_factor = compute_rope(scaling, request.head_dim, request.length)
    gguf = GgufRope(
        metadata={
            f"{arch}.rope.scaling.type": "none",
            f"{arch}.rope.freq_base": scaling.rope_theta,
            f"{arch}.rope.scaling.attn_factor": attention_factor,
        },
        divisors=tuple(divisors(scaling, request.head_dim, request.length)),
    )
    given = {"scaling": "none", "freq_base": scaling.rope_theta, "attn_factor": attention_factor}
    notes: tuple[str, ...] = (
        "flags have no words for this: the GGUF must hold a tensor of divisors; --gguf adds it to a GGUF",
    )
    if scaling.is_length_dependent:
        notes = (*notes, LONG_LIST_NOTE)
    return _words(request, arch, given | {"divisors": gguf.divisors}, plain_keys(request), notes, gguf)


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """The settings in printed flags, by the names of `Expressed.given`."""
    given: dict[str, Any] = {}
    names = {flag: name for name, flag in _LLAMA_FLAGS.items()}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag in names:
            given[names[flag]] = value if names[flag] == "scaling" else float(value)
        elif flag == "--override-kv" and ".attn_factor=float:" in value:
            given["attn_factor"] = float(value.partition("=float:")[2])
    return given


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The settings in the flags and in the GGUF: converted from the printed config.json, or a copy."""
    told = read_flags(words.flags)
    gguf = words.gguf
    if gguf is not None:
        arch = architecture(request)
        factor = gguf.metadata.get(f"{arch}.rope.scaling.attn_factor")
        held = {} if factor is None else {"attn_factor": factor}
        yield told | held | {"divisors": tuple(float(np.float32(value)) for value in gguf.divisors or ())}
    if gguf is None or words.converts:
        rope = json.loads(json.dumps(words.config["rope_parameters"]))
        yield told | ({"converted": rope} if rope["rope_type"] == "llama3" else {})


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """llama.cpp 0c1e570 (llama-cpp-python 0.3.36): `ggml/src/ggml-cpu/ops.cpp`, `ggml/src/ggml.c` (`rope_yarn`, its
    `corr_dims`), `src/llama-context.cpp` (flags and metadata), `conversion/llama.py` (the divisors of llama3).

    The ends of the ramp are always rounded outwards; its width is at least 0.001. With YaRN the context overwrites the
    given attention factor by one that cancels ggml's own 1 + 0.1·ln(s); the metadata key `rope.scaling.attn_factor`
    multiplies what results. The server takes at most scale · L tokens then (`src/llama-context.cpp`, n_ctx_train).
    """
    given, dim = words.given, request.dim
    own = powers(given["freq_base"], dim)
    if "converted" in given:  # the flags say "none" and the base
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
    rows = None if scale == 1 else math.floor(given["orig_ctx"] * scale)
    return Restated(inv_freq, factor * yarn_attention(scale), rows)


TARGET = Target(
    name="llama.cpp",
    title="llama.cpp",
    version="0c1e570",
    express=express,
    read=read,
    restate=restate,
    command="llama-server -m MODEL.gguf {flags}",
    static="llama.cpp fixes the frequencies when it starts and caches rotated keys",
    config_place="in config.json, before it is converted",
    basis="read from the source of llama.cpp 0c1e570 and run, by llama-cpp-python 0.3.36",
    package="llama-cpp-python",
    package_version="0.3.36",
)
