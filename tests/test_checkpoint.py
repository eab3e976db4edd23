"""Names of checkpoints."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import transformers

from scaled_rope.checkpoint import (
    DEFAULT_MODEL,
    check_local,
    display_name,
    load_config,
    open_checkpoint,
    quiet_transformers,
)
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.record import RopeSettings


def test_display_names() -> None:
    assert display_name("models/tiny-llama-256") == "tiny-llama-256"
    assert display_name("out/demo/model") == "demo"
    assert display_name("NousResearch/Llama-2-7b-hf") == "Llama-2-7b-hf"
    assert DEFAULT_MODEL.parent.name == "models"


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_that_we_are_in(name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed; the name is empty"):
        check_local(name)


@pytest.mark.parametrize("value", [5, "x", [1], {"rope_theta": 1e4}, list(range(10_000))])
def test_a_part_that_is_no_block_of_settings_is_named(tmp_path: Path, value: object) -> None:
    config = json.loads((Path(DEFAULT_MODEL) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": value}))
    with pytest.raises(ConfigError, match=r"text_config = .* is not allowed; model_type 'llama' has no such") as raised:
        load_config(str(tmp_path))
    assert len(str(raised.value)) < 1000


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "rope_theta": 1e4,
    "max_position_embeddings": 16384,
}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("said", "original", "words"),
    [
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096}}, 4096, ""),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 4096}, 4096, ""),  # which transformers fills in
        ({"rope_scaling": YARN}, 16384, "original_max_position_embeddings is missing"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 4096, "rope_theta": 5e5}},
            4096,
            "rope_theta=10000.0 on the top level is ignored: rope_theta=500000.0 counts",
        ),
    ],
)
def test_warnings_are_about_the_config_as_it_is_written(
    said: dict[str, object], original: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | said))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = open_checkpoint(str(tmp_path)).settings
    assert settings.scaling.original_max_position_embeddings == original
    assert len(caught) == bool(words) and all(words in str(one.message) for one in caught)


def test_a_config_json_that_is_none_leaves_the_remarks_on_the_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": YARN}))
    config = load_config(str(tmp_path))
    own = RopeSettings(config).notes()
    for written in ({"model_type": "llama", "rope_scaling": "yarn"}, {"model_type": "qwen2"}):
        assert RopeSettings(config, written).notes() == own


def test_a_base_beside_the_text_part_is_warned_about(tmp_path: Path) -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "llava", "text_config": LLAMA, "vision_config": vision, "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="rope_theta outside of text_config is read by nobody"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_is_as_loud_afterwards_as_it_was(bars: bool) -> None:
    loudness, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")
    before, level, shown = loudness.get_verbosity(), hub.level, loudness.is_progress_bar_enabled()
    change = {True: loudness.enable_progress_bar, False: loudness.disable_progress_bar}
    try:
        loudness.set_verbosity(loudness.INFO)
        hub.setLevel(logging.WARNING)
        change[bars]()
        with pytest.raises(KeyError), quiet_transformers(hide_bars=True):
            assert (loudness.get_verbosity(), hub.level) == (loudness.ERROR, logging.CRITICAL)
            assert not loudness.is_progress_bar_enabled()
            raise KeyError
        assert (loudness.get_verbosity(), hub.level) == (loudness.INFO, logging.WARNING)
        assert loudness.is_progress_bar_enabled() == bars
    finally:
        loudness.set_verbosity(before)
        hub.setLevel(level)
        change[shown]()
