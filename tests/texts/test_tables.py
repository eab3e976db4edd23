"""What the columns of tokenized tables mean, and rows that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts import tables
from scaled_rope.texts.packed import open_rows
from scaled_rope.texts.tables import ColumnDataset

datasets = pytest.importorskip("datasets")


def table(**columns: Any) -> ColumnDataset:
    """A table of one row, with tokens 5, 6, 7, 8 unless they are given."""
    columns = {"input_ids": [5, 6, 7, 8]} | columns
    return ColumnDataset(datasets.Dataset.from_dict({name: [row] for name, row in columns.items()}), "t")


@pytest.mark.parametrize(
    ("columns", "tokens", "weights"),
    [
        ({}, [5, 6, 7, 8], [1, 1, 1, 1]),
        ({"attention_mask": [1, 1, 1, 1]}, [5, 6, 7, 8], [1, 1, 1, 1]),
        ({"attention_mask": [1, 1, 1, 0]}, [5, 6, 7], [1, 1, 1]),
        ({"attention_mask": [False, False, True, True]}, [7, 8], [1, 1]),
        ({"attention_mask": [0, 1, 1, 0]}, [6, 7], [1, 1]),
        ({"attention_mask": [0.0, 1.0, 1.0, 1.0]}, [6, 7, 8], [1, 1, 1]),
        ({"attention_mask": [0, 0, 0, 0]}, [], []),
        ({"labels": [5, -100, 7, 8]}, [5, 6, 7, 8], [1, 0, 1, 1]),
        ({"labels": [-100, -100, 7, -100], "attention_mask": [0, 1, 1, 0]}, [6, 7], [0, 1]),
        ({"labels": [0, 6, 7, 8], "attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [1, 1, 1]),
        ({"loss_mask": [0, 1, 0, 1]}, [5, 6, 7, 8], [0, 1, 0, 1]),
        ({"loss_mask": [0.0, 1.0, 2.0, 1.0]}, [5, 6, 7, 8], [0, 1, 2, 1]),
        ({"assistant_masks": [True, False, True, True]}, [5, 6, 7, 8], [1, 0, 1, 1]),
        ({"assistant_mask": [1, 1, 0, 0], "labels": [-100, 6, 7, 8]}, [5, 6, 7, 8], [0, 1, 0, 0]),
        ({"completion_mask": [0, 0, 1, 1]}, [5, 6, 7, 8], [0, 0, 1, 1]),
        ({"position_ids": [0, 1, 2, 3]}, [5, 6, 7, 8], [1, 1, 1, 1]),
        ({"position_ids": [1, 1, 0, 1], "attention_mask": [0, 0, 1, 1]}, [7, 8], [1, 1]),
        ({"token_type_ids": [0, 0, 0, 0]}, [5, 6, 7, 8], [1, 1, 1, 1]),
        ({"input_ids": [-100, 6, 7, 8], "attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [1, 1, 1]),
        ({"input_ids": [], "labels": []}, [], []),
    ],
)
def test_columns_that_are_followed(columns: dict[str, Any], tokens: list[int], weights: list[int]) -> None:
    if "input_ids" in columns and not columns["input_ids"]:
        kinds = datasets.Features({name: datasets.Sequence(datasets.Value("int64")) for name in columns})
        rows = ColumnDataset(datasets.Dataset.from_dict({n: [[]] for n in columns}, features=kinds), "t")
    else:
        rows = table(**columns)
    found = rows.row(0)
    assert [part.tolist() for part in found] == [tokens, weights]
    assert all(part.dtype == "int64" for part in found)
    assert rows.longest == len(tokens)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask is 0 at token 1, between tokens; padding is at the ends"),
        ({"attention_mask": [1, 1, 2, 2]}, "attention_mask has the value 2; 0 for padding and 1 for tokens only"),
        ({"attention_mask": [0, 0.5, 1, 1]}, "attention_mask has the value 0.5; 0 for padding"),
        ({"attention_mask": [1, 1, 1]}, "attention_mask has 3 entries, input_ids 4"),
        ({"labels": [5, 6, 7]}, "labels has 3 entries, input_ids 4"),
        ({"labels": [6, 7, 8, -100]}, "labels are shifted to the next token; they stand beside their own token"),
        ({"labels": [-100, -100, 8, 1]}, "labels are shifted to the next token"),
        ({"labels": [5, 6, 9, 8]}, "labels differ from input_ids at token 2: 9, 7; they are the same tokens, or -100"),
        ({"loss_mask": [0.5, 1, 1, 1]}, "loss_mask has the value 0.5; weights are whole numbers, 0 or more"),
        ({"loss_mask": [-1, 1, 1, 1]}, "loss_mask has the value -1; weights"),
        ({"loss_mask": [float("nan"), 1, 1, 1]}, "loss_mask has the value nan; weights"),
        ({"loss_mask": [300, 1, 1, 1]}, "loss weight is 300 at token 0; at most 255"),
        ({"token_type_ids": [0, 0, 1, 1]}, "token_type_ids are not all 0: models get no segments here"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids are not 0, 1, 2, ...: 0 at token 2. .*documents: separate"),
        ({"position_ids": [9, 10, 11, 12]}, "position_ids are not 0, 1, 2, ...: 9 at token 0"),
        ({"input_ids": [5, -100, 7, 8]}, "has token id -100 in input_ids; ids begin at 0, and -100 belongs in labels"),
        ({"input_ids": [5, None, 7, 8]}, "input_ids has null"),
        ({"input_ids": [5, 6], "labels": [5, None]}, "labels has null"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(columns: dict[str, Any], message: str) -> None:
    rows = table(**columns)
    with pytest.raises(ConfigError, match=f"^row 0 of t:? {message}"):
        rows.row(0)
    with pytest.raises(ConfigError, match=f"^row 0 of t:? {message}"):
        rows.check(100)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"seq_lengths": [2, 2]}, "column seq_lengths is not allowed: it says where the documents of a row begin"),
        ({"pixel_values": [[0.5]]}, "column pixel_values is not allowed: only tokens are trained; or remove"),
        ({"input_ids": [0.5, 1.5]}, "column input_ids is not allowed as list.*double.*; a list of whole numbers"),
        ({"input_ids": "5 6 7"}, "column input_ids is not allowed as string"),
        ({"input_ids": [[5, 6], [7, 8]]}, "column input_ids is not allowed as list<"),
        ({"attention_mask": [[1, 1], [1, 1]]}, "column attention_mask is not allowed as list<"),
        ({"labels": 3}, "column labels is not allowed as int64"),
    ],
)
def test_columns_that_cannot_be_followed_are_refused_by_name(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table(**columns)


def test_the_whole_table_is_looked_at_before_training() -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6]] * 700 + [[5, 90]] + [[5, 6]] * 10})
    ColumnDataset(data, "t").check(91)
    with pytest.raises(ConfigError, match="row 700 of t has token id 90, the model's vocabulary ends at 89"):
        ColumnDataset(data, "t").check(90)
    with pytest.raises(ConfigError, match="row 2 of t has token id 90"):  # places are those of the rows selected
        ColumnDataset(data.select([3, 5, 700]), "t").check(90)
    empty = datasets.Dataset.from_dict({"input_ids": [[5], [], [6], []]})
    assert len(ColumnDataset(empty, "t").row(1)[0]) == 0
    with pytest.raises(ConfigError, match="2 of 4 rows hold no tokens, the first is row 1; remove them"):
        ColumnDataset(empty, "t").check(90)


def test_columns_without_a_meaning_are_listed_once(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    tables._tell_unused.cache_clear()
    for _ in range(2):
        table(special_tokens_mask=[1, 0, 0, 0], source="web", tokenized_len=4, loss_mask=[1, 1, 1, 1])
    assert capsys.readouterr().err == "note: dataset t: columns that are not used: source, special_tokens_mask\n"
    tables._tell_unused.cache_clear()
    monkeypatch.setenv("RANK", "1")
    table(source="web")
    assert capsys.readouterr().err == ""


def test_saved_tables_are_read_like_those_in_memory(tmp_path: Any) -> None:
    columns = {"input_ids": [[0, 0, 7, 8], [5, 6, 7, 8]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "table")
    rows = open_rows(str(tmp_path / "table"))
    assert rows.row(0)[0].tolist() == [7, 8] and rows.row(-1)[0].tolist() == [5, 6, 7, 8]
    assert not rows.weighted and rows.longest == 4
