"""What to tell transformers, vLLM, SGLang or llama.cpp so that they run a scaling, and what they make of it.

Each program has its own words for a scaling and its own arithmetic. `export` finds words for a target, computes what
the target computes from them, and compares that with `compute_rope`: only words that give our numbers are called exact.
For transformers the target itself is run; the others are restated here in plain float64 Python, each at one version.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.utils import logging as transformers_logging

from scaled_rope.config import RopeScaling
from scaled_rope.dialects import SOFTMAX_MSCALE_FAMILIES, has_rope, nested_types, read_by_attention
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.flags import check_export_arguments
from scaled_rope.gguf_files import GgufRope, add_rope
from scaled_rope.loading import load_config, resolve_scaling
from scaled_rope.methods import METHODS, compute_rope
from scaled_rope.patch import head_dim_of
from scaled_rope.results import write_atomic

TOLERANCE = 1e-5
"""Largest relative difference of a frequency, and of the attention factor, that counts as the same number: float32
arithmetic done in another order differs by about 1e-6, another rounding of the ramp's ends by 1e-2 and more."""

STILL = 1e30
"""The divisor that stands for a frequency of 0. It leaves no more than 1e-23 of a turn over a million tokens, and
float32 still holds its product with any base in use."""

_ROPE_KEYS_ELSEWHERE = ("rope_scaling", "rope_theta", "partial_rotary_factor", "scaled_rope")
"""Top-level keys of a config.json that say something about RoPE beside `rope_parameters`, which replaces them."""


@dataclass(frozen=True)
class Request:
    """What is to be served."""

    scaling: RopeScaling
    config: Any
    """The model's (text) config, an object of transformers."""
    head_dim: int
    length: int
    """N, the longest sequence in tokens."""

    @property
    def dim(self) -> int:
        """D, the rotated dimensions per head."""
        return self.scaling.rotary_dim(self.head_dim)

    @property
    def carried(self) -> dict[str, Any]:
        """`rope_parameters` as transformers reads them from the checkpoint."""
        return dict(getattr(self.config, "rope_parameters", None) or {})


@dataclass(frozen=True)
class Expressed:
    """A scaling in the words of a target."""

    given: dict[str, Any]
    """All that the target's arithmetic depends on; `Target.restate` reads it."""
    config: dict[str, Any]
    """Keys to put into config.json."""
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What these words do not do."""
    gguf: GgufRope | None = None
    """What the GGUF itself must hold, where flags are not enough."""


class Restated(NamedTuple):
    """What a target computes."""

    inv_freq: Sequence[float]
    """[D/2], radians per position."""
    attention_factor: float
    rows: int | None = None
    """Positions that its table holds and that it cannot go beyond; None: as many as asked for."""


@dataclass(frozen=True)
class Target:
    """A program that serves models."""

    name: str
    title: str
    version: str
    express: Callable[[Request], Iterator[Expressed]]
    """Ways to say it, the plainest first."""
    restate: Callable[[Request, Expressed, int], Restated]
    """(request, words, sequence length in tokens) -> what the target computes for it."""
    command: str
    """How its command line begins; {flags} is what we add."""
    static: str = ""
    """Why the target cannot follow the length of a sequence; empty when it can."""


@dataclass(frozen=True)
class Comparison:
    """A target's numbers against ours, for one sequence length."""

    length: int
    max_relative_difference: float
    """Over all frequencies: |theirs - ours| / ours."""
    worst_dimension: int
    attention_factor: float
    ours: float
    """Our attention factor."""

    @property
    def attention_difference(self) -> float:
        return self.attention_factor - self.ours

    @property
    def matches(self) -> bool:
        return self.max_relative_difference <= TOLERANCE and abs(self.attention_difference) <= TOLERANCE * self.ours


