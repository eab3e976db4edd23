"""Findings about a config.json as notes of the commands that go on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scaled_rope.cli import main
from scaled_rope.errors import ConfigError
from scaled_rope.serving.config_remarks import config_remarks, is_carried
from tests.helpers.facts import LLAMA
from tests.helpers.published_configs import LLAMA3

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
}
TWICE = QWEN | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
LINEAR_TWICE = QWEN | {"rope_scaling": {"type": "linear", "factor": 4.0}}
MISSPELT = QWEN | {"rope_scalling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
TWO_BASES = QWEN | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LONG = QWEN | {"rope_scaling": LLAMA3["rope_scaling"]}


def folder_of(path: Path, config: dict[str, Any]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("spec", "carried"),
    [
        ("checkpoint", True),
        ("checkpoint:8", True),
        ("yarn:checkpoint", True),
        ("yarn:4", False),
        ("default", False),
        ("dynamic-yarn,beta_fast=16", False),
    ],
)
def test_specs_that_depend_on_the_checkpoint(spec: str, carried: bool) -> None:
    assert is_carried(spec) is carried


def test_a_whole_config_has_no_remarks() -> None:
    assert config_remarks(LLAMA, "M") == []


def test_errors_and_warnings_are_told_in_one_line_each() -> None:
    (remark,) = config_remarks(TWO_BASES, "M")
    assert remark.startswith("config.json, warning [two-values]: rope_theta=1000000.0 on the top level is ignored")
    assert config_remarks(TWO_BASES, "M", without=("two-values",)) == []


def test_what_is_open_is_refused_by_name_until_it_is_decided() -> None:
    with pytest.raises(
        ConfigError, match=r"model 'M': \[factor-twice\] .*repair M`.*--scaling yarn:4,original_max_pos"
    ):
        config_remarks(TWICE, "M")
    with pytest.raises(ConfigError, match=r"\[factor-twice\] .*--scaling linear:4,original_max_pos"):
        config_remarks(LINEAR_TWICE, "M")
    assert config_remarks(LINEAR_TWICE, "M", "linear:4,original_max_position_embeddings=32768") == []
    with pytest.raises(ConfigError, match=r"model 'M': \[misspelt-key\] 'rope_scalling' .*--scaling METHOD:FACTOR"):
        config_remarks(MISSPELT, "M", "checkpoint:2")
    assert "[factor-twice]" in config_remarks(TWICE, "M", decided=True)[0]
    assert "[factor-twice]" in config_remarks(TWICE, "M", "yarn:2")[0]
    assert "[misspelt-key]" in config_remarks(MISSPELT, "M", "yarn:2")[0]
    assert config_remarks(TWICE, "M", "yarn:4,original_max_position_embeddings=32768") == []


@pytest.mark.parametrize(
    "command", [["export", "--for", "vllm"], ["plan", "--serve"], ["certify", "--server", "http://127.0.0.1:9"]]
)
@pytest.mark.parametrize("config", [TWICE, LINEAR_TWICE, MISSPELT])
def test_commands_refuse_a_scaling_that_is_open(
    command: list[str], config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(tmp_path / "m", config)
    name, *flags = command
    argv = [name, *flags, model] if name == "plan" else [name, model, *flags]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"scaled-rope repair {model}" in line and "--scaling" in line


def test_a_length_settles_what_is_open_of_a_linear_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PI's frequencies do not depend on L. YaRN's do, so a length alone does not tell them."""
    model = folder_of(tmp_path / "linear", LINEAR_TWICE)
    assert main(["export", model, "--for", "vllm", "--length", "32768"]) == 0
    told = capsys.readouterr().out
    assert "--max-model-len 32768" in told and "[factor-twice]" in told
    assert main(["export", folder_of(tmp_path / "yarn", TWICE), "--for", "vllm", "--length", "32768"]) == 2
    dynamic = LINEAR_TWICE | {"rope_scaling": {"type": "dynamic-linear", "factor": 4.0, "finetuned": True}}
    with pytest.raises(ConfigError, match=r"\[factor-twice\]"):
        config_remarks(dynamic, "M", length=32768)


def test_advise_refuses_a_scaling_that_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts = folder_of(tmp_path / "m", TWICE), tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "some words"}) + "\n")
    argv = ["advise", model, "--target", "262144", "--dataset", str(texts), "--output", str(tmp_path / "out")]
    assert main([*argv, "--minutes", "1"]) == 2
    assert "[factor-twice]" in capsys.readouterr().err


def test_export_and_plan_say_what_inspect_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(tmp_path / "m", TWO_BASES)
    assert main(["export", model, "--for", "vllm", "--scaling", "yarn:2"]) == 0
    told = capsys.readouterr()
    assert "  - config.json, warning [two-values]: rope_theta=1000000.0 on the top level is ignored" in told.out
    assert told.err == ""
    assert main(["plan", "--serve", model]) == 0
    assert "note: config.json, warning [two-values]: rope_theta=1000000.0" in capsys.readouterr().out


def test_a_scaling_that_is_shorter_than_what_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder_of(tmp_path / "m", LONG)
    words = "replaces llama3 x8: it is for 32768 tokens, and the checkpoint reached 131072; yarn:16 reaches that"
    for argv in (["export", model, "--for", "vllm"], ["plan", "--serve", model], ["inspect", model]):
        assert main([*argv, "--scaling", "yarn:4"]) == 0
        assert " ".join(capsys.readouterr().out.split()).count(words) == 1, argv
        assert main([*argv, "--scaling", "yarn:16"]) == 0
        assert "replaces" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["export", "--for", "vllm"], ["plan", "--serve"]])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (QWEN | {"rope_theta": "1e6"}, "[bad-value] rope_theta='1e6': must be a finite number"),
        (
            TWICE | {"rope_scaling": {"type": "yarn", "factor": "4.0"}},
            "[bad-value] factor='4.0': must be a finite number",
        ),
        (TWICE | {"rope_scaling": {"type": "YaRN", "factor": 4.0}}, "[unknown-type] unknown rope_type 'YaRN'; known: "),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_in_the_words_of_inspect(
    words: list[str], config: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder_of(tmp_path / "m", config)
    assert main([words[0], model, *words[1:]] if words[0] == "export" else [*words, model]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: model {model!r}: {said}") and f"scaled-rope repair {model}" in line
