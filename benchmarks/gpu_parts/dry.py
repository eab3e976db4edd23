"""The GPU benchmark on a CPU: the same code, kernels in Triton's interpreter, and sizes that a test has time for.

Its rows say "dry" for a device, so that no report takes them for measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import attention_methods
from benchmarks.gpu_parts import (
    attention,
    copies,
    correctness,
    decode,
    models,
    plan,
    prefill,
    rotary_cases,
    sweep,
    timing,
    train,
)

DEVICE = "dry run on a CPU"
SHAPES = (rotary_cases.Shape("Llama-2-7B", 3, 1, 16, 8),)
SMALL = {
    "135M": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
}  # fmt: skip


class Event:
    """torch.cuda.Event by the clock of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


Set = Callable[[Any, str, Any], None]


def stand_in(put: Set = setattr) -> None:
    """Replace what needs a GPU by what a CPU has; nothing is compiled. put: setattr, or one that a test undoes."""
    put(timing, "DEVICE", "cpu")
    put(timing, "ROTATED_BYTES", 2**12)
    put(timing, "RUNS", (1, 1))
    put(timing, "HOST_RUNS", (1, 1))
    put(timing, "free", lambda: None)
    put(timing, "peak_flops", lambda: 1e12)
    put(timing, "matmul_rate", lambda: 1e12)
    put(torch.cuda, "Event", Event)
    put(torch.cuda, "synchronize", lambda: None)
    put(torch.cuda, "_sleep", lambda cycles: None)
    put(torch.cuda, "reset_peak_memory_stats", lambda: None)
    put(torch.cuda, "max_memory_allocated", lambda: 2**20)
    put(torch, "compile", lambda function, **_: function)


def shrink(put: Set = setattr) -> None:
    """Tiny sizes for every part of both scripts."""
    # The interpreter cannot multiply matrices in bf16, so what does is checked in float16, and decoding in float32.
    put(correctness, "DTYPES", (torch.float32, torch.float16))
    put(correctness, "WIDTHS", ((16, 8),))
    put(correctness, "SHARED", ((2, 1),))
    put(correctness, "TOKENS", 21)
    put(copies, "SIZES", (2**12,))
    put(rotary_cases, "SHAPES", SHAPES)
    put(rotary_cases, "TOKENS", (16,))
    put(plan, "LLAMAS", SHAPES)
    put(plan, "FIRST_TOKENS", (1, 16))
    put(plan, "PREFILLED", (("sdpa, flash", "torch"), ("sdpa", "torch")))
    put(plan, "DTYPE", torch.float32)
    put(plan, "DECODED", (40,))
    put(plan, "ATTENDED", (40,))
    put(plan, "LONG", (24, 32))
    put(plan, "TRAINED", 24)
    put(plan, "MODELS", ("135M",))
    put(decode, "DECODED", (40,))
    put(decode, "DECODE_SHAPES", ((1, 2, 1, 16),))
    put(attention_methods, "ORIGINAL", 32)
    put(attention_methods, "SPECS", ("rerope,window=16",))
    put(attention, "ATTENDED", (40,))
    put(attention, "ATTENTION_SHAPES", ((4, 2, 16),))
    put(models, "MODELS", SMALL)
    put(models, "CHECKED", 16)
    put(prefill, "LENGTHS", (24,))
    put(prefill, "KERNELS", ("none", "torch"))
    put(prefill, "EAGER_LIMIT", 24)
    put(train, "TRAINED", (24,))
    put(train, "OURS", {"ours": {}, "ours, activations offloaded": {"offload_activations": True}})
    put(sweep, "LONGEST", 32)
    put(sweep, "LENGTHS", 4)


def machine() -> dict[str, Any]:
    """The fields about the machine of a dry run's rows."""
    return {"device": DEVICE, "driver": None, "cuda": None, "gpu_versions": {}, "multiprocessors": 0, "memory_bytes": 0}
