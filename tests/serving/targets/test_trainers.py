"""What TRL and verl, each a trainer and a rollout engine, make of an export."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from scaled_rope.serving.export import export
from scaled_rope.serving.targets import trainers, vllm
from scaled_rope.serving.targets.common import Restated
from tests.helpers.exports import command_line


@pytest.mark.parametrize("target", ["trl", "verl"])
def test_one_config_for_both_and_a_fragment_for_the_lengths(target: str, config: LlamaConfig) -> None:
    report = export("yarn:4,beta_fast=64,attention_factor=1.2", config, target)
    assert report.status == "exact" and not report.flags
    assert report.config["rope_parameters"]["attention_factor"] == 1.2
    (name, text), *others = report.files.items()
    fragment = yaml.safe_load(text)
    assert name == f"{target}.yaml" and not others
    rollout = fragment if target == "trl" else fragment["actor_rollout_ref"]["rollout"]
    assert rollout["vllm_max_model_length" if target == "trl" else "max_model_len"] == 2048


def test_both_dialects_are_in_the_config_of_plain_scalings(config: LlamaConfig) -> None:
    report = export("yarn:4", config, "verl")
    assert report.config["rope_scaling"]["type"] == "yarn" and report.config["rope_theta"] == 1e4


def test_a_rollout_engine_that_computes_something_else_is_refused(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = vllm.restate
    monkeypatch.setattr(vllm, "restate", lambda *args: Restated([2 * f for f in real(*args).inv_freq], 1.0))
    report = export("yarn:4", config, "trl")
    assert report.status == "refused" and "TRL computes frequencies up to" in report.reason


def test_a_trainer_that_computes_something_else_is_refused(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(*args: Any) -> tuple[list[float], float]:
        return [1.0] * 8, 1.0

    monkeypatch.setattr(trainers.hf, "numbers_in_transformers", off)
    assert export("yarn:4", config, "verl").status == "refused"


def test_limits_are_said(config: LlamaConfig) -> None:
    trl, verl = export("yarn:4", config, "trl").notes, export("yarn:4", config, "verl").notes
    assert any("model_init_kwargs reach the trainer alone" in note for note in trl)
    assert any("override_config cannot say it" in note for note in verl)
    assert any("Megatron engine takes the factor of any rope_scaling for linear interpolation" in note for note in verl)


def test_the_fragment_is_written(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command_line(folder, "--for", "verl", "--scaling", "yarn:4", "--output", str(out))[1]() == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "verl.yaml"]


def test_trl_has_fields_of_these_names(config: LlamaConfig) -> None:
    try:
        files = importlib.metadata.files("trl") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("TRL is not installed")
    places = {Path(str(file)).name: Path(str(file.locate())) for file in files if "trl/trainer/" in str(file)}
    text = "".join(places[name].read_text(encoding="utf-8") for name in ("grpo_config.py", "model_config.py"))
    for name in yaml.safe_load(export("yarn:4", config, "trl").files["trl.yaml"]):
        assert f"    {name}: " in text, name
