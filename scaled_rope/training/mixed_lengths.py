"""Training on short and long windows in one run (LongRoPE2, arXiv 2502.20082).

Whole steps are short or long, so that which rows are read how depends on the step alone: on any number of ranks, and
after a resume, it is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scaled_rope.errors import ConfigError
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.training.batches import LoadedRow


def is_short_step(share: float, step: int) -> bool:
    """Whether step number `step`, from 0, is one of the short ones, which are spread evenly over the run.

    share: of the steps that are short; after n steps floor(n·share) have been.
    """
    # Rounded: 0.1 + 0.2 is not 0.3, and a share of 1/3 times 3 must count as 1.
    return math.floor(round((step + 1) * share, 9)) > math.floor(round(step * share, 9))


def cut_into_windows(batch: Sequence[LoadedRow], length: int) -> list[LoadedRow]:
    """Cut rows of tokens and weights into windows of `length` tokens; the last of a row may be shorter.

    A window's first token is no target, so one target in `length` is lost.
    """
    return [
        (tokens[start : start + length], weights[start : start + length])
        for tokens, weights in batch
        for start in range(0, len(tokens), length)
        if len(tokens) - start >= 2
    ]


def short_steps_note(recipe: Recipe, scaling: RopeScaling, longest: int) -> str:
    """A line that says how a recipe with `short_share` reads its steps.

    Args:
        scaling: the model's, as `original_up_to_l` returns it.
        longest: tokens of the data's longest row.

    Raises:
        ConfigError: no step is short, or no row is longer than L.
    """
    length = scaling.original_max_position_embeddings
    rows = min(longest, recipe.truncate or longest)
    if length is None or rows <= length:
        raise ConfigError(
            f"short_share {recipe.short_share:g} is not possible: rows have at most {rows} tokens, not more than the"
            f" original length, {length}"
        )
    short = sum(is_short_step(recipe.short_share, step) for step in range(recipe.max_train_steps))
    if not short:
        raise ConfigError(
            f"short_share {recipe.short_share:g} is not possible: of {recipe.max_train_steps} steps none is short"
        )
    return (
        f"{short} of {recipe.max_train_steps} steps read windows of {length} tokens with the original frequencies; the"
        f" model changes to the scaled ones beyond {length} ({scaling.method})"
    )
