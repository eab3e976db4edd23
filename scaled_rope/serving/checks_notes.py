"""Findings for everything that the reader of configs assumed or ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from scaled_rope.scaling.hf_config import RECORD_KEY, SOFTMAX_MSCALE_FAMILIES, ConfigNote, comparable
from scaled_rope.serving.checks_lengths import looks_extended
from scaled_rope.serving.checks_transformers import difference_from_transformers
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Finding, Level, shorten

_REMEDIES = {
    "both-dialects": "Keep one of them: rope_parameters for transformers 5, rope_scaling for older programs.",
    "flat-parameters": 'Nest it: "rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}.',
    "nested-truncate": "transformers looks for truncate beside the layer types, not inside one; move it there.",
    "two-values": "Delete the one that is ignored, after making sure that it is the wrong one.",
    "no-theta": "Write rope_theta, from the model's card or its code.",
    "family-theta": "Write rope_theta, so that no program needs to know the family.",
    "no-original": "Write original_max_position_embeddings, the length of pre-training, into the RoPE dictionary.",
    "mistral-constants": "Write beta_fast=128, beta_slow=2 and the attention_factor into the config; "
    "`scaled-rope export` prints it.",
    "mistral-llama-constants": "Write the constants that the model was trained with; if those are Llama's, write "
    "beta_fast=32 and beta_slow=1.",
    "other-name": "Write it under the name that the family has for it, or delete it.",
    "dynamic-factor": "Write finetuned: true if the model was trained with that factor; otherwise delete the factor.",
    "lone-mscale": "Write both, or better the attention_factor that you mean: they only count as a ratio.",
    "stale-record": f"Delete {RECORD_KEY} from the config, or write rope_parameters back.",
}
_LEVELS: dict[str, Level] = {"flat-parameters": "error"}


def remarks_of_the_reader(facts: ConfigFacts) -> Iterator[Finding]:
    """One finding per note, in the order in which the reader made them."""
    for note in facts.notes:
        yield _BY_CODE.get(note.code, plain_note)(facts, note)


def plain_note(facts: ConfigFacts, note: ConfigNote) -> Finding:
    """A note as it stands, with its remedy."""
    return _finding(note, note.text)


def _finding(note: ConfigNote, text: str, level: Level | None = None) -> Finding:
    return Finding(note.code, level or _LEVELS.get(note.code, note.level), f"{text}.", _REMEDIES.get(note.code, ""))


def missing_original_length(facts: ConfigFacts, note: ConfigNote) -> Finding:
    """Without L, transformers takes max_position_embeddings for it; often that is L' already."""
    context = facts.context or 0
    factor = facts.own.factor if facts.own is not None else 1.0
    if not looks_extended(context, factor):
        return Finding(note.code, note.level, f"{note.text}.", _REMEDIES[note.code])
    return Finding(
        "factor-twice",
        "warning",
        f"original_max_position_embeddings is missing, so max_position_embeddings={context} is taken for it "
        f"and the scaling leads to {factor * context:.0f} tokens. If {context} is the extended length already, "
        f"the factor counts twice, and the original length is {context / factor:.0f}.",
        f"Write original_max_position_embeddings: {context / factor:.0f} or {context}.",
    )


def lone_mscale(facts: ConfigFacts, note: ConfigNote) -> Finding:
    """One of mscale and mscale_all_dim without the other; some families' attention reads the latter by itself."""
    values = {name: facts.entry.get(name) for name in ("mscale", "mscale_all_dim")}
    if None not in values.values():  # one of them is 0
        zero, other = sorted(values, key=lambda name: bool(values[name]))
        text = (
            f"{zero}={values[zero]!r} counts as not said, so {other}={values[other]!r} is ignored, as in transformers."
        )
        return Finding(note.code, note.level, text, "Write the attention_factor that you mean, and neither of them.")
    if facts.model_type not in SOFTMAX_MSCALE_FAMILIES or not note.text.startswith("mscale_all_dim"):
        return _finding(note, note.text)
    return Finding(
        "mscale-twice",
        "warning",
        "mscale_all_dim without mscale: the model's attention multiplies the softmax scale by its square, and "
        "cos and sin get 0.1·ln(s) + 1 on top, because only the ratio of both mscales cancels that.",
        "Write mscale as well, equal to mscale_all_dim, as the published models have it.",
    )


def both_dialects(facts: ConfigFacts, note: ConfigNote) -> Finding:
    """rope_scaling and rope_parameters at once, which say the same or do not."""
    one, other = facts.text.get("rope_scaling"), facts.text.get("rope_parameters")
    if comparable(one) == comparable(other):
        finding = _finding(note, f"{note.text}; they say the same", "info")
        return replace(finding, remedy="Older programs read rope_scaling; change both, or delete it.")
    return _finding(note, f"{note.text}; they disagree: {_differences(one, other)}", "warning")


def mistral_constants(facts: ConfigFacts, note: ConfigNote) -> Finding:
    """A released Yarn-Mistral model, with how far other programs are off."""
    return _finding(note, note.text + difference_from_transformers(facts))


_BY_CODE: dict[str, Callable[[ConfigFacts, ConfigNote], Finding]] = {
    "no-original": missing_original_length,
    "lone-mscale": lone_mscale,
    "both-dialects": both_dialects,
    "mistral-constants": mistral_constants,
}
"""Notes that the rest of the config says more about; all others are `plain_note`s."""


def _differences(one: Any, other: Any) -> str:
    a, b = comparable(one), comparable(other)
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return f"{shorten(one)} and {shorten(other)}"
    names = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    return ", ".join(f"{name} {shorten(a.get(name))} and {shorten(b.get(name))}" for name in names)
