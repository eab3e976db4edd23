"""Hooks before and after each forward pass of a patched base model; they keep track of positions and caches.

Positions: padding does not count, so a row's length is that of its text. Caches: the model reads those that it filled
itself, under the present scaling. Where keys are rotated by a scale that grows with the text, they are either cached
before rotation (`deferred_rotation`), or, with `dynamic_step`, cached as usual and computed anew by a prefill when a
row outgrows the scale that they were rotated with.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from scaled_rope.errors import ConfigError
from scaled_rope.patching import forward_pass
from scaled_rope.patching.base_model import has_values
from scaled_rope.patching.cache_argument import cache_name, empty, given_cache, returned_cache, unknown_cache
from scaled_rope.patching.cache_owners import (
    NO_SHIFT,
    CacheContents,
    CacheOwner,
    check_device,
    check_owner,
    leave_contents,
    length_of,
    require_contents,
)
from scaled_rope.patching.deferred_rotation import begin_deferred, check_rotated_late, offset_of
from scaled_rope.patching.forward_pass import ForwardPass, lengths, row_lengths
from scaled_rope.patching.rebind import bound_elsewhere
from scaled_rope.progress import Progress
from scaled_rope.scaling.frequencies import compute_scale
from scaled_rope.scaling.record import RopeScaling

PIECE = 1024
"""Tokens per pass when a cache is computed anew."""
_PATIENCE = 2.0
"""Seconds after which computing a cache anew shows a progress bar."""


@dataclass
class Passes:
    """The hooks around a base model's forward. Copied with the model, so it holds no module."""

    owner: CacheOwner
    scaling: RopeScaling
    length_dependent: bool
    """Whether some layer's frequencies change with the length."""
    deferrable: bool = False
    """Whether attention can rotate cached keys."""
    obstacle: str = ""
    """Why attention cannot rotate cached keys; "" when it can or need not."""
    unrotated: bool = False
    """Whether attention gets unrotated keys in every pass and rotates them itself, as in methods that change it."""
    positional: bool = False
    """Whether the temperature of some layer's attention depends on positions."""
    dropped: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    """The indices of the layers whose attention can rotate cached keys."""
    rotating: tuple[int, ...] | None = None
    """The indices of the layers that rotate; None where it is not known."""
    rotary_path: str = field(default="rotary_emb", repr=False)

    def hook(self, base: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on a base model, and return their handles."""
        before = base.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, base.register_forward_hook(self.after, with_kwargs=True, always_call=True)]

    @property
    def stepped(self) -> bool:
        return self.scaling.dynamic_step is not None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook.

        Raises:
            ConfigError: a cache that this pass cannot read; a replica of nn.DataParallel whose attention would compute
                with the weights of the original.
        """
        if getattr(module, "_is_replica", False) and (attention := bound_elsewhere(module)) is not None:
            raise ConfigError(
                f"nn.DataParallel cannot run this patched model, because {type(attention).__name__} has a forward of "
                "its own, as accelerate's hooks give it one; start one process per GPU (torchrun)"
            )
        return None if self._skipped() else self._begin(module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook, called after a pass that failed as well.

        Raises:
            ConfigError: keys were to be rotated when they are read, and were not.
        """
        if not self._skipped():
            self._end(output)

    def _skipped(self) -> bool:
        """Whether the hooks do nothing: in a compiled pass, unless frequencies or temperatures depend on positions, or
        attention is to learn from a mask which part of a cache of fixed size has been written.

        They would only check caches there, and tracing them would break the graph in two.
        """
        return torch.compiler.is_compiling() and not (self.length_dependent or self.positional or self.unrotated)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        name = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
        if given.get(name) is None:
            return None
        cache = given_cache(given)
        if (self.length_dependent or self.unrotated) and (unknown := unknown_cache(given)) is not None:
            raise ConfigError(
                f"cache: {self.owner.label} cannot be used with a {type(unknown).__name__}, as in continuous batching "
                "(generate_batch), which mixes the tokens of several texts in a row; use generate, or a static scaling"
            )
        check_device(cache, given[name].device)
        start = 0 if cache is None else length_of(cache)
        contents = check_owner(cache, self.owner) if start else None
        deferred = self.deferrable and (cache is not None or _wants_cache(module, given))
        if start and self.length_dependent and not self.stepped:
            self._check_readable(module, cache, contents)
        if start and self.unrotated:
            require_contents(cache, contents)
        current = ForwardPass(hooks=self, cache=cache, contents=contents, inputs=(name, given[name]))
        if self.unrotated:  # distances are counted in tokens here
            before = contents.shift if start and contents is not None else None
            current.shift = _shift(given, given[name], start, cache, before)
        if self.positional and not self.length_dependent:
            current.positions, changed = _positions(given, given[name], start)
            forward_pass.begin(current)
            # Layers that run again in a backward pass know the positions that they were given, and no others.
            return _arguments(given, position_ids=current.positions) if changed else None
        if not self.length_dependent:
            forward_pass.begin(current)
            if not self.unrotated or cache is None or given.get("attention_mask") is not None:
                return None
            # Attention of this kind learns from the mask which part of a cache of fixed size has been written.
            rows, count = given[name].shape[:2]
            mask = torch.ones(rows, start + count, dtype=torch.long, device=given[name].device)
            return _arguments(given, attention_mask=mask)

        current.positions, changed = _positions(given, given[name], start)
        if deferred:
            rotary: Any = module.get_submodule(self.rotary_path)
            current.deferred = begin_deferred(
                module, rotary, current.positions, cache, contents, self.dropped, self.layers
            )
        elif self.stepped and start:
            self._keep_up(module, current, start)
        forward_pass.begin(current)
        if not (changed or deferred or self.stepped or start > 0):
            return None
        return _arguments(given, position_ids=current.positions)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, output: Any) -> None:
        current = forward_pass.end(self)
        if current is None:
            return
        if current.deferred is not None and output is not None:
            check_rotated_late(current.deferred, self.rotating)
        cache = current.cache if current.cache is not None else returned_cache(output)
        if output is None or not isinstance(cache, Cache):
            return
        assert current.inputs is not None
        contents = current.contents
        if contents is None:
            if current.cache is not None and length_of(cache) != current.inputs[1].shape[1]:
                return  # the cache already held tokens without a note
            contents = CacheContents(self.owner, 0)
        start, contents.length = contents.length, length_of(cache)
        if contents.length == 0:
            return
        if current.deferred is not None:
            contents.offset = current.deferred.offset
        elif current.positions is not None:
            contents.offset = offset_of(current.positions, start)
        contents.shift = current.shift
        if self.stepped:
            assert current.positions is not None
            contents.scale = self._scale(current.positions)
            contents.extend(*current.inputs)
        leave_contents(cache, contents)

    def _check_readable(self, module: nn.Module, cache: Any, contents: CacheContents | None) -> None:
        if not self.deferrable:
            config: Any = module.config
            raise ConfigError(
                f"cache: {self.owner.label} cannot read cached keys of this {config.model_type} model, "
                f"{self.obstacle}; pass use_cache=False"
            )
        require_contents(cache, contents, f", which {self.owner.label} cannot read")

    # ------------------------------------------------------------------------------------------------------ by steps

    def _scale(self, positions: Tensor) -> Tensor:
        return compute_scale(self.scaling, row_lengths(positions))

    def _keep_up(self, module: nn.Module, current: ForwardPass, start: int) -> None:
        """Compute the cache anew if any of its rows was rotated at another scale than this pass has."""
        positions, contents = current.positions, current.contents
        assert positions is not None
        wanted = self._scale(positions)
        had = self._scale(positions[:, :1] - 1) if contents is None else contents.scale
        if had is not None and bool((had.to(wanted.device) == wanted).all()):
            return
        name = type(current.cache).__name__
        if contents is None:
            raise ConfigError(
                f"cache: the text passes from scale {_span(had)} to {_span(wanted)}, where keys are rotated "
                f"anew, and the model did not fill this {name}; start from an empty cache"
            )
        if contents.offset is None:
            raise ConfigError(
                "position_ids: those behind this cache are not consecutive in every row, so it cannot be made anew at "
                f"scale {_span(wanted)}; pad on the left, and give one text per row"
            )
        current.contents = None  # stays None if the prefill fails
        self._prefill(module, current.cache, contents, row_lengths(positions), _span(wanted))
        contents.scale = wanted
        current.contents = contents

    def _prefill(self, module: nn.Module, cache: Any, contents: CacheContents, seq_len: Tensor, scale: str) -> None:
        """Fill a cache again with the tokens that it held, at the scale of rows of the given lengths."""
        assert contents.offset is not None
        forward: Any = module.forward
        empty(cache)
        places = contents.offset[:, None] + torch.arange(contents.length, device=contents.offset.device)
        rows = contents.inputs[0][1].shape[0]
        mask = (places >= 0).long().expand(rows, -1)
        with (
            lengths(seq_len) as state,
            Progress(
                total=contents.length, desc=f"keys again, scale {scale}", unit="token", leave=False, delay=_PATIENCE
            ) as bar,
        ):
            start = 0
            for name, tokens in contents.inputs:
                for piece in torch.split(tokens, PIECE, dim=1):
                    end = start + piece.shape[1]
                    state.positions, state.temperatures = places[:, start:end].clamp(min=0), {}
                    forward(
                        **{name: piece},
                        attention_mask=mask[:, :end],
                        position_ids=state.positions,
                        use_cache=True,
                        **{cache_name(module): cache},
                    )
                    bar.update(end - start)
                    start = end


def _span(scale: Tensor | None) -> str:
    """The distinct scales of rows, as text."""
    values = sorted({float(value) for value in ([] if scale is None else scale.flatten())})
    return " and ".join(f"{value:g}" for value in values) or "?"


def _arguments(given: dict[str, Any], **changed: Any) -> tuple[tuple[()], dict[str, Any]]:
    """The return value of a pre-hook: the arguments of forward() by name, some of them changed."""
    more = given.pop("kwargs", {})  # what forward() takes as **kwargs
    return (), {**given, **more, **changed}


def _wants_cache(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether a pass that is given no cache will make one."""
    config: Any = module.config
    wanted = given.get("use_cache", given.get("kwargs", {}).get("use_cache"))
    wanted = getattr(config, "use_cache", False) if wanted is None else wanted
    # Under activation checkpointing transformers makes no cache, and the second forward must repeat the first.
    current, former = "is_activation_checkpointing", "is_gradient_checkpointing"  # renamed in transformers 5.23
    recomputed = module.training and getattr(module, current if hasattr(module, current) else former, False)
    return bool(wanted) and not recomputed


def _shift(given: dict[str, Any], tokens: Tensor, start: int, cache: Any, before: Tensor | None) -> Tensor | None:
    """Check the positions of a pass whose attention counts distances in tokens; return `CacheContents.shift`.

    Without a mask and a cache positions that do not rise by one begin a new text, which attention sees to. A single
    token on a GPU is not looked at, since the GPU would have to be waited for in each step of decoding.

    Args:
        before: that of the tokens in the cache.

    Raises:
        ConfigError: positions with gaps, or along axes that differ.
    """
    if not isinstance(given.get("position_ids"), Tensor):
        return before
    positions, _ = _positions(given, tokens, start)
    mask, count = given.get("attention_mask"), tokens.shape[1]
    unseen = not has_values(positions) or (count == 1 and positions.device.type != "cpu")
    if unseen or (mask is None and cache is None):
        return before
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= start + count:
        here = mask[:, start : start + count].long()
        counted, real = mask[:, :start].sum(dim=1, keepdim=True) + here.cumsum(dim=1) - 1, here != 0
    else:
        counted = torch.arange(start, start + count, device=positions.device)[None]
        real = torch.ones_like(counted, dtype=torch.bool)
    shifts, real = torch.broadcast_tensors(positions - counted, real)  # type: ignore[no-untyped-call]
    some = real.any(dim=1)
    former = torch.full_like(some, NO_SHIFT, dtype=torch.long) if before is None else before.to(shifts.device)
    shift = torch.where(former != NO_SHIFT, former, shifts.gather(1, real.int().argmax(dim=1, keepdim=True))[:, 0])
    if not bool(((shifts == shift[:, None]) | ~real).all()):
        raise ConfigError(
            "position_ids: must rise by one from token to token, those in a cache included, because this method counts "
            "distances in tokens; leave position_ids out"
        )
    return torch.where(some | (former != NO_SHIFT), shift, NO_SHIFT)


def _positions(given: dict[str, Any], tokens: Tensor, start: int) -> tuple[Tensor, bool]:
    """Positions [B or 1, Q] of a pass, and whether the model by itself would use others.

    Raises:
        ConfigError: positions along axes that differ.
    """
    count = tokens.shape[1]
    positions: Tensor | None = given.get("position_ids")
    if positions is not None:
        if positions.dim() == 3 and bool((positions == positions[:1]).all()):
            positions = positions[0]  # all axes of a text are alike
        elif positions.dim() == 3:
            raise ConfigError(
                "position_ids: their axes differ, as those of images do, and so a row has no single length that a "
                "dynamic scaling or a temperature could follow, nor distances in tokens; use a static scaling"
            )
        if positions.dim() != 2:
            raise ConfigError(f"position_ids: must be [B, T], got {list(positions.shape)}")
        return positions, False
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= start + count:
        # Count real tokens only, as generate() does: padding must not make a row look longer than it is.
        positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        return positions[:, start : start + count], True
    return torch.arange(start, start + count, device=tokens.device)[None], False
