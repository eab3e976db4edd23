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
        ["gpu-attention.png", "gpu-prefill.png", "gpu-roofline.png", "gpu-rotary-forward.png", "gpu-training-step.png"]
        if importlib.util.find_spec("matplotlib")
        else []
    )
    page.write_text("no markers")
    with pytest.raises(ConfigError, match="has no place for this"):
        gpu_report.main(arguments)


def test_the_page_says_what_the_rows_say() -> None:
    assert gpu_report.main(["--check"]) == 0


def _timed(variant: str, seconds: float, device: str = "H100", **fields: Any) -> dict[str, Any]:
    about = {"driver": "1", "versions": {"torch": "2.11"}, "commit": "abc", "device": device}
    row = {"metric": "rotary forward", "shape": "small", "tokens": 4096, "variant": variant, "seconds": seconds}
    moved = {"bytes": 100, "copy_seconds": 1.0, "bytes_per_second": 100 / seconds, "share_of_copy": 1 / seconds}
    return row | {"seconds_quartiles": [seconds - 0.05, seconds + 0.05]} | moved | about | fields


def test_what_had_no_time_hides_nothing() -> None:
    row, late = _timed("ours, tables", 1.0), _timed("ours, tables", 9.0) | {"skipped": "no time left"}
    for rows in ([row, late], [late, row]):
        assert gpu_report.newest(rows) == [row]
    assert gpu_report.newest([late]) == [late]
    failed = late | {"skipped": "out of memory"}
    assert gpu_report.newest([row, failed]) == [failed]


def test_ours_is_held_against_the_best_rival_of_the_same_card() -> None:
    rows = [
        _timed("ours, tables", 1.2), _timed("ours, in place", 1.0), _timed("Liger", 2.0), _timed("eager", 5.0),
        _timed("Liger", 0.5, device="H200"), _timed("ours, tables", 1.0, tokens=32768),
        _timed("Liger", 0.8, tokens=32768), _timed("ours, tables", 1.0, tokens=1), _timed("Liger", 1.02, tokens=1),
    ]  # fmt: skip
    pairs = gpu_report.against_rivals(rows)
    assert [(ours["variant"], rival["variant"]) for ours, rival in pairs][0] == ("ours, in place", "Liger")
    assert len(pairs) == 3, "the other card has no row of ours"
    said = gpu_report.standing(pairs)
    assert said == (
        "Ahead: rotary forward of small at T = 4k. Behind: rotary forward of small at T = 32k (1.25×). "
        "Within the spread: 1."
    )
    text = gpu_report.report(rows)
    assert text.count("Measured on one ") == 2 and text.index("one H100,") < text.index("one H200,")
    other = text[text.index("one H200,") :]
    assert "Ahead" not in other and "ours" not in other


def test_standalone_report(tmp_path: Path) -> None:
    for row in (_timed("ours, tables", 1.0), _timed("Liger", 2.0)):
        append_row(tmp_path / "gpu.jsonl", row)
    assert gpu_report.main(["--rows", str(tmp_path / "gpu.jsonl"), "--standalone", str(tmp_path)]) == 0
    text = (tmp_path / "gpu_report.md").read_text()
    assert "0.50×" in text and "100 % of a copy" in text
    if importlib.util.find_spec("matplotlib"):
        assert "gpu-roofline.png" in text and (tmp_path / "gpu-roofline.png").exists()
