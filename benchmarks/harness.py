"""Benchmarks by eval/harness.py's model against lm-eval's own `hf`: time, and the answers one by one.

    python benchmarks/harness.py -m models/smollm2-135m --tasks hellaswag --offline --limit 40
    python benchmarks/harness.py -m models/smollm2-135m --tasks niah_single_1,ruler_cwe --lengths 4096 --limit 3

Both are asked the same prompts, through lm-eval, about the same unscaled weights, each in a process of its own; only
the time in which the model answers is measured, as processor time and as elapsed time. Exit code 1 when an answer
differs: a generated text, which of several endings is the likeliest, whether an ending is what greedy decoding gives,
or a log-likelihood by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # eval/ is not part of the installed package

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.flags.shared import check_least, parse_lengths

ARMS = ("scaled-rope", "hf")
TOLERANCE = 2e-3
"""Nats per token that float32 sums in another order explain, of log-likelihoods that are sums over some tokens."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/harness.py", __doc__ or "")
    add = parser.add_argument
    add("-m", "--model", default="models/tiny-llama-256", help="default: the embedded one")
    add("--tasks", required=True, metavar="T1,T2,...", help="as for eval/harness.py")
    add("--lengths", metavar="L1,L2,...", help="as for eval/harness.py")
    add("--limit", type=int, default=3, metavar="N", help="samples per task, or per length (default %(default)s)")
    add("--num-fewshot", type=int, metavar="N", help="as for eval/harness.py")
    add("--offline", action="store_true", help="as for eval/harness.py")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--hf-batch-size", type=int, default=1, metavar="N", help="of the arm hf (default: lm-eval's own, %(default)s)")
    add("--output", default="data/benchmarks/harness.jsonl", metavar="FILE", help="default: %(default)s")
    add("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return parser


def check_arguments(args: argparse.Namespace) -> list[int] | None:
    """Check the flags and return the lengths."""
    check_least(args, limit=1, hf_batch_size=1)
    return None if args.lengths is None else parse_lengths(args.lengths)


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure one arm in this process: for each task, its time and the answers to its requests in order."""
    import importlib

    from scaled_rope.checkpoint import load_tokenizer
    from scaled_rope.evaluation.lm_eval_tasks import Catalogue, UnbuiltUnit, model_class
    from scaled_rope.evaluation.task_presets import expand
    from scaled_rope.patching.loading import load_model

    lengths = check_arguments(args)
    catalogue = Catalogue(offline=args.offline, lengths=lengths, limit=args.limit)
    units = catalogue.units(expand(args.tasks.split(",")), args.model, args.num_fewshot)
    model, tokenizer = load_model(args.model, dtype=args.dtype, device="cpu"), load_tokenizer(args.model)
    given = {"pretrained": model, "tokenizer": tokenizer}
    if args.arm == "hf":
        kind = importlib.import_module("lm_eval.models.huggingface").HFLM
        lm: Any = kind(**given, backend="causal", batch_size=args.hf_batch_size)
        lm.truncated = 0  # our own count
    else:
        lm = model_class()(**given, hide_progress=True)
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        if isinstance(unit, UnbuiltUnit):
            raise ConfigError(f"task {unit.name!r}: {'; '.join(unit.reasons.values())}")
        one: dict[str, Any] = {"seconds": 0.0, "cpu_seconds": 0.0, "answers": []}
        for kind_of_request in ("loglikelihood", "generate_until"):
            setattr(lm, kind_of_request, _timed(getattr(type(lm), kind_of_request).__get__(lm), one))
        unit.measure(lm)
        found[unit.name] = one
    return found


def _timed(ask: Any, record: dict[str, Any]) -> Any:
    """A method of a model for lm-eval that adds its time and its answers to `record`."""

    def asked(requests: Any, *more: Any, **options: Any) -> Any:
        elapsed, spent = time.perf_counter(), time.process_time()
        answers = ask(requests, *more, **options)
        record["seconds"] += time.perf_counter() - elapsed
        record["cpu_seconds"] += time.process_time() - spent
        for request, answer in zip(requests, answers, strict=True):
            tokens = 1 if isinstance(answer, str) else max(1, len(request.args[1].split()))
            record["answers"].append([request.doc_id, tokens, answer])
        return answers

    return asked


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> list[str]:
    """Say in which answers two arms differ."""
    told = []
    likeliest: list[dict[int, list[float]]] = [{}, {}]
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        document, tokens, answer = one
        if isinstance(answer, str):
            if answer != other[2]:
                told.append(f"sample {document}: {answer!r}, {other[2]!r}")
            continue
        for found, (value, _) in zip(likeliest, (answer, other[2]), strict=True):
            found.setdefault(document, []).append(value)
        if abs(answer[0] - other[2][0]) > TOLERANCE * tokens or answer[1] != other[2][1]:
            told.append(f"request {index} of sample {document}: {answer}, {other[2]}")
    for document, values in likeliest[0].items():
        if values.index(max(values)) != (again := likeliest[1][document]).index(max(again)):
            told.append(f"sample {document}: the likeliest of {values}, of {again}")
    return told


def run_arm(args: argparse.Namespace, arm: str) -> dict[str, dict[str, Any]]:
    """Measure one arm in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        given = {**vars(args), "arm": arm, "output": str(output)}
        argv = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
                for name, value in given.items() if value is not None and value is not False]  # fmt: skip
        result = subprocess.run([sys.executable, __file__, *argv], cwd=ROOT)
        if result.returncode:
            raise ConfigError(f"the arm {arm} failed; its own message is above")
        found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    from scaled_rope.files import write_atomic
    from scaled_rope.provenance import portable_command, portable_model, provenance
    from scaled_rope.results import append_row

    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(args)
    if args.arm is not None:
        write_atomic(args.output, json.dumps(measure(args)))
        return 0
    ours, theirs = (run_arm(args, arm) for arm in ARMS)
    import torch

    command = portable_command(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    record = {"command": command, **provenance(torch.device("cpu"), None, {"threads": torch.get_num_threads()})}
    code = 0
    for task, one in ours.items():
        told = differences(one["answers"], theirs[task]["answers"])
        seconds = {arm: {key: round(found[task][key], 2) for key in ("seconds", "cpu_seconds")}
                   for arm, found in zip(ARMS, (ours, theirs), strict=True)}  # fmt: skip
        ratio = theirs[task]["cpu_seconds"] / one["cpu_seconds"]
        samples = len({document for document, _, _ in one["answers"]})
        row = {"benchmark": "harness", "model": portable_model(args.model), "task": task, "lengths": args.lengths,
               "dtype": args.dtype, "samples": samples, "requests": len(one["answers"]), **seconds,
               "ratio": round(ratio, 3), "different": told, "provenance": record}  # fmt: skip
        append_row(args.output, row)
        said = f"{len(told)} answers differ" if told else "same answers"
        times = f"{one['cpu_seconds']:.1f} s against {theirs[task]['cpu_seconds']:.1f} s of processor time by hf"
        print(f"{task}: {times}, {ratio:.2f} times as fast; {len(one['answers'])} requests, {said}")
        for line in told:
            print(f"  {line}", file=sys.stderr)
            code = 1
    print(f"rows: {args.output}")
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
