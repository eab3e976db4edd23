"""Methods that change attention inside models: caches, padding, beams, gradients, memory, saving, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.small_models import MODEL_TYPES, small_model
from scaled_rope import RopeScaling, load_model, patch_model, unpatch_model
from scaled_rope.errors import ConfigError
from scaled_rope.patching import region_attention
from tests.helpers.models import Make

# The tiny models have 32 positions; texts have 48 tokens.
SPECS = [
    "rerope,window=10",
    "rerope,window=10,logn=true",
    "leaky-rerope,window=10,k=4",
    "self-extend,group=3,window=8",
    "dpe,groups=2+3+4+8,window=8",
    "dual-chunk,chunk=12",
]
# float32 sums in another order through two layers; logits reach 10.
NOISE = 2e-4


def full(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **more).logits


@pytest.mark.parametrize("spec", SPECS)
def test_every_way_through_a_cache_is_the_full_pass(spec: str, tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    plain = full(model, tokens)
    patch_model(model, spec)
    wanted = full(model, tokens)
    assert (wanted[:, :8] - plain[:, :8]).abs().max() < NOISE  # within windows and chunks nothing changes
    assert (wanted[:, 32:] - plain[:, 32:]).abs().max() > 100 * NOISE
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=60)):
        found = []
        for first, end in ((0, 15), (15, 16), (16, 40), (40, 41), (41, 48)):
            with torch.no_grad():
                found.append(model(tokens[:, first:end], past_key_values=cache, use_cache=True).logits)
        assert (torch.cat(found, dim=1) - wanted).abs().max() < NOISE, type(cache).__name__


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_as_without_a_cache(spec: str, beams: int, tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    patch_model(model, spec)
    prompt = tokens[:, :30].clone()
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    found = model.generate(prompt, **options)
    assert torch.equal(found, model.generate(prompt, use_cache=False, **options))
    alone = model.generate(prompt[:1, 7:], **{**options, "attention_mask": mask[:1, 7:]})
    assert torch.equal(found[:1, 7:], alone)  # padding changes nothing


def test_padding_on_either_side_changes_nothing_and_stays_finite(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    patch_model(model, SPECS[3])
    alone = full(model, tokens[:1, :40])
    for left in (True, False):
        padded = torch.full((1, 48), 5)
        where = slice(8, 48) if left else slice(0, 40)
        padded[:, where] = tokens[:1, :40]
        mask = torch.zeros(1, 48, dtype=torch.long)
        mask[:, where] = 1
        found = full(model, padded, attention_mask=mask)
        assert found.isfinite().all()
        assert (found[:, where] - alone).abs().max() < NOISE


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_on_a_gpu_gets_the_same_from_composed_calls(
    spec: str, tiny_model: Make, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a GPU would run, over FlashAttention for CPUs: whole texts alone and padded, through a cache or not.
    model = tiny_model()
    patch_model(model, spec)
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    wanted = full(model, tokens), full(model, tokens, attention_mask=mask)
    calls = []

    def composable(q: Tensor, k: Tensor, v: Tensor) -> bool:
        calls.append(q.shape[2] == k.shape[2])
        return calls[-1]

    monkeypatch.setattr("scaled_rope.patching.region_attention.is_composable", composable)
    assert (full(model, tokens) - wanted[0]).abs().max() < NOISE
    assert (full(model, tokens, attention_mask=mask) - wanted[1])[mask.bool()].abs().max() < NOISE
    with torch.no_grad():
        first = model(tokens[:, :40], use_cache=True)
        rest = model(tokens[:, 40:], past_key_values=first.past_key_values)
    assert (torch.cat((first.logits, rest.logits), dim=1) - wanted[0]).abs().max() < NOISE
    assert True in calls and False in calls


def test_packed_documents_are_apart(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    patch_model(model, SPECS[0])
    positions = torch.cat((torch.arange(20), torch.arange(28)))[None]
    found = full(model, tokens[:1], position_ids=positions)
    apart = torch.cat((full(model, tokens[:1, :20]), full(model, tokens[:1, 20:])), dim=1)
    assert (found - apart).abs().max() < NOISE


@pytest.mark.parametrize("cached", [False, True])
def test_positions_with_a_gap_are_refused(cached: bool, tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    patch_model(model, SPECS[0])
    mask, ids = torch.ones(2, 40, dtype=torch.long), tokens[:, :40]
    mask[0, :5] = 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    gap = counted + 400 * (torch.arange(40) > 19)
    wanted = full(model, ids, attention_mask=mask)
    for positions in (counted, counted + 7):  # only distances count
        assert torch.equal(full(model, ids, attention_mask=mask, position_ids=positions), wanted)
    if not cached:
        with pytest.raises(ConfigError, match="position_ids: must rise by one from token to token"):
            model(ids, attention_mask=mask, position_ids=gap)
        return

    def piece(begin: int, end: int, positions: Tensor, cache: Any) -> Any:
        with torch.no_grad():
            return model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                         past_key_values=cache, use_cache=True)  # fmt: skip

    out, found = None, []
    for begin, end in ((0, 4), (4, 20), (20, 21), (21, 40)):  # the first piece is all padding in one row
        out = piece(begin, end, counted, None if out is None else out.past_key_values)
        found.append(out.logits)
    assert ((torch.cat(found, dim=1) - wanted).abs().amax(-1) * mask).max() < NOISE
    for end in (21, 30):  # of a single token, and of several
        cache = piece(0, 20, counted, None).past_key_values
        with pytest.raises(ConfigError, match="must rise by one from token to token, those in a cache included"):
            piece(20, end, gap, cache)
    with pytest.raises(ConfigError, match="must rise by one"):
        model(ids, position_ids=gap, past_key_values=DynamicCache(config=model.config))


def test_a_mask_with_holes_is_refused(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    patch_model(model, SPECS[0])
    mask = torch.ones_like(tokens)
    mask[1, 10:12] = 0
    with pytest.raises(ConfigError, match="attention_mask: row 1 leaves out tokens between 0 and 47"):
        model(tokens, attention_mask=mask)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "qwen3_moe", "olmo2", "phi", "stablelm"])
def test_families_keep_their_own_rotation(family: str, tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model(family)
    plain = full(model, tokens)
    patch_model(model, "rerope,window=31")
    assert (full(model, tokens)[:, :32] - plain[:, :32]).abs().max() < NOISE
    unpatch_model(model)
    assert torch.equal(full(model, tokens), plain)


def test_copies_and_other_models_are_left_alone(tiny_model: Make, tokens: Tensor) -> None:
    one, other = tiny_model(), tiny_model()
    plain = full(other, tokens)
    patch_model(one, SPECS[0])
    assert torch.equal(full(other, tokens), plain)
    patch_model(one, "yarn:2")
    patch_model(other, "yarn:2")
    assert torch.equal(full(one, tokens), full(other, tokens))


@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_loaded(spec: str, tiny_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = tiny_model()
    report = patch_model(model, spec)
    assert not report.native
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert RopeScaling.from_config(loaded.config) == report.scaling
    assert torch.equal(full(loaded, tokens), full(model, tokens))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("mistral", {"sliding_window": 8}, "'rerope': cannot be used with mistral models, whose layers have a sliding"),
        ("gemma2", {}, "gemma2 models, whose scores have a soft cap"),
        ("smollm3", {}, "is for all layers alike, those of this smollm3 model differ"),
        ("gemma3_text", {}, "is for all layers alike, those of this gemma3_text model differ"),
        ("gpt_oss", {}, "cannot be used with gpt_oss models"),
    ],
)
def test_families_that_do_not_fit_are_named(
    family: str, options: dict[str, Any], said: str, tiny_model: Make, tokens: Tensor
) -> None:
    model = tiny_model(family, **options)
    plain = full(model, tokens)
    with pytest.raises(ConfigError, match=said):
        patch_model(model, "rerope,window=10")
    assert torch.equal(full(model, tokens), plain)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("deepseek_v3", {}, "latent attention rotates the last dimensions of each head"),
        ("minicpm3", {}, "latent attention rotates the last dimensions of each head"),
        ("hunyuan_v1_dense", {}, "HunYuanDenseV1Attention normalises queries and keys after it has rotated them"),
        ("llama", {"is_causal": False}, "llama models, whose queries attend to later keys"),
        ("gemma", {"use_bidirectional_attention": True}, "gemma models, whose queries attend to later keys"),
    ],
)
def test_attention_that_does_not_fit_is_named(family: str, more: dict[str, Any], said: str) -> None:
    if family not in MODEL_TYPES:
        pytest.skip("a release of transformers without this family")
    with pytest.raises(ConfigError, match=f"'rerope': cannot be used with .*{said}"):
        patch_model(small_model(family, num_hidden_layers=2, **more), "rerope,window=10")


def test_heads_may_be_repeated_after_the_rotation(tokens: Tensor) -> None:
    model = small_model("jetmoe", num_hidden_layers=2)
    plain = full(model, tokens)
    patch_model(model, "rerope,window=48")
    assert (full(model, tokens) - plain).abs().max() < NOISE


@pytest.mark.skipif("minicpm3" not in MODEL_TYPES, reason="a release of transformers without this family")
def test_what_attention_is_given_must_be_what_was_to_be_rotated(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("minicpm3", num_hidden_layers=2)
    monkeypatch.setattr(region_attention, "rotated_last", lambda module: False)  # as if it were not known
    patch_model(model, "rerope,window=48")
    with pytest.raises(ConfigError, match="Attention changes queries or keys between rotation and attention"):
        full(model, tokens)


def test_calls_that_regions_cannot_compute_are_refused(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    patch_model(model, SPECS[0])
    with pytest.raises(ConfigError, match="is_causal=False: LlamaAttention attends to keys that come after the query"):
        full(model, tokens, is_causal=False)
    with pytest.raises(ConfigError, match="softcap: LlamaAttention uses it, a method that changes attention has none"):
        full(model, tokens, softcap=30.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attn": "eager"}, "attention 'eager': cannot carry method 'rerope'"),
        ({"attn": "flash_attention_2"}, "attention 'flash_attention_2': cannot carry method 'rerope'"),
        ({"kernel": "torch"}, "kernel='torch': method 'rerope' rotates inside attention"),
        ({"drop_layers": [1]}, "method 'rerope': is for all layers alike"),
    ],
)
def test_options_that_cannot_be_met(options: dict[str, Any], said: str, tiny_model: Make) -> None:
    with pytest.raises(ConfigError, match=said):
        patch_model(tiny_model(), "rerope,window=10", **options)


def test_a_cache_from_before_patching_is_refused(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    cache = model(tokens[:, :9]).past_key_values
    patch_model(model, SPECS[0])
    with pytest.raises(ConfigError, match="cache: this DynamicCache was not filled by the model as it is patched"):
        model(tokens[:, 9:], past_key_values=cache)
    model(tokens[:, 9:], past_key_values=model(tokens[:, :9]).past_key_values)
