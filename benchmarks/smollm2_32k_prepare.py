"""Make, on a machine without a GPU, all that benchmarks/smollm2_32k.py needs on one with a GPU.

    python benchmarks/smollm2_32k_prepare.py

fetches model and texts and fills data/cache/smollm2-32k, the folder of the recipes' data, with plain files:

    train, novel                packed sets of the recipes: tokens.bin, memory-mapped, and meta.json
    books, proofs, addresses    evaluation texts as packed sets, a window of 49152 positions in a row
    requests/                   questions of the four benchmarks as token ids (eval/harness.py --requests)
    model/, pieces/             the model without its weights; the weights in pieces of --piece-mib
    manifest.json               SHA-256 of every file

They can travel one by one. Evaluation texts of which more than 1 % stand in the training set are refused. What is there
already is not made again.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # eval/ is not part of the installed package

import eval.harness
import eval.perplexity
from benchmarks.common import run_prepare_commands
from scaled_rope.checkpoint import encode, load_config, load_tokenizer
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.evaluation.windows import Tokens, select, truncated
from scaled_rope.flags import context_lengths
from scaled_rope.recipes import read_recipe
from scaled_rope.results import provenance, write_atomic
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import PackedDataset, PackedWriter, open_packed

RECIPE = "smollm2-135m-yarn-32k"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Text:
    """An evaluation text: its sources, and the windows that are taken from it.

    Attributes:
        sources: files (patterns are allowed) or stand-ins.
        samples: the first so many documents that fill a window; None: all of them.
        windows: the most windows per document, evenly spaced from its start to its end.
        joined: whether all documents are joined into one, in the order of their names.
    """

    sources: tuple[str, ...]
    samples: int | None = None
    windows: int = 1
    joined: bool = False


TEXTS: dict[str, Text] = {
    "books": Text(("data/cache/books/heldout/*.txt", "data/cache/prose/Melville*.txt"), windows=3),
    "proofs": Text(("standin:hol-light",), samples=8),
    "addresses": Text(
        ("standin:sotu",), windows=8, joined=True
    ),  # the longest has 40505 tokens; files begin with years
}
"""Texts by the last part of the names of the recipe's data sets."""

QUESTIONS: dict[str, int | None] = {"arc_challenge": 200, "hellaswag": 200, "mmlu": 5, "truthfulqa_mc2": None}
"""Benchmark -> the first so many questions of each of its tasks (MMLU has 57); None: all questions."""

_RUN = 32  # tokens that must agree for a passage to count as the same
_SHARED = 0.01  # of a text's passages: proverbs and titles recur, chapters do not


# --------------------------------------------------------------------------------------------------------------- texts


def _texts(text: Text, tokenizer: object) -> Iterator[Tokens]:
    """Yield the token ids of each document."""
    for source in text.sources:
        paths = sorted(glob.glob(source)) if "*" in source else [source]
        if not paths:
            raise ConfigError(f"text {source!r} is not there; the recipe's prepare commands fetch it")
        for path in paths:
            for document in read_documents(path):
                yield np.asarray(encode(tokenizer, document + "\n\n" if text.joined else document), dtype=np.int64)


def write_windows(text: Text, model: str, length: int, output: Path) -> None:
    """Write the windows of a text, `length` positions each with the BOS, as a packed set, one to a row.

    Raises:
        ConfigError: too little text, or a set in `output` that was made otherwise.
    """
    made = {"tokenizer": model, "windows_of": json.loads(json.dumps(vars(text))), "sequence_length": length}
    if output.exists():
        done = open_packed(output).meta
        if {key: done.get(key) for key in made} != made:
            raise ConfigError(f"{output} holds windows that were made otherwise; remove it")
        return
    tokenizer = load_tokenizer(model)
    source: Iterator[Tokens] = _texts(text, tokenizer)
    if text.joined:
        source = iter([np.concatenate(list(source))])
    texts = select(source, tokenizer.bos_token_id, length, text.windows, samples=text.samples)
    vocabulary = load_config(model).get_text_config().vocab_size
    with PackedWriter(output, length, vocabulary) as writer:
        for window in truncated(texts, length):
            writer.append(texts.ids(window))
        writer.close(made)


