"""Read documents as token ids, from texts or from tokenized sets; write tokenized sets.

Token ids are int64 arrays [tokens] without special tokens; rows of packed sets come as they are, without their padding.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.files import scratch_path
from scaled_rope.texts.documents import PACKED_FILE, SAVED_FILES, read_documents
from scaled_rope.texts.packed import IntArray, TokenRows, open_rows
from scaled_rope.texts.vocabulary import check_tokenizer


def is_tokenized(name: str) -> bool:
    """Whether a name is that of a folder with tokens: a packed set, or what `datasets` saved."""
    return any((Path(name) / file).is_file() for file in (PACKED_FILE, *SAVED_FILES))


_PARTS_OF_SETS = frozenset("train training test testing validation valid dev eval heldout".split())
"""Names that folders and files of different data sets share: reports could not tell one set from the other."""


@dataclass(frozen=True)
class TokenSource:
    """A source of documents.

    Attributes:
        name: a source of `read_documents`, or a tokenized set of `open_rows`.
        tokenized: whether it is a tokenized set; a folder that is one is recognised without this.
        feature: the field that holds the text, where records have fields.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.
    """

    name: str
    tokenized: bool = False
    feature: str = "text"
    split: str = "test"
    subset: str | None = None

    @property
    def title(self) -> str:
        """The last part of the name; with the one before it where the last says only which part of a data set it is."""
        parts = Path(self.name).parts
        if parts in ((), ("..",)):  # a folder that is named by where it is
            parts = Path(self.name).resolve().parts
        shared = parts[-1].partition(".")[0].lower() in _PARTS_OF_SETS
        return "-".join(parts[-2:]) if shared else parts[-1]

    def documents(self, tokenizer: Any) -> Iterator[IntArray]:
        """Yield the token ids of each document.

        tokenizer: a transformers tokenizer, the model's.

        Raises:
            ConfigError: no such source, it cannot be read, or its ids are those of another tokenizer.
        """
        if self.tokenized or is_tokenized(self.name):
            rows = open_rows(self.name, self.split, self.subset)
            check_tokenizer(rows, self.name, tokenizer, "the model")
            yield from row_documents(rows, self.name)
            return
        for text in read_documents(self.name, self.feature, self.split, subset=self.subset):
            yield np.asarray(encode(tokenizer, text), dtype=np.int64)


def row_documents(rows: TokenRows, name: str) -> Iterator[IntArray]:
    """Yield the text of each row of a tokenized set; a row with padding inside gives the text before and after it.

    Padding is left out, and counted on stderr: it is no text, and training does not count it either. Other tokens of
    weight 0, such as the prompts of conversations, stay: they are text that the model reads, only not learnt.

    name: the set's name in the note.
    """
    padding = padded = 0
    # Only best-fit pads; rows that are not from here may be padded where they say so by weights alone.
    pads = rows.weighted and getattr(rows, "meta", {}).get("packing") != "concatenate"
    starts_of = getattr(rows, "document_starts", lambda index: None)
    try:
        for index in range(len(rows)):
            tokens, weights = rows.row(index)
            is_padding = _padding(tokens, weights, starts_of(index)) if pads else np.zeros(len(tokens), bool)
            if not is_padding.any():
                yield tokens
                continue
            padding, padded = padding + int(is_padding.sum()), padded + 1
            borders = np.flatnonzero(np.diff(is_padding)) + 1
            for first, end in itertools.pairwise([0, *borders.tolist(), len(tokens)]):
                if not is_padding[first]:
                    yield tokens[first:end]
    finally:  # a reader that has enough ends this early
        _tell_padding(name, padding, padded)


def _padding(tokens: IntArray, weights: IntArray, starts: IntArray | None) -> npt.NDArray[np.bool_]:
    """Which tokens of a row are padding: one token again and again, of weight 0, from where documents begin to where
    the next one does. Where it is not known where documents begin, two tokens or more at the end of the row."""
    found = np.zeros(len(tokens), bool)
    if not len(tokens):
        return found
    if starts is None:
        same = (weights == 0) & (tokens == tokens[-1])
        end = int(np.append(-1, np.flatnonzero(~same))[-1]) + 1
        found[end:] = len(tokens) - end > 1  # one alone may be what a chat ends with
        return found
    for first, end in itertools.pairwise(sorted({0, *starts.tolist(), len(tokens)})):
        found[first:end] = not weights[first:end].any() and (tokens[first:end] == tokens[first]).all()
    return found


@functools.cache
def _tell_padding(name: str, padding: int, rows: int) -> None:
    """Say on stderr, once and from the first rank, how much padding was left out."""
    if padding and int(os.environ.get("RANK", "0")) == 0:
        among = "1 row" if rows == 1 else f"{rows} rows"
        print(f"note: dataset {name}: {padding} tokens of padding in {among} are left out", file=sys.stderr)


def first_tokens(name: str, tokenizer: Any, count: int, feature: str = "text", split: str = "train") -> IntArray:
    """The first `count` tokens of the documents, joined by blank lines; fewer if there are no more.

    Args:
        name: a source of `read_documents`, with the field that holds the text and the split.
        tokenizer: a transformers tokenizer.

    Raises:
        ConfigError: no such source, it cannot be read, or there is no text in it.
    """
    between = encode(tokenizer, "\n\n")
    pieces: list[IntArray] = []
    found = 0
    for text in read_documents(name, feature, split):
        pieces.append(np.asarray((between if pieces else []) + encode(tokenizer, text), dtype=np.int64))
        found += len(pieces[-1])
        if found >= count:
            break
    if not found:
        raise ConfigError(f"dataset {name!r} holds no text")
    return np.concatenate(pieces)[:count]


def save_token_documents(documents: Iterable[IntArray], output: str | Path, name: str) -> int:
    """Write documents as a folder that `datasets` and `open_rows` can read; return their number.

    The columns are input_ids, attention_mask and tokenized_len. The folder appears in one rename.

    Args:
        output: folder to create.
        name: name of the documents in errors.

    Raises:
        ConfigError: `output` exists already, no documents, or `datasets` is missing.
    """
    path = Path(output)
    if path.exists():
        raise ConfigError(f"output {output} exists; remove it or choose another folder")
    try:
        import datasets
    except ImportError:
        raise ConfigError("save-tokenized needs: pip install 'scaled-rope[train]'") from None
    found = [tokens.astype(np.int32) for tokens in documents]
    if not found:
        raise ConfigError(f"dataset {name!r} is empty")
    columns = {
        "input_ids": (found, datasets.Sequence(datasets.Value("int32"))),
        "attention_mask": ([np.ones(len(one), np.int8) for one in found], datasets.Sequence(datasets.Value("int8"))),
        "tokenized_len": ([len(one) for one in found], datasets.Value("int64")),
    }
    table = datasets.Dataset.from_dict(
        {name: values for name, (values, _) in columns.items()},
        features=datasets.Features({name: kind for name, (_, kind) in columns.items()}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = scratch_path(path, "partial")
    silent = not datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table.save_to_disk(str(staged))
        os.rename(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if not silent:
            datasets.enable_progress_bars()
    return len(found)
