"""SGLang: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.serving.targets.arithmetic import powers, yarn_attention
from scaled_rope.serving.targets.classes import passes
from scaled_rope.serving.targets.common import (
    TOLERANCE,
    Expressed,
    Restated,
    ServedModel,
    Target,
    at_path,
    config_of,
    native_keys,
    nest,
    rope_in,
    rope_in_file,
    table_notes,
    with_older,
)
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

_PASSES_SCALING = (
    *("cohere", "cohere2", "glm4", "gpt_oss", "granite", "internlm3", "llama", "ministral3", "mistral", "olmo2"),
    *("olmoe", "phi3", "qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_moe"),
    *("qwen3_next", "qwen3_vl_text", "qwen3_vl_moe_text"),
)
"""Families (text parts) whose class in SGLang hands the whole of `rope_parameters` to `get_rope`."""


_COMPOSITES = ("llava", "mistral3", "qwen3_vl_moe")
"""Composite families whose class in SGLang builds its language model from the text part of the config."""
_FROM_THE_WHOLE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Those whose class builds it from the whole config, to which the text part's values are copied before flags count."""


def _is_known(request: ServedModel) -> bool:
    text = request.model_type in _PASSES_SCALING or passes("sglang", request.model_type) in ("base", "whole base")
    return text and (not request.path or request.whole_type in (*_COMPOSITES, *_FROM_THE_WHOLE))


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""

    def words(rope: dict[str, Any], notes: tuple[str, ...] = ()) -> Expressed:
        config = config_of(request, rope, request.length)
        if "partial_rotary_factor" in rope:  # read from the top level there
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        # Flags are merged into the checkpoint's own dictionary: its other keys must be made harmless.
        neutral = {"factor": 1.0, "extrapolation_factor": 1.0, "attn_factor": 1.0, "type": rope["rope_type"]}
        rest = {key: neutral.get(key) for key in request.carried if key not in rope}
        override = config | {"rope_parameters": rope | rest}
        told = nest(override, request.path)
        if request.whole_type in _FROM_THE_WHOLE:
            told = override | told
        text = json.dumps(told)
        flags = ("--json-model-override-args", text, "--context-length", str(request.length))
        return Expressed(request.carried | rope | rest, with_older(request, config), flags, notes)

    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "linear", "llama3", "yarn"):
        notes: tuple[str, ...] = ()
        if rope["rope_type"] == "yarn":
            ratio = rope["attention_factor"] / yarn_attention(rope["factor"])
            rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope | {"attn_factor": ratio}
            if abs(ratio - 1) > TOLERANCE:
                notes = ("attn_factor carries the attention factor: SGLang does not read attention_factor",)
        yield words(rope, notes)
    yield words(table_with_mscales(request), table_notes(request))


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The text part as SGLang has it with the flags, and as it is in a config.json with the printed keys.

    On the top level flags are merged into the dictionary that is there; in a text part they replace it.
    """
    path = () if request.whole_type in _FROM_THE_WHOLE else request.path
    override = json.loads(dict(zip(words.flags[::2], words.flags[1::2], strict=True))["--json-model-override-args"])
    rope = rope_in(at_path(override, path))
    for one in (
        rope if request.path else request.carried | rope,
        rope_in_file(json.loads(json.dumps(words.config))),
    ):
        yield {key: value for key, value in one.items() if value is not None}


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """SGLang 0.5.23, `sglang/srt/layers/rotary_embedding/`: `factory.py`, `base.py`, `yarn.py`, `rope_variant.py`; how
    flags are merged into a config is from `sglang/srt/utils/hf_transformers/config.py`, what a family's class passes on
    from `sglang/srt/models/`.

    YaRN knows `attn_factor`, a multiplier of its own factor, and not `attention_factor`. LongRoPE takes the long list
    for a batch that holds a position above L; a batch that ends at position L exactly reads row 0 of the long table.
    """
    rope, dim = words.given, request.dim
    kind = rope["rope_type"]
    passed = passes("sglang", request.model_type)
    if passed in ("base", "whole base"):  # its class calls `get_rope` without a scaling
        if request.scaling.method not in ("default", "ntk", "abf"):
            raise ConfigError(
                f"its class for {request.model_type} models passes no scaling to the rotary embedding, only "
                "rope_theta: serve it with another program, or with ntk:FACTOR, which is another base"
            )
        theta = rope["rope_theta"]
        return Restated(powers(int(theta) if passed == "whole base" else theta, dim), 1.0)
    check_axes(request, rope)
    if kind == "longrope":
        check_halves(request)
        long = length - 1 > rope["original_max_position_embeddings"]
        return Restated(*longrope_numbers(rope, dim, long, request.length))
    if kind == "yarn":
        pair = mscale_pair(rope)
        factor = (yarn_attention(rope["factor"]) if pair is None else pair) * rope.get("attn_factor", 1.0)
        return Restated(yarn_frequencies(rope, dim), factor)
    return Restated(plain_frequencies(rope, dim), 1.0)


TARGET = Target(
    name="sglang",
    title="SGLang",
    version="0.5.23",
    express=express,
    read=read,
    restate=restate,
    known=_is_known,
    older="SGLang 0.5.3",
    command="python -m sglang.launch_server --model-path MODEL {flags}",
    static=CACHED.format("SGLang"),
    config_place=CONFIG_PLACE,
    basis="read from the source of SGLang 0.5.23; its tables were made on a CPU, its server was not run",
    package="sglang",
    package_version="0.5.23",
)
