"""Select the rows of each training step and make batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import IGNORE
from scaled_rope.recipes import Recipe
from scaled_rope.texts.packed import IntArray, TokenRows
from scaled_rope.texts.tables import check_ids

LoadedRow = tuple[IntArray, IntArray]  # tokens [T] and their loss weights [T]


def collate(rows: Sequence[LoadedRow], length: int) -> dict[str, torch.Tensor]:
    """Turn rows of tokens and weights into `input_ids`, `targets` (next token or -100) and `weights` (of the target).

    All are [B, T], padded on the right to T = `length`; a causal model does not see padding from any position that
    counts.
    """
    input_ids = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORE, np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    for place, (tokens, weight) in enumerate(rows):
        input_ids[place, : len(tokens)] = tokens
        targets[place, : len(tokens) - 1] = np.where(weight[1:] > 0, tokens[1:], IGNORE)
        weights[place, : len(tokens) - 1] = weight[1:]
    arrays = {"input_ids": input_ids, "targets": targets, "weights": weights}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_lengths(rows: TokenRows, recipe: Recipe) -> None:
    """Raise an error for rows that are longer than the recipe allows and are not to be cut.

    Raises:
        ConfigError: the longest row is too long.
    """
    if recipe.positions == "pose":
        return  # windows are drawn from longer rows
    if recipe.truncate is None and rows.longest > recipe.sequence_length:
        raise ConfigError(
            f"dataset {recipe.dataset} has a row of {rows.longest} tokens, more than sequence_length"
            f" {recipe.sequence_length}; set truncate, or re-cut the data with truncate.py"
        )


def step_batches(
    rows: TokenRows, recipe: Recipe, step: int, rank: int, ranks: int, vocabulary: int | None = None
) -> list[list[LoadedRow]]:
    """This rank's micro-batches of one optimizer step, each a list of `batch_size` rows of tokens and weights.

    A row's place in the step's global batch is that in `places`.

    Raises:
        ConfigError: a row with a token id outside the model's `vocabulary`.
    """
    indices = step_rows(len(rows), recipe.global_batch_size, step, recipe.seed)
    mine = rearrange(indices, "(step rank row) -> rank step row", rank=ranks, row=recipe.batch_size)[rank]

    def fetch(index: int) -> LoadedRow:
        tokens, weight = rows.row(index)
        if recipe.truncate is not None:
            tokens, weight = tokens[: recipe.truncate], weight[: recipe.truncate]
        check_ids(tokens, vocabulary, index, recipe.dataset)
        return tokens, weight

    return [[fetch(int(index)) for index in micro] for micro in mine]


def places(recipe: Recipe, micro: int, rank: int, ranks: int) -> range:
    """The places in a step's global batch of the rows of micro-batch number `micro` on a rank."""
    first = (micro * ranks + rank) * recipe.batch_size
    return range(first, first + recipe.batch_size)


def padded_positions(positions: Sequence[IntArray], length: int) -> IntArray:
    """Position ids of rows [t], each continued to `length` positions; [B, length]."""
    return np.stack([np.concatenate([row, row[-1] + 1 + np.arange(length - len(row))]) for row in positions])


@dataclass(frozen=True)
class DocumentBorders:
    """Finds where documents begin in packed rows: at each BOS, or after each EOS where the tokenizer has no BOS."""

    bos: int | None
    eos: int | None

    @classmethod
    def of(cls, rows: TokenRows, name: str) -> DocumentBorders:
        """Make the borders for a packed set.

        Raises:
            ConfigError: not a packed set, one whose rows do not mark documents, or no BOS and no EOS.
        """
        meta: dict[str, Any] = getattr(rows, "meta", {})
        if meta.get("bookend") != "document":
            raise ConfigError(
                f"documents: separate needs borders between documents, and dataset {name} does not say where they are;"
                f" make it with tokenization.py --bookend document"
            )
        if meta["bos"] is None and meta["eos"] is None:
            raise ConfigError(f"documents: separate is not possible: the tokenizer of {name} has neither BOS nor EOS")
        return cls(meta["bos"], meta["eos"])

    def starts(self, tokens: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each token [..., T] opens a document; the first of a row does."""
        if self.bos is not None:
            first: npt.NDArray[np.bool_] = tokens == self.bos
        else:
            first = np.roll(tokens == self.eos, 1, axis=-1)
        first[..., 0] = True
        return first

    def positions(self, tokens: IntArray) -> IntArray:
        """Position of each token [..., T] in its document, from 0, or in its row if the document began before that."""
        index = np.arange(tokens.shape[-1])
        begin = np.maximum.accumulate(np.where(self.starts(tokens), index, 0), axis=-1)
        positions: IntArray = index - begin
        return positions

    def cut_targets(self, tokens: IntArray, weights: IntArray) -> tuple[IntArray, IntArray]:
        """Return tokens [T] and weights [T], with weight 0 where a document would predict the next one's start."""
        return tokens, np.where(self.starts(tokens), 0, weights)


# ------------------------------------------------------------------------------------------------------- sampling


def step_rows(rows: int, global_batch: int, step: int, seed: int) -> IntArray:
    """The rows that optimizer step number `step` (from 0) consumes: a pure function, so resuming needs no state.

    Each epoch goes through the data in a new permutation; a batch may span two epochs.

    Returns:
        int64 [global_batch].
    """
    positions = np.arange(step * global_batch, (step + 1) * global_batch)
    epochs = positions // rows
    out = np.empty(global_batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(rows)
        chosen = epochs == epoch
        out[chosen] = order[positions[chosen] % rows]
    return out
