"""Notes on the key/value caches that a patched model filled: which patch filled them, and what they hold.

A cache of transformers holds keys but does not say how they were rotated, so the model keeps a note on it, a
`CacheContents`: which patch filled it, the positions of its tokens, and where needed the tokens. Copies and pickles of
the cache have the note too, and operations on the cache (beam search, cropping) update it: the cache's class is
exchanged for a subclass that does this.
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
from scaled_rope.patching.forward_pass import current_pass

_CONTENTS = "_scaled_rope_contents"
NO_SHIFT = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class CacheOwner:
    """Identifies the patch that fills caches: one `patch_model` call on one model, and copies of that model."""

    label: str
    """The name of the scaling, for messages."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class CacheContents:
    """A note on the contents of a cache. Tensors have one row for each row of the cache, or one for all."""

    owner: CacheOwner
    length: int
    """Number of tokens in every row, padding included."""
    offset: Tensor | None = None
    """[B or 1], int64: the position of token j of a row is its offset + j, negative for padding on the left. None:
    positions are not consecutive."""
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    """The tokens, where they are kept, in pieces [B, T, ...], each with the name of the argument that it came as."""
    scale: Tensor | None = None
    """[B or 1]: the scale that the keys were rotated with, where it can change."""
    shift: Tensor | None = None
    """[B or 1]: by how much positions exceed the number of tokens before them, where attention counts tokens itself;
    `NO_SHIFT` for rows of which no token came yet. None: no positions were given."""

    def _rows(self, change: Any) -> None:
        def of(rows: Tensor) -> Tensor:
            changed: Tensor = rows if rows.shape[0] == 1 else change(rows)
            return changed

        self.offset = None if self.offset is None else of(self.offset)
        self.scale = None if self.scale is None else of(self.scale)
        self.shift = None if self.shift is None else of(self.shift)
        self.inputs = [(name, change(rows)) for name, rows in self.inputs]

    def reorder(self, rows: Tensor) -> None:
        """Replace row i by the former row rows[i]."""
        self._rows(lambda table: table[rows.to(table.device)])

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, copies next to each other."""
        self._rows(lambda table: table.repeat_interleave(times, dim=0))

    def cut(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        self.length = length
        pieces, self.inputs = self.inputs, []
        for name, rows in pieces:
            self.inputs.append((name, rows[:, :length]))
            length -= min(length, rows.shape[1])

    def extend(self, name: str, rows: Tensor) -> None:
        """Add tokens. Ids are joined to earlier ids; embeddings, which are large, stay separate pieces."""
        if self.inputs and self.inputs[-1][0] == name == "input_ids":
            rows = torch.cat((self.inputs.pop()[1], rows), dim=1)
        self.inputs.append((name, rows))


def contents_of(cache: Any) -> CacheContents | None:
    """Return the note on a cache, or None if no patched model filled it."""
    contents: CacheContents | None = vars(cache).get(_CONTENTS)
    return contents


def leave_contents(cache: Cache, contents: CacheContents) -> None:
    """Put a note on a cache, in place of any earlier one."""
    vars(cache)[_CONTENTS] = contents
    exchange_class(cache, _KeepsContents)


def length_of(cache: Any) -> int:
    """The number of tokens in each row of a cache, as an int: caches of fixed size return a tensor that changes."""
    return int(cache.get_seq_length())


def check_owner(cache: Any, owner: CacheOwner) -> CacheContents | None:
    """Return the note on a cache that is not empty, once it is clear that this patch filled it; None without a note.

    Raises:
        ConfigError: another patch filled the cache, or something else has changed it since.
    """
    contents = contents_of(cache)
    if contents is None:
        return None
    name = type(cache).__name__
    if contents.owner.key != owner.key:
        raise ConfigError(
            f"cache: this {name} was filled under another patch ({contents.owner.label}), the model computes "
            f"with {owner.label} now; start from an empty cache"
        )
    if contents.length != (length := length_of(cache)):
        raise ConfigError(
            f"cache: this {name} holds {length} tokens, {contents.length} when the model filled it; "
            "start from an empty cache"
        )
    return contents


def require_contents(cache: Any, contents: CacheContents | None, why: str = "") -> None:
    """Raise an error for a cache without a note, on behalf of a model that needs keys before rotation.

    Args:
        cache: one that is not empty.
        contents: the note on it, or None.
        why: a clause about rotated keys, for the message.

    Raises:
        ConfigError: there is no note.
    """
    if contents is None:
        raise ConfigError(
            f"cache: this {type(cache).__name__} was not filled by the model as it is patched, and holds "
            f"keys that were rotated already{why}; start from an empty cache"
        )


def check_device(cache: Any, device: torch.device) -> None:
    """Raise an error for a cache that cannot work on the model's device.

    Raises:
        ConfigError: it keeps its layers on the CPU between uses, which transformers can do with CUDA alone.
    """
    if getattr(cache, "offloading", False) and device.type != "cuda":
        raise ConfigError(
            f"cache: this {type(cache).__name__} offloads its layers from a CUDA device to the CPU, the "
            f"model computes on {device.type}; use one without offloading"
        )


def _check_reader(cache: Any) -> None:
    """Raise an error if the model that adds to a cache is not, or no longer, the patched one that filled it.

    A patched model checks its caches before each pass. One that was unpatched since doesn't, and would take the keys
    for its own.
    """
    contents = contents_of(cache)
    if contents is None or contents.length == 0:
        return
    current = current_pass()
    owner = getattr(current.hooks, "owner", None) if current is not None else None
    if owner is None or owner.key != contents.owner.key:
        raise ConfigError(
            f"cache: this {type(cache).__name__} was filled under a patch ({contents.owner.label}) that the model "
            "which reads it does not have, or no longer; start from an empty cache"
        )


class _KeepsContents:
    """Methods that come before those of a cache's class, and keep the note on the cache up to date."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # the look at the running pass would break the graph
            _check_reader(self)
        return super().update(*args, **kwargs)  # type: ignore[misc]

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
