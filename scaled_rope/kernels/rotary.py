"""The rotary embedding of queries and keys in one pass: the function, its library operator and the torch twin.

Shapes: B rows, T tokens, H query heads, K key heads, D = head_dim, R <= D rotated dimensions (the first ones).
A pair (a, b) of dimensions at angle t becomes (a·cos t - b·sin t, b·cos t + a·sin t). Pairs are (i, i + R/2), or
(2i, 2i + 1) with `interleaved`. Arithmetic is float32, or float64 for float64 inputs, whatever the inputs' dtype.

The gradient is the same operator with `inverse`: a rotation by -t is the transpose, and a factor that is part of cos
and sin is then applied to the gradient once, as it was to the input. Nothing but the tables is kept for it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from scaled_rope.errors import ConfigError, unknown

_LOG = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton")
VARIABLE = "SCALED_ROPE_KERNEL"
"""Environment variable that forces a backend wherever "auto" is asked for. "none": models keep their own function."""

TURN = 2.0**64
"""Phases are 64-bit fractions of a turn, so that integer overflow reduces an angle modulo 2π exactly."""


# ------------------------------------------------------------------------------------------------------- the backend


def kernel_backend(device: torch.device | str | None = None, backend: str = "auto") -> str:
    """Return the implementation that runs on a device: "torch" or "triton".

    Args:
        device: None: the first GPU when there is one, else the CPU.
        backend: "torch" or "triton" to insist; "auto": the one that `SCALED_ROPE_KERNEL` names, or else triton on a
            GPU where it runs (see `triton_lacks`), or else torch.

    Raises:
        ConfigError: unknown name, or triton where it cannot run (it runs on a GPU, and on the CPU with
            TRITON_INTERPRET=1, slowly).
    """
    source = f"kernel backend {backend!r}"
    if backend == "auto" and (forced := os.environ.get(VARIABLE) or "none") != "none":
        backend, source = forced, f"{VARIABLE}={forced}"
    if backend not in BACKENDS and source.startswith(VARIABLE):  # which may also say none
        raise ConfigError(f"{source}: {unknown('kernel backend', backend, (*BACKENDS, 'none'))}")
    if backend not in BACKENDS:
        raise unknown("kernel backend", backend, BACKENDS)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device).type
    if backend == "auto":
        backend = "triton" if kind == "cuda" and not triton_lacks(device) else "torch"
    elif backend == "triton":
        if not _triton_is_installed():
            raise ConfigError(f"{source} needs: pip install 'scaled-rope[kernels]'")
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(f"{source} needs a GPU, not {kind!r} (or TRITON_INTERPRET=1, which is slow)")
    _log_once(backend, kind)
    return backend


_LACKS: dict[torch.device, str] = {}
"""The answers of `triton_lacks`, by GPU."""


def triton_lacks(device: torch.device | str | None = None) -> str:
    """Why Triton runs no kernel on a GPU, in one line; "" where it runs, or where that is not known yet.

    That it is installed says little: torch for CUDA always brings it, and at its first use it compiles code for the
    driver, with a C compiler and Python's headers that many images of containers have not. So where it is not asked for
    by name, a kernel of one number is run first, once for each GPU, and a warning says what went wrong. A process that
    has not used a GPU yet does not begin to here, since it could not be forked any more.

    Args:
        device: a GPU; None: the current one.
    """
    if isinstance(device, torch.device) and (known := _LACKS.get(device)) is not None:
        return known
    if not _triton_is_installed():
        return "triton is not installed"
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    if torch.cuda.is_current_stream_capturing():  # the graph would hold the kernel
        return ""
    device = torch.device("cuda" if device is None else device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _LACKS:
        _LACKS[device] = _try_triton(device)
    return _LACKS[device]


def _try_triton(device: torch.device) -> str:
    try:
        with _disable_current_modes():  # a caller may be tracing a pass, with tensors that hold no numbers
            from scaled_rope.kernels.rotary_triton import try_out

            try_out(device)
    except Exception as error:  # of a driver, a compiler, the loader of libraries
        reason = f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
        _LOG.warning("triton is installed but runs no kernel on %s, so others take its place: %s", device, reason)
        return reason
    return ""


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _log_once(backend: str, kind: str) -> None:
    _LOG.info("rotary kernel on %s: %s", kind, backend)


# ------------------------------------------------------------------------------------------------------- the functions


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int = 0,
    heads_first: bool = True,
    interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by tables.

    Args:
        q, k: [B, H, T, D] and [B, K, T, D]; [B, T, H, D] with heads_first=False; [T, H, D], the tokens of several
            documents one after the other, in either case. Any strides, any floating dtype.
        cos, sin: half-width tables, float32 (float64 for float64 inputs), the attention factor multiplied in. Either
            [N, R/2] by position, or [B, T, R/2] ([1, T, R/2] for all rows) token by token.
        position_ids: [B, T], [1, T] or [T], integers in any order, for tables by position. A position outside the
            table gives NaN: checking it would wait for the GPU.
        offset: without position_ids, token t has position offset + t.
        interleaved: pair neighbours instead of halves.
        inverse: rotate by the negative angles.
        inplace: overwrite q and k. With gradients, q and k take a launch each.
        backend: see `kernel_backend`.

    Returns:
        Rotated q and k, in their dtypes and memory orders.

    Raises:
        ConfigError: shapes or dtypes that do not fit together, tables that want a gradient.
    """
    return _apply(q, k, cos, sin, None, position_ids, offset, 1.0, heads_first, interleaved, inverse, inplace, backend)


