"""Passes that score documents: the results that earlier runs have left, and the storage of a document's losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from scaled_rope.evaluation.controls import Control
from scaled_rope.evaluation.perplexity_rows import PassResult, Sums, prefix_sums, whole_sums
from scaled_rope.evaluation.runner import Parts
from scaled_rope.evaluation.windows import Losses, LossFolder, Texts, Window, recent, sliding, truncated


def windows_of(texts: Texts, length: int, stride: int | None, control: Control | None = None) -> list[Window]:
    """The windows of `length` positions: truncated, or sliding where there is a stride.

    control: the same tokens are read in its windows instead.
    """
    if control is not None and stride is not None:
        return sliding(texts, control.window, control.stride)
    if control is not None:
        return recent(texts, length, control.window, control.stride)
    return truncated(texts, length) if stride is None else sliding(texts, length, stride)


@dataclass(eq=False)
class ScoredPass:
    """One pass of a model over documents.

    Attributes:
        texts: the documents.
        length: positions of a window.
        lengths: context lengths up to `length`, for which sums are kept under the truncate protocol; ascending.
        stride: stride of sliding windows, in tokens; None: windows are truncated.
        context: the context that a token's loss depends on, as in `LossFolder`.
        key: identifies the pass among `parts`.
        parts: sums of documents, kept beside the rows until these are written.
        folder: where losses are kept for good, instead of `parts`.
        control: the tokens are read in the windows of this control.
    """

    texts: Texts
    length: int
    lengths: Sequence[int]
    stride: int | None
    context: str
    key: str
    parts: Parts
    folder: LossFolder | None = None
    control: Control | None = None
    _measured: dict[int, dict[int, list[Window]]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def windows(self) -> list[Window]:
        return windows_of(self.texts, self.length, self.stride, self.control)

    @property
    def positions(self) -> int:
        """The most positions that go through the model for one window."""
        return self.length if self.control is None else min(self.length, self.control.window)

    @cached_property
    def by_document(self) -> dict[int, list[Window]]:
        """The windows of each document."""
        return _by_document(self.windows)

    def measured(self, length: int) -> dict[int, list[Window]]:
        """The sliding windows of `length` positions of each document, also of a control, which reads them in others."""
        if length not in self._measured:
            assert self.stride is not None
            self._measured[length] = _by_document(sliding(self.texts, length, self.stride))
        return self._measured[length]

    def sums(self, index: int, losses: Sequence[Losses]) -> Sums:
        """Sums of a document's windows, given the losses of each window that it was read in."""
        if self.stride is not None and self.control is not None:
            together, found = np.concatenate(losses), Sums()
            for length in self.lengths:
                ends = np.cumsum([window.scored for window in self.measured(length)[index]])
                found |= whole_sums(np.split(together, ends[:-1]), length)
            return found
        if self.stride is not None:
            return whole_sums(losses, self.length)
        return prefix_sums(self._wholes(losses), self.lengths)

    def _wholes(self, losses: Sequence[Losses]) -> list[Losses]:
        """The losses of each truncated window of a document, given those of the windows that it was read in."""
        return list(np.concatenate(losses).reshape(-1, self.length - 1))

    def is_kept(self) -> bool:
        """Whether the folder has the losses of every document."""
        folder = self.folder
        return folder is not None and all(
            self._stored(folder, windows) is not None for windows in self.by_document.values()
        )

    def known(self, needed: set[int]) -> PassResult:
        """The results that earlier runs have left.

        needed: context lengths for which a document must have sums to count as known.
        """
        found = PassResult()
        if self.folder:
            for index, windows in self.by_document.items():
                losses = self._stored(self.folder, windows)
                if losses is not None:
                    found.sums[index] = self.sums(index, losses)
            return found  # losses that the folder lacks must be computed for it, whatever sums `parts` holds
        for line in self.parts.read(self.key):
            for index, sums in line["parts"].items():
                if {str(length) for length in needed} <= set(sums):
                    found.sums[int(index)] = sums
            found.add(PassResult({}, line["seconds"], line["tokens"], line["peak_memory"]))
        return found

    def losses(self, length: int) -> list[Losses] | None:
        """The stored losses of each truncated window, cut to `length` positions; None where some are not there."""
        found: list[Losses] = []
        for windows in self.by_document.values():
            losses = self._stored(self.folder, windows) if self.folder else None
            if losses is None:
                return None
            found += [one[: length - 1] for one in losses]
        return found

    def finish(self, index: int, losses: list[Losses]) -> Sums:
        """Return the sums of a document, given the losses of all its windows; store these in the folder, if any."""
        if self.folder:
            self._store(self.folder, self.by_document[index], losses)
        return self.sums(index, losses)

    def _stored(self, folder: LossFolder, windows: list[Window]) -> list[Losses] | None:
        document = self.texts.documents[windows[0].document]
        if self.stride is None:
            read = [folder.read(document, begin, self.context, self.length - 1) for begin in document.begins]
            return None if any(one is None for one in read) else [one for one in read if one is not None]
        whole = folder.read(document, 0, self.context, sum(window.scored for window in windows))
        return None if whole is None else np.split(whole, np.cumsum([window.scored for window in windows])[:-1])

    def _store(self, folder: LossFolder, windows: list[Window], losses: list[Losses]) -> None:
        document = self.texts.documents[windows[0].document]
        if self.stride is not None:
            folder.write(document, 0, self.context, np.concatenate(losses), self.texts.head)
            return
        for begin, one in zip(document.begins, self._wholes(losses), strict=True):
            folder.write(document, begin, self.context, one, self.texts.head)


def _by_document(windows: Sequence[Window]) -> dict[int, list[Window]]:
    """Windows by the number of their document, in order."""
    found: dict[int, list[Window]] = {}
    for window in windows:
        found.setdefault(window.document, []).append(window)
    return found
