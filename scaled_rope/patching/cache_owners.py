"""What a patched model knows of the key/value caches that it filled: who filled them, and what they hold.

A cache of transformers holds keys and no word about how they were rotated, so the model keeps a `CacheContents` on it:
which patch filled it, where its tokens are, and what they were. It goes with the cache wherever that goes (copies,
pickles), and what changes the cache (beam search, cropping) changes it too: the cache's class is exchanged for a
subclass that sees to it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from scaled_rope.errors import ConfigError
from scaled_rope.patching.class_exchange import exchange_class

_CONTENTS = "_scaled_rope_contents"


@dataclass(frozen=True)
class CacheOwner:
    """Who fills caches: one `patch_model` of one model, and copies of that model."""

    label: str
    """The scaling, as messages name it."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class CacheContents:
    """What a cache holds. Tensors have one row for each of the cache's, or one for all."""

    owner: CacheOwner
    length: int
    """Tokens in every row, padding included."""
    offset: Tensor | None = None
    """[B or 1], int64: the position of token j of a row is its offset + j, negative for padding on the left. None:
    positions are not of that kind."""
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    """The tokens themselves where they are kept, in pieces [B, T, ...] with the argument that each was given as."""
    scale: Tensor | None = None
    """[B or 1]: the scale that the keys were rotated with, where that changes."""

    def _rows(self, change: Any) -> None:
        def of(rows: Tensor) -> Tensor:
            changed: Tensor = rows if rows.shape[0] == 1 else change(rows)
            return changed

        self.offset = None if self.offset is None else of(self.offset)
        self.scale = None if self.scale is None else of(self.scale)
        self.inputs = [(name, change(rows)) for name, rows in self.inputs]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        self._rows(lambda table: table[rows.to(table.device)])

    def repeat(self, times: int) -> None:
        """Each row is followed by its copies."""
        self._rows(lambda table: table.repeat_interleave(times, dim=0))

    def cut(self, length: int) -> None:
        """Only the first `length` tokens stay."""
        self.length = length
        pieces, self.inputs = self.inputs, []
        for name, rows in pieces:
            self.inputs.append((name, rows[:, :length]))
            length -= min(length, rows.shape[1])

    def extend(self, name: str, rows: Tensor) -> None:
        """Keep more tokens. Token ids are joined to those before; embeddings, which are large, are left as they are."""
        if self.inputs and self.inputs[-1][0] == name == "input_ids":
            rows = torch.cat((self.inputs.pop()[1], rows), dim=1)
        self.inputs.append((name, rows))


def contents_of(cache: Any) -> CacheContents | None:
    """What is known of a cache, or None where no patched model filled it."""
    contents: CacheContents | None = vars(cache).get(_CONTENTS)
    return contents


def leave_contents(cache: Cache, contents: CacheContents) -> None:
    """Keep on a cache what it holds, in place of what was kept there."""
    vars(cache)[_CONTENTS] = contents
    exchange_class(cache, _KeepsContents)


def length_of(cache: Any) -> int:
    """Tokens in each row of a cache; caches of fixed size hold it as a tensor that goes on counting."""
    return int(cache.get_seq_length())


def check_owner(cache: Any, owner: CacheOwner) -> CacheContents | None:
    """What is known of a cache that holds something, if this patch filled it; None where nothing is known.

    Raises:
        ConfigError: another patch filled the cache, or something else has changed it since.
    """
    contents = contents_of(cache)
    if contents is None:
        return None
    name = type(cache).__name__
    if contents.owner.key != owner.key:
        raise ConfigError(
            f"past_key_values: this {name} was filled under another patch ({contents.owner.label}), the model computes "
            f"with {owner.label} now; start from an empty cache"
        )
    if contents.length != (length := length_of(cache)):
        raise ConfigError(
            f"past_key_values: this {name} holds {length} tokens, {contents.length} when the model filled it; "
            "start from an empty cache"
        )
    return contents


def require_contents(cache: Any, contents: CacheContents | None, why: str = "") -> None:
    """Refuse a cache that holds something and of which nothing is known, for a model that needs keys before rotation.

    Raises:
        ConfigError: with `why` at its end, a clause about rotated keys.
    """
    if contents is None:
        raise ConfigError(
            f"past_key_values: this {type(cache).__name__} was not filled by the model as it is patched, and holds "
            f"keys that were rotated already{why}; start from an empty cache"
        )


def check_device(cache: Any, device: torch.device) -> None:
    """Refuse a cache that cannot work where the model is.

    Raises:
        ConfigError: it keeps its layers on the CPU between uses, which transformers can do with CUDA alone.
    """
    if getattr(cache, "offloading", False) and device.type != "cuda":
        raise ConfigError(
            f"past_key_values: this {type(cache).__name__} offloads its layers from a CUDA device to the CPU, the "
            f"model computes on {device.type}; use one without offloading"
        )


class _KeepsContents:
    """What a cache's class is given in front, so that what is known of it stays right."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if (contents := contents_of(self)) is not None:
            contents.reorder(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if (contents := contents_of(self)) is not None:
            contents.cut(min(contents.length, length_of(self)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if (contents := contents_of(self)) is not None:
            contents.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if (contents := contents_of(self)) is not None:
            contents.reorder(torch.as_tensor(indices))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        vars(self).pop(_CONTENTS, None)
