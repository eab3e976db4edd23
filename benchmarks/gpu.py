"""The rotary kernel and whole models on one GPU: is it right, how fast is it, how near to what the hardware allows.

    python benchmarks/gpu.py --part rotary       # also: rotary-backward, decode, attention, prefill, train; < 9 minutes
    python benchmarks/gpu.py --part train        # again: goes on where the time was up
    python benchmarks/gpu.py --interpret                # correctness alone, on the CPU, in Triton's interpreter
    python benchmarks/gpu_report.py                     # tables and plots for docs/performance.md from the rows

Needs torch, triton and transformers; Liger and flash-attn are measured where they can be imported.

Every variant is first compared with float64 on fresh random inputs, its outputs landing in memory that was filled with
NaN; one that is wrong is not timed. Timings rotate among buffers of more than the L2 cache, in a CUDA graph where a
call is short, and are medians with quartiles. Bandwidth counts q and k, read once and written once, whatever else a
variant moves, and stands beside a device-to-device copy of as many bytes, timed in the same way in the same run.

Exit code 1 when a variant of ours is wrong, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a GPU image need not have the package installed

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.results import Row, append_row, provenance

PARTS = ("rotary", "rotary-backward", "decode", "attention", "prefill", "train")
OUTPUT = ROOT / "benchmarks" / "results" / "gpu.jsonl"


def build_parser() -> Parser:
    parser = Parser("benchmarks/gpu.py", __doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to measure (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit of each part (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows are appended here (default: %(default)s)")
    parser.add_argument("--commit", help="what to note as the commit where the source is no repository")
    parser.add_argument("--interpret", action="store_true", help="correctness alone, on the CPU, in the interpreter")
    return parser


def rows_of(part: str, args: argparse.Namespace, about: Row) -> Iterator[Row]:
    """Yield the rows of one part as they are measured; of `train`, only those that the output lacks."""
    from benchmarks.gpu_parts.timing import Clock

    module, clock = importlib.import_module(f"benchmarks.gpu_parts.{part.replace('-', '_')}"), Clock(60 * args.minutes)
    rows: Iterator[Row]
    if part == "train":
        rows = module.measure(clock, module.training_rows(args.output, about))
    else:
        rows = module.measure(clock)
    return rows


def measure(args: argparse.Namespace) -> int:
    """Measure the parts that were asked for, a row at a time. Returns 1 when a variant of ours is wrong."""
    import torch

    from benchmarks.gpu_parts.rows import WRONG, machine, show
    from benchmarks.gpu_parts.timing import DEVICE

    # Compiled backward passes that give their buffers away can run once only.
    torch._functorch.config.donated_buffer = False
    torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    torch.manual_seed(0)
    source = provenance(DEVICE, 0, vars(args))
    source["commit"] = source["commit"] or args.commit
    about = source | machine()
    wrong = 0
    for part in PARTS if args.part == "all" else (args.part,):
        for row in rows_of(part, args, about):
            wrong += row.get("skipped") == WRONG and str(row.get("variant", "ours")).startswith("ours")
            print(show(row), flush=True)
            append_row(args.output, row | about)
    return int(wrong > 0)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.interpret:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("--interpret needs triton: pip install 'scaled-rope[kernels]'")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is first imported
        from benchmarks.gpu_parts.interpret import interpret

        return interpret()
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("no GPU here, nothing was measured; --interpret checks the kernels on the CPU")
    return measure(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
