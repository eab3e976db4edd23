"""Where in a text far context helps: the gain of each token's log-probability, as a picture and as excerpts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.long_perplexity import KeyTokens, Mask
from scaled_rope.evaluation.windows import Losses, Texts
from scaled_rope.report.drawing import GREY, LINES, check_format, drawing, save_figure

_BINS = 256
_MOST = 8  # windows in one picture
_EXCERPTS = 5
_CHARACTERS = 60


@dataclass(frozen=True, eq=False)
class Strip:
    """The tokens of one window.

    Attributes:
        document: number of the document.
        begin: place of the window's first token in the document.
        first: position of the first of `gains` in the window, BOS included.
        window: tokens of the cut context; up to there nothing can be gained.
        gains: log-probability with the whole context minus that with the cut one, in nats [tokens].
        keys: which are key tokens [tokens].
    """

    document: int
    begin: int
    first: int
    window: int
    gains: Losses
    keys: Mask

    @property
    def title(self) -> str:
        """The window in words."""
        return f"document {self.document + 1}" + (f", from token {self.begin}" if self.begin else "")


def strips(keys: KeyTokens, length: int) -> list[Strip]:
    """The gains of the evaluator in each window of `length` positions."""
    texts, _ = keys.whole.prepare(keys.job.model)
    places = [(index, begin) for index, document in enumerate(texts.documents) for begin in document.begins]
    return [
        Strip(index, begin, 1, keys.control.window, cut - whole, keys.rule.chosen(whole, cut))
        for (index, begin), whole, cut in zip(places, *keys.losses(length), strict=True)
    ]


def excerpts(found: Sequence[Strip], texts: Texts, tokenizer: Any) -> list[tuple[str, str, str]]:
    """The key tokens that gain most: where they stand, the text before them, and they themselves."""
    ranked = sorted(
        (
            (float(one.gains[index]), which, int(index))
            for which, one in enumerate(found)
            for index in np.flatnonzero(one.keys)
        ),
        reverse=True,
    )
    told = []
    for gain, which, index in ranked[:_EXCERPTS]:
        one = found[which]
        place = one.begin + index + 1 - texts.head  # the loss at index is that of the token at position index + 1
        tokens = texts.documents[one.document].tokens
        before = tokenizer.decode(tokens[max(0, place - _CHARACTERS) : place].tolist())
        token = tokenizer.decode(tokens[place : place + 1].tolist())
        shown = " ".join(before.split())[-_CHARACTERS:]
        told.append(
            (f"+{gain:.1f} nats, {one.title}, position {index + 1}", f"… {shown} ", token.strip() or repr(token))
        )
    return told


def save_gains(path: str | Path, found: Sequence[Strip]) -> None:
    """Draw the gains of each window along its positions, key tokens marked; SVG or PNG by the name of the file.

    Raises:
        ConfigError: another suffix, or matplotlib is missing.
    """
    path = Path(path)
    check_format(path)
    shown = found[:_MOST]
    if not shown:
        raise ConfigError(f"figure {str(path)!r}: nothing was measured that could be drawn")
    with drawing() as pyplot:
        figure, grid = pyplot.subplots(
            len(shown), figsize=(8, 0.8 + 1.15 * len(shown)), squeeze=False, sharex=True, sharey=True
        )
        for axes, one in zip(grid.flat, shown, strict=True):
            edges, means = binned(one.gains)
            up, down = np.maximum(means, 0), np.minimum(means, 0)
            style = {"step": "post", "linewidth": 0}
            axes.fill_between(edges, np.append(up, up[-1]), color=LINES[0], **style)
            axes.fill_between(edges, np.append(down, down[-1]), color=LINES[1], **style)
            axes.axhline(0, color=GREY, linewidth=0.6)
            axes.axvline(one.window, color=GREY, linestyle=":", linewidth=1)
            positions = one.keys.nonzero()[0] + one.first
            axes.plot(positions, np.full(len(positions), 1.0), "|", color="black", markersize=5, clip_on=False,
                      transform=axes.get_xaxis_transform())  # fmt: skip
            axes.set_title(f"{one.title}: {len(positions)} key tokens", fontsize=9, pad=7)
        grid[0, 0].text(
            shown[0].window, 0.95, f" the last {shown[0].window} tokens hold everything up to here ", fontsize=7.5,
            color=GREY, ha="right" if shown[0].window > len(shown[0].gains) / 2 else "left", va="top",
            transform=grid[0, 0].get_xaxis_transform(),
        )  # fmt: skip
        size = -(-len(shown[0].gains) // _BINS)
        figure.supxlabel("position in the text (tokens); ticks: key tokens", fontsize=9)
        figure.supylabel(f"gain by far context (nats per token, means of {size})", fontsize=9)
        save_figure(figure, path)
        pyplot.close(figure)


def binned(gains: Losses) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Means of at most 256 runs of neighbours, and their edges as positions; a gain of nan counts as 0."""
    size = -(-len(gains) // _BINS)
    begins = np.arange(0, len(gains), size)
    counts = np.diff(np.append(begins, len(gains)))
    sums = np.add.reduceat(np.nan_to_num(gains.astype(np.float64), posinf=0.0, neginf=0.0), begins)
    return np.append(begins, len(gains)) + 1, sums / counts
