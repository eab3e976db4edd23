"""BLAKE3 in NumPy, for containers to which the package of that name cannot be added: the same hashes, 30 to 100 MB/s
by each processor.

Source: "BLAKE3: one function, fast everywhere" (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020), sections 2.1 to 2.5.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint32]

_CHUNK = 1024  # bytes: 16 blocks of 64
_TOGETHER = 4096  # chunks that are hashed side by side; a power of two, so that they are a whole subtree
_IV = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)
_PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
_START, _END, _PARENT, _ROOT = 1, 2, 4, 8


def hexdigest(data: bytes | memoryview) -> str:
    """The hash of bytes, or of a file that is mapped into memory, as 64 hexadecimal digits."""
    step = _CHUNK * _TOGETHER
    offsets = range(0, len(data), step) or [0]

    def subtree(offset: int) -> Words:
        piece = np.frombuffer(data[offset : offset + step], np.uint8)
        return _joined(_chunks(piece, offset // _CHUNK, len(data) <= _CHUNK), len(offsets) == 1)

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(processors) as pool:
        roots = list(pool.map(subtree, offsets))  # NumPy computes outside the interpreter's lock
    return _joined(np.concatenate(roots, axis=1), True)[:, 0].astype("<u4").tobytes().hex()


def _compress(values: Words, block: Words, counter: NDArray[np.uint64], length: Words, flags: Words) -> Words:
    """New chaining values [8, n] of blocks [16, n], with the other inputs [n]."""
    n = block.shape[1]
    a, b = values[:4].copy(), values[4:].copy()
    c = np.repeat(_IV[:4, None], n, axis=1)
    d = np.stack([counter & 0xFFFFFFFF, counter >> 32, length, flags]).astype(np.uint32)
    for turn in range(7):
        if turn:
            block = block[_PERMUTATION]
        for part in (0, 8):
            for words, first, second in ((block[part : part + 8 : 2], 16, 12), (block[part + 1 : part + 8 : 2], 8, 7)):
                a += b
                a += words
                d = _rotated(d ^ a, first)
                c += d
                b = _rotated(b ^ c, second)
            # Columns become diagonals, and after them columns again.
            shift = 1 if part == 0 else -1
            b, c, d = np.roll(b, -shift, 0), np.roll(c, 2, 0), np.roll(d, shift, 0)
    return np.concatenate([a ^ c, b ^ d])


def _rotated(words: Words, bits: int) -> Words:
    return (words >> np.uint32(bits)) | (words << np.uint32(32 - bits))


def _chunks(data: NDArray[np.uint8], first: int, root: bool) -> Words:
    """The chaining values [8, n] of chunks, the last of which may be short.

    Args:
        first: the number of the first chunk.
        root: the one chunk is all there is.
    """
    n = max(1, -(-data.size // _CHUNK))
    padded = np.zeros(n * _CHUNK, np.uint8)
    padded[: data.size] = data
    blocks = padded.view("<u4").astype(np.uint32, copy=False).reshape(n, 16, 16)
    sizes = np.full(n, _CHUNK)
    sizes[-1] = data.size - (n - 1) * _CHUNK
    last = np.maximum(0, -(-sizes // 64) - 1)  # the number of each chunk's last block
    values = np.repeat(_IV[:, None], n, axis=1)
    counter = np.arange(first, first + n, dtype=np.uint64)
    for index in range(16):
        flags = np.where(last == index, _END | (_ROOT if root else 0), 0) | (_START if index == 0 else 0)
        length = np.clip(sizes - 64 * index, 0, 64)
        words = np.ascontiguousarray(blocks[:, index].T)
        new = _compress(values, words, counter, length.astype(np.uint32), flags.astype(np.uint32))
        values = np.where(index <= last, new, values)
    return values


def _joined(values: Words, root: bool) -> Words:
    """The chaining value [8, 1] of the tree over chaining values [8, n]: neighbours are joined, an odd one moves up."""
    while (n := values.shape[1]) > 1:
        pairs = values[:, : n // 2 * 2]
        block = np.concatenate([pairs[:, ::2], pairs[:, 1::2]])
        count = n // 2
        flags = np.full(count, _PARENT | (_ROOT if root and n == 2 else 0), np.uint32)
        start = np.repeat(_IV[:, None], count, axis=1)
        parents = _compress(start, block, np.zeros(count, np.uint64), np.full(count, 64, np.uint32), flags)
        values = np.concatenate([parents, values[:, count * 2 :]], axis=1)
    return values
