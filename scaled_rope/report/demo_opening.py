"""The beginning of the demo's page: one sentence and one small table, for readers who know none of the terms."""

from __future__ import annotations

from collections.abc import Sequence

from scaled_rope.evaluation.controls import Change
from scaled_rope.evaluation.passkey_prompts import RELEASED, WORDINGS
from scaled_rope.report.context_use import ContextUse
from scaled_rope.report.summary import FOUND, Retrieval, Said, Summary, retrieval
from scaled_rope.report.tables import ReportRows
from scaled_rope.report.verdict import TextControl, Verdict
from scaled_rope.results import Row

_Keys = tuple[Retrieval | None, Retrieval | None]
"""The keys that the base finds, and those that the extended model does."""
_Uses = Sequence[tuple[TextControl, ContextUse]]


def demo_opening(results: ReportRows, verdict: Verdict) -> Summary:
    """The sentence and the table, whose columns are lengths in tokens."""
    tuned, base = verdict.tuned, verdict.base
    keys = {wording: (retrieval(results, base, wording), retrieval(results, tuned, wording)) for wording in WORDINGS}
    keys = {wording: pair for wording, pair in keys.items() if any(pair)}
    uses = [(text, text.use) for text in verdict.texts if text.use is not None]
    asked = {length for pair in keys.values() for found in pair if found for length in found.rows}
    scored = {length for _, use in uses for length, _ in use.buckets}
    lengths = sorted(asked or scored)
    lines: dict[str, list[Said]] = {}
    for wording, pair in keys.items():
        for who, found in zip(("before", "extended"), pair, strict=True):
            if found is not None:
                until = verdict.target if who == "extended" else None
                lines[f"{wording}s found, {who}"] = [_found(found.rows.get(n), n, until) for n in lengths]
    for text, use in uses:
        window = use.control.window
        for whose, changes in (("itself", use.buckets), ("the base", use.base_buckets)):
            if changes:
                by_end = {length: change for (length, _), change in changes.items()}
                head = f"perplexity, {text.text}: against {whose} cut to {window}"
                lines[head] = [_changed(by_end[n], n <= verdict.target) if n in by_end else Said("–") for n in lengths]
    sentence = _sentence(verdict, keys.get(RELEASED), uses)
    return Summary(sentence, list(map(str, lengths)), lines, _note(verdict, keys, uses), "length (tokens)")


def _found(row: Row | None, length: int, until: int | None) -> Said:
    """Keys found at one length. until: the length up to which they should be."""
    if row is None:
        return Said("–")
    low, high = (f"{100 * bound:.0f}" for bound in row["interval"])
    tone = "" if until is None or length > until else "good" if row["accuracy"] >= FOUND else "bad"
    return Said(f"{row['right']}/{row['n']}", tone, f"{low}–{high} %")


def _changed(change: Change | None, judged: bool) -> Said:
    """A perplexity against its control in one bucket. judged: whether the scaling is for that length."""
    if change is None:
        return Said("not measured", "unsure")
    tone = ("good" if change.lower else "bad" if change.higher else "unsure") if judged else ""
    more = str(change).removeprefix(change.short).strip()
    return Said(change.short, tone, more.removeprefix("[").replace("]", ""))


def _sentence(verdict: Verdict, keys: _Keys | None, uses: _Uses) -> str:
    trained, target = verdict.trained, verdict.target
    start = f"A model that was trained for {trained} tokens "
    start += f"now reads {target}" if verdict.holds else f"was extended to {target} and is not shown to read them"
    return f"{start}: {_keys_clause(keys, target)}; {_control_clause(verdict)}; {_works_clause(keys, uses)}."


def _keys_clause(keys: _Keys | None, target: int) -> str:
    before, after = ((one.rows.get(target) if one else None) for one in keys or (None, None))
    if after is None:
        return f"whether it finds a number hidden in {target} tokens was not measured"
    was = f" (before: {before['right']} of {before['n']})" if before else ""
    return f"it finds a number hidden in {target} tokens {after['right']} of {after['n']} times{was}"


def _control_clause(verdict: Verdict) -> str:
    held = [text.text for text in verdict.texts if text.holds]
    if verdict.control is None:
        return "whether the whole text helps it to predict was not measured"
    if not held:
        return f"it is not shown to predict better than from the last {verdict.trained} tokens alone"
    others = [text.text for text in verdict.texts if not text.holds]
    better = f"it predicts better than it and the base do from the last {verdict.trained} tokens alone"
    return f"on {_quoted(held)} {better}; on {_quoted(others)} that is not shown for both" if others else better


def _works_clause(keys: _Keys | None, uses: _Uses) -> str:
    """To which length it works by both measurements, and at which it does not, as the summary counts them.

    By perplexity the text counts on which it works furthest.
    """
    found = keys[1] if keys else None
    best = max((use for _, use in uses), key=lambda use: use.works_to, default=None)
    if found is None or best is None:
        return "to which length it works was not measured"
    works = min(found.works_to or 0, best.works_to)
    measured = [(found.works_to or 0, sorted(found.rows)), (best.works_to, sorted(end for end, _ in best.buckets))]
    fails = [length for limit, lengths in measured for length in lengths if length > limit]
    if not works:
        return f"it does not work even at {min(found.rows)} tokens, the shortest measured"
    return f"it works to {works} tokens, {f'not to {min(fails)}' if fails else 'the longest measured'}"


def _note(verdict: Verdict, keys: dict[str, _Keys], uses: _Uses) -> str:
    trained = verdict.trained
    said = [f"Before: the model as it was trained. Extended: {verdict.tuned.name}."]
    if keys:
        needle = " A needle is the same in other words." if "needle" in keys else ""
        said.append(
            f"Passkey: a number hidden in a long dull text, for which the model is asked at its end.{needle}"
            " Below the counts: 95 % intervals."
        )
    if uses:
        said.append(
            "Perplexity: how unsure a model is of the next piece of a text, as if it chose evenly among so many;"
            " lower is better. Here that of the tokens since the next shorter length in the tables below, against"
            f" a reader of the same tokens, cut to the last {trained} before each: below 0 % what stands further back"
            " helps."
            " Below it: 95 % intervals."
        )
    said.append(
        "Works: at that length and all shorter ones it finds 9 of 10 passkeys, and predicts no worse than when it reads"
        f" the last {trained} tokens only."
    )
    return "\n".join(said)


def _quoted(names: Sequence[str]) -> str:
    return _and([f"‘{name}’" for name in names])


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
