"""Saved models of every family carry their scaling."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scaled_rope import ConfigError, RopeScaling, patch_model, unpatch_model
from scaled_rope.patching.base_model import base_model
from scaled_rope.patching.layer_tables import TableForm
from scaled_rope.patching.patch import patched_plan, patched_scaling
from scaled_rope.scaling.record import LayerPlan
from scaled_rope.serving.inspect_config import inspect
from tests.helpers.cases import in_turn
from tests.helpers.families import (
    ALL,
    CHANGED,
    PLANS,
    REFUSALS,
    SAME,
    TINY,
    WITHOUT_WORDS,
    assert_vanilla_is_right_or_refuses,
    distance,
    load,
    logits,
    record,
    width,
)
from tests.helpers.models import PLAIN, Make


@pytest.mark.parametrize("spec", ["yarn:4", "llama3:4"])
def test_a_head_dim_that_the_config_leaves_open_is_said_where_a_formula_reads_it(
    tiny_model: Make, tmp_path: Path, spec: str
) -> None:
    """As in Mixtral 8x7B, whose config has none."""
    model = tiny_model("mixtral", head_dim=None)
    assert patch_model(model, "dynamic-yarn").native is False
    assert model.config.head_dim is None
    assert patch_model(model, spec).native
    assert model.config.head_dim == (16 if spec == "yarn:4" else None)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(1, 33)[None]
    assert distance(logits(loaded, tokens), logits(model, tokens)) < SAME
    unpatch_model(model)
    assert model.config.head_dim is None


@pytest.mark.parametrize(
    ("family", "spec"), in_turn(ALL, ["yarn:4", "ntk:4", "yarn:4,ramp=rotations", "dynamic-yarn:2"], each=2)
)
def test_a_saved_model_carries_its_scaling(
    tiny_model: Make, tokens: Tensor, tmp_path: Path, family: str, spec: str
) -> None:
    model = tiny_model(family)
    report = patch_model(model, spec)
    wanted = logits(model, tokens)
    model.save_pretrained(tmp_path)
    words = spec == "ntk:4" or (spec == "yarn:4" and (family == "mixtral" or family not in WITHOUT_WORDS))
    assert report.native == words  # that of Mixtral says the head_dim as well
    raw = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    for config in (raw, model.config):
        assert RopeScaling.from_config(config) == report.scaling
        assert LayerPlan.from_config(config) == report.plan
    loaded = load(tmp_path)
    assert distance(logits(loaded, tokens), wanted) < SAME
    assert RopeScaling.from_config(loaded.config) == report.scaling
    if report.native:
        vanilla = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=model.config._attn_implementation
        ).eval()
        assert distance(logits(vanilla, tokens), wanted) < SAME
    else:
        with pytest.raises(REFUSALS, match="rope"):
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def test_a_whole_head_stays_whole_in_families_that_rotate_a_part(
    tiny_model: Make, tokens: Tensor, tmp_path: Path
) -> None:
    # A config that leaves the share out would mean a quarter.
    for spec, native in (("yarn:4", True), ("yarn:4,ramp=rotations", False)):
        model = tiny_model("gpt_neox", rope_parameters={**PLAIN, "partial_rotary_factor": 1.0})
        assert width(model) == 32
        assert patch_model(model, spec).native == native
        assert_vanilla_is_right_or_refuses(model, native, tokens, tmp_path / str(native))


def test_lengths_that_transformers_would_replace_are_not_left_to_it(
    tiny_model: Make, tokens: Tensor, tmp_path: Path
) -> None:
    # Phi-3 takes L from the config's top level, rope_type "dynamic" from max_position_embeddings.
    phi = tiny_model("phi3")
    scaling = RopeScaling.from_dict({**record(phi, "longrope").to_dict(), "original_max_position_embeddings": 40})
    ntk = RopeScaling("dynamic-ntk", 2.0, 24)
    for name, model, given in (("phi3", phi, scaling), ("llama", tiny_model(), ntk)):
        report = patch_model(model, given)
        assert not report.native
        assert_vanilla_is_right_or_refuses(model, report.native, tokens, tmp_path / name)
        assert RopeScaling.from_config(model.config) == given
    model = tiny_model()
    assert patch_model(model, "dynamic-ntk:2").native
    assert_vanilla_is_right_or_refuses(model, True, tokens, tmp_path / "native")


@pytest.mark.filterwarnings("error::UserWarning")  # nothing that we wrote ourselves is remarked on
@pytest.mark.parametrize(("family", "scaling", "dropped"), PLANS)
def test_a_saved_plan_is_loaded(
    tiny_model: Make, tokens: Tensor, tmp_path: Path, family: str, scaling: Any, dropped: list[int]
) -> None:
    model = tiny_model(family)
    report = patch_model(model, scaling, drop_layers=dropped)
    wanted = logits(model, tokens)
    unscaled = logits(tiny_model(family), tokens)
    assert distance(wanted, unscaled) > CHANGED
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert distance(logits(loaded, tokens), wanted) < SAME
    raw = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    for config in (raw, loaded.config):
        assert LayerPlan.from_config(config) == report.plan
        assert RopeScaling.from_config(config) == report.scaling
    if patched_scaling(loaded) is not None:
        assert patched_plan(loaded) == report.plan
        unpatch_model(loaded)
    if report.native:
        vanilla = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert distance(logits(vanilla, tokens), wanted) < SAME
    else:
        with pytest.raises(REFUSALS, match="rope"):
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_types_that_no_layer_has_say_nothing(
    tiny_model: Make, tokens: Tensor, tmp_path: Path, family: str, kind: str
) -> None:
    """As those of a Gemma 3 of five layers or fewer, whose config has an entry for full attention all the same."""
    model = tiny_model(family, layer_types=[kind] * 2)
    assert len(model.config.rope_parameters) == 2
    report = patch_model(model, "yarn:4")
    wanted = logits(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert distance(logits(loaded, tokens), wanted) < SAME
    assert RopeScaling.from_config(loaded.config) == report.scaling
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert distance(logits(vanilla, tokens), wanted) < SAME
    assert not [finding.code for finding in inspect(tmp_path).findings if finding.level == "error"]


@pytest.mark.parametrize("spec", ["linear:2", "yarn:2", "dynamic-yarn"])
def test_an_unpatched_copy_is_saved_as_the_model_was(tiny_model: Make, tmp_path: Path, spec: str) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    patch_model(model, spec)
    again = copy.deepcopy(model)
    unpatch_model(again)
    again.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after/config.json").read_text() == (tmp_path / "before/config.json").read_text()


def _retriever() -> Any:
    """A model whose config holds that of its text part two levels deep."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vlm = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 16, **TINY},
        vision_config={"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4, **vision},
        projection_dim=16,
    )
    with torch.device("meta"):
        return transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=vlm.to_dict()))


