"""PyTorch's flex_attention beside attention of our own, in seconds of one layer of SmolLM2's shape on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/flex_attention.py
    OMP_NUM_THREADS=1 python benchmarks/flex_attention.py --lengths 2048 --dtypes float32 --cases window --output ""
    python benchmarks/flex_attention.py --table             # the table of docs/performance.md from the rows

Three ways for each case: ours (`sdpa_blocked` for windows and documents, `region_attention` for methods that change
attention), compiled flex_attention, and for windows and documents PyTorch's sdpa with a mask of T x T. Each result is
first compared with the same attention in float64; what is off is not timed. Times are seconds of the processor, the
least of some rounds in which the ways take turns; making a mask and compiling are timed apart, once. A C++ compiler is
needed, which takes some 15 seconds for each shape.

Methods that change attention need other rotations of query and key in each region, while a score_mod only sees a
finished score. On a GPU, two calls of flex_attention could be merged by the log-sum-exps that it returns; on a CPU it
returns none. So here one call gets the keys once for each of R regions, in R x T places, and heads R times as wide: a
query has all R rotations side by side, a key its own rotation and zeros. The block mask leaves out what no query of a
block sees.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import check_names
from scaled_rope import RopeScaling, compute_rope
from scaled_rope.attention.backends import blocked_sdpa
from scaled_rope.attention.methods import attention_regions
from scaled_rope.attention.regions import Regions, region_attention, rotated
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.runner import command_line
from scaled_rope.flags.shared import parse_lengths
from scaled_rope.provenance import provenance
from scaled_rope.results import Row, append_row, read_rows

ROWS = ROOT / "data" / "benchmarks" / "flex_attention_cpu.jsonl"
HEADS, KV_HEADS, HEAD_DIM, DOCUMENTS = 9, 3, 64, 8
# Outputs are means of values of some 1 with the weights of a softmax. float32: sums of up to 8192 products. bfloat16:
# what both round, scores aside, are weights and results, by 2^-9 each.
TOLERANCE = {"float32": 5e-5, "bfloat16": 3e-2}
BOTH = "ours", "flex_attention"
"""The ways of which the faster is bold."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, H, T, D], k and v [1, K, T, D] -> [1, H, T, D]."""


@dataclass
class Ways:
    """One case at one length: the same attention in several ways."""

    exact: Attend
    ours: Attend
    flex: Attend
    masked: Attend | None
    """sdpa with a mask of T x T; None where no mask says it."""
    make_mask: Callable[[], BlockMask]
    """Makes flex_attention's mask, without the one that is kept."""


# ------------------------------------------------------------------------------------------------------------- cases


def document_starts(length: int) -> Tensor:
    """First token of each of some documents of growing lengths."""
    shares = torch.arange(1, DOCUMENTS + 1).double()
    ends = (shares.cumsum(0) / shares.sum() * length).round().long()
    return torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])


