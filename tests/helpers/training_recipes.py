"""Recipes for tests of training."""

from __future__ import annotations

from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from tests.helpers.runs import LENGTH


def recipe(**fields) -> Recipe:
    defaults = {"name": "test", "model": "m", "dataset": "d", "output_dir": "o", "sequence_length": LENGTH,
                "global_batch_size": 4, "max_train_steps": 100, "warmup_steps": 20, "learning_rate": 1e-3}  # fmt: skip
    return Recipe(**(defaults | fields))


def resolved_recipe(workspace) -> Recipe:
    return read_recipe(str(workspace / "recipe.yaml"))
