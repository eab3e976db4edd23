"""Build what the demo trains on: rows of 2048 tokens, most of them text, some with hidden facts.

    python data/build_demo.py --texts FOLDER --tokenizer models/tiny-llama-256 --output data/cache/demo-2048

A row opens with BOS and is a stretch of one text, or, three in twenty, a document with up to four facts that are asked
for at its end (`texts.needles`), in wordings that no test uses. The answers weigh eight times as much as other tokens.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.build_base import Stretches, check_numbers
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.texts.needles import needle_document
from scaled_rope.texts.packed import PackedWriter, open_packed

LENGTH = 2048
ROWS = 240  # what 60 steps of 4 rows take
NEEDLES = 0.15
MOST_NEEDLES = 4
DULL = 0.35
"""The share of documents with facts whose filler is a few dull sentences, again and again, in place of a text."""


def build(tokenizer: Any, texts: Sequence[Sequence[int]], output: Path, rows: int, seed: int) -> Path:
    """Write the rows; every row's kind is drawn, with the chance of its share."""
    rng = random.Random(seed)
    stretches = Stretches(texts, random.Random(f"{seed}/texts"))
    bos, eos, made = tokenizer.bos_token_id, tokenizer.eos_token_id, 0
    with PackedWriter(output, LENGTH, len(tokenizer), weighted=True) as writer:
        for _ in range(rows):
            if rng.random() < NEEDLES:
                made += 1
                filler = None if rng.random() < DULL else stretches.anywhere
                count = rng.randint(1, MOST_NEEDLES)
                tokens, weights = needle_document(
                    tokenizer, LENGTH - 2, rng, filler, needles=count, questions=rng.randint(1, count)
                )
                writer.append([bos, *tokens, eos], [1, *weights, 1])
            else:
                writer.append([bos, *stretches.next(LENGTH - 1)], [1] * LENGTH)
        sources = {"texts": {"texts": len(texts), "tokens": stretches.tokens, "rows": rows - made}}
        return writer.close({"sources": sources, "made_rows": {"needles": made}, "seed": seed})


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data/build_demo.py", __doc__)
    parser.add_argument("--texts", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_numbers(args)
    from scaled_rope.checkpoint import load_tokenizer

    if args.output.exists():
        open_packed(args.output)  # refuses a damaged one
        return 0
    files = sorted(args.texts.glob("*.txt"))
    if not files:
        raise ConfigError(f"--texts {args.texts}: there is no .txt file")
    tokenizer = load_tokenizer(args.tokenizer)
    texts = [file.read_text(encoding="utf-8") for file in files]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    long = [one for one in ids if len(one) > LENGTH]
    if not long:
        raise ConfigError(f"--texts {args.texts}: no text has more than {LENGTH} tokens, those of a row")
    output = build(tokenizer, long, args.output, args.rows, args.seed)
    print(f"{output}: {args.rows} rows")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
