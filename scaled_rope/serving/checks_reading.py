"""Checks for parts of a config that cannot be read at all."""

from __future__ import annotations

from collections.abc import Iterator

from scaled_rope.errors import ConfigError, first_line
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Finding


def rope_that_is_no_dictionary(facts: ConfigFacts) -> Iterator[Finding]:
    """Something else in the place of the RoPE dictionary."""
    if facts.rope_error:
        yield Finding("bad-value", "error", f"{facts.rope_error}.", "Write a dictionary, or null for no scaling.")


def rope_of_images(facts: ConfigFacts) -> Iterator[Finding]:
    """A rotary embedding with no context to extend."""
    if facts.of_images or (facts.read_error is not None and "two dimensions" in str(facts.read_error)):
        yield Finding(
            "no-context",
            "info",
            f"The rotary embedding of models of type {facts.model_type!r} turns by the places of patches in an image, "
            "so there is no context to extend, and a scaling does not apply.",
        )


def unreadable_scaling(facts: ConfigFacts) -> Iterator[Finding]:
    """A RoPE dictionary from which no scaling can be read."""
    error = facts.read_error
    if error is None or "two dimensions" in str(error):
        return  # the latter is what `rope_of_images` is for
    if not isinstance(error, ConfigError):
        text = f"The config cannot be read: {first_line(error)}."
        yield Finding("bad-value", "error", text, "Correct the types in it.")
        return
    message = str(error)
    text = message if message.endswith((".", "?")) else f"{message}."
    if message.startswith("unknown rope_type"):
        yield Finding("unknown-type", "error", text, "Write a rope_type that the program at hand knows.")
    elif message.startswith("factor is missing"):
        yield Finding("no-factor", "error", text, "Write factor = extended length / original length.")
    else:
        yield Finding("bad-value", "error", text, "Correct the value.")


def uncomputable_frequencies(facts: ConfigFacts) -> Iterator[Finding]:
    """A scaling whose numbers do not fit each other or the heads."""
    if facts.dimensions_error:
        yield Finding("bad-value", "error", f"{facts.dimensions_error}.", "Correct the value, or head_dim.")


def unreadable_layer_types(facts: ConfigFacts) -> Iterator[Finding]:
    """Layer types without a scaling that can be read, where that of the layers in question can."""
    if facts.own is None:
        return  # `unreadable_scaling` says why
    for name, error in facts.layer_errors.items():
        yield Finding("bad-value", "error", f"layer type {name!r}: {error}.", "Correct the value.")
