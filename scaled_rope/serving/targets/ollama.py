"""Ollama: a Modelfile, what its GGUF must hold, and the arithmetic of the llama.cpp inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.flags.serving import EXPORT_FILES
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.serving.gguf import GgufRope
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
from scaled_rope.serving.targets.llama_cpp import architecture, plain_keys, reads_divisors
from scaled_rope.serving.targets.llama_cpp import restate as restate_llama_cpp

_NO_FLAGS = "Ollama gives no RoPE flag on to the llama.cpp inside: all that counts is in the GGUF"
_CONVERT = (
    "convert with llama.cpp's converter from this config.json, or let --gguf make a copy; Ollama's own import of "
    "safetensors drops YaRN, and reads rope_theta and rope_scaling instead of rope_parameters"
)
_COPY = "the GGUF must hold a tensor of divisors; --gguf adds it to a copy"


def express(request: ServedModel) -> Iterator[Expressed]:
    """By metadata where the GGUF has some that llama.cpp reads, then by a tensor of divisors.

    Raises:
        ConfigError: a family that llama.cpp does not know here, or neither metadata nor a tensor.
    """
    arch = architecture(request)
    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "linear", "yarn"):
        yield _by_metadata(request, arch, rope)
    if not reads_divisors(arch):
        raise ConfigError(
            f"no metadata for {request.scaling.label!r}, and its {arch} models read no tensor of divisors"
        )
    if rope is not None and rope["rope_type"] == "llama3":
        table = tuple(divisors(request.scaling, request.head_dim, request.length))
        gguf = GgufRope(_metadata(request, arch, "none", rope["rope_theta"]), table)
        yield _words(request, rope, gguf, (_NO_FLAGS, _CONVERT), converts=True)
    yield _by_divisors(request, arch)


def _metadata(request: ServedModel, arch: str, kind: str, base: float, attention: float = 1.0) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.scaling.type": kind, "rope.freq_base": base, "rope.scaling.attn_factor": attention}
    # Ollama cuts num_ctx to this length.
    return {f"{arch}.{name}": value for name, value in keys.items()} | {f"{arch}.context_length": request.length}


def _by_metadata(request: ServedModel, arch: str, rope: dict[str, Any]) -> Expressed:
    """The further keys that the converter writes of this config.json, as far as the Llama architecture reads them."""
    kind = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    metadata = _metadata(request, arch, kind, rope["rope_theta"])
    if kind != "none":
        metadata[f"{arch}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        metadata[f"{arch}.rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return _words(request, rope, GgufRope(metadata), (_NO_FLAGS, _CONVERT), converts=True)


def _by_divisors(request: ServedModel, arch: str) -> Expressed:
    """Every frequency spelled out in the GGUF."""
    scaling = request.scaling
    _, attention_factor = compute_rope(scaling, request.head_dim, request.length)
    table = tuple(divisors(scaling, request.head_dim, request.length))
    gguf = GgufRope(_metadata(request, arch, "none", scaling.rope_theta, attention_factor), table)
    notes = (_NO_FLAGS, _COPY, *((LONG_LIST_NOTE,) if scaling.is_length_dependent else ()))
    return _words(request, plain_keys(request), gguf, notes)


def _words(
    request: ServedModel, rope: dict[str, Any], gguf: GgufRope, notes: tuple[str, ...], converts: bool = False
) -> Expressed:
    config = with_older(request, config_of(request, rope, request.length))
    modelfile = f"FROM ./MODEL.gguf\nPARAMETER num_ctx {request.length}\n"
    return Expressed({}, config, (), notes, gguf, converts, {EXPORT_FILES["ollama"]: modelfile})


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The settings that llama.cpp takes from the GGUF: a copy, and one that is converted from the printed config.json.

    The Llama architecture reads no beta_fast, beta_slow and attention factor of YaRN from its metadata.
    """
    arch = architecture(request)
    gguf = words.gguf
    if gguf is None:
        raise ConfigError("there is no GGUF to read")
    held = {key.removeprefix(f"{arch}."): value for key, value in gguf.metadata.items()}
    given = _settings(held["rope.scaling.type"], held["rope.freq_base"], held.get("rope.scaling.factor", 1.0))
    given["attn_factor"] = held["rope.scaling.attn_factor"]
    if given["scaling"] == "yarn":
        given["orig_ctx"] = held["rope.scaling.original_context_length"]
    if gguf.divisors is not None:
        given["divisors"] = tuple(float(np.float32(value)) for value in gguf.divisors)
    yield given
    if words.converts:
        rope = json.loads(json.dumps(words.config["rope_parameters"]))
        converted = _settings(rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0))
        if rope["rope_type"] == "yarn":
            converted["orig_ctx"] = rope["original_max_position_embeddings"]
        elif rope["rope_type"] == "llama3":
            converted |= {"scaling": "none", "converted": rope}
        yield converted


def _settings(kind: str, base: float, scale: float) -> dict[str, Any]:
    """In the names of llama.cpp's restatement, with its defaults for what a GGUF cannot say."""
    kind = "none" if kind == "default" else kind
    given: dict[str, Any] = {"scaling": kind, "freq_base": base, "scale": scale}
    return given | ({"ext_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0} if kind == "yarn" else {})


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """Ollama 0.33.0-rc2: `llm/llama_server.go` (its flags), `server/sched.go` (num_ctx). The arithmetic is
    that of llama.cpp 0c1e570; Ollama has b10488, whose source was not read.
    """
    return restate_llama_cpp(request, words, length)


TARGET = Target(
    name="ollama",
    title="Ollama",
    version="0.33.0-rc2",
    express=express,
    read=read,
    restate=restate,
    command="ollama create NAME -f Modelfile",
    static="the llama.cpp inside fixes the frequencies when it starts and caches rotated keys",
    config_place="in config.json, before it is converted",
    basis=(
        "read from the source of Ollama 0.33.0-rc2, not run; the arithmetic is that of llama.cpp 0c1e570, and Ollama "
        "holds a later one (b10488)"
    ),
)
