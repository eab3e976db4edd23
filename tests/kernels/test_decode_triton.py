"""The decoding kernel: how it is divided, and what an H100 is given."""

from __future__ import annotations

from typing import Any

import pytest

from scaled_rope.kernels.decode_triton import splits_of
from tests.helpers.h100 import compiled


def test_stretches_keep_a_gpu_busy() -> None:
    assert splits_of(1, 8) == 1 and splits_of(8192, 8) == 32 and splits_of(10**6, 8) == 33
    assert splits_of(10**6, 1000) == 1


LAUNCH = """
query = torch.zeros(1, 8, 4, 128)
key = torch.zeros(1, 8, 8192, 128, dtype=torch.bfloat16)
module.launch(query, key, key, torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), None, 1, False)
loads = re.findall(r"(?:ld[.]global|cp[.]async[.]c.[.]shared[.]global)\\S*[^;]*;", found[-1])
print(json.dumps(["st.local" in found[-1], loads]))
"""


def test_what_an_h100_is_given(tmp_path: Any) -> None:
    # Compiled for one, without one: keys and values of 32 heads on 8, 128 wide, come 16 bytes at a time, and nothing
    # is spilled to memory.
    pytest.importorskip("triton")
    spilled, loads = compiled(
        "scaled_rope.kernels.decode_triton", "decode_kernel", LAUNCH, TRITON_CACHE_DIR=str(tmp_path)
    )
    wide = [load for load in loads if ".v4.b32" in load or load.rstrip(";").endswith("0x10") or ", 16" in load]
    assert not spilled and len(wide) >= 3 and not any(".b16" in load for load in loads)
