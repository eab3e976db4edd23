"""What is known of the forward pass of a patched base model while it runs: one object, in one context variable.

The variable and not the model holds it, so that copies of models, threads and models that call each other don't meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ForwardPass:
    """A forward pass between its two hooks (`pass_hooks`), or only the lengths that the passes to come shall have."""

    seq_len: Tensor | None = None
    """[B]: the lengths of the rows where they are not what positions say, see `lengths`."""
    hooks: object = None
    """The hooks that began the pass and end it; None where no pass has begun."""
    positions: Tensor | None = None
    """[B or 1, Q]: those of its queries, where frequencies depend on the length."""
    cache: Any = None
    """The cache that it was given, if any."""
    contents: Any = None
    """What is known of that cache, a `cache_owners.CacheContents`; None: nothing."""
    inputs: tuple[str, Tensor] | None = None
    """The name of the argument with its tokens, and these, [B, Q] or [B, Q, H]."""
    deferred: Any = None
    """The `deferred_rotation.DeferredPass` of a pass that rotates keys when they are read; None for others."""
    outer: ForwardPass | None = None
    """What was running when this one began."""


_CURRENT: ContextVar[ForwardPass | None] = ContextVar("scaled_rope_forward_pass", default=None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def current_pass() -> ForwardPass | None:
    """The pass that runs, the innermost one."""
    # torch.compile cannot trace context variables: a compiled model is in pieces where keys may be rotated late.
    return _CURRENT.get()


def begin(current: ForwardPass) -> None:
    """Let `current` be the pass that runs, inside the one that does now; its rows have the lengths said for that."""
    current.outer = _CURRENT.get()
    while current.outer is not None and current.outer.hooks is current.hooks:
        current.outer = current.outer.outer  # an earlier pass of these hooks that an interrupt left behind
    if current.outer is not None:
        current.seq_len = current.outer.seq_len
    _CURRENT.set(current)


def end(hooks: object) -> ForwardPass | None:
    """End the pass that these hooks began, and return it; None when it is not the one that runs."""
    current = _CURRENT.get()
    if current is None or current.hooks is not hooks:
        return None
    _CURRENT.set(current.outer)
    return current


@contextmanager
def lengths(seq_len: Tensor | None) -> Iterator[None]:
    """Within it, passes of dynamically scaled models belong to rows of these lengths [B], instead of to what their
    positions say: a text that is read in pieces has one scale. None: what positions say."""
    token = _CURRENT.set(ForwardPass(seq_len))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def row_lengths(position_ids: Tensor) -> Tensor:
    """l' of rows whose latest positions are these [B, T]: largest position + 1, or what `lengths` says; [B] or [1]."""
    current = current_pass()
    given: Tensor | None = None if current is None else current.seq_len
    return position_ids.amax(dim=-1) + 1 if given is None else given.to(position_ids.device)
