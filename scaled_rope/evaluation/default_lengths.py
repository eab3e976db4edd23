"""Print the lengths at which long-text tasks are measured by default: `python -m ... -m MODEL [--scaling SPEC]`.

Those of the model and scaling with the longest context, since models are compared at the same lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.evaluation.harness_plan import doubled_lengths
from scaled_rope.evaluation.jobs import model_jobs
from scaled_rope.flags.evaluators import add_model_arguments


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("default_lengths", __doc__ or "")
    add_model_arguments(parser)
    found = [doubled_lengths(job) for job in model_jobs(parser.parse_args(argv))]
    longest = max(lengths[-1] for lengths in found)
    print(",".join(map(str, next(lengths for lengths in found if lengths[-1] == longest))))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
