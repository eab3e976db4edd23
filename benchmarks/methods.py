"""Every method on one model, without training: perplexity against the control, passkeys, short texts.

    python benchmarks/methods.py                      # the embedded model at 2, 4 and 8 times its length
    python benchmarks/methods.py --model smollm2-135m --factors 2
    python benchmarks/methods_report.py               # the tables of docs/methods.md, from the rows

For each factor s the texts are read in windows of s·L tokens, once by each static scaling, and each prompt has s·L
tokens. The control is the unscaled model with only the last L tokens in view. A row that is there is not measured
again.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, check_names
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError

ROWS = ROOT / "data" / "methods_rows.jsonl"
FACTORS = (2, 4, 8)


@dataclass(frozen=True)
class Study:
    """A model and what is measured on it.

    Attributes:
        original: L in tokens.
        texts: flags that select the held-out texts.
        prompts: passkeys at each length.
        theta: the base of `abf` at a factor of 8; another factor has the same share of the logarithm.
        more: flags of all evaluators.
    """

    model: str
    original: int
    texts: tuple[str, ...]
    prompts: int
    theta: float
    more: tuple[str, ...] = ()

    def lengths(self, factor: int) -> list[int]:
        """Ends of position buckets: L and its doublings up to s·L."""
        return [self.original * 2**power for power in range(int(math.log2(factor)) + 1)]

    def specs(self, factor: int) -> tuple[str, ...]:
        """The scalings that are compared at a factor: the unscaled model, then each method of the registry."""
        length, target = self.original, self.original * factor
        window, half, chunk = length // 4, length // 2, length * 3 // 4
        group = math.ceil((target - window) / (length - window))  # its furthest position is L
        base = 10_000.0 if self.original == 256 else 100_000.0
        theta = base * (self.theta / base) ** (math.log(factor) / math.log(8))
        changed = (
            f"rerope,window={half}", f"leaky-rerope,window={half},k={4 * factor}",
            f"self-extend,group={group},window={window}", f"dpe,groups=1+{factor}+{group}+{group},window={window}",
            f"dual-chunk,chunk={chunk}",
        )  # fmt: skip
        tempered = (f"yarn:{factor}", f"ntk-by-parts:{factor}", "dynamic-yarn", *changed)
        return (
            "default", f"linear:{factor}", f"ntk:{factor}", f"part-ntk:{factor}", f"ntk-by-parts:{factor}",
            f"yarn:{factor}", f"yarn:{factor},ramp=rotations", f"yarn:{factor},resonance=true", f"llama3:{factor}",
            f"ntk-mixed:{factor}", f"abf:{factor},theta={round(theta, -3):.0f}", f"proportional:{factor},fraction=0.75",
            "cope", "hardclip", f"drope:{factor}",
            "dynamic-linear", "dynamic-ntk", "dynamic-part-ntk", "dynamic-ntk-by-parts",
            "dynamic-yarn", "dynamic-llama3", "dynamic-ntk-mixed", *changed,
            *(f"{spec},attention_temperature=log" for spec in tempered),
        )  # fmt: skip

    def commands(self, factor: int, rows: str) -> list[list[str]]:
        """The evaluators' command lines at a factor: the control, all scalings on texts, all on passkeys."""
        shared = ["-m", self.model, *self.more, "--output", rows]
        lengths = ",".join(map(str, self.lengths(factor)))
        scalings = [f"--scaling={spec}" for spec in self.specs(factor)]
        texts = ["eval/perplexity.py", *shared, *self.texts, "--lengths", lengths]
        target = str(self.original * factor)
        prompts = ["--lengths", target, "--iterations", str(self.prompts)]
        return [
            [*texts, "--scaling=default", "--control"],
            [*texts, *scalings],
            ["eval/passkey.py", *shared, *prompts, *scalings],
        ]


STUDIES = {
    "tiny-llama-256": Study(
        "models/tiny-llama-256",
        256,
        ("--dataset", "data/cache/demo/novel", "--dataset", "data/cache/demo/bible", "--windows", "12"),
        50,
        500_000.0,
    ),
    "smollm2-135m": Study(
        "models/smollm2-135m",
        8192,
        ("--dataset", "standin:books", "--samples", "1"),
        3,
        2_000_000.0,
        ("--attention", "blockwise"),
    ),
}


def run(command: Sequence[str]) -> None:
    print(shlex.join(["python", *command]), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        raise ConfigError(f"{command[0]} ended with exit code {code}; the same command goes on")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/methods.py", __doc__)
    add = parser.add_argument
    add("--model", default="tiny-llama-256", metavar="NAME", help=f"{', '.join(STUDIES)} (default %(default)s)")
    add("--factors", default="2,4,8", metavar="A,B", help="of 2, 4, 8 (default %(default)s)")
    add("--output", type=Path, default=ROWS, metavar="FILE",
        help=f"rows are appended here (default {ROWS.relative_to(ROOT)})")  # fmt: skip
    args = parser.parse_args(argv)
    check_names("model", [args.model], STUDIES)
    chosen = args.factors.split(",")
    check_names("factor", chosen, [str(factor) for factor in FACTORS])
    for factor in chosen:
        # The evaluators run elsewhere than this script may.
        for command in STUDIES[args.model].commands(int(factor), str(args.output.resolve())):
            run(command)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
