"""A default device that the caller has set says nothing of where a model is: a patch is the same under any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.small_models import small_model
from scaled_rope import ConfigError, patch_model, unpatch_model
from scaled_rope.patching.output_head import output_head
from scaled_rope.patching.patch import PatchReport
from tests.helpers.models import DETECTED, FAMILIES, Make
from tests.helpers.rotary_models import logits

# In the words of configs and in ours, dependent on the length, and a method that changes attention.
SPECS = ["yarn:4", "dynamic-ntk", "dynamic-yarn:2", "cope", "rerope:window=16"]


def _patched(model: Any, spec: str, kernel: str) -> PatchReport | str:
    """The report of a patch, or why it was refused."""
    try:
        return patch_model(model, spec, kernel="none" if "rerope" in spec else kernel)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("family", [*FAMILIES, *DETECTED])
def test_the_same_patch_under_another_default_device(tiny_model: Make, tokens: Tensor, family: str) -> None:
    plain, other = tiny_model(family), tiny_model(family)
    for spec, kernel in zip(SPECS, ("none", "torch", "none", "none", "none"), strict=True):
        wanted = _patched(plain, spec, kernel)
        with torch.device("meta"):
            assert _patched(other, spec, kernel) == wanted
        assert other.config.to_dict() == plain.config.to_dict()
        if isinstance(wanted, str):
            continue
        assert torch.equal(logits(other, tokens), logits(plain, tokens))
        unpatch_model(plain)
        with torch.device("meta"):
            unpatch_model(other)
        assert torch.equal(logits(other, tokens), logits(plain, tokens))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4", "qwen2_vl"])
def test_tables_of_other_forms(family: str) -> None:
    """Latent attention, a rotary module in each layer, positions along axes: their own code makes the tables."""
    plain, other = (small_model(family).float() for _ in range(2))
    patch_model(plain, "yarn:4")
    with torch.device("meta"):
        patch_model(other, "yarn:4")
    other.load_state_dict(plain.state_dict())
    ids = torch.arange(80)[None] + 2
    assert torch.equal(logits(other, ids), logits(plain, ids))


def test_the_output_head_is_measured_under_another_default_device(tiny_model: Make) -> None:
    plain, other = (tiny_model("cohere", logit_scale=0.5) for _ in range(2))
    with torch.device("meta"):
        found = output_head(other)
    assert found == output_head(plain) and found.followed and found.scale == 0.5
