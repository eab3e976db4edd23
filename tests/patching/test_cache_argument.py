"""Caches are emptied, whatever reset() of the installed transformers leaves in them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from scaled_rope.patching.cache_argument import empty


def test_an_emptied_cache_holds_only_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_in_5_17(self: DynamicLayer) -> None:
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    for old in (False, True):
        cache = DynamicCache()
        cache.update(torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4), 0)
        if old:
            monkeypatch.setattr(DynamicLayer, "reset", as_in_5_17)
        empty(cache)
        assert cache.get_seq_length() == 0
        keys, _ = cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
        assert keys.shape[2] == cache.get_seq_length() == 2 and bool(keys.all())
