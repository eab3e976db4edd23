"""Run the same commands in two checkouts and compare everything they print and write.

    git worktree add /tmp/before 9fa6686
    python benchmarks/same_outputs.py /tmp/before .

--help of every entry point, what the commands say of the embedded model, and a miniature of the demo: a few steps of
training in float32, perplexity and passkeys under several scalings. Compared are exit codes, printed text, keys of rows
and all of their values but where, when and how fast they were measured. A line per command says "same" or what
differs; the exit code is 1 when anything does. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError

MODEL = "models/tiny-llama-256"
HELDOUT = "data/cache/books/heldout"
SCALINGS = ["default", "linear:8", "ntk:8", "yarn:8", "dynamic-yarn", "rerope,window=64"]
WORK = Path("out/same-outputs")
PYTHON = [sys.executable]
# Where, when and how fast: not what was measured.
VOLATILE = {"provenance", "seconds", "peak_memory", "peak_memory_gb", "tokens_per_second", "mfu"}


def commands() -> Iterator[list[str]]:
    """Yield every command, as a list of words; they run in the root of a checkout."""
    for script in ("finetune.py", "tokenization.py", "truncate.py"):
        yield [*PYTHON, script, "--help"]
    for name in ("perplexity", "passkey", "passkey_hard", "quality", "harness", "prompt_loop", "report"):
        yield [*PYTHON, f"eval/{name}.py", "--help"]
    for script in ("train.sh", "eval.sh", "eval-harness.sh"):
        yield ["bash", script, "--help"]
    tool = [*PYTHON, "-m", "scaled_rope"]
    yield [*tool, "--help"]
    for name in ("inspect", "methods", "export", "plan", "tune"):
        yield [*tool, name, "--help"]
    for name in ("recipes", "texts.corpora", "texts.fetched_models", "texts.benchmarks", "report.paper"):
        yield [*PYTHON, "-m", f"scaled_rope.{name}", "--help"]
    yield [*tool, "methods"]
    yield [*tool, "inspect", MODEL]
    yield [*tool, "inspect", MODEL, "--json", "--scaling", "yarn:8"]
    for target in ("transformers", "vllm", "sglang", "llama.cpp"):
        yield [*tool, "export", MODEL, "--scaling", "yarn:8", "--for", target]
    yield [*tool, "plan", "llama-2-7b-64k", "--gpus", "8", "--gpu-memory", "80"]
    yield [*tool, "inspect", MODEL, "--scaling", "yan:8"]
    yield [*PYTHON, "-m", "scaled_rope.recipes", "--list"]
    yield [*PYTHON, "-m", "scaled_rope.recipes", "llama-2-7b-64k"]
    yield [*PYTHON, "-m", "scaled_rope.report.paper", "table2", "--shell"]
    yield [*PYTHON, "-m", "scaled_rope.texts.corpora", "fetch", "books", "--output", "data/cache/books"]
    yield [
        *PYTHON, "tokenization.py", "--dataset", "data/cache/books/train", "--tokenizer", MODEL,
        "--sequence-length", "1024", "--bookend", "chunk", "--num-proc", "1", "--output", str(WORK / "books-1024"),
    ]  # fmt: skip
    yield [
        *PYTHON, "finetune.py", "demo", "--dataset", str(WORK / "books-1024"), "--max-train-steps", "3",
        "--precision", "fp32", "--warmup-steps", "1", "--output-dir", str(WORK / "run"),
    ]  # fmt: skip
    models = ["-m", MODEL, *(word for each in SCALINGS for word in ("--scaling", each)), "--dtype", "float32"]
    trained = ["-m", str(WORK / "run" / "model"), "--dtype", "float32"]
    text = ["--dataset", HELDOUT, "--windows", "2", "--lengths", "256,512,1024"]
    for which, words in (("base", models), ("trained", trained)):
        rows = ["--output", str(WORK / f"{which}.jsonl")]
        yield [*PYTHON, "eval/perplexity.py", *words, *text, *rows]
        yield [*PYTHON, "eval/passkey.py", *words, "--lengths", "256,512", "--iterations", "2", *rows]
    yield [
        *PYTHON,
        "eval/report.py",
        str(WORK / "base.jsonl"),
        str(WORK / "trained.jsonl"),
        "--output",
        str(WORK / "page"),
    ]


def run(command: list[str], root: Path) -> tuple[int, list[str]]:
    """Run a command in a checkout; return its exit code, and the lines of both outputs as `plain` leaves them."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHON": sys.executable,
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, plain(done.stdout, root) + plain(done.stderr, root)


def plain(text: str, root: Path) -> list[str]:
    """Split a text into lines, without progress bars, paths and speeds."""
    text = text.replace(str(root), "ROOT")
    text = re.sub(r"[\d.]+ ?(tokens/s|s\b|GB|GiB|MB|MiB)", r"N \1", text)
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not re.search(r"it/s|step/s|\d+%\||doc/s|Warning|warnings.warn", line)]


def rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The written files and their content: rows, lines of logs, and configs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((root / WORK).rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[str(path.relative_to(root))] = [_stable(line, root) for line in lines]
    for path in sorted((root / WORK).rglob("*.safetensors")):
        found[str(path.relative_to(root))] = [{"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]
    for path in sorted((root / WORK).rglob("config.json")):
        found[str(path.relative_to(root))] = [json.loads(path.read_text(encoding="utf-8"))]
    return found


def _stable(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return {key: "…" if key in VOLATILE else _stable(entry, root) for key, entry in value.items()}
    return value


def main() -> int:
    parser = Parser("python benchmarks/same_outputs.py", __doc__)
    parser.add_argument("before", help="root of a checkout")
    parser.add_argument("after", help="root of another")
    parser.add_argument("--only", metavar="TEXT", help="only commands that contain it")
    return compare(parser.parse_args())


def compare(args: argparse.Namespace) -> int:
    """Run all commands in both checkouts and print the comparison; return 1 when anything differs."""
    roots = [Path(args.before).resolve(), Path(args.after).resolve()]
    for root in roots:
        if not (root / "scaled_rope" / "__init__.py").is_file():
            raise ConfigError(f"{root} is no checkout of this project")
        shutil.rmtree(root / WORK, ignore_errors=True)
    worst = 0
    for command in commands():
        words = " ".join(command[1:] if command[0] != "bash" else command)
        if args.only and args.only not in words:
            continue
        (code, lines), (other_code, other) = (run(command, root) for root in roots)
        if "--help" in command:  # a text is laid out anew when a word in it changes its length
            lines, other = (" ".join(text).split() for text in (lines, other))
        same = code == other_code and lines == other
        print(f"{'same' if same else 'DIFFERS'} (exit code {code}): {words}", flush=True)
        if not same:
            worst = 1
            print(*list(difflib.unified_diff(lines, other, "before", "after", lineterm="", n=0))[:20], sep="\n")
    written = [rows(root) for root in roots]
    for path in sorted({*written[0], *written[1]}):
        same = written[0].get(path) == written[1].get(path)
        count = len(written[0].get(path, ()))
        print(f"{'same' if same else 'DIFFERS'}: {path}, {count} rows", flush=True)
        worst |= not same
    return worst


if __name__ == "__main__":
    sys.exit(run_cli(main))
