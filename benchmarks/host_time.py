"""Host time of a rotary call of few tokens, on a machine without a GPU.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py
    python benchmarks/host_time.py --tokens 1 --rounds 3 --calls 300 --output ""
    python benchmarks/host_time.py --table            # the table of docs/performance.md from the rows

On a GPU a call for one token is over in microseconds, so what Python does before the launch decides. Here the kernel is
compiled for an H100, and a driver that launches nothing stands in for the GPU's, so that a call takes every step but
the launch itself. Times are microseconds of the processor for one call: the least median of the rounds. Tensors lie in
the CPU's memory, which nothing reads; their device is therefore not compared with the current one, which takes some
tenths of a microsecond. Two empty outputs are what any call has to pay that does not work in place. The function of
transformers launches no kernel of ours, so it computes as well; for one token that is a small part of its time.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.common import check_names
from scaled_rope import RopeScaling, compute_rope
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.runner import command_line
from scaled_rope.flags.shared import parse_lengths
from scaled_rope.kernels import apply_rotary, apply_rotary_from_frequencies, frequency_phases, rotary
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row, read_rows

ROWS = ROOT / "data" / "benchmarks" / "host_time_cpu.jsonl"
SHAPES = {"llama-2": (32, 32), "llama-3": (32, 8)}
"""Query and key heads, of 128 dimensions each."""
EMPTY, EAGER, PLAIN = "two empty outputs", "transformers, eager (computed)", "apply_rotary"


class Driver:
    """Stands in for Triton's driver of an H100: code is compiled, loading and launching do nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.launches = 0
        driver = self

        class Utils:
            @staticmethod
            def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
                return 0, 1, 0, 0, 1024  # module, function, registers, spills, most threads

            @staticmethod
            def get_device_properties(device: int) -> dict[str, int]:
                return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

        class Launcher:
            def __init__(self, *_: Any) -> None:
                pass

            def __call__(self, *_: Any) -> None:
                driver.launches += 1

        self.utils, self.launcher_cls = Utils(), Launcher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def ways(tokens: int, heads: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """The calls that are timed, by name."""
    q, k = (torch.zeros(1, tokens, count, 128, dtype=torch.bfloat16).transpose(1, 2) for count in heads)
    inv_freq, _ = compute_rope(RopeScaling("yarn", 16.0, 4096), head_dim=128)
    angles = torch.arange(4096)[:, None] * inv_freq
    cos, sin, phases = angles.cos(), angles.sin(), frequency_phases(inv_freq)
    ids, by_token = torch.arange(tokens)[None], (cos[None, :tokens], sin[None, :tokens])
    learning = q.clone().requires_grad_()
    full = [torch.cat((part, part), -1).to(q.dtype) for part in by_token]
    return {
        EMPTY: lambda: (torch.empty_like(q), torch.empty_like(k)),
        EAGER: lambda: apply_rotary_pos_emb(q, k, *full),
        PLAIN: lambda: apply_rotary(q, k, cos, sin, offset=100),
        "tables token by token, as in models": lambda: apply_rotary(q, k, *by_token),
        "with position ids": lambda: apply_rotary(q, k, cos, sin, ids),
        "in place": lambda: apply_rotary(q, k, cos, sin, offset=100, inplace=True),
        "from frequencies": lambda: apply_rotary_from_frequencies(q, k, phases, offset=100),
        "by torch's dispatcher": lambda: torch.ops.scaled_rope.rotary(
            q, k, cos, sin, None, None, 100, 1.0, True, False, False, "auto"
        ),
        "with gradients": lambda: apply_rotary(learning, k, cos, sin, offset=100),
    }


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Median processor time of a call, in 9 groups that make up `calls` together."""
    group = max(1, calls // 9)
    times = []
    for _ in range(9):
        begun = time.process_time_ns()
        for _ in range(group):
            call()
        times.append((time.process_time_ns() - begun) / group / 1000)
    return statistics.median(times)


def measure(tokens: int, shape: str, rounds: int, calls: int) -> dict[str, float]:
    """Microseconds of each way. The ways take turns, and the least round of each counts.

    Raises:
        RuntimeError: a way that launched no kernel, or more than one, so that something else was timed.
    """
    import triton

    from scaled_rope.kernels import rotary_triton

    driver = Driver()
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    first = rotary_triton._launch

    def compile_first(found: Any, tensors: Any, numbers: Any) -> None:
        with mock.patch.object(rotary_triton, "_launch", first):
            rotary_triton._launch_known(found, tensors, numbers)

    calls_by_way = ways(tokens, SHAPES[shape])
    with mock.patch.object(rotary, "kernel_backend", lambda device=None, backend="auto": "triton"):
        with mock.patch.object(rotary_triton, "_launch", compile_first):
            for call in calls_by_way.values():
                call()
        # Tensors of the CPU take the launcher of the interpreter; here they take that of a GPU.
        with mock.patch.object(rotary_triton, "_launch", rotary_triton._launch_known):
            for name, call in calls_by_way.items():
                before = driver.launches
                call()
                if driver.launches - before != (name not in (EMPTY, EAGER)):
                    raise RuntimeError(f"{name}: {driver.launches - before} launches")
            best: dict[str, float] = {}
            for _ in range(rounds):
                for name, call in calls_by_way.items():
                    best[name] = min(best.get(name, float("inf")), microseconds(call, calls))
    return best


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: a line for each way, a column for each version of Triton, shape and length, from the newest rows."""
    newest = {(row["way"], row["triton"], row["shape"], row["tokens"]): row["microseconds"] for row in rows}
    columns = sorted({key[1:] for key in newest})
    heads = [f"{shape}, T = {tokens}, Triton {triton}" for triton, shape, tokens in columns]
    lines = ["| host time, µs | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
    for way in dict.fromkeys(way for way, *_ in newest):
        cells = [newest.get((way, *column)) for column in columns]
        lines.append(f"| {way} | " + " | ".join("not measured" if x is None else f"{x:.1f}" for x in cells) + " |")
    return "\n".join(lines)


def build_parser() -> Parser:
    parser = Parser("benchmarks/host_time.py", __doc__)
    parser.add_argument("--tokens", default="1,32", help="default: %(default)s")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=2700, help="calls per round and way; default: %(default)s")
    parser.add_argument("--table", action="store_true", help="print the table of the rows and measure nothing")
    parser.add_argument("--output", default=str(ROWS), help="file of rows, or '' for none; default: %(default)s")
    return parser


@torch.set_grad_enabled(True)
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.table:
        print(table(read_rows(args.output)))
        return 0
    tokens, shapes = parse_lengths(args.tokens), args.shapes.split(",")
    check_names("shape", shapes, SHAPES)
    if min(tokens) < 1 or max(tokens) > 2048 or args.rounds < 1 or args.calls < 9:
        raise ConfigError(f"tokens {args.tokens}, rounds {args.rounds}, calls {args.calls}: 1 to 2048, at least 1, 9")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1: the interpreter launches in a way of its own, unset it")
    from triton import __version__ as triton_version

    run = {"command": command_line(parser, argv), **provenance("cpu", None, vars(args))}
    for shape in shapes:
        for count in tokens:
            for way, found in measure(count, shape, args.rounds, args.calls).items():
                print(f"{shape}, T = {count}, {way}: {found:.1f} µs", flush=True)
                if args.output:
                    row = {"metric": "host_time", "way": way, "tokens": count, "shape": shape, "microseconds": found}
                    append_row(args.output, row | {"triton": triton_version, "provenance": run})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
