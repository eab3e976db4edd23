"""How this process gets memory from the system, for training on a CPU.

A training step makes and drops the same large tensors again and again. By default glibc gives each back to the system,
and the next one is taken page by page, filled with zeros: a tenth of the time of a small model's step and more.
"""

from __future__ import annotations

import ctypes
import os

#: mallopt(3): parameters of glibc's allocator
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1
_MAPPED = 32 * 2**20
"""Bytes from which glibc always gives a block a mapping of its own, and gives it back when it is freed."""


def use_huge_pages() -> None:
    """Take tensors in huge pages where the system offers them: PyTorch's own THP_MEM_ALLOC_ENABLE.

    PyTorch reads it once, when the process makes its first tensor. A value of the user's stands.
    """
    if not _has_settings():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_host_memory(hidden: int) -> bool:
    """Keep memory that tensors free for the next tensors; return whether.

    The process's resident memory then stays near its peak, and the peak is some per cent higher, since blocks don't fit
    into each other perfectly. Results are the same to the bit. Nothing is done where the allocator is not glibc's,
    where the environment gives it settings of the user's (MALLOC_..., GLIBC_TUNABLES), or where hidden states are so
    large that glibc maps them one by one: in one heap, what checkpoints keep would stand between gaps of what is freed
    (the forward pass of 8 layers of SmolLM2 over 16k tokens took 2.0 GB in place of 0.8).

    hidden: bytes of the hidden states of a pass.
    """
    if _has_settings() or hidden >= _MAPPED:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # Large blocks from the heap instead of mappings of their own, and a heap that doesn't shrink.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def _has_settings() -> bool:
    """Whether the environment has settings for glibc's allocator."""
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
