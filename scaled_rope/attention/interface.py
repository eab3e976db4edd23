"""The interface of transformers' attention functions, written out once.

An attention module calls its function as fn(module, query, key, value, attention_mask, **options) and gets back the
heads' outputs [B, T, H, D] and weights or None. A function of ours takes one `AttentionCall` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, attention_mask, **options) -> [B, T, H, D], and weights or None."""


@dataclass
class AttentionCall:
    """The arguments that an attention module passes to its attention function."""

    module: nn.Module
    query: Tensor
    """[B, H, T, D]: the last T of S positions."""
    key: Tensor
    """[B, K, S, D], where K divides H: each of them serves H / K neighbouring heads."""
    value: Tensor
    """[B, K, S, D]."""
    attention_mask: Any
    """In the form of the mask function that is registered beside the attention function."""
    options: dict[str, Any]
    """Keyword arguments: dropout, scaling, sliding_window, softcap, s_aux, position_ids, cu_seq_lens_q, ..."""

    @property
    def scale(self) -> float:
        """The factor on the products of queries and keys, by default 1 / sqrt(D)."""
        scaling: float | None = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def dropout(self) -> float:
        dropout: float = self.options.get("dropout") or 0.0
        return dropout

    @property
    def is_causal(self) -> bool:
        """Whether a query sees no later key: the call's option, or else the module's attribute."""
        said = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)

    @property
    def may_see_later_keys(self) -> bool:
        """Whether the call or the module says that attention is not causal; one of them is enough."""
        return self.options.get("is_causal") is False or not getattr(self.module, "is_causal", True)

    def has(self, *names: str) -> str:
        """The name of the first of these options that is given, or ""."""
        return next((name for name in names if self.options.get(name) is not None), "")

    def handed_to(self, function: AttentionFunction) -> tuple[Tensor, Tensor | None]:
        """Pass the call on to another attention function and return its result."""
        return function(self.module, self.query, self.key, self.value, self.attention_mask, **self.options)


def attention_function(compute: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]) -> AttentionFunction:
    """Wrap a function of an `AttentionCall` so that transformers can call it."""

    @functools.wraps(compute)
    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return compute(AttentionCall(module, query, key, value, attention_mask, options))

    return function
