"""The state of a patched base model's forward pass while it runs: one object, in one context variable.

It is in the variable and not on the model, so that copies of models, threads and models that call each other do not
interfere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ForwardPass:
    """A forward pass between its two hooks (`pass_hooks`), or only the row lengths for passes to come (`lengths`)."""

    seq_len: Tensor | None = None
    """[B]: the lengths of the rows where they do not follow from positions, see `lengths`."""
    hooks: object = None
    """The hooks that began the pass and end it; None where no pass has begun."""
    positions: Tensor | None = None
    """[B or 1, Q]: the positions of its queries, where frequencies depend on the length or temperatures on them."""
    shift: Tensor | None = None
    """[B or 1]: see `cache_owners.CacheContents`."""
    cache: Any = None
    """The cache that the pass was given, if any."""
    contents: Any = None
    """The note on that cache, a `cache_owners.CacheContents`; None without one."""
    inputs: tuple[str, Tensor] | None = None
    """The name of the argument that holds the tokens, and its value: ids [B, Q] or embeddings [B, Q, H]."""
    deferred: Any = None
    """The `deferred_rotation.DeferredPass` of a pass that rotates keys when they are read; None for others."""
    handed: tuple[Tensor, Tensor] | None = None
    """Queries and keys that a layer was to rotate and left to attention, see `region_attention`."""
    temperatures: dict[Any, Tensor] = field(default_factory=dict)
    """(scaling, window) -> the temperatures [B or 1, Q] of its queries, see `patching.temperature`."""
    outer: ForwardPass | None = None
    """The pass that was running when this one began."""


_CURRENT: ContextVar[ForwardPass | None] = ContextVar("scaled_rope_forward_pass", default=None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def current_pass() -> ForwardPass | None:
    """The running pass, the innermost if there are several; None when there is none."""
    # torch.compile cannot trace context variables: where keys may be rotated late, a model compiles in pieces.
    return _CURRENT.get()


def begin(current: ForwardPass) -> None:
    """Make `current` the running pass, inside the one that runs now; it takes over that pass's row lengths."""
    current.outer = _CURRENT.get()
    while current.outer is not None and current.outer.hooks is current.hooks:
        current.outer = current.outer.outer  # an earlier pass of these hooks that an interrupt left behind
    if current.outer is not None:
        current.seq_len = current.outer.seq_len
    _CURRENT.set(current)


def end(hooks: object) -> ForwardPass | None:
    """End the pass that these hooks began, and return it; None when another one or none is running."""
    current = _CURRENT.get()
    if current is None or current.hooks is not hooks:
        return None
    _CURRENT.set(current.outer)
    return current


@contextmanager
def lengths(seq_len: Tensor | None) -> Iterator[ForwardPass]:
    """Within this context, passes of dynamically scaled models take these row lengths [B], not those that follow from
    their positions: a text that is read in pieces has one scale. None: lengths follow from positions. Yields the state
    that stands for such passes until one begins."""
    state = ForwardPass(seq_len)
    token = _CURRENT.set(state)
    try:
        yield state
    finally:
        _CURRENT.reset(token)


def row_lengths(position_ids: Tensor) -> Tensor:
    """l' of rows at positions [B, T]: the largest position + 1, or the length that `lengths` gives; [B] or [1]."""
    current = current_pass()
    given: Tensor | None = None if current is None else current.seq_len
    return position_ids.amax(dim=-1) + 1 if given is None else given.to(position_ids.device)
