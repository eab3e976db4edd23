"""The rotary kernel, compiled for an H100."""

from __future__ import annotations

import importlib.util

import pytest

from tests.helpers.h100 import compiled

LAUNCHES = """
result = {}
for name, (tokens, heads, kv_heads, width, half, order, way) in CASES.items():
    q, k = (torch.zeros(1, tokens, n, width, dtype=torch.bfloat16).transpose(1, 2) for n in (heads, kv_heads))
    if order == "bhtd":
        q, k = q.contiguous(), k.contiguous()
    table = None if way == "free" else torch.zeros(1, tokens, half)
    phases = torch.zeros(half, dtype=torch.int64) if way == "free" else None
    out = torch.empty_like(q), torch.empty_like(k)
    module.launch(q, k, *out, table, table, phases, None, 0, 1.0, True, way == "interleaved", False)
    loads, stores = (
        [int(count or 1) * int(bits) // 8 for count, bits in re.findall(pattern, found[-1])]
        for pattern in (r"ld[.]global\\S*?(?:[.]v(.))?[.]b(..)", r"st[.]global\\S*?(?:[.]v(.))?[.]b(..)")
    )
    result[name] = sorted(loads), sorted(stores), "st.local" in found[-1]
print(json.dumps(result))
"""
# T, query heads, key heads, head_dim, half of the rotated part, order in memory, angles
CASES = {
    "grouped": (4096, 32, 8, 128, 64, "bthd", "tables"),
    "heads apart": (4096, 32, 8, 128, 64, "bhtd", "tables"),
    "interleaved": (4096, 32, 8, 128, 64, "bthd", "interleaved"),
    "without tables": (4096, 32, 8, 128, 64, "bthd", "free"),
    "nine heads": (4096, 9, 3, 64, 32, "bthd", "tables"),
    "a part of the head": (4096, 32, 32, 80, 16, "bthd", "tables"),
    "one token": (1, 32, 8, 128, 64, "bthd", "tables"),
}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
def test_memory_accesses_are_16_bytes_wide() -> None:
    """Compiled for an H100, which needs none: every access to q and k is 16 bytes wide, and nothing spills."""
    launches = f"CASES = {CASES!r}\n{LAUNCHES}"
    found = compiled("scaled_rope.kernels.rotary_triton", "rotary_kernel", launches)
    assert found.keys() == CASES.keys()
    for loads, stores, spilled in found.values():
        # As many bytes come as go, so as many loads as stores are of q and k; the others are of tables.
        assert stores and set(stores) == {16} and loads.count(16) >= len(stores) and not spilled
