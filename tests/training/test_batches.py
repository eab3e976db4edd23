"""The rows of each step, as batches."""

from __future__ import annotations

import numpy as np
import pytest

import finetune
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import IGNORE
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.texts.tables import ColumnDataset
from scaled_rope.training.batches import (
    DocumentBorders,
    check_lengths,
    collate,
    own_positions,
    short_rows_note,
    step_batches,
    step_rows,
)
from scaled_rope.training.engine import accumulation
from tests.helpers.runs import LENGTH
from tests.helpers.training_recipes import recipe


def test_every_epoch_visits_every_row_once_and_resuming_needs_no_state():
    rows, batch = 23, 5
    walked = np.concatenate([step_rows(rows, batch, step, seed=3) for step in range(23)])
    for epoch in walked.reshape(5, rows):
        assert sorted(epoch) == list(range(rows))
    assert walked[:rows].tolist() != walked[rows : 2 * rows].tolist()
    np.testing.assert_array_equal(step_rows(rows, batch, 11, seed=3), walked[55:60])
    assert step_rows(rows, batch, 0, seed=4).tolist() != step_rows(rows, batch, 0, seed=3).tolist()
    # The global batch, not how it is split, decides the order of the data.
    assert np.concatenate([step_rows(rows, 10, step, seed=3) for step in range(2)]).tolist() == walked[:20].tolist()


def test_targets_are_the_next_tokens_and_padding_never_counts():
    rows = [(np.array([5, 6, 7, 8]), np.array([1, 1, 0, 3])), (np.array([9, 4]), np.array([1, 2]))]
    batch = collate(rows, 4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch["targets"].tolist() == [[6, IGNORE, 8, IGNORE], [4, IGNORE, IGNORE, IGNORE]]
    assert batch["weights"].tolist() == [[1, 0, 3, 0], [2, 0, 0, 0]]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_together_see_the_rows_of_one_rank(workspace, ranks, batch_size):
    rows = open_packed(workspace / "set")
    alone = step_batches(rows, recipe(), step=3, rank=0, ranks=1)
    split = [step_batches(rows, recipe(batch_size=batch_size), 3, rank, ranks) for rank in range(ranks)]
    assert all(len(batches) == accumulation(recipe(batch_size=batch_size), ranks) for batches in split)

    def seen(batches):
        return sorted(tuple(tokens.tolist()) for batch in batches for tokens, _ in batch)

    assert seen(alone) == seen([batch for batches in split for batch in batches])


@pytest.mark.parametrize(
    ("spec", "fields", "longest", "said"),
    [
        (
            "yarn:3",
            {},
            16,
            "rows have at most 16 tokens, not more than the original length, 16; the model is to be for 48",
        ),
        ("yarn:3", {"truncate": 12}, LENGTH, "rows have at most 12 tokens"),
        ("default", {"max_position_embeddings": 32}, 16, "the model is to be for 32 (unscaled)"),
        ("yarn:3", {}, 17, ""),
        ("default", {}, 16, ""),
        ("dynamic-yarn", {}, 16, ""),
        ("dynamic-ntk:4", {}, 16, ""),
        ("drope:3", {}, 16, ""),
        ("yarn:3", {"positions": "pose", "sequence_length": 16}, 16, ""),
    ],
)
def test_rows_that_leave_the_longer_positions_untrained_are_told_of(spec, fields, longest, said):
    scaling = RopeScaling.from_spec(spec, RopeScaling("default", original_max_position_embeddings=16))
    note = short_rows_note(recipe(**fields), scaling, longest)
    assert note.startswith("note: ") == bool(said) and said in note and "\n" not in note


def test_a_run_on_short_rows_says_so_once(workspace, tmp_path, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--max-train-steps", "2"]
    assert finetune.main([*arguments, "--truncate", "16", "--output-dir", str(tmp_path / "short")]) == 0
    assert capsys.readouterr().out.count("and nothing beyond 16 is trained") == 1
    assert finetune.main([*arguments, "--output-dir", str(tmp_path / "long")]) == 0
    assert "is trained" not in capsys.readouterr().out


def test_rows_longer_than_the_recipe_says_are_refused_unless_cut(workspace):
    """By a packed set's shape, and by the longest row of a table, without reading either."""
    rows = open_packed(workspace / "set")
    with pytest.raises(ConfigError, match=f"a row of {LENGTH} tokens, more than sequence_length 32"):
        check_lengths(rows, recipe(sequence_length=32))
    check_lengths(rows, recipe(sequence_length=LENGTH))
    check_lengths(rows, recipe(sequence_length=32, truncate=32))
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1] * 5, [2] * 33, []]})
    table = datasets.concatenate_datasets([table, datasets.Dataset.from_dict({"input_ids": [[3] * 32]})])
    with pytest.raises(ConfigError, match="a row of 33 tokens, more than sequence_length 32"):
        check_lengths(ColumnDataset(table, "table"), recipe(sequence_length=32))
    check_lengths(ColumnDataset(table, "table"), recipe(sequence_length=33))
    tokens, weights = step_batches(rows, recipe(sequence_length=32, truncate=32), 0, 0, 1)[0][0]
    assert len(tokens) == len(weights) == 32


