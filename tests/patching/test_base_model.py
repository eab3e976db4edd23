"""Where the rotary module of a model is found."""

from __future__ import annotations

import pytest
from torch import nn

from scaled_rope import ConfigError, patch_model
from tests.helpers.models import Make


def test_two_models_in_one_are_refused(tiny_model: Make) -> None:
    pair = nn.ModuleList([tiny_model("llama"), tiny_model("gemma")])
    with pytest.raises(ConfigError, match=r"several models with RoPE \(llama, gemma\)"):
        patch_model(pair, "yarn:4")