@dataclass(frozen=True)
class ExportReport:
    """What to tell a target, and what it makes of it."""

    scaling: RopeScaling
    target: str
    """Name and version."""
    status: str
    """"exact"; "partial": at some lengths only; "mismatch"; "refused"."""
    reason: str = ""
    """Why it was refused, one line."""
    config: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    command: str = ""
    gguf: GgufRope | None = None
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    @property
    def config_place(self) -> str:
        """What `config` is to the command, in words."""
        if not self.flags:
            return "in config.json"
        converted = self.target.startswith("llama.cpp")
        return "in config.json, before it is converted" if converted else "or, instead of flags, in config.json"

    @property
    def exit_code(self) -> int:
        """0: exact; 1: the numbers differ; 2: refused."""
        return {"exact": 0, "refused": 2}.get(self.status, 1)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        values = dataclasses.asdict(self) | {"scaling": self.scaling.to_dict(), "label": self.scaling.label}
        values["comparisons"] = [
            dataclasses.asdict(c) | {"attention_difference": c.attention_difference, "matches": c.matches}
            for c in self.comparisons
        ]
        return values

    def __str__(self) -> str:
        if self.status == "refused":
            return f"{self.scaling.label} for {self.target}: refused: {self.reason}"
        lines = [f"{self.scaling.label} for {self.target}: {self.status}", "", "run:", f"  {self.command}", ""]
        lines += [f"{self.config_place}:", *_lay_out_config(self.config), ""]
        if self.gguf is not None:
            lines += ["in the GGUF:", f"  {self.gguf}", ""]
        lines.append(f"what {self.target} makes of it, against ours:")
        for c in self.comparisons:
            lines += [
                f"  up to {c.length} tokens: {'same' if c.matches else 'DIFFERENT'}",
                f"    frequencies       off by at most {c.max_relative_difference:.1e} (relative; dimension "
                f"{c.worst_dimension})",
                f"    attention factor  {c.attention_factor:.6g}, ours {c.ours:.6g} ({c.attention_difference:+.1e})",
            ]
        return "\n".join([*lines, *(["", "notes:"] if self.notes else []), *(f"  - {note}" for note in self.notes)])


