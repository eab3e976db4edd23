"""Caches are found by what they are, under the name of any release of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from scaled_rope.patching.cache_argument import NAMES, cache_name, given_cache, returned_cache
from tests.helpers.models import Make


class _Layer(nn.Module):
    def forward(self, hidden: torch.Tensor, past_key_values: object = None) -> torch.Tensor:
        return hidden


class _NewerLayer(nn.Module):
    def forward(self, hidden: torch.Tensor, cache: object = None) -> torch.Tensor:
        return hidden


def test_the_name_is_that_of_the_signature(tiny_model: Make) -> None:
    assert cache_name(_Layer()) == "past_key_values" and cache_name(_NewerLayer()) == "cache"
    model = tiny_model()
    ids = torch.arange(1, 9)[None]
    first = model(ids[:, :6], use_cache=True)
    cache = returned_cache(first)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 6
    model(ids[:, 6:], use_cache=True, **{cache_name(model): cache})
    assert cache.get_seq_length() == 8


def test_a_cache_is_found_under_any_name() -> None:
    cache = DynamicCache()
    for given in ({"cache": cache}, {"past_key_values": cache}, {"kwargs": {"whatever": cache}}, {"x": 1, "y": cache}):
        assert given_cache(given) is cache
    assert given_cache({"cache": None, "input_ids": torch.zeros(1)}) is None

    class LikeACache:
        def get_seq_length(self) -> int:
            return 0

    for name in NAMES:
        assert isinstance(given_cache({name: LikeACache()}), LikeACache)


def test_a_cache_is_found_in_any_output() -> None:
    cache = DynamicCache()
    assert returned_cache((torch.zeros(1), cache)) is cache
    assert returned_cache((torch.zeros(1),)) is None and returned_cache(None) is None
    output = BaseModelOutputWithPast(last_hidden_state=torch.zeros(1), past_key_values=cache)
    assert returned_cache(output) is cache
    assert returned_cache(BaseModelOutputWithPast(last_hidden_state=torch.zeros(1))) is None


def test_no_old_name_is_asked_for(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking an output for the name of another release makes transformers warn its user, about code not theirs."""
    asked: list[str] = []
    inner = BaseModelOutputWithPast.__contains__
    monkeypatch.setattr(BaseModelOutputWithPast, "__contains__", lambda one, key: asked.append(key) or inner(one, key))
    model = tiny_model().model
    assert isinstance(returned_cache(model(torch.arange(1, 9)[None], use_cache=True)), DynamicCache)
    assert returned_cache(model(torch.arange(1, 9)[None], use_cache=False)) is None
    assert not asked
