"""The model that was trained, as it is saved."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import finetune
from scaled_rope import RopeScaling, patch_model
from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.training.model import build_model
from scaled_rope.training.saving import check_save_dtype, save_model
from tests.helpers.runs import ENVIRONMENT, weights
from tests.helpers.training_recipes import resolved_recipe
from tests.training.test_model import EXPERTS


def test_the_checkpoint_loads_without_this_package_and_gives_the_same_logits(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    program = (
        "import sys, torch, transformers\n"
        "sys.modules['scaled_rope'] = None\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ids = torch.arange(2, 42)[None]\n"
        "torch.save(model(input_ids=ids).logits, sys.argv[2])\n"
    )
    saved = straight / "logits.pt"
    subprocess.run([sys.executable, "-c", program, str(straight / "model"), str(saved)], check=True, timeout=120,
                   capture_output=True, env=ENVIRONMENT)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.rope_parameters["factor"] == 3.0
    assert model.config.max_position_embeddings == 48
    scaling = RopeScaling(method="yarn", factor=3.0, original_max_position_embeddings=16)
    patch_model(model, scaling)
    ours = model(input_ids=torch.arange(2, 42)[None]).logits
    # inv_freq may differ in the last bit (float64 rounded once against float32 arithmetic): 1e-7 rad over 40 positions
    torch.testing.assert_close(torch.load(saved), ours, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert len(tokenizer) == 64
    assert tokenizer.model_max_length == 48, "where programs cut texts"


def test_buffers_are_not_rounded_when_a_model_is_saved(workspace, tmp_path):
    """DeepSeek's experts are chosen by scores plus a float32 buffer, whose steps are finer than bfloat16."""
    latent = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 8}
    routed = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}
    init = {"model_type": "deepseek_v3", **EXPERTS, **latent, **routed, "first_k_dense_replace": 0}
    init["num_key_value_heads"] = 2
    recipe = replace(
        resolved_recipe(workspace), model=None, init=init, tokenizer=str(workspace / "model"), scaling=None,
        precision="bf16", save_dtype=None,
    )  # fmt: skip
    model, _ = build_model(recipe)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(5 + torch.arange(4) * 0.01)
    save_model(model, model.state_dict(), recipe, tmp_path / "model", lambda folder: None, "a {{ template }}")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved[name].dtype == torch.float32 and torch.equal(saved[name], model.get_buffer(name))
    assert saved["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.bfloat16  # what it is loaded in by default
    assert load_tokenizer(str(tmp_path / "model")).chat_template == "a {{ template }}"


def test_a_weight_that_the_saved_dtype_cannot_hold_is_named(workspace, tmp_path, capsys):
    recipe = replace(resolved_recipe(workspace), scaling=None, save_dtype="float16")
    model, _ = build_model(recipe)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[3, 2] = -7e4
    said = f"weight {name} has 70000, and the largest number of float16 is 65504"
    with pytest.raises(ConfigError, match=f"save_dtype = 'float16' is not allowed: {said}; save_dtype: float32"):
        check_save_dtype(model, recipe)
    check_save_dtype(model, replace(recipe, save_dtype="bfloat16"))
    # One that has grown in training is not worth losing the training for.
    save_model(model, model.state_dict(), recipe, tmp_path / "model", lambda folder: None)
    assert f"warning: save_dtype 'float16' was not used: {said}; saved in float32" in capsys.readouterr().err
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")[name], model.get_parameter(name))
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora_with_embeddings_and_norms_saves_them_in_model_and_adapter(workspace, tmp_path, tied):
    pytest.importorskip("peft")
    from scaled_rope.patching.loading import load_model

    base = workspace / ("tied" if tied else "model")
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--model", str(base), "--lora",
                 "--lora-embeddings-and-norms", "--max-train-steps", "2"]  # fmt: skip
    assert finetune.main(arguments) == 0
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # What the evaluators make of base and adapter is the merged model; merging rounds once, in float32.
    merged = load_model(str(tmp_path / "out" / "model"))
    adapted = load_model(str(base), scaling="yarn:3", adapter=str(tmp_path / "out" / "model" / "adapter"))
    ids = torch.arange(2, 42)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
