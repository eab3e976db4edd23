"""LongCE (arXiv 2410.23771): tokens that far context helps with weigh more in the loss.

The weight of a token is min(p(token | all before it) / p(token | at least the last K before it), cap), both by the
model that is being trained, at the step at hand, without gradients. Where a window reaches back to the beginning both
are the same and the weight is 1. As in the paper's code the loss is divided by the number of targets and not by the sum
of their weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scaled_rope.errors import ConfigError
from scaled_rope.recipes.recipe import Recipe


def check_rows_for_long_ce(recipe: Recipe, longest: int) -> None:
    """Raise an error where `loss_weights: long_ce` would weigh no token.

    longest: tokens of the data's longest row.

    Raises:
        ConfigError: no row has more than `long_ce_context` + `long_ce_step` tokens, so a window from the beginning sees
            all, but for what predicts the token after the row.
    """
    rows, needed = min(longest, recipe.truncate or longest), recipe.long_ce_context + recipe.long_ce_step + 1
    if recipe.loss_weights == "long_ce" and rows < needed:
        raise ConfigError(
            f"loss_weights {recipe.loss_weights} is not possible: rows have at most {rows} tokens, fewer than the"
            f" {needed} that long_ce_context {recipe.long_ce_context} and long_ce_step {recipe.long_ce_step} need"
        )


def gain_weights(whole: Tensor, near: Tensor, cap: float) -> Tensor:
    """The weights [B, T] of targets: 1 for the first T - N, min(exp(near - whole), cap) for the others.

    whole: losses in nats after all tokens, [B, T].
    near: those of the last N after nearby tokens alone, [B, N], a result of `near_losses`.
    """
    start = whole.shape[1] - near.shape[1]
    gain = torch.exp((near - whole[:, start:]).clamp(max=60.0))  # exp overflows float32 above 88
    return torch.cat([torch.ones_like(whole[:, :start]), gain.clamp(max=cap)], dim=1)


def near_windows(length: int, context: int, step: int) -> list[tuple[int, int, int]]:
    """(first position, first scored, end) of the windows over `length` positions, as in the paper's code.

    A window scores its last `step` positions, the last window what is left; each next token is predicted from
    `context` tokens at least and context + step - 1 at most. The first window begins at `step`: one at 0 sees all.
    """
    starts = range(step, length - context + 1, step)
    return [(start, start + context - 1, min(start + context + step - 1, length)) for start in starts]


def near_losses(
    losses: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, targets: Tensor, context: int, step: int
) -> Tensor:
    """The losses in nats, without gradients, of targets after nearby tokens alone.

    Args:
        losses: (input ids [B, t], targets [B, t]) -> losses [B, t]. It is called for one window of the batch after the
            other, equally often for batches of one size, as engines need that share weights among ranks.
        input_ids: [B, T].
        targets: [B, T], shifted.
        context: K.
        step: how many targets a window scores.

    Returns:
        [B, N], for the last N = max(0, T - K - step + 1) targets; a window from the beginning sees the others' context.
    """
    parts = [torch.zeros(len(targets), 0, device=targets.device)]
    with torch.no_grad():
        for first, scored, end in near_windows(input_ids.shape[1], context, step):
            parts.append(losses(input_ids[:, first:end], targets[:, first:end])[:, scored - first :])
    return torch.cat(parts, dim=1)
