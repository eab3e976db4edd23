"""Errors that mean too little memory."""

from __future__ import annotations

import functools

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


def test_several_gpus_are_all_waited_for_and_their_peaks_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    asked: list[tuple[str, torch.device]] = []

    def answer(name: str, device: torch.device) -> int:
        asked.append((name, device))
        return 1000 * (1 + device.index)

    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, functools.partial(answer, name))
    with memory_meter.Meter(first, second) as meter:
        assert asked == [("reset_peak_memory_stats", first), ("reset_peak_memory_stats", second)]
    assert asked[2:4] == [("synchronize", first), ("synchronize", second)]
    assert sorted(asked[4:], key=str) == [("max_memory_allocated", first), ("max_memory_allocated", second)]
    assert meter.peak_memory == 3000 and meter.seconds > 0
    asked.clear()
    with memory_meter.Meter(torch.device("cpu")) as meter:
        pass
    assert meter.peak_memory > 2**20 and not asked
