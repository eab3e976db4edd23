"""Triton that is installed and does not run, as where there is no C compiler: what is chosen automatically goes on."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaled_rope import patch_model
from scaled_rope.kernels import DecodeAngles, apply_rotary, decode, kernel_backend, rotary, rotary_decode, triton_lacks
from tests.helpers.models import Make

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
REASON = "Failed to find C compiler. Please specify via CC environment variable"
LAUNCH = "scaled_rope.kernels.rotary_triton"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices on which a kernel was tried, on a machine with two GPUs where none runs."""
    found: list[torch.device] = []

    def try_out(device: torch.device) -> None:
        found.append(device)
        raise RuntimeError(f"{REASON}\nor set it in another way")

    def launch(*_: Any) -> None:
        raise RuntimeError(REASON)

    monkeypatch.delenv("SCALED_ROPE_KERNEL", raising=False)
    monkeypatch.setattr(rotary, "_LACKS", {})
    monkeypatch.setattr(rotary, "_triton_is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, LAUNCH, SimpleNamespace(try_out=try_out, launch=launch))
    for name, value in {"is_available": True, "is_initialized": True, "is_current_stream_capturing": False}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return found


def test_one_warning_for_each_gpu(tried: list[torch.device], caplog: pytest.LogCaptureFixture) -> None:
    for device in (GPU, "cuda", None, GPU):
        assert triton_lacks(device) == f"RuntimeError: {REASON}" and kernel_backend(device) == "torch"
    assert tried == [GPU]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cuda:0" in warning.getMessage() and warning.getMessage().endswith(f"RuntimeError: {REASON}")
    assert kernel_backend(OTHER) == "torch" and tried == [GPU, OTHER]


def test_what_is_asked_for_by_name_is_not_exchanged(tried: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_backend(GPU, "triton") == "triton"
    monkeypatch.setenv("SCALED_ROPE_KERNEL", "triton")
    assert kernel_backend(GPU) == "triton" and not tried
    _as_on(GPU, monkeypatch)
    x, table = torch.zeros(1, 2, 3, 8), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=REASON):
        apply_rotary(x, x, table, table)


def test_nothing_is_tried_where_it_would_do_harm(tried: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has not used a GPU and may yet be forked, in a graph that is captured, in a traced call."""
    for name, value in {"is_initialized": False, "is_current_stream_capturing": True}.items():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, name, lambda value=value: value)
            assert kernel_backend(GPU) == kernel_backend() == "triton" and kernel_backend("cpu") == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert kernel_backend(GPU) == "triton" and not tried
    assert kernel_backend(GPU) == "torch" and tried == [GPU]


def test_what_was_found_is_known_to_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_LACKS", {})
    monkeypatch.setattr(rotary, "_triton_is_installed", lambda: True)
    compiled = torch.compile(lambda x: x - 1 if triton_lacks(GPU) else x + 1, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 1
    rotary._LACKS[GPU] = REASON
    assert compiled(torch.zeros(())) == -1


def test_torch_takes_the_place(tried: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, angles = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.rand(3, 4)
    given = (q, k[:, :, :3], angles.cos(), angles.sin())
    at = DecodeAngles(torch.rand(1, 4), torch.tensor([[2, 3, 4]]), torch.tensor([0]))
    rotated, attended = apply_rotary(*given, backend="torch"), rotary_decode(q, k, k, at, backend="torch")
    _as_on(GPU, monkeypatch)
    assert all(map(torch.equal, apply_rotary(*given), rotated))
    assert torch.equal(rotary_decode(q, k, k, at), attended)
    assert tried == [GPU]


def test_models_keep_their_own_function(tried: list[torch.device], tiny_model: Make) -> None:
    report = patch_model(tiny_model(), "yarn:4")
    assert report.kernel is None and not report.notes and tried == [GPU]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
def test_the_kernel_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, or in the interpreter; whatever it raises is the reason."""
    from scaled_rope.kernels import rotary_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert rotary._try_triton(device) == ""
    with torch.device("meta"), torch.inference_mode():
        assert rotary._try_triton(device) == ""

    def refuse(*_: Any) -> None:
        raise ImportError("libcuda.so cannot be found")

    monkeypatch.setattr(rotary_triton, "trial_kernel", {(1,): refuse})
    assert rotary._try_triton(device) == "ImportError: libcuda.so cannot be found"


def _as_on(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide for every tensor as on a GPU."""
    for module in (rotary, decode):
        monkeypatch.setattr(module, "kernel_backend", lambda _, backend="auto": kernel_backend(device, backend))
