"""Methods that change attention inside models: caches, padding, beams, gradients, memory, saving, refusals."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from scaled_rope import RopeScaling, load_model, patch_model, unpatch_model
from scaled_rope.attention.regions import region_attention, rerope
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import model_jobs
from scaled_rope.flags import add_model_arguments
from scaled_rope.training.traced_memory import LiveBytes
from tests.test_regions import oracle, rerope_distance

# The tiny models have 32 positions; texts have 48 tokens.
SPECS = [
    "rerope,window=10",
    "rerope,window=10,logn=true",
    "leaky-rerope,window=10,k=4",
    "self-extend,group=3,window=8",
    "dual-chunk,chunk=12",
]
# float32 sums in another order through two layers; logits reach 10.
NOISE = 2e-4

Make = Callable[..., PreTrainedModel]


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


def test_gradients_are_those_of_the_definition() -> None:
    inv_freq = torch.tensor([100.0 ** (-d / 4) for d in range(4)])
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 37, 10), (1, 2, 37, 10), (1, 2, 37, 10)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, 4, 37, 10, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(
        (region_attention(*leaves, inv_freq, rerope(7, 24), 0.4, block=8) * weights).sum(), leaves
    )
    wanted = torch.autograd.grad((oracle(*leaves, rerope_distance(7), 0.4, 24) * weights).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        # Frequencies were given in float32 to both; all else is float64.
        assert (one - other).abs().max() < 1e-6


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
        with LiveBytes() as live:
            region_attention(q, k, v, torch.ones(8), rerope(512), 0.25)
        return live.peak

    short, long = peak(2048), peak(8192)
    assert long < 4.2 * short  # linear: 4, quadratic: 16
    assert long < 8192 * 8192  # a quarter of one head's T x T scores


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
    with pytest.raises(
        ConfigError, match="past_key_values: this DynamicCache was not filled by the model as it is patched"
    ):
        model(tokens[:, 9:], past_key_values=cache)
    model(tokens[:, 9:], past_key_values=model(tokens[:, :9]).past_key_values)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rerope", "window is missing"),
        ("rerope:512", "window is missing"),
        ("rerope,window=0", "window=0: must be a whole number, at least 1"),
        ("rerope,window=2.5", "window=2.5: must be a whole number"),
        ("rerope,window=32", "window=32: must be below the trained length, 32 tokens"),
        ("rerope,window=8,logn=2", "logn=2: must be true or false"),
        ("leaky-rerope,window=8,k=1", "k=1: must be a finite number above 1"),
        ("self-extend,group=1,window=8", "group=1: must be a whole number, at least 2"),
        ("dual-chunk,chunk=32", "chunk=32: must be below the trained length, 32 tokens"),
        ("dynamic-rerope,window=8", "method 'rerope' has no dynamic form"),
        ("rerope,window=8,resonance=true", "resonance=True: not for method 'rerope'"),
        ("rerope,window=8,attention_factor=2", "attention_factor=2.0: not for method 'rerope'"),
    ],
)
def test_parameters_that_cannot_be(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RopeScaling.from_spec(spec, RopeScaling("default", original_max_position_embeddings=32))


def test_flags(tiny_model: Make, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)

    def labels(*flags: str) -> list[str]:
        parser = ArgumentParser()
        add_model_arguments(parser)
        return [job.label for job in model_jobs(parser.parse_args(["-m", str(tmp_path), *flags]))]

    assert labels("--method", "rerope", "--window", "8") == labels("--rerope", "8") == ["rerope (window=8)"]
    assert labels("--scaling", "yarn:2", "--method", "leaky-rerope", "--window", "8", "--k", "4", "--logn") == [
        "yarn x2",
        "leaky-rerope (window=8, logn=True, k=4)",
    ]
    assert labels("--method", "self-extend", "--scaling", "rerope,window=5", "--group", "2", "--window", "8") == [
        "self-extend (group=2, window=8)",
        "rerope (window=5)",
    ]
    with pytest.raises(ConfigError, match="flag --window: is for a scaling that takes window"):
        labels("--method", "yarn:2", "--window", "8")
    with pytest.raises(ConfigError, match="attention 'eager': cannot carry method 'rerope'"):
        labels("--rerope", "8", "--attention", "eager")
