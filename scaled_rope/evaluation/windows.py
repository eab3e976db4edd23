"""Cut documents into windows of scored tokens, and turn the tokens' losses into perplexities or store them.

A *document* is a text's tokens without special tokens. A *window* is a run of them that goes through a model at once,
after the BOS where the tokenizer has one (`head` = 1, else 0); its *positions* include the BOS. A window scores its
last tokens; the BOS is never scored, the first token predicted from it is. Losses are in nats. Nothing here knows of
models.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from scaled_rope.content_hash import record_hash
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.statistics import ratio_interval
from scaled_rope.files import write_atomic

Tokens = npt.NDArray[np.int64]
Nats = npt.NDArray[np.float64]
Losses = npt.NDArray[np.float32]

WEIGHTINGS = ("token", "window")


# ------------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True, eq=False)
class Document:
    """One text, or as much of it as is needed."""

    digest: str
    """Hash of the whole text's tokens and of the BOS in front, even if only a part is kept here."""
    tokens: Tokens
    begins: tuple[int, ...] = (0,)
    """Indices of the first tokens of its windows under the truncate protocol."""


@dataclass(frozen=True, eq=False)
class Texts:
    """The documents to score, in order."""

    documents: list[Document]
    bos: int | None
    copies: tuple[tuple[int, int], ...] = ()
    """Documents that were left out because their tokens are those of an earlier one: the number of each in the source,
    counted from 1, and that of the earlier one."""

    @property
    def head(self) -> int:
        """The number of special tokens at the start of a window: 1 with a BOS, else 0."""
        return 0 if self.bos is None else 1

    def ids(self, window: Window) -> Tokens:
        """The token ids of a window, BOS included, [positions]."""
        tokens = self.documents[window.document].tokens[window.begin : window.end]
        return tokens if self.bos is None else np.concatenate([[self.bos], tokens])

    def positions(self, window: Window) -> int:
        return window.end - window.begin + self.head


