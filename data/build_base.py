"""Build what the embedded tiny base model is trained on: its tokenizer and four sets of 256-token rows.

    python data/build_base.py --output data/cache/base

Four kinds of text (novels, the King James Bible, speeches, formal mathematics), fetched with `texts.corpora`, and
documents with hidden facts (`texts.needles`). A row opens with BOS and is either a stretch of one text or one to four
such documents; in all sets but `rows` it may also be a list that is asked for again, or a stretch that
stands twice or more often. Texts that are held out (`is_heldout`) are in none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.flags.shared import check_least
from scaled_rope.texts.corpora import BIBLE_HELDOUT, CORPORA, STANDINS, standin
from scaled_rope.texts.needles import list_document, needle_document
from scaled_rope.texts.packed import PackedWriter, open_packed

BOS, EOS = "<s>", "</s>"
LENGTH = 256  # tokens per row: the context that the base is trained on
VOCABULARY = 4096


@dataclass(frozen=True)
class Kind:
    """One kind of text: where it is from, its share of the set `rows`, the megabytes that the tokenizer learns from."""

    standins: tuple[str, ...]
    share: float
    tokenizer_megabytes: float


KINDS = {
    "novels": Kind(("books", "novels"), 0.38, 100.0),
    "bible": Kind(("bible",), 0.08, 2.0),
    "speeches": Kind(("sotu",), 0.09, 3.0),
    "mathematics": Kind(("hol-light",), 0.20, 3.0),
}


@dataclass(frozen=True)
class RowSet:
    """A set of rows. What `made` leaves is shared out among the texts as their shares say."""

    rows: int
    made: dict[str, float]
    longest_repeat: int = 24
    """Tokens of the longest stretch that is repeated in a row."""


SETS = {
    "rows": RowSet(59_200, {"needles": 0.25}),
    "retrieval": RowSet(12_800, {"periods": 0.45, "copies": 0.25, "lists": 0.15}),
    "mixed": RowSet(48_000, {"needles": 0.20, "copies": 0.08, "lists": 0.08, "periods": 0.06}, longest_repeat=100),
    "text": RowSet(32_000, {"needles": 0.10, "copies": 0.02, "lists": 0.02, "periods": 0.01}, longest_repeat=100),
}
SPLITS = ((LENGTH - 2,), (LENGTH - 2,), (LENGTH - 2,), (90, 162), (126, 126), (62, 62, 126), (83, 83, 82))
"""Lengths of the documents in one row, each between BOS and EOS."""
HELDOUT_MATHEMATICS = ("Jordan", "Rqe")


def is_heldout(kind: str, name: str, index: int) -> bool:
    """Whether a text is for tests only.

    name: its path in the folder, without ".txt". index: its place among the texts of the folder, sorted by name.
    """
    if kind == "novels":
        return name in CORPORA["demo"].folders["novel"]
    if kind == "bible":
        return name in BIBLE_HELDOUT
    if kind == "speeches":
        return index % 10 == 5
    return name.split("/")[0] in HELDOUT_MATHEMATICS


def read_kind(kind: str, heldout: bool = False) -> dict[str, str]:
    """The texts of a kind by name, those to train on or those held out."""
    texts: dict[str, str] = {}
    for source in KINDS[kind].standins:
        folder = standin(f"standin:{source}")
        for index, file in enumerate(sorted(folder.rglob("*.txt"))):
            name = str(file.relative_to(folder)).removesuffix(".txt")
            bible_among_books = kind == "novels" and name == "King James Bible"
            if is_heldout(kind, name, index) is heldout and not bible_among_books:
                texts[name] = file.read_text(encoding="utf-8")
    return texts


def train_tokenizer(texts: dict[str, list[str]], output: Path) -> Path:
    """Train a byte-level BPE tokenizer with single digits, so that a key of five digits is five tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (output / "tokenizer.json").exists():
        return output
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet)

    def sample() -> Iterator[str]:
        for kind, some in texts.items():
            # The first part of every text, so that no kind's size decides and no text is left out.
            part = min(1.0, KINDS[kind].tokenizer_megabytes * 1e6 / sum(map(len, some)))
            for text in some:
                yield text[: int(len(text) * part)]

    tokenizer.train_from_iterator(sample(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    fast.save_pretrained(staged)
    os.rename(staged, output)
    return output


Row = tuple[list[int], list[int]]
"""Tokens and weights, both [LENGTH]."""


class Stretches:
    """Stretches of the texts of one kind, each once per round, in an order and from places that the seed gives."""

    def __init__(self, texts: Sequence[Sequence[int]], rng: random.Random) -> None:
        self.texts, self.rng, self.rounds = texts, rng, 0
        self._left: list[tuple[int, int]] = []

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))

    def next(self, size: int) -> list[int]:
        """The next stretch of `size` tokens, always the same size.

        Raises:
            ConfigError: no text is longer than that.
        """
        if not self._left:
            self.rounds += 1
            for index, text in enumerate(self.texts):
                first = self.rng.randrange(size)
                self._left += [(index, start) for start in range(first, len(text) - size, size)]
            if not self._left:
                raise ConfigError(f"no text has {size} tokens")
            self.rng.shuffle(self._left)
        index, start = self._left.pop()
        return list(self.texts[index][start : start + size])

    def anywhere(self, rng: random.Random, size: int) -> list[int]:
        """A stretch from anywhere, as filler.

        Raises:
            ConfigError: no text is longer than that.
        """
        long = [text for text in self.texts if len(text) > size]
        if not long:
            raise ConfigError(f"no text has more than {size} tokens")
        text = rng.choice(long)
        start = rng.randrange(len(text) - size)
        return list(text[start : start + size])


