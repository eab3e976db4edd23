"""Install a retrained base as the embedded model: weights, tokenizer and the curve of its training runs.

    python data/install_base.py out/tiny-base out/tiny-base-retrieval out/tiny-base-mixed --output models/tiny-llama-256

The runs are given in order; the last one's model is installed. The card (README.md) is left as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.results import write_atomic
from scaled_rope.training.run_state import read_log
from scaled_rope.training.tracking import plot_losses


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data/install_base.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the phases, in order")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    logs = {run.name: read_log(run) for run in args.runs}
    missing = [name for name, log in logs.items() if not log]
    if missing or not (args.runs[-1] / "model").is_dir():
        raise ConfigError(f"run {(missing or [args.runs[-1].name])[0]!r} is not there or not finished")
    args.output.mkdir(parents=True, exist_ok=True)
    for file in (args.runs[-1] / "model").iterdir():
        shutil.copy(file, args.output / file.name)
    rows = [{"run": name} | row for name, log in logs.items() for row in log]
    write_atomic(args.output / "training.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(logs, args.output / "training.png")
    print(f"{args.output}: installed from {args.runs[-1] / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