def select(
    source: Iterable[Tokens],
    bos: int | None,
    length: int | None,
    windows: int = 1,
    min_tokens: int = 0,
    samples: int | None = None,
) -> Texts:
    """Select the first `samples` documents that are long enough and no copies of earlier ones; all of them by default.

    Args:
        source: the tokens of each document. A BOS at its start (packed rows have one) is removed.
        bos: the token that opens every window; None for tokenizers without one.
        length: positions that each document must fill. Up to `windows` runs of that size are kept, which do not
            overlap and are evenly spaced from the document's start to its end; one window is at the start. None:
            whole documents, all that have a token to score.
        min_tokens: tokens that each document must have at least, besides.

    Raises:
        ConfigError: fewer documents than asked for are long enough, or none is.
    """
    head = 0 if bos is None else 1
    # A whole document needs one token to score: with a BOS any token is one, without it the first has no context.
    body = 2 - head if length is None else length - head
    documents: list[Document] = []
    seen: dict[str, int] = {}  # digest -> number of the document
    copies: list[tuple[int, int]] = []
    read = 0
    for tokens in source:
        read += 1
        if len(tokens) and tokens[0] == bos:
            tokens = tokens[1:]
        if len(tokens) < max(min_tokens, body):
            continue
        digest = hashlib.sha256(f"{bos}".encode() + tokens.astype(np.int64).tobytes()).hexdigest()[:24]
        if digest in seen:  # it would count as a second witness, and narrow the interval
            copies.append((read, seen[digest]))
            continue
        seen[digest] = read
        begins: tuple[int, ...] = (0,)
        if length is not None:
            count = min(windows, len(tokens) // body)
            if count > 1:
                begins = tuple(np.linspace(0, len(tokens) - body, count).round().astype(int).tolist())
            tokens = tokens[: begins[-1] + body].copy()  # a copy, lest the rest be kept in memory
        documents.append(Document(digest, tokens, begins))
        if len(documents) == samples:
            break
    if not documents or (samples is not None and len(documents) < samples):
        asked = "at least 1 is needed" if samples is None else f"--samples asks for {samples}"
        need = max(min_tokens, body if length is None else length)
        hint = "are there texts in it?" if length is None else "ask for shorter --lengths or fewer --samples"
        which = f"only {len(documents)} of {read} documents have {need} tokens"
        if copies:
            which += f" and are no copies of others ({len(copies)} {'is' if len(copies) == 1 else 'are'})"
        raise ConfigError(f"{which}; {asked}: {hint}")
    return Texts(documents, bos, tuple(copies))


@functools.cache
def tell_copies(name: str, copies: tuple[tuple[int, int], ...]) -> None:
    """Say on stderr, once, that documents of a data set were left out as copies. copies: those of `Texts`."""
    if not copies:
        return
    (number, earlier), count = copies[0], len(copies)
    which = f"document {number} has the tokens of document {earlier}"
    said = f"{which} and is" if count == 1 else f"{count} copies of other documents (the first: {which}) are"
    print(f"note: dataset {name}: {said} left out", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a document, of which the last `scored` are scored."""

    document: int
    begin: int
    end: int
    scored: int


def truncated(texts: Texts, length: int) -> list[Window]:
    """The windows that `select` chose, cut to `length` positions, each scoring all it can: length - 1 tokens."""
    return [
        Window(index, begin, begin + length - texts.head, length - 1)
        for index, document in enumerate(texts.documents)
        for begin in document.begins
    ]


def sliding(texts: Texts, length: int, stride: int) -> list[Window]:
    """Windows of `length` positions at 0, stride, 2·stride, … up to the first that reaches the document's end.

    Each scores the tokens that no earlier one of its document did. A document shorter than a window is one window.
    A stride that would leave tokens unscored between windows is shortened to the longest that leaves none.
    """
    windows: list[Window] = []
    for index, document in enumerate(texts.documents):
        windows += _slid(texts, index, 0, len(document.tokens), length, stride)
    return windows


def recent(texts: Texts, length: int, window: int, stride: int) -> list[Window]:
    """The windows that `truncated` gives, each read in windows of `window` positions that begin every `stride` tokens.

    Together those of one truncated window score the same tokens in the same order. The first scores all it can, as
    `truncated` does; every later token has between window - stride and window - 1 positions before it.
    """
    pieces: list[Window] = []
    for whole in truncated(texts, length):
        pieces += _slid(texts, whole.document, whole.begin, whole.end, window, stride)
    return pieces


def _slid(texts: Texts, document: int, first: int, last: int, length: int, stride: int) -> Iterator[Window]:
    """Sliding windows of `length` positions over tokens [first, last) of a document, as `sliding` describes them."""
    done = first
    for begin in range(first, last, min(stride, length - 1)):
        end = min(begin + length - texts.head, last)
        # Without a BOS nothing predicts the first token.
        yield Window(document, begin, end, end - max(done, first + 1 - texts.head))
        done = end
        if end == last:
            break


def batches(windows: Sequence[Window], size: Callable[[Window], int]) -> Iterator[list[Window]]:
    """Runs of neighbours that have the same shape, `size(window)` at most.

    They follow from the windows alone, so that a run which is continued computes in the same batches, and with that
    the same bits, as one that was not interrupted.
    """
    for _, alike in itertools.groupby(windows, lambda window: (window.end - window.begin, window.scored)):
        group = list(alike)
        step = size(group[0])
        yield from (group[first : first + step] for first in range(0, len(group), step))


def windows_fingerprint(texts: Texts, length: int) -> str:
    """A short hash of the tokens in the truncated windows of `length` positions, by which rows name their text."""
    digest = hashlib.sha256()
    for window in truncated(texts, length):
        digest.update(texts.ids(window).tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ statistics


def perplexity(total: float, count: float) -> float | None:
    """exp(total / count), of nats; None where that is not finite, since JSON has no such number."""
    if not count or not math.isfinite(total) or total / count > 700:  # exp overflows float64 above 709
        return None
    return math.exp(total / count)


def terms(nats: Sequence[Nats], targets: Sequence[Nats], weighting: str = "token") -> tuple[Nats, Nats]:
    """Numerators and denominators of documents, two arrays [documents]; exp of the ratio of sums is the perplexity.

    Args:
        nats, targets: per document, the sum over each of its windows [windows].
        weighting: "token": nats over targets. "window", as in the released code: means of windows over the number of
            windows, so that a window of one token weighs as much as one of thousands.
    """
    if weighting == "window":
        means = [np.asarray(sums) / np.asarray(counts) for sums, counts in zip(nats, targets, strict=True)]
        return np.array([mean.sum() for mean in means]), np.array([float(len(mean)) for mean in means])
    return np.array([np.sum(sums) for sums in nats]), np.array([float(np.sum(counts)) for counts in targets])


def interval_of(above: Nats, below: Nats) -> list[float | None] | None:
    """95 % interval of a perplexity over documents, see `ratio_interval`; None with fewer than two of them.

    It says how much the value depends on which documents were taken, which is far more than the number of tokens
    suggests.
    """
    if len(above) < 2:
        return None
    return [perplexity(bound, 1) for bound in ratio_interval(above, below)]


def cumulate(losses: Losses, counts: Sequence[int]) -> list[float]:
    """The sum of the first n of `losses` for each n of `counts`, in float64."""
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    return [float(sums[count]) for count in counts]


# --------------------------------------------------------------------------------------------------- losses on disk


class LossFolder:
    """Losses of every scored token, float32, a safetensors file per piece of a document.

    The pieces of one model under one scaling share a folder. A file's header says what it holds:

        "digest"   `Document.digest`
        "first"    place in the document of the first token that is scored; the others follow it without gaps
        "seal"     a hash of these fields and of the losses
        "context"  "all": every token saw everything from "first" on (and the BOS); otherwise the length of the pass
                   ("at 4096") or the length and stride of the sliding windows ("sliding 4096 256"; "last 4096 1024"
                   where they read a truncated window, for the control)
    """

    def __init__(self, root: str | Path, name: str) -> None:
        self.path = Path(root) / name

    def _file(self, digest: str, begin: int, context: str) -> Path:
        return self.path / f"{digest}-{begin}-{context.replace(' ', '-')}.safetensors"

    def read(self, document: Document, begin: int, context: str, count: int) -> Losses | None:
        """The first `count` losses of a piece that begins at token `begin`; None when there are not so many."""
        path = self._file(document.digest, begin, context)
        if not path.is_file():
            return None
        header, losses = read_losses(path)
        if "seal" in header and header["seal"] != _seal(header, losses):  # earlier versions wrote none
            raise ConfigError(f"losses {str(path)!r} were changed after they were written; remove the file")
        return losses[:count] if len(losses) >= count else None

    def write(self, document: Document, begin: int, context: str, losses: Losses, head: int) -> None:
        """Store the losses of a piece, in one atomic step."""
        header = {"digest": document.digest, "first": str(begin + 1 - head), "context": context}
        stored = np.ascontiguousarray(losses, dtype=np.float32)
        content = safetensors.numpy.save({"nll": stored}, header | {"seal": _seal(header, stored)})
        write_atomic(self._file(document.digest, begin, context), content)


def _seal(header: Mapping[str, str], losses: Losses) -> str:
    """The hash of what a file of a `LossFolder` says."""
    record = {name: value for name, value in header.items() if name != "seal"}
    return record_hash(record | {"nll": np.ascontiguousarray(losses, dtype="<f4").tobytes().hex()})


def read_losses(path: str | Path) -> tuple[Mapping[str, str], Losses]:
    """Header and losses [tokens] of one file of a `LossFolder`.

    Raises:
        ConfigError: not such a file.
    """
    try:
        with safetensors.safe_open(str(path), "numpy") as file:
            return file.metadata() or {}, file.get_tensor("nll")
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"losses {str(path)!r} cannot be read ({error}); remove the file") from error
