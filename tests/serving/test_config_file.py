"""Configs from files and objects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from scaled_rope import ConfigError
from scaled_rope.serving.config_file import config_as_dictionary, read_config_file
from tests.helpers.facts import LLAMA


def test_a_folder_and_its_file_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config_file(tmp_path) == read_config_file(str(tmp_path / "config.json")) == LLAMA


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: "),
        (b"null", "holds null: must be a dictionary"),
        (b"3", "holds a int: must be a dictionary"),
        (b"\x89PNG\xff", "is not JSON, and not text"),
        (b"GGUF\x03", "is a GGUF file"),
        (b" " * ((16 << 20) + 1), "is larger than 16 MiB"),
        (b"[" * 100000, "is not JSON: "),
    ],
)
def test_a_file_that_is_no_config(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config_file(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must be a folder, a config.json or a hub name"),
        ("nothere", "does not exist, and a hub name is OWNER/NAME"),
        ("a/b/c", "'a/b/c' does not exist$"),
        ("a/b.json", "'a/b.json' does not exist$"),
        ("models/nothere", "'models/nothere' does not exist$"),  # a folder here
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config_file(name)


def test_dictionaries_and_objects() -> None:
    given = {"model_type": "llama"}
    read = config_as_dictionary(given)
    assert read == given and read is not given
    assert config_as_dictionary(LlamaConfig(hidden_size=64))["hidden_size"] == 64
    with pytest.raises(ConfigError, match="config of type int: must be a model's config"):
        config_as_dictionary(3)
