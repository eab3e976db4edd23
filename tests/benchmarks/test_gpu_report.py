"""The report of the GPU benchmark."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_parts import train
from scaled_rope import ConfigError
from scaled_rope.results import append_row


def _rows() -> list[dict[str, Any]]:
    about = {"device": "Some GPU", "driver": "1.2", "versions": {"torch": "2.11"}, "commit": "abc"}
    rotary = {"metric": "rotary forward", "shape": "small", "bytes": 2**30, "copy_seconds": 0.001, "error": 0.002}
    attention = {"metric": "attention", "shape": "H4/2 D16", "variant": "b", "mfu": 0.5, "peak_bytes": 2**30}
    model = {"metric": "prefill", "model": "1B", "attention": "sdpa", "mfu": None, "peak_bytes": 2**30}
    step = {"metric": "training step", "model": "1B", "variant": train.STOCK}
    return [
        rotary | about | {"tokens": 131072, "variant": "a", "skipped": "out of memory"},
        rotary | about | {"tokens": 4096, "variant": "a", "seconds": 1, "bytes_per_second": 1e12, "share_of_copy": 0.5},
        rotary | about | {"tokens": 4096, "variant": "a", "seconds": 1, "bytes_per_second": 2e12, "share_of_copy": 0.9},
        model | about | {"tokens": 4096, "kernel": "triton", "seconds": 1, "tokens_per_second": 5e4},
        attention | about | {"tokens": 8192, "seconds": 1, "tokens_per_second": 3e4},
        step | about | {"tokens": 8192, "seconds": 1, "tokens_per_second": 5e4, "mfu": 0.4, "peak_bytes": 2**30},
        step | about | {"tokens": 131072, "skipped": "out of memory"},
    ]


def test_report_is_the_newest_rows(tmp_path: Path) -> None:
    rows, page, images = tmp_path / "rows.jsonl", tmp_path / "page.md", tmp_path / "images"
    images.mkdir()
    page.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    arguments = ["--rows", str(rows), "--page", str(page), "--images", str(images)]
    assert gpu_report.main(arguments) == 0
    assert page.read_text() == f"before\n{gpu_report.BEGIN}\n\n{gpu_report.NONE}\n\n{gpu_report.END}\nafter\n"
    for row in _rows():
        append_row(rows, row)
    assert gpu_report.main([*arguments, "--check"]) == 1
    assert gpu_report.main(arguments) == 0 and gpu_report.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert "| | T = 4k | T = 128k |" in text and "| a | 2.00 TB/s, 90 % | out of memory |" in text
    assert f"| {train.STOCK} | 50.0k, 40 %, 1.0 GiB | out of memory |" in text
    assert "| b | 30.0k, 50 %, 1.0 GiB |" in text
    assert "| sdpa, kernel triton | 50.0k, 1.0 GiB |" in text and "Some GPU, driver 1.2, torch 2.11, commit abc" in text
    drawn = sorted(path.name for path in images.iterdir())
    assert drawn == (
        ["gpu-attention.png", "gpu-prefill.png", "gpu-rotary-forward.png", "gpu-training-step.png"]
        if importlib.util.find_spec("matplotlib")
        else []
    )
    page.write_text("no markers")
    with pytest.raises(ConfigError, match="has no part between"):
        gpu_report.main(arguments)


def test_the_page_says_what_the_rows_say() -> None:
    assert gpu_report.main(["--check"]) == 0