def needle_row(tokenizer: Any, stretches: dict[str, Stretches], rng: random.Random, longest: int) -> Row:
    """A row of documents with hidden facts."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    row: list[int] = []
    weights: list[int] = []
    for length in rng.choice(SPLITS):
        kind = rng.choice(list(stretches))
        filler = None if rng.random() < 0.35 else stretches[kind].anywhere
        needles = rng.choice((1, 1, 2, 3)) if length > 150 else rng.choice((1, 1, 2)) if length > 100 else 1
        while True:
            try:
                tokens, marks = needle_document(
                    tokenizer, length, rng, filler, needles=needles, questions=rng.choice((1, needles))
                )
                break
            except ConfigError:  # facts of many tokens; others are drawn
                continue
        row += [bos, *tokens, eos]
        weights += [1, *marks, 1]
    return (row + [eos] * LENGTH)[:LENGTH], (weights + [0] * LENGTH)[:LENGTH]


def _piece(tokenizer: Any, stretches: dict[str, Stretches], size: int, rng: random.Random) -> list[int]:
    """A stretch of text, or as often so many random tokens."""
    if rng.random() < 0.5:
        return [rng.randrange(2, len(tokenizer)) for _ in range(size)]
    return stretches[rng.choice(list(stretches))].anywhere(rng, size)


def copy_row(tokenizer: Any, stretches: dict[str, Stretches], rng: random.Random, longest: int) -> Row:
    """A row of stretches each of which stands twice; only the second counts."""
    row, weights = [tokenizer.bos_token_id], [0]
    while len(row) < LENGTH:
        size = rng.randint(6, longest)
        row += 2 * _piece(tokenizer, stretches, size, rng)
        weights += [0] * size + [1] * size
    return row[:LENGTH], weights[:LENGTH]


def period_row(tokenizer: Any, stretches: dict[str, Stretches], rng: random.Random, longest: int) -> Row:
    """A row of one stretch again and again; all but the first time counts."""
    size = rng.randint(3, longest)
    row = [tokenizer.bos_token_id, *(_piece(tokenizer, stretches, size, rng) * (LENGTH // size + 1))]
    return row[:LENGTH], [0] * (1 + size) + [1] * (LENGTH - 1 - size)


def list_row(tokenizer: Any, stretches: dict[str, Stretches], rng: random.Random, longest: int) -> Row:
    """A row that is a list with values that are asked for again."""
    tokens, weights = list_document(tokenizer, LENGTH - 1, rng)
    return [tokenizer.bos_token_id, *tokens], [1, *weights]


MADE = {"needles": needle_row, "lists": list_row, "copies": copy_row, "periods": period_row}


def build_rows(
    tokenizer: Any,
    stretches: dict[str, Stretches],
    row_set: RowSet,
    output: Path,
    rng: random.Random,
) -> Path:
    """Write a set: every row's kind is drawn, with the chance of its share."""
    made = row_set.made
    part = (1 - sum(made.values())) / sum(kind.share for kind in KINDS.values())
    names, shares = [*KINDS, *made], [*(kind.share * part for kind in KINDS.values()), *made.values()]
    counts = dict.fromkeys(names, 0)
    with PackedWriter(output, LENGTH, len(tokenizer), weighted=True) as writer:
        for kind in tqdm(rng.choices(names, shares, k=row_set.rows), desc="rows", unit="row", mininterval=1.0):
            counts[kind] += 1
            if kind in MADE:
                writer.append(*MADE[kind](tokenizer, stretches, rng, row_set.longest_repeat))
            else:
                writer.append([tokenizer.bos_token_id, *stretches[kind].next(LENGTH - 1)], [1] * LENGTH)
        sources = {
            name: asdict(KINDS[name]) | {"tokens": one.tokens, "rows": counts[name], "rounds": one.rounds}
            for name, one in stretches.items()
        }
        record = {"tokenizer": "tokenizer", "sources": sources, "made_rows": {name: counts[name] for name in made}}
        archives = {name: [one.name for one in STANDINS[name].archives] for k in KINDS.values() for name in k.standins}
        return writer.close(record | {"archives": archives})


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse a number of rows below 1 and a seed below 0.

    Raises:
        ConfigError: one of these.
    """
    check_least(args, rows=1, seed=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data/build_base.py", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer and the rows")
    parser.add_argument("--rows", type=int, help="rows of every set, for a trial (default: as in SETS)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_numbers(args)
    from scaled_rope.checkpoint import load_tokenizer

    args.output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SETS if not (args.output / name).exists()]
    for name in SETS.keys() - missing:
        open_packed(args.output / name)  # refuses a damaged one
    if not missing:
        return 0
    texts = {kind: list(read_kind(kind).values()) for kind in KINDS}
    tokenizer = load_tokenizer(str(train_tokenizer(texts, args.output / "tokenizer")))
    ids = {}
    for kind, some in tqdm(texts.items(), desc="tokens", unit="kind"):
        ids[kind] = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
    for name in missing:
        row_set = replace(SETS[name], rows=args.rows or SETS[name].rows)
        prefix = str(args.seed) if name == "rows" else f"{args.seed}/{name}"
        stretches = {kind: Stretches(some, random.Random(f"{prefix}/{kind}")) for kind, some in ids.items()}
        rng = random.Random(f"{args.seed}/{name}")
        build_rows(tokenizer, stretches, row_set, args.output / name, rng)
    print(json.dumps({kind: {"texts": len(some), "tokens": sum(map(len, some))} for kind, some in ids.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
