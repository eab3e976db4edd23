"""Memory of serving: caches against those that transformers fills, and the arithmetic of windows and shared heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from scaled_rope import patch_model
from scaled_rope.checkpoint import DEFAULT_MODEL, load_config
from scaled_rope.cli import main
from scaled_rope.errors import ConfigError
from scaled_rope.serving.serve_plan import plan_serving
from tests.helpers.published_configs import LLAMA3

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def config(**changes: Any) -> Any:
    fields = LLAMA_8B | changes
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def test_an_8b_model() -> None:
    plan = plan_serving(config(), "yarn:4", None, 80e9)
    assert plan.length == 32768 and plan.weights == 8_030_261_248 * 2  # the published number of weights
    assert plan.per_token == 32 * 2 * 8 * 128 * 2 and plan.per_sequence == plan.per_token * 32768
    assert plan.sequences == int((72e9 - plan.weights - plan.activations) // plan.per_sequence) > 8
    halved = plan_serving(config(), "yarn:4", None, 80e9, kv_dtype="fp8")
    assert halved.per_sequence * 2 == plan.per_sequence and halved.sequences >= 2 * plan.sequences
    two = plan_serving(config(), "yarn:4", None, 80e9, gpus=2)
    assert two.per_sequence * 2 == plan.per_sequence and two.weights * 2 == plan.weights
    many = plan_serving(config(), "yarn:4", None, 80e9, gpus=16)  # 8 heads on 16 GPUs: each holds one
    assert many.per_sequence * 8 == plan.per_sequence
    with pytest.raises(ConfigError, match="32 attention heads must be shared out evenly"):
        plan_serving(config(), "yarn:4", None, 80e9, gpus=3)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma2"])
def test_the_cache_is_that_of_transformers(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family)
    ids = torch.ones(1, 16, dtype=torch.long)
    cache = model(ids, use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    plan = plan_serving(model.config, "default", 16, 1e9)
    assert plan.per_sequence == 2 * numbers  # two bytes each
    assert plan.weights == 2 * sum(value.numel() for value in model.parameters())


def test_windows_shared_caches_and_compressed_ones() -> None:
    windowed = config(model_type="mistral", sliding_window=4096)
    assert plan_serving(windowed, "default", 8192, 80e9).per_sequence == 32 * 4096 * (4096 + 16)
    types = ["sliding_attention"] * 5 + ["full_attention"]
    gemma = config(model_type="gemma3_text", num_hidden_layers=6, layer_types=types, sliding_window=1024, head_dim=128)
    plan = plan_serving(gemma, "default", 8192, 80e9)
    assert plan.layers == {"window": 5, "full": 1} and plan.per_sequence == 4096 * (8192 + 5 * 1040)
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 2, "n_routed_experts": 2}
    deep = config(model_type="deepseek_v3", **sizes, q_lora_rank=64, num_key_value_heads=32)
    plan = plan_serving(deep, "default", 4096, 80e9, gpus=2)
    assert plan.per_token == 2 * 576 * 2 and "MLA" in plan.kv_dtype  # not shared out


@pytest.mark.parametrize(
    ("heads", "numbers"),
    [
        ({"num_kv_heads": 4, "new_decoder_architecture": True}, 2 * 4 * 8),
        ({"multi_query": True}, 2 * 8),
        ({"multi_query": False}, 2 * 8 * 8),
    ],
)
def test_the_key_heads_of_falcon(heads: dict[str, Any], numbers: int) -> None:
    falcon = AutoConfig.for_model("falcon", hidden_size=64, num_attention_heads=8, num_hidden_layers=2, **heads)
    assert plan_serving(falcon, "default", 16, 1e9).per_token == 2 * 2 * numbers


def test_caches_that_are_not_known_are_refused() -> None:
    other = AutoConfig.for_model("gpt_neox", hidden_size=64, num_attention_heads=8, num_hidden_layers=2)
    assert plan_serving(other, "default", 16, 1e9).per_token == 2 * 2 * 2 * 64  # all heads have keys of their own
    other.multi_query_group_num = 2
    with pytest.raises(ConfigError, match="num_key_value_heads is missing; whether multi_query_group_num=2 means it"):
        plan_serving(other, "default", 16, 1e9)
    with pytest.raises(ConfigError, match="head_dim differs between the layers of this 'gemma4_text' model"):
        plan_serving(AutoConfig.for_model("gemma4_text"), "default", 16, 1e9)
    with pytest.raises(
        ConfigError, match="num_attention_heads=None: must be a whole number for the cache of this 'rwkv'"
    ):
        plan_serving(AutoConfig.for_model("rwkv", context_length=16), "default", 16, 1e9)
    with pytest.raises(
        ConfigError, match="--length is needed: the config of this 'recurrent_gemma' model says no length"
    ):
        plan_serving(AutoConfig.for_model("recurrent_gemma"), "default", None, 1e9)


def test_says_what_no_server_computes() -> None:
    for spec, why in (("rerope,window=64", "changes attention"), ("yarn:2,attention_temperature=log", "multiplies q")):
        notes = plan_serving(config(), spec, 8192, 80e9).notes
        assert any("no server computes this scaling" in note and why in note for note in notes)
    assert not plan_serving(config(), "yarn:2", 8192, 80e9).notes


@pytest.mark.parametrize("spec", ["yarn:4", "rerope,window=8"])
def test_a_checkpoint_that_transformers_refuses_to_build(
    spec: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rope_type: scaled-rope` says nothing about sizes."""
    model = tiny_model()
    numbers = sum(value.numel() for value in model.parameters())
    patch_model(model, spec, drop_layers=[1] if spec == "yarn:4" else ())
    model.save_pretrained(tmp_path / "saved")
    assert "scaled-rope" in (tmp_path / "saved" / "config.json").read_text()
    length = str(model.config.max_position_embeddings)
    capsys.readouterr()  # saving a model imports programs that print
    assert main(["plan", "--serve", str(tmp_path / "saved"), "--gpu-memory", "1", "--length", length, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 2 * numbers and found["scaling"].startswith(spec[:4])
    assert plan_serving(load_config(str(tmp_path / "saved")), "yarn:8").scaling == "yarn x8"


def test_what_llama_3_is_for() -> None:
    """Its factor times L is 65536."""
    llama = config(**LLAMA3)
    plan = plan_serving(llama)
    assert plan.length == 131072 and plan.notes == ()
    assert plan_serving(llama, length=262144).notes == ("262144 tokens are beyond the 131072 that llama3 x8 is for",)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--serve", str(DEFAULT_MODEL), "--scaling", "yarn:8", "--length", "4096", "--gpu-memory", "1"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["per_token"] == 6 * 2 * 2 * 64 * 2 and found["notes"] == [
        "4096 tokens are beyond the 2048 that yarn x8 is for"
    ]
    assert main([*argv[:-1], "0.01"]) == 1
    assert "no sequence fits on 1 GPU of 0.01 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan"], "give a recipe, or --serve MODEL"),
        (["plan", "demo", "--length", "5"], "--length 5 goes with --serve"),
        (["plan", "--serve", "./nothere"], "model './nothere' does not exist"),
        (["plan", "--serve", str(DEFAULT_MODEL), "--kv-dtype", "int3"], "unknown kv-dtype 'int3'"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err
