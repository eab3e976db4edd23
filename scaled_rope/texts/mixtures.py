"""Mixtures: several sources of documents, each with its share of a budget of tokens.

    tokens: 20e9
    sources:
      - {dataset: data/books, fraction: 0.3, min_tokens: 65536, repeats: 2}
      - {dataset: data/web, fraction: 0.7}

`fraction` is a source's share of the budget, so all of them sum to 1. A source that has fewer tokens than its share is
read again, up to `repeats` times in all; without enough of them it is refused. The next document always comes from the
source that is furthest behind its share, so the shares hold at every point of the data and nothing is drawn at random.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError, is_number, is_positive_whole, unknown
from scaled_rope.recipes.files import read_yaml
from scaled_rope.texts.conversations import ChatFields, Refusals, conversations, read_records
from scaled_rope.texts.documents import check_split, expanded, is_sampled, read_documents
from scaled_rope.texts.packing import Document, PackCounts
from scaled_rope.texts.tokenizing import Tokenizers, tokenized

CHAT_FIELDS = ("messages", "prompt", "completion")
"""Names of the fields of chats, in mixtures and as flags."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        dataset: as `read_documents` takes it, or for chats `read_records`.
        fraction: its share of the mixture's tokens; None outside of a mixture, where all of it is read once.
        feature: the field with the text, where records have fields.
        split: split of a hub dataset.
        messages, prompt, completion: fields of chats, see `ChatFields`; they take the place of `feature`.
        min_tokens, max_tokens: documents of fewer or more tokens (BOS and EOS not counted) are left out.
        repeats: how many times it may be read.
        keep: the share of its documents that is read at all, chosen by the seed.
    """

    dataset: str
    fraction: float | None = None
    feature: str = "text"
    split: str = "train"
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    repeats: int = 1
    keep: float = 1.0

    @property
    def chat(self) -> ChatFields | None:
        """The fields of its chats; None for texts."""
        given = self.messages, self.prompt, self.completion
        return None if given == (None, None, None) else ChatFields(*given)


@dataclass(frozen=True)
class Mixture:
    """Sources and what is made of them: so many tokens in all."""

    tokens: int
    sources: tuple[Source, ...]
    seed: int = 42

    def to_dict(self) -> dict[str, Any]:
        """The mixture as plain types, for a set's provenance."""
        return {"tokens": self.tokens, "seed": self.seed, "sources": [asdict(source) for source in self.sources]}


_SOURCE_FIELDS = tuple(field.name for field in fields(Source))
_MIXTURE_FIELDS = ("tokens", "seed", "sources")


def read_mixture(path: str | Path) -> Mixture:
    """Read a mixture from a YAML file.

    Raises:
        ConfigError: no such file, an unknown field, a value that is not allowed, or a split of a source that has none;
            it names the source.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"mixture file {path} does not exist")
    content = read_yaml(file, "mixture")
    for name in content:
        if name not in _MIXTURE_FIELDS:
            raise unknown(f"field of mixture {path}", name, _MIXTURE_FIELDS)
    tokens, seed = _whole(content.get("tokens")), content.get("seed", 42)
    if tokens is None or tokens < 1:
        raise ConfigError(f"mixture {path}: tokens = {content.get('tokens')!r} is not allowed; a whole number above 0")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"mixture {path}: seed = {seed!r} is not allowed; a whole number, 0 or more")
    entries = content.get("sources")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"mixture {path}: sources = {entries!r} is not allowed; a list of sources")
    sources = tuple(_source(entry, f"mixture {path}, source {number}") for number, entry in enumerate(entries, 1))
    total = math.fsum(source.fraction or 0.0 for source in sources)
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"mixture {path}: the fractions sum to {total:g}; they are shares of the tokens, so 1")
    return Mixture(tokens, sources, seed)


def _whole(value: Any) -> int | None:
    """A whole number, also as YAML reads 20e9 (a text) or 2.0e+9; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return int(value) if is_number(value) and value == int(value) else None


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < float(value) <= 1


