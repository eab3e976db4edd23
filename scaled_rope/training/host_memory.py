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


def keep_host_memory() -> bool:
    """Keep memory that tensors free for the next tensors, in huge pages where the system offers them; return whether.

    The process's resident memory then stays near its peak, and the peak is some per cent higher, since blocks don't fit
    into each other perfectly. Results are the same to the bit. Nothing is done where the allocator is not glibc's, or
    where the environment gives it settings of the user's (MALLOC_..., GLIBC_TUNABLES). Huge pages are PyTorch's own
    THP_MEM_ALLOC_ENABLE, which it reads once, when the process makes its first tensor.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Large blocks from the heap instead of mappings of their own, and a heap that doesn't shrink.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))
