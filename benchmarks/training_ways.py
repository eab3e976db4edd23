"""Ways to train an extension on the embedded model: whole rows, PoSE, short and long windows, LongCE.

    python benchmarks/training_ways.py --list     # the parts, and how far each has come
    python benchmarks/training_ways.py            # all that is missing: half an hour of one core

Each is the demo's recipe with a few fields changed, so that all see as many tokens; each model reads the demo's
held-out texts with the control of the same weights, and is asked for 50 passkeys and 50 needles at each length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import check_names, run_prepare_commands
from benchmarks.parts import Part, run_all, show
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.provenance import portable_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.runs import is_finished
from scaled_rope.results import rows_so_far

RECIPE = "demo"
WORK = "out/training-ways"
WAYS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "pose": ("--positions=pose", "--sequence-length=256", "--global-batch-size=8", "--batch-size=8"),
    "mixed": ("--short-share=0.5",),
    "long-ce": ("--loss-weights=long_ce", "--long-ce-context=256", "--long-ce-step=256"),
}
"""Flags of finetune.py that each way adds to the recipe."""

EVALUATIONS = {
    "perplexity": (
        "eval/perplexity.py", "--dataset", "data/cache/demo/bible", "--dataset", "data/cache/demo/novel",
        "--windows", "12", "--lengths", "256,512,1024,1536,2048", "--control",
    ),
    "passkey": (
        "eval/passkey.py", "--lengths", "256,512,1024,2048", "--iterations", "50", "--wording", "passkey,needle",
    ),
}  # fmt: skip


def parts(rows: str) -> dict[str, Part]:
    """All parts by name: each way's training, then its measurements."""
    found = []
    for way, flags in WAYS.items():
        output = f"{WORK}/{way}"
        recipe = read_recipe(RECIPE, {"output_dir": output})
        command = ("finetune.py", RECIPE, *flags, f"--output-dir={output}")
        found.append(
            Part(f"train-{way}", command, lambda recipe=recipe: "finished" if is_finished(recipe) else "not finished")
        )
        model = f"{output}/model"
        for kind, evaluation in EVALUATIONS.items():
            progress = lambda kind=kind, model=model: f"{_count(rows, model, kind)} rows"  # noqa: E731
            found.append(Part(f"{kind}-{way}", (*evaluation, "-m", model, "--output", rows), progress))
    return {part.name: part for part in found}


def _count(path: str, model: str, metric: str) -> int:
    return sum(row["model"] == portable_model(model) and row["metric"] == metric for row in rows_so_far(path))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/training_ways.py", __doc__)
    add = parser.add_argument
    add("--part", action="append", metavar="NAME", help="see --list; repeatable (default: all)")
    add("--list", action="store_true", help="the parts, and how far each has come")
    add("--output", default="data/training_ways_rows.jsonl", metavar="FILE", help="rows (default %(default)s)")
    args = parser.parse_args(argv)
    known = parts(args.output)
    check_names("part", args.part, known)
    wanted = [known[name] for name in args.part or known]
    if args.list:
        show(wanted)
        return 0
    run_prepare_commands(RECIPE)
    run_all(wanted, 1e4)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
