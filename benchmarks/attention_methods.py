"""The cost of methods that change attention beside plain attention, in seconds of one layer of SmolLM2's shape.

    OMP_NUM_THREADS=1 python benchmarks/attention_methods.py
    OMP_NUM_THREADS=1 python benchmarks/attention_methods.py --lengths 1024 --rounds 1 --output ""

On the CPU (benchmarks/gpu.py --part attention is for a GPU), in seconds of the processor and not of the clock, so that
other programs on the machine count less; variants take turns, and the least time of each is kept. `queries` is how many
of the keys' positions ask: all of them, or the last, as in decoding.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from scaled_rope import RopeScaling, compute_rope
from scaled_rope.attention.blockwise import blockwise_attention
from scaled_rope.attention.methods import attention_regions
from scaled_rope.attention.regions import region_attention
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.runner import command_line
from scaled_rope.flags.shared import parse_lengths
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row

HEADS, KV_HEADS, HEAD_DIM, ORIGINAL = 9, 3, 64, 8192
SPECS = (
    "rerope,window=4096",
    "leaky-rerope,window=4096,k=8",
    "self-extend,group=8,window=2048",
    "dual-chunk,chunk=6144",
)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/attention_methods.py", __doc__ or "")
    add = parser.add_argument
    add("--lengths", default="4096,16384", metavar="N,...", help="keys (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="timings of each variant (default: %(default)s)")
    add("--note", default="", help="what else to say in the rows, such as who shared the machine")
    add(
        "--output",
        metavar="FILE",
        default="data/benchmarks/attention_cpu.jsonl",
        help="'' for none (default: %(default)s)",
    )
    return parser


Variant = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def variants(q: torch.Tensor, k: torch.Tensor) -> dict[str, Variant]:
    """The variants to time, as functions of q, k and v."""
    base = RopeScaling("default", original_max_position_embeddings=ORIGINAL, rope_theta=1e5)
    inv_freq, scale = compute_rope(base, HEAD_DIM)[0], HEAD_DIM**-0.5
    whole = q.shape[2] == k.shape[2]
    found: dict[str, Variant] = {
        "sdpa": functools.partial(scaled_dot_product_attention, is_causal=whole, enable_gqa=True)
    }
    if whole and q.dtype == torch.bfloat16:
        found["blockwise"] = functools.partial(blockwise_attention, scale=scale)
    for spec in SPECS:
        regions = attention_regions(RopeScaling.from_spec(spec, base))
        found[spec] = functools.partial(region_attention, inv_freq=inv_freq, regions=regions, scale=scale)
    return found


def seconds_of(attend: Variant, *given: torch.Tensor) -> float:
    start = time.process_time()
    attend(*given)
    return time.process_time() - start


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    lengths = parse_lengths(args.lengths)
    if min(lengths) < 2 or args.rounds < 1:
        raise ConfigError(f"lengths {args.lengths}, rounds {args.rounds}: must be at least 2, and at least 1")
    run = {"command": command_line(parser, argv), **provenance("cpu", 0, vars(args))}
    torch.manual_seed(0)
    table = []
    for dtype in (torch.bfloat16, torch.float32):
        for queries, keys in [*((n, n) for n in lengths), (1, max(lengths))]:
            q = torch.randn(1, HEADS, queries, HEAD_DIM).to(dtype)
            k, v = (torch.randn(1, KV_HEADS, keys, HEAD_DIM).to(dtype) for _ in range(2))
            every = variants(q, k)
            seconds: dict[str, list[float]] = {name: [] for name in every}
            for _ in range(args.rounds if queries > 1 else 10 * args.rounds):
                for name, attend in every.items():
                    seconds[name].append(seconds_of(attend, q, k, v))
            for name, found in seconds.items():
                row = {
                    "metric": "attention", "variant": name, "dtype": str(dtype)[6:], "queries": queries, "length": keys,
                    "threads": torch.get_num_threads(), "rounds": len(found), "seconds": min(found),
                }  # fmt: skip
                if args.output:
                    append_row(args.output, row | {"note": args.note, "provenance": run})
                table.append([row["dtype"], str(queries), str(keys), name, f"{min(found):.4f}"])
            print(f"{row['dtype']}, {queries} of {keys}", file=sys.stderr, flush=True)
    print(format_table(["dtype", "queries", "keys", "attention", "seconds"], table))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
