"""Successive halving over a scripted model with a clock of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from scaled_rope import RopeScaling
from scaled_rope.advice.candidates import sharper, short_list
from scaled_rope.advice.probing import LEAST_PROMPTS, SHARE
from scaled_rope.advice.rounds import FINALISTS, Halving, Material
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows
from tests.helpers import advice
from tests.helpers.advice import (
    GROUPS,
    HEAD_DIM,
    OWN,
    TARGET,
    L,
    Scripted,
    dpe_probing,
    halving,
    prompts,
    windows,
)


@pytest.fixture(autouse=True)
def _quick_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of rows: nothing here is about a machine that loses power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


LISTED = [one.spec for one in short_list(OWN, L, TARGET, HEAD_DIM)]


def test_windows_are_shared_out() -> None:
    for count, sizes in ((4, (1, 0, 3)), (5, (1, 1, 3)), (8, (2, 2, 4)), (40, (10, 10, 20))):
        found = Material.of(windows(count), {})
        assert tuple(map(len, found.windows)) == sizes
        assert len({id(window) for part in found.windows for window in part}) == count
    units = [Material.of(windows(8), prompts([L])).units(number, [L]) for number in range(3)]
    assert [len(some) for some in units] == [12, 12, 48]
    assert [sum(one.window is not None for one in some) for some in units] == [2, 2, 4]
    keys = [one.prompts[L].key for some in units for one in some]
    assert len(set(keys)) == len(keys)


def test_the_best_is_found_within_the_budget(tmp_path: Path) -> None:
    model, minutes = Scripted(), 3.0
    rounds = halving(tmp_path, model, minutes)
    found = rounds.run()
    assert rounds.budget.spent <= 60 * minutes
    following = [one for one in found.finalists if one.candidate.scaling.is_length_dependent]
    assert len(found.finalists) <= FINALISTS + len(following)
    best = [one.candidate.spec for one in found.finalists]
    assert {"yarn:8", "dynamic-yarn"} & set(best)
    assert found.baseline.candidate.spec == "default"
    assert len(found.baseline.nats) == len(found.control.nats) == len(found.finalists[0].nats) >= 3
    assert all(len(one.nats) == len(found.baseline.nats) for one in found.finalists)
    measured = {one.candidate.spec for one in [*found.finalists, *found.screened]} | set(found.left_out)
    assert measured == set(LISTED)  # each is measured, or said not to be
    screened = [window.document for one in found.screened for window in one.windows]
    assert not set(screened) & {window.document for window in found.baseline.windows}


def test_more_time_is_more_text(tmp_path: Path) -> None:
    few, many = (halving(tmp_path / str(minutes), Scripted(), minutes).run() for minutes in (1.2, 10))
    assert len(few.left_out) > len(many.left_out) == 0
    few_prompts, many_prompts = (len(one.baseline.answers[TARGET]) for one in (few, many))
    assert few_prompts < many_prompts <= 48


def test_little_time_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not enough for one candidate: 3 windows of 512 tokens") as caught:
        halving(tmp_path, Scripted(), 0.2).run()
    minutes = float(str(caught.value).split("--minutes ")[2].split()[0])
    assert halving(tmp_path, Scripted(), minutes).run().finalists  # what it says is enough


def test_one_candidate_needs_no_screening(tmp_path: Path) -> None:
    model = Scripted()
    only = short_list(OWN, L, TARGET, HEAD_DIM, ["linear:8"], only=True)
    found = halving(tmp_path, model, 5, candidates=only).run()
    assert [one.candidate.spec for one in found.finalists] == ["linear:8"] and not found.screened


def test_a_slow_machine_ends_the_round_and_not_the_answer(tmp_path: Path) -> None:
    model = Scripted()
    score = model.score

    def slowing(scaling: RopeScaling, tokens: Any) -> Any:
        model.slow = 1.0 if len(model.read) < 150 else 4.0
        return score(scaling, tokens)

    model.score = slowing  # type: ignore[method-assign]
    rounds = halving(tmp_path, model, 10)
    found = rounds.run()
    assert rounds.budget.spent <= 605  # one pass may take longer than was expected
    assert all(len(one.nats) == len(found.baseline.nats) for one in found.finalists)


def test_a_candidate_that_cannot_be_read_is_left_out_with_the_reason(tmp_path: Path) -> None:
    model = Scripted()

    def refuse(scaling: RopeScaling) -> None:
        if scaling.changes_attention:
            raise ConfigError(f"method {scaling.method!r}: cannot be used with tiny models")

    model.refuses = refuse
    found = halving(tmp_path, model, 10).run()
    assert {one.candidate.scaling.method for one in found.finalists} <= {"yarn", "ntk-by-parts"}
    assert sorted(found.left_out) == sorted(spec for spec in LISTED if spec.split(",")[0] in
                                            ("dual-chunk", "self-extend", "rerope"))  # fmt: skip
    assert all("cannot be used with tiny models" in why for why in found.left_out.values())

    def refuse_all(scaling: RopeScaling) -> None:
        if scaling.method != "default":
            raise ConfigError("nothing works")

    model.refuses = refuse_all
    with pytest.raises(ConfigError, match="no candidate can be measured: nothing works"):
        halving(tmp_path / "other", model, 10).run()
    # So few that there is nothing to screen: the reason is the same, and not that the time was too short.
    few = short_list(OWN, L, TARGET, HEAD_DIM, ["linear:8", "ntk:8"], only=True)
    with pytest.raises(ConfigError, match=r"^no candidate can be measured: nothing works$"):
        halving(tmp_path / "few", model, 10, candidates=few).run()


def test_mistakes_of_ours_are_not_swallowed(tmp_path: Path) -> None:
    model = Scripted()

    def fail(scaling: RopeScaling) -> None:
        raise RuntimeError("a bug")

    model.refuses = fail
    with pytest.raises(RuntimeError, match="a bug"):
        halving(tmp_path, model, 10).run()


def test_a_rerun_measures_nothing_and_an_interrupted_one_continues(tmp_path: Path) -> None:
    model = Scripted()
    whole = halving(tmp_path / "whole", model, 6).run()
    before, rows = len(model.read), read_rows(tmp_path / "whole" / "rows.jsonl")
    again = halving(tmp_path / "whole", model, 6).run()
    assert len(model.read) == before and read_rows(tmp_path / "whole" / "rows.jsonl") == rows

    def specs(found: Any) -> list[str]:
        return [one.candidate.spec for one in found.finalists]

    assert specs(again) == specs(whole) and again.left_out == whole.left_out and again.rounds == whole.rounds

    model = Scripted()

    def die(scaling: RopeScaling) -> None:
        if len(model.read) == 70:
            model.refuses = lambda scaling: None
            raise KeyboardInterrupt

    model.refuses = die
    with pytest.raises(KeyboardInterrupt):
        halving(tmp_path / "cut", model, 6).run()
    model.clock.now += 1000  # the time between the two runs is nobody's
    rounds = halving(tmp_path / "cut", model, 6)
    assert specs(rounds.run()) == specs(whole) and rounds.budget.spent <= 360
    assert read_rows(tmp_path / "cut" / "rows.jsonl") == rows


def test_another_budget_uses_what_is_there(tmp_path: Path) -> None:
    model = Scripted()
    halving(tmp_path, model, 3).run()
    before = len(model.read)
    longer = halving(tmp_path, model, 6)
    longer.run()
    alone = Scripted()
    halving(tmp_path / "alone", alone, 6).run()
    assert len(model.read) - before < len(alone.read)
    keys = [(row["label"], row["metric"], row["data"].get("fingerprint"), row["length"])
            for row in read_rows(tmp_path / "rows.jsonl") if row["metric"] != "advice_round"]  # fmt: skip
    protocols = [
        row["protocol"]["name"] for row in read_rows(tmp_path / "rows.jsonl") if row["metric"] != "advice_round"
    ]
    assert len(set(zip(keys, protocols, strict=True))) == len(keys)  # nothing was measured twice


def test_one_that_follows_the_length_brings_its_static_form(tmp_path: Path) -> None:
    model = Scripted()
    ask = model.ask

    def worse(scaling: RopeScaling, prompt: Any) -> tuple[float, bool]:  # at 128 and 256 tokens yarn:8 finds nothing
        nats, right = ask(scaling, prompt)
        return (30.0, False) if scaling.label == "yarn x8" and L < prompt.length < TARGET else (nats, right)

    model.ask = worse  # type: ignore[method-assign]
    found = halving(tmp_path, model, 10).run()
    specs = [one.candidate.spec for one in found.finalists]
    assert "dynamic-yarn" in specs and "yarn:8" in specs
    assert "dynamic-yarn" in specs[:FINALISTS]


def test_what_the_second_round_has_no_time_for_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Halving._affordable

    def scarce(self: Halving, number: int, alive: Any, unit: Any, left: float | None = None) -> Any:
        chosen, share = real(self, number, alive, unit, left)
        return chosen if number == 0 else chosen[:2], share

    monkeypatch.setattr(Halving, "_affordable", scarce)
    model = Scripted({"dual-chunk": 0.0, "self-extend": 0.0, "yarn": 0.3})  # what servers know is no finalist
    found = halving(tmp_path, model, 10).run()
    first, second, _ = (set(one["candidates"]) for one in found.rounds)
    assert len(second) == 2 and second < first and not found.left_out
    assert set(specs_of(found)) == first  # each is among the last or was screened, with its numbers
    assert any(one.candidate.spec == "yarn:8" for one in found.finalists)  # the best that servers can be told


def test_without_retrieval_perplexity_decides(tmp_path: Path) -> None:
    found = halving(tmp_path, Scripted(), 10, retrieval=False).run()
    assert found.baseline.answers == {} and found.finalists[0].retrieval == 0.0
    assert {one.candidate.spec for one in found.finalists} & {"yarn:8", "dynamic-yarn"}


# ------------------------------------------------------------------------------------------ DPE's probe, temperatures

FOUND = f"dpe,groups={'+'.join(map(str, GROUPS))},window=8"


def specs_of(found: Any) -> list[str]:
    return [one.candidate.spec for one in [*found.finalists, *found.screened]]


def test_the_probe_finds_the_groups_within_its_share(tmp_path: Path) -> None:
    model, minutes = Scripted(), 30.0
    rounds = halving(tmp_path, model, minutes, probing=dpe_probing())
    passes = len(dpe_probing().probe.groupings())
    found = rounds.run()
    assert found.probe is not None and found.probe["groups"] == list(GROUPS)
    assert found.probe["effective_lengths"] == [8 + -(-504 // size) for size in GROUPS]
    asked = [length for label, length in model.read if label.startswith("dpe")][: found.probe["prompts"] * passes]
    assert set(asked) == {TARGET} and found.probe["prompts"] >= LEAST_PROMPTS
    assert 2 * len(asked) <= 60 * minutes / SHARE  # a pass of a method that changes attention takes two seconds
    assert rounds.budget.spent <= 60 * minutes
    assert FOUND in specs_of(found) and "dpe" not in found.left_out
    assert FOUND in [one.candidate.spec for one in found.finalists]


def test_a_probe_that_finds_the_model_as_it_is_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "GROUPS", (1,) * len(GROUPS))
    found = halving(tmp_path, Scripted(), 30, probing=dpe_probing()).run()
    assert found.left_out["dpe"] == "its probe found g = 1 best for every group, the model as it is"
    assert found.probe is None and not any(spec.startswith("dpe") for spec in specs_of(found))


def test_no_probe_where_the_time_is_for_the_others(tmp_path: Path) -> None:
    for minutes in (1.2, 10):
        model = Scripted()
        found = halving(tmp_path / str(minutes), model, minutes, probing=dpe_probing()).run()
        assert found.probe is None and not any(label.startswith("dpe") for label, _ in model.read)
        assert (
            f"1/{SHARE} of --minutes {minutes:g} does not pay it beside the other candidates" in found.left_out["dpe"]
        )
        alone = Scripted()
        assert specs_of(halving(tmp_path / f"{minutes} alone", alone, minutes).run()) == specs_of(found)
        assert alone.read == model.read  # it costs nothing


def test_a_family_that_cannot_is_named_after_one_pass(tmp_path: Path) -> None:
    model = Scripted()

    def refuse(scaling: RopeScaling) -> None:
        if scaling.changes_attention:
            raise ConfigError(f"method {scaling.method!r}: cannot be used with tiny models")

    model.refuses = refuse
    found = halving(tmp_path, model, 30, probing=dpe_probing()).run()
    assert found.left_out["dpe"] == "method 'dpe': cannot be used with tiny models" and found.probe is None
    before = len(model.read)
    again = halving(tmp_path, model, 30, probing=dpe_probing()).run()
    assert len(model.read) == before and again.left_out == found.left_out


def test_a_probe_that_becomes_slow_ends(tmp_path: Path) -> None:
    model = Scripted()

    def slowing(scaling: RopeScaling) -> None:  # called before each pass
        model.slow = 10.0 if scaling.method == "dpe" else 1.0

    model.refuses = slowing
    rounds = halving(tmp_path, model, 30, probing=dpe_probing())
    found = rounds.run()
    assert found.left_out["dpe"] == "the time for its probe ended before 2 prompts"
    count = sum(label.startswith("dpe") for label, _ in model.read)
    assert 1 < count <= 1 + 1800 / SHARE / 20  # the first pass takes longer than was expected
    assert rounds.budget.spent <= 1800 and len(found.finalists) >= FINALISTS
    before = len(model.read)
    assert halving(tmp_path, model, 30, probing=dpe_probing()).run().left_out == found.left_out
    assert len(model.read) == before


def test_the_best_that_servers_know_is_judged_too(tmp_path: Path) -> None:
    model = Scripted({"dual-chunk": 0.01, "rerope": 0.02, "self-extend": 0.03, "leaky-rerope": 0.04, "yarn": 0.3})
    found = halving(tmp_path, model, 30).run()
    *best, last = [one.candidate for one in found.finalists]
    assert len(best) == FINALISTS and not any(one.of_tables for one in best)
    assert last.of_tables and last.spec.startswith("yarn")


def test_temperatures_come_in_the_second_round(tmp_path: Path) -> None:
    model = Scripted({"dual-chunk": 0.02, "yarn": 0.05, "ntk": 0.1, "ntk-by-parts": 0.04, "rerope": 0.03})
    model.tempered = -0.01
    rounds = halving(tmp_path, model, 30, temperatures=True)
    found = rounds.run()
    first, second, last = ([*one["candidates"]] for one in found.rounds)
    assert not any("temperature" in spec for spec in first)
    tempered = [spec for spec in second if "temperature" in spec]
    assert len(tempered) == 6 and second[-6:] == tempered  # of the best three that have no attention factor
    assert all("attention_temperature=log" in spec for spec in last[:2]) and last[0].startswith("dual-chunk")
    assert rounds.budget.spent <= 1800
    listed = short_list(OWN, L, TARGET, HEAD_DIM)
    assert {spec for spec in tempered} <= {one.spec for some in listed for one in sharper(some, TARGET)}
    few = halving(tmp_path / "few", Scripted(), 1.2, temperatures=True).run()  # no time for a second round
    assert not any("temperature" in spec for spec in specs_of(few))


def test_a_run_with_probe_and_temperatures_continues_where_it_was_cut(tmp_path: Path) -> None:
    def rounds(folder: str, model: Scripted) -> Any:
        return halving(tmp_path / folder, model, 30, probing=dpe_probing(), temperatures=True)

    model = Scripted()
    whole = rounds("whole", model).run()
    before, rows = len(model.read), read_rows(tmp_path / "whole" / "rows.jsonl")
    again = rounds("whole", model).run()
    assert len(model.read) == before and read_rows(tmp_path / "whole" / "rows.jsonl") == rows
    for one in (again, whole):
        assert one.probe is not None and any("temperature" in spec for spec in specs_of(one))
    assert specs_of(again) == specs_of(whole) and again.rounds == whole.rounds and again.probe == whole.probe

    for cut in (40, 130):  # in the probe, and after it
        model, folder = Scripted(), f"cut {cut}"

        def die(scaling: RopeScaling, model: Scripted = model, cut: int = cut) -> None:
            if len(model.read) == cut:
                model.refuses = lambda scaling: None
                raise KeyboardInterrupt

        model.refuses = die
        with pytest.raises(KeyboardInterrupt):
            rounds(folder, model).run()
        assert specs_of(rounds(folder, model).run()) == specs_of(whole)
        assert read_rows(tmp_path / folder / "rows.jsonl") == rows
