"""What transformers makes of an export."""

from __future__ import annotations

from transformers import LlamaConfig

from scaled_rope.serving.export import export


def test_dynamic_ntk_of_transformers_follows_the_length(config: LlamaConfig) -> None:
    report = export("dynamic-ntk:2", config, "transformers")
    assert report.status == "exact"
    assert [c.length for c in report.comparisons] == [512, 1024]
    assert any("cached keys" in note for note in report.notes)
