"""Names of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaled_rope.checkpoint import DEFAULT_MODEL, display_name, first_line, load_config
from scaled_rope.errors import ConfigError


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


@pytest.mark.parametrize("value", [5, "x", [1], {"rope_theta": 1e4}, list(range(10_000))])
def test_a_part_that_is_no_block_of_settings_is_named(tmp_path: Path, value: object) -> None:
    config = json.loads((Path(DEFAULT_MODEL) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": value}))
    with pytest.raises(ConfigError, match=r"text_config = .* is not allowed; model_type 'llama' has no such") as raised:
        load_config(str(tmp_path))
    assert len(str(raised.value)) < 1000
