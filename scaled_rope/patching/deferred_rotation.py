"""Rotate after the cache: keys are cached as they are before rotation, and rotated when attention reads them.

The rotation of a key may change as the text grows: with every token under dynamic scaling (section 3.3 of the YaRN
paper), and with the query that reads it in methods that change attention itself. So in a pass that has a cache, the
call of `apply_rotary_pos_emb` in each attention module does nothing, and a cache of any class stores the unrotated
keys. Where the module asks transformers' attention interface for its backend, it gets a function of ours instead. This
receives unrotated queries and keys, knows their positions, rotates them and calls the backend.

Positions of keys are not stored. Tokens of a row have consecutive positions, so those of cached keys follow from the
row's offset, and caches say which stretch of a row they return (`get_mask_sizes`, on which transformers builds its
masks): all of it, the part in a window, or a buffer of fixed size of which the end is not yet written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from scaled_rope.attention.interface import AttentionCall, AttentionFunction, attention_function
from scaled_rope.errors import ConfigError
from scaled_rope.kernels import DecodeAngles, rotary_decode, rotate
from scaled_rope.patching.base_model import has_values
from scaled_rope.patching.cache_owners import CacheContents
from scaled_rope.patching.forward_pass import current_pass, row_lengths
from scaled_rope.patching.rebind import APPLY, INTERFACE, bound, callers, calls, rebind
from scaled_rope.patching.rotary import LayeredRotaryEmbedding, Layout, ScaledRotaryEmbedding
from scaled_rope.patching.rotary_kernel import pairings_of, rotated_last, rotations


def rotate_both(call: AttentionCall, layer: LayerRotation, backend: AttentionFunction) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer in one pass: rotate queries and all keys at the scale of the row's present length, then
    call the module's backend; or do both at once where a few queries read many keys.

    Args:
        call: queries, and all keys that the cache returns, none of them rotated.
        layer: positions of queries and keys, and the rotary module.
        backend: the module's own, by its config.

    Returns:
        [B, Q, H, D] and weights or None, as backends return them.
    """
    if (mask := _decodable(call, layer)) is not None:
        angles, scaling = layer.angles_of(layer), call.options.get("scaling")
        out = rotary_decode(
            call.query, call.key, call.value, angles, mask[0], scaling=scaling, interleaved=layer.interleaved
        )
        return out, None
    query = layer.rotate(call.query, layer.query_positions)
    key = layer.rotate(call.key, layer.key_positions)
    return replace(call, query=query, key=key).handed_to(backend)


