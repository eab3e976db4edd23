"""The memory that `scaled-rope plan` says, against the peak of training runs.

    python benchmarks/memory.py --output data/benchmarks/memory_cpu.jsonl

Each case is a model from random weights, trained for two steps in processes of its own. Measured is the most anonymous
memory that a rank had resident, looked at every 2 ms, less what it had before the model was built. (Pages of libraries
are left out: the system takes them back when it likes.) glibc is told to return freed memory at once, because what it
would keep is not the run's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, check_names, resident_bytes
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.provenance import provenance
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe, make_recipe
from scaled_rope.results import append_row, read_rows
from scaled_rope.texts.packed import PackedWriter
from scaled_rope.training.planning import Options, Planner

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
_DEEP = {**_LLAMA, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 16, "vocab_size": 4096}
_WIDE = {**_LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 65536}
_WIDER = {**_WIDE, "vocab_size": 131072}
#: name -> (recipe fields, options)
CASES: dict[str, tuple[dict[str, Any], Options]] = {
    "activations": ({"init": _DEEP, "sequence_length": 3072, "batch_size": 2}, Options(gradient_checkpointing=False)),
    "activations, bf16": (
        {"init": _DEEP, "sequence_length": 4096, "batch_size": 2, "precision": "bf16"},
        Options(gradient_checkpointing=False),
    ),
    "weights and optimizer, small": (
        {"init": {**_WIDE, "vocab_size": 16384, "num_hidden_layers": 2}, "sequence_length": 128},
        Options(),
    ),
    "weights and optimizer": ({"init": _WIDE, "sequence_length": 256}, Options()),
    "weights and optimizer, two passes": ({"init": _WIDE, "sequence_length": 256, "global_batch_size": 2}, Options()),
    "weights and optimizer, bf16": ({"init": _WIDE, "sequence_length": 256, "precision": "bf16"}, Options()),
    "lora": ({"init": {**_WIDER, "num_hidden_layers": 24}, "sequence_length": 256, "lora": True}, Options(lora=True)),
    "zero3": ({"init": _WIDER, "sequence_length": 256, "global_batch_size": 2}, Options(ranks=2, engine="zero3")),
    "zero2": ({"init": _WIDER, "sequence_length": 256, "global_batch_size": 2}, Options(ranks=2, engine="zero2")),
}


def case_fields(name: str) -> dict[str, Any]:
    """The recipe fields of a case."""
    fields, options = CASES[name]
    return fields | {"gradient_checkpointing": options.gradient_checkpointing}


def make(fields: dict[str, Any], folder: Path) -> Recipe:
    """A recipe of two steps that reads from and writes to `folder`."""
    common = {
        "name": "memory", "output_dir": str(folder / "out"), "dataset": str(folder / "set"), "scaling": "yarn:4",
        "tokenizer": "models/tiny-llama-256", "global_batch_size": fields.get("batch_size", 1), "max_train_steps": 2,
        "warmup_steps": 0, "precision": "fp32",
    }  # fmt: skip
    return make_recipe(common | fields, "benchmark")


def planned(name: str) -> float:
    """Bytes per rank that `scaled-rope plan` expects of a case."""
    return Planner(make(case_fields(name), Path("out")), on_gpu=False).memory(CASES[name][1]).total


@dataclass(frozen=True)
class Measured:
    """Bytes that the fullest rank held at its peak, and how long the last step took: by the clock, and in seconds of
    the processor over all ranks, which others on the machine change less."""

    peak: float
    seconds: float
    processor_seconds: float


def measure(fields: dict[str, Any], ranks: int = 1, engine: str = "plain") -> Measured:
    """Train a recipe with these `fields` on random data; ranks are processes, engine is "plain", "zero2" or "zero3"."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = make(fields, folder)
        with PackedWriter(recipe.dataset, recipe.sequence_length, 4096) as writer:
            for row in np.random.default_rng(0).integers(0, 4096, (4, recipe.sequence_length)):
                writer.append(row)
            writer.close({})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
        shared = {
            "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29717",
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        if engine != "plain":
            shared |= {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"deepspeed/{engine}.json",
            }
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        if ranks == 1:
            del shared["WORLD_SIZE"]
            places = [{}]
        processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--child", str(folder / "recipe.yaml")],
                cwd=ROOT, env=os.environ | shared | place,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for place in places
        ]  # fmt: skip
        finished = [process.communicate() for process in processes]
        for process, (_, error) in zip(processes, finished, strict=True):
            if process.returncode:
                raise RuntimeError(f"{fields} failed: {error[-2000:]}")
        found = [json.loads(out.splitlines()[-1]) for out, _ in finished]
        seconds = float(read_rows(folder / "out" / "train_log.jsonl")[-1]["seconds"])
        return Measured(max(one["peak"] for one in found), seconds, sum(one["processor_seconds"] for one in found))


class Watch:
    """Records the most anonymous memory of this process, in bytes, while the context lasts."""

    def __init__(self) -> None:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @staticmethod
    def now() -> int:
        return resident_bytes()[1]

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def _child(recipe: Recipe) -> None:
    """Run one rank: note the resident memory when everything is imported, then train."""
    import accelerate  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from scaled_rope.training.loop import Loop, Trainer

    step, used = Loop.optimizer_step, 0.0

    def timed(loop: Loop, number: int) -> Any:
        nonlocal used
        began = time.process_time()
        row = step(loop, number)
        used = time.process_time() - began
        return row

    Loop.optimizer_step = timed  # type: ignore[method-assign]
    torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed  # noqa: F401
    if recipe.lora:
        import peft  # noqa: F401
    before = Watch.now()
    with Watch() as watch:
        Trainer(recipe).run()
    print(json.dumps({"peak": watch.peak - before, "processor_seconds": used}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/memory.py", __doc__)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--output", type=Path, help="append rows to this file")
    parser.add_argument("--child", metavar="RECIPE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        _child(read_recipe(args.child))
        return 0
    check_names("case", args.cases, CASES)
    facts = provenance("cpu", 0, {"cases": args.cases})  # of the code as it is now
    for name in args.cases or CASES:
        fields, options = CASES[name]
        expected = planned(name)
        measured = measure(case_fields(name), options.ranks, options.engine).peak
        print(f"{name:<36} planned {expected / 1e9:6.2f} GB, measured {measured / 1e9:6.2f} GB,"
              f" {expected / measured - 1:+.1%}", flush=True)  # fmt: skip
        if args.output:
            row = {"metric": "peak_memory", "case": name, "recipe": fields, "options": str(options),
                   "planned_gb": round(expected / 1e9, 3), "measured_gb": round(measured / 1e9, 3)}  # fmt: skip
            append_row(args.output, row | facts)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