def _passages(tokens: npt.NDArray[np.generic]) -> npt.NDArray[np.uint64]:
    """A hash of every run of `_RUN` tokens of a stream [n], [n - _RUN + 1]."""
    stream = tokens.astype(np.uint64)
    count = len(stream) - _RUN + 1
    found = np.zeros(max(0, count), np.uint64)
    # A polynomial hash modulo 2^64; the factor is 2^64 over the golden ratio, the usual multiplier for hashing.
    for place in range(_RUN):
        found = found * np.uint64(0x9E3779B97F4A7C15) + stream[place : place + count] + np.uint64(1)
    return found


def shared_passages(train: PackedDataset, text: PackedDataset) -> float:
    """The share of a text's passages of 32 tokens that occur in a training set."""
    known = np.unique(_passages(np.asarray(train.tokens).reshape(-1)))
    asked = np.concatenate([_passages(np.asarray(row)) for row in text.tokens])
    return float(np.isin(asked, known).mean())


# ------------------------------------------------------------------------------------------------------ what is packed


def split(path: Path, folder: Path, size: int) -> list[Path]:
    """Cut a file into pieces of `size` bytes, numbered in order; delete other files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-path.stat().st_size // size)
    pieces = [folder / f"{path.name}.{index:02d}" for index in range(count)]
    with path.open("rb") as file:
        for piece in pieces:
            write_atomic(piece, file.read(size))
    for other in set(folder.iterdir()) - set(pieces):
        other.unlink()
    return pieces


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(name: str, piece_bytes: int) -> Path:
    """Fill the folder of a recipe's data; return its path."""
    recipe = read_recipe(name)
    bundle, model = Path(recipe.dataset).parent, str(recipe.model)
    run_prepare_commands(name)

    flags = eval.perplexity.build_parser().parse_args(shlex.split(recipe.evaluate["perplexity"]))
    length, train = context_lengths(flags)[-1], open_packed(recipe.dataset)
    for path in map(Path, flags.dataset):
        if path.name not in TEXTS or path.parent != bundle:
            raise unknown("evaluation text", str(path), [str(bundle / name) for name in TEXTS])
        write_windows(TEXTS[path.name], model, length, path)
        rows = open_packed(path)
        shared = shared_passages(train, rows)
        print(f"{path}: {len(rows)} windows of {length} tokens, {shared:.2%} of their passages in the training set")
        if shared > _SHARED:
            raise ConfigError(f"{path}: {shared:.2%} of its passages are in {recipe.dataset}; hold it out")

    for task, limit in QUESTIONS.items():
        if not (bundle / "requests" / f"{task}.jsonl").exists():
            few = [] if limit is None else ["--limit", str(limit)]
            saving = ["-m", model, "--tasks", task, "--save-requests", str(bundle / "requests")]
            eval.harness.main([*saving, "--offline", "--dtype", "bfloat16", *few])

    (bundle / "model").mkdir(exist_ok=True)
    for file in Path(model).iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, bundle / "model" / file.name)
    weights = Path(model) / WEIGHTS
    pieces = split(weights, bundle / "pieces", piece_bytes)
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path != bundle / "manifest.json")
    manifest = {
        "commit": provenance("cpu", None, {})["commit"],
        "weights": {"sha256": sha256(weights), "pieces": [str(piece.relative_to(bundle)) for piece in pieces]},
        "files": {str(path.relative_to(bundle)): sha256(path) for path in files},
    }
    write_atomic(bundle / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return bundle


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/smollm2_32k_prepare.py", __doc__)
    parser.add_argument("--recipe", default=RECIPE, help="whose model, data and texts (default %(default)s)")
    parser.add_argument("--piece-mib", type=float, default=40.0, metavar="N", help="size of a piece (default 40)")
    args = parser.parse_args(argv)
    if not args.piece_mib > 0:
        raise ConfigError(f"piece-mib {args.piece_mib} is not allowed; above 0")
    bundle = prepare(args.recipe, int(args.piece_mib * 2**20))
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    print(f"{bundle}: {size / 2**20:.0f} MiB in all")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
