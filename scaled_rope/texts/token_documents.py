"""Read documents as token ids, from texts or from tokenized sets; write tokenized sets.

Token ids are int64 arrays [tokens] without special tokens; rows of packed sets come as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.results import scratch_path
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import IntArray, open_rows
from scaled_rope.texts.vocabulary import check_tokenizer


def is_tokenized(name: str) -> bool:
    """Whether a name is that of a folder with tokens: a packed set, or what `datasets` saved."""
    files = ("meta.json", "dataset_info.json", "dataset_dict.json")
    return any((Path(name) / file).is_file() for file in files)


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
            for index in range(len(rows)):
                yield rows.row(index)[0]
            return
        for text in read_documents(self.name, self.feature, self.split, subset=self.subset):
            yield np.asarray(encode(tokenizer, text), dtype=np.int64)


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
