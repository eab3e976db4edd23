"""Tokenized tables of the `datasets` library: what their columns mean for training, and which rows can be used.

A column that changes what is trained is followed or refused by name; the others are named once on stderr.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from scaled_rope.errors import ConfigError

#: columns of weights: how much each token counts as a target, under the names that trainers and chat templates use
LOSS_MASKS = (
    "loss_mask", "loss_weight", "loss_weights", "assistant_masks", "assistant_mask", "completion_mask",
)  # fmt: skip
IGNORED_LABEL = -100  # what torch's cross-entropy ignores, and so what other programs write where nothing is learnt
LARGEST_WEIGHT = 255  # of a packed set's loss_weight.bin
_ALONE = "or remove the column"
_BORDERS = (
    "it says where the documents of a row begin, and tables are trained with documents: joined; make a packed set"
)
#: columns that would change what is trained and are not followed -> the reason
REFUSED = {
    **dict.fromkeys(
        ("seq_lengths", "cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "segment_ids",
         "sequence_ids", "document_ids"),
        f"{_BORDERS} with tokenization.py --bookend document, {_ALONE} to train rows as one text",
    ),
    **dict.fromkeys(
        ("pixel_values", "image_grid_thw", "input_features", "inputs_embeds"),
        f"only tokens are trained; {_ALONE}",
    ),
    **dict.fromkeys(
        ("decoder_input_ids", "chosen_input_ids", "rejected_input_ids", "chosen_labels", "rejected_labels"),
        f"rows are trained as plain sequences; {_ALONE}",
    ),
}  # fmt: skip
#: columns that say nothing new, and are not worth a note: lengths that this project and `tokenizers` write
_QUIET = {"tokenized_len", "length"}

Record = Mapping[str, npt.NDArray[Any]]
IntRow = npt.NDArray[np.int64]


def check_ids(tokens: npt.NDArray[Any], vocabulary: int | None, row: int, name: str) -> None:
    """Raise an error for token ids that no embedding has.

    vocabulary: number of the model's embeddings; None: only negative ids are refused.

    Raises:
        ConfigError: a negative id, or one that is not below `vocabulary`.
    """
    if not len(tokens):
        return
    if tokens.min() < 0:
        raise ConfigError(
            f"row {row} of {name} has token id {tokens.min()} in input_ids; ids begin at 0, and -100 belongs in labels"
        )
    if vocabulary is not None and tokens.max() >= vocabulary:
        raise ConfigError(
            f"row {row} of {name} has token id {tokens.max()}, the model's vocabulary ends at"
            f" {vocabulary - 1}; tokenize with the model's own tokenizer"
        )


def read_row(record: Record, row: int, name: str) -> tuple[IntRow, IntRow]:
    """Tokens [T] and loss weights [T] of one record, without its padding.

    Args:
        record: column -> values of the row; `input_ids` and any columns that are followed.
        row, name: place of the record in errors.

    Raises:
        ConfigError: a column that does not fit `input_ids`, or that asks for what training does not do.
    """

    def refuse(column: str, problem: str) -> ConfigError:
        return ConfigError(f"row {row} of {name}: {column} {problem}")

    size = len(record["input_ids"])
    for column, values in record.items():
        if len(values) != size:
            raise refuse(column, f"has {len(values)} entries, input_ids {size}")
    real = slice(None)
    if "attention_mask" in record:
        mask = record["attention_mask"]
        if (other := mask[(mask != 0) & (mask != 1)]).size:
            raise refuse("attention_mask", f"has the value {other[0]:g}; 0 for padding and 1 for tokens only")
        (kept,) = np.nonzero(mask)
        if len(kept):
            real = slice(int(kept[0]), int(kept[-1]) + 1)
            if real.stop - real.start != len(kept):
                hole = real.start + int(np.argmin(mask[real]))
                raise refuse("attention_mask", f"is 0 at token {hole}, between tokens; padding is at the ends of a row")
        else:
            real = slice(0, 0)
    record = {column: values[real] for column, values in record.items()}
    tokens = record["input_ids"]
    if not len(tokens):
        return tokens.astype(np.int64), np.ones(0, np.int64)
    check_ids(tokens, None, row, name)
    weights = np.ones(len(tokens), np.int64)
    if "labels" in record:
        labels = record["labels"]
        learnt = labels != IGNORED_LABEL
        if (labels[learnt] != tokens[learnt]).any():
            ahead = learnt[:-1]
            shifted = ahead.any() and (labels[:-1][ahead] == tokens[1:][ahead]).all()
            where = int(np.argmax(learnt & (labels != tokens)))
            raise refuse(
                "labels",
                "are shifted to the next token; they stand beside their own token, and training shifts them"
                if shifted
                else f"differ from input_ids at token {where}: {labels[where]}, {tokens[where]}; they are the same"
                f" tokens, or {IGNORED_LABEL} where nothing is learnt",
            )
        weights *= learnt
    for column in LOSS_MASKS:
        if column in record:
            values = record[column].astype(np.float64)
            if (wrong := values[~(np.isfinite(values) & (values == np.floor(values)) & (values >= 0))]).size:
                raise refuse(column, f"has the value {wrong[0]:g}; weights are whole numbers, 0 or more")
            weights *= values.astype(np.int64)
    if weights.max() > LARGEST_WEIGHT:
        raise refuse("loss weight", f"is {weights.max()} at token {int(weights.argmax())}; at most {LARGEST_WEIGHT}")
    if "token_type_ids" in record and record["token_type_ids"].any():
        raise refuse("token_type_ids", f"are not all 0: models get no segments here; {_ALONE}")
    if "position_ids" in record:
        wanted = np.arange(len(tokens))
        if (record["position_ids"] != wanted).any():
            where = int(np.argmax(record["position_ids"] != wanted))
            raise refuse(
                "position_ids",
                f"are not 0, 1, 2, ...: {record['position_ids'][where]} at token {where}. Training sets positions by"
                f" itself: see documents: separate and positions: pose, {_ALONE}",
            )
    return tokens.astype(np.int64), weights


_FOLLOWED = ("input_ids", "attention_mask", "labels", *LOSS_MASKS, "token_type_ids", "position_ids")


@functools.cache
def _tell_unused(name: str, columns: tuple[str, ...]) -> None:
    """Say on stderr, once and from the first rank, which columns are not used."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"note: dataset {name}: columns that are not used: {', '.join(columns)}", file=sys.stderr)


