"""Make, on a machine without a GPU, all that benchmarks/smollm2_32k.py needs on one with a GPU.

    python benchmarks/smollm2_32k_prepare.py

fetches model and texts and fills data/cache/smollm2-32k, the folder of the recipes' data, with plain files:

    train, novel                packed sets of the recipes: tokens.bin, memory-mapped, and meta.json
    books, proofs, addresses    evaluation texts as packed sets, a window of 65536 positions in a row
    requests/                   questions of the benchmarks as token ids (eval/harness.py --requests)
    model/, pieces/             the model without its weights; the weights, packed without loss (smollm2_32k_bundle.py)
    manifest.json               size and SHA-256 of every file, and which of them go together in a call

and prints these calls: each is at most --call-mib with the manifest, by default what 64 MiB leave beside this checkout.
Evaluation texts of which more than 1 % stand in the training set are refused. What is there already is not made again.
"""

from __future__ import annotations

import glob
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # eval/ is not part of the installed package

import eval.harness
import eval.perplexity
from benchmarks.common import ROOT, run_prepare_commands
from benchmarks.smollm2_32k_bundle import CALL_BYTES, MANIFEST, WEIGHTS, complete
from scaled_rope.checkpoint import encode, load_config, load_tokenizer
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.evaluation.windows import Tokens, select, truncated
from scaled_rope.flags.evaluators import context_lengths
from scaled_rope.provenance import provenance
from scaled_rope.recipes.files import read_recipe
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import PackedDataset, PackedWriter, open_packed

RECIPE = "smollm2-135m-yarn-32k"


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
    "books": Text(("data/cache/books/heldout/*.txt", "data/cache/prose/Melville*.txt"), windows=2),
    "proofs": Text(("standin:hol-light",), windows=4, joined=True),
    # The longest address has 40505 tokens; files begin with years.
    "addresses": Text(("standin:sotu",), windows=4, joined=True),
}
"""Texts by the last part of the names of the recipe's data sets."""

QUESTIONS: dict[str, int | None] = {"arc_easy": 200, "hellaswag": 200}
"""Benchmark -> the first so many questions; None: all."""

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
    vocabulary = text_config(load_config(model)).vocab_size
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


def room_beside_checkout() -> int:
    """Bytes that a call has room for besides the files that git tracks here.

    Raises:
        ConfigError: this is no git repository.
    """
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True)
    if done.returncode:
        raise ConfigError("how much a call has room for is not known outside a git repository; say --call-mib")
    paths = [ROOT / name.decode() for name in done.stdout.split(b"\0") if name]
    return CALL_BYTES - sum(path.stat().st_size for path in paths if path.is_file())


def prepare(name: str, room: int) -> tuple[Path, list[list[str]]]:
    """Fill the folder of a recipe's data; return its path and the calls of at most `room` bytes that carry it."""
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
    return bundle, complete(bundle, Path(model) / WEIGHTS, room, commit=provenance("cpu", None, {})["commit"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/smollm2_32k_prepare.py", __doc__)
    parser.add_argument("--recipe", default=RECIPE, help="whose model, data and texts (default %(default)s)")
    parser.add_argument("--call-mib", type=float, metavar="N", help="room of a call (default: 64 less this checkout)")
    args = parser.parse_args(argv)
    if args.call_mib is not None and not args.call_mib > 0:
        raise ConfigError(f"call-mib {args.call_mib} is not allowed; above 0")
    room = room_beside_checkout() if args.call_mib is None else int(args.call_mib * 2**20)
    bundle, calls = prepare(args.recipe, room)
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    print(f"{bundle}: {size / 2**20:.0f} MiB in all, {len(calls)} calls of at most {room / 2**20:.1f} MiB")
    for number, call in enumerate(calls, 1):
        print(f"call {number}: {' '.join(str(bundle / name) for name in (MANIFEST, *call))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
