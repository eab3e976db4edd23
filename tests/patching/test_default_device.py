"""A default device that the caller has set says nothing of where a model is: a patch is the same under any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.small_models import small_model
from scaled_rope import patch_model, unpatch_model
from scaled_rope.patching.output_head import output_head
from tests.helpers.models import DETECTED, FAMILIES, Make
from tests.helpers.rotary_models import logits


@pytest.mark.parametrize(
    ("family", "spec", "kernel"),
    [
        *((family, "yarn:4", "none") for family in (*FAMILIES, *DETECTED)),
        # By the rotary kernel, with frequencies that follow the length, in words of our own, and by other attention.
        ("llama", "dynamic-ntk", "torch"),
        ("qwen3", "dynamic-yarn:2", "none"),
        ("mistral", "cope", "none"),
        ("llama", "rerope,window=16", "none"),
    ],
)
def test_the_same_patch_under_another_default_device(
    tiny_model: Make, tokens: Tensor, family: str, spec: str, kernel: str
) -> None:
    plain, other = tiny_model(family), tiny_model(family)
    before = logits(plain, tokens)
    wanted = patch_model(plain, spec, kernel=kernel)
    with torch.device("meta"):
        assert patch_model(other, spec, kernel=kernel) == wanted
    assert other.config.to_dict() == plain.config.to_dict()
    found = logits(other, tokens)
    assert torch.equal(found, logits(plain, tokens)) and not torch.equal(found, before)
    with torch.device("meta"):
        unpatch_model(other)
    assert torch.equal(logits(other, tokens), before)


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
