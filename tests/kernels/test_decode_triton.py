"""The decoding kernel: how it is divided, and what an H100 and an A100 are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import kernel_resources
from scaled_rope.kernels.decode_blocks import HOPPER, blocks_for, shared_bytes, splits_of
from scaled_rope.results import read_rows
from tests.helpers import ROOT
from tests.helpers.h100 import compiled


def test_stretches_fill_whole_waves() -> None:
    assert splits_of(1, 8, 264) == 1 and splits_of(10**4, 1000, 264) == 1
    for rows in (1, 3, 8, 24, 64):
        for blocks in (128, 512, 2048):
            parts = splits_of(blocks, rows, 264)
            waves = -(-rows * parts // 264)
            assert rows * parts / (264 * waves) > 0.72 or parts == blocks, (rows, blocks, parts)
            # The last program of a wave has at most one block fewer than the others.
            assert parts * -(-blocks // parts) - blocks < parts


def test_blocks_follow_the_shape_and_the_device() -> None:
    assert blocks_for(64, 0, 128, 2, 4, HOPPER).keys > blocks_for(128, 0, 256, 2, 4, HOPPER).keys
    assert blocks_for(64, 0, 128, 8, 4, HOPPER) is None, "float64"
    assert blocks_for(160, 0, 320, 2, 4, HOPPER) is None and blocks_for(64, 0, 128, 2, 4, 20_000) is None
    for limit in (65_536, 101_376, 166_912, HOPPER):
        for itemsize in (2, 4):
            for rows in (1, 16, 256):
                blocks = blocks_for(128, 0, 256, itemsize, rows, limit)
                assert blocks is None or shared_bytes(blocks, 256, 256, itemsize) <= limit


def test_what_the_compiler_says() -> None:
    """The largest programs, compiled for five targets: they fit, keep all in registers, as was reckoned."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/kernel_resources.py", "--corners"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(kernel_resources.corners())
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["shared_bytes"] <= row["limit_bytes"]
        assert row["compiled_for"].removesuffix("a") == row["target"]
        if row["target"] == "gfx942":
            assert row["registers"] <= 512  # per thread, where one program of four warps has a compute unit for itself
            continue
        assert row["registers"] * 32 * row["warps"] <= 65_536
        if row["kernel"] == "decode":
            width, itemsize = row["head_dim"], 4 if row["dtype"] == "float32" else 2
            blocks = blocks_for(width // 2, 0, width, itemsize, row["group"] * row["count"], row["limit_bytes"])
            assert row["shared_bytes"] <= shared_bytes(blocks, width, width, itemsize)
            assert row["registers"] * 32 * row["warps"] * blocks.resident <= 65_536


def test_all_shapes_that_were_compiled_fit_and_keep_all_in_registers() -> None:
    """The committed rows: the whole grid, each case once and compiled for its own target."""
    rows, grid = read_rows(kernel_resources.ROWS), list(kernel_resources.grid())
    of = [[place for place, case in enumerate(grid) if case.items() <= row.items()] for row in rows]
    assert sorted(sum(of, [])) == list(range(len(grid)))
    for row in rows:
        assert kernel_resources.good(row), row
        if "backend" not in row:
            assert row["compiled_for"].removesuffix("a") == row["target"], row
            assert row["target"] == "gfx942" or row["registers"] * 32 * row["warps"] <= 65_536, row
        if "merge" in row:
            assert kernel_resources.good(row["merge"] | {"limit_bytes": row["limit_bytes"]}), row


def test_a_kernel_that_spills_or_does_not_fit_is_bad() -> None:
    row = {"shared_bytes": 10, "limit_bytes": 10, "spilled_bytes": 0}
    assert kernel_resources.good(row) and kernel_resources.good({"backend": "torch"})
    assert not kernel_resources.good(row | {"shared_bytes": 11})
    assert not kernel_resources.good(row | {"spilled_bytes": 8})


LAUNCH = """
from scaled_rope.kernels.decode_blocks import blocks_for
query = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16)
key = torch.zeros(1, 8, 8192, 128, dtype=torch.bfloat16)
places = torch.zeros(1, 1, dtype=torch.int64)
blocks = blocks_for(64, 0, 128, 2, 4, 232_448)
module.merge_kernel = {(8 * 4,): lambda *_, **__: None}
result = []
for interleaved in (False, True):
    module.launch(query, key, key, torch.zeros(1, 64, dtype=torch.int64), places[0], places, torch.ones(1), None, 1.0,
                  interleaved, blocks, 132)
    result.append(re.findall(r"(?:ld[.]global|cp[.]async[.]c.[.]shared[.]global)\\S*[^;]*;", found[-1]))
print(json.dumps(result))
"""


def test_keys_and_values_come_16_bytes_at_a_time(tmp_path: Any) -> None:
    """Compiled for an H100, without one: 32 heads on 8, 128 wide, pairs of halves and of neighbours."""
    pytest.importorskip("triton")
    layouts = compiled("scaled_rope.kernels.decode_triton", "decode_kernel", LAUNCH, TRITON_CACHE_DIR=str(tmp_path))
    for loads in layouts:
        in_flight = [load for load in loads if load.startswith("cp.async")]
        # cp.async.cg copies 16 bytes and nothing else; the query alone is loaded otherwise, once by each program.
        assert len(in_flight) >= 4 and all(load.startswith("cp.async.cg") for load in in_flight), loads