def _lay_out_config(config: Mapping[str, Any]) -> list[str]:
    """JSON to be copied, one key per line also in `rope_parameters`."""
    text = json.dumps(config, indent=2)
    # A list of frequencies stays on one line.
    text = re.sub(r"\[[^\[\]]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    return [f"  {line}" for line in text.splitlines()]


def served_length(scaling: RopeScaling, config: Any) -> int:
    """N where nothing is said: the factor's length, or what the checkpoint claims when it carries the scaling."""
    claimed = int(config.max_position_embeddings)
    extended = scaling.max_position_embeddings or 0
    return extended if scaling.factor > 1 and scaling != RopeScaling.from_config(config) else max(claimed, extended)


def export(scaling: RopeScaling | str, config: Any, target: Target | str, length: int | None = None) -> ExportReport:
    """Say `scaling` in the words of `target` and compare the numbers.

    Args:
        scaling: a record, or a spec relative to what the config carries.
        config: the model's config, an object of transformers.
        target: a `Target` or a name in `TARGETS`.
        length: the longest sequence to serve, in tokens; None: see `served_length`.

    Of several ways to say it the first one is taken whose numbers are ours at every length, or else the nearest.

    Raises:
        ConfigError: an unknown target, or a scaling that does not fit the model. What the target cannot express is no
            error but a report with status "refused".
    """
    if isinstance(target, str):
        if target not in TARGETS:
            raise unknown("target", target, TARGETS)
        target = TARGETS[target]
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not has_rope(config):
        raise ConfigError(f"transformers takes no RoPE parameters for model_type {config.model_type!r}")
    if isinstance(scaling, str):
        scaling = resolve_scaling(scaling, RopeScaling.from_config(config))
    if length is not None and length < 1:
        raise ConfigError(f"length={length}: must be a positive number of tokens")
    request = Request(scaling, config, head_dim_of(config), length or served_length(scaling, config))
    name = f"{target.title} {target.version}"
    reason = _no_words(request, target)
    best: tuple[Expressed, tuple[Comparison, ...]] | None = None
    try:
        for words in () if reason else target.express(request):
            try:
                comparisons = tuple(_compare(request, target, words))
            except ConfigError as error:
                reason = reason or str(error)
                continue
            if best is None or sum(c.matches for c in comparisons) > sum(c.matches for c in best[1]):
                best = words, comparisons
            if all(c.matches for c in comparisons):
                break
    except ConfigError as error:
        reason = reason or str(error)
    if best is None or (reason and not any(c.matches for c in best[1])):
        reason = reason or f"it has no words for {scaling.label!r}"
        return ExportReport(scaling, name, "refused", reason)
    words, comparisons = best
    matches = [c.matches for c in comparisons]
    status = "exact" if all(matches) else "partial" if any(matches) else "mismatch"
    command = target.command.format(flags=shlex.join(words.flags)).strip()
    notes = (*_notes(request, target), *words.notes)
    return ExportReport(scaling, name, status, "", words.config, words.flags, command, words.gguf, notes, comparisons)


def _no_words(request: Request, target: Target) -> str:
    """Why no words of the target can do it, or nothing."""
    scaling, method = request.scaling, METHODS[request.scaling.method]
    if method.kind != "frequency":
        return f"{scaling.method!r} changes attention itself; no server computes it: use patch_model of this package"
    if nested_types(request.carried):
        return "the config has a scaling per layer type: save the model that patch_model made instead"
    model_type, carried = request.config.model_type, request.carried
    softmax = carried.get("mscale_all_dim") if carried.get("rope_type") != "default" else None
    if softmax and model_type in SOFTMAX_MSCALE_FAMILIES:
        return (
            f"the attention of {model_type} models takes a softmax scale from mscale_all_dim={softmax!r} as well, "
            "which words for a scaling would drop: serve the checkpoint as it is"
        )
    if scaling.dynamic:
        static = target.static or "it has no words for it: use patch_model of this package"
        if target.static:
            static += f"; serve the static form for the length you need, --scaling {scaling.method}:FACTOR"
        return f"{scaling.label!r} follows the length of each sequence, but {static}"
    if scaling.method == "dynamic-ntk" and target.static:
        return (
            f"{scaling.label!r} follows the length of each sequence, but {target.static}; serve NTK-aware scaling "
            "for the length you need, --scaling ntk:FACTOR"
        )
    return ""


def _notes(request: Request, target: Target) -> list[str]:
    scaling, notes = request.scaling, []
    if target.static and scaling.method != "default" and scaling.factor > 1 and not scaling.is_length_dependent:
        notes.append(f"{target.title} scales short prompts as well: it computes one table for all lengths")
    if not target.static and scaling.is_length_dependent:
        notes.append(
            "exact for one pass over a sequence; cached keys keep the rotation of the length they were made at"
        )
    model_type = getattr(request.config, "model_type", None)
    if target.static and model_type not in ("llama", "mistral"):
        notes.append(f"compared with what {target.title} does for Llama; its code for {model_type!r} may differ")
    window = getattr(request.config, "sliding_window", None)
    if window is not None and window < request.length:
        notes.append(f"sliding_window={window} of the config is shorter than {request.length} tokens")
    return notes


def _compare(request: Request, target: Target, words: Expressed) -> Iterator[Comparison]:
    """The target's numbers against ours, at every length where ours may differ."""
    scaling = request.scaling
    lengths = {request.length}
    if scaling.is_length_dependent:
        original = int(scaling.original_max_position_embeddings or request.length)
        lengths |= {min(original, request.length)} | (set() if target.static else {2 * original})
    for length in sorted(lengths):
        ours, factor = compute_rope(scaling, request.head_dim, length)
        theirs = target.restate(request, words, length)
        if theirs.rows is not None and theirs.rows < request.length:
            raise ConfigError(f"length={request.length}: its table of these words ends at {theirs.rows} positions")
        if len(theirs.inv_freq) != len(ours):
            raise ConfigError(f"it makes {len(theirs.inv_freq)} frequencies of it, and the scaling has {len(ours)}")
        # Below 1e-12 (a turn in 6e12 tokens) a frequency is 0 for all purposes.
        off = [abs(a - b) / max(b, 1e-12) for a, b in zip(theirs.inv_freq, ours.tolist(), strict=True)]
        worst = max(range(len(off)), key=off.__getitem__)
        yield Comparison(length, off[worst], worst, theirs.attention_factor, factor)


# Words ---------------------------------------------------------------------------------------------------------------


def _native(request: Request) -> dict[str, Any] | None:
    """`rope_parameters` in the words of transformers, or None."""
    if not request.scaling.is_native(request.head_dim):
        return None
    return _with_kept(request, request.scaling.to_config(head_dim=request.head_dim))


def _with_kept(request: Request, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with what the family's attention reads in them.

    Raises:
        ConfigError: that is L, and these words have another.
    """
    kept = read_by_attention(request.carried)
    for name in kept.keys() & rope.keys():
        if kept[name] != rope[name]:
            raise ConfigError(f"{name}={rope[name]}: the attention of this model reads {kept[name]} there")
    return kept | rope


def divisors(scaling: RopeScaling, head_dim: int, length: int) -> list[float]:
    """What the model's own frequencies b^(-2d/D) are divided by [D/2] for sequences of `length` tokens."""
    inv_freq, _ = compute_rope(scaling, head_dim, length)
    own = _powers(scaling.rope_theta, scaling.rotary_dim(head_dim))
    # Nine digits give a float32 back exactly.
    return [float(f"{a / b:.9g}") if b > 0 else STILL for a, b in zip(own, inv_freq.tolist(), strict=True)]


def _table(request: Request) -> dict[str, Any]:
    """`rope_parameters` that spell out every frequency: LongRoPE with one list of divisors for all lengths.

    L is set to N, because the programs differ in where they change from the short list to the long one.
    """
    scaling = request.scaling
    table = divisors(scaling, request.head_dim, request.length)
    _, attention_factor = compute_rope(scaling, request.head_dim, request.length)
    values: dict[str, Any] = {"rope_type": "longrope", "rope_theta": scaling.rope_theta, "factor": 1.0}
    values["original_max_position_embeddings"] = request.length
    if scaling.partial_rotary_factor != 1.0:
        values["partial_rotary_factor"] = scaling.partial_rotary_factor
    values |= {"short_factor": table, "long_factor": table, "attention_factor": attention_factor}
    return _with_kept(request, values)


_TABLE_NOTE = "the frequencies are spelled out under the name longrope; keep the original config.json for training"
_LONG_LIST_NOTE = "prompts of up to L tokens get the long list too, where LongRoPE has a short one"


def _table_notes(request: Request) -> tuple[str, ...]:
    return (_TABLE_NOTE, _LONG_LIST_NOTE) if request.scaling.is_length_dependent else (_TABLE_NOTE,)


def _config(request: Request, rope: dict[str, Any], context: int) -> dict[str, Any]:
    """The keys of config.json around `rope_parameters`."""
    config: dict[str, Any] = {"rope_parameters": rope, "max_position_embeddings": context}
    if getattr(request.config, "head_dim", request.head_dim) is None:  # transformers computes with the null
        config["head_dim"] = request.head_dim
    # Phi-3 and its like keep L on the top level, where it wins.
    if getattr(request.config, "original_max_position_embeddings", None) is not None:
        config["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", context)
    return config


def _express_transformers(request: Request) -> Iterator[Expressed]:
    rope = _native(request)
    if rope is not None:
        # In "dynamic" the model's maximum is L.
        original = request.scaling.original_max_position_embeddings
        context = int(original or request.length) if rope["rope_type"] == "dynamic" else request.length
        yield Expressed(rope, _config(request, rope, context))
    if not request.scaling.is_length_dependent:
        rope = _table(request)
        yield Expressed(rope, _config(request, rope, request.length), notes=_table_notes(request))


def _express_vllm(request: Request) -> Iterator[Expressed]:
    def words(rope: dict[str, Any], context: int, notes: tuple[str, ...] = ()) -> Expressed:
        config = _config(request, rope, context)
        flags = ("--hf-overrides", json.dumps(config), "--max-model-len", str(request.length))
        return Expressed(rope | {"context": context}, config, flags, notes)

    rope = _native(request)
    if rope is not None and rope["rope_type"] in ("default", "llama3", "yarn"):
        yield words(rope, request.length)
    elif rope is not None and rope["rope_type"] == "linear":
        # Here alone the program multiplies the config's maximum by the factor, for its limit and for its table.
        note = "max_position_embeddings is the length before scaling: vLLM multiplies it by a linear factor"
        yield words(rope, math.ceil(request.length / rope["factor"]), (note,))
    rope = _table(request)
    rope |= {"short_mscale": rope["attention_factor"], "long_mscale": rope["attention_factor"]}
    yield words(rope, request.length, _table_notes(request))


def _express_sglang(request: Request) -> Iterator[Expressed]:
    def words(rope: dict[str, Any], notes: tuple[str, ...] = ()) -> Expressed:
        config = _config(request, rope, request.length)
        if "partial_rotary_factor" in rope:  # read from the top level there
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        # Flags are merged into the checkpoint's own dictionary: its other keys must be made harmless.
        neutral = {"factor": 1.0, "extrapolation_factor": 1.0, "attn_factor": 1.0, "type": rope["rope_type"]}
        rest = {key: neutral.get(key) for key in request.carried if key not in rope}
        override = config | {"rope_parameters": rope | rest}
        flags = ("--json-model-override-args", json.dumps(override), "--context-length", str(request.length))
        return Expressed(request.carried | rope | rest, config, flags, notes)

    rope = _native(request)
    if rope is not None and rope["rope_type"] in ("default", "linear", "llama3", "yarn"):
        notes: tuple[str, ...] = ()
        if rope["rope_type"] == "yarn":
            ratio = rope["attention_factor"] / _yarn_attention(rope["factor"])
            rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope | {"attn_factor": ratio}
            if abs(ratio - 1) > TOLERANCE:
                notes = ("attn_factor carries the attention factor: SGLang does not read attention_factor",)
        yield words(rope, notes)
    rope = _table(request)
    rope |= {"short_mscale": rope["attention_factor"], "long_mscale": rope["attention_factor"]}
    yield words(rope, _table_notes(request))


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


def _express_llama_cpp(request: Request) -> Iterator[Expressed]:
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
        return Expressed(given, _config(request, rope, request.length), tuple(flags), notes, gguf)

    rope = _native(request)
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
        notes = (*notes, _LONG_LIST_NOTE)
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
    if wanted != _yarn_attention(scaling.factor):
        given["attn_factor"] = wanted / _yarn_attention(scaling.factor)
        notes += ("--yarn-attn-factor is overwritten by this version; the metadata attn_factor multiplies its own",)
    told = (fast, slow) != (32.0, 1.0) or extrapolation != 1 or "attn_factor" in given
    yield words(given | {"beta_fast": fast, "beta_slow": slow}, rope, notes if told else ())


# What the programs compute -------------------------------------------------------------------------------------------


def _powers(base: float, dim: int) -> list[float]:
    return [base ** (-2 * d / dim) for d in range(dim // 2)]


def _yarn_attention(factor: float) -> float:
    """The attention factor that every one of the programs has for YaRN unless told otherwise."""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)


def _correction_range(
    dim: int, base: float, original: float, fast: float, slow: float, truncate: bool
) -> tuple[float, float]:
    """The ends of YaRN's ramp in dimensions, the same in all of the programs."""
    low, high = (dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def _blend(own: Sequence[float], factor: float, low: float, span: float, kept: float = 1.0) -> list[float]:
    """Frequencies between own / factor and own; `kept` multiplies the share of own ones."""
    share = [kept * (1 - min(1.0, max(0.0, (d - low) / span))) for d in range(len(own))]
    return [theta * (k + (1 - k) / factor) for theta, k in zip(own, share, strict=True)]


def _restate_servers_yarn(rope: Mapping[str, Any], dim: int) -> list[float]:
    """The frequencies of `YaRNScalingRotaryEmbedding`, alike in vLLM and SGLang."""
    base, original = rope["rope_theta"], rope["original_max_position_embeddings"]
    fast, slow = (32.0 if rope.get("beta_fast") is None else rope["beta_fast"]), rope.get("beta_slow")
    truncate = rope.get("truncate", True)
    low, high = _correction_range(dim, base, original, fast, 1.0 if slow is None else slow, truncate)
    span = 0.001 if low == high else high - low
    kept = rope.get("extrapolation_factor", 1.0)
    return _blend(_powers(base, dim), rope["factor"], low, span, kept)


def _restate_llama3(rope: Mapping[str, Any], dim: int) -> list[float]:
    """vLLM's and SGLang's `Llama3RotaryEmbedding`, and llama.cpp's converter, which stores the quotients."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    result = []
    for theta in _powers(rope["rope_theta"], dim):
        turns = original * theta / (2 * math.pi)
        smooth = 1.0 if turns > high else 0.0 if turns < low else (turns - low) / (high - low) if low != high else 0.0
        result.append((1 - smooth) * theta / factor + smooth * theta)
    return result


def _mscale_pair(rope: Mapping[str, Any]) -> float | None:
    """The quotient that `mscale` and `mscale_all_dim` stand for when both are given."""
    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    if not one or not other:
        return None
    log_factor = math.log(max(rope["factor"], 1.0))
    return float((1 + 0.1 * one * log_factor) / (1 + 0.1 * other * log_factor))


def _restate_longrope(rope: Mapping[str, Any], dim: int, long: bool, context: int) -> tuple[list[float], float]:
    """`Phi3LongRoPEScaledRotaryEmbedding`, alike in vLLM and SGLang; neither reads `attention_factor`."""
    name = "long" if long else "short"
    original = rope["original_max_position_embeddings"]
    scale = context / original
    default = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    mscale = rope.get(f"{name}_mscale")
    inv_freq = [a / b for a, b in zip(_powers(rope["rope_theta"], dim), rope[f"{name}_factor"], strict=True)]
    return inv_freq, default if mscale is None else mscale


def _restate_vllm(request: Request, words: Expressed, length: int) -> Restated:
    """vLLM 0.33.0, `vllm/model_executor/layers/rotary_embedding/`: one file per rope_type, chosen in `__init__.py`; the
    limit on lengths is from `vllm/config/model.py`.

    Tables are made once, with a fixed number of rows. LongRoPE takes the long list whenever the server's limit
    (`--max-model-len`, here N) is above L, whatever the length of a prompt. `extrapolation_factor` is not read.
    """
    rope, context, dim = words.given, words.given["context"], request.dim
    kind = rope["rope_type"]
    if kind == "longrope":
        long = request.length > rope["original_max_position_embeddings"]
        inv_freq, factor = _restate_longrope(rope, dim, long, context)
        return Restated(inv_freq, factor, context if long else rope["original_max_position_embeddings"])
    if kind == "yarn":
        inv_freq = _restate_servers_yarn({**rope, "extrapolation_factor": 1.0}, dim)
        told = rope.get("attention_factor")
        factor = told if told is not None else _mscale_pair(rope) or _yarn_attention(rope["factor"])
        return Restated(inv_freq, factor, math.ceil(rope["original_max_position_embeddings"] * rope["factor"]))
    if kind == "llama3":
        return Restated(_restate_llama3(rope, dim), 1.0, context)
    divisor = rope["factor"] if kind == "linear" else 1.0
    return Restated([theta / divisor for theta in _powers(rope["rope_theta"], dim)], 1.0, int(context * divisor))


def _restate_sglang(request: Request, words: Expressed, length: int) -> Restated:
    """SGLang 0.5.23, `sglang/srt/layers/rotary_embedding/`: `factory.py`, `base.py`, `yarn.py`, `rope_variant.py`; how
    flags are merged into a config is from `sglang/srt/utils/hf_transformers/config.py`.

    YaRN knows `attn_factor`, a multiplier of its own factor, and not `attention_factor`. LongRoPE takes the long list
    for a batch that holds a position above L; a batch that ends at position L exactly reads row 0 of the long table.
    """
    rope, dim = words.given, request.dim
    kind = rope["rope_type"]
    if kind == "longrope":
        long = length - 1 > rope["original_max_position_embeddings"]
        return Restated(*_restate_longrope(rope, dim, long, request.length))
    if kind == "yarn":
        pair = _mscale_pair(rope)
        factor = (_yarn_attention(rope["factor"]) if pair is None else pair) * rope.get("attn_factor", 1.0)
        return Restated(_restate_servers_yarn(rope, dim), factor)
    if kind == "llama3":
        return Restated(_restate_llama3(rope, dim), 1.0)
    divisor = rope["factor"] if kind == "linear" else 1.0
    return Restated([theta / divisor for theta in _powers(rope["rope_theta"], dim)], 1.0)


def _restate_llama_cpp(request: Request, words: Expressed, length: int) -> Restated:
    """llama.cpp 0c1e570 (llama-cpp-python 0.3.36): `ggml/src/ggml-cpu/ops.cpp`, `ggml/src/ggml.c` (`rope_yarn`, its
    `corr_dims`), `src/llama-context.cpp` (flags and metadata), `conversion/llama.py` (the divisors of llama3).

    The ends of the ramp are always rounded outwards; its width is at least 0.001. With YaRN the context overwrites the
    given attention factor by one that cancels ggml's own 1 + 0.1·ln(s); the metadata key `rope.scaling.attn_factor`
    multiplies what results.
    """
    given, dim = words.given, request.dim
    own = _powers(given["freq_base"], dim)
    if "converted" in given:
        return Restated(_restate_llama3(given["converted"], dim), 1.0)
    if "divisors" in given:
        own = [theta / divisor for theta, divisor in zip(own, given["divisors"], strict=True)]
    scale = given.get("scale", 1.0) if given["scaling"] != "none" else 1.0
    factor = given.get("attn_factor", 1.0)
    if given["scaling"] != "yarn":
        return Restated([theta / scale for theta in own], factor)
    fast, slow = given["beta_fast"], given["beta_slow"]
    low, high = _correction_range(dim, given["freq_base"], given["orig_ctx"], fast, slow, truncate=True)
    inv_freq = _blend(own, scale, low, max(0.001, high - low), given["ext_factor"])
    return Restated(inv_freq, factor * _yarn_attention(scale))


def _restate_transformers(request: Request, words: Expressed, length: int) -> Restated:
    """No restatement: the installed transformers builds the model's own rotary module, which is asked."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = type(request.config).from_dict(_patched(request.config.to_dict(), words.config))
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        kinds = [type(module) for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        rotary = kinds[0](config=copy.deepcopy(config))
        rotary(torch.zeros(1), torch.tensor([[length - 1]]))  # the forward pass is where it follows the length
    except ConfigError:
        raise
    except Exception as error:  # whatever the model's code raises for words that it does not take
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"transformers cannot build the model with it: {text}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return Restated(rotary.inv_freq.tolist(), float(rotary.attention_scaling))


_CACHED = "{} computes one table for all lengths and caches rotated keys"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "transformers",
            "transformers",
            transformers.__version__,
            _express_transformers,
            _restate_transformers,
            "AutoModelForCausalLM.from_pretrained(DIR), with these keys in DIR/config.json",
        ),
        Target(
            "vllm",
            "vLLM",
            "0.33.0",
            _express_vllm,
            _restate_vllm,
            "vllm serve MODEL {flags}",
            _CACHED.format("vLLM"),
        ),
        Target(
            "sglang",
            "SGLang",
            "0.5.23",
            _express_sglang,
            _restate_sglang,
            "python -m sglang.launch_server --model-path MODEL {flags}",
            _CACHED.format("SGLang"),
        ),
        Target(
            "llama.cpp",
            "llama.cpp",
            "0c1e570",
            _express_llama_cpp,
            _restate_llama_cpp,
            "llama-server -m MODEL.gguf {flags}",
            "llama.cpp fixes the frequencies when it starts and caches rotated keys",
        ),
    )
}


# The command ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope export`: 0 when the target's numbers are ours, 1 when they differ, 2 when it has no words.

    Raises:
        ConfigError: bad input; a scaling that the target has no words for (with --json that is printed instead).
    """
    check_export_arguments(args)
    path = Path(args.model)
    name = str(path.parent) if path.name == "config.json" and path.is_file() else args.model
    config = load_config(name)
    report = export(args.scaling, config, args.target, args.length)
    if report.gguf is not None and not args.gguf and report.exit_code != 2:
        reason = (
            f"it has no flags for {report.scaling.label!r}, only a tensor in the GGUF: "
            "name a GGUF of the model with --gguf FILE --output DIR"
        )
        report = dataclasses.replace(report, status="refused", reason=reason)
    if args.gguf and report.gguf is None and report.exit_code != 2:
        raise ConfigError(f"flag --gguf is not needed: llama.cpp has words for {report.scaling.label!r}")
    written = []
    if args.output and report.exit_code != 2:
        written = _write(Path(args.output), name, report, args.gguf)
    if args.json:
        print(json.dumps(report.to_dict() | {"written": [str(file) for file in written]}, indent=1))
    elif report.status == "refused":
        raise ConfigError(f"{report.target}: {report.reason}")
    else:
        print(report)
        for file in written:
            print(f"wrote {file}")
    return report.exit_code


def _write(folder: Path, name: str, report: ExportReport, gguf: str | None) -> list[Path]:
    """Write config.json and, given one, the GGUF; both get their names when both are whole. Returns their paths."""
    raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
    raw.pop("_commit_hash", None)
    place = folder.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
            staged = Path(scratch) / "staged"
            if gguf is not None and report.gguf is not None:
                add_rope(gguf, staged / Path(gguf).name, report.gguf)
            write_atomic(staged / "config.json", json.dumps(_patched(raw, report.config), indent=2) + "\n")
            written = [folder / file.name for file in sorted(staged.iterdir())]
            if not place.exists():
                os.rename(staged, place)
            else:
                for file in staged.iterdir():
                    os.replace(file, place / file.name)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"--output {folder} cannot be written to: {error.strerror}") from error
    return written


def _patched(config: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the keys of `patch`, and without older keys that would contradict them."""
    kept = {key: value for key, value in config.items() if key not in _ROPE_KEYS_ELSEWHERE}
    return kept | dict(patch)