def apply_rotary_from_frequencies(
    q: Tensor,
    k: Tensor,
    phases: Tensor,
    position_ids: Tensor | None = None,
    *,
    attention_factor: float = 1.0,
    offset: int = 0,
    heads_first: bool = True,
    interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys without tables: angles are made where they are used.

    phases: [R/2], from `frequency_phases`. Angles are exact to 1e-7 of a radian at any position, where float32 products
    of position and frequency are off by 0.03 at a million. Everything else is as in `apply_rotary`.
    """
    flags = (heads_first, interleaved, inverse, inplace, backend)
    return _apply(q, k, None, None, phases, position_ids, offset, attention_factor, *flags)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, **options: Any) -> Tensor:
    """`apply_rotary` for one tensor, for example when there are more cached keys than queries; the same options."""
    heads = 1 if x.dim() == 3 or options.get("heads_first", True) else 2
    return apply_rotary(x, x.narrow(heads, 0, 0), cos, sin, position_ids, **options)[0]


def frequency_phases(inv_freq: Tensor) -> Tensor:
    """Frequencies [R/2] in radians per position as int64 fractions of a turn, in units of 2^-64."""
    turns = inv_freq.double() / (2 * math.pi)
    # Without whole turns, -1/2 to 1/2 is left, which a signed 64-bit number holds.
    return ((turns - torch.floor(turns + 0.5)) * TURN).round().long()


def packed_position_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Positions [1, tokens] that start from 0 in every document.

    cu_seqlens: [documents + 1], the first token of each document, then `tokens`. Does not wait for the GPU.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
    return (index - cu_seqlens.long()[document])[None]


def _apply(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    phases: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    attention_factor: float,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if packed := q.dim() == 3:
        heads_first = False
        q, k = q[None], k[None]
    if position_ids is not None and position_ids.dim() == 1:
        position_ids = position_ids[None]
    given = (q, k, cos, sin, phases, position_ids)
    direct = _is_direct(*given)
    if direct:
        _check_known(
            *(None if x is None else (x.shape, x.dtype, x.device, x.requires_grad) for x in given), heads_first
        )
    else:
        _check(*given, heads_first)
    if offset or (cos is not None and position_ids is None and cos.dim() == 2):
        _check_offset(q, cos, position_ids, offset, heads_first)
    cos, sin, phases = (None if table is None else table.contiguous() for table in (cos, sin, phases))
    # A float: Triton would compile the integer 1 into the kernel, which then serves other factors too.
    factor = float(attention_factor)
    more = (cos, sin, phases, position_ids, offset, factor, heads_first, interleaved, inverse, backend)
    wants_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if direct and not wants_gradients:
        if inplace:
            _rotary_(q, k, *more)
        else:
            q, k = _rotary(q, k, *more)
    elif not inplace:
        q, k = torch.ops.scaled_rope.rotary(q, k, *more)
    elif wants_gradients:
        # One tensor at a time: autograd lets a function change one view only.
        q, k = _InPlace.apply(q, heads_first, more), _InPlace.apply(k, heads_first, more)  # type: ignore[no-untyped-call]
    else:
        torch.ops.scaled_rope.rotary_(q, k, *more)
    return (q[0], k[0]) if packed else (q, k)


def _is_direct(*tensors: Tensor | None) -> bool:
    """Whether nobody looks on: no compiler, no mode and no transform of torch, and plain tensors alone.

    Then the operator's function is called itself, which saves the dispatcher's time, about half of a short call.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_function_stack():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


class _Described:
    """Stands in for a tensor of which only the description is known."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> None:
        self.shape, self.dtype, self.device, self.requires_grad = shape, dtype, device, requires_grad

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@functools.lru_cache(maxsize=4096)
def _check_known(*described: Any) -> None:
    """`_check` by descriptions of the tensors, once for each: the same call comes for every token and layer."""
    tensors = (None if one is None else _Described(*one) for one in described[:-1])
    _check(*cast(Any, (*tensors, described[-1])))


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    phases: Tensor | None,
    position_ids: Tensor | None,
    heads_first: bool,
) -> None:
    """Raise a ConfigError for what does not fit together, but for an offset, which changes from call to call."""
    if q.dim() != 4 or k.dim() != 4:
        raise ConfigError(f"q, k: must have 3 or 4 dimensions, got {q.dim()} and {k.dim()}")
    batch, tokens = q.shape[0], q.shape[2 if heads_first else 1]
    if (batch, tokens, q.shape[3]) != (k.shape[0], k.shape[2 if heads_first else 1], k.shape[3]):
        raise ConfigError(f"k of shape {list(k.shape)}: must equal q's {list(q.shape)} in all but heads")
    if not q.is_floating_point() or q.dtype != k.dtype or q.device != k.device:
        raise ConfigError(f"k: {k.dtype} on {k.device}, must be of q's dtype, {q.dtype} on {q.device}")
    if phases is not None:
        if phases.dim() != 1 or phases.dtype != torch.int64:
            raise ConfigError(f"phases: must be int64 [R/2], got {phases.dtype} {list(phases.shape)}")
        width = phases.shape[0]
    else:
        assert cos is not None and sin is not None
        wanted = torch.promote_types(q.dtype, torch.float32)
        if cos.dtype != wanted or sin.dtype != wanted:
            raise ConfigError(f"cos, sin: must be {wanted} for {q.dtype} inputs, got {cos.dtype} and {sin.dtype}")
        if cos.shape != sin.shape or cos.dim() not in (2, 3):
            raise ConfigError(f"cos, sin: must be [N, R/2] or [B, T, R/2], got {list(cos.shape)} and {list(sin.shape)}")
        if cos.requires_grad or sin.requires_grad:
            raise ConfigError("cos, sin: must not require a gradient, the kernel has none for them")
        width = cos.shape[-1]
        if cos.dim() == 3:
            if position_ids is not None:
                raise ConfigError(_BY_TOKEN)
            if cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
                raise ConfigError(f"cos of shape {list(cos.shape)}: must be [{batch} or 1, {tokens}, R/2]")
    if 2 * width > q.shape[3]:
        raise ConfigError(f"tables of width {width}: rotate {2 * width} dimensions, head_dim is {q.shape[3]}")
    if position_ids is not None and (
        position_ids.dim() != 2
        or position_ids.shape[0] not in (1, batch)
        or position_ids.shape[1] != tokens
        or position_ids.dtype not in (torch.int64, torch.int32)
    ):
        raise ConfigError(
            f"position_ids: must be integers [{batch} or 1, {tokens}], "
            f"got {position_ids.dtype} {list(position_ids.shape)}"
        )


_BY_TOKEN = "position_ids, offset: have no meaning with tables token by token, leave them out"


def _check_offset(q: Tensor, cos: Tensor | None, position_ids: Tensor | None, offset: int, heads_first: bool) -> None:
    if cos is None or (position_ids is not None and cos.dim() == 2):
        return
    if cos.dim() == 3:
        raise ConfigError(_BY_TOKEN)
    tokens = q.shape[2 if heads_first else 1]
    if not 0 <= offset <= cos.shape[0] - tokens:
        raise ConfigError(f"offset={offset}: {tokens} tokens from there do not fit a table of {cos.shape[0]}")


# ------------------------------------------------------------------------------------------------------ torch's twin


def tables_from_phases(phases: Tensor, positions: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., R/2] of phases [R/2] at integer positions [...], float32, as the Triton kernel makes them."""
    top = (positions.long()[..., None] * phases) >> 32  # a signed fraction of a turn, in units of 2^-32
    quadrant = (top + 2**29) >> 30  # the nearest quarter turn
    x = (top - (quadrant << 30)).float() * (2 * math.pi / 2**32)  # at most π/4
    square = x * x
    # Taylor series; the first terms left out are under 2e-9.
    s = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    c = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square / 3628800))))
    # In odd quadrants cos and sin change places; cos is negative in quadrants 1 and 2, sin in 2 and 3.
    odd = (quadrant & 1).bool()
    cos = torch.where(odd, s, c) * (1 - ((quadrant + 1) & 2))
    sin = torch.where(odd, c, s) * (1 - (quadrant & 2))
    return cos * attention_factor, sin * attention_factor


