"""How the decoding kernel is divided: blocks of queries and keys that fit a device, and stretches that fill it.

The numbers were chosen by compiling the kernel for sm_80 and sm_90 (`benchmarks/kernel_resources.py`): in each case the
largest blocks of which nothing is spilled from registers. The same holds on sm_100 and gfx942.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

WIDEST = 256
"""The largest padded head that the kernel takes."""
HOPPER = 232_448
"""Bytes of shared memory that a program may have on an H100."""


@dataclass(frozen=True)
class Blocks:
    """Queries and keys that a program holds at once, its warps, and the stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor, whose registers are enough for eight warps of this kernel."""
        return max(1, 8 // self.warps)


def padded(width: int) -> int:
    """The side of a block for `width` dimensions: a power of two from 16 on, as products of blocks need; 0 for none."""
    return max(16, 1 << (width - 1).bit_length()) if width > 0 else 0


@functools.cache
def blocks_for(
    half: int, tail: int, width: int, itemsize: int, rows: int, limit: int, lanes: int = 32
) -> Blocks | None:
    """Return blocks for heads of 2·half rotated and `tail` other dimensions, and values of `width`.

    Args:
        itemsize: bytes of an element of keys and values.
        rows: queries that share a key.
        limit: bytes of shared memory that a program may have.
        lanes: threads of a warp, 64 on AMD's data-centre GPUs, where eight warps have half the registers each of four.

    Returns:
        None where the kernel has none: elements of 8 bytes, heads padded to more than `WIDEST`, little shared memory.
    """
    head = 2 * padded(half) + padded(tail)
    widest = max(head, padded(width))
    if itemsize > 4 or widest > WIDEST:
        return None
    warps = 8 if widest > 128 and lanes == 32 else 4
    if itemsize == 4:
        queries, keys, stages = 16, 32 if widest <= 64 else 16, 2
    elif widest > 128:
        queries, keys, stages = 16, 32 if lanes == 32 else 16, 3
    elif rows > 16:
        queries, keys, stages = 32, 32, 3
    elif widest <= 64:
        queries, keys, stages = 16, 32, 4
    else:
        queries, keys, stages = 16, 32 if tail else 64, 3
    while stages and shared_bytes(Blocks(queries, keys, warps, stages), head, width, itemsize) > limit:
        stages -= 1
    return Blocks(queries, keys, warps, stages) if stages else None


def shared_bytes(blocks: Blocks, head: int, width: int, itemsize: int) -> int:
    """Bytes of shared memory that the kernel takes at most; the compiler's own number is at or below it."""
    row = (head + padded(width)) * itemsize
    return (blocks.stages * blocks.keys + blocks.queries) * row + 4096


@functools.cache
def splits_of(blocks: int, rows: int, programs: int) -> int:
    """The number of stretches to cut `blocks` blocks of keys into, for each of `rows` programs that read other keys.

    The one with the shortest time if programs run in waves of `programs` at once, each of which takes as long as its
    blocks of keys and two more, to begin and to be merged. Of equal ones the fewest.
    """

    def time(parts: int) -> int:
        return -(-rows * parts // programs) * (-(-blocks // parts) + 2)

    return min(range(1, max(2, min(blocks, 2 * programs // rows) + 1)), key=time)


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int, int]:
    """Bytes of shared memory that a program may have on a device, its multiprocessors, and the threads of a warp.

    On a CPU, where only Triton's interpreter runs the kernel, an H100's shared memory and one multiprocessor: few
    programs, which run one after the other.
    """
    if device.type != "cuda":
        return HOPPER, 1, 32
    found = torch.cuda.get_device_properties(device)
    limit = getattr(found, "shared_memory_per_block_optin", 0) or getattr(found, "shared_memory_per_block", 65_536)
    return int(limit), int(found.multi_processor_count), int(getattr(found, "warp_size", 32))