def window_ways(length: int, call: Any) -> Ways:
    """A sliding window of an eighth of the length."""
    window = max(1, length // 8)
    positions = torch.arange(length)[None]
    at = torch.arange(length)
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    options = {"sliding_window": window, "position_ids": positions}
    return masked_ways(length, lambda b, h, i, j: (j <= i) & (j > i - window), seen, options, call)


def document_ways(length: int, call: Any) -> Ways:
    """Documents that are packed into a row."""
    starts = document_starts(length)
    at = torch.arange(length)
    document = torch.bucketize(at, starts, right=True)
    seen = (at <= at[:, None]) & (document == document[:, None])
    options = {"position_ids": (at - starts[document - 1])[None]}
    return masked_ways(length, lambda b, h, i, j: (j <= i) & (document[i] == document[j]), seen, options, call)


def masked_ways(length: int, visible: Any, seen: Tensor, options: dict[str, Any], call: Any) -> Ways:
    module = nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS  # type: ignore[assignment]
    make_mask = partial(create_block_mask, visible, None, None, length, length, device="cpu")
    kept = cache(make_mask)
    masked = partial(scaled_dot_product_attention, attn_mask=seen, enable_gqa=True)
    return Ways(
        exact=lambda q, k, v: masked(q.double(), k.double(), v.double()),
        ours=lambda q, k, v: blocked_sdpa(module, q, k, v, None, **options)[0].transpose(1, 2),
        flex=lambda q, k, v: call(q, k, v, block_mask=kept(), enable_gqa=True),
        masked=masked,
        make_mask=make_mask,
    )


def region_ways(spec: str, length: int, call: Any) -> Ways:
    """A method that changes attention, extending a model of an eighth of the length."""
    trained = length // 8
    base = RopeScaling("default", original_max_position_embeddings=trained, rope_theta=1e4)
    inv_freq = compute_rope(base, HEAD_DIM)[0]
    regions = attention_regions(RopeScaling.from_spec(spec.format(half=trained // 2, most=trained * 3 // 4), base))
    make_mask = partial(region_mask, regions, length)
    kept = cache(make_mask)
    ours = partial(region_attention, inv_freq=inv_freq, regions=regions, scale=HEAD_DIM**-0.5)
    return Ways(
        exact=lambda q, k, v: ours(q.double(), k.double(), v.double(), inv_freq=inv_freq.double()),
        ours=ours,
        flex=lambda q, k, v: flex_regions(q, k, v, inv_freq, regions, HEAD_DIM**-0.5, kept(), call),
        masked=None,
        make_mask=make_mask,
    )


CASES: dict[str, Callable[[int, Any], Ways]] = {
    "window": window_ways,
    "documents": document_ways,
    "rerope": partial(region_ways, "rerope,window={half}"),
    "self-extend": partial(region_ways, "self-extend,group=16,window={half}"),
    "dual-chunk": partial(region_ways, "dual-chunk,chunk={most}"),
}


# ------------------------------------------------------------------------------------------- regions by flex_attention


def region_mask(regions: Regions, length: int) -> BlockMask:
    """Which of R x T keys each of T queries sees: of a region's T keys those that lie in it."""
    near_to_far = regions.near_to_far

    def visible(b: Tensor, h: Tensor, i: Tensor, place: Tensor) -> Tensor:
        j = place % length
        stop, found = i + 1, place < 0
        for index, region in enumerate(near_to_far):
            start = region.start(i)
            found = found | ((place // length == index) & (j >= start) & (j < stop))
            stop = start
        return found

    return create_block_mask(visible, None, None, length, len(near_to_far) * length, device="cpu")


def flex_regions(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, regions: Regions, scale: float, mask: BlockMask, call: Any
) -> Tensor:
    """`region_attention` of all T queries, without gradients, by one call of flex_attention.

    Args:
        q: [B, H, T, D], not rotated.
        k, v: [B, K, T, D] and [B, K, T, V].
        mask: `region_mask` of these regions and T.
        call: flex_attention, compiled or not.
    """
    positions = torch.arange(q.shape[2])
    near_to_far, width = regions.near_to_far, q.shape[-1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys = q.to(exact), k.to(exact)
    if regions.temperature is not None:
        queries = queries * regions.temperature(positions).to(exact)[:, None]
    asking = [rotated(queries, region.query(positions), inv_freq.to(exact), False) for region in near_to_far]
    seen = k.new_zeros(*k.shape[:2], len(near_to_far), k.shape[2], len(near_to_far) * width)
    for index, region in enumerate(near_to_far):
        turned = rotated(keys, region.key(positions), inv_freq.to(exact), False)
        seen[:, :, index, :, index * width : (index + 1) * width] = turned.to(k.dtype)
    values = v[:, :, None].expand(-1, -1, len(near_to_far), -1, -1).flatten(2, 3)
    wide = torch.cat(asking, dim=-1).to(q.dtype)
    out: Tensor = call(wide, seen.flatten(2, 3), values, block_mask=mask, scale=scale, enable_gqa=True)
    return out


# ---------------------------------------------------------------------------------------------------------- measuring


def heads(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(dtype)
    k, v = (torch.randn(1, KV_HEADS, length, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    return q, k, v


def measure(case: str, length: int, dtype: str, rounds: int, call: Any) -> list[Row]:
    """A row for each way, with "seconds" only where its result is right."""
    ways = CASES[case](length, call)
    given = heads(length, getattr(torch, dtype))
    start = time.process_time()
    ways.make_mask()
    mask_seconds = time.process_time() - start
    wanted = ways.exact(*given)
    functions = {"ours": ways.ours, "flex_attention": ways.flex, "sdpa with a mask": ways.masked}
    rows: dict[str, Row] = {}
    right: dict[str, Attend] = {}
    for name, attend in functions.items():
        if attend is None:
            continue
        start = time.perf_counter()
        error = float((attend(*given).double() - wanted).abs().max())
        first = time.perf_counter() - start
        rows[name] = {
            "metric": "flex_attention", "case": case, "way": name, "dtype": dtype, "length": length,
            "threads": torch.get_num_threads(), "error": error,
        }  # fmt: skip
        if name == "flex_attention":
            # The first call compiles, on the clock: the compiler is another process.
            rows[name] |= {"mask_seconds": mask_seconds, "first_call_seconds": first}
        if error <= TOLERANCE[dtype]:
            right[name] = attend
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for _ in range(rounds):
        for name, attend in right.items():
            start = time.process_time()
            attend(*given)
            seconds[name].append(time.process_time() - start)
    for name, found in seconds.items():
        rows[name] |= {"rounds": rounds, "seconds": min(found)}
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """In Markdown: a line per case and dtype, the last row of each, with the faster of ours and flex_attention bold."""
    last = {(row["case"], row["dtype"], row["length"], row["way"]): row for row in rows}
    lengths = sorted({row["length"] for row in rows})
    lines = [
        f"| | {' | '.join(f'{length:,} tokens' for length in lengths)} | mask, once | first call |",
        f"|---|{'---|' * len(lengths)}---|---|",
    ]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        cells, measured = [], [row["length"] for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        for length in lengths:
            found = [last.get((case, dtype, length, way)) for way in (*BOTH, "sdpa with a mask")]
            times = [row.get("seconds") for row in found[:2] if row]
            least = min((one for one in times if one is not None), default=None)
            said = [
                cell(row.get("seconds"), row["way"] in BOTH and row.get("seconds") == least) for row in found if row
            ]
            cells.append(", ".join(said) or "not measured")
        longest = last[case, dtype, max(measured), "flex_attention"]
        cells += [f"{longest['mask_seconds']:.1f}", f"{longest['first_call_seconds']:.0f}"]
        lines.append(f"| {case}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(seconds: float | None, is_least: bool = False) -> str:
    text = "wrong" if seconds is None else f"{seconds:.3f}"
    return f"**{text}**" if is_least else text


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/flex_attention.py", __doc__ or "")
    add = parser.add_argument
    add("--lengths", default="2048,4096,8192", metavar="N,...", help="tokens, 64 or more (default: %(default)s)")
    add("--dtypes", default="float32,bfloat16", metavar="NAME,...", help="default: %(default)s")
    add("--cases", default=",".join(CASES), metavar="NAME,...", help="default: %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="timings of each way (default: %(default)s)")
    add("--table", action="store_true", help="print the table of the rows and measure nothing")
    add("--note", default="", help="what else to say in the rows, such as who shared the machine")
    add("--output", metavar="FILE", default=str(ROWS.relative_to(ROOT)), help="'' for none (default: %(default)s)")
    return parser


@torch.inference_mode()
def main(argv: Sequence[str] | None = None, call: Any = None) -> int:
    """Measure what the flags say; exit code 1 when a result was wrong. call: in place of compiled flex_attention."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.table:
        print(table(read_rows(args.output)))
        return 0
    lengths, dtypes, cases = parse_lengths(args.lengths), args.dtypes.split(","), args.cases.split(",")
    check_names("dtype", dtypes, TOLERANCE)
    check_names("case", cases, CASES)
    if min(lengths) < 64 or args.rounds < 1:
        raise ConfigError(f"lengths {args.lengths}, rounds {args.rounds}: must be at least 64, and at least 1")
    run = {"command": command_line(parser, argv), **provenance("cpu", 0, vars(args))}
    bad = 0
    for length in lengths:
        for dtype in dtypes:
            for case in cases:
                torch._dynamo.reset()  # or it would give up compiling after some shapes
                compiled = torch.compile(flex_attention, dynamic=False) if call is None else call
                for row in measure(case, length, dtype, args.rounds, compiled):
                    bad += "seconds" not in row
                    said = f"{row['seconds']:.4f} s" if "seconds" in row else "wrong, not timed"
                    print(f"{case}, {length}, {dtype}, {row['way']}: {said}, error {row['error']:.1e}", flush=True)
                    if args.output:
                        append_row(args.output, row | {"note": args.note, "provenance": run})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
