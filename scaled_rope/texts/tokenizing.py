"""Turn texts into token ids, in order, over several processes; only a few batches and one document are in memory.

A tokenizer needs memory and time that grow faster than its text, so documents are read in windows that overlap.
Two neighbours are joined in the middle of their overlap, where both must have read the same tokens at the same places;
where they have not, they are read again as one. Tokenizers look ahead and back by words at most, so the ids are those
of the document as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from scaled_rope.texts.workers import Workers

Ids = npt.NDArray[np.uint32]
Given = TypeVar("Given")
Made = TypeVar("Made")

#: characters handed to a process at once: bounds memory, amortises the hand-over
BATCH = 2**21
#: characters of a window of a long document
WINDOW = 2**14
#: characters that neighbouring windows share
OVERLAP = 2**10
#: fewest tokens in the middle half of an overlap on which two windows may be joined
AGREEMENT = 32

_tokenizer: Any = None  # of this process
_read_special = False  # whether this process reads special tokens that a text spells as these tokens


# Named tuples, because a million short documents make a million of each, and half of them travel to another process.
class DocumentPart(NamedTuple):
    """Characters `start` to `start + len(text)` of a document; `last` says whether they are its end."""

    text: str
    start: int = 0
    last: bool = True


Places = tuple[int, npt.NDArray[np.int64]]
"""Tokens near an end of a window: the index of the first, and the character of the document at which each begins."""
_NOWHERE: Places = 0, np.empty(0, np.int64)


class _Read(NamedTuple):
    """A part's ids, and the places of its tokens in the overlaps with the window before (head) and after (tail)."""

    ids: Ids
    head: Places = _NOWHERE
    tail: Places = _NOWHERE


def _load(name: str, read_special: bool = False, chat_template: str | None = None) -> None:
    global _tokenizer, _read_special
    from scaled_rope.checkpoint import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # work is parallel over processes already
    _tokenizer, _read_special = load_tokenizer(name), read_special
    if chat_template is not None:
        _tokenizer.chat_template = chat_template
    if _is_fast():  # transformers would do both at each call, but `_encode` calls the backend directly
        _tokenizer.backend_tokenizer.no_truncation()
        _tokenizer.backend_tokenizer.no_padding()


def own_tokenizer() -> Any:
    """The tokenizer of this process, which its `Tokenizers` loaded."""
    return _tokenizer


def reads_special() -> bool:
    """Whether this process reads special tokens that a text spells as these tokens, not as plain text."""
    return _read_special


def _is_fast() -> bool:
    """Whether this process's tokenizer is from the `tokenizers` library; others do not tell the places of tokens."""
    return bool(getattr(_tokenizer, "is_fast", False))


def _encode(parts: list[DocumentPart]) -> tuple[Ids, list[int], dict[int, tuple[Places, Places]]]:
    """Encode parts: the ids of all in a row, the number of tokens of each, and index -> places near a window's ends.

    The result is a few large arrays, because many small ones take longer to send to another process than to make.
    """
    texts = [part.text for part in parts]
    if not _is_fast():
        rows = _tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False,
            split_special_tokens=not _read_special,
        )["input_ids"]  # fmt: skip
        return _flat(rows), [len(ids) for ids in rows], {}
    # Called directly: transformers makes a dictionary of six lists for each text, which for short ones takes as long as
    # tokenizing them.
    _tokenizer.backend_tokenizer.encode_special_tokens = not _read_special  # each call of transformers sets it anew
    found = _tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    rows = [encoding.ids for encoding in found]
    windows = {}
    for index, part in enumerate(parts):
        if part.start or not part.last:
            size = len(part.text)
            head = _places(found[index], part, 0, min(OVERLAP, size)) if part.start else _NOWHERE
            tail = _NOWHERE if part.last else _places(found[index], part, max(0, size - OVERLAP), size)
            windows[index] = head, tail
    return _flat(rows), [len(ids) for ids in rows], windows


def _flat(rows: list[list[int]]) -> Ids:
    return np.fromiter(chain.from_iterable(rows), np.uint32, sum(map(len, rows)))


def _places(encoding: Any, part: DocumentPart, begin: int, end: int) -> Places:
    """The places of the tokens that begin in characters [begin, end) of a part, counted in the whole document."""

    def start(token: int) -> int:
        span = encoding.token_to_chars(token)
        return -1 if span is None else int(span[0])

    # Starts never decrease, so the first token of the stretch is found by binary search.
    count = len(encoding)
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if start(middle) < begin else (low, middle)
    first, starts = low, []
    while low < count and (place := start(low)) < end:
        starts.append(place)
        low += 1
    return first, np.asarray(starts, np.int64) + part.start


