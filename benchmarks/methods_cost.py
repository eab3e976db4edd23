"""Time and memory of every method on one model, beside plain attention.

    python benchmarks/methods_cost.py                          # the embedded model at 2, 4 and 8 times its length
    python benchmarks/methods_cost.py --factors 8 --rounds 1 --output ""
    python benchmarks/methods_report.py                        # the columns of docs/methods.md, from the rows

On the CPU, by one thread, at s·L tokens of random ids and one text at a time. A row has, of one scaling:

- `seconds`: a pass over the whole text with a new cache; logits of its last token only.
- `seconds_per_token`: a decoding step at the end of that text, the mean of 16.
- `memory`: the most bytes that the pass holds beyond what was there before it, its cache included.

Seconds are the processor's and not the clock's, so other programs on the machine count less. All scalings take turns,
and the least of each is kept. Memory is measured afterwards, with an allocator that returns at once what is freed: each
allocation takes longer then, and what is resident is exact. A row that is there is not measured again.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import ROOT, check_names, resident_bytes
from benchmarks.methods import FACTORS, ROWS, STUDIES, Study
from scaled_rope import patch_model
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.memory_meter import Meter
from scaled_rope.evaluation.runner import command_line
from scaled_rope.patching.cache_argument import cache_name, returned_cache
from scaled_rope.patching.loading import load_model
from scaled_rope.progress import Progress
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row, rows_so_far

Costs = dict[str, dict[str, float]]
STEPS = 16
"""Tokens that are decoded."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
PAGE = 4096


def return_what_is_freed() -> None:
    """From now on memory that is freed is no longer resident, up to what is smaller than a page.

    Raises:
        ConfigError: the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        raise ConfigError("the memory of methods is measured on Linux with glibc only")
    for option, value in ((M_MMAP_THRESHOLD, PAGE), (M_TRIM_THRESHOLD, 0), (M_TOP_PAD, 0)):
        libc.mallopt(option, value)
    libc.malloc_trim(0)


def times(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Processor seconds of a pass over all but the last tokens of a text, and of a decoding step over each of those."""
    name = cache_name(model)
    start = time.process_time()
    cache = returned_cache(model(ids[:, :-STEPS], use_cache=True, logits_to_keep=1))
    whole = time.process_time() - start
    start = time.process_time()
    for token in ids[0, -STEPS:]:
        cache = returned_cache(model(token.view(1, 1), use_cache=True, **{name: cache}))
    return {"seconds": whole, "seconds_per_token": (time.process_time() - start) / STEPS}


def memory(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Bytes that a pass over a text holds at most, beyond what was resident before."""
    gc.collect()
    before = resident_bytes()[0]
    with Meter() as meter:
        model(ids, use_cache=True, logits_to_keep=1)
    return {"memory": max(meter.peak_memory - before, 0)}


Measure = Callable[[Any, torch.Tensor], dict[str, float]]


def least(model: Any, ids: torch.Tensor, specs: Sequence[str], rounds: int, measure: Measure, said: str) -> Costs:
    """The least of `rounds` of each number, by scaling; `said` is what the progress bar says."""
    found: Costs = {spec: {} for spec in specs}
    with torch.inference_mode(), Progress(total=(rounds + 1) * len(specs), unit="passes", desc=said) as bar:
        for turn in range(rounds + 1):  # the first one warms caches and allocator up
            for spec in specs:
                patch_model(model, spec)
                now = measure(model, ids)
                if turn:
                    found[spec] = {key: min(value, found[spec].get(key, value)) for key, value in now.items()}
                bar.update()
    return found


def costs(study: Study, factor: int, specs: Sequence[str], rounds: int) -> Costs:
    """Costs of each scaling at a factor: `seconds`, `seconds_per_token` and `memory` in bytes."""
    model = load_model(str(ROOT / study.model), scaling="default", attn_implementation="sdpa")
    length = study.original * factor
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    found = least(model, ids, specs, rounds, times, f"time at {length} tokens")
    return_what_is_freed()
    held = least(model, ids, specs, 1, memory, f"memory at {length} tokens")
    return {spec: found[spec] | held[spec] for spec in specs}


def _pending(study: Study, factor: int, output: str) -> list[str]:
    """The scalings that have no row yet."""
    there = {
        row["spec"]
        for row in (rows_so_far(output) if output else [])
        if row["metric"] == "cost" and row["model"] == study.model and row["length"] == study.original * factor
    }
    return [spec for spec in study.specs(factor) if spec not in there]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/methods_cost.py", __doc__)
    add = parser.add_argument
    add("--model", default="tiny-llama-256", metavar="NAME", help=f"{', '.join(STUDIES)} (default %(default)s)")
    add("--factors", default="2,4,8", metavar="A,B", help="of 2, 4, 8 (default %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="how often each is measured (default %(default)s)")
    add("--note", default="", help="what else to say in the rows, such as who shared the machine")
    add("--output", default=str(ROWS), metavar="FILE",
        help=f"rows are appended here, '' for none (default {ROWS.relative_to(ROOT)})")  # fmt: skip
    args = parser.parse_args(argv)
    check_names("model", [args.model], STUDIES)
    chosen = args.factors.split(",")
    check_names("factor", chosen, [str(factor) for factor in FACTORS])
    if args.rounds < 1:
        raise ConfigError(f"rounds {args.rounds} is not allowed; at least 1")
    torch.set_num_threads(1)
    for factor in map(int, chosen):
        study = STUDIES[args.model]
        specs = _pending(study, factor, args.output)
        run = {"command": command_line(parser, argv), **provenance("cpu", 0, vars(args))}
        for spec, found in costs(study, factor, specs, args.rounds).items() if specs else ():
            row = {
                "metric": "cost", "model": study.model, "spec": spec, "length": study.original * factor,
                "dtype": "float32", "threads": 1, "rounds": args.rounds, **found,
            }  # fmt: skip
            print(
                f"{spec}: {found['seconds']:.3f} s, {1e3 * found['seconds_per_token']:.2f} ms a token,"
                f" {found['memory'] / 2**20:.1f} MiB"
            )
            if args.output:
                append_row(args.output, row | {"note": args.note, "provenance": run})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
