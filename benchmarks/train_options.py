"""Time of a training step and its peak memory by sequence length, with each option that changes memory on and off.

    python benchmarks/train_options.py --output data/benchmarks/train_options_cpu.jsonl

A small Llama with a large vocabulary, from random weights, in float32 on one thread per rank. Each run is two steps of
one sequence in processes of its own; the second one's time counts, by the clock and in seconds of the processor. Memory
is measured as benchmarks/memory.py does. Rows that are in the output for this commit already are not measured again.
Offloaded activations are no option here: on a CPU they would stay where they are (gpu.py --part train has them).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import check_names
from benchmarks.memory import measure
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row, rows_so_far

MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192)
#: name -> (recipe fields, ranks, engine)
OPTIONS: dict[str, tuple[dict[str, Any], int, str]] = {
    "defaults": ({}, 1, "plain"),
    "attention kept": ({"keep_attention": True}, 1, "plain"),
    "no gradient checkpointing": ({"gradient_checkpointing": False}, 1, "plain"),
    "whole logits": ({"loss": "whole"}, 1, "plain"),
    "neither": ({"gradient_checkpointing": False, "loss": "whole"}, 1, "plain"),
    "bf16": ({"precision": "bf16"}, 1, "plain"),
    "lora": ({"lora": True}, 1, "plain"),
    "zero3, 2 ranks to a sequence": ({"sequence_parallel": 2}, 2, "zero3"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/train_options.py", __doc__)
    parser.add_argument("options", nargs="*", metavar="OPTION", help=f"default: all of: {', '.join(OPTIONS)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    check_names("option", args.options, OPTIONS)
    facts = provenance("cpu", 0, {"options": args.options, "lengths": args.lengths})  # of the code as it is now
    done = [] if args.output is None else rows_so_far(args.output)
    finished = {(row["commit"], row["option"], row["length"]) for row in done}
    for length in args.lengths:
        for name in args.options or OPTIONS:
            if (facts["commit"], name, length) in finished:
                continue
            fields, ranks, engine = OPTIONS[name]
            given = {"init": MODEL, "sequence_length": length, "loss": "chunked"} | fields
            found = measure(given, ranks, engine)
            print(f"{length:>6} {name:<30} {found.seconds:7.2f} s, {found.processor_seconds:7.2f} s of a processor,"
                  f" {found.peak / 1e9:6.3f} GB", flush=True)  # fmt: skip
            if args.output is not None:
                row = {"metric": "training step", "option": name, "length": length, "model": MODEL, "fields": fields,
                       "ranks": ranks, "engine": engine, "seconds": found.seconds,
                       "processor_seconds": round(found.processor_seconds, 3),
                       "peak_gb": round(found.peak / 1e9, 3)}  # fmt: skip
                append_row(args.output, row | facts)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