def _join(left: _Read, right: _Read, begin: int) -> tuple[int, int] | None:
    """Return how many tokens of `left` to keep and of `right` to skip, for windows that share the `OVERLAP` characters
    from `begin` on; None where they do not agree."""
    # Only the middle half is compared: near the end of a window a tokenizer may choose other tokens.
    middle = begin + OVERLAP // 4, begin + OVERLAP * 3 // 4
    sides = []
    for ids, (first, starts) in ((left.ids, left.tail), (right.ids, right.head)):
        low, high = np.searchsorted(starts, middle)
        sides.append((first + low, starts[low:high], ids[first + low : first + high]))
    (keep, left_starts, left_ids), (skip, right_starts, right_ids) = sides
    agree = np.array_equal(left_starts, right_starts) and np.array_equal(left_ids, right_ids)
    return (int(keep), int(skip)) if agree and len(left_ids) >= AGREEMENT else None


def parts_of(text: str) -> Iterator[DocumentPart]:
    """Yield the windows of a document; a short document is one window."""
    start = 0
    while len(text) - start > WINDOW + OVERLAP:
        yield DocumentPart(text[start : start + WINDOW], start, last=False)
        start += WINDOW - OVERLAP
    yield DocumentPart(text[start:], start)


def _batches(parts: Iterable[DocumentPart]) -> Iterator[list[DocumentPart]]:
    batch: list[DocumentPart] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Tokenizers:
    """A tokenizer in several processes, which do not change results; with one the work is done in this process.

    Use as a context manager: leaving it ends the processes. Only one can be open in a process at a time.

    Args:
        name: folder or hub name of the tokenizer.
        num_proc: number of processes.
        read_special: whether special tokens that a text spells ("</s>") are read as these tokens, not as plain text.
        chat_template: takes the place of the tokenizer's own.
    """

    def __init__(self, name: str, num_proc: int, read_special: bool = False, chat_template: str | None = None) -> None:
        settings = name, read_special, chat_template
        _load(*settings)
        self._workers = Workers(num_proc, _load, settings) if num_proc > 1 else None

    def __enter__(self) -> Tokenizers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._workers is not None:
            self._workers.__exit__(*error)

    def map(self, function: Callable[[Given], Made], batches: Iterable[Given]) -> Iterator[tuple[Given, Made]]:
        """Yield every batch with the result of a function for it, in order. Batches are taken as needed."""
        if self._workers is not None:
            yield from self._workers.map(function, batches)
            return
        for batch in batches:
            yield batch, function(batch)


def _read(batches: Iterator[list[DocumentPart]], tokenizers: Tokenizers) -> Iterator[tuple[DocumentPart, _Read]]:
    """Yield every part with its ids, in order."""
    for batch, (flat, lengths, windows) in tokenizers.map(_encode, batches):
        end = 0
        for index, (part, length) in enumerate(zip(batch, lengths, strict=True)):
            begin, end = end, end + length
            yield part, _Read(flat[begin:end], *windows.get(index, ()))


class _Joiner:
    """Joins the windows of one document. `pieces`, one after the other, are the ids that are final."""

    def __init__(self) -> None:
        self.pieces: list[Ids] = []
        self._held: tuple[DocumentPart, _Read, int] | None = (
            None  # the newest window, and how many of its tokens to skip
        )
        self._absorb = 0  # number of windows to append to its text before it is read again
        self._absorbed = 1  # number of windows that it consists of

    def add(self, part: DocumentPart, read: _Read) -> None:
        if self._held is None:
            self._held = part, read, 0
        else:
            before, left, skip = self._held
            joint = None if self._absorb else _join(left, read, part.start)
            if joint is not None:
                keep, following = joint
                self.pieces.append(left.ids[skip:keep])
                self._held, self._absorbed = (part, read, following), 1
            else:
                # Windows that disagree (say, within one endless word) are read again as one, then twice as many.
                self._absorb = (self._absorb or self._absorbed) - 1
                self._absorbed += 1
                whole = DocumentPart(before.text + part.text[OVERLAP:], before.start, part.last)
                if not self._absorb or part.last:
                    flat, _, windows = _encode([whole])
                    left = _Read(flat, *windows.get(0, ()))
                self._held = whole, left, skip
        if part.last:
            _, left, skip = self._held
            self.pieces.append(left.ids[skip:])


def tokenized(texts: Iterable[str], tokenizers: Tokenizers) -> Iterator[Ids]:
    """Yield the token ids of each text, without special tokens around it, in order. Texts are read as needed."""
    split = _is_fast()
    parts = (part for text in texts for part in (parts_of(text) if split else [DocumentPart(text)]))
    joiner = _Joiner()
    for part, read in _read(_batches(parts), tokenizers):
        if part.last and not part.start:
            yield read.ids
            continue
        joiner.add(part, read)
        if part.last:
            yield joiner.pieces[0] if len(joiner.pieces) == 1 else np.concatenate(joiner.pieces)
            joiner = _Joiner()
