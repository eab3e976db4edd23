"""Perplexity during training, on rows that are not trained on."""

from __future__ import annotations

import math
from typing import Any

import torch

from scaled_rope.errors import ConfigError
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.texts.packed import IntArray, open_rows
from scaled_rope.texts.tables import check_ids
from scaled_rope.training.batches import DocumentBorders, LoadedRow, collate, own_positions
from scaled_rope.training.engine import restore_heads


class Heldout:
    """Perplexity at several lengths on rows that are not trained on: the first of the recipe's `heldout` set.

    Raises:
        ConfigError: fewer rows than asked for, or rows that are shorter than the longest length.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.rows = rows = open_rows(str(recipe.heldout))
        longest = max(recipe.heldout_lengths)
        if len(rows) < recipe.heldout_rows:
            raise ConfigError(f"heldout {recipe.heldout} has {len(rows)} rows; heldout_rows is {recipe.heldout_rows}")
        self._lengths, self._name = recipe.heldout_lengths, str(recipe.heldout)
        self._rows: list[LoadedRow] = []
        self._positions: list[IntArray] | None = None
        self.note, borders = "", None
        if recipe.documents != "joined":
            try:
                borders, self._positions = DocumentBorders.of(rows, self._name), []
            except ConfigError:
                self.note = f"heldout {self._name} does not say where its documents begin; a row is read as one"
        for index in range(recipe.heldout_rows):
            row = rows.row(index)
            if len(row[0]) < longest:
                raise ConfigError(f"heldout {self._name}, row {index}: {len(row[0])} tokens, fewer than {longest}")
            row = row[0][:longest], row[1][:longest]
            if borders is not None and self._positions is not None:
                row, ids = borders.separate(index, row)
                self._positions.append(ids)
            self._rows.append(row)
        self._separate = borders is not None
        self._weights = [sum(float(weight[1:n].sum()) for _, weight in self._rows) for n in self._lengths]
        for n, weight in zip(self._lengths, self._weights, strict=True):
            if not weight:
                raise ConfigError(
                    f"heldout_lengths {n} is not allowed: the first {n} tokens of heldout {self._name} have no targets"
                )

    def follow_lengths(self) -> None:
        """Let padding be no part of a row's length, for a model whose scaling follows the length."""
        if any(not weights[-1] for _, weights in self._rows):
            self._positions = [
                own_positions(row, None if self._positions is None else self._positions[place])
                for place, row in enumerate(self._rows)
            ]

    def check(self, vocabulary: int) -> None:
        """Raise a ConfigError for a token id that is not below `vocabulary`, the number of the model's embeddings."""
        for index, (tokens, _) in enumerate(self._rows):
            check_ids(tokens, vocabulary, index, f"heldout {self._name}")

    def perplexity(self, accelerator: Any, module: Any) -> dict[str, float]:
        """exp of the mean loss of all targets within each length, weighted as in training. Every rank must call this.

        Padding and what is not to be learnt do not count; packed documents are read apart if they are trained apart.
        """
        rank, ranks, rows = accelerator.process_index, accelerator.num_processes, self._rows
        sums = torch.zeros(len(self._lengths), device=accelerator.device)
        module.eval()
        restore_heads(accelerator.unwrap_model(module).model)
        with torch.no_grad():
            for first in range(0, len(rows), ranks):  # equally many passes on every rank, as ZeRO-3 needs
                mine = first + rank
                place = min(mine, len(rows) - 1)
                batch = collate([rows[place]], len(rows[place][0]))
                if self._positions is not None:
                    batch["position_ids"] = torch.from_numpy(self._positions[place][None])
                tensors = {name: value.to(accelerator.device) for name, value in batch.items()}
                nll = module(**tensors, separate=self._separate, reduce=False)[0] * tensors["weights"][0]
                if mine < len(rows):
                    sums += torch.stack([nll[: length - 1].sum() for length in self._lengths])
        module.train()
        totals = accelerator.reduce(sums, "sum").tolist()
        # 700 below: exp overflows float64 above 709.
        means = [total / weight for total, weight in zip(totals, self._weights, strict=True)]
        return {str(n): round(math.exp(min(mean, 700.0)), 4) for n, mean in zip(self._lengths, means, strict=True)}
