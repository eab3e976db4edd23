"""The runs of recipes on disk: what each starts from, what is finished and what is still to train."""

from __future__ import annotations

from pathlib import Path

from scaled_rope.recipes.files import available, read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.results import read_rows


def starts_from(recipe: Recipe) -> Recipe | None:
    """The recipe of `configs/` whose result, a model or a state, `recipe` starts from, if any."""
    if recipe.model is None and recipe.continue_from is None:
        return None
    for name in available():
        other = read_recipe(name)
        if recipe.model is not None and Path(recipe.model) == Path(other.output_dir) / "model":
            return other
        if other.stop_after is not None and recipe.continue_from is not None:
            if Path(recipe.continue_from) == stopping_state(other):
                return other
    return None


def stopping_state(recipe: Recipe) -> Path:
    """The folder of the state that a recipe with `stop_after` ends with."""
    return Path(recipe.output_dir) / "checkpoints" / f"step-{recipe.stop_after:06d}"


def is_finished(recipe: Recipe) -> bool:
    """Whether the recipe's run has come to its end: its model is saved and its log has the last step.

    With `stop_after`: whether the state of that step is there.
    """
    if recipe.stop_after is not None:
        return (stopping_state(recipe) / "state.json").exists()
    return has_model(recipe)


def has_model(recipe: Recipe) -> bool:
    """Whether the model that the recipe's last step ends with is saved, whatever `stop_after` says."""
    output = Path(recipe.output_dir)
    if not (output / "model" / "config.json").exists() or not (output / "train_log.jsonl").exists():
        return False
    log = read_rows(output / "train_log.jsonl")
    return bool(log) and log[-1]["step"] == recipe.max_train_steps


def pending(recipe: Recipe) -> list[Recipe]:
    """The recipes still to train, in order, before `recipe` is finished: those that it starts from, and itself."""
    if is_finished(recipe):
        return []
    before = starts_from(recipe)
    return [*(pending(before) if before is not None else ()), recipe]
