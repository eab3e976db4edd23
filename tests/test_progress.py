"""Progress as plain lines, as one short line on a terminal, and how much of a script is left."""

from __future__ import annotations

import io
import time

import pytest

from scaled_rope.progress import STEP, Progress, Step, duration


def test_the_time_left_is_at_the_pace_of_the_script_so_far() -> None:
    step = Step.parse("3 7 100 50 150 1000 perplexity before training")
    assert step is not None and str(step) == "step 3 of 7: perplexity before training"
    assert step.left(0.0, 1050.0) == pytest.approx(100.0)  # 100 in 50 seconds, 200 are to come
    assert step.left(0.5, 1050.0) == pytest.approx(70.0)  # 125 in 50 seconds, 175 are to come
    first = Step.parse("1 7 0 50 150 1000 training")
    assert first is not None and first.left(0.0, 1050.0) is None
    assert first.left(0.9, 1050.0, 20.0) == pytest.approx(2.0 + 60.0)  # resumed: 50 seconds did not do 0.9 of it
    assert step.left(0.5, 1050.0, 20.0) == pytest.approx(70.0)


@pytest.mark.parametrize("text", [None, "", "3 7 1 1 1 1", "three 7 1 1 1 1 name"])
def test_what_is_no_step(text: str | None) -> None:
    assert Step.parse(text) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (41, "41 s"), (61, "2 min"), (120, "2 min"), (3900, "1 h 5 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP, raising=False)
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with Progress(total=4, desc="model, yarn x8", unit="tok", mininterval=0, miniters=1, file=log) as bar:
        for _ in range(4):
            bar.update(1)
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and all(lines) and lines[-1] == "model, yarn x8 100 %"
    assert lines[0].startswith("model, yarn x8 25 %, ") and lines[0].endswith(" left") and len(lines) == 4


def test_a_step_of_a_script_says_which_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, f"3 7 100 50 150 {time.time() - 50:.0f} perplexity")
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", screen)
        with Progress(total=10, file=screen) as bar:
            bar.set_description("yarn x8", refresh=False)
            bar.update(5)
            assert bar.line(bar.step.began + 50) == "step 3 of 7: perplexity 50 %, 2 min left (yarn x8)"
            bar.refresh()
        assert "step 3 of 7: perplexity 50 %" in screen.getvalue()
        assert ("\r" in screen.getvalue()) is screen.isatty()


def test_nothing_is_said_of_what_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with Progress(total=4, file=log):
        pass
    with Progress(total=0, file=log, disable=True):
        pass
    assert log.getvalue() == ""
    assert list(Progress(iter("abc"), unit="doc", desc="documents", file=log)) == ["a", "b", "c"]
    assert log.getvalue() == "documents 3 doc\n"
