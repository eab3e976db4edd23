"""Errors that mean too little memory."""

from __future__ import annotations

import pytest
import torch

from scaled_rope.evaluation import memory_meter


def test_memory_errors_of_every_kind() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory_meter.is_out_of_memory(caught.value)
    assert memory_meter.is_out_of_memory(MemoryError())
    for said in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    ):
        assert memory_meter.is_out_of_memory(RuntimeError(said))
    assert not memory_meter.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    assert not memory_meter.is_out_of_memory(RuntimeError("shapes do not match"))
