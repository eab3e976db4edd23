"""Inputs that begin alike: which to read one after another, so that what they share goes through the model once.

The four endings of a HellaSwag question follow the same ten examples and the same sentence; twenty questions about one
text follow that text. In order, each input differs from the one before it only in its end, so that its beginning is in
the model's cache already. Such an input takes a pass of its own, though, where otherwise many share one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.loss import hidden_states, shared_hidden_states
from scaled_rope.patching.patch import cache_obstacle
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling

Input = tuple[int, ...]
Chain = list[Input]

_LEAST = 32
"""Tokens that neighbours in a chain have in common at least."""
_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers whose cache can go back to an earlier position."""
_CPU_TOKENS = 48
"""The cost of a pass beyond its tokens, in tokens, on a processor. For SmolLM2-135M in float32 on two cores a pass of 8
tokens takes 78 ms, each token more 1.7."""
_GPU_FLOPS = 8e12
"""The same on a GPU, in FLOP: 20 ms for a pass of few tokens at 400 TFLOP/s. Estimated, not measured."""
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest change of final hidden states, relative to their norm, that the order of sums explains. A cache that is
misread changes them by about their norm."""


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that two inputs begin with alike."""
    size = min(len(one), len(other))
    return next((index for index in range(size) if one[index] != other[index]), size)


def chains_of(inputs: Collection[Input]) -> list[Chain]:
    """Group inputs into chains, in each of which neighbours begin alike. Inputs that begin like no other are left out.

    In alphabetical order each input shares the most with its neighbours.
    """
    ordered = sorted(inputs)
    chains: list[Chain] = []
    for before, ids in zip(ordered, ordered[1:], strict=False):
        if common(before, ids) < _LEAST:
            continue
        if chains and chains[-1][-1] is before:
            chains[-1].append(ids)
        else:
            chains.append([before, ids])
    return chains


def saved_tokens(chain: Chain) -> int:
    """The tokens of a chain that are not read again."""
    return sum(common(before, ids) for before, ids in zip(chain, chain[1:], strict=False))


def is_worth(chain: Chain, model: Any) -> bool:
    """Whether reading a chain in order saves time, by an estimate of what a pass costs beyond its tokens."""
    if input_device(model).type == "cpu":
        dear = float(_CPU_TOKENS)
    else:
        dear = _GPU_FLOPS / (2 * sum(parameter.numel() for parameter in model.parameters()))
    return saved_tokens(chain) > dear * len(chain)


@torch.inference_mode()
def can_share(model: Any, scaling: RopeScaling, chain: Chain) -> bool:
    """Whether `model` computes the same with a cache that is cut back to a shared beginning.

    Not under a scaling that depends on the length, where the beginning has another scale in a longer input. Models
    whose layers keep a state instead of keys cannot go back. Whether any other model can is tried out, since caches of
    families differ: the second input of `chain` is read in both ways.
    """
    if scaling.is_length_dependent or scaling.changes_attention or cache_obstacle(model):
        return False
    if not set(getattr(text_config(model.config), "layer_types", None) or ()) <= _LAYERS:
        return False
    ids = [torch.tensor(each, device=input_device(model)) for each in chain[:2]]
    starts = [len(each) - 1 for each in ids]
    try:
        shared = list(shared_hidden_states(model, ids, starts))[1][0, -1].float()
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError):
        return False  # a family whose cache is of another kind; out of memory too, which the batches are made for
    whole = hidden_states(model, ids[1][None])[0, -1].float()
    change = float((shared - whole).norm() / whole.norm())
    return change <= _TOLERANCES.get(model.dtype, _TOLERANCES[torch.bfloat16])
