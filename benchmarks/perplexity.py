"""One pass for all context lengths against one forward per length: time and memory.

    python benchmarks/perplexity.py                       # 64 lengths to 8192, models/tiny-llama-256, yarn:32
    python benchmarks/perplexity.py --max-tokens 4096 --windows 1

The first arm is eval/perplexity.py. The second is the released procedure, restated: for each length and document a
forward that returns all logits, and the loss of transformers. Both read the same weights and the same tokens, in
processes of their own, so that the peak of each one's resident set is its own; imports, tokenization and loading are
not timed. Exit code 1 when a perplexity differs by more than `TOLERANCE`, relatively.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # eval/ is not part of the installed package

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError

TOLERANCE = 1e-5
"""float32 losses, summed in different orders."""

ARMS = ("one pass", "one forward per length")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/perplexity.py", __doc__ or "")
    add = parser.add_argument
    add("-m", "--model", default=os.path.relpath(ROOT / "models" / "tiny-llama-256"), help="default: the embedded one")
    add(
        "--scaling", default="yarn:32", metavar="SPEC", help="one that does not depend on length (default: %(default)s)"
    )
    add("--dataset", metavar="PATH", help="texts (default: the held-out novel of corpus books)")
    add("--max-tokens", type=int, default=8192, metavar="N", help="longest context (default: %(default)s)")
    add("--count", type=int, default=64, metavar="N", help="number of lengths, evenly spaced (default: %(default)s)")
    add("--windows", type=int, default=2, metavar="N", help="windows of the longest context (default: %(default)s)")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--output", default="data/benchmarks/perplexity.jsonl", metavar="FILE", help="default: %(default)s")
    add("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return parser


def lengths_of(args: argparse.Namespace) -> list[int]:
    if args.count < 1 or args.max_tokens % args.count or args.max_tokens // args.count < 2:
        raise ConfigError(f"count {args.count} must divide --max-tokens {args.max_tokens} into steps of 2 or more")
    return [args.max_tokens // args.count * (index + 1) for index in range(args.count)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one arm in this process: seconds, memory, and the perplexity at each length."""
    import numpy as np
    import torch

    import eval.perplexity as evaluator
    from scaled_rope.evaluation.jobs import ModelLoader, model_jobs
    from scaled_rope.evaluation.memory_meter import Meter
    from scaled_rope.evaluation.perplexity_evaluator import is_length_dependent
    from scaled_rope.evaluation.windows import truncated

    lengths = lengths_of(args)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["-m", args.model, "--scaling", args.scaling, "--dtype", args.dtype, "--dataset", args.dataset]
        argv += ["--lengths", ",".join(map(str, lengths)), "--windows", str(args.windows), "--device", "cpu"]
        given = evaluator.build_parser().parse_args([*argv, "--output", str(Path(folder) / "rows.jsonl")])
        ours = evaluator.evaluator_of(given)
        (job,) = model_jobs(given)
        if is_length_dependent(job):
            raise ConfigError(f"scaling {args.scaling!r} depends on the length: each length takes a pass of its own")
        texts, data = ours.prepare(job.model)
        model = ModelLoader(given)(job)

        def one_pass() -> tuple[list[float], int]:
            (whole,) = ours.passes(job, lengths)
            rows = dict(ours.measure(model, job, whole, lengths, lambda tokens: None))
            return [rows[length]["perplexity"] for length in lengths], rows[whole]["peak_memory"]

        def one_forward_per_length() -> tuple[list[float], int]:
            found = []
            for length in lengths:
                losses = []
                for window in truncated(texts, length):
                    ids = torch.from_numpy(texts.ids(window))[None]
                    labels = ids.clone()
                    labels[:, 0] = -100  # the BOS is no target
                    with torch.no_grad():
                        losses.append(float(model(ids, labels=labels).loss))
                found.append(float(np.exp(np.mean(losses))))
            return found, 0

        arms: dict[str, Callable[[], tuple[list[float], int]]] = dict(
            zip(ARMS, (one_pass, one_forward_per_length), strict=True)
        )
        with Meter(torch.device("cpu")) as idle:
            pass
        with Meter(torch.device("cpu")) as meter:
            spent = time.process_time()
            perplexities, peak = arms[args.arm]()
            cpu_seconds = time.process_time() - spent
        peak = max(peak, meter.peak_memory)  # the evaluator starts a meter of its own, which resets this one's peak
    identity = {**job.fields(), "data": data, "threads": torch.get_num_threads()}
    return {
        "identity": identity,
        "result": {
            "seconds": round(meter.seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "peak_memory": peak,
            "peak_memory_above_loaded": peak - idle.peak_memory,
            "perplexity": perplexities,
        },
    }


def run_arm(arm: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run one arm in a process of its own; return its report."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--arm", arm]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise ConfigError(f"arm {arm!r} ended with exit code {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    lengths = lengths_of(args)
    if args.dataset is None:
        from scaled_rope.texts.corpora import fetch

        args.dataset = os.path.relpath(fetch("books", ROOT / "data" / "cache" / "books") / "heldout")
    if args.arm is not None:
        print(json.dumps(measure(args)))
        return 0

    import torch

    from scaled_rope.evaluation.runner import command_line
    from scaled_rope.provenance import provenance
    from scaled_rope.results import append_row

    shared = ["--model", args.model, "--scaling", args.scaling, "--dataset", args.dataset, "--dtype", args.dtype]
    shared += ["--max-tokens", str(args.max_tokens), "--count", str(args.count), "--windows", str(args.windows)]
    reports = {}
    for arm in ARMS:
        reports[arm] = run_arm(arm, shared)
        result = reports[arm]["result"]
        memory = f"peak {result['peak_memory'] / 2**20:.0f} MiB"
        above = f"{result['peak_memory_above_loaded'] / 2**20:.0f} MiB above the loaded model"
        print(
            f"{arm}: {result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of a core), {memory}, {above}", flush=True
        )
    one, many = (reports[arm]["result"] for arm in ARMS)
    pairs = zip(one["perplexity"], many["perplexity"], strict=True)
    difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    # Per document the second arm does sum(L) of the work that is linear in the length and sum(L²) of attention's; the
    # first does that of the longest length alone.
    linear = sum(lengths) / lengths[-1]
    quadratic = sum(length**2 for length in lengths) / lengths[-1] ** 2
    ratios = {
        "time": many["seconds"] / one["seconds"],
        "cpu_time": many["cpu_seconds"] / one["cpu_seconds"],
        "peak_memory": many["peak_memory"] / one["peak_memory"],
        "peak_memory_above_loaded": many["peak_memory_above_loaded"] / max(1, one["peak_memory_above_loaded"]),
        "work_linear_in_length": linear,
        "work_quadratic_in_length": quadratic,
    }
    above = f"above the loaded model ÷ {ratios['peak_memory_above_loaded']:.1f}"
    print(f"time ÷ {ratios['time']:.1f} (of a core ÷ {ratios['cpu_time']:.1f})")
    print(f"peak memory ÷ {ratios['peak_memory']:.2f} ({above})")
    print(f"largest relative difference of {len(lengths)} perplexities: {difference:.1e}")
    print(
        f"the work shrinks by {linear:.1f} where it is linear in the length and by {quadratic:.1f} in attention; "
        "so no time ratio above that comes from skipping lengths"
    )
    row = {
        "metric": "one pass against one forward per length",
        **reports[ARMS[0]]["identity"],
        "lengths": lengths,
        "arms": {arm: reports[arm]["result"] for arm in ARMS},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "largest_relative_difference": difference,
        "provenance": {"command": command_line(parser, argv), **provenance(torch.device("cpu"), None, vars(args))},
    }
    append_row(args.output, row)
    print(f"row: {args.output}")
    return 0 if difference < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