def _source(entry: Any, where: str) -> Source:
    """Read one source. Raises ConfigError."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} = {entry!r} is not allowed; a block of `field: value` lines")
    for name in entry:
        if name not in _SOURCE_FIELDS:
            raise unknown(f"field of {where}", name, _SOURCE_FIELDS)

    def require(condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{where}: {name} = {entry.get(name)!r} is not allowed; {allowed}")

    values = dict(entry)
    require(isinstance(values.get("dataset"), str) and bool(values["dataset"]), "dataset", "a path or a hub name")
    for name in ("feature", "split", *CHAT_FIELDS):
        if name in values:
            require(isinstance(values[name], str), name, "the name of a field" if name != "split" else "a split")
    require(_is_share(values.get("fraction")), "fraction", "a share of the tokens: above 0, up to 1;"
            " to read a source several times, give it repeats")  # fmt: skip
    for name in ("min_tokens", "max_tokens"):
        if values.get(name) is not None:
            whole = _whole(values[name])
            require(whole is not None, name, "a whole number of tokens")
            values[name] = whole
        else:
            values.pop(name, None)
    least: int = values.get("min_tokens", 0)
    most: int | None = values.get("max_tokens")
    require(least >= 0, "min_tokens", "0 or more")
    require(most is None or most >= max(1, least), "max_tokens", f"at least 1, and no less than min_tokens ({least})")
    if "repeats" in values:
        require(is_positive_whole(values["repeats"]), "repeats", "a whole number, at least 1")
    require(_is_share(values.get("keep", 1.0)), "keep", "above 0, up to 1")
    chat = [name for name in CHAT_FIELDS if values.get(name) is not None]
    require(not (chat and "feature" in values), "feature", f"it is for texts, and this source has {', '.join(chat)}")
    values["dataset"] = expanded(values["dataset"])
    try:
        check_split(values["dataset"], values.get("split"))
        source = Source(**values)
        _ = source.chat
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return source


# ------------------------------------------------------------------------------------------------------- documents


class Copies:
    """Finds documents that have the tokens and weights of an earlier one, by a hash of 8 bytes each."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, document: Document) -> None:
        """Take note of the next document."""
        digest = hashlib.blake2b(np.asarray(document.ids, np.int64).tobytes(), digest_size=8)
        if document.weights is not None:
            digest.update(document.weights.tobytes())
        self._hashes.append(int.from_bytes(digest.digest(), "big"))

    def found(self) -> tuple[int, int, int]:
        """How many there are; and of the first, its number and that of the earlier one, both from 1 on (0: none)."""
        hashes = np.array(self._hashes, np.uint64)
        repeated = np.ones(len(hashes), bool)
        repeated[np.unique(hashes, return_index=True)[1]] = False
        if not repeated.any():
            return 0, 0, 0
        first = int(repeated.argmax())
        return int(repeated.sum()), first + 1, int((hashes == hashes[first]).argmax()) + 1


