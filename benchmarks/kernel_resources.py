"""The compiler's word on the Triton kernels on GPUs that are not here: shared memory, registers, spills.

    python benchmarks/kernel_resources.py             # the whole grid, minutes; rows are appended as they come
    python benchmarks/kernel_resources.py --corners   # the cases that need most, for the tests; writes no file
    python benchmarks/kernel_resources.py --table     # the table of docs/performance.md from the rows

Every shape that the dispatchers send to a kernel is compiled through the kernel's own launcher, which needs no GPU: for
A100 (sm_80), H100 (sm_90), B200 (sm_100) and MI300 (gfx942). What needs most is compiled for sm_89 too. A program must
fit the shared memory of the device and keep its numbers in registers.

Exit code 1 when a kernel does not fit or spills.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.provenance import provenance
from scaled_rope.results import Row, append_row, rows_so_far

ROWS = ROOT / "data" / "benchmarks" / "kernel_resources.jsonl"
LIMITS = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program may have, by target."""
Case = dict[str, Any]


def grid() -> Iterator[Case]:
    """Every kind of shape that is decoded or rotated by a kernel."""
    # head_dim and half of the rotated dimensions: whole heads, and a part as in Phi-2. float16 is as wide as bfloat16.
    shapes = ((128, 64), (256, 128), (64, 32), (80, 16), (96, 48), (192, 96))
    for target in ("sm_90", "sm_80", "sm_100", "gfx942"):
        for dtype in ("bfloat16", "float32"):
            for width, half in shapes:
                for group, count in ((4, 1), (16, 1), (16, 16)):
                    for interleaved in (False, True):
                        yield decoding(target, dtype, width, half, group, count, interleaved)
            for width, half in ((64, 32), (80, 16), (128, 64), (256, 128)):
                for interleaved in (False, True):
                    for tables in (True, False):
                        yield rotating(target, dtype, width, half, 4096, interleaved, tables)
    for dtype, width in (("bfloat16", 128), ("bfloat16", 256), ("float32", 256)):  # where shared memory is least
        yield decoding("sm_89", dtype, width, width // 2, 16, 1, False)


def corners() -> list[Case]:
    """The largest programs of each kind; those that did not fit or spilled before blocks followed the shape."""
    return [
        decoding("sm_90", "bfloat16", 128, 64, 4, 1, False),
        decoding("sm_90", "bfloat16", 128, 64, 4, 16, True),
        decoding("sm_90", "bfloat16", 64, 32, 3, 1, True),
        decoding("sm_80", "float16", 256, 128, 16, 1, False),
        decoding("sm_90", "float32", 256, 128, 1, 1, True),
        decoding("sm_89", "float32", 128, 64, 16, 1, False),
        decoding("gfx942", "bfloat16", 256, 128, 16, 16, False),
        rotating("sm_90", "float32", 256, 128, 4096, True, False),
    ]


def decoding(target: str, dtype: str, width: int, half: int, group: int, count: int, interleaved: bool) -> Case:
    return {
        "kernel": "decode", "target": target, "dtype": dtype, "head_dim": width, "half": half, "group": group,
        "count": count, "interleaved": interleaved,
    }  # fmt: skip


def rotating(target: str, dtype: str, width: int, half: int, tokens: int, interleaved: bool, tables: bool) -> Case:
    return {
        "kernel": "rotary", "target": target, "dtype": dtype, "head_dim": width, "half": half,
        "tokens": tokens, "interleaved": interleaved, "tables": tables,
    }  # fmt: skip


class Compiler:
    """Triton's compiler with a device of choice in place of the one that is, or is not, here."""

    def __init__(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        self.target: Any = None
        self.found: list[Any] = []
        self.targets = {
            name: GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)
            for name in LIMITS
        }
        triton.runtime.driver.set_active(self)  # type: ignore[arg-type]

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # A kernel keeps the target that it first saw on a device, so each target is a device of its own.
        return list(self.targets.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def instead_of(self, kernel: Any) -> Any:
        """A stand-in for a kernel that compiles where it would be launched."""
        compiler = self

        class Launches:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def compile_only(*arguments: Any, **options: Any) -> None:
                    compiler.found.append(kernel.warmup(*arguments, grid=grid, **options))

                return compile_only

        return Launches()


def resources(compiled: Any) -> Row:
    """The target of a compiled kernel, its shared memory, registers and bytes spilled per thread, and its warps."""
    found = {"shared_bytes": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        numbers = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", text, re.MULTILINE)}
        target = re.findall(r"^amdhsa.target: .*-(gfx\w+)", text, re.MULTILINE)[0]
        spilled = numbers["private_segment_fixed_size"]
        return {"compiled_for": target, "registers": numbers["vgpr_count"], "spilled_bytes": spilled} | found
    import triton.backends.nvidia as backend

    tool = Path(backend.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    target = re.findall(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[0]
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return {"compiled_for": target, "registers": numbers["REG"], "spilled_bytes": spilled} | found


def measure(cases: Sequence[Case]) -> Iterator[Row]:
    """A row per case. Nothing is computed: tensors are only described.

    Raises:
        RuntimeError: a kernel was compiled for another device than the row's.
    """
    import torch
    import triton

    from scaled_rope.kernels import decode_triton, rotary_triton
    from scaled_rope.kernels.decode_blocks import blocks_for

    compiler = Compiler()
    for module, names in ((decode_triton, ("decode_kernel", "merge_kernel")), (rotary_triton, ("rotary_kernel",))):
        for name in names:
            setattr(module, name, compiler.instead_of(getattr(module, name)))
    for case in cases:
        compiler.target, dtype = compiler.targets[case["target"]], getattr(torch, case["dtype"])
        compiler.found.clear()
        width, half, limit = case["head_dim"], case["half"], LIMITS[case["target"]]
        row: Row = {**case, "limit_bytes": limit, "triton": triton.__version__}
        phases = torch.empty(1, half, dtype=torch.int64)
        if case["kernel"] == "decode":
            group, count = case["group"], case["count"]
            lanes = compiler.target.warp_size
            blocks = blocks_for(half, width - 2 * half, width, dtype.itemsize, group * count, limit, lanes)
            if blocks is None:
                yield row | {"backend": "torch"}
                continue
            query = torch.empty(1, 8 * group, count, width, dtype=dtype)
            key = torch.empty(1, 8, 8192, width, dtype=dtype)
            places = torch.empty(1, count, dtype=torch.int64)
            decode_triton.launch(
                query,
                key,
                key,
                phases,
                places[0, :1],
                places,
                torch.empty(1),
                None,
                1.0,
                case["interleaved"],
                blocks,
                132,
            )
            row["blocks"] = [blocks.queries, blocks.keys, blocks.stages]
        else:
            q, k = (torch.empty(1, case["tokens"], heads, width, dtype=dtype).transpose(1, 2) for heads in (32, 8))
            table = torch.empty(case["tokens"], half) if case["tables"] else None
            rotary_triton.launch(
                q, k, q, k, table, table, None if case["tables"] else phases[0], None, 0, 1.0, True,
                case["interleaved"], False,
            )  # fmt: skip
        found = [resources(compiled) for compiled in compiler.found]
        # The variants of sm_90 and sm_100 that have all of their own instructions are called sm_90a and sm_100a.
        if wrong := {one["compiled_for"] for one in found} - {case["target"], case["target"] + "a"}:
            raise RuntimeError(f"compiled for {', '.join(wrong)}, not for {case['target']}")
        yield row | found[0] | {"merge": found[1]} if len(found) > 1 else row | found[0]


def good(row: Row) -> bool:
    """Whether a kernel can be launched on its device and keeps its numbers in registers."""
    return row.get("backend") == "torch" or (row["shared_bytes"] <= row["limit_bytes"] and not row["spilled_bytes"])


def table(rows: Sequence[Row]) -> str:
    """In Markdown: for each kernel, device and dtype the most shared memory, registers and bytes spilled."""
    lines = [
        "| kernel | target | dtype | shapes | most shared memory (limit) | most registers | spilled |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys((row["kernel"], row["target"], row["dtype"]) for row in rows):
        of = [row for row in rows if (row["kernel"], row["target"], row["dtype"]) == kind and "backend" not in row]
        shared, registers, spilled = (
            max(row[name] for row in of) for name in ("shared_bytes", "registers", "spilled_bytes")
        )
        most = f"{shared:,} ({of[0]['limit_bytes']:,})"
        lines.append(f"| {kind[0]} | {kind[1]} | {kind[2]} | {len(of)} | {most} | {registers} | {spilled} B |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/kernel_resources.py", __doc__)
    parser.add_argument("--corners", action="store_true", help="a few cases; one JSON row per line to standard output")
    parser.add_argument("--table", action="store_true", help="print the table of the rows and compile nothing")
    parser.add_argument("--output", type=Path, default=ROWS, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.table:
        print(table(rows_so_far(args.output)))
        return 0
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":
        raise ConfigError("TRITON_INTERPRET=1: nothing is compiled in the interpreter, unset it")
    done = [] if args.corners else rows_so_far(args.output)
    cases = (
        corners() if args.corners else [one for one in grid() if not any(one.items() <= row.items() for row in done)]
    )
    run, bad = provenance("cpu", None, vars(args)), 0
    for row in measure(cases):
        bad += not good(row)
        print(json.dumps(row), flush=True)
        if not args.corners:
            append_row(args.output, row | {"provenance": run})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
