"""Where a config comes from: released YaRN models, code in the checkpoint, families that transformers does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import transformers

from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Finding


def finetuned_flag(facts: ConfigFacts) -> Iterator[Finding]:
    """A key that only the code released with YaRN reads."""
    if facts.entry.get("finetuned") is True:
        yield Finding(
            "finetuned",
            "info",
            "finetuned=true is read by the code that was released with YaRN: a dynamic scaling then starts at the "
            "factor instead of 1. Static ones are the same with and without; transformers logs a line.",
        )


def code_in_the_checkpoint(facts: ConfigFacts) -> Iterator[Finding]:
    """auto_map names code that trust_remote_code would run."""
    names, known = _code_names(facts), facts.known_to_transformers
    if names:
        yield Finding(
            "remote-code",
            "info" if known else "warning",
            f"auto_map names code in the checkpoint ({', '.join(names)}). It is never run here; with "
            "trust_remote_code=True it would replace the model's classes, rotary embedding included. "
            + (f"Read as model_type {facts.model_type!r} of transformers." if known else "Nothing else knows it."),
            "Leave trust_remote_code off." if known else "Compare with the code what this report says.",
        )


def family_unknown_to_transformers(facts: ConfigFacts) -> Iterator[Finding]:
    """A model_type that nothing here knows, and no code in the checkpoint either."""
    if facts.model_type is None or facts.known_to_transformers or _code_names(facts):
        return
    yield Finding(
        "unknown-family",
        "warning",
        f"transformers {transformers.__version__} does not know model_type {facts.model_type!r}: this report is "
        "from the config's keys alone.",
        "Compare with the model's code what this report says.",
    )


def _code_names(facts: ConfigFacts) -> list[str]:
    code = facts.raw.get("auto_map")
    return sorted({str(value) for value in code.values()}) if isinstance(code, Mapping) else []
