"""The certificate: ask a running model, compare with every hypothesis, and say which one fits.

from scaled_rope.certificate.certify import certify

certify(trainer_model, rollout_engine, ids)     # a model of transformers, and anything that gives logits
certify(one_callable, another_callable, ids)    # do the two compute the same?
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from scaled_rope.certificate.hypotheses import Hypothesis, hypotheses
from scaled_rope.certificate.in_process import as_source
from scaled_rope.certificate.judge import (
    DROPPED,
    INDEPENDENT,
    SAME,
    Judgement,
    Ledger,
    best_of,
    judge,
    mean_square,
    ratio,
    residual,
)
from scaled_rope.certificate.observed import Observed, Prompt, Source, check_limit, make_prompts
from scaled_rope.certificate.reference import CallableReference, Predicted, Reference, available_memory
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling

_FLOOR = 2e-4
"""Nats of noise that no two programs are below: they sum in another order, and print rounded numbers."""
_DTYPES = ("bfloat16", "float16")
_GROWTH = 3.0
"""By how much the noise of a prompt exceeds that of a single token, where no yardstick says it."""


@dataclass(frozen=True)
class LengthRow:
    """The findings at one length of prompts."""

    length: int
    positions: int
    """How many were compared."""
    noise: float
    """Standard deviation of a difference that is no other scaling, nats."""
    claimed: float
    """Root mean square difference from the claim, nats."""
    claimed_worst: float
    other: str
    """The nearest hypothesis that is not the claim, nor the same at these lengths."""
    other_difference: float


@dataclass(frozen=True)
class CandidateRow:
    """One hypothesis, and how it fared."""

    name: str
    also: tuple[str, ...]
    """Other names of the same numbers."""
    difference: float
    """Root mean square difference from what was observed, over lengths, nats."""
    worst: float
    log_ratio: float
    """ln of how much likelier the best hypothesis is."""
    lengths: tuple[int, ...]
    """Where it was tried: one that is excluded is not tried further."""
    state: str
    """"best", "not excluded", "excluded" or "same as claimed"."""


@dataclass(frozen=True)
class Certificate:
    """The result."""

    verdict: str
    """"right", "other" or "unclear"."""
    sentence: str
    claim: str
    served_by: str
    names: tuple[str, ...]
    """The hypotheses that are not excluded, the likeliest first."""
    dtype: str
    """In which the server seems to compute, by its prompts of one token."""
    single: float
    """Root mean square difference at prompts of one token, nats."""
    lengths: tuple[LengthRow, ...]
    candidates: tuple[CandidateRow, ...]
    positions: tuple[tuple[int, int, float, float], ...] = ()
    """(length of the prompt, position, difference from the claim, from the nearest other), root mean square, nats."""
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0: as claimed; 1: another scaling; 3: unclear."""
        return {"right": 0, "other": 1}.get(self.verdict, 3)

    def with_notes(self, notes: Iterable[str]) -> Certificate:
        """The same with further notes in front."""
        return replace(self, notes=(*notes, *self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        values = dataclasses.asdict(self) | {"exit_code": self.exit_code}
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """A value without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Yardstick:
    """The noise by length."""

    dtype: str = "float32"
    single: float = 0.0
    noise: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def certify(
    reference: Any,
    candidate: Any,
    ids: Sequence[int],
    lengths: Iterable[int] | None = None,
    claim: RopeScaling | str | None = None,
    raw: Mapping[str, Any] | None = None,
    more: Mapping[str, RopeScaling] | None = None,
    dtype: str = "auto",
    first: int | None = None,
    length: int | None = None,
    advance: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Say which scaling a running model computes.

    Args:
        reference: a model of transformers, which is copied, or a `Reference`, which is taken over; or a callable
            token ids -> logits [T, V] or [V] of the next token, for the mere question whether both are the same.
        candidate: a `Source` (a server), a model of transformers, a vLLM `LLM`, or such a callable.
        ids: token ids of a text, at least as long as the longest prompt.
        lengths: of prompts in tokens, at least 2 each; None: a half of `ids`, and all.
        claim: what the candidate is to run, a record or a spec; None: what the reference runs.
        raw, more: see `hypotheses`.
        dtype: in which the candidate computes; "auto": found out from prompts of one token.
        first: a token that prompts begin with.
        length: the longest sequence in tokens that the claim is for; None: the longest prompt.
        advance: called with a word on what comes next.

    Raises:
        ConfigError: lengths that are beyond the ids or the candidate, a claim that no server can run, or no answer.
    """
    if isinstance(reference, nn.Module):
        if not hasattr(reference, "config"):
            raise ConfigError("reference: must be a model of transformers, or a callable that returns logits")
        reference = Reference(copy.deepcopy(reference).float())
    elif not isinstance(reference, Reference):
        if not callable(reference):
            raise ConfigError(f"reference {type(reference).__name__!r}: must be a model, or a callable")
        reference = CallableReference(reference)
    source = as_source(candidate)
    wanted = sorted({max(2, len(ids) // 2), len(ids)} if lengths is None else set(lengths))
    if not wanted or wanted[0] < 2:
        raise ConfigError(f"lengths {wanted}: must be at least 2 tokens each")
    check_limit(source, wanted[-1])
    prompts = make_prompts(ids, wanted, source.whole, first)
    # Two that are the same up to the target may differ in a prompt beyond it.
    candidates = _hypotheses(reference, claim, max(length or 0, wanted[-1]), raw, more)
    return _Run(reference, source, prompts, candidates, dtype, advance).certificate()


def _hypotheses(
    reference: Reference | CallableReference,
    claim: RopeScaling | str | None,
    length: int,
    raw: Mapping[str, Any] | None,
    more: Mapping[str, RopeScaling] | None,
) -> list[Hypothesis]:
    if isinstance(reference, CallableReference):
        if claim is not None:
            raise ConfigError("claim: needs a model of transformers as the reference")
        return [Hypothesis("the same as the reference", RopeScaling("default"), claimed=True)]
    own = reference.scaling
    if isinstance(claim, str):
        claim = resolve_scaling(claim, own)
    raw = reference.config.to_dict() if raw is None else raw
    more = dict(more or {})
    if claim is not None and own != claim and not own.beyond_tables:
        more.setdefault(f"the checkpoint's own scaling, {own.label}", own)
    return hypotheses(claim or own, reference.head_dim, length, raw, more)


class _Run:
    """One certificate in the making."""

    def __init__(
        self,
        reference: Reference | CallableReference,
        source: Source,
        prompts: Sequence[Prompt],
        candidates: Sequence[Hypothesis],
        dtype: str,
        advance: Callable[[str], None],
    ) -> None:
        self.reference, self.source, self.candidates, self.dtype = reference, source, list(candidates), dtype
        self.advance = advance
        self.singles = [prompt for prompt in prompts if len(prompt.ids) == 1]
        self.by_length: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            if len(prompt.ids) > 1:
                self.by_length.setdefault(len(prompt.ids), []).append(prompt)
        self.ledgers = [Ledger(one.minor) for one in candidates]
        self.observed: dict[int, list[Observed]] = {}
        self.claimed: dict[int, list[Predicted]] = {}
        self.kept: dict[tuple[int, int], list[Predicted]] = {}

    def certificate(self) -> Certificate:
        self.advance("asking the server")
        singles = [self.source.observe(prompt.ids, prompt.positions) for prompt in self.singles]
        for length, prompts in sorted(self.by_length.items()):
            self.observed[length] = [self.source.observe(prompt.ids, prompt.positions) for prompt in prompts]
        yardstick = self._measure_noise(singles)
        alive = set(range(len(self.candidates)))
        for length in sorted(self.observed):
            self.advance(f"{len(alive)} candidates at {length} tokens")
            self._try(length, alive)
            noise = {n: value for n, value in yardstick.noise.items() if n <= length}
            best = best_of(self.ledgers, noise)
            alive = {at for at in alive if at in (0, best) or self._survives(at, best, noise)}
        return self._lay_out(judge(self.ledgers, yardstick.noise, yardstick.single), yardstick)

    def _survives(self, at: int, best: int, noise: dict[int, float]) -> bool:
        return ratio(self.ledgers[at], self.ledgers[best], noise) < DROPPED

    # ------------------------------------------------------------------------------------------------ the noise

    def _predict(self, hypothesis: Hypothesis, observed: Sequence[Observed]) -> list[Predicted]:
        return [self.reference.predict(hypothesis, one) for one in observed]

    def _measure_noise(self, singles: Sequence[Observed]) -> _Yardstick:
        """Noise by two yardsticks that no scaling acts on, and by the rounding of angles."""
        claim = self.candidates[0]
        found = _Yardstick()
        self.advance("prompts of one token")
        exact = self._predict(claim, singles)
        found.single = _root_mean_square(exact, [one.logs for one in singles])
        for length, observed in sorted(self.observed.items()):
            self.claimed[length] = self._predict(claim, observed)
            found.noise[length] = _FLOOR
        if isinstance(self.reference, CallableReference):
            found.noise = dict.fromkeys(found.noise, math.hypot(_FLOOR, _GROWTH * found.single))
            found.notes.append("two callables: the noise is that of prompts of one token, times 3")
            return found
        angles = self._angle_noise(self.reference, claim)
        growth, rounded = self._dtype_noise(self.reference, claim, singles, exact, found)
        for length in found.noise:
            of_dtype = max(found.single * growth.get(length, _GROWTH), rounded.get(length, 0.0))
            found.noise[length] = math.sqrt(_FLOOR**2 + of_dtype**2 + angles.get(length, 0.0) ** 2)
        return found

    def _angle_noise(self, reference: Reference, claim: Hypothesis) -> dict[int, float]:
        """The effect of rounded frequencies, by length."""
        self.advance("rounding of angles")
        longest = max(self.observed)
        one, other = reference.angle_pair(claim.scaling, longest)
        plain = self.claimed
        if claim.scaling.is_length_dependent:
            plain = {length: self._predict(one, observed) for length, observed in self.observed.items()}
        changed = {length: self._predict(other, observed) for length, observed in self.observed.items()}
        return {length: _between(plain[length], changed[length]) for length in self.observed}

    def _dtype_noise(
        self,
        reference: Reference,
        claim: Hypothesis,
        singles: Sequence[Observed],
        exact: Sequence[Predicted],
        found: _Yardstick,
    ) -> tuple[dict[int, float], dict[int, float]]:
        """(by how much rounding to a short dtype grows with the length, its size where the server has that dtype)."""
        memory = available_memory()
        if memory is not None and reference.bytes > memory:
            found.notes.append(
                f"too little memory for a copy of the model in another dtype: noise is taken to grow {_GROWTH:g} times"
            )
            return {}, {}
        self.advance("the reference in the server's dtype")
        sizes_of_one, copies = {}, {}
        for dtype in _DTYPES if self.dtype in ("auto", "float32") else (self.dtype,):
            copies[dtype] = reference.rounded(dtype)
            here = [copies[dtype].predict(claim, one) for one in singles]
            sizes_of_one[dtype] = _between(exact, here)
        found.dtype = self.dtype if self.dtype != "auto" else _dtype_of(found.single, sizes_of_one)
        chosen = found.dtype if found.dtype in copies else next(iter(copies))
        copied, unit = copies[chosen], sizes_of_one[chosen]
        sizes = {}
        for length, observed in self.observed.items():
            passes = [copied.predict(claim, one) for one in observed]
            sizes[length] = _between(self.claimed[length], passes)
        growth = {length: size / unit for length, size in sizes.items()} if unit > 0 else {}
        return growth, sizes if found.dtype == chosen else {}

    # ------------------------------------------------------------------------------------------ the hypotheses

    def _try(self, length: int, alive: set[int]) -> None:
        """Enter what the hypotheses that are left predict at one length."""
        observed = self.observed[length]
        for at in sorted(alive):
            hypothesis, ledger = self.candidates[at], self.ledgers[at]
            cut = hypothesis.window is not None and hypothesis.window < length
            unlike = at > 0 and (hypothesis.window is None or cut)
            predicted = self._predict(hypothesis, observed) if unlike else self.claimed[length]
            self.kept[at, length] = predicted
            pairs = [mean_square(p, one.logs) for p, one in zip(predicted, observed, strict=True)]
            ledger.squares[length] = float(np.mean([square for square, _ in pairs]))
            ledger.worst[length] = max(worst for _, worst in pairs)
            ledger.weight[length] = sum(max(1.0, len(one.positions) / INDEPENDENT) for one in observed)
            ledger.from_claim[length] = _between(predicted, self.claimed[length])

    # ------------------------------------------------------------------------------------------------ the result

    def _lay_out(self, judged: Judgement, yardstick: _Yardstick) -> Certificate:
        noise, ledgers = yardstick.noise, self.ledgers
        names = tuple(self.candidates[at].name for at in judged.named)
        others = [at for at in range(1, len(ledgers)) if at not in judged.same]
        nearest = min(others, key=lambda at: ratio(ledgers[at], ledgers[judged.best], noise), default=None)
        notes = list(yardstick.notes)
        if judged.same:
            same = "; ".join(self.candidates[at].name for at in judged.same)
            notes.append(f"the same as the claim at these lengths, so not excluded: {same}")
        if judged.unseen and 0 in judged.named:
            unseen = "; ".join(self.candidates[at].name for at in judged.unseen)
            notes.append(f"differs from the claim by less than the noise, so not excluded: {unseen}")
        return Certificate(
            verdict=judged.verdict,
            sentence=self._sentence(judged, yardstick),
            claim=self.candidates[0].name,
            served_by=self.source.title,
            names=names,
            dtype=yardstick.dtype,
            single=yardstick.single,
            lengths=tuple(self._length_row(length, nearest, noise) for length in sorted(noise)),
            candidates=tuple(self._candidate_rows(judged, noise)),
            positions=tuple(self._positions(nearest)),
            notes=tuple(notes),
        )

    def _sentence(self, judged: Judgement, yardstick: _Yardstick) -> str:
        noise, best = yardstick.noise, self.ledgers[judged.best]
        longest = max(noise)
        size = f"worst difference {_nats(max(best.worst.values()))}, noise {_nats(max(noise.values()))}"
        claim, name = self.candidates[0].name, self.candidates[judged.best].name
        if judged.verdict == "right":
            return f"serves {claim} as claimed ({size}; up to {longest} tokens)"
        names = " or ".join(self.candidates[at].name for at in judged.named)
        if judged.verdict == "other":
            return f"serves {names}, not {claim} ({size}; up to {longest} tokens)"
        if judged.why == "strange":
            return (
                f"unclear: prompts of one token, on which no scaling acts, differ by {_nats(yardstick.single)}: "
                "other weights, an adapter, or log-probabilities after sampling"
            )
        if judged.why == "none fits":
            off = f"{residual(best, noise):.1f} times the noise"
            return f"unclear: none of {len(self.ledgers)} candidates fits; nearest is {name} ({size}; {off})"
        return f"unclear: cannot tell {names} apart ({size}; up to {longest} tokens)"

    def _length_row(self, length: int, nearest: int | None, noise: dict[int, float]) -> LengthRow:
        claim = self.ledgers[0]
        other = Ledger() if nearest is None else self.ledgers[nearest]
        return LengthRow(
            length,
            sum(len(one.positions) for one in self.observed[length]),
            noise[length],
            math.sqrt(claim.squares[length]),
            claim.worst[length],
            "" if nearest is None else self.candidates[nearest].name,
            math.sqrt(other.squares.get(length, math.nan)),
        )

    def _candidate_rows(self, judged: Judgement, noise: dict[int, float]) -> Iterable[CandidateRow]:
        best = self.ledgers[judged.best]
        for at, (hypothesis, ledger) in enumerate(zip(self.candidates, self.ledgers, strict=True)):
            open_ = at in judged.named or at in judged.unseen
            state = "same as claimed" if at in judged.same else "not excluded" if open_ else "excluded"
            yield CandidateRow(
                hypothesis.name,
                hypothesis.also,
                math.sqrt(float(np.mean(list(ledger.squares.values())))),
                max(ledger.worst.values()),
                0.0 if at == judged.best else ratio(ledger, best, noise),
                tuple(sorted(ledger.squares)),
                "best" if at == judged.best else state,
            )

    def _positions(self, nearest: int | None) -> Iterable[tuple[int, int, float, float]]:
        for length, observed in sorted(self.observed.items()):
            others = self.kept.get((nearest, length)) if nearest is not None else None
            for index, one in enumerate(observed):
                for row, position in enumerate(one.positions):
                    claimed = float(np.sqrt(np.mean((self.claimed[length][index][row] - one.logs[row]) ** 2)))
                    other = math.nan
                    if others is not None:
                        other = float(np.sqrt(np.mean((others[index][row] - one.logs[row]) ** 2)))
                    yield length, position, claimed, other


def _dtype_of(single: float, sizes: Mapping[str, float]) -> str:
    """The dtype whose rounding makes differences of this size at prompts of one token."""
    for dtype in sorted(sizes, key=sizes.__getitem__):
        if single < 0.3 * sizes[dtype]:
            return "float32" if dtype == min(sizes, key=sizes.__getitem__) else "between float16 and bfloat16"
        if single <= 3 * sizes[dtype]:
            return dtype
    return "coarser than bfloat16"


def _nats(value: float) -> str:
    return f"{value:.2g} nats" if value >= SAME else "0 nats"


def _between(one: Sequence[Predicted], other: Sequence[Predicted]) -> float:
    """Root mean square difference of two sets of predictions, nats."""
    squares = [mean_square(a, b)[0] for a, b in zip(one, other, strict=True)]
    return math.sqrt(float(np.mean(squares)))


def _root_mean_square(predicted: Sequence[Predicted], logs: Sequence[Sequence[Any]]) -> float:
    return _between(predicted, [list(one) for one in logs])
