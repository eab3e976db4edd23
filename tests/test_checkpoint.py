"""Names of checkpoints."""

from __future__ import annotations

from scaled_rope.checkpoint import DEFAULT_MODEL, display_name, first_line


def test_display_names() -> None:
    assert display_name("models/tiny-llama-256") == "tiny-llama-256"
    assert display_name("out/demo/model") == "demo"
    assert display_name("NousResearch/Llama-2-7b-hf") == "Llama-2-7b-hf"
    assert DEFAULT_MODEL.parent.name == "models"


def test_a_message_that_only_announces_another_line_is_given_with_it() -> None:
    assert first_line(ValueError("no such file\nat all")) == "no such file"
    assert first_line(ValueError("Validation error for field 'x':\n\n  must be a dictionary\nmore")) == (
        "Validation error for field 'x': must be a dictionary"
    )
    assert first_line(KeyError()) == "KeyError"
