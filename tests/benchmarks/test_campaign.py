"""The campaign: it notices what must not be, does nothing twice, and counts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import campaign
from benchmarks.campaign_trials import DAMAGES, damage
from scaled_rope.command_line import run_cli
from tests.helpers.careless import campaign_rows


@pytest.mark.slow
def test_a_small_campaign_of_real_runs(tmp_path: Path) -> None:
    """Kills, faults of the disk and damages; begun again, it goes on where it was."""
    counts = {"kill": {"tokenization": 3, "export": 3, "perplexity": 1}, "full disk": {"tokenization": 1},
              "removed": {"export": 1}, "damage": {"packed set": 15}}  # fmt: skip
    rows = campaign_rows(tmp_path, (), counts | {"damage": {}})
    assert len(rows) == 9
    rows = campaign_rows(tmp_path, (), counts)
    assert len({row["trial"] for row in rows}) == len(rows) == 9 + 3 * len(DAMAGES)
    assert not [row for row in rows if row["outcome"] not in campaign.GOOD]
    assert sum(row.get("kills", 0) for row in rows) >= 3
    assert Counter(row["outcome"] for row in rows if row["fault"] != "damage") == {"identical": 9}
    for name in ("meta.json", "tokens.bin", "borders.bin"):
        assert {f"damage: packed set: 0: set/{name}, {how}" for how in DAMAGES} <= {row["trial"] for row in rows}


@pytest.mark.slow
def test_what_must_not_be_is_noticed(tmp_path: Path) -> None:
    ways = ("sound", "different", "lost", "traceback", "hang", "orphans")
    rows = campaign_rows(tmp_path, ways, {"kill": dict.fromkeys(ways, 6)}, SECONDS=1.0, _GRACE=0.2)
    found = {way: {row["outcome"] for row in rows if row["what"] == way} for way in ways}
    assert found["sound"] == {"identical"}
    for way in ways[1:]:
        assert way in found[way] and found[way] <= {way, "identical"}, found
    shown = (tmp_path / "trials.failures.txt").read_text()
    assert "=== kill: different: " in shown and "RuntimeError: not caught" in shown


@pytest.mark.parametrize("how", DAMAGES)
def test_damages(tmp_path: Path, how: str) -> None:
    path, before = tmp_path / "file", bytes(range(200))
    path.write_bytes(before)
    assert damage(path, how, random.Random(0))
    after = path.read_bytes() if path.is_file() else None
    if how == "flip":
        assert after is not None and sum((one ^ two).bit_count() for one, two in zip(before, after, strict=True)) == 1
    elif how in ("cut", "empty"):
        assert after is not None and len(after) < 200 and before.startswith(after) and (how == "cut") == bool(after)
    else:
        assert after is None and path.is_dir() == (how == "directory")
    (tmp_path / "empty").touch()
    assert damage(tmp_path / "empty", how, random.Random(0)) == (how in ("missing", "directory"))


def trial(name: str, outcome: str, **more: object) -> dict[str, object]:
    fault, what, _ = name.split(": ")
    return {"trial": name, "fault": fault, "what": what, "outcome": outcome, "seconds": 1.0, "commit": "c1"} | more


def test_counts_are_of_the_last_outcome_of_each_trial() -> None:
    rows = [
        trial("kill: tune: 0", "identical", kills=2),
        trial("kill: tune: 1", "traceback"),
        trial("kill: tune: 1", "identical", kills=1, commit="c2"),
        trial("kill: tune: 2", "lost", kills=1),
        trial("fuzz: fuzz: 0", "identical", inputs=500),
    ]
    tune, fuzz = campaign.summary(rows)
    assert tune["outcomes"] == {"identical": 2, "lost": 1} and tune["mended"] == 1
    assert (tune["trials"], tune["kills"], tune["commits"]) == (3, 4, ["c1", "c2"])
    assert fuzz["inputs"] == 500


def test_kinds_take_turns_and_names_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inputs").mkdir()
    one = campaign.Campaign(tmp_path, tmp_path / "trials.jsonl")
    counts = {"kill": {"tune": 4, "report": 2}, "fuzz": {"fuzz": 1}}
    titles = [title for title, _ in one.trials((), counts)]
    assert titles == ["kill: tune: 0", "kill: tune: 1", "kill: report: 0", "kill: tune: 2", "kill: tune: 3",
                      "kill: report: 1", "fuzz: fuzz: 0"]  # fmt: skip
    assert [title for title, _ in one.trials(("fuzz",), counts)] == ["fuzz: fuzz: 0"]
    for words, said in ((["--only", "tunes"], "unknown name 'tunes'"), (["--hours", "0"], "--hours 0 is not allowed")):
        assert run_cli(lambda words=words: campaign.main(words)) == 2
        assert said in capsys.readouterr().err


def test_the_summary_that_is_committed_is_that_of_good_trials() -> None:
    rows = [json.loads(line) for line in campaign.SUMMARY.read_text().splitlines()]
    assert rows and all(row["trials"] == sum(row["outcomes"].values()) for row in rows)
