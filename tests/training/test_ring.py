"""Sequences shared by ring attention: what is refused, and why. Equality with one rank is in tests/test_ranks.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from scaled_rope import RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.training.engine import Layout, accumulation
from scaled_rope.training.ring import (
    check_context_parallel,
    check_machine,
    check_shared_layers,
    head_dims,
    ring_attention,
    ring_parallelism,
)

TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def shared(workspace, **fields) -> Recipe:
    return replace(read_recipe(str(workspace / "recipe.yaml")), **{"context_parallel": 2} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_parallel": 0}, "context_parallel = 0 is not allowed; at least 1"),
        ({"sequence_parallel": 2}, "sequence_parallel = 2 is not allowed; 1 with context_parallel"),
        ({"documents": "separate"}, "documents = 'separate' .* takes no masks"),
        ({"sliding_window_attention_schedule": (64,)}, "sliding_window_attention_schedule .* has no windows"),
        ({"attention": "flash_attention_2"}, "attention = 'flash_attention_2' is not allowed; auto or sdpa"),
        ({"lora": True, "quantization": "nf4"}, "quantization = 'nf4' is not allowed; none with context_parallel"),
        ({"context_parallel": 5}, "sequence_length = 48 is not allowed; a multiple of 10"),
        ({"truncate": 46}, "truncate = 46 is not allowed; a multiple of 4"),
    ],
)
def test_a_recipe_that_ring_attention_cannot_run_is_refused_when_it_is_read(workspace, fields, message):
    with pytest.raises(ConfigError, match=message):
        shared(workspace, **fields)


@pytest.mark.parametrize(
    ("fields", "config", "attention", "message"),
    [
        ({"scaling": "dynamic-yarn"}, {}, "sdpa", "no rank sees the length of the sequence"),
        ({"scaling": "dynamic-ntk:2"}, {}, "sdpa", "no rank sees the length of the sequence"),
        ({"scaling": "rerope,window=8"}, {}, "sdpa", "its attention needs the whole sequence"),
        (
            {"scaling": "yarn:4,attention_temperature=log"},
            {},
            "sdpa",
            "its attention_temperature needs the whole sequence",
        ),
        ({}, {"model_type": "mistral", "sliding_window": 4096}, "sdpa", "type sliding_attention: .* is causal over"),
        ({}, {"model_type": "gemma3_text"}, "sdpa_blocked", "type sliding_attention: .* is causal over the whole"),
        ({}, {"model_type": "qwen3_next"}, "sdpa", "type linear_attention: .* is causal over the whole"),
        ({}, {}, "eager", "attention 'eager': llama models need another than PyTorch's sdpa"),
        ({}, {"head_dim": 512}, "sdpa", "head_dim 512 of keys and 512 of values"),
        ({}, {"model_type": "deepseek_v3"}, "sdpa", "head_dim 192 of keys and 128 of values"),
        ({}, {"attention_dropout": 0.1}, "sdpa", "attention_dropout 0.1: in the backward pass"),
    ],
)
def test_what_would_be_wrong_over_parts_of_a_sequence_is_refused(workspace, fields, config, attention, message):
    recipe = shared(workspace, **fields)
    shape = AutoConfig.for_model(**{"model_type": "llama"} | config)
    base = RopeScaling(method="default", original_max_position_embeddings=16)
    scaling = RopeScaling.from_spec(recipe.scaling, base)
    with pytest.raises(ConfigError, match=rf"context_parallel 2 is not allowed with .*{message}"):
        check_context_parallel(recipe, shape, scaling, attention)
    check_context_parallel(replace(recipe, context_parallel=1), shape, scaling, attention)


def test_what_ring_attention_takes_is_allowed(workspace):
    scaling = RopeScaling("yarn", 4.0, original_max_position_embeddings=16)
    for model_type in ("llama", "qwen3", "olmo2"):
        shape = AutoConfig.for_model(model_type, **TINY)
        assert head_dims(shape) == (8, 8)
        check_context_parallel(shared(workspace), shape, scaling, "sdpa")


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("gpt_neox", {}, "has no module self_attn"),
        ("lfm2", {"layer_types": ["conv"]}, "has no module self_attn"),
        ("llama", {}, None),
    ],
)
def test_models_in_which_tokens_meet_elsewhere_are_refused(workspace, family, more, message):
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(family, **TINY, **more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if message is None:
        check_shared_layers(shared(workspace), model)
        model.model.layers[0].mixer = nn.Conv1d(16, 16, 4)
        message = "has a convolution along the sequence"
    with pytest.raises(ConfigError, match=message):
        check_shared_layers(shared(workspace), model)


def test_machines_and_launchers_that_do_not_suit_are_refused(workspace, monkeypatch):
    recipe = shared(workspace)
    with pytest.raises(ConfigError, match="context_parallel 2 needs FSDP2"):
        check_machine(recipe)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_machine(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        check_machine(replace(recipe, precision="bf16"))
        with pytest.raises(ConfigError, match="not allowed with precision: fp32 on a GPU"):
            check_machine(recipe)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    for one in (recipe, replace(recipe, context_parallel=1)):
        with pytest.raises(ConfigError, match="parallelism_config_cp_size 2 is not allowed; the recipe's"):
            check_machine(one)


def test_ranks_of_a_ring_are_neighbours_and_read_the_same_rows(workspace):
    layouts = [Layout(rank, 8, context_parallel=4) for rank in range(8)]
    assert [layout.data_rank for layout in layouts] == [0] * 4 + [1] * 4
    assert {(layout.data_ranks, layout.multiple) for layout in layouts} == {(2, 8)}
    assert accumulation(shared(workspace), 4) == 2
    with pytest.raises(ConfigError, match="context_parallel 2 is not allowed; a divisor of the 3 processes"):
        accumulation(shared(workspace), 3)
    with pytest.raises(ConfigError, match="x 6 processes that share 2 to a sequence = 3"):
        accumulation(shared(workspace), 6)
    config = ring_parallelism(shared(workspace), 8)
    assert (config.cp_size, config.dp_shard_size, config.cp_handler.cp_comm_strategy) == (2, 4, "alltoall")


def test_a_batch_is_left_as_it_is_without_a_ring():
    tensors = {"input_ids": torch.arange(6)[None]}
    with ring_attention(SimpleNamespace(), tensors, 1) as mine:
        assert mine["input_ids"] is tensors["input_ids"]
