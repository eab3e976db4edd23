"""Tokenize text and pack it into fixed-length sequences: the data that finetune.py trains on.

    python tokenization.py --dataset emozilla/pg19 --tokenizer NousResearch/Llama-2-7b-hf \
        --sequence-length 65536 --output data/pg19-64k
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.texts.documents import TextSource, check_there, is_sampled, read_documents
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.texts.packing import BOOKENDS, pack
from scaled_rope.texts.tokenizing import Tokenizers, tokenized


def _documents(sources: Sequence[TextSource], args: argparse.Namespace) -> Iterator[str]:
    for place, source in enumerate(sources):
        for number, text in enumerate(read_documents(source.path, args.feature, args.split, args.json)):
            if is_sampled(args.seed, place, number, source.fraction):
                yield text


def push_to_hub(output: Path, name: str) -> None:
    """Upload a packed set as a `datasets` table with `input_ids`."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("--push-to-hub needs datasets: pip install 'scaled-rope[train]'") from None
    datasets.Dataset.from_generator(_records, gen_kwargs={"path": str(output)}).push_to_hub(name)


def _records(path: str) -> Iterator[dict[str, list[int]]]:
    packed = open_packed(path)
    for index in range(len(packed)):
        yield {"input_ids": packed.row(index)[0].tolist()}


def vocabulary_hash(tokenizer: Any) -> str:
    """Short hash of all tokens and their ids, so that another tokenizer under the same path is noticed."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("tokenization.py", __doc__)
    parser.add_argument("--dataset", action="append", required=True, metavar="PATH[,FRACTION]",
                        help=".txt, .jsonl, .jsonl.zst, .parquet, a folder, or a hub name; repeat to mix")  # fmt: skip
    parser.add_argument("--tokenizer", default="NousResearch/Llama-2-7b-hf")
    parser.add_argument("--sequence-length", type=int, default=8192, help="tokens per sequence")
    parser.add_argument(
        "--bookend", choices=BOOKENDS, default="document", help="what opens and closes with BOS and EOS"
    )
    parser.add_argument("--feature", default="text", help="field with the text")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, help="folder to create")
    parser.add_argument("--push-to-hub", metavar="NAME")
    parser.add_argument("--seed", type=int, default=42, help="which documents a FRACTION keeps")
    parser.add_argument("--json", action="store_true", help="read files as JSON lines whatever their suffix")
    parser.add_argument("--allow-special-tokens", action="store_true",
                        help="read special tokens that texts spell as these tokens, not as plain text")  # fmt: skip
    parser.add_argument("--num-proc", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.output is None:
        if not args.push_to_hub:
            raise ConfigError("--output is missing: name the folder to create")
        args.output = Path("data/cache") / args.push_to_hub.replace("/", "--")
    if args.output.exists() and not (args.output / "meta.json").is_file():
        raise ConfigError(f"--output {args.output} exists and is no packed set; remove it or choose another folder")
    if args.sequence_length < 2:
        raise ConfigError(f"--sequence-length {args.sequence_length} is not allowed; at least 2 tokens")
    if args.num_proc < 1:
        raise ConfigError(f"--num-proc {args.num_proc} is not allowed; at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    sources = [TextSource.parse(text) for text in args.dataset]
    for source in sources:
        check_there(source.path)
    from scaled_rope.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    recipe = {
        "tokenizer": args.tokenizer, "tokenizer_hash": vocabulary_hash(tokenizer),
        "sources": [[s.path, s.fraction] for s in sources], "feature": args.feature,
        "split": args.split, "seed": args.seed, "bookend": args.bookend,
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        "special_tokens": "read" if args.allow_special_tokens else "text",
    }  # fmt: skip
    if args.output.exists():
        done = open_packed(args.output).meta
        # A set that was made before these fields existed is still used; it is not what would be made now.
        earlier = {} if "borders" in done else {"special_tokens": recipe["special_tokens"]}
        if (
            all((earlier | done).get(key) == value for key, value in recipe.items())
            and done["sequence_length"] == args.sequence_length
        ):
            said = ", made by an earlier version, without a record of its documents" if earlier else ""
            print(f"{args.output}: already there, {done['rows']} sequences of {done['sequence_length']} tokens{said}")
        else:
            raise ConfigError(f"--output {args.output} holds a set made otherwise; remove it or choose another folder")
    else:
        began = time.perf_counter()
        with (
            PackedWriter(args.output, args.sequence_length, len(tokenizer)) as writer,
            Tokenizers(args.tokenizer, args.num_proc, args.allow_special_tokens) as tokenizers,
            tqdm(_documents(sources, args), desc="documents", unit="doc", mininterval=1.0) as texts,
        ):
            documents = tokenized(iter(texts), tokenizers)
            counts = pack(documents, writer, tokenizer.bos_token_id, tokenizer.eos_token_id, args.bookend)
            writer.close(recipe | counts.meta())
        print(f"{args.output}: {writer.rows} sequences of {args.sequence_length} tokens from {counts.documents} "
              f"documents ({counts.tokens} tokens, the last {counts.dropped_tokens} dropped),"
              f" {counts.tokens / (time.perf_counter() - began):.0f} tokens/s")  # fmt: skip
    if args.push_to_hub:
        push_to_hub(args.output, args.push_to_hub)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