FEW = 16
"""The most queries for which keys are rotated while they are read (`rotary_decode`)."""
_FUSED = ("sdpa", "sdpa_blocked", "blockwise", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Backends that compute plain attention, so that `rotary_decode` may take their place."""


def _decodable(call: AttentionCall, layer: LayerRotation) -> tuple[Tensor | None] | None:
    """Return the mask for `rotary_decode` in a tuple, or None if it cannot compute this call.

    The mask is [B or 1, 1, Q or 1, K], or None where a query sees all keys before it.
    """
    config: Any = getattr(call.module, "config", None)
    mask, count, keys = call.attention_mask, call.query.shape[2], call.key.shape[2]
    if (
        layer.first_key is None
        or layer.last
        or count > FEW
        or getattr(config, "_attn_implementation", None) not in _FUSED
    ):
        return None
    if torch.is_grad_enabled() and (call.query.requires_grad or call.key.requires_grad):
        return None
    if call.has("softcap", "s_aux", "position_bias") or call.dropout:
        return None
    if call.may_see_later_keys:
        return None
    # Some backends learn of the window from this option alone, and get no mask for it.
    if (window := call.options.get("sliding_window")) is not None and keys > window and not _is_whole(mask):
        return None
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == 0):
        return (None,) if keys == layer.length else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == keys and count == 1:
        return (mask.bool()[:, None, None],)
    return (mask,) if _is_whole(mask) and mask.shape[1] == 1 and mask.shape[3] == keys else None


def _is_whole(mask: Any) -> bool:
    """Whether a mask has entries for each query, [B or 1, 1, Q, K]."""
    return isinstance(mask, Tensor) and mask.dim() == 4


@dataclass(frozen=True)
class LayerRotation:
    """The positions of queries and keys in one layer of one pass, and the rotary module that rotates them."""

    query_positions: Tensor
    """[B, Q] or, where all rows have the same, [1, Q]."""
    key_positions: Tensor
    """[B, K] or [1, K]. Negative or arbitrary for padding on the left, which the mask hides, as it hides what comes
    after the last query in a buffer of fixed size."""
    seq_len: Tensor
    """[B] or [1]: l', the length of each row after this pass."""
    rotary: ScaledRotaryEmbedding
    interleaved: bool
    """Whether pairs are neighbouring dimensions instead of halves."""
    tables_of: Callable[[ScaledRotaryEmbedding, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(rotary, positions, seq_len) -> cos and sin, made once for all layers of a pass."""
    angles_of: Callable[[LayerRotation], DecodeAngles]
    """(this layer) -> the tables for `rotary_decode`, made once for all layers of a pass that share them."""
    first: int = 0
    """Index of the first key among the tokens of a row."""
    first_key: Tensor | None = None
    """[B] or [1]: the position of the first key, from which the others follow one by one; None in a first pass."""
    last: bool = False
    """Whether the rotated dimensions are the last of each head instead of the first."""
    length: int = 0
    """Number of keys up to the last token of a row, without the unwritten end of a buffer of fixed size."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, R/2], float32, at this pass's scale."""
        return self.tables_of(self.rotary, positions, self.seq_len)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate the first, or the last, R dimensions of heads [B, H, T, D] by positions [B or 1, T]."""
        cos, sin = self.tables(positions)
        wanted = torch.promote_types(x.dtype, torch.float32)
        unturned = x.shape[-1] - 2 * cos.shape[-1] if self.last else 0
        turned = rotate(x[..., unturned:], cos.to(wanted), sin.to(wanted), interleaved=self.interleaved)
        return torch.cat((x[..., :unturned], turned), dim=-1) if unturned else turned


@dataclass
class DeferredPass:
    """A forward pass of a base model in which keys are rotated when they are read."""

    positions: Tensor
    """[B or 1, Q]: the positions of its queries."""
    start: int
    """Number of tokens in the cache before the pass."""
    offset: Tensor | None
    """[B or 1], see `CacheContents.offset`; None: the positions are not consecutive."""
    rotary: ScaledRotaryEmbedding | LayeredRotaryEmbedding
    cache: Any
    """The cache that the pass was given, if any."""
    layer_types: list[str] | None
    dropped: tuple[int, ...]
    """Indices of layers that work without rotation."""
    seq_len: Tensor = field(init=False)
    """[B] or [1]: l', the length of each row after this pass."""
    pending: tuple[Tensor, Tensor, bool] | None = None
    """Queries and keys that the next call of attention has to rotate, and whether it has to pair neighbours."""
    late: set[int] = field(default_factory=set)
    """The indices of the layers in which attention has rotated them."""
    early: set[int] = field(default_factory=set)
    """The indices of the layers whose attention got no such queries and keys."""
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Layer -> the number of keys that the cache will return in this pass, and the index of the first among the tokens
    of a row. Asked before the pass, since each layer changes the answer."""
    _keys: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _angles: dict[tuple[int, int], DecodeAngles] = field(default_factory=dict)
    _elsewhere: dict[torch.device, DeferredPass] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seq_len = row_lengths(self.positions)

    def on(self, device: torch.device) -> DeferredPass:
        """The same pass for layers on another device of a split model, which make tables of their own there."""
        if device == self.positions.device:
            return self
        if device not in self._elsewhere:
            positions = self.positions.to(device)
            offset = None if self.offset is None else self.offset.to(device)
            self._elsewhere[device] = replace(
                self, positions=positions, offset=offset, pending=None, _keys={}, _tables={}, _angles={}, _elsewhere={}
            )
        return self._elsewhere[device]

    @property
    def tokens(self) -> int:
        return self.positions.shape[1]

    def key_positions(self, layer: int, count: int) -> Tensor:
        """Positions of the `count` keys that a layer's attention is given.

        Raises:
            ConfigError: the cache returned another number of keys than it had said.
        """
        said, first = self.sizes.get(layer, (self.tokens, 0))
        if count != said:
            raise ConfigError(
                f"cache: a cache of type {type(self.cache).__name__} hands out {count} keys where it says "
                f"{said}, so their positions are not known; use a DynamicCache or a StaticCache, or use_cache=False"
            )
        if (first, count) not in self._keys:
            self._keys[first, count] = self._key_positions(first, count)
        return self._keys[first, count]

    def _key_positions(self, first: int, count: int) -> Tensor:
        if self.start == 0 and first == 0:
            # The keys of this pass, then those of the unwritten end of a buffer of fixed size, which the mask hides.
            more = torch.arange(1, count - self.tokens + 1, device=self.positions.device)
            return torch.cat((self.positions, self.positions[:, -1:] + more), dim=1) if len(more) else self.positions
        assert self.offset is not None  # checked when the pass began
        return self.offset[:, None] + torch.arange(first, first + count, device=self.offset.device)

    def rotary_of(self, module: nn.Module) -> ScaledRotaryEmbedding:
        """The rotary module for the layer of an attention module."""
        if isinstance(self.rotary, ScaledRotaryEmbedding):
            return self.rotary
        assert self.layer_types is not None
        rotary = self.rotary.by_type[self.layer_types[_index(module)]]
        assert isinstance(rotary, ScaledRotaryEmbedding)
        return rotary

    def angles(self, layer: LayerRotation) -> DecodeAngles:
        """The tables for `rotary_decode`, made once for layers that share them."""
        assert layer.first_key is not None
        key = (id(layer.rotary), layer.first)
        if key not in self._angles:
            inv_freq, factor = layer.rotary.frequencies(layer.seq_len)
            self._angles[key] = DecodeAngles(inv_freq, layer.query_positions, layer.first_key, factor)
        return self._angles[key]

    def tables(self, rotary: ScaledRotaryEmbedding, positions: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions in rows of given lengths; made once for positions that layers share."""
        known = any(positions is one for one in (self.positions, *self._keys.values())) and seq_len is self.seq_len
        if not known:
            return rotary.tables(positions, seq_len)
        key = (id(rotary), id(positions))
        if key not in self._tables:
            self._tables[key] = rotary.tables(positions, seq_len)
        return self._tables[key]


def _current() -> DeferredPass | None:
    current = current_pass()
    return None if current is None else current.deferred


def begin_deferred(
    base: nn.Module,
    rotary: ScaledRotaryEmbedding | LayeredRotaryEmbedding,
    position_ids: Tensor,
    cache: Any,
    contents: CacheContents | None,
    dropped: tuple[int, ...],
    layers: tuple[int, ...],
) -> DeferredPass:
    """Return the state for a pass of a base model that is about to run.

    Args:
        position_ids: [B or 1, Q].
        contents: the note on a cache that is not empty.
        layers: the indices of the layers that rotate when they read; recurrent ones have no keys.

    Raises:
        ConfigError: positions that do not continue those in the cache; a cache that cannot say which keys it returns.
    """
    config: Any = base.config
    start = contents.length if contents is not None else 0
    if start and contents is not None and contents.offset is None:
        raise ConfigError(
            "position_ids: those behind this cache are not consecutive in every row; pad on the left, and give one "
            "text per row"
        )
    offset, consecutive = _offset(position_ids, start)
    if contents is not None and start:
        assert contents.offset is not None
        before = contents.offset.to(offset.device)
        if not consecutive or not bool(((before == offset) | (start + offset <= 0)).all()):
            raise ConfigError(
                f"position_ids: must go on from the {start} tokens in the cache without a gap; give the whole "
                "attention_mask, or the positions of the new tokens"
            )
    if len(position_ids) > 1 and _equal_rows(position_ids) and _equal_rows(offset):
        position_ids, offset = position_ids[:1], offset[:1]
    layer_types = getattr(config, "layer_types", None)
    current = DeferredPass(position_ids, start, offset if consecutive else None, rotary, cache, layer_types, dropped)
    if cache is not None:
        if not hasattr(cache, "get_mask_sizes"):
            raise ConfigError(
                f"cache: a cache of type {type(cache).__name__} does not say which keys it hands out; use a "
                "DynamicCache or a StaticCache, or use_cache=False"
            )
        count = position_ids.shape[1]
        for layer in layers:
            length, first = cache.get_mask_sizes(count, layer)
            current.sizes[layer] = int(length), int(first)
    return current


def offset_of(position_ids: Tensor, start: int) -> Tensor | None:
    """Offsets [B or 1] of rows whose tokens from `start` on have these positions; None if they are not consecutive."""
    offset, consecutive = _offset(position_ids, start)
    return offset if consecutive else None


def _offset(position_ids: Tensor, start: int) -> tuple[Tensor, bool]:
    """Offsets [B or 1] by each row's last token, and whether all other tokens agree or are padding on the left."""
    end = start + position_ids.shape[1]
    offset = position_ids[:, -1] - (end - 1)
    if position_ids.shape[1] == 1:
        return offset, True
    wanted = offset[:, None] + torch.arange(start, end, device=offset.device)
    return offset, bool(((wanted == position_ids) | (wanted < 0)).all())


def _equal_rows(rows: Tensor) -> bool:
    return bool((rows == rows[:1]).all())


# ------------------------------------------------------------------------------------------------- in attention modules


def defer_rotation(base: nn.Module, layout: Layout, half: int) -> tuple[list[nn.Module], str]:
    """Prepare attention modules of a base model for passes that rotate keys when they are read; others run as before.

    Args:
        layout, half: as in `scaled_rope.patching.rotary_kernel.fused_rotation`.

    Returns:
        The modules and "", or an empty list and the reason, in a few words, why the family's attention cannot do it.
    """
    pairings, reason = pairings_of(base, layout, half)
    if reason:
        return [], reason
    modules = callers(base, APPLY)
    for module in modules:
        name = type(module).__name__
        if not calls(module, INTERFACE):
            return [], f"{name} does not use transformers' attention interface"
        if not hasattr(module, "layer_idx"):
            return [], f"{name} does not know its layer"
    for module in modules:
        for name in rotations(module):
            rebind(module, name, _deferring(bound(module, name), pairings[name]))
        rebind(module, INTERFACE, _Interface(bound(module, INTERFACE), _index(module)))
    return modules, ""


def rotate_before_cache(modules: list[nn.Module]) -> None:
    """Undo `defer_rotation`, and any other binding of the functions that rotate."""
    for module in modules:
        for name in rotations(module):
            rebind(module, name, None)
        rebind(module, INTERFACE, None)


def _deferring(now: Callable[..., tuple[Tensor, Tensor]], interleaved: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, *tables: Any, **options: Any) -> tuple[Tensor, Tensor]:
        current = _current()
        if current is None:
            return now(q, k, *tables, **options)
        current.pending = q, k, interleaved
        return q, k

    return apply_rotary_pos_emb


class _Interface:
    """Stands in for transformers' registry of attention backends in one attention module."""

    def __init__(self, functions: Any, layer: int) -> None:
        self.functions = functions
        self.layer = layer

    def get_interface(self, name: str, default: AttentionFunction) -> AttentionFunction:
        """Return the backend of that name or, if queries and keys wait for rotation, a function that rotates first."""
        backend: AttentionFunction = self.functions.get_interface(name, default)
        current = _current()
        if current is None:
            return backend
        if current.pending is None:
            current.early.add(self.layer)
            return backend

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @attention_function
        def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            return _attend(call, backend)

        function: AttentionFunction = attend
        return function


def _attend(call: AttentionCall, backend: AttentionFunction) -> tuple[Tensor, Tensor | None]:
    current = _current()
    assert current is not None
    if current.pending is None:
        raise ConfigError(
            f"cache: {type(call.module).__name__} attends several times to keys that it rotated once, so they cannot "
            "be cached before rotation; pass use_cache=False"
        )
    (q, k, interleaved), current.pending = current.pending, None
    current = current.on(call.query.device)
    index, last = _index(call.module), rotated_last(call.module)
    current.late.add(index)
    if index in current.dropped:
        return call.handed_to(backend)
    key_positions = current.key_positions(index, call.key.shape[2])
    if current.start == 0:
        _check_untouched(call.module, q, call.query, last)
        _check_untouched(call.module, k, call.key[:, :, : k.shape[2]], last)
    first = current.sizes[index][1] if index in current.sizes else 0
    layer = LayerRotation(
        current.positions,
        key_positions,
        current.seq_len,
        current.rotary_of(call.module),
        interleaved,
        current.tables,
        current.angles,
        first=first,
        first_key=current.offset + first if current.start and current.offset is not None else None,
        last=last,
        length=current.start + current.tokens - first,
    )
    return rotate_both(call, layer, backend)


_ALIKE = 0.998
"""Least cosine between a head before rotation and as attention gets it. 8-bit floats lower it from 1 by under 0.001."""


def check_rotated_late(current: DeferredPass, rotating: tuple[int, ...] | None) -> None:
    """Raise a ConfigError if a layer has rotated its keys before they were cached, in a way that is not known here: the
    cache holds them at the scale of this pass, and they cannot follow it.

    rotating: the indices of the layers that rotate; None: of this family it is not known, some layers may not.
    """
    early = current.early if rotating is None else current.early.intersection(rotating)
    if early and (rotating is not None or not current.late):
        raise ConfigError(
            f"cache: layer {min(early)} rotates its keys before they are cached, in a way that is not known, so they "
            "cannot follow a scale that grows with the text; pass use_cache=False"
        )


def _check_untouched(module: nn.Module, handed: Tensor, arrived: Tensor, last: bool) -> None:
    """Raise a ConfigError if a module changes heads between rotation and attention; see `is_untouched`.

    Rotating after such a change would give other results. Only the first pass of each cache is looked at, which costs
    next to nothing.
    """
    if not is_untouched(handed, arrived, last):
        raise ConfigError(
            f"cache: {type(module).__name__} changes queries or keys between rotation and attention, so they "
            "cannot be cached before rotation; pass use_cache=False"
        )


def is_untouched(handed: Tensor, arrived: Tensor, last: bool = False) -> bool:
    """Whether attention gets heads [B, H, T, D] as they were handed to the rotation but for a factor per token, by the
    last token of the first row; true for tensors without numbers.

    A factor is fine unless it comes from a normalisation, which takes an attention factor out again.

    Args:
        last: whether what was rotated comes last in each head. Heads may have been repeated in between, since repeated
            heads are rotated alike.
    """
    if not has_values(arrived):
        return True
    width, times = handed.shape[-1], max(1, arrived.shape[1] // handed.shape[1])
    arrived = arrived[..., -width:] if last else arrived[..., :width]
    one, other = (x[:1, :, -1:].detach().float() for x in (handed, arrived))
    repeated = [one.repeat(1, times, 1, 1), one.repeat_interleave(times, dim=1)] if times > 1 else [one]
    return any(_differ_by_a_factor(each, other) for each in repeated)


def _differ_by_a_factor(one: Tensor, other: Tensor) -> bool:
    """Whether heads [1, H, 1, D] are the same but for one factor."""
    if one.shape != other.shape:
        return False
    lengths, other_lengths = one.norm(dim=-1).flatten(), other.norm(dim=-1).flatten()
    turned = (one * other).sum(-1).flatten() < _ALIKE * lengths * other_lengths
    factors = other_lengths / lengths.clamp(min=1e-30)
    # A temperature multiplies all heads alike; a normalisation those that are shorter by more.
    uneven = (factors - factors.mean()).abs().max() > (1 - _ALIKE) * 10 * factors.mean()
    return not (bool(turned.any()) or bool(uneven))


def _index(module: nn.Module) -> int:
    index: Any = module.layer_idx
    return int(index)
