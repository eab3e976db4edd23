"""Pictures of a search: the divisors beside those of PI, NTK-aware scaling and YaRN, and the course of the fitness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.tuning.curves import BLUE, GREY, ORANGE
from scaled_rope.tuning.divisor_trials import Evaluated
from scaled_rope.tuning.divisors import Space
from scaled_rope.tuning.figures import write_drawings

_NAMES = {"linear": "PI", "ntk": "NTK-aware", "yarn": "YaRN"}
_STYLES = {"linear": ":", "ntk": "--", "yarn": "-."}


def write_search_figures(
    made: Sequence[Evaluated], best: Evaluated, space: Space, title: str, folder: Path
) -> list[Path]:
    """divisors.png and fitness.png; none without matplotlib."""

    def divisors(axes: Any) -> None:
        for spec, values in space.starts().items():
            name = spec.partition(":")[0]
            axes.plot(values, _STYLES[name], color=GREY, linewidth=1.4, label=_NAMES[name])
        axes.plot(best.scaling.params["long_factor"], "o-", color=BLUE, markersize=3, linewidth=1.4, label="found")
        axes.axhline(space.highest, color=ORANGE, linewidth=0.8, label="bound, 1.25·s")
        axes.set(xlabel="pair of dimensions", ylabel="divisor", yscale="log")
        axes.set_title(f"{title}, {space.original} to {space.target} tokens")
        ticks = [2**power for power in range(int(np.log2(space.highest)) + 1)]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.legend(fontsize=8)

    def fitness(axes: Any) -> None:
        found = [one.fitness for one in made]
        lowest = np.minimum.accumulate(found)
        numbers = np.arange(1, len(found) + 1)
        axes.plot(numbers, found, ".", color=GREY, markersize=2, label="candidates")
        axes.step(numbers, lowest, where="post", color=BLUE, label="best so far")
        low, high = float(lowest[-1]), float(np.quantile(found, 0.9))
        room = max(high - low, 1e-6)
        axes.set(xlabel="evaluations", ylabel="fitness (nats)", ylim=(low - 0.1 * room, high + 0.2 * room))
        axes.set_title(title)
        axes.legend(fontsize=8)

    return write_drawings({"divisors": divisors, "fitness": fitness}, folder)
