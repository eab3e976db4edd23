"""PoSE: windows whose position ids jump, and training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finetune
from scaled_rope.errors import ConfigError
from scaled_rope.patching.patch import patch_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.packed import PackedWriter, open_packed, open_rows
from scaled_rope.training.batches import padded_positions, places, step_batches
from scaled_rope.training.loop import Loop
from scaled_rope.training.pose import SkipWise, skip_wise
from tests.helpers.runs import LENGTH, command, log, weights


def recipe(**fields: object) -> Recipe:
    given = {"name": "t", "output_dir": "out", "dataset": "d", "sequence_length": 64, "global_batch_size": 4}
    return Recipe(**{**given, "model": "m", "positions": "pose", **fields})  # type: ignore[arg-type]


def reference(rng: np.random.Generator, tokens: int, window: int, target: int) -> tuple[list[int], list[int]]:
    """Two chunks as the paper's released procedure draws them, in plain Python."""
    size = min(tokens, window)
    first = int(rng.integers(1, max(1, size // 2), endpoint=True))
    text_skip = int(rng.integers(0, tokens - size, endpoint=True))
    position_skip = int(rng.integers(0, target - size, endpoint=True))
    later = range(first, size)
    return (
        [*range(first), *(index + text_skip for index in later)],
        [*range(first), *(index + position_skip for index in later)],
    )


@pytest.mark.parametrize(("tokens", "window"), [(300, 64), (64, 64), (17, 64), (2, 64), (300, 4)])
def test_two_chunks_are_those_of_the_paper(tokens: int, window: int) -> None:
    drawn = SkipWise(window, 512, seed=9)
    for step in range(20):
        indices, positions = drawn.draw(tokens, step, 3)
        expected = reference(np.random.default_rng([9, step, 3]), tokens, window, 512)
        assert (indices.tolist(), positions.tolist()) == expected


@pytest.mark.parametrize("chunks", [2, 3, 5])
@pytest.mark.parametrize("skip_text", [True, False])
def test_windows(chunks: int, skip_text: bool) -> None:
    drawn = SkipWise(40, 320, chunks, skip_text, seed=1)
    reached, distances, borders = set(), set(), set()
    for place in range(3000):
        indices, positions = drawn.draw(200, 0, place)
        assert len(indices) == len(positions) == 40 and positions[0] == 0 and positions[-1] < 320
        assert (np.diff(indices) >= 1).all() and (np.diff(positions) >= 1).all() and indices[-1] < 200
        assert skip_text or indices.tolist() == list(range(40))
        jumps = np.flatnonzero(np.diff(positions) > 1)
        assert len(jumps) <= chunks - 1
        if len(jumps) == chunks - 1:  # the text can jump where positions do only
            assert set(np.flatnonzero(np.diff(indices) > 1)) <= set(jumps)
        borders |= set((jumps + 1).tolist())
        reached.add(int(positions[-1]))
        distances |= set((positions[-1] - positions).tolist())
    assert max(borders) <= (chunks - 1) * (40 // chunks) and min(borders) == 1
    # With two chunks the last position is uniform from 39 to 319; more chunks only push it to the end.
    assert {39, 319} <= reached if chunks == 2 else 319 in reached
    assert len(distances) == 320  # every relative position up to the target is trained


def test_a_window_depends_on_its_place_alone() -> None:
    drawn = SkipWise(64, 512)
    first, again = drawn.draw(300, 5, 2), drawn.draw(300, 5, 2)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert not np.array_equal(drawn.draw(300, 5, 3)[1], first[1])
    assert not np.array_equal(drawn.draw(300, 6, 2)[1], first[1])


def test_places_are_those_of_the_global_batch(tmp_path: Path) -> None:
    """With any number of ranks, each row of a step has the place that it has on one."""
    one = recipe(global_batch_size=8, batch_size=2)
    for ranks in (1, 2, 4):
        order = [(micro, rank) for micro in range(4 // ranks) for rank in range(ranks)]
        seen = [place for micro, rank in order for place in places(one, micro, rank, ranks)]
        assert seen == list(range(8))
    with PackedWriter(tmp_path / "set", 4, 100) as writer:
        for row in range(8):
            writer.append([row] * 4)
        writer.close({})
    rows = open_rows(str(tmp_path / "set"))
    alone = step_batches(rows, one, 0, 0, 1)
    by_place = {place: int(alone[micro][index][0][0]) for micro in range(4)
                for index, place in enumerate(places(one, micro, 0, 1))}  # fmt: skip
    for rank in range(2):
        for micro, batch in enumerate(step_batches(rows, one, 0, rank, 2)):
            for index, place in enumerate(places(one, micro, rank, 2)):
                assert int(batch[index][0][0]) == by_place[place]


def test_padding_goes_on() -> None:
    rows = [np.array([0, 1, 7, 8]), np.array([0, 5])]
    assert padded_positions(rows, 5).tolist() == [[0, 1, 7, 8, 9], [0, 5, 6, 7, 8]]


BASE = RopeScaling("default", original_max_position_embeddings=64)


@pytest.mark.parametrize("spec", ["yarn:8", "linear:8", "ntk-by-parts:8", "cope,clip=2"])
def test_static_scalings(spec: str) -> None:
    target = None if spec.startswith("cope") else 512
    made = skip_wise(recipe(max_position_embeddings=512 if target is None else None), RopeScaling.from_spec(spec, BASE))
    assert made == SkipWise(64, 512, 2, True, 42)


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        ("dynamic-yarn", {}, "positions: pose is not possible with dynamic-yarn.*: the scale follows the length"),
        ("rerope,window=16", {}, "positions: pose is not possible with .*: attention looks at places"),
        ("drope:8", {}, "positions: pose is not possible with drope x8: without rotary embedding no layer has a use"),
        ("drope:8,attention_temperature=constant,temperature_slope=0.1", {}, "no layer has a use for position ids"),
        ("default", {}, "needs a target beyond sequence_length 64; unscaled is for 64"),
        ("yarn:8", {"sequence_length": 512}, "needs a target beyond sequence_length 512; yarn x8 is for 512"),
    ],
)
def test_scalings_that_cannot(spec: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        skip_wise(recipe(**fields), RopeScaling.from_spec(spec, BASE))


def test_without_rotary_embedding_something_else_must_follow_positions() -> None:
    by_position = RopeScaling.from_spec("drope:8,attention_temperature=log", BASE)
    # Llama 3.1 is for 131072 tokens at 8 times 8192, as its config says.
    assert skip_wise(recipe(), RopeScaling.from_spec("llama3:8", BASE), (), 1024) == SkipWise(64, 1024, 2, True, 42)
    assert skip_wise(recipe(), by_position) == SkipWise(64, 512, 2, True, 42)
    dropped = RopeScaling.from_spec("drope:8", BASE)
    assert skip_wise(recipe(), dropped, [dropped, BASE]) == SkipWise(64, 512, 2, True, 42)  # windows still rotate


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "skip"}, "positions = 'skip' is not allowed; one of: consecutive, pose"),
        ({"documents": "separate"}, "documents = 'separate' is not allowed; joined"),
        ({"truncate": 32}, "truncate = 32 is not allowed"),
        ({"pose_chunks": 1}, "pose_chunks = 1 is not allowed; at least 2"),
        ({"pose_chunks": 40}, "pose_chunks = 40 is not allowed; at most"),
        ({"positions": "consecutive", "pose_chunks": 3}, "pose_chunks = 3 is not allowed; it is for positions: pose"),
        ({"positions": "consecutive", "skip_text": False}, "skip_text = False is not allowed; it is for"),
    ],
)
def test_recipes_that_cannot(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**fields)


def test_consecutive_positions_draw_nothing() -> None:
    assert skip_wise(recipe(positions="consecutive"), RopeScaling.from_spec("yarn:8", BASE)) is None


# ------------------------------------------------------------------------------------------------------ whole runs

WINDOW = ("--positions", "pose", "--sequence-length", "16")
"""Windows of the trained length, of rows of 48 tokens; yarn:3 extends 16 positions to 48."""


def test_a_step_is_that_of_the_windows_alone(workspace: Path, tmp_path: Path) -> None:
    """The first loss of a run, against the windows one by one through the model's own forward pass."""
    from transformers import AutoModelForCausalLM

    assert finetune.main(command(workspace, tmp_path / "run", (*WINDOW, "--max-train-steps", "2"))) == 0
    rows = log(tmp_path / "run")
    assert [row["tokens"] for row in rows] == [4 * 16] * 2
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    patch_model(model, "yarn:3")
    resolved = read_recipe(str(workspace / "recipe.yaml"))
    data, drawn = open_packed(workspace / "set"), SkipWise(16, LENGTH, seed=resolved.seed)
    total = count = 0.0
    jumped = 0
    for micro, batch in enumerate(step_batches(data, resolved, 0, 0, 1)):
        for place, (tokens, weight) in zip(places(resolved, micro, 0, 1), batch, strict=True):
            indices, positions = drawn.draw(len(tokens), 0, place)
            jumped += int(positions[-1] > 15)
            ids = torch.from_numpy(tokens[indices])[None]
            with torch.no_grad():  # a mask, or the jump would be taken for a border between texts
                given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.from_numpy(positions)[None]}
                scores = model(input_ids=ids, **given).logits.double().log_softmax(-1)[0, :-1]
            each = torch.from_numpy(weight[indices][1:]).double()
            total -= float((scores.gather(1, ids[0, 1:, None])[:, 0] * each).sum())
            count += float(each.sum())
    assert jumped > 1
    # float32 forward against float64 softmax of the same logits
    assert rows[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| positions | PoSE, 2 chunks per sequence, from several places of a row |" in card


def test_a_run_that_was_stopped_draws_the_same_windows(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = (*WINDOW, "--no-skip-text", "--pose-chunks", "3", "--max-train-steps", "4", "--checkpointing-steps", "2")
    assert finetune.main(command(workspace, tmp_path / "whole", extra)) == 0

    class Killed(Exception):
        pass

    inner = Loop.optimizer_step

    def step(self: Loop, number: int) -> Any:
        if number == 3:
            raise Killed
        return inner(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "optimizer_step", step)
        with pytest.raises(Killed):
            finetune.main(command(workspace, tmp_path / "parts", extra))
    assert finetune.main(command(workspace, tmp_path / "parts", extra)) == 0
    assert [row["loss"] for row in log(tmp_path / "parts")] == [row["loss"] for row in log(tmp_path / "whole")]
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
