"""The softmax scale of families with multi-head latent attention, which depends on the scaling of RoPE.

DeepSeek V2 and V3, Kimi K2, Mistral 4 and their like rotate a part of each head only. To sharpen attention as a whole
they put YaRN's temperature into the softmax scale, when attention is built: it is multiplied by m², m =
0.1·mscale_all_dim·ln s + 1. A patch has to carry it along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from scaled_rope.errors import ConfigError, is_number
from scaled_rope.scaling.formulas import attention_factor_of
from scaled_rope.scaling.hf_config import SOFTMAX_MSCALE_FAMILIES


@dataclass(frozen=True)
class SoftmaxScale:
    """The two numbers of a config from which such a family computes its temperature, and the factor they go with."""

    mscale: float
    mscale_all_dim: float
    factor: float

    def of_tables(self, factor: float) -> float:
        """The factor that is left for cos and sin at a factor s: the quotient of the two temperatures."""
        log = math.log(factor)
        return attention_factor_of(log, self.mscale) / attention_factor_of(log, self.mscale_all_dim)

    def of_softmax(self, factor: float) -> float:
        """The multiplier of the softmax scale at a factor s."""
        return float(attention_factor_of(math.log(factor), self.mscale_all_dim)) ** 2


def softmax_scale_of(config: Any) -> SoftmaxScale | None:
    """The softmax scale that a config asks for; None in other families, and where it asks for none."""
    rope = getattr(config, "rope_parameters", None) or {}
    given = rope.get("mscale_all_dim") if rope.get("rope_type") != "default" else None
    if not given or config.model_type not in SOFTMAX_MSCALE_FAMILIES:
        return None
    mscale: Any = rope.get("mscale") or 1.0
    factor: Any = rope.get("factor")
    if not all(is_number(value) for value in (given, mscale, factor)):
        raise ConfigError(f"mscale={mscale!r}, mscale_all_dim={given!r}, factor={factor!r}: must be numbers")
    return SoftmaxScale(float(mscale), float(given), float(factor))


def scaled_attention(base: nn.Module, scale: SoftmaxScale) -> dict[str, float]:
    """Path of each attention module of an unpatched base model -> its softmax scale without the temperature.

    Raises:
        ConfigError: a module's scale is not the one that the config asks for, so its parts cannot be told apart.
    """
    found = {}
    for path, module in base.named_modules():
        value, width = getattr(module, "scaling", None), getattr(module, "qk_head_dim", None)
        if not isinstance(value, float) or not isinstance(width, int):
            continue
        plain = width**-0.5
        if not math.isclose(value, plain * scale.of_softmax(scale.factor), rel_tol=1e-6):
            raise ConfigError(
                f"{path} has the softmax scale {value:.6g}, where mscale_all_dim={scale.mscale_all_dim:g} and "
                f"factor={scale.factor:g} make {plain * scale.of_softmax(scale.factor):.6g}: a patch cannot follow it"
            )
        found[path] = plain
    if not found:
        raise ConfigError(
            f"mscale_all_dim={scale.mscale_all_dim:g}: no attention module shows the softmax scale that was made of "
            "it, so a patch cannot follow it; edit config.json and load again"
        )
    return found