def test_tokens_outside_the_vocabulary_are_refused(workspace):
    with pytest.raises(ConfigError, match="vocabulary ends at 39; tokenize with the model's own tokenizer"):
        step_batches(open_packed(workspace / "set"), recipe(), 0, 0, 1, vocabulary=40)


def test_position_ids_end_with_the_last_target():
    tokens, weights = np.arange(6), np.array([1, 1, 0, 1, 0, 0])
    assert own_positions((tokens, weights)).tolist() == [0, 1, 2, 3, 3, 3]
    assert own_positions((tokens, weights), np.array([0, 1, 2, 0, 0, 1])).tolist() == [0, 1, 2, 0, 2, 2]
    assert own_positions((tokens, np.ones(6))).tolist() == list(range(6))


def test_separate_documents_need_their_borders(workspace, tmp_path, capsys):
    arguments = [str(workspace / "recipe.yaml"), "--documents", "separate", "--output-dir", str(tmp_path)]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert "does not say where they are; make it with tokenization.py --bookend document" in capsys.readouterr().err


def unrecorded(tmp_path, rows, **meta):
    with PackedWriter(tmp_path / "old", len(rows[0]), 64) as writer:
        for row in rows:
            writer.append(row)
        writer.close({"bookend": "document"} | meta)
    return open_packed(tmp_path / "old")


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [(0, 1, [0, 1, 2, 0, 1, 2]), (0, None, [0, 1, 2, 0, 1, 2]), (None, 1, [0, 1, 2, 0, 1, 2])],
)
def test_a_set_without_a_record_is_read_by_ids_and_said_so(tmp_path, bos, eos, expected):
    borders = DocumentBorders.of(unrecorded(tmp_path, [[0, 7, 1, 0, 8, 9]], bos=bos, eos=eos), "old")
    (tokens, weights), positions = borders.separate(0, (np.array([0, 7, 1, 0, 8, 9]), np.ones(6, np.int64)))
    assert positions.tolist() == expected
    assert weights.tolist() == [0, 1, 1, 0, 1, 1]
    assert "was made without a record of its documents" in borders.note


@pytest.mark.parametrize(
    ("row", "ids", "message"),
    [
        ([0, 7, 0, 0, 8, 0], (0, 0), "token 0 both opens and closes them; make it again with tokenization.py"),
        ([0, 7, 1, 0, 8, 0], (0, 1), r"in row 0 BOS and EOS \(0 and 1\) stand inside documents too"),
        ([0, 7, 1, 9, 8, 5], (0, 1), "stand inside documents too"),
        ([0, 7, 1, 9, 8, 5], (None, None), "neither BOS nor EOS"),
    ],
)
def test_a_set_without_a_record_is_refused_where_ids_do_not_say(tmp_path, row, ids, message):
    with pytest.raises(ConfigError, match=message):
        DocumentBorders.of(unrecorded(tmp_path, [row], bos=ids[0], eos=ids[1]), "old")
