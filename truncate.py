"""Re-cut tokenized data into shorter sequences without throwing the rest of each sequence away.

python truncate.py 8192 data/pg19-8k --dataset data/pg19-64k
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.texts.documents import expanded
from scaled_rope.texts.packed import is_part, open_packed, open_rows, remove_half_made
from scaled_rope.texts.packing import hashes_of, recut


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("truncate.py", __doc__)
    parser.add_argument("length", type=int, help="tokens per new sequence")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--dataset", required=True, help="packed set, saved datasets folder or hub name")
    parser.add_argument("--num-proc", type=int, default=1, help="accepted for old scripts; one process is enough")
    args = parser.parse_args(argv)
    if args.output.exists() and not (args.output / "meta.json").is_file() and not is_part(args.output):
        raise ConfigError(f"output {args.output} exists and is no packed set; remove it or choose another folder")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if (fault := remove_half_made(args.output)) is not None:
        print(f"note: {fault}; it is made again", file=sys.stderr)
    if args.output.exists():
        done = open_packed(args.output)
        made = done.meta.get("recut", {})
        # Hashes say more than names: a folder has several, and another may hold the same rows.
        named, hashes, same = made.get("dataset"), made.get("hashes"), False
        if named is not None and done.sequence_length == args.length:
            same = hashes is not None and hashes == hashes_of(open_rows(args.dataset))
            if not same and os.path.realpath(named) != os.path.realpath(expanded(args.dataset)):
                named = None
        if named is None or done.sequence_length != args.length:
            raise ConfigError(f"output {args.output} holds a set made otherwise; remove it or choose another folder")
        if hashes is not None and not same:
            raise ConfigError(
                f"output {args.output} was cut from other rows than {args.dataset} has now; remove it or choose another"
                " folder"
            )
        print(f"{args.output}: already there, {len(done)} sequences of {args.length} tokens")
        return 0
    source = open_rows(args.dataset)
    longest = source.longest
    if not 2 <= args.length <= longest:
        raise ConfigError(f"length {args.length} is not allowed; 2 to {longest}, the longest row of {args.dataset}")
    with tqdm(total=len(source), desc="sequences") as bar:
        recut(source, args.output, args.length, bar.update, args.dataset)
    result = open_packed(args.output)
    print(f"{args.output}: {len(result)} sequences of {args.length} tokens, "
          f"{result.meta['recut']['dropped_tokens']} tokens dropped")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
