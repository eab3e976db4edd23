"""Keys of a config that nothing reads: on the top level, and in the RoPE dictionary of a rope_type."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator
from typing import Any

from scaled_rope.scaling.hf_config import NATIVE, usual_name
from scaled_rope.serving.config_facts import TOP_LEVEL_KEYS, ConfigFacts, known_keys, native_keys_of
from scaled_rope.serving.inspect_report import Finding, shorten

_FOREIGN = {  # what other programs call it, or have in addition: (neutral value, what to write instead)
    "attn_factor": (1.0, "vLLM multiplies 0.1·ln(s) + 1 by it; write their product as attention_factor"),
    "extrapolation_factor": (1.0, "vLLM and this package read it; in a spec: yarn:S,extrapolation_factor=X"),
    "apply_yarn_scaling": (True, "vLLM's switch for the attention factor; write attention_factor=1.0 to switch it off"),
    "yarn_attn_factor": (1.0, "llama.cpp's word; write attention_factor"),
    "yarn_ext_factor": (1.0, "llama.cpp's word; in a spec: yarn:S,extrapolation_factor=X"),
    "alpha": (None, "the base grows as theta·alpha^(D/(D-2)): write that as rope_theta, or use the spec ntk:ALPHA"),
}


def misspelt_top_level_keys(facts: ConfigFacts) -> Iterator[Finding]:
    """Keys on the top level that look like ones that count."""
    known = set(TOP_LEVEL_KEYS)
    if facts.built is not None:
        known |= {f.name for f in dataclasses.fields(facts.built)}
    for place in (facts.raw, facts.text) if facts.text is not facts.raw else (facts.raw,):
        for key, value in place.items():
            if key in known or value is None:
                continue
            near = difflib.get_close_matches(key, TOP_LEVEL_KEYS, n=1, cutoff=0.87)
            if near and near[0] not in place:
                yield Finding(
                    "misspelt-key",
                    "error",
                    f"{key!r} is no key that anything reads, so what it says has no effect.",
                    f"Probably meant: {near[0]!r}.",
                )


def keys_unknown_to_the_rope_type(facts: ConfigFacts) -> Iterator[Finding]:
    """Keys of the RoPE dictionary that its rope_type does not have."""
    known = known_keys(facts) or set()
    rope_type = usual_name(facts.rope_type)
    for key, value in facts.ignored.items():
        text = f"{key}={shorten(value)} is no key of rope_type {rope_type!r}: transformers logs a line and ignores it."
        if key in _FOREIGN:
            yield _foreign_key(key, value, text)
        else:
            yield Finding("unknown-key", "error", text, _right_place(key, rope_type, known))


def _foreign_key(key: str, value: Any, text: str) -> Finding:
    """A key of another program, which says nothing at its neutral value."""
    neutral, remedy = _FOREIGN[key]
    if value == neutral:
        return Finding("foreign-key", "info", text, "Delete it: this value changes nothing.")
    return Finding("foreign-key", "error", text, f"Delete it; {remedy}.")


def _right_place(key: str, rope_type: str, known: Collection[str]) -> str:
    """The rope_types that have a key, or the key that was meant, or those that there are."""
    owners = [name for name, native in NATIVE.items() if key in native.keys]
    if owners:
        return f"It belongs to rope_type {' or '.join(map(repr, owners))}."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"Probably meant: {near[0]!r}."
    return f"Keys of this rope_type: {', '.join(sorted(native_keys_of(rope_type)))}."
