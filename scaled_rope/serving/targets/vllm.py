"""vLLM: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.serving.targets.arithmetic import yarn_attention
from scaled_rope.serving.targets.common import (
    Expressed,
    Restated,
    ServedModel,
    Target,
    at_path,
    build_patched,
    config_of,
    native_keys,
    nest,
    rope_in,
    rope_in_file,
    table_notes,
    with_older,
    without_older,
)
from scaled_rope.serving.targets.hf import numbers_in_transformers
from scaled_rope.serving.targets.servers import (
    CACHED,
    CONFIG_PLACE,
    check_axes,
    check_halves,
    longrope_numbers,
    mscale_pair,
    plain_frequencies,
    table_with_mscales,
    yarn_frequencies,
)

_OWN_CLASSES = (
    *("cohere", "cohere2", "falcon", "gemma", "gemma2", "glm4", "glm4_moe", "granite", "internlm3", "llama", "mistral"),
    *("ministral3", "mixtral", "nemotron", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text"),
    *("qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl_text", "qwen3_vl_moe_text", "stablelm"),
)
"""Families (text parts) whose class in vLLM hands the whole of `rope_parameters` to `get_rope`."""
_BY_TRANSFORMERS = (
    *("arcee", "glm", "gpt_neox", "hunyuan_v1_dense", "hunyuan_v1_moe", "olmo", "olmo2", "olmo3", "phi", "seed_oss"),
    *("smollm3", "starcoder2"),
)
"""Families that vLLM runs with the models of transformers, `TransformersForCausalLM`."""
_COMPOSITES = (
    *("blip-2", "cohere2_vision", "glmasr", "granite_speech", "internvl", "llava", "llava_next", "llava_next_video"),
    *("llava_onevision", "mistral3", "paligemma", "qwen2_5_omni", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "voxtral"),
)
"""Composite families whose class in vLLM builds its language model from the text part of the config."""
_GPT_OSS_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


_FEW_POSITIONS = ("qwen3_vl_text", "qwen3_vl_moe_text")
"""Families with several axes whose positions do not go beyond the number of tokens, unless videos are pruned."""
_QUARTER = (
    "vLLM computes YaRN's ramp for {} times original_max_position_embeddings in models with several axes, so only a "
    "part of it is written; these settings are for vLLM alone"
)


def _positions_factor(request: ServedModel, rope: dict[str, Any]) -> int:
    """By how much the table of a rotary embedding with several axes is longer; it takes the product for L."""
    if rope.get("rope_type") != "yarn" or "mrope_section" not in rope:
        return 1
    return 1 if request.model_type in _FEW_POSITIONS else 4


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""

    def words(rope: dict[str, Any], context: int, notes: tuple[str, ...] = ()) -> Expressed:
        config = config_of(request, rope, context)
        override = config
        if request.path:  # inside a part, dictionaries are merged into those of the checkpoint
            override = config | {"rope_parameters": rope | dict.fromkeys(request.carried.keys() - rope.keys())}
        text = json.dumps(nest(override, request.path))
        flags = ("--hf-overrides", text, "--max-model-len", str(request.length))
        return Expressed(rope | {"context": context}, with_older(request, config), flags, notes)

    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "llama3", "yarn"):
        notes: tuple[str, ...] = ()
        if rope["rope_type"] == "yarn" and (request.path or request.model_type == "gpt_oss"):
            rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope
        times, original = _positions_factor(request, rope), rope.get("original_max_position_embeddings")
        if times > 1 and original is not None and original % times == 0:
            rope = rope | {"original_max_position_embeddings": original // times}
            notes = (_QUARTER.format(times),)
        yield words(rope, request.length, notes)
    elif rope is not None and rope["rope_type"] == "linear":
        # Here alone the program multiplies the config's maximum by the factor, for its limit and for its table.
        note = "max_position_embeddings is the length before scaling: vLLM multiplies it by a linear factor"
        yield words(rope, math.ceil(request.length / rope["factor"]), (note,))
    yield words(table_with_mscales(request), request.length, table_notes(request))


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The text part as vLLM has it after `--hf-overrides`, and as it is in a config.json with the printed keys.

    `vllm/config/model.py`: on the top level a dictionary replaces that of the checkpoint, inside a part it is merged.
    """
    override = json.loads(dict(zip(words.flags[::2], words.flags[1::2], strict=True))["--hf-overrides"])
    part = at_path(override, request.path)
    rope = rope_in(part)
    yield _given((request.carried | rope) if request.path else rope, part)
    yield given_in_file(json.loads(json.dumps(words.config)))


def given_in_file(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that vLLM reads in the text part of a config.json."""
    return _given(rope_in_file(config), config)


def _given(rope: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if value is not None} | {
        "context": part.get("max_position_embeddings")
    }


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """vLLM 0.33.0, `vllm/model_executor/layers/rotary_embedding/`: one file per rope_type, chosen in `__init__.py`; the
    limit on lengths is from `vllm/config/model.py`, what a family's class passes on from `vllm/model_executor/models/`.

    Tables are made once, with a fixed number of rows. LongRoPE takes the long list whenever the server's limit
    (`--max-model-len`, here N) is above L, whatever the length of a prompt. `extrapolation_factor` is not read.
    """
    rope, context, dim = words.given, words.given["context"], request.dim
    if request.model_type in _BY_TRANSFORMERS:
        written_rope = {key: value for key, value in rope.items() if key != "context"}
        keys = without_older(words.config) | {"rope_parameters": written_rope, "max_position_embeddings": context}
        written = build_patched(request.config.to_dict(), keys)
        return Restated(*numbers_in_transformers(replace(request, path=()), written, length))
    kind = rope["rope_type"]
    if request.model_type == "gpt_oss":
        missing = [name for name in _GPT_OSS_KEYS if name not in rope]
        if missing:
            raise ConfigError(f"its gpt_oss class reads {missing[0]} and takes nothing but YaRN")
        rope = {name: value for name, value in rope.items() if name != "attention_factor"}
        kind = "yarn"
    check_axes(request, rope)
    if kind == "longrope":
        check_halves(request)
        long = request.length > rope["original_max_position_embeddings"]
        inv_freq, factor = longrope_numbers(rope, dim, long, context)
        return Restated(inv_freq, factor, context if long else rope["original_max_position_embeddings"])
    if kind == "yarn":
        original = rope["original_max_position_embeddings"] * _positions_factor(request, rope)
        rope = {**rope, "extrapolation_factor": 1.0, "original_max_position_embeddings": original}
        inv_freq = yarn_frequencies(rope, dim)
        told = rope.get("attention_factor")
        factor = told if told is not None else mscale_pair(rope) or yarn_attention(rope["factor"])
        return Restated(inv_freq, factor, math.ceil(original * rope["factor"]))
    rows = int(context * rope["factor"]) if kind == "linear" else context
    return Restated(plain_frequencies(rope, dim), 1.0, rows)


def _is_known(request: ServedModel) -> bool:
    text = request.model_type in (*_OWN_CLASSES, *_BY_TRANSFORMERS, "gpt_oss")
    return text and (not request.path or request.whole_type in _COMPOSITES)


TARGET = Target(
    name="vllm",
    title="vLLM",
    version="0.33.0",
    express=express,
    read=read,
    restate=restate,
    known=_is_known,
    older="vLLM 0.11",
    command="vllm serve MODEL {flags}",
    static=CACHED.format("vLLM"),
    config_place=CONFIG_PLACE,
    basis="read from the source of vLLM 0.33.0; vLLM 0.32.0 was run on a CPU with a Llama, and its logits agreed",
    package="vllm",
    package_version="0.33.0",
)
