"""The arithmetic of a plan: FLOPs against figures worked out by hand and by torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from scaled_rope.recipes.files import read_recipe
from scaled_rope.training.costs import ModelCost, peak_flops
from scaled_rope.training.planning import meta_model


def test_flops_of_llama_2_7b_at_128k():
    cost = ModelCost.of(meta_model(read_recipe("llama-2-7b-64k")))
    # 32 layers of 4 * 4096^2 + 3 * 4096 * 11008 weights and a projection of 32000 * 4096
    assert cost.multiplied == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    whole = cost.sequence(131072)
    # a forward pass is a third: 1.73 PFLOP in matrices, 4.50 in causal attention
    assert whole.linear / 3 == pytest.approx(1.73e15, rel=0.01)
    assert whole.attention / 3 == pytest.approx(4.50e15, rel=0.01)
    # the 64k recipe: 2.0e20 with the forward pass that checkpointing does a second time
    assert cost.sequence(65536).total * 4 / 3 * 400 * 64 == pytest.approx(2.0e20, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3"])
def test_linear_flops_are_what_torch_counts(tiny_model, family):
    model = tiny_model(family)
    length = 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, length, dtype=torch.long)).logits.sum().backward()
    counted = sum(
        count for operator, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(operator)
    )
    cost = ModelCost.of(model).sequence(length)
    assert cost.linear == pytest.approx(counted, rel=1e-6)


def test_attention_sees_the_keys_in_its_window(tiny_model):
    full = ModelCost.of(tiny_model("mistral", sliding_window=None))
    narrow = ModelCost.of(tiny_model("mistral", sliding_window=4))
    width = 2 * 16 * 2  # heads, head_dim, layers
    assert full.sequence(10).attention == 3 * 4 * width * 55
    assert narrow.sequence(10).attention == 3 * 4 * width * (1 + 2 + 3 + 4 * 7)
    half = ModelCost.of(tiny_model("gemma2", sliding_window=4))  # one layer of each kind
    assert half.sequence(10).attention == (full.sequence(10).attention + narrow.sequence(10).attention) / 2


def test_layers_without_attention_have_none_and_latent_attention_has_two_widths():
    def widths(family: str, **settings: object) -> dict[int | None, int]:
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
        config = AutoConfig.for_model(family, **shape | settings)
        with torch.device("meta"):
            return ModelCost.of(AutoModelForCausalLM.from_config(config)).heads_width

    kinds = ["linear_attention"] * 3 + ["full_attention"]
    assert widths("qwen3_next", layer_types=kinds, head_dim=16, num_experts=2) == {None: 4 * 16}
    assert widths("lfm2", layer_types=["conv", "full_attention"] * 2) == {None: 2 * 32}
    latent = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "q_lora_rank": 8, "kv_lora_rank": 8}
    assert widths("deepseek_v3", **latent) == {None: 4 * 4 * (12 + 6) // 2}
    chunked = {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 64}
    found = widths("llama4_text", **chunked, head_dim=8, num_local_experts=1, intermediate_size_mlp=32)
    assert found == {32: 3 * 4 * 8, None: 4 * 8}


def test_experts_count_by_the_share_that_is_active(tiny_model):
    dense = {"num_local_experts": 2, "num_experts_per_tok": 2}
    every, one = (ModelCost.of(tiny_model("mixtral", **dense | {"num_experts_per_tok": n})) for n in (2, 1))
    experts = 2 * 2 * 3 * 32 * 48  # layers, experts, matrices of 32 x 48
    assert every.multiplied - one.multiplied == experts / 2


def test_adapters_alone_need_no_gradients_of_the_weights(tiny_model):
    pytest.importorskip("peft")
    from scaled_rope.training.model import add_lora

    model = tiny_model()
    whole = ModelCost.of(model)
    adapted = ModelCost.of(add_lora(model))
    assert adapted.trained == adapted.multiplied - whole.multiplied > 0


def test_peaks_are_found_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("AMD EPYC") is None
