"""The control of a perplexity: the same tokens, each predicted from the last few tokens only.

A model uses a long context if it predicts better with it than without it. Perplexities at two places of a text do not
show that, since the text differs; the control does: it scores the same tokens of the same documents with the same
weights, but in short windows. A base read in this way shows what cutting its input would have done, without any
extension. Nothing here knows of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.statistics import ratio_interval
from scaled_rope.evaluation.windows import Nats
from scaled_rope.results import Row

CONTROL = "last-tokens"
"""The protocol's name in rows of a control."""
NEGLIGIBLE = 0.001
"""Changes of perplexity by less than 0.1 % count as none: float noise of passes of other shapes is below that."""

_ALLOWED = "trained (the default), off, window=W, stride=S or window=W,stride=S, in tokens"


@dataclass(frozen=True)
class Control:
    """Windows of `window` positions, BOS included, that begin every `stride` tokens.

    All tokens that they score have between window - stride and window - 1 positions before them, except for those of a
    text's first window, which have all that there are.
    """

    window: int
    stride: int

    def fields(self) -> Row:
        """The fields of a row's protocol."""
        return {"window": self.window, "stride": self.stride}


@dataclass(frozen=True)
class ControlRequest:
    """A control as the flag names it; None stands for the defaults."""

    window: int | None = None
    stride: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> ControlRequest | None:
        """Read the value of `--control`; None when no control is to be measured.

        Raises:
            ConfigError: another value than those allowed.
        """
        if text is None or text == "off":
            return None
        if text == "trained":
            return cls()
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in ("window", "stride") or name in found or not value.isdecimal():
                raise ConfigError(f"--control {text} is not allowed; {_ALLOWED}")
            found[name] = int(value)
        request = cls(**found)
        if request.window is not None:
            request.of(None, "")
        elif found["stride"] < 1:
            raise ConfigError(f"--control {text} is not allowed; a stride is at least 1 token")
        return request

    def of(self, trained: int | None, name: str) -> Control:
        """The control of a model.

        Args:
            trained: the context length in tokens that its base was trained on, if that is known.
            name: of the model, for messages.

        Raises:
            ConfigError: neither the flag nor the model gives a window, or the two lengths don't fit together.
        """
        window = self.window if self.window is not None else trained
        if window is None:
            raise ConfigError(f"--control: the trained length of {name} is unknown; say --control window=W")
        if window < 2:
            raise ConfigError(f"--control window={window} is not allowed; at least 2 tokens")
        stride = self.stride if self.stride is not None else max(1, window // 4)
        if not 1 <= stride < window:
            raise ConfigError(f"--control stride={stride} is not allowed; 1 to {window - 1}, below the window")
        return Control(window, stride)


@dataclass(frozen=True)
class Change:
    """How much higher or lower a perplexity is than its control, over the same tokens."""

    share: float
    """Perplexity over that of the control, minus 1: -0.03 is 3 % lower. Infinite where the model's own overflowed."""
    interval: tuple[float, float] | None
    """95 %, over resampled units; None with fewer than two of them, or when rows don't list them."""
    units: int
    """Units that were resampled."""
    of: str
    """The units: "documents", or "windows" where there is one document only."""

    @property
    def lower(self) -> bool:
        """Whether the perplexity is shown to be lower than the control's."""
        return self.interval is not None and self.interval[1] < -NEGLIGIBLE

    @property
    def higher(self) -> bool:
        """Whether the perplexity is shown to be higher than the control's."""
        return self.interval is not None and self.interval[0] > NEGLIGIBLE

    @property
    def none(self) -> bool:
        """Whether the two are shown to be the same, to 0.1 %."""
        return self.interval is not None and -NEGLIGIBLE <= self.interval[0] and self.interval[1] <= NEGLIGIBLE

    @property
    def at_or_below(self) -> bool:
        """Whether the perplexity, as measured, is at or below the control's."""
        return self.share <= NEGLIGIBLE

    @property
    def short(self) -> str:
        """The change alone: "−3.1 %"."""
        return f"{_percent(self.share)} %" if math.isfinite(self.share) else "overflow"

    def __str__(self) -> str:
        text = self.short
        return text if self.interval is None else f"{text} [{', '.join(map(_percent, self.interval))}]"


def _percent(share: float) -> str:
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def compare(pairs: Sequence[tuple[Row, Row]]) -> Change | None:
    """Compare rows of position buckets with those of a control over the same windows, all buckets together; or one row
    of sliding windows with that of its control.

    Pairs are compared by document, or by window (runs of sliding ones) where there is only one document: the two sums
    of each cover the same tokens, so that differences between texts cancel. Tokens weigh the same.

    Returns:
        None when there is nothing to compare: no pairs, a row without a value, or a control that overflowed.
    """
    if not pairs or any(row.get("error") for pair in pairs for row in pair):
        return None
    if any(_value(control) is None for _, control in pairs):
        return None
    if any(_value(row) is None for row, _ in pairs):
        return Change(math.inf, None, 0, "documents")
    if not all(_units(row) for pair in pairs for row in pair):
        logs = [math.log(_value(row) / _value(control)) for row, control in pairs]
        weights = [row.get("bucket_targets") or row["targets"] for row, _ in pairs]
        return Change(math.expm1(float(np.average(logs, weights=weights))), None, 0, "documents")
    terms = [_terms(row, control) for row, control in pairs]
    above, below = (np.sum([term[side] for term in terms], axis=0) for side in (0, 1))
    interval = None
    if len(above) > 1:
        low, high = ratio_interval(above, below)
        interval = math.expm1(low), math.expm1(high)
    of = "windows" if _documents(pairs[0][0]) == 1 else "documents"
    return Change(math.expm1(above.sum() / below.sum()), interval, len(above), of)


def _value(row: Row) -> Any:
    """The perplexity that is compared: of the position bucket, or of sliding windows."""
    return row["perplexity_bucket"] if "perplexity_bucket" in row else row["perplexity"]


def _units(row: Row) -> str:
    """The start of the names of the fields with a row's sums by document, window or run of them; "" without any."""
    kinds = ("bucket", "bucket_block") if "perplexity_bucket" in row else ("block", "document")
    return next((kind for kind in kinds if f"{kind}_nats" in row), "")


def _layout(row: Row, units: str) -> list[int]:
    """The targets of each unit, or where all windows have as many, the windows of each document."""
    return [len(document) for document in row["bucket_nats"]] if units == "bucket" else list(row[f"{units}_targets"])


def _documents(row: Row) -> int:
    """The number of a row's documents."""
    listed = row.get("bucket_nats") or row.get("document_nats")
    return len(listed) if listed else int(row["data"]["documents"])


def _terms(row: Row, control: Row) -> tuple[Nats, Nats]:
    """Nats of a row above those of its control, and tokens, by document, or by window of the only document."""
    units = _units(row)
    if _units(control) != units or _layout(row, units) != _layout(control, units):
        raise ConfigError(f"the rows of {row['model']} and its control at {row['length']} have other windows")
    mine, others = row[f"{units}_nats"], control[f"{units}_nats"]
    if units != "bucket":
        return np.subtract(mine, others), np.array(row[f"{units}_targets"], dtype=np.float64)
    windows = [len(document) for document in mine]
    each = row["bucket_targets"] / sum(windows)
    differences = [np.subtract(one, other) for one, other in zip(mine, others, strict=True)]
    if len(windows) == 1:
        return differences[0], np.full(windows[0], each)
    return np.array([document.sum() for document in differences]), each * np.array(windows, dtype=np.float64)


def counted(lengths: Sequence[int], window: int, claimed: int | None) -> list[int]:
    """The ends of the buckets that decide: up to the length that a scaling is for, or all where it names none.

    Args:
        lengths: ends of position buckets in tokens.
        window: that of the control.
        claimed: the length that the scaling is for, if known. One that is not beyond the window leaves all.
    """
    known = claimed is not None and claimed > window
    return [length for length in lengths if not known or length <= (claimed or 0)]


def uses_context(change: Change | None, window: int) -> str:
    """Say whether a model uses what stands before the last `window` tokens, from its comparison with its control."""
    if change is None:
        return "uses its context: not measured"
    if not math.isfinite(change.share):
        return f"fails beyond {window} tokens: its perplexity overflows"
    said = f"{change}"
    if change.lower:
        return f"uses its context: {said}"
    if change.higher:
        return f"is worse for its context beyond {window} tokens: {said}"
    if change.none:
        return f"makes no use of its context beyond {window} tokens: {said}"
    return f"not shown to use its context beyond {window} tokens: {said}"
