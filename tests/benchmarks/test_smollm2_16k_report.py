"""The report of the study of SmolLM2 at 16k, on rows that are made up."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import smollm2_16k_report as report
from benchmarks.smollm2_16k import parts
from benchmarks.smollm2_16k_claims import (
    FAILS,
    HOLDS,
    NOT_MEASURED,
    UNKNOWN,
    Estimate,
    Finding,
    findings,
    judge,
    noise_bound,
    over_all_texts,
)
from benchmarks.smollm2_16k_rows import Study, planned, read_study
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.results import Row
from tests.helpers.smollm2_rows import KEYS, PERPLEXITY, RIGHT, study_rows, training_rows, write_study

PAGE = f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


def study_of(folder: Path, rows: list[Row], training: list[Row]) -> Study:
    return read_study(*write_study(folder, rows, training))


def verdicts(study: Study) -> list[str]:
    return [one.verdict for one in findings(study)]


def finding(study: Study, words: str) -> Finding:
    (found,) = [one for one in findings(study) if words in one.claim]
    return found


def test_all_rows_give_all_tables(tmp_path: Path) -> None:
    study = study_of(tmp_path, study_rows(), training_rows())
    text = report.block(study, report.drawable(study))
    assert NOT_MEASURED not in text.lower() and study.notes == []
    count = len(planned())
    assert f"6 of 6 runs are trained, and {count} of {count} measurements made." in text
    assert "Commits: 0123456" in text and "Machine: a CPU." in text
    assert [one.verdict for one in findings(study)] == [
        HOLDS,  # below its own control, of 20
        HOLDS,  # and that of the base
        HOLDS,  # ahead of PI
        HOLDS,  # and of no scaling
        HOLDS,  # and of its last tokens
        HOLDS,  # after half the steps
        HOLDS,  # 20 of 20 keys, of which Wilson's interval begins at 84 %
        HOLDS,  # more keys than PI
        HOLDS,  # short tasks
        FAILS,  # untrained YaRN has 22
        UNKNOWN,  # one window at 32k
        HOLDS,  # PoSE within 1 %
    ]
    yarn = finding(study, "ahead of PI")
    assert yarn.evidence.startswith("−28.0 % [−28.0, −28.0], 4 texts; seeds: ±")
    assert "| YaRN, seed 2 |" in text and "| YaRN | 5/5 + 5/5 (72–100 %) | 5/5 + 5/5 (72–100 %) |" in text
    assert "other prompts (seed 43): passkey 5/5, with seed 42 5/5; needle 5/5, with seed 42 5/5." in text
    assert "| YaRN | 61 % (56–66), +1.0 points [0.0, +3.0] |" in text  # a question of 100 more
    assert "perplexity 0k–16k: 18.00, 16k–24k: 20.00, 24k–32k: 20.00" in text


def test_nothing_measured_says_so(tmp_path: Path) -> None:
    study = study_of(tmp_path, [], [])
    assert study.is_empty and report.block(study) == report.NOTHING and report.drawable(study) == []
    assert set(verdicts(study)) == {UNKNOWN} and {one.evidence for one in findings(study)} == {NOT_MEASURED}
    (tmp_path / "rows.jsonl").write_text("")
    assert read_study(tmp_path / "rows.jsonl", tmp_path / "none").is_empty


def test_what_is_missing_is_not_zero(tmp_path: Path) -> None:
    """The base's rows and one run's perplexity on one text; of that, a length ran out of memory."""
    kept = []
    for row in study_rows():
        if row["metric"] == "perplexity" and row["data"]["fingerprint"] == "perplexity novel":
            if "/model" not in row["model"] or row["model"].endswith("16k/yarn/model"):
                kept.append(row)
    (lost,) = [
        row for row in kept
        if row["model"].endswith("yarn/model") and row["length"] == 4096 and row["protocol"]["name"] == "truncate"
    ]  # fmt: skip
    lost.update(perplexity=None, perplexity_bucket=None, error="out of memory")
    study = study_of(tmp_path, kept, training_rows()[:1])
    text = report.block(study, report.drawable(study))
    assert "1 of 6 runs are trained, and 4 of " in text
    assert "| YaRN | 20.00 | out of memory | 20.00 | 18.00 |" in text
    assert "Not measured: PI; no scaling; YaRN, PoSE at 8k; YaRN, seed 2; PI, seed 2." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert not any(re.search(r"\| (0|0\.0+|0/\d+|0 %) ", line) for line in rows), "a zero where nothing was measured"
    one = finding(study, "… and better than the base")
    assert one.verdict == UNKNOWN and one.why == "no interval from novel" and one.evidence == "−10.0 %, novel"
    assert finding(study, "ahead of PI").evidence == NOT_MEASURED
    # Without the second seeds, nothing is decided about a comparison of trained runs.
    rows = [row for row in study_rows() if "-2/model" not in row["model"]]
    study = study_of(tmp_path, rows, training_rows())
    assert (finding(study, "ahead of PI").verdict, finding(study, "ahead of PI").why) == (
        UNKNOWN,
        "the noise of seeds is not measured",
    )


def test_the_list_of_parts_counts_each_text_and_measurement_by_itself(tmp_path: Path) -> None:
    rows = [
        row for row in study_rows() if row["data"]["fingerprint"] == "perplexity novel" or row["metric"] == "passkey"
    ]
    lost = next(row for row in rows if row["model"].endswith("pi/model") and row["length"] == 4096)
    lost.update(perplexity=None, perplexity_bucket=None, error="out of memory")
    paths = write_study(tmp_path, rows, training_rows())
    said = {part.name: part.progress() for part in parts("out/smollm2-16k", *map(str, paths)).values()}
    assert said["perplexity-novel-base"] == "33 of 33 rows" and said["perplexity-recent-base"] == "0 of 33 rows"
    assert said["perplexity-novel-pi"] == "10 of 11 rows, 1 failed" and said["twice-yarn"] == "0 of 3 rows"
    assert said["passkey-yarn"] == "8 of 8 rows" and said["passkey-again"] == "2 of 2 rows"
    assert said["ruler-base"] == "0 of 12 rows" and said["short-none"] == "0 of 2 rows"


def test_seeds_that_contradict_each_other_decide_nothing(tmp_path: Path) -> None:
    perplexity = PERPLEXITY | {"yarn": 18.0, "yarn-2": 26.0, "pi": 25.0, "pi-2": 17.0}
    study = study_of(tmp_path, study_rows(perplexity), training_rows(perplexity))
    one = finding(study, "ahead of PI")
    assert (one.verdict, one.why) == (UNKNOWN, "within the noise of seeds") and "−28.0 %" in one.evidence
    assert finding(study, "fewer steps").verdict == UNKNOWN
    text = report.block(study)
    assert "| YaRN | novel −30.8 %, recent −30.8 % | 0.0 points |" in text


@pytest.mark.parametrize(
    ("perplexity", "keys", "right", "words", "verdict"),
    [
        ({"yarn": 30.0, "yarn-2": 30.1}, {}, {}, "ahead of PI", FAILS),
        ({"yarn": 22.0, "yarn-2": 22.0}, {}, {}, "the same weights", FAILS),
        ({"pose": 19.0}, {}, {}, "jumping positions", FAILS),
        ({"base yarn:2": 19.0}, {}, {}, "extends without training", HOLDS),
        ({}, {"yarn": 0, "yarn-2": 0}, {}, "Keys are found", FAILS),
        ({}, {"yarn": 4, "yarn-2": 4}, {}, "Keys are found", UNKNOWN),
        ({}, {"yarn": 5, "yarn-2": 1}, {}, "after PI", UNKNOWN),
        ({}, {"yarn": 1, "yarn-2": 1, "pi": 5, "pi-2": 5}, {}, "after PI", FAILS),
        ({}, {}, {"yarn": 40}, "Short tasks", FAILS),
        ({}, {}, {"yarn": 59}, "Short tasks", UNKNOWN),
    ],
)
def test_verdicts_follow_from_the_numbers(
    tmp_path: Path, perplexity: dict[str, float], keys: dict[str, int], right: dict[str, int], words: str, verdict: str
) -> None:
    rows = study_rows(PERPLEXITY | perplexity, KEYS | keys, RIGHT | right)
    assert finding(study_of(tmp_path, rows, training_rows()), words).verdict == verdict


def test_the_rule_of_verdicts() -> None:
    wide, narrow = Estimate(1.0, (-0.1, 2.1), "4 texts"), Estimate(1.0, (0.8, 1.2), "4 texts")
    assert judge(None, 0.1, True) == (UNKNOWN, NOT_MEASURED)
    assert judge(Estimate(1.0, None, "1 window"), None, False) == (UNKNOWN, "no interval from 1 window")
    assert judge(narrow, None, True) == (UNKNOWN, "the noise of seeds is not measured")
    assert judge(narrow, 0.5, True)[0] == judge(narrow, None, False)[0] == HOLDS
    assert judge(narrow, 1.5, True) == (UNKNOWN, "within the noise of seeds")
    assert judge(wide, 0.0, True) == (UNKNOWN, "the interval does not exclude it")
    assert judge(narrow, 0.1, True, least=2.0)[0] == FAILS
    assert judge(wide, 0.1, True, least=-0.5)[0] == HOLDS  # a loss that stays within the margin counts as none
    # Two pairs that are 0.1 and 0.2 apart: t(2) = 4.303, variance of a run (0.005 + 0.02)/2.
    assert noise_bound([0.1, -0.2], 1) == pytest.approx(4.303 * math.sqrt(0.0125))
    assert noise_bound([0.1, -0.2], 2) == pytest.approx(4.303 * math.sqrt(0.025))
    assert noise_bound([], 1) is None
    # Seed 1 ahead on one text and behind on the other is no proof that seeds do nothing.
    assert over_all_texts([0.1, -0.1]) == pytest.approx(0.1) and over_all_texts([0.3]) == pytest.approx(0.3)


def _changed(rows: list[Row], which: int, **fields: Any) -> list[Row]:
    rows[which].update(fields)
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t: _changed(t, 1, seed=7), "run 'pi' was trained with seed = 7, and the study has 1; train it anew"),
        (lambda r, t: _changed(t, 0, scaling="yarn:4"), "run 'yarn' was trained with scaling = 'yarn:4'"),
        (lambda r, t: _changed(t, 0, max_train_steps=9), "max_train_steps = 9, and the study has 8"),
        (lambda r, t: _changed(t, 0, losses=[3.0]), "1 losses over 131072 tokens; must be 8 over 131072"),
        (lambda r, t: _changed(t, 2, dataset_hash="other"), "runs of one training text are needed"),
        (lambda r, t: _changed(t, 2, run="ntk"), "a row is about run 'ntk'; the study has yarn, pi"),
        (lambda r, t: t[0].pop("weights"), "the row about run 'yarn' has no field 'weights'"),
        (lambda r, t: t.append(t[0] | {"seconds": 1.0}), "two rows about run 'yarn' differ"),
        (lambda r, t: _changed(t, 0, weights="w"), "rows about 'yarn' with one set of weights are needed"),
        (
            lambda r, t: _changed(r, 0, data=r[0]["data"] | {"fingerprint": "x"}),
            "rows on perplexity novel with one text are needed",
        ),
        (lambda r, t: _changed(r, 0, dtype="float32"), "rows in one dtype are needed"),
        (
            lambda r, t: _changed(r, -1, scaling={"method": "linear", "factor": 2.0}, label="x"),
            "says that the model carries 'linear x2'; run 'yarn' is for 'yarn x2'",
        ),
    ],
)
def test_rows_that_cannot_stand_together_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    rows, training = study_rows(), training_rows()
    change(rows, training)
    with pytest.raises(ConfigError, match=re.escape(message)):
        study_of(tmp_path, rows, training)


def test_other_rows_are_left_out_and_named(tmp_path: Path) -> None:
    rows = study_rows()
    (at,) = [n for n, row in enumerate(rows) if row["model"].endswith("/pi/model") and row["length"] == 2048
             and row["data"]["fingerprint"] == "perplexity novel"]  # fmt: skip
    twice = rows[at] | {"provenance": rows[at]["provenance"] | {"date": "2031-01-01", "commit": "fedcba9876"}}
    twice["perplexity_bucket"] = 21.0
    other = rows[0] | {"model": "models/other", "model_fingerprint": "other weights"}
    more = next(row for row in rows if row["metric"] == "passkey")
    more = more | {"protocol": more["protocol"] | {"iterations": 50}}
    study = study_of(tmp_path, [*rows, twice, other, more, rows[3]], training_rows())
    text = report.block(study)
    assert "Note: 1 rows are left out, of other models or scalings." in text
    assert "Note: 1 rows are left out, measured otherwise than planned." in text
    assert "1 measurement was made more than once, and the newest is shown: perplexity" in text
    assert "| PI | 21.00 | 20.00 |" in text and "fedcba9 (1 rows)" in text
    assert len(study.cells) == len(rows)


def test_the_page_is_what_the_rows_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, training = write_study(tmp_path, study_rows(), training_rows())
    page, images = tmp_path / "page.md", tmp_path / "images"
    page.write_text(PAGE)
    arguments = ["--rows", str(rows), "--training", str(training), "--page", str(page), "--images", str(images)]
    assert report.main([*arguments, "--check"]) == 1 and page.read_text() == PAGE and not images.exists()
    assert "shows other rows than" in capsys.readouterr().out
    assert report.main(arguments) == 0 and report.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n\n") and text.endswith("\n\nafter\n") and "\nold\n" not in text
    assert sorted(path.name for path in images.iterdir()) == sorted(report.FIGURES)
    assert all(f"(images/{name})" in text for name in report.FIGURES)
    (images / report.FIGURES[0]).unlink()
    assert report.main([*arguments, "--check"]) == 1
    assert report.main([*arguments, "--standalone", str(tmp_path / "alone")]) == 0
    assert (tmp_path / "alone" / "report.md").is_file() and (
        tmp_path / "alone" / "images" / report.FIGURES[1]
    ).is_file()


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.md").write_text("no marks")
    (tmp_path / "rows.jsonl").write_text("no row\n")
    for arguments, message in (
        (["--page", str(tmp_path / "none.md")], "does not exist"),
        (["--page", str(tmp_path / "page.md"), "--rows", "none", "--training", "none"], "has no place for this"),
        (["--rows", str(tmp_path / "rows.jsonl")], "is not a JSON object"),
    ):
        assert run_cli(lambda arguments=arguments: report.main(arguments)) == 2
        assert message in capsys.readouterr().err


def test_the_committed_page_is_true() -> None:
    assert report.main(["--check"]) == 0, "run python benchmarks/smollm2_16k_report.py"
