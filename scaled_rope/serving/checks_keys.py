"""Keys of a config that nothing reads: on the top level, and in the RoPE dictionary of a rope_type."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from scaled_rope.errors import ConfigError, is_number
from scaled_rope.scaling.formulas import attention_factor_of
from scaled_rope.scaling.hf_config import NATIVE, unread_keys, usual_name
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.config_facts import (
    TOP_LEVEL_KEYS,
    ConfigFacts,
    build_text_config,
    known_keys,
    native_keys_of,
)
from scaled_rope.serving.inspect_report import Finding, shorten

_FOREIGN = {  # what other programs call it, or have in addition: (neutral value, what to write instead)
    "attn_factor": (1.0, "SGLang multiplies 0.1·ln(s) + 1 by it; write their product as attention_factor"),
    "extrapolation_factor": (1.0, "vLLM and this package read it; in a spec: yarn:S,extrapolation_factor=X"),
    "apply_yarn_scaling": (True, "vLLM's switch for the attention factor; write attention_factor=1.0 to switch it off"),
    "yarn_attn_factor": (1.0, "llama.cpp's word; write attention_factor"),
    "yarn_ext_factor": (1.0, "llama.cpp's word; in a spec: yarn:S,extrapolation_factor=X"),
    "short_mscale": (None, "vLLM and SGLang multiply cos and sin by it; write it as attention_factor as well"),
    "long_mscale": (None, "vLLM and SGLang multiply cos and sin by it; write it as attention_factor as well"),
    "alpha": (None, "the base grows as theta·alpha^(D/(D-2)): write that as rope_theta, or use the spec ntk:ALPHA"),
}


def misspelt_top_level_keys(facts: ConfigFacts) -> Iterator[Finding]:
    """Keys on the top level that look like ones that count."""
    for _, key, meant in misspelt_keys(facts):
        yield Finding(
            "misspelt-key",
            "error",
            f"{key!r} is no key that anything reads, so what it says has no effect.",
            f"Probably meant: {meant!r}.",
        )


def misspelt_keys(facts: ConfigFacts) -> Iterator[tuple[bool, str, str]]:
    """(whether it is in the text part, the key, the key that was meant)."""
    known = set(TOP_LEVEL_KEYS)
    if facts.built is not None:
        known |= {f.name for f in dataclasses.fields(facts.built)}
    composite = bool(facts.path) and isinstance(facts.raw.get(facts.path[0]), Mapping)
    places = [(False, facts.raw), (True, facts.text)] if composite else [(True, facts.text)]
    for in_text, place in places:
        for key, value in place.items():
            if key in known or value is None:
                continue
            near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1, cutoff=0.87)
            if near and near[0] not in place:
                yield in_text, key, near[0]


def rope_keys_outside_the_text_part(facts: ConfigFacts) -> Iterator[Finding]:
    """Keys of a composite config beside its text part, where they belong."""
    for key, place in unread_keys(facts.raw, facts.path).items():
        if not has_no_effect(facts, key):
            continue  # some classes of older families hand it on
        outer: Any = facts.raw
        said = dict(facts.text)
        for name in facts.path:
            said |= {key: outer[key]} if outer.get(key) else {}
            outer = outer[name]
        same = facts.own is not None and _reads_as(said) == facts.own
        text = f"{key} stands outside of {place}, where programs read the RoPE of this model, so it has no effect."
        yield Finding(
            "outside-text",
            "info" if same else "error",
            f"{text[:-1]}; {place} says the same." if same else text,
            "Delete it." if same else f"Move it into {place}; `scaled-rope repair` does.",
        )


def has_no_effect(facts: ConfigFacts, key: str) -> bool:
    """Whether nobody reads a key outside of the text part: transformers makes the same text part without it."""
    if facts.built is None:
        return True  # nothing is known of the family but the keys
    without = dict(facts.raw)
    place = without
    for name in facts.path:
        place.pop(key, None)
        if not isinstance(place.get(name), Mapping):
            return False  # an older config, with the text part on the top level
        place[name] = place = dict(place[name])
    other = build_text_config(without)[0]
    said = [getattr(config, "rope_parameters", None) for config in (other, facts.built)]
    return other is not None and said[0] == said[1]


def _reads_as(config: Mapping[str, Any]) -> RopeScaling | None:
    try:
        return RopeScaling.read_config(config)[0]
    except (ConfigError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return None


def keys_unknown_to_the_rope_type(facts: ConfigFacts) -> Iterator[Finding]:
    """Keys of the RoPE dictionary that its rope_type does not have."""
    known = known_keys(facts) or set()
    rope_type = usual_name(facts.rope_type)
    for key, value in facts.ignored.items():
        text = f"{key}={shorten(value)} is no key of rope_type {rope_type!r}: transformers logs a line and ignores it."
        if key == "attn_factor" and is_number(value) and value != 1 and facts.own is not None:
            yield _attn_factor(facts.own, value)
        elif key in _FOREIGN:
            yield _foreign_key(key, value, text)
        else:
            yield Finding("unknown-key", "error", text, _right_place(key, rope_type, known))


def _foreign_key(key: str, value: Any, text: str) -> Finding:
    """A key of another program, which says nothing at its neutral value."""
    neutral, remedy = _FOREIGN[key]
    if value == neutral:
        return Finding("foreign-key", "info", text, "Delete it: this value changes nothing.")
    return Finding("foreign-key", "error", text, f"Delete it; {remedy}.")


def _attn_factor(own: RopeScaling, value: float) -> Finding:
    """A multiplier of YaRN's attention factor that some programs read: the factor in each of them."""
    default = attention_factor_of(math.log(own.factor), 1.0)
    product = default * value
    ours = own.static_attention_factor
    if own.attention_factor is not None and math.isclose(product, ours, rel_tol=1e-5):
        text = f"attn_factor={value!r} says to SGLang what attention_factor says to others: {ours:.6g}."
        return Finding("foreign-key", "info", text)
    return Finding(
        "foreign-key",
        "error",
        f"attn_factor={value!r} is read by SGLang and by older releases of vLLM (0.11), which multiply "
        f"0.1·ln(s) + 1 = {default:.6g} by it and get {product:.6g}. transformers and newer releases of vLLM (0.33) "
        f"ignore it and get {ours:.6g}.",
        f"Write attention_factor={product:.6g} beside it if the model was trained so, or else delete attn_factor; "
        f"`scaled-rope repair` does either.",
    )


def owners_of(key: str) -> list[str]:
    """The rope_types of transformers that have a key."""
    return [name for name, native in NATIVE.items() if key in native.keys]


def _right_place(key: str, rope_type: str, known: Collection[str]) -> str:
    """The rope_types that have a key, or the key that was meant, or those that there are."""
    if owners := owners_of(key):
        return f"It belongs to rope_type {' or '.join(map(repr, owners))}."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"Probably meant: {near[0]!r}."
    return f"Keys of this rope_type: {', '.join(sorted(native_keys_of(rope_type)))}."
