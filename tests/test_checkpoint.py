"""Names of checkpoints."""

from __future__ import annotations

from scaled_rope.checkpoint import DEFAULT_MODEL, display_name


def test_display_names() -> None:
    assert display_name("models/tiny-llama-256") == "tiny-llama-256"
    assert display_name("out/demo/model") == "demo"
    assert display_name("NousResearch/Llama-2-7b-hf") == "Llama-2-7b-hf"
    assert DEFAULT_MODEL.parent.name == "models"
