"""Part `rotary-backward`: the gradients of queries and keys that were rotated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu_parts import rotary, timing
from benchmarks.gpu_parts.rotary_cases import Shape, Variant, make_inputs
from scaled_rope.results import Row


def backward_error(variant: Variant, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """The larger relative error of the gradients of q and k, on inputs of its own, which are drawn again as forward."""
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    x = make_inputs(shape, tokens, dtype, device)
    leaves = [x.q.requires_grad_(), x.k.requires_grad_()]
    # Times 1, which is exact: an operation in place needs tensors that are not leaves.
    out = variant(leaves[0] * 1, leaves[1] * 1, x)
    torch.manual_seed(seed)
    gradients = [torch.randn(y.shape, dtype=dtype, device=device) for y in out]
    rotary.poison(*gradients)
    found = torch.autograd.grad(out, leaves, gradients)
    del leaves, out, gradients
    x.q = x.k = None
    torch.manual_seed(seed)
    given = [torch.randn(y.shape, dtype=dtype, device=device) for y in found]
    return max(rotary.rotation_error(a, b, x, inverse=True) for a, b in zip(found, given, strict=True))


def time_backward(variant: Variant, shape: Shape, tokens: int, dtype: torch.dtype) -> Row:
    timing.free()
    first, pairs, short = rotary.input_sets(shape, tokens, dtype)
    calls = []
    for q, k in pairs:
        out = variant(q.requires_grad_(), k.requires_grad_(), first)
        gradients = [torch.randn_like(x) for x in out]
        calls.append(partial(torch.autograd.grad, out, (q, k), gradients, retain_graph=True))
    return rotary.timed(calls, short, tokens)


# With gradients, "in place" does the same as "ours, tables", in a launch each for q and k.
BACKWARD = rotary.Direction("rotary backward", backward_error, time_backward, left_out=("ours, in place",))


def measure(
    clock: timing.Clock, lengths: Sequence[int] | None = None, shapes: Sequence[Shape] | None = None
) -> Iterator[Row]:
    """A row per length, shape and variant, with the seconds of a copy of as many bytes."""
    return rotary.measure(clock, BACKWARD, lengths, shapes)
