"""Adapters on weights in 4 bits: what is trained, kept, resumed and merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loading import load_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.results import Row
from scaled_rope.training.engine import make_accelerator
from scaled_rope.training.loop import Loop
from scaled_rope.training.model import SummedLoss, build_model

pytest.importorskip("bitsandbytes")


def arguments(workspace: Path, output: Path, *more: str) -> list[str]:
    return [str(workspace / "recipe.yaml"), "--output-dir", str(output), "--lora", "--quantization", "nf4", *more]


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "train_log.jsonl").read_text().splitlines()]


def test_frozen_matrices_have_four_bits_and_adapters_float32(workspace: Path) -> None:
    recipe = replace(read_recipe(str(workspace / "recipe.yaml")), lora=True, quantization="nf4", precision="bf16")
    model, _ = build_model(recipe, "sdpa", torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and "lora_" in name
        elif "proj" in name:
            assert parameter.dtype == torch.uint8 and parameter.quant_state.quant_type == "nf4"
            assert parameter.quant_state.nested  # double quantisation
        else:
            assert parameter.dtype == torch.bfloat16
    state = SummedLoss(model).state_dict()
    assert state and all("lora_" in name for name in state)


def test_run_resume_and_merge(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert finetune.main(arguments(workspace, whole)) == 0
    # A run that ended after its state of step 6 goes on to the same bits.
    original = Loop.optimizer_step

    def interrupted(self: Loop, step: int) -> Row | None:
        if step == 7:
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "optimizer_step", interrupted)
        finetune.main(arguments(workspace, again))
    saved = load_file(again / "checkpoints" / "step-000006" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert finetune.main(arguments(workspace, again)) == 0
    assert losses(again) == losses(whole)
    for folder in ("model", "model/adapter"):
        (one,) = (whole / folder).glob("*.safetensors")
        (other,) = (again / folder).glob("*.safetensors")
        assert one.read_bytes() == other.read_bytes()
    assert losses(whole)[-1] < losses(whole)[0]

    # The merged checkpoint is the base's own weights, not rounded to 4 bits, plus the adapters.
    adapter = load_file(whole / "model" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    up, down = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    base = load_model(str(workspace / "model")).get_submodule(name).weight
    merged = load_model(str(whole / "model")).get_submodule(name).weight
    torch.testing.assert_close(merged, base + 64 / 16 * up @ down, rtol=1e-5, atol=1e-6)
    assert up.abs().max() > 0


def test_under_a_sharding_engine_it_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(read_recipe(str(workspace / "recipe.yaml")), lora=True, quantization="nf4")
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            with pytest.raises(ConfigError, match=f"quantization 'nf4' is not allowed under {name}"):
                make_accelerator(recipe, "sdpa")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": "nf4"}, "it is for lora: true"),
        ({"quantization": "int3", "lora": True}, "quantization = 'int3' is not allowed; one of: nf4, or none"),
        ({"quantization": "nf4", "lora": True, "sequence_parallel": 2}, "none with sequence_parallel"),
    ],
)
def test_what_a_recipe_may_say(workspace: Path, fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(read_recipe(str(workspace / "recipe.yaml")), **fields)  # type: ignore[arg-type]
