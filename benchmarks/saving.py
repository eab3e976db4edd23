"""The cost of states that prove themselves: time to save a state with hashes, without them, and to verify it.

    python benchmarks/saving.py --output data/benchmarks/saving_cpu.jsonl
    python benchmarks/saving.py --model models/tiny-llama-256

The weights are random and have the shape of a model; AdamW has its two moments of each. A state is saved in turns by
accelerate alone, each file brought to the disk after it, and by the project, which hashes the files meanwhile; both
remove the state before it. Then it is held against its hashes, as before it is used.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.runner import command_line
from scaled_rope.provenance import provenance
from scaled_rope.recipes.files import read_recipe
from scaled_rope.results import append_row
from scaled_rope.training.manifest import fault, state_files
from scaled_rope.training.run_state import save_state, sync

RECORDS = ("recipe.yaml", "train_log.jsonl", "provenance.json")
"""Files of a run that its states have copies of."""


def trained(model: str) -> tuple[Any, Any]:
    """An accelerator with a model of random weights and an optimizer that has done a step, and their parameters."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(made.parameters())
    accelerator = Accelerator(cpu=True)
    prepared, prepared_optimizer = accelerator.prepare(made, optimizer)
    for parameter in prepared.parameters():
        parameter.grad = torch.zeros_like(parameter)
    prepared_optimizer.step()
    prepared_optimizer.zero_grad()
    return accelerator, sum(parameter.numel() for parameter in prepared.parameters())


def plain(accelerator: Any, folder: Path) -> float:
    """Seconds to save a state by accelerate alone, all its files on the disk, and to remove the one before it."""
    began = time.perf_counter()
    accelerator.save_state(str(folder / "new"))
    for name in state_files(folder / "new"):
        sync(folder / "new" / name)
    shutil.rmtree(folder / "old", ignore_errors=True)
    (folder / "new").rename(folder / "old")
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/saving.py", __doc__)
    add = parser.add_argument
    add("--model", default="models/smollm2-135m", help="whose shape the weights have (default %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="(default %(default)s)")
    add("--folder", type=Path, default=ROOT / "out", help="where states are written (default: out)")
    add("--output", metavar="FILE", help="a row is appended to this file")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats} is not allowed; 1 or more")
    accelerator, parameters = trained(args.model)
    args.folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[float]] = {"plain": [], "hashed": [], "verified": []}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="saving-") as place:
        recipe = read_recipe("demo", {"output_dir": place, "kept_checkpoints": 1})
        for name in RECORDS:
            (Path(place) / name).write_text("{}\n")
        for number in range(1, args.repeats + 1):
            seconds["plain"].append(plain(accelerator, Path(place) / "plain"))
            began = time.perf_counter()
            state = save_state(accelerator, recipe, number)
            seconds["hashed"].append(time.perf_counter() - began)
            size = sum((state / name).stat().st_size for name in state_files(state))
            began = time.perf_counter()
            if wrong := fault(state):
                raise ConfigError(f"the state that was just saved {wrong}")
            seconds["verified"].append(time.perf_counter() - began)
            print(f"{number} of {args.repeats}: " + ", ".join(f"{name} {of[-1]:.2f} s" for name, of in seconds.items()))
    middle = {name: statistics.median(of) for name, of in seconds.items()}
    print(
        f"{size / 1e9:.2f} GB: {middle['plain']:.2f} s without hashes, {middle['hashed']:.2f} s with them "
        f"({100 * (middle['hashed'] / middle['plain'] - 1):+.1f} %), verified in {middle['verified']:.2f} s "
        f"({size / 1e9 / middle['verified']:.1f} GB/s)"
    )
    if args.output:
        row = {"metric": "saving", "model": args.model, "parameters": parameters, "bytes": size, "seconds": seconds}
        origin = {"command": command_line(parser, argv), **provenance("cpu", 0, vars(args))}
        append_row(args.output, row | {"provenance": origin})
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
