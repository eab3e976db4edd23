"""What methods that change attention cost beside plain attention, in CPU seconds of one layer of SmolLM2's shape.

    OMP_NUM_THREADS=1 python benchmarks/attention_methods.py

CPU seconds and not wall time, so that other programs on the machine count less. Prints a table.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from scaled_rope import RopeScaling, compute_rope
from scaled_rope.attention.blockwise import blockwise_attention
from scaled_rope.attention.regions import region_attention
from scaled_rope.methods import attention_regions

HEADS, KV_HEADS, HEAD_DIM, ORIGINAL = 9, 3, 64, 8192
SPECS = (
    "rerope,window=4096",
    "leaky-rerope,window=4096,k=8",
    "self-extend,group=8,window=2048",
    "dual-chunk,chunk=6144",
)


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The least CPU time of a few runs."""
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    base = RopeScaling("default", original_max_position_embeddings=ORIGINAL, rope_theta=1e5)
    inv_freq = compute_rope(base, HEAD_DIM)[0]
    scale = HEAD_DIM**-0.5
    print(f"{'dtype':10} {'queries':>8} {'keys':>8} {'attention':32} seconds")
    for dtype in (torch.bfloat16, torch.float32):
        for queries, keys in ((4096, 4096), (16384, 16384), (1, 16384)):
            q = torch.randn(1, HEADS, queries, HEAD_DIM).to(dtype)
            k, v = (torch.randn(1, KV_HEADS, keys, HEAD_DIM).to(dtype) for _ in range(2))
            whole = queries == keys
            rows: dict[str, Callable[..., torch.Tensor]] = {
                "sdpa": functools.partial(scaled_dot_product_attention, is_causal=whole, enable_gqa=True)
            }
            if whole and dtype == torch.bfloat16:
                rows["blockwise"] = functools.partial(blockwise_attention, scale=scale)
            for spec in SPECS:
                regions = attention_regions(RopeScaling.from_spec(spec, base))
                rows[spec] = functools.partial(region_attention, inv_freq=inv_freq, regions=regions, scale=scale)
            for name, attend in rows.items():
                took = seconds(functools.partial(attend, q, k, v))
                print(f"{str(dtype)[6:]:10} {queries:8} {keys:8} {name:32} {took:.4f}")


if __name__ == "__main__":
    main()
