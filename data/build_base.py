"""Build what the embedded tiny base model is trained on: its tokenizer and its two sets of 256-token sequences.

    python data/build_base.py --books data/cache/books --output data/cache/base

`language`: book text, a quarter of the rows opened by a synthetic passkey document, a quarter of those hidden in book
text instead of the usual filler sentences. `retrieval`: half of the rows opened by one, half of those in book text, and
answers weighted 8 times. Every row is BOS + 255 tokens; after a passkey document it goes on with book text.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import trange

from scaled_rope.data import PackedWriter, open_packed, read_documents
from scaled_rope.errors import Parser, run_cli
from scaled_rope.passkey import build_prompt, draw_key

BOS, EOS = "<s>", "</s>"
LENGTH = 256  # tokens per row: the context that the base is trained on
VOCABULARY = 4096
PASSKEY_LENGTHS = (112, 160, 208, 256)
#: set -> rows, share of rows that open with a passkey document, share of those hidden in book text, weight of answers
SETS = {"language": (48_000, 0.25, 0.25, 1), "retrieval": (24_000, 0.5, 0.5, 8)}


def train_tokenizer(books: Sequence[str], output: Path) -> Path:
    """A byte-level BPE with single digits, so that a key of five digits is five tokens."""
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


def build_set(name: str, tokenizer: Any, stream: list[int], output: Path, seed: int) -> Path:
    """Write one of `SETS` from the books' token stream."""
    rows, passkey_share, book_filler_share, weight = SETS[name]
    rng = random.Random(f"{seed}/{name}")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def book(tokens: int) -> list[int]:
        start = rng.randrange(len(stream) - tokens)
        return stream[start : start + tokens]

    with PackedWriter(output / name, LENGTH, len(tokenizer), weighted=True) as writer:
        for _ in trange(rows, desc=name, unit="row", mininterval=1.0):
            row, weights = [bos], [1]
            if rng.random() < passkey_share:
                length = rng.choice(PASSKEY_LENGTHS)
                filler = book(LENGTH) if rng.random() < book_filler_share else None
                prompt = build_prompt(tokenizer, length, rng.random(), draw_key(rng), filler)
                row = prompt.input_ids + prompt.answer_ids + [eos, bos]
                weights = [1] * len(prompt.input_ids) + [weight] * len(prompt.answer_ids) + [1, 1]
            missing = LENGTH - len(row)
            row, weights = (row + book(max(missing, 0)))[:LENGTH], (weights + [1] * max(missing, 0))[:LENGTH]
            writer.append(row, weights)
        return writer.close({"tokenizer": "tokenizer", "seed": seed, "recipe": list(SETS[name])})


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data/build_base.py", __doc__)
    parser.add_argument("--books", type=Path, required=True, help="folder that `scaled_rope.corpora fetch books` made")
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer, language and retrieval")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from scaled_rope.loading import load_tokenizer

    texts = list(read_documents(str(args.books / "train")))
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(train_tokenizer(texts, args.output / "tokenizer")))
    stream = [token for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for token in ids]
    for name in SETS:
        if (args.output / name).exists():
            open_packed(args.output / name)
        else:
            build_set(name, tokenizer, stream, args.output, args.seed)
    print(json.dumps({"books_tokens": len(stream), "sets": {k: v[0] for k, v in SETS.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
