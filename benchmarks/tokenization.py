"""Speed and memory of tokenization.py, beside `datasets.map` of the same tokenizer over the same text.

    python benchmarks/tokenization.py --output data/benchmarks/tokenization_cpu.jsonl

Text is the stand-in for PG19 (`python -m scaled_rope.texts.corpora list`), cut at spaces into documents; when it is
used up it comes again, and every document begins with the number of the copy that it is from. `datasets.map` does what
transformers' run_clm.py does: batches of 1000 documents are tokenized, then joined and cut.

Each run has a process of its own. Its clock starts when everything is imported and the text lies on disk. Its memory is
looked at ten times a second and summed over it and its children: what they have resident, and how much of that is
anonymous, that is, no file's page that the system could take back. Pages that processes share are counted for each of
them. Rows that are in the output for this commit already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, check_names, resident_bytes
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row, rows_so_far
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import open_packed

TOOLS = ("tokenization.py", "datasets.map")
LOOK_S = 0.1
BATCH = 1000  # documents; what datasets.map takes by default


@dataclass(frozen=True)
class Case:
    """Text of `characters` in all, in documents of `document` characters."""

    characters: int
    document: int


CASES = {
    "1x": Case(10_000_000, 4000),
    "4x": Case(40_000_000, 4000),
    "16x": Case(160_000_000, 4000),
    "a million short documents": Case(100_000_000, 100),
    "one document of 50 MB": Case(50_000_000, 50_000_000),
}


def pieces(source: str, size: int) -> Iterator[str]:
    """Yield endless pieces of the source's texts, cut at a space after `size` characters, with the copy's number."""
    for copy in count():
        for text in read_documents(source):
            start = 0
            while start < len(text):
                end = text.find(" ", start + size)
                end = len(text) if end < 0 else end
                yield f"{copy} {text[start:end].strip()}"
                start = end


def documents(case: Case, source: str) -> Iterator[str]:
    """Yield the documents of a case, the same ones every time."""
    total = case.characters // case.document
    if total > 1:
        yield from (text for text, _ in zip(pieces(source, case.document), range(total), strict=False))
        return
    parts, size = [], 0
    for text in pieces(source, 4000):
        parts.append(text)
        size += len(text) + 1
        if size >= case.characters:
            break
    yield "\n".join(parts)


def with_datasets(text: Path, tokenizer_name: str, length: int, num_proc: int, folder: Path) -> tuple[int, list[int]]:
    """Tokenize, join and cut with `datasets`; return the number of sequences and the first one."""
    import datasets

    from scaled_rope.checkpoint import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(tokenizer_name)
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [head + ids + tail for ids in found["input_ids"]]}

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        return {"input_ids": [joined[at : at + length] for at in range(0, len(joined) - length + 1, length)]}

    raw = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "cache"))
    mapping = {"batched": True, "batch_size": BATCH}
    # Each process gets a share of the documents, so there cannot be more processes than documents.
    tokens = raw.map(tokenize, **mapping, num_proc=min(num_proc, len(raw)), remove_columns=["text"])
    rows = tokens.map(group, **mapping, num_proc=min(num_proc, len(tokens)))
    return len(rows), rows[0]["input_ids"]


def with_ours(text: Path, tokenizer: str, length: int, num_proc: int, folder: Path) -> tuple[int, list[int]]:
    """The same by tokenization.py."""
    import tokenization

    arguments = ["--dataset", str(text), "--tokenizer", tokenizer, "--sequence-length", str(length)]
    tokenization.main([*arguments, "--num-proc", str(num_proc), "--output", str(folder / "set")])
    rows = open_packed(folder / "set")
    return len(rows), rows.row(0)[0].tolist()


def child(tool: str, text: Path, args: argparse.Namespace) -> None:
    """Do one measured run: import, then work; print time and result."""
    import datasets
    import transformers  # noqa: F401

    import tokenization  # noqa: F401
    from scaled_rope.checkpoint import load_tokenizer

    datasets.disable_progress_bars()
    load_tokenizer(args.tokenizer)  # its modules are imported lazily
    run = with_ours if tool == "tokenization.py" else with_datasets
    began, used = time.perf_counter(), _processor_seconds()
    rows, first = run(text, args.tokenizer, args.sequence_length, args.num_proc, text.parent)
    seconds, used = time.perf_counter() - began, _processor_seconds() - used
    print(json.dumps({"sequences": rows, "first": first, "seconds": seconds, "processor_seconds": used}))


def _processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def resident(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process and all its descendants, and how many of them are anonymous."""
    whole = anonymous = 0
    for one in (process, *process.children(recursive=True)):
        try:
            more, more_anonymous = resident_bytes(one.pid)
        except (OSError, IndexError):  # it has ended
            continue
        whole, anonymous = whole + more, anonymous + more_anonymous
    return whole, anonymous


