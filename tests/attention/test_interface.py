"""The one signature of attention functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scaled_rope.attention.interface import AttentionCall, attention_function


def _call(**options: Any) -> AttentionCall:
    return AttentionCall(
        nn.Identity(), torch.zeros(1, 2, 3, 16), torch.zeros(1, 1, 5, 16), torch.ones(1), None, options
    )


def test_what_a_call_says() -> None:
    assert _call().scale == 0.25 and _call(scaling=0.5).scale == 0.5
    assert _call().dropout == 0 and _call(dropout=None).dropout == 0 and _call(dropout=0.1).dropout == 0.1
    assert _call(softcap=None, s_aux=torch.ones(2)).has("softcap", "s_aux") == "s_aux" and not _call().has("softcap")


def test_causal_as_the_call_says_or_else_the_module() -> None:
    call = _call()
    assert call.is_causal and not _call(is_causal=False).is_causal
    assert _call(is_causal=False).may_see_later_keys and not _call().may_see_later_keys
    call.module.is_causal = False  # type: ignore[assignment]
    assert not call.is_causal
    call.options["is_causal"] = True
    assert call.is_causal and call.may_see_later_keys


def test_a_function_gets_and_hands_on_everything() -> None:
    seen: list[tuple[Any, ...]] = []

    def theirs(*args: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append((*args, options))
        return args[1], None

    @attention_function
    def ours(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return call.handed_to(theirs)

    module, q, k, v = nn.Identity(), torch.ones(1), torch.ones(2), torch.ones(3)
    out, weights = ours(module, q, k, v, None, scaling=0.5, dropout=0.0)
    assert out is q and weights is None
    ((*args, options),) = seen
    assert [id(arg) for arg in args[:4]] == [id(module), id(q), id(k), id(v)]
    assert args[4] is None and options == {"scaling": 0.5, "dropout": 0.0}
