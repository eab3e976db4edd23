"""Documents, and packed sets made of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenization
from scaled_rope.command_line import run_cli
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.texts.packing import pack

BOS, EOS = 0, 1


def documents(seed: int, number: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 90) for _ in range(rng.choice([0, 1, 5, 17, 60]))] for _ in range(number)]


def packed(tmp_path: Path, docs: list[list[int]], length: int, bookend: str, name: str = "set"):
    with PackedWriter(tmp_path / name, length, 100) as writer:
        counts = pack(docs, writer, BOS, EOS, bookend)
        writer.close({"bookend": bookend, "bos": BOS, "eos": EOS})
    return open_packed(tmp_path / name), counts


def tokenize(*arguments: object) -> int:
    return run_cli(lambda: tokenization.main([str(argument) for argument in arguments]))


def write_corpus(folder: Path) -> list[str]:
    texts = [f"There is text number {i}. " + "Find it and memorize them. " * (i % 7) for i in range(30)]
    (folder / "txt").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "txt" / f"{number:02d}.txt").write_text(text)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return texts
