"""Model families: which are recognised, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.small_models import small_model
from scaled_rope import ConfigError, RopeScaling, patch_model, unpatch_model
from scaled_rope.patching.families import ADAPTERS, adapter_of, detect_adapter, layers_without_rope
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.patching.rotary import ScaledRotaryEmbedding
from scaled_rope.scaling.hf_config import SOFTMAX_MSCALE_FAMILIES
from tests.helpers.families import (
    ALL,
    CHANGED,
    NESTED,
    SAME,
    TINY,
    assert_vanilla_is_right_or_refuses,
    attention_tables,
    distance,
    force_tables,
    load,
    logits,
    words,
)
from tests.helpers.models import FAMILIES, PLAIN, Make


@pytest.mark.parametrize("family", ALL)
def test_detection_agrees_with_the_row_and_with_the_module(tiny_model: Make, family: str) -> None:
    model = tiny_model(family)
    rotary = model.base_model.rotary_emb
    detected = detect_adapter(model.config, rotary)
    assert (family in ADAPTERS) == (family in FAMILIES)
    if family in ADAPTERS:
        row = ADAPTERS[family]
        for name in ("layout", "float32_tables", "per_layer_type"):
            assert getattr(detected, name) == getattr(row, name), name
    assert adapter_of(model.config, rotary) == ADAPTERS.get(family, detected)
    assert detected.per_layer_type == (family in NESTED)
    # By the tables themselves, in half precision: same dtype, shape and numbers as the module's.
    x, positions = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.arange(40)[None]
    more = ("full_attention",) if detected.per_layer_type else ()
    theirs = rotary(x, positions, *more)
    patch_model(model, "default")
    ours = model.base_model.rotary_emb(x, positions, *more)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == (torch.float32 if detected.float32_tables else torch.bfloat16)
        # One unit of bfloat16 below 1 where the dtype is that; an angle of 40 to some float32 units where it is not.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if detected.float32_tables else 2**-8)


def test_detection_is_not_misled_by_an_earlier_longer_pass(tiny_model: Make, tokens: Tensor) -> None:
    for method in ("longrope", "dynamic"):
        rope = {**PLAIN, **words(tiny_model("granite"), "longrope"), "rope_type": method}
        if method == "dynamic":
            rope = {**PLAIN, "rope_type": "dynamic", "factor": 2.0}
        model = tiny_model("granite", rope_parameters=rope)
        fresh = detect_adapter(model.config, model.model.rotary_emb)
        before = model.model.rotary_emb.inv_freq.clone()
        logits(model, tokens)
        left_behind = model.model.rotary_emb.inv_freq.clone()
        assert not torch.equal(left_behind, before)  # the module has a memory
        assert detect_adapter(model.config, model.model.rotary_emb) == fresh
        assert torch.equal(model.model.rotary_emb.inv_freq, left_behind)  # and it knows nothing of the probe


def test_a_rotary_module_that_cannot_be_copied_is_refused_for_that_reason(tiny_model: Make) -> None:
    model = tiny_model("granite")

    def refuse(memo: object) -> None:
        raise RuntimeError("no copies of this.\nand more")

    model.model.rotary_emb.__deepcopy__ = refuse
    with pytest.raises(ConfigError, match="no copy of GraniteRotaryEmbedding can be made.*no copies of this"):
        detect_adapter(model.config, model.model.rotary_emb)
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ConfigError, match="'granite': Identity is by its name no rotary module of transformers"):
        detect_adapter(model.config, model.model.rotary_emb)


FOREIGN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 1, "n_head": 2, "hidden_size": 16, "vocab_size": 61},  # ALiBi
    "gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 61, "n_positions": 32},  # learned positions
}


@pytest.mark.parametrize("family", FOREIGN)
def test_what_has_no_rotary_module_is_refused_by_name(family: str) -> None:
    model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**copy.deepcopy(FOREIGN[family])))
    for scaling in ("yarn:4", RopeScaling("linear", 2.0)):
        with pytest.raises(ConfigError, match=f"architecture '{family}': has no rotary module") as caught:
            patch_model(model, scaling)
        assert "\n" not in str(caught.value)
    assert not any(isinstance(module, ScaledRotaryEmbedding) for module in model.modules())


def test_falcon_with_alibi_is_refused(tiny_model: Make) -> None:
    with pytest.raises(ConfigError, match="'falcon' with alibi=true uses no rotary embedding"):
        patch_model(tiny_model("falcon", alibi=True), "yarn:4")


@pytest.mark.parametrize("family", ["afmoe", "cohere2", "exaone4", "exaone_moe", "smollm3"])
def test_layers_without_rope_stay_so_and_are_told(tiny_model: Make, tokens: Tensor, family: str) -> None:
    # Their attention ignores its tables, so other tables in the second layer change nothing.
    model, exact = tiny_model(family), tiny_model(family)
    assert "1 of 2 layers have no rotary embedding (1)" in patch_model(model, "yarn:4").notes
    first, _ = attention_tables(model, tokens)
    force_tables(exact, [first, (torch.full_like(first[0], 0.5), first[1])])
    assert distance(logits(exact, tokens), logits(model, tokens)) < SAME


def test_exaone_without_a_window_rotates_all_layers(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model("exaone4", sliding_window=None, layer_types=["full_attention"] * 2)
    first, second = attention_tables(model, tokens)
    before = logits(model, tokens)
    force_tables(model, [first, (torch.full_like(second[0], 0.5), second[1])])
    assert distance(logits(model, tokens), before) > CHANGED
    assert layers_without_rope(model.config) == []
    report = patch_model(tiny_model("exaone4", sliding_window=None, layer_types=["full_attention"] * 2), "yarn:4")
    assert not any("no rotary embedding" in note for note in report.notes)


def test_what_attention_reads_at_every_pass_is_kept(tiny_model: Make, tokens: Tensor) -> None:
    # Ministral 3 multiplies queries by 1 + β·ln(1 + ⌊position / L⌋), which acts on positions from 32 here.
    model = tiny_model("ministral3")
    for spec in ("default", "linear:4", "yarn:4,ramp=rotations", "dynamic-yarn"):
        patch_model(model, spec)
        rope = model.config.rope_parameters
        assert (rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]) == (0.1, 32)
        assert RopeScaling.from_config(model.config) == patched_scaling(model)
        twin = copy.deepcopy(model)
        twin.config.rope_parameters["llama_4_scaling_beta"] = 0.0
        off = (logits(twin, tokens) - logits(model, tokens)).abs().amax(dim=(0, 2))
        assert off[:32].max() == 0 and off[32:].max() > 1e-3  # β matters to what it should and not to the rest


def deepseek(**rope: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": None, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 16}
    settings = {**{k: v for k, v in TINY.items() if k != "head_dim"}, **heads, **experts, "initializer_range": 0.3}
    config = transformers.DeepseekV3Config(**settings, rope_parameters={**PLAIN, **rope})
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_softmax_scale_follows_the_scaling(tokens: Tensor, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
    model = deepseek(**yarn, mscale_all_dim=0.7)
    before, rope = logits(model, tokens), copy.deepcopy(model.config.rope_parameters)

    def scale() -> float:
        return float(model.model.layers[0].self_attn.scaling)

    def temperature(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1

    assert scale() == pytest.approx(32**-0.5 * temperature(4, 0.7) ** 2)
    # YaRN with another factor, and the checkpoint's own with another one, share it out in the same way.
    own = RopeScaling.from_config(model.config)
    for wanted in ("yarn:8", dataclasses.replace(own, factor=8.0)):
        report = patch_model(model, wanted)
        assert scale() == pytest.approx(32**-0.5 * temperature(8, 0.7) ** 2)
        assert report.attention_factor == pytest.approx(temperature(8, 1.0) / temperature(8, 0.7))
        assert report.native and any("softmax scale is multiplied by" in note for note in report.notes)
        assert_vanilla_is_right_or_refuses(model, True, tokens, tmp_path / f"shared{isinstance(wanted, str)}")
    vanilla = deepseek(**(yarn | {"factor": 8.0}), mscale_all_dim=0.7)
    vanilla.load_state_dict(model.state_dict())
    assert distance(logits(model, tokens), logits(vanilla, tokens)) < SAME
    # Other methods, and a factor that was asked for, take it out.
    for index, spec in enumerate(("linear:4", "yarn:8,attention_factor=1.3", "dynamic-yarn", "default")):
        patch_model(model, spec)
        assert scale() == pytest.approx(32**-0.5)
        after = logits(model, tokens)
        model.save_pretrained(tmp_path / str(index))
        assert distance(logits(load(tmp_path / str(index)), tokens), after) < SAME
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before) and model.config.rope_parameters == rope


def test_a_softmax_scale_that_is_not_the_configs_is_refused(tokens: Tensor) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
    model = deepseek(**yarn, mscale_all_dim=1.0)
    attention: Any = model.model.layers[1].self_attn
    attention.scaling = 0.3
    before = logits(model, tokens)
    with pytest.raises(ConfigError, match="layers.1.self_attn has the softmax scale 0.3, where mscale_all_dim=1"):
        patch_model(model, "yarn:8")
    assert torch.equal(logits(model, tokens), before)


def test_the_list_of_families_with_a_softmax_scale_is_that_of_transformers() -> None:
    # By the source of the models, because most of them cannot be built small.
    models = Path(transformers.__file__).parent / "models"
    reading = {path.parent.name for path in models.glob("*/modeling_*.py") if "mscale_all_dim" in path.read_text()}
    listed = {name.removesuffix("_text") for name in SOFTMAX_MSCALE_FAMILIES}
    assert reading == {name for name in listed if (models / name).is_dir()}  # older releases lack some


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "gemma4_text", "qwen3", "bitnet", "apertus", "llama4_text"])
def test_an_attention_factor_that_is_normalised_away_is_told(family: str) -> None:
    """The note is there where another factor changes nothing, and only there."""
    model, found = small_model(family), []
    tokens = torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 1.5):
        notes = patch_model(model, f"yarn:4,attention_factor={factor}").notes
        found.append(logits(model, tokens))
    told = any("normalises after it has rotated" in note for note in notes)
    assert told == (distance(*found) < 1e-3)


def test_a_config_without_a_length_can_be_patched_again() -> None:
    model = small_model("recurrent_gemma")  # its config has no max_position_embeddings
    for factor in (4, 2):
        patch_model(model, f"yarn:{factor},original_max_position_embeddings=64")
        assert model.config.max_position_embeddings == 64 * factor
    unpatch_model(model)
    assert not hasattr(model.config, "max_position_embeddings")
