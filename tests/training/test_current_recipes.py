"""The recipes of current models run: the same families, scalings and ways to train, in sizes that take seconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from scaled_rope.patching.loading import load_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.training.loop import Trainer
from scaled_rope.training.planning import ARCHITECTURES
from tests.helpers.runs import LENGTH, log

NAMES = (
    "llama-3.1-8b-512k", "qwen3-4b-128k", "qwen3-8b-128k", "gemma-3-1b-128k", "smollm3-3b-256k",
    "mistral-small-24b-128k",
)  # fmt: skip
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip


def small_model(name: str, workspace: Path, folder: Path) -> None:
    """Save a random model of the family that a recipe trains, made for 16 positions."""
    fields = dict(json.loads(ARCHITECTURES.read_text())[read_recipe(name).model]) | SMALL
    if fields["rope_parameters"].get("rope_type") == "llama3":  # it reads 16 times its original length
        fields["rope_parameters"] = fields["rope_parameters"] | {"original_max_position_embeddings": 1}
    if fields.get("sliding_window"):
        fields["sliding_window"] = 8
    if "query_pre_attn_scalar" in fields:
        fields["query_pre_attn_scalar"] = 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).save_pretrained(folder)
    for file in (workspace / "model").glob("tokenizer*"):
        shutil.copy(file, folder)


@pytest.mark.parametrize("kind", ["", pytest.param("-pose", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_a_current_model_runs_small(name: str, kind: str, workspace: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = read_recipe(name + kind)
    if recipe.quantization is not None:
        pytest.importorskip("bitsandbytes")
    small_model(name, workspace, tmp_path / "base")
    factor = (recipe.max_position_embeddings or 4 * 131072) / 131072 if name.startswith("llama") else 4
    small = replace(
        recipe, model=str(tmp_path / "base"), dataset=str(workspace / "set"), output_dir=str(tmp_path / "out"),
        sequence_length=16 if kind else LENGTH, global_batch_size=4, max_train_steps=2, warmup_steps=1,
        precision="fp32", sequence_parallel=1, checkpointing_steps=None,
        max_position_embeddings=None if recipe.max_position_embeddings is None else 64,
    )  # fmt: skip
    losses = Trainer(small).run()
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert [row["tokens"] for row in log(tmp_path / "out")] == [4 * small.sequence_length] * 2
    trained = load_model(str(tmp_path / "out" / "model"))
    assert trained.config.max_position_embeddings == 16 * factor == 64
    wanted = recipe.scaling.partition(":")[0] if recipe.scaling else "default"
    rope = trained.config.rope_parameters
    if recipe.layers is not None:
        assert rope["sliding_attention"]["rope_type"] == "default"
        rope = rope[recipe.layers]
    assert rope["rope_type"] == wanted
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    changed = {weight for weight in before if not torch.equal(before[weight].float(), after[weight].float())}
    assert changed and (not recipe.lora or all("proj" in weight for weight in changed))
