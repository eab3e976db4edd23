"""Parts of the tests of the rotary kernel inside models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Float32 logits of up to 12, as in test_families: the same sums in the same order, up to contraction of products.
SAME = 1e-4


def logits(model: PreTrainedModel, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens, **more).logits.float()
    return result