def test_a_config_that_lies_deeper_carries_the_scaling() -> None:
    model: Any = _retriever()
    inner, before, other = model.vlm, model.config.to_dict(), copy.deepcopy(model.config)
    assert inner.config is model.config.vlm_config
    assert patch_model(model, "yarn:4").native
    text = model.config.to_dict()["vlm_config"]["text_config"]
    assert text["rope_parameters"]["rope_type"] == "yarn" and text["max_position_embeddings"] == 128
    assert inner.config is model.config.vlm_config and inner.config.text_config is inner.language_model.config
    assert RopeScaling.from_config(type(other).from_dict(model.config.to_dict())).label == "yarn x4"
    unpatch_model(model)
    assert model.config.to_dict() == before


def test_a_config_that_would_lose_the_scaling_is_refused() -> None:
    model = _retriever()
    model.config.vlm_config = copy.deepcopy(model.config.vlm_config)
    before = model.config.to_dict()
    with pytest.raises(ConfigError, match="'colpali': its config does not hold that of its GemmaModel, so a saved"):
        patch_model(model, "yarn:4")
    assert patched_scaling(model) is None and model.config.to_dict() == before
    assert patch_model(base_model(model), "yarn:4").native


@pytest.mark.parametrize(
    ("spec", "length"), [("yarn:4,original_max_position_embeddings=32", 128), ("abf,theta=1e6", None)]
)
def test_a_family_that_says_no_length(spec: str, length: int | None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 61, "lru_width": 32}
    model = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(num_hidden_layers=3, **sizes))
    patch_model(model, spec)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.get("max_position_embeddings") == length and RopeScaling.from_config(raw) == patched_scaling(model)
    unpatch_model(model)
    assert not hasattr(model.config, "max_position_embeddings")


class _Own(LlamaRotaryEmbedding):
    """Somebody's own class, which leaves reading the config to transformers."""


class _Unscaled(LlamaRotaryEmbedding):
    """One that computes the same frequencies whatever its config says."""

    def __init__(self, config: Any) -> None:
        config = copy.deepcopy(config)
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        super().__init__(config)


class _NeedsMore(_Unscaled):
    """One that needs more than a config to be built."""

    def __init__(self, config: Any, more: int) -> None:
        super().__init__(config)


@pytest.mark.parametrize("own", [_Own, _Unscaled, _NeedsMore])
def test_a_rotary_module_of_somebodys_own_is_asked(tiny_model: Make, own: type[Any], tmp_path: Path) -> None:
    model = tiny_model()
    model.model.rotary_emb = own(model.config, 1) if own is _NeedsMore else own(model.config)
    report = patch_model(model, "yarn:4")
    assert report.native == (own is _Own)
    assert model.config.rope_parameters["rope_type"] == ("yarn" if own is _Own else "scaled-rope")
    model.save_pretrained(tmp_path)
    assert RopeScaling.from_config(json.loads((tmp_path / "config.json").read_text())) == report.scaling


def _failing(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a bug of ours")


def test_our_own_failing_does_not_make_a_checkpoint_that_only_we_can_load(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr(TableForm, "frequencies", _failing)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        patch_model(model, "yarn:4")
    assert patched_scaling(model) is None


def test_a_failing_module_of_the_family_means_that_transformers_cannot_express_it(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr("scaled_rope.patching.saved_config.tables_of_text", _failing)
    assert patch_model(model, "yarn:4").native is False


@pytest.mark.parametrize("spec", ("yarn:4", "linear:4", "dynamic-ntk:4"))
def test_a_model_without_numbers_is_given_the_same_words(tiny_model: Make, spec: str) -> None:
    """As `scaled-rope plan` patches it, to trace a pass; modules of the family can be compared all the same."""
    model = tiny_model()
    with FakeTensorMode():
        traced = type(model)(model.config)
        assert patch_model(traced, spec).native
    patch_model(model, spec)
    assert traced.config.rope_parameters == model.config.rope_parameters