def measure(name: str, tool: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case with one tool; return its row without provenance."""
    case = CASES[name]
    row: dict[str, Any] = {
        "metric": "tokenization", "case": name, "tool": tool, "tokenizer": args.tokenizer, "text": args.text,
        "sequence_length": args.sequence_length, "num_proc": args.num_proc,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        sizes = []
        with text.open("w", encoding="utf-8") as file:
            for document in documents(case, args.text):
                file.write(json.dumps({"text": document}) + "\n")
                sizes.append(len(document))
        row |= {"documents": len(sizes), "characters": sum(sizes)}
        # As a module: a script's own folder comes first on the path, and there `tokenization` is this file.
        command = [sys.executable, "-m", "benchmarks.tokenization", "--child", tool, "--child-text", str(text)]
        command += ["--tokenizer", args.tokenizer, "--sequence-length", str(args.sequence_length)]
        command += ["--num-proc", str(args.num_proc)]
        output, errors = Path(scratch) / "stdout", Path(scratch) / "stderr"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": scratch, "HF_HUB_OFFLINE": "1"}
        with output.open("w") as out, errors.open("w") as err:
            process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
            peak = peak_anonymous = 0
            while process.poll() is None:
                whole, anonymous = resident(process)
                peak, peak_anonymous = max(peak, whole), max(peak_anonymous, anonymous)
                if anonymous > args.memory_limit * 1e9:
                    for one in (*process.children(recursive=True), process):
                        one.kill()
                    process.wait()
                    return row | {"skipped": f"needs more than {args.memory_limit:g} GB"}
                time.sleep(LOOK_S)
        if process.returncode:
            raise RuntimeError(f"{tool}, {name}: {errors.read_text()[-2000:]}")
        found = json.loads(output.read_text().splitlines()[-1])
    tokens = found["sequences"] * args.sequence_length
    return row | {
        "sequences": found["sequences"], "first": found["first"][:64],
        "seconds": round(found["seconds"], 2), "processor_seconds": round(found["processor_seconds"], 2),
        "tokens_per_second": round(tokens / found["seconds"]),
        "tokens_per_processor_second": round(tokens / found["processor_seconds"]),
        "peak_resident_gb": round(peak / 1e9, 3), "peak_anonymous_gb": round(peak_anonymous / 1e9, 3),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/tokenization.py", __doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of: {', '.join(CASES)}")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--tokenizer", default="models/smollm2-135m", help="folder or hub name (default: %(default)s)")
    parser.add_argument("--text", default="standin:books", help="what documents are cut from (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--memory-limit", type=float, default=10.0, metavar="GB", help="end a run that needs more")
    parser.add_argument("--output", type=Path, help="append rows to this file")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--child-text", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.child_text, args)
        return 0
    check_names("case", args.cases, CASES)
    told = ("cases", "tools", "tokenizer", "text", "sequence_length", "num_proc", "memory_limit")
    facts = provenance("cpu", None, {name: getattr(args, name) for name in told})  # of the code as it is now
    done = [] if args.output is None else rows_so_far(args.output)
    finished = {(row["commit"], row["case"], row["tool"]) for row in done}
    for name in args.cases or CASES:
        first: dict[str, list[int]] = {}
        for tool in args.tools:
            if (facts["commit"], name, tool) in finished:
                continue
            row = measure(name, tool, args)
            if "first" in row:
                first[tool] = row.pop("first")
            if "skipped" in row:
                print(f"{name}, {tool}: {row['skipped']}", flush=True)
            else:
                print(f"{name}, {tool}: {row['tokens_per_second']} tokens/s ({row['tokens_per_processor_second']} per"
                      f" second of a processor), {row['peak_resident_gb']:.2f} GB resident,"
                      f" {row['peak_anonymous_gb']:.2f} anonymous", flush=True)  # fmt: skip
            if args.output is not None:
                append_row(args.output, row | facts)
        if len({tuple(ids) for ids in first.values()}) > 1:
            raise ConfigError(f"case {name!r}: the tools' first sequences differ, so they did not do the same")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
