"""Passes through key/value caches in pieces, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError
from tests.helpers.models import DETECTED, FAMILIES, Make

# Logits are about 1 and made of float32 sums over some hundred terms, which differ by a few units of 1.2e-7 when they
# are added in another order; large weights make that some 5e-6.
SAME = 5e-5

ORIGINAL = 32


def one_layer(make: Make, family: str = "llama", **more: Any) -> PreTrainedModel:
    settings: dict[str, Any] = {"num_hidden_layers": 1}
    if "layer_types" in (FAMILIES | DETECTED)[family]:
        settings["layer_types"] = ["sliding_attention" if family in ("afmoe", "cohere2") else "full_attention"]
    settings |= {"smollm3": {"no_rope_layers": [1]}, "afmoe": {"num_dense_layers": 0}}.get(family, {})
    return make(family, **settings, **more)


@torch.no_grad()
def through_cache(model: PreTrainedModel, ids: Tensor, ends: list[int], cache: Any = None, **more: Any) -> Tensor:
    """Logits [B, ends[-1], V] of a text that is read in pieces which end there."""
    logits, start = [], 0
    for end in ends:
        output: Any = model(ids[:, start:end], past_key_values=cache, use_cache=True, **more)
        cache, start = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    output: Any = model(ids, use_cache=False, **more)
    logits: Tensor = output.logits
    return logits


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
