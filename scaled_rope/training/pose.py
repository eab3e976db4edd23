"""PoSE, positional skip-wise training (arXiv 2309.10400): train for long positions on short windows.

A window of C tokens is cut into chunks, and between chunks position ids jump, so that over many windows the model sees
every relative position up to the target length, at the cost of C. The text may jump as well: then the chunks come from
different places of a longer row. All tokens attend to all before them, and all are targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.temperature import follows_position
from scaled_rope.texts.packed import IntArray


@dataclass(frozen=True)
class SkipWise:
    """How windows are drawn.

    Attributes:
        window: C, tokens of a window.
        target: positions that are trained, from 0 to target - 1.
        chunks: chunks of a window; 2 in the paper's main setting and its released code.
        skip_text: whether chunks after the first come from random later places of a row that is longer than a window,
            in order; without, the window is the row's beginning.
        seed: of the whole run.
    """

    window: int
    target: int
    chunks: int = 2
    skip_text: bool = True
    seed: int = 42

    def draw(self, tokens: int, step: int, place: int) -> tuple[IntArray, IntArray]:
        """Draw a window of a row: a pure function, so that resuming needs no state.

        With two chunks: the first has u tokens, u uniform from 1 … C/2; the text of the second begins a number of
        tokens later that is uniform from 0 … tokens - C, its positions from 0 … target - C. Further chunks have 1 to
        C/chunks tokens, all but the last, and their skips are uniform between the last one and the same bounds.

        Args:
            tokens: the row's length. One shorter than a window is used whole.
            step: number of the optimizer step.
            place: place of the row in the step's global batch.

        Returns:
            Indices of the window's tokens in the row, and their position ids, both int64 [min(tokens, window)].
        """
        rng = np.random.default_rng([self.seed, step, place])
        size = min(tokens, self.window)
        cuts = np.zeros(size, np.int64)  # the chunk of each token
        for begin in np.cumsum(rng.integers(1, max(1, size // self.chunks), self.chunks - 1, endpoint=True)):
            cuts[begin:] += 1
        indices, positions = (
            np.arange(size) + self._skips(rng, most)[cuts]
            for most in (tokens - size if self.skip_text else 0, self.target - size)
        )
        return indices, positions

    def _skips(self, rng: np.random.Generator, most: int) -> IntArray:
        """The skip before each chunk, which never falls: 0 before the first, then each from the last to `most`."""
        skips = [0]
        for _ in range(self.chunks - 1):
            skips.append(int(rng.integers(skips[-1], most, endpoint=True)))
        return np.array(skips)


def skip_wise(
    recipe: Recipe, scaling: RopeScaling, others: Iterable[RopeScaling] = (), made_for: int | None = None
) -> SkipWise | None:
    """The windows of a recipe, for a model under `scaling`; None where positions are consecutive.

    others: the scalings of all layer types, where they differ.
    made_for: the length that the model is for under `scaling`, where it is not factor·L.

    Raises:
        ConfigError: a scaling that depends on the length or changes attention, one under which positions act in no
            layer, or one whose length is not beyond a window.
    """
    if recipe.positions != "pose":
        return None
    if all(one.method == "drope" and not follows_position(one) for one in (scaling, *others)):
        why = "without rotary embedding no layer has a use for position ids"
        raise ConfigError(f"positions: pose is not possible with {scaling.label}: {why}")
    if scaling.is_length_dependent or scaling.changes_attention:
        why = "the scale follows the length" if scaling.is_length_dependent else "attention looks at places, not at ids"
        raise ConfigError(f"positions: pose is not possible with {scaling.label}: {why}")
    target = recipe.max_position_embeddings or made_for or scaling.max_position_embeddings
    if target is None or target <= recipe.sequence_length:
        raise ConfigError(
            f"positions: pose needs a target beyond sequence_length {recipe.sequence_length}; {scaling.label} is for"
            f" {'no length' if target is None else target}. Set a factor, or max_position_embeddings"
        )
    return SkipWise(recipe.sequence_length, target, recipe.pose_chunks, recipe.skip_text, recipe.seed)
