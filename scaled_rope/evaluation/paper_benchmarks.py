"""The benchmarks of the paper's table 3, and how it measures them. Needs neither torch nor lm-eval."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """The settings with which the paper's table 3 measures a task."""

    metric: str
    num_fewshot: int

    @staticmethod
    def offline_name(task: str) -> str:
        """The task group that reads the same benchmark from a package archive."""
        return f"{task}_offline"


PAPER = {
    "arc_challenge": Benchmark("acc_norm", 25),
    "hellaswag": Benchmark("acc_norm", 10),
    "mmlu": Benchmark("acc", 5),
    "truthfulqa_mc2": Benchmark("acc", 0),
}
"""The benchmarks of the paper's table 3 by lm-eval's task name. MMLU is the plain mean over its 57 subjects."""

OFFLINE = (*PAPER, "arc_easy")
"""Tasks of which a package archive has the questions."""
