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


LAUNCHED_TWICE = """
launched = []


class Utils:
    load_binary = staticmethod(lambda *_: (0, 0, 0, 0, 1024))
    get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232_448})


H100.utils = Utils
H100.launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: launched.append(arguments))
module.rotary_kernel = kernel
q, k = torch.zeros(1, 4, 8, 64), torch.zeros(1, 2, 8, 64)
table, ids = torch.zeros(8, 32), torch.zeros(1, 8, dtype=torch.int64)


def described(arguments):
    return [tuple(x.shape) if isinstance(x, torch.Tensor) else repr(x) for x in arguments]


geometry = []
for offset in (0, 0, 2**40, 2**40):
    out = torch.empty_like(q), torch.empty_like(k)
    if not geometry:
        geometry.append(module._geometry(q, k, *out, table, None, ids, True, False, False, False))
    one = geometry[0]
    module._launch_known(one, (q, k, *out, table, table, None, ids), (one.tokens, one.seq_len, offset, 8, 1.0))
shifted = torch.zeros(1 * 4 * 8 * 64 + 1)[1:].view(1, 4, 8, 64)
for _ in range(2):
    module._launch_known(one, (shifted, k, *out, table, table, None, ids), (one.tokens, one.seq_len, 0, 8, 1.0))
# Factors as a caller writes them, by the way of a tensor that is on a GPU.
from types import FunctionType

from scaled_rope.kernels import apply_rotary_from_frequencies, rotary

module.launch = FunctionType(module.launch.__code__, vars(module) | {"_launch": module._launch_known})
rotary.kernel_backend = lambda device=None, backend="auto": "triton"
phases = torch.zeros(32, dtype=torch.int64)
with torch.no_grad():
    for factor in (1, 1.25, 1.25, 1):
        apply_rotary_from_frequencies(q, k, phases, ids, attention_factor=factor)
(other,) = (found for found in module._GEOMETRIES.values())
# All but the seventh, which is made for each launch, for profilers.
given = [described(arguments[:6] + arguments[7:]) for arguments in launched]
print(json.dumps([given, len(one.compiled), len(other.compiled)]))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
def test_a_known_kernel_gets_what_triton_would_give_it() -> None:
    """Past Triton's own search: the same arguments, and another kernel for pointers or offsets that need one."""
    launched, *compiled_kernels = compiled("scaled_rope.kernels.rotary_triton", "rotary_kernel", LAUNCHED_TWICE)
    assert len(launched) == 10 and compiled_kernels == [3, 1]
    launched, by_factor = launched[:6], launched[6:]
    assert ["1.0" in arguments for arguments in by_factor] == [True, False, False, True]
    assert ["1.25" in arguments for arguments in by_factor] == [False, True, True, False]
    for first, again in zip(launched[::2], launched[1::2], strict=True):
        assert first == again
    assert len({str(arguments) for arguments in launched}) == 2, "by their offsets"