class ColumnDataset:
    """A `datasets` table with `input_ids`; what its other columns mean is in docs/training.md.

    Raises:
        ConfigError: no `input_ids`, no rows, a column that cannot be followed, or one of another type than numbers.
    """

    def __init__(self, table: Any, name: str) -> None:
        columns = table.column_names
        if "input_ids" not in columns:
            raise ConfigError(f"dataset {name!r} has no column 'input_ids'; it has: {', '.join(columns)}")
        if not len(table):
            raise ConfigError(f"dataset {name!r} is empty")
        for column in columns:
            if column in REFUSED:
                raise ConfigError(f"dataset {name!r}: column {column} is not allowed: {REFUSED[column]}")
        self._name = name
        self._columns = [column for column in _FOLLOWED if column in columns]
        self._table = table.select_columns(self._columns).with_format("arrow")
        self._check_types()
        self.weighted = bool({"labels", *LOSS_MASKS} & set(columns))
        if unused := tuple(sorted(set(columns) - {*_FOLLOWED, *_QUIET})):
            _tell_unused(name, unused)

    def _check_types(self) -> None:
        from pyarrow import types

        for field in self._table.data.schema:
            kind = field.type
            lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
            value = kind.value_type if any(is_kind(kind) for is_kind in lists) else None
            allowed = value is not None and (types.is_integer(value) or types.is_boolean(value))
            if field.name in (*LOSS_MASKS, "attention_mask") and value is not None:
                allowed = allowed or types.is_floating(value)
            if not allowed:
                raise ConfigError(
                    f"dataset {self._name!r}: column {field.name} is not allowed as {kind}; a list of whole numbers"
                )

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row in the whole table, even if rows are selected; without its padding."""
        if "attention_mask" in self._columns:
            return max(int(np.count_nonzero(record["attention_mask"])) for _, record in self._records())
        from pyarrow import compute

        chunks = self._table.data.column("input_ids").chunks  # of these only the rows' offsets are read
        return max(compute.max(compute.list_value_length(chunk)).as_py() or 0 for chunk in chunks)

    def _record(self, rows: Any, place: int, index: int) -> Record:
        """The columns of one of the `rows`, a table of Arrow; `index` is its number in the whole table."""
        record = {}
        for column in self._columns:
            values = rows.column(column)[place].values
            if values is None or values.null_count:
                raise ConfigError(f"row {index} of {self._name}: {column} {'is' if values is None else 'has'} null")
            record[column] = values.to_numpy(zero_copy_only=False)
        return record

    def _records(self) -> Iterator[tuple[int, Record]]:
        index = 0
        for rows in self._table.iter(batch_size=256):
            rows = rows.combine_chunks()
            for place in range(len(rows)):
                yield index, self._record(rows, place, index)
                index += 1

    def __len__(self) -> int:
        return len(self._table)

    def row(self, index: int) -> tuple[IntRow, IntRow]:
        index = range(len(self))[index]
        return read_row(self._record(self._table[index], 0, index), index, self._name)

    def check(self, vocabulary: int) -> None:
        """Read all rows once, and raise an error for the first that cannot be trained on.

        vocabulary: number of the model's embeddings.

        Raises:
            ConfigError: as `read_row`, a token id that is not below `vocabulary`, or a row without tokens.
        """
        empty = []
        for index, record in self._records():
            tokens, _ = read_row(record, index, self._name)
            check_ids(tokens, vocabulary, index, self._name)
            if not len(tokens):
                empty.append(index)
        if empty:
            raise ConfigError(
                f"dataset {self._name}: {len(empty)} of {len(self)} rows hold no tokens, the first is row {empty[0]};"
                f" remove them"
            )
