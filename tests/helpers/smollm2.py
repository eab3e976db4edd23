"""The preparation of the SmolLM2 runs, on texts of a few hundred words."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks import smollm2_32k_prepare
from scaled_rope.checkpoint import encode, load_tokenizer
from scaled_rope.texts.packed import PackedWriter
from scaled_rope.texts.packing import pack


def pack_training_set(folder: Path, *more: Path) -> None:
    """Do what the prepare commands of a recipe do, without a process for it."""
    tokenizer, output = load_tokenizer(str(folder / "base")), folder / "bundle" / "train"
    shutil.rmtree(output, ignore_errors=True)
    documents = [encode(tokenizer, path.read_text()) for path in (*sorted((folder / "train").iterdir()), *more)]
    with PackedWriter(output, 192, len(tokenizer)) as writer:
        pack(documents, writer, tokenizer.bos_token_id, tokenizer.eos_token_id)
        writer.close({})


def prepare(folder: Path) -> int:
    return smollm2_32k_prepare.main(["--recipe", str(folder / "tiny.yaml"), "--call-mib", "5"])
