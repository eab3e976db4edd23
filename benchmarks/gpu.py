"""The rotary kernel and whole models on one GPU: is it right, how fast is it, how near to what the hardware allows.

    benchmarks/gpu_first.sh OUT                  # the most telling rows in five minutes; then benchmarks/gpu_second.sh
    python benchmarks/gpu.py --part rotary       # one part whole: also rotary-backward, decode, attention, prefill, ...
    python benchmarks/gpu.py --part train        # again: goes on where the time was up
    python benchmarks/gpu.py --plan first --dry --output rows.jsonl    # the same code on the CPU, at tiny sizes
    python benchmarks/gpu.py --interpret                # correctness alone, on the CPU, in Triton's interpreter
    python benchmarks/gpu_report.py                     # tables and plots for docs/performance.md from the rows

Needs torch, triton, transformers and einops; Liger and flash-attn are measured where they can be imported.

Every variant is first compared with float64 on fresh random inputs, its outputs landing in memory that was filled with
NaN; one that is wrong is not timed. Timings rotate among buffers of more than the L2 cache, in a CUDA graph where a
call is short, and are medians with quartiles. Bandwidth counts q and k, read once and written once, whatever else a
variant moves, and stands beside a device-to-device copy of as many bytes, timed in the same way in the same run.

A run that is repeated measures what is missing, and again what failed of ours. After an error by which this process
loses the GPU, as an illegal memory access, a new one goes on with the next case.

Exit code 1 when a variant of ours is wrong or fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a GPU image need not have the package installed

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.provenance import provenance
from scaled_rope.results import Row, append_row, rows_so_far

PARTS = ("correctness", "copies", "rotary", "rotary-backward", "decode", "attention", "prefill", "train", "sweep")
PLANS = ("first", "second")
STARTED = time.monotonic()
OUTPUT = ROOT / "benchmarks" / "results" / "gpu.jsonl"


def build_parser() -> Parser:
    parser = Parser("benchmarks/gpu.py", __doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to measure (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit of each part (default: %(default)s)")
    parser.add_argument("--plan", choices=PLANS, help="parts and sizes of a script, in place of --part and --minutes")
    parser.add_argument("--seconds", type=float, default=285, help="time limit of a plan (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in the interpreter, at tiny sizes")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows are appended here (default: %(default)s)")
    parser.add_argument("--commit", help="what to note as the commit where the source is no repository")
    # What a run that lost the GPU says to the one that it starts in its place.
    parser.add_argument("--failed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--interpret", action="store_true", help="correctness alone, on the CPU, in the interpreter")
    return parser


def parts_of(args: argparse.Namespace) -> list[tuple[str, Callable[[], float], Callable[..., Iterator[Row]]]]:
    """The name of each part that was asked for, its time limit in seconds, asked when it begins, and its function."""
    from benchmarks.gpu_parts.plan import PLANS

    if args.plan is not None:
        # The limit is for the whole script: importing torch and starting the GPU are part of it.
        parts, end = PLANS[args.plan](), STARTED + args.seconds

        def share(index: int) -> float:
            rest = sum(part.share for part in parts[index:])
            return (end - time.monotonic()) * parts[index].share / rest

        return [(part.name, functools.partial(share, index), part.measure) for index, part in enumerate(parts)]
    names = PARTS if args.part == "all" else (args.part,)
    modules = [importlib.import_module(f"benchmarks.gpu_parts.{name.replace('-', '_')}") for name in names]
    return [(name, lambda: 60 * args.minutes, module.measure) for name, module in zip(names, modules, strict=True)]


def measure(args: argparse.Namespace) -> int:
    """Measure the parts that were asked for, a row at a time. Returns 1 when a variant of ours is wrong or fails."""
    import torch

    from benchmarks.common import gpu_is_lost
    from benchmarks.gpu_parts import dry
    from benchmarks.gpu_parts.rows import KNOWN, NO_TIME, GpuLost, is_bad, key, known_rows, machine, show, source_hash
    from benchmarks.gpu_parts.timing import DEVICE, Clock

    # Compiled backward passes that give their buffers away can run once only.
    torch._functorch.config.donated_buffer = False
    torch.manual_seed(0)
    if args.dry:
        dry.stand_in()
        dry.shrink()
        about = provenance("cpu", 0, vars(args)) | dry.machine()
    else:
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
        about = provenance(DEVICE, 0, vars(args)) | machine()
    about["commit"] = about["commit"] or args.commit
    about["source"] = source_hash()
    done = known_rows(rows_so_far(args.output), about, args.failed is not None)
    bad = args.failed or 0
    for name, limit, rows in parts_of(args):
        if name in args.without:
            continue
        clock = Clock(limit(), done)
        print(f"# {name}: {clock.left:.0f} s", flush=True)
        try:
            for row in rows(clock):
                # A part without time must not hide what was measured before.
                if row.get("skipped") == KNOWN or (row.get("skipped") == NO_TIME and key(row) in done):
                    continue
                bad += is_bad(row)
                print(show(row), flush=True)
                append_row(args.output, row | about)
                if row.get("skipped") != NO_TIME:
                    done.add(key(row))
        except GpuLost as lost:
            print(show(lost.row), flush=True)
            append_row(args.output, lost.row | about)
            _begin_again(args, None, bad + is_bad(lost.row))
        except Exception as problem:  # a part that breaks off must not take those after it along
            bad += 1
            said = [*str(problem).splitlines(), ""][0][:200]
            print(f"# {name}: broke off, {type(problem).__name__}: {said}", flush=True)
            if gpu_is_lost(problem):
                _begin_again(args, name, bad)
    print(f"# {time.monotonic() - STARTED:.0f} s in all", flush=True)
    return int(bad > 0)


def _begin_again(args: argparse.Namespace, part: str | None, bad: int) -> NoReturn:
    """Go on in a new process after the GPU was lost, without a part that broke off outside of its cases.

    bad: how many variants of ours have been wrong or failed so far.
    """
    from benchmarks.common import start_again

    left = max(0.0, STARTED + args.seconds - time.monotonic())
    without = args.without if part is None else [*args.without, part]
    print(f"# the GPU is lost to this process; a new one goes on, {left:.0f} s", flush=True)
    start_again(build_parser().repeat(argparse.Namespace(**{
        **vars(args), "seconds": left, "failed": bad, "without": without,
    }))[1:])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.interpret:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("--interpret needs triton: pip install 'scaled-rope[kernels]'")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is first imported
        from benchmarks.gpu_parts.interpret import interpret

        return interpret()
    if args.dry:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("--dry needs triton: pip install 'scaled-rope[kernels]'")
        os.environ["TRITON_INTERPRET"] = "1"
        return measure(args)
    # On one GPU: the Trainer of transformers would take all there are.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "no GPU here, nothing was measured; --interpret checks the kernels on the CPU, --dry runs everything there"
        )
    return measure(args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
