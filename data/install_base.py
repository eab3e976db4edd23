"""Install a retrained base as the embedded model: weights, tokenizer and the curve of its training.

    python data/install_base.py out/tiny-base-text --output models/tiny-llama-256

The weights are stored in bfloat16, half of what the run saves; config.json says float32, so that a model computes with
them in float32. The log holds the steps of the parts before it and names their states. The card (README.md) is left as
it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.training.run_state import read_log
from scaled_rope.training.tracking import plot_losses

WEIGHTS = "model.safetensors"
FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data/install_base.py", __doc__)
    parser.add_argument("run", type=Path, help="output folder of the last part")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    log, missing = read_log(args.run), [name for name in FILES if not (args.run / "model" / name).is_file()]
    if not log or missing:
        raise ConfigError(f"run {args.run} is not there or not finished" + (f": no {missing[0]}" if missing else ""))
    args.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name != WEIGHTS:
            shutil.copy(args.run / "model" / name, args.output / name)
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(args.run / "model" / WEIGHTS).items()}
    write_atomic(args.output / WEIGHTS, save(weights, metadata={"format": "pt"}))
    write_atomic(args.output / "training.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    plot_losses({args.run.name: log}, args.output / "training.png")
    print(f"{args.output}: installed from {args.run / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
