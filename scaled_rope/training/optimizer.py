"""The optimizer and its learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from scaled_rope.recipes.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step number `step`, counted from 0.

    Warm-up rises linearly and reaches the peak at step `warmup_steps` - 1, so that no step is wasted on a rate of 0.
    Then `constant` stays. `linear` and `cosine` fall to the floor, and would reach it just after the last step. `wsd`
    (warm-up, stable, decay; arXiv 2404.06395) stays until the last `lr_decay_share` of the steps and falls in these:
    linearly, or as 1 - sqrt(x) of the part x of them that is over (arXiv 2405.18392).
    """
    peak, warmup, total = recipe.learning_rate, recipe.warmup_steps, recipe.max_train_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    begin = total - recipe.decay_steps if recipe.lr_schedule == "wsd" else warmup
    if recipe.lr_schedule == "constant" or step < begin:
        return peak
    progress = (step - begin) / max(1, total - begin)
    floor = recipe.lr_floor
    if recipe.lr_schedule == "cosine":
        floor, left = 0.1 if floor is None else floor, 0.5 * (1.0 + math.cos(math.pi * progress))
    elif recipe.lr_schedule == "wsd" and recipe.lr_decay == "1-sqrt":
        left = 1.0 - math.sqrt(progress)
    else:
        left = 1.0 - progress
    floor = floor or 0.0
    return peak * (floor + (1.0 - floor) * left)


def restore_settings(optimizer: Any, recipe: Recipe) -> None:
    """Give an optimizer the recipe's settings again; a state that was loaded brings those that it was saved with."""
    for group in optimizer.param_groups:
        group["betas"] = (recipe.adam_betas[0], recipe.adam_betas[1])
        group["weight_decay"] = recipe.weight_decay


def make_optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, with the recipe's settings."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    betas = (recipe.adam_betas[0], recipe.adam_betas[1])
    return torch.optim.AdamW(trainable, lr=recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay)
