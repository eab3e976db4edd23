"""Key/value caches that a patched model cannot read."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from scaled_rope.patching.cache_argument import empty
from scaled_rope.patching.patch import patch_model, unpatch_model
from tests.helpers.caches import SAME, distance, refused, through_cache
from tests.helpers.models import Make
from tests.helpers.optional import transformers_is


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that offload, without a GPU: a layer that is offloaded has no numbers until it is fetched."""

    class Stream(contextlib.nullcontext[None]):
        def wait_stream(self, other: Any) -> None:
            pass

    def offload(layer: Any) -> None:
        layer.away = layer.keys, layer.values
        layer.keys, layer.values = (torch.full_like(x, math.nan) for x in layer.away)

    def prefetch(layer: Any) -> None:
        if layer.is_initialized and layer.keys.isnan().any():
            layer.keys, layer.values = layer.away

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=1.2"])
def test_offloaded_caches(
    tiny_model: Make, text: Tensor, family: str, spec: str, offloading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    patch_model(model, spec)
    ends = [20, 40, 41, 57, 58]
    wanted = through_cache(model, text, ends)
    for make in (
        lambda: DynamicCache(config=model.config, offloading=True),
        lambda: StaticCache(config=model.config, max_cache_len=60, offloading=True),
    ):
        refused(lambda: model(text, past_key_values=make()), "Cache offloads", "computes on cpu")  # noqa: B023
        with monkeypatch.context() as patched:
            patched.setattr("scaled_rope.patching.pass_hooks.check_device", lambda cache, device: None)
            cache = make()
            assert distance(through_cache(model, text, ends, cache), wanted) < SAME
            assert any(layer.keys.isnan().any() for layer in cache.layers)


@torch.no_grad()
def test_a_cache_that_the_model_did_not_fill_is_refused(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    foreign: Any = model(text[:, :30], use_cache=True).past_key_values
    patch_model(model, "dynamic-yarn")
    refused(lambda: model(text[:, 30:31], past_key_values=foreign), "cache: ", "DynamicCache", "not filled by")
    by_position: Any = model.model
    refused(lambda: by_position(text[:, 30:31], None, None, foreign), "not filled by")
    own: Any = model(text[:, :30], use_cache=True).past_key_values
    for spec in ("dynamic-linear", "dynamic-yarn,dynamic_step=2", "yarn:4"):
        patch_model(model, spec)
        refused(lambda: model(text[:, 30:31], past_key_values=own), "cache: ", "another patch", "dynamic-yarn")
    # A cache that is emptied is as good as new; transformers 5.17 keeps its keys, as zeros.
    own.reset() if transformers_is("5.18") else empty(own)
    assert distance(through_cache(model, text, [20, 40], own), through_cache(model, text, [20, 40])) < SAME


@torch.no_grad()
def test_other_caches_that_cannot_be_read_are_refused(tiny_model: Make, text: Tensor) -> None:
    falcon = tiny_model("falcon")
    patch_model(falcon, "dynamic-yarn")
    cache: Any = falcon(text[:, :30], use_cache=True).past_key_values
    refused(lambda: falcon(text[:, 30:31], past_key_values=cache), "falcon", "attention interface", "use_cache=False")

    model = tiny_model()
    patch_model(model, "dynamic-yarn")
    # Padding on the right, so that the next token does not go on where the row ended.
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[0, 25:30] = 0
    cache = model(text[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values
    refused(lambda: model(text[:, 30:31], attention_mask=mask, past_key_values=cache), "position_ids", "consecutive")
    cache = model(text[:, :30], use_cache=True).past_key_values
    places = torch.tensor([[35]])
    refused(lambda: model(text[:, 30:31], position_ids=places, past_key_values=cache), "position_ids", "without a gap")
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :20], layer.values[:, :, :20]
    refused(lambda: model(text[:, 30:31], past_key_values=cache), "holds 20 tokens, 30 when")

    class Half(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key, value, layer)
            return keys[:, :, ::2], values[:, :, ::2]

    refused(lambda: model(text[:, :30], past_key_values=Half()), "type Half", "hands out 15 keys", "StaticCache")


@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-yarn", "dynamic-yarn:1,dynamic_step=2"])
@torch.no_grad()
def test_a_cache_is_not_read_after_its_patch_was_taken_out(tiny_model: Make, spec: str) -> None:
    model, text = tiny_model(), torch.arange(1, 41)[None]
    patch_model(model, spec)
    cache = model(text[:, :30], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    unpatch_model(model)
    for each in (cache, twin):
        refused(lambda: model(text[:, 30:31], past_key_values=each), "cache: ", "DynamicCache", "or no longer")  # noqa: B023
    own = model(text[:, :30], use_cache=True).past_key_values
    model(text[:, 30:31], past_key_values=own)
    cache.reset()
    model(text[:, :5], past_key_values=cache)
