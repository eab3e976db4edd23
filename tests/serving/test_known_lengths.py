"""Lengths that are known of a model whose config does not say them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from scaled_rope import RopeScaling, load_model, unpatch_model
from scaled_rope.cli import main
from scaled_rope.scaling.known_lengths import known_lengths
from scaled_rope.scaling.record import RopeSettings
from scaled_rope.serving.export import export, served_length
from scaled_rope.serving.inspect_config import inspect

LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
GEMMA: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 61, "num_attention_heads": 4},
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "sliding_window": 32,
    "rope_parameters": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def gemma(**settings: Any) -> Any:
    return CONFIG_MAPPING["gemma3_text"](**GEMMA | settings)


def test_gemma_3_is_known_as_it_is_published() -> None:
    config = gemma()
    settings = RopeSettings(config)
    own = settings.scaling
    assert (own.method, own.factor, own.original_max_position_embeddings) == ("linear", 8.0, 32768)
    assert settings.length_for(own) == settings.reach == served_length(own, config) == 131072
    asked = RopeScaling("yarn", 8.0, 32768, 1e6)
    assert settings.length_for(asked) == served_length(asked, config) == 262144


@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-ntk:2", "ntk:4"])
def test_every_command_counts_a_factor_from_the_same_length(spec: str, tmp_path: Path) -> None:
    """The loader of training and evaluation, and what inspect and export read."""
    whole = CONFIG_MAPPING["gemma3_text"](**GEMMA)
    AutoModelForCausalLM.from_config(whole).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), scaling=spec, device="cpu")
    assert RopeSettings(model.config).scaling.original_max_position_embeddings == 32768
    assert inspect(json.loads((tmp_path / "config.json").read_text()), scaling=spec).lengths["original"] == 32768
    unpatch_model(model)
    model.save_pretrained(tmp_path / "again")
    assert RopeSettings(json.loads((tmp_path / "again" / "config.json").read_text())).reach == 131072


@pytest.mark.parametrize(
    "settings",
    [
        {"max_position_embeddings": 32768},
        {"rope_parameters": GEMMA["rope_parameters"] | {"full_attention": LINEAR | {"factor": 4.0}}},
        {"rope_parameters": GEMMA["rope_parameters"] | {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    ],
)
def test_a_gemma_3_that_was_changed_is_not_known(settings: dict[str, Any]) -> None:
    config = gemma(**settings)
    assert RopeSettings(config).reach is None
    assert RopeSettings(config).scaling.original_max_position_embeddings == config.max_position_embeddings


def test_a_length_that_the_config_says_counts() -> None:
    said = LINEAR | {"original_max_position_embeddings": 16384}
    config = gemma(rope_parameters=GEMMA["rope_parameters"] | {"full_attention": said})
    settings = RopeSettings(config)
    assert settings.scaling.original_max_position_embeddings == 16384 and settings.known_lengths() is None


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic", "llama3", "longrope"])
def test_lengths_that_set_the_frequencies_are_those_of_transformers(rope_type: str) -> None:
    assert known_lengths(QWEN_1M, "default", None) is not None
    assert known_lengths(QWEN_1M, rope_type, 4.0) is None


@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_export_of_gemma_3_ends_where_the_model_does(
    target: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma().save_pretrained(tmp_path)
    main(["export", str(tmp_path), "--for", target])
    out = capsys.readouterr().out
    assert "131072" in out and "1048576" not in out
    assert "info [known-original]: The original length is 32768 tokens" in out


def test_plan_of_gemma_3_ends_where_the_model_does(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gemma().save_pretrained(tmp_path)
    assert main(["plan", "--serve", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "sequences of 131072 tokens" in out and "note: config.json, info [known-original]" in out


QWEN_1M: dict[str, Any] = {
    "model_type": "qwen2",
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 2, "vocab_size": 61, "max_position_embeddings": 1010000, "rope_theta": 1e7},
    "dual_chunk_attention_config": {
        **{"chunk_size": 262144, "local_size": 8192},
        "original_max_position_embeddings": 262144,
    },
}


def test_inspect_says_what_attention_in_chunks_is() -> None:
    report = inspect(QWEN_1M)
    assert report.codes == ["dual-chunk", "known-original"] and report.exit_code == 0
    assert report.lengths["original"] == 262144 and report.lengths["extended"] is None
    (finding,) = [one for one in report.findings if one.code == "dual-chunk"]
    assert finding.level == "warning" and "chunk_size=262144" in finding.text and "Dual Chunk Attention" in finding.text
    assert inspect(QWEN_1M, scaling="yarn:4").lengths["extended"] == 1048576
    for other in (None, {}, {"original_max_position_embeddings": "262144"}):
        assert inspect(QWEN_1M | {"dual_chunk_attention_config": other}).lengths["original"] == 1010000


@pytest.mark.parametrize(
    ("target", "spec", "status"),
    [
        ("vllm", "yarn:4", "refused"),
        ("vllm", "default", "unknown"),
        ("sglang", "yarn:4", "unknown"),
        ("llama.cpp", "yarn:4", "unknown"),
        ("transformers", "yarn:4", "exact"),
    ],
)
def test_export_of_attention_in_chunks_claims_what_is_known(target: str, spec: str, status: str) -> None:
    config = CONFIG_MAPPING["qwen2"].from_dict(QWEN_1M)
    report = export(spec, config, target, raw=QWEN_1M)
    assert report.status == status
    assert ("dual_chunk_attention_config" in report.reason + " ".join(report.notes)) == (target != "transformers")
    assert "scaled_rope" not in report.config
    if status != "refused" and spec != "default":
        assert report.config["rope_parameters"]["original_max_position_embeddings"] == 262144
    plain = {key: value for key, value in QWEN_1M.items() if "chunk" not in key}
    assert export(spec, CONFIG_MAPPING["qwen2"].from_dict(plain), target, raw=plain).status == "exact"


@pytest.mark.parametrize("factor", [2.0, 32.0])
@pytest.mark.parametrize("words", [["export", "--for", "vllm"], ["plan", "--serve"]])
def test_the_default_length_is_factor_times_l_whatever_the_maximum(
    words: list[str], factor: float, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {key: value for key, value in QWEN_1M.items() if "chunk" not in key} | {"max_position_embeddings": 65536}
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
    assert main([words[0], str(tmp_path), *words[1:]] if words[0] == "export" else [*words, str(tmp_path)]) == 0
    out, extended = capsys.readouterr().out, int(factor * 4096)
    assert f"up to {extended} tokens: same" in out or f"sequences of {extended} tokens fit" in out
    assert "warning [length-mismatch]" in out and "beyond" not in out


def test_the_default_length_of_llama_3_1_is_what_it_claims() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    rope |= {"original_max_position_embeddings": 8192}
    config = CONFIG_MAPPING["llama"](max_position_embeddings=131072, rope_parameters=rope)
    assert served_length(RopeSettings(config).scaling, config) == 131072
    assert served_length(RopeScaling("default", original_max_position_embeddings=8192), config) == 131072


def test_windows_are_held_against_the_length_that_is_known() -> None:
    config = gemma(layer_types=["sliding_attention"] * 2).to_dict()
    config["rope_parameters"] = {"sliding_attention": LINEAR, "full_attention": LINEAR}
    (text,) = (finding.text for finding in inspect(config).findings if finding.code == "sliding-window")
    assert "the context is 131072" in text