def _tables(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    phases: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    attention_factor: float,
    heads_first: bool,
) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, T, R/2] of every token."""
    tokens = x.shape[2 if heads_first else 1]
    if phases is not None:
        if position_ids is None:
            position_ids = torch.arange(offset, offset + tokens, device=x.device)[None]
        cos, sin = tables_from_phases(phases, position_ids, attention_factor)
        wanted = torch.promote_types(x.dtype, torch.float32)
        return cos.to(wanted), sin.to(wanted)
    assert cos is not None and sin is not None
    if cos.dim() == 3:
        return cos, sin
    if position_ids is None:
        return cos[None, offset : offset + tokens], sin[None, offset : offset + tokens]
    outside = (position_ids < 0) | (position_ids >= cos.shape[0])
    rows = position_ids.masked_fill(outside, 0)
    return tuple(table[rows].masked_fill(outside[..., None], math.nan) for table in (cos, sin))  # type: ignore[return-value]


def _rotate_torch(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, heads_first: bool, interleaved: bool, inverse: bool
) -> None:
    """Write x rotated by tables [B or 1, T, R/2] into `out`, which may be x."""
    heads = 1 if heads_first else 2
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    sin = -sin if inverse else sin
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first].to(cos.dtype), x[..., second].to(cos.dtype)
    rotated = a * cos - b * sin, b * cos + a * sin
    out[..., first], out[..., second] = rotated
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]


# -------------------------------------------------------------------------------------------------------- the operator

_LIBRARY: Any = torch.library.Library("scaled_rope", "DEF")  # type: ignore[no-untyped-call]
_ARGUMENTS = (
    "Tensor? cos, Tensor? sin, Tensor? phases, Tensor? position_ids, SymInt offset, float attention_factor, "
    "bool heads_first, bool interleaved, bool inverse, str backend"
)
_LIBRARY.define(f"rotary(Tensor q, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor)")
_LIBRARY.define(f"rotary_(Tensor(a!) q, Tensor(b!) k, {_ARGUMENTS}) -> ()")


def _launch(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    phases: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    attention_factor: float,
    heads_first: bool,
    interleaved: bool,
    inverse: bool,
    backend: str,
) -> None:
    given = (cos, sin, phases, position_ids, offset, attention_factor, heads_first)
    if q.numel() + k.numel() == 0:
        return
    if kernel_backend(q.device, backend) == "triton":
        from scaled_rope.kernels.rotary_triton import launch

        launch(q, k, q_out, k_out, *given, interleaved, inverse)
        return
    tables = _tables(q, *given)
    for x, out in ((q, q_out), (k, k_out)):
        _rotate_torch(x, out, *tables, heads_first, interleaved, inverse)


def _rotary(q: Tensor, k: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q), torch.empty_like(k)
    _launch(q, k, *out, *more)
    return out


def _rotary_(q: Tensor, k: Tensor, *more: Any) -> None:
    _launch(q, k, q, k, *more)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, phases, position_ids, *flags = inputs
    ctx.save_for_backward(cos, sin, phases, position_ids)
    ctx.flags = flags
    ctx.set_materialize_grads(False)  # the gradient of an unused output is None, not a tensor of zeros


def _backward(ctx: Any, q: Tensor | None, k: Tensor | None) -> tuple[Any, ...]:
    offset, attention_factor, heads_first, interleaved, inverse, backend = ctx.flags
    more = (*ctx.saved_tensors, offset, attention_factor, heads_first, interleaved, not inverse, backend)
    q = q if ctx.needs_input_grad[0] else None
    k = k if ctx.needs_input_grad[1] else None
    if q is not None and k is not None:
        q, k = torch.ops.scaled_rope.rotary(q, k, *more)
    elif (given := q if q is not None else k) is not None:
        nothing = given.narrow(1 if heads_first else 2, 0, 0)
        rotated = torch.ops.scaled_rope.rotary(given, nothing, *more)[0]
        q, k = (rotated, None) if q is not None else (None, rotated)
    return q, k, *(None for _ in more)


torch.library.impl(_LIBRARY, "rotary", "CompositeExplicitAutograd")(_rotary)
torch.library.impl(_LIBRARY, "rotary_", "CompositeExplicitAutograd")(_rotary_)
torch.library.register_fake("scaled_rope::rotary", lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)))
torch.library.register_fake("scaled_rope::rotary_", lambda *_: None)
torch.library.register_autograd("scaled_rope::rotary", _backward, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """`rotary_` of one tensor, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads_first: bool, more: tuple[Any, ...]) -> Tensor:
        torch.ops.scaled_rope.rotary_(x, x.narrow(1 if heads_first else 2, 0, 0), *more)
        ctx.mark_dirty(x)
        ctx.save_for_backward(*more[:4])
        ctx.flags = more[4:]
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        offset, attention_factor, heads_first, interleaved, inverse, backend = ctx.flags
        more = (*ctx.saved_tensors, offset, attention_factor, heads_first, interleaved, not inverse, backend)
        nothing = gradient.narrow(1 if heads_first else 2, 0, 0)
        return cast(Tensor, torch.ops.scaled_rope.rotary(gradient, nothing, *more)[0]), None, None