class Reader:
    """Reads the documents of one source and counts what it leaves out.

    Args:
        number: of the source, which its documents carry.
        around: tokens that packing puts around a text.
        as_json: read files as JSON whatever their suffix.
        replace_surrogates: as for `read_documents`.
        copies: takes note of the documents that are read for the first time.
    """

    def __init__(
        self,
        source: Source,
        number: int,
        seed: int,
        around: int,
        refusals: Refusals,
        as_json: bool = False,
        replace_surrogates: bool = False,
        copies: Copies | None = None,
    ) -> None:
        self.source, self._number, self._seed, self._as_json = source, number, seed, as_json
        self._replace_surrogates = replace_surrogates
        self._around, self._refusals, self._copies = around, refusals, copies
        self.passes = self.too_short = self.too_long = self.tokens = 0

    def documents(self, tokenizers: Tokenizers) -> Iterator[Document]:
        """Yield the documents, again and again as often as the source allows."""
        source, least, most = self.source, self.source.min_tokens, self.source.max_tokens
        for repeat in range(source.repeats):
            self.passes = repeat + 1
            before = self.tokens
            for document in self._once(tokenizers):
                size = len(document.ids)  # type: ignore[arg-type]
                if size < least:
                    self.too_short += not repeat
                elif most is not None and size > most:
                    self.too_long += not repeat
                else:
                    self.tokens += size + (0 if document.bare else self._around)
                    if self._copies is not None and not repeat:
                        self._copies.add(document)
                    yield document
            if self.tokens == before:
                return  # nothing in it; reading it again will not help

    def _once(self, tokenizers: Tokenizers) -> Iterator[Document]:
        source, number = self.source, self._number
        if source.chat is not None:
            records = self._kept(read_records(source.dataset, source.split, self._as_json))
            for document in conversations(records, source.chat, tokenizers, self._refusals):
                yield document._replace(source=number)
            return
        read = read_documents(
            source.dataset,
            source.feature,
            source.split,
            self._as_json,
            replace_surrogates=self._replace_surrogates,
        )
        texts = self._kept(read)
        for ids in tokenized(texts, tokenizers):
            yield Document(ids, None, number)

    def _kept(self, items: Iterator[Any]) -> Iterator[Any]:
        keep = self.source.keep
        return (item for place, item in enumerate(items) if is_sampled(self._seed, self._number, place, keep))


def in_order(readers: Sequence[Reader], tokenizers: Tokenizers) -> Iterator[Document]:
    """Yield the documents of sources without shares: those of the first, then those of the second, and so on."""
    for reader in readers:
        yield from reader.documents(tokenizers)


def mixed(mixture: Mixture, readers: Sequence[Reader], tokenizers: Tokenizers) -> Iterator[Document]:
    """Yield documents until every source of a mixture has its share of the tokens; the last of each may exceed it.

    Raises:
        ConfigError: a source has too few tokens.
    """
    streams = [reader.documents(tokenizers) for reader in readers]
    targets = [mixture.tokens * float(source.fraction or 0) for source in mixture.sources]
    left = set(range(len(streams)))
    while left:
        number = min(left, key=lambda each: (readers[each].tokens / targets[each], each))
        reader = readers[number]
        if reader.tokens >= targets[number]:
            left.remove(number)
            continue
        document = next(streams[number], None)
        if document is None:
            _refuse_short(mixture, reader, targets[number])
        else:
            yield document


def _refuse_short(mixture: Mixture, reader: Reader, target: float) -> None:
    source, once = reader.source, reader.tokens // max(1, reader.passes)
    bins = f" in documents of {source.min_tokens} to {source.max_tokens or 'any number of'} tokens"
    said = f"dataset {source.dataset} has {once} tokens{bins if source.min_tokens or source.max_tokens else ''}"
    needed = f"fraction {source.fraction:g} of {mixture.tokens} tokens needs {math.ceil(target)}"
    if not once:
        raise ConfigError(f"{said}; {needed}")
    # what all sources could give if this one is read as often as now
    possible = math.floor(reader.tokens / float(source.fraction or 1))
    raise ConfigError(
        f"{said}, {reader.tokens} if read {reader.passes} times; {needed}:"
        f" repeats {math.ceil(target / once)}, or tokens {possible} at most"
    )


# ------------------------------------------------------------------------------------------------------- the record


def record_of(readers: Sequence[Reader], counts: Sequence[PackCounts]) -> list[dict[str, Any]]:
    """Counts of each source, for a set's provenance; `share` is that of the tokens that were packed."""
    total = sum(count.tokens for count in counts) or 1
    return [
        {"dataset": reader.source.dataset, "fraction": reader.source.fraction,
         "share": round(count.tokens / total, 6)} | vars(count)
        | {"passes": reader.passes, "too_short": reader.too_short, "too_long": reader.too_long}
        for reader, count in zip(readers, counts, strict=True)
    ]  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The record as lines of aligned columns."""
    columns = ("dataset", "fraction", "share", "documents", "tokens", "passes", "cut_documents", "dropped_tokens",
               "too_short", "too_long")  # fmt: skip
    cells = [[column.replace("_", " ") for column in columns]]
    for row in rows:
        cells.append([f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    )
