"""The training set of the embedded base, built from small texts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import build_base
from scaled_rope.errors import ConfigError
from scaled_rope.texts.packed import open_packed

WORDS = "we shall give them the law of all the days and then it was for a man to see that he is not so".split()


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "books": ["Austen, Jane - Pride and Prejudice", "Some novel", "King James Bible"],
        "novels": ["Another novel"],
        "bible": ["01 Genesis", "04 Numbers", "26 Ezekiel", "44 Acts"],
        "sotu": [f"{year}_president" for year in range(1790, 1802)],
        "hol-light": ["Jordan/curve.ml", "Library/words.ml", "Rqe/asym.ml", "sets.ml"],
    }
    for source, names in files.items():
        for index, name in enumerate(names):
            path = tmp_path / source / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(prose(index, 700))
    monkeypatch.setattr(build_base, "standin", lambda name: tmp_path / name.removeprefix("standin:"))
    return tmp_path


def test_held_out_texts_are_in_no_training_set(folders: Path) -> None:
    heldout = {kind: set(build_base.read_kind(kind, heldout=True)) for kind in build_base.KINDS}
    assert heldout == {
        "novels": {"Austen, Jane - Pride and Prejudice"},
        "bible": {"04 Numbers", "26 Ezekiel", "44 Acts"},
        "speeches": {"1795_president"},
        "mathematics": {"Jordan/curve.ml", "Rqe/asym.ml"},
    }
    for kind, names in heldout.items():
        train = set(build_base.read_kind(kind))
        assert train and not train & names
        assert "King James Bible" not in train  # its books are a kind of their own


def test_a_small_set(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "base"
    assert build_base.main(["--output", str(output), "--rows", "60"]) == 0
    for name, row_set in build_base.SETS.items():
        rows = open_packed(output / name)
        meta = json.loads((output / name / "meta.json").read_text())
        assert len(rows) == meta["rows"] == 60
        counts = [source["rows"] for source in meta["sources"].values()]
        assert sum(counts) + sum(meta["made_rows"].values()) == 60 and sum(counts) > 0
        assert meta["made_rows"].keys() == row_set.made.keys()
        assert {int(rows.row(index)[0][0]) for index in range(60)} == {0}
        weighted = sum(int((rows.row(index)[1] == 8).any()) for index in range(60))
        assert weighted == meta["made_rows"].get("needles", 0) + meta["made_rows"].get("lists", 0)
    before = (output / "rows" / "tokens.bin").read_bytes()
    shutil.rmtree(output / "retrieval")
    assert build_base.main(["--output", str(output), "--rows", "60"]) == 0  # makes what is missing
    assert (output / "rows" / "tokens.bin").read_bytes() == before
    assert build_base.main(["--output", str(tmp_path / "again"), "--rows", "60"]) == 0
    for name in build_base.SETS:
        one, other = ((folder / name / "tokens.bin").read_bytes() for folder in (output, tmp_path / "again"))
        assert one == other


class TinyTokenizer:
    bos_token_id = 0

    def __len__(self) -> int:
        return 500


@pytest.mark.parametrize("longest", [24, 100])
@pytest.mark.parametrize("make", [build_base.copy_row, build_base.period_row])
def test_what_counts_in_a_repeating_row_stood_there_before(make: Any, longest: int) -> None:
    tokenizer = TinyTokenizer()
    stretches = {"novels": build_base.Stretches([list(range(3000))], random.Random(0))}
    for seed in range(20):
        row, weights = make(tokenizer, stretches, random.Random(seed), longest)
        assert len(row) == len(weights) == build_base.LENGTH and row[0] == 0 and 0 in weights and 1 in weights
        for place, weight in enumerate(weights):
            assert weight == 0 or row[place] in row[max(0, place - longest) : place]


def test_every_stretch_comes_once_per_round() -> None:
    stretches = build_base.Stretches([np.arange(1000).tolist(), np.arange(2000, 2700).tolist()], random.Random(0))
    drawn = [stretches.next(100) for _ in range(14)]
    assert stretches.rounds == 1
    starts = [stretch[0] for stretch in drawn]
    assert len(set(starts)) == 14 and all(stretch == list(range(stretch[0], stretch[0] + 100)) for stretch in drawn)
    for _ in range(4):
        stretches.next(100)
    assert stretches.rounds == 2
    with pytest.raises(ConfigError, match="no text has 5000 tokens"):
        build_base.Stretches([[1] * 100], random.Random(0)).next(5000)


def test_shares_sum_to_one() -> None:
    assert sum(kind.share for kind in build_base.KINDS.values()) == pytest.approx(0.75)  # needles: the other quarter
    assert all(sum(row_set.made.values()) < 1 for row_set in build_base.SETS.values())
    assert all(sum(split) + 2 * len(split) <= build_base.LENGTH for split in build_base.SPLITS)
