"""Kernels: each a Triton kernel and its torch twin behind one function, as operators of torch.

Triton is imported when it is first used: everything works, on the CPU, without it.
Knows nothing of models.
"""

from scaled_rope.versions import check_versions

check_versions("torch")  # before an import that would fail in many lines

from scaled_rope.kernels.decode import DecodeAngles, rotary_decode
from scaled_rope.kernels.rotary import (
    apply_rotary,
    apply_rotary_from_frequencies,
    frequency_phases,
    kernel_backend,
    packed_position_ids,
    rotate,
    triton_lacks,
)

__all__ = [
    "DecodeAngles",
    "apply_rotary",
    "apply_rotary_from_frequencies",
    "frequency_phases",
    "kernel_backend",
    "packed_position_ids",
    "rotary_decode",
    "rotate",
    "triton_lacks",
]
