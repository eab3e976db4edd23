"""Build what the embedded tiny base model is trained on: its tokenizer and its sets of 256-token sequences.

    python data/build_base.py --books data/cache/books --output data/cache/base

`language`: book text, a quarter of the rows opened by a synthetic passkey document, a quarter of those hidden in book
text instead of the usual filler sentences. `retrieval`: four fifths of the rows opened by one or two, half of those in
book text, and every repetition of a key weighted 8 times. `mixed`: the same for three tenths of the rows. A row has 256
tokens, opens with BOS and ends with book text.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import trange

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt, build_prompt, draw_key
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import PackedWriter, open_packed

BOS, EOS = "<s>", "</s>"
LENGTH = 256  # tokens per row: the context that the base is trained on
VOCABULARY = 4096


@dataclass(frozen=True)
class Mixture:
    """The composition of a training set."""

    rows: int
    passkey_share: float  # of rows that open with passkey documents
    lengths: tuple[tuple[int, ...], ...]  # of the documents that such a row opens with; one entry is drawn
    book_filler_share: float  # of passkey documents that hide the key in book text
    key_weight: int  # of every repetition of a key as a target


SETS = {
    "language": Mixture(48_000, 0.25, ((112,), (160,), (208,), (256,)), 0.25, 1),
    "retrieval": Mixture(24_000, 0.8, ((256,), (192,), (128, 128), (112, 144)), 0.5, 8),
    "mixed": Mixture(24_000, 0.3, ((256,), (192,), (128, 128), (112, 144)), 0.5, 8),
}


def train_tokenizer(books: Sequence[str], output: Path) -> Path:
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
    tokenizer.train_from_iterator(books, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    fast.save_pretrained(staged)
    os.rename(staged, output)
    return output


def repeated_key_weights(prompt: PasskeyPrompt, weight: int) -> list[int]:
    """Weights of a prompt's and its answer's tokens: `weight` where the key is repeated, so can be known, else 1."""
    tokens, key = prompt.input_ids + prompt.answer_ids, prompt.answer_ids
    places = [start for start in range(len(tokens)) if tokens[start : start + len(key)] == key]
    weights = [1] * len(tokens)
    for start in places[1:]:
        weights[start : start + len(key)] = [weight] * len(key)
    return weights


def build_set(name: str, tokenizer: Any, stream: list[int], output: Path, seed: int) -> Path:
    """Write one of `SETS` from the books' token stream."""
    mixture = SETS[name]
    rng = random.Random(f"{seed}/{name}")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def book(tokens: int) -> list[int]:
        start = rng.randrange(len(stream) - tokens)
        return stream[start : start + tokens]

    with PackedWriter(output / name, LENGTH, len(tokenizer), weighted=True) as writer:
        for _ in trange(mixture.rows, desc=name, unit="row", mininterval=1.0):
            row: list[int] = []
            weights: list[int] = []
            for length in rng.choice(mixture.lengths) if rng.random() < mixture.passkey_share else ():
                filler = book(LENGTH) if rng.random() < mixture.book_filler_share else None
                prompt = build_prompt(tokenizer, length, rng.random(), draw_key(rng), filler)
                row += prompt.input_ids + prompt.answer_ids
                weights += repeated_key_weights(prompt, mixture.key_weight)
            ends = [eos, bos] if row else [bos]
            missing = max(LENGTH - len(row) - len(ends), 0)
            row = (row + ends + book(missing))[:LENGTH]
            writer.append(row, (weights + [1] * LENGTH)[:LENGTH])
        return writer.close({"tokenizer": "tokenizer", "seed": seed, "mixture": asdict(mixture)})


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data/build_base.py", __doc__)
    parser.add_argument(
        "--books", type=Path, required=True, help="folder that `scaled_rope.texts.corpora fetch books` made"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer, language and retrieval")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from scaled_rope.checkpoint import load_tokenizer

    texts = list(read_documents(str(args.books / "train")))
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(train_tokenizer(texts, args.output / "tokenizer")))
    stream = [token for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for token in ids]
    for name in SETS:
        if (args.output / name).exists():
            open_packed(args.output / name)
        else:
            build_set(name, tokenizer, stream, args.output, args.seed)
    print(json.dumps({"books_tokens": len(stream), "sets": {name: mixture.rows for name, mixture in SETS.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
