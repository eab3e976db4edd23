"""Select the rows of each training step and make batches of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange

from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import IGNORE
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.packed import IntArray, PackedDataset, TokenRows
from scaled_rope.texts.tables import check_ids

LoadedRow = tuple[IntArray, IntArray]  # tokens [T] and their loss weights [T]


def collate(rows: Sequence[LoadedRow], length: int) -> dict[str, torch.Tensor]:
    """Turn rows of tokens and weights into `input_ids`, `targets` (next token or -100) and `weights` (of the target).

    All are [B, T], padded on the right to T = `length`; a causal model does not see padding from any position that
    counts. A scaling that follows the length does see it, unless position ids end before (`padded_positions`).
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


def short_rows_note(recipe: Recipe, scaling: RopeScaling, longest: int, made_for: int | None = None) -> str:
    """A line that says that no row reaches beyond the original length of a scaling for longer texts; "" where one does.

    There is none for what is trained at the original length on purpose: position ids that jump, and DroPE, whose
    recalibration is to learn texts without positions.

    Args:
        scaling: the model's.
        longest: tokens of the data's longest row.
        made_for: the length that the model is for under it, where it is not factor·L.
    """
    original, rows = scaling.original_max_position_embeddings, min(longest, recipe.truncate or longest)
    target = recipe.max_position_embeddings or made_for or scaling.max_position_embeddings
    if original is None or target is None or not rows <= original < target:
        return ""
    if recipe.positions != "consecutive" or scaling.method == "drope":
        return ""
    return (
        f"note: rows have at most {rows} tokens, not more than the original length, {original}; the model is to be for"
        f" {target} ({scaling.label}), and nothing beyond {original} is trained"
    )


def step_batches(
    rows: TokenRows, recipe: Recipe, step: int, rank: int, ranks: int, vocabulary: int | None = None
) -> list[list[LoadedRow]]:
    """This rank's micro-batches of one optimizer step, each a list of `batch_size` rows of tokens and weights.

    A row's place in the step's global batch is that in `places`.

    Raises:
        ConfigError: a row with a token id outside the model's `vocabulary`.
    """

    def fetch(index: int) -> LoadedRow:
        tokens, weight = rows.row(index)
        if recipe.truncate is not None:
            tokens, weight = tokens[: recipe.truncate], weight[: recipe.truncate]
        check_ids(tokens, vocabulary, index, recipe.dataset)
        return tokens, weight

    return [[fetch(int(index)) for index in micro] for micro in step_indices(len(rows), recipe, step, rank, ranks)]


def step_indices(rows: int, recipe: Recipe, step: int, rank: int, ranks: int) -> IntArray:
    """The numbers of the rows in `step_batches`, out of `rows` rows; [micro-batches, batch_size]."""
    indices = step_rows(rows, recipe.global_batch_size, step, recipe.seed)
    mine: IntArray = rearrange(indices, "(step rank row) -> rank step row", rank=ranks, row=recipe.batch_size)[rank]
    return mine


def places(recipe: Recipe, micro: int, rank: int, ranks: int) -> range:
    """The places in a step's global batch of the rows of micro-batch number `micro` on a rank."""
    first = (micro * ranks + rank) * recipe.batch_size
    return range(first, first + recipe.batch_size)


def padded_positions(positions: Sequence[IntArray], length: int, hold: bool = False) -> IntArray:
    """Position ids of rows [t], each continued to `length` positions; [B, length].

    hold: repeat the row's largest one instead, so that it still tells the row's length.
    """
    rows = []
    for row in positions:
        more = np.arange(length - len(row))
        rows.append(np.concatenate([row, np.full_like(more, row.max()) if hold else row[-1] + 1 + more]))
    return np.stack(rows)


def own_positions(row: LoadedRow, positions: IntArray | None = None) -> IntArray:
    """Position ids [t] of a row by which a scaling that follows the length sees what counts, and no padding behind it.

    They end with the last target: the ids behind it repeat the largest one up to there.

    positions: those that the row has otherwise; None: 0, 1, 2, ….
    """
    tokens, weights = row
    ids = np.arange(len(tokens)) if positions is None else positions.copy()
    targets = np.flatnonzero(weights)
    end = int(targets[-1]) + 1 if len(targets) else 1
    ids[end:] = ids[:end].max()
    return ids


class DocumentBorders:
    """Where documents begin in packed rows: by the set's own record, or by token ids where a set has none.

    Attributes:
        note: what to tell about a set without a record; "" if there is one.
    """

    def __init__(self, rows: PackedDataset, name: str) -> None:
        """Find out how the documents of a set are told apart.

        Raises:
            ConfigError: a set without a record whose documents cannot be told apart by token ids.
        """
        self._rows, self.note = rows, ""
        if rows.borders is not None:
            return
        meta = rows.meta
        if meta.get("bookend") != "document":
            raise ConfigError(
                f"documents: separate needs borders between documents, and dataset {name} does not say where they are;"
                f" make it with tokenization.py --bookend document"
            )
        self._bos, self._eos = meta["bos"], meta["eos"]
        again = "; make it again with tokenization.py, which keeps a record"
        if self._bos is None and self._eos is None:
            raise ConfigError(
                f"documents: separate is not possible: dataset {name} has no record of its documents, and its tokenizer"
                f" neither BOS nor EOS{again}"
            )
        if self._bos == self._eos:
            raise ConfigError(
                f"documents: separate is not possible: dataset {name} has no record of its documents, and token"
                f" {self._bos} both opens and closes them{again}"
            )
        if self._bos is not None and self._eos is not None:
            for index in range(len(rows)):
                tokens = rows.tokens[index]
                if not np.array_equal(tokens[1:] == self._bos, tokens[:-1] == self._eos):
                    raise ConfigError(
                        f"documents: separate is not possible: dataset {name} has no record of its documents, and in"
                        f" row {index} BOS and EOS ({self._bos} and {self._eos}) stand inside documents too{again}"
                    )
        self.note = (
            f"note: dataset {name} was made without a record of its documents; token {self._sign} tells them apart"
        )

    @classmethod
    def of(cls, rows: TokenRows, name: str) -> DocumentBorders:
        """The borders of tokenized data.

        Raises:
            ConfigError: it is no packed set, or one whose documents cannot be told apart.
        """
        if not isinstance(rows, PackedDataset):
            raise ConfigError(
                f"documents: separate needs borders between documents, and dataset {name} does not say where they are;"
                f" make it with tokenization.py --bookend document"
            )
        return cls(rows, name)

    @property
    def _sign(self) -> str:
        return f"{self._eos} (EOS)" if self._bos is None else f"{self._bos} (BOS)"

    def starts(self, index: int, tokens: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each token [t] of row number `index` opens a document; the first of a row does.

        tokens: the row's, or its first ones.
        """
        places = self._rows.document_starts(index)
        if places is not None:
            first: npt.NDArray[np.bool_] = np.zeros(len(tokens), np.bool_)
            first[places[places < len(tokens)]] = True
        elif self._bos is not None:
            first = tokens == self._bos
        else:
            first = np.roll(tokens == self._eos, 1)
        first[0] = True
        return first

    def separate(self, index: int, row: LoadedRow) -> tuple[LoadedRow, IntArray]:
        """Return row number `index` with weight 0 where a document would predict the next one's first token, and the
        position of each of its tokens [t] in its document, from 0, or in the row if the document began before that."""
        tokens, weights = row
        first = self.starts(index, tokens)
        place = np.arange(len(tokens))
        positions: IntArray = place - np.maximum.accumulate(np.where(first, place, 0))
        return (tokens, np.where(first, 0, weights)), positions


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
