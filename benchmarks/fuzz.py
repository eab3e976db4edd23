"""Damage every kind of file that is read from outside, and count what is not an answer or one clear line.

    python benchmarks/fuzz.py --minutes 30 --seed 1
    python benchmarks/fuzz.py --seed 1 --replay recipe:1234

An input is one of the project's own files, with some of its bytes changed or one of its values replaced. Right outcomes
are a value and a `ConfigError`. Everything else is a failure: another exception, more than 5 seconds, more than 1 GB, a
frequency that is not finite. Each is shown with the smallest input that still fails in the same way, and its number,
which `--replay` runs again. The exit code is 1 if there was one.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, check_names
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError

SECONDS, BYTES = 5.0, 10**9
MODEL = ROOT / "models" / "tiny-llama-256"
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, 10**40, -(10**30), 1e308, math.nan, math.inf, -math.inf, "", " ",
    "x", "5", "nan", "1e9", "../..", "a\nb", "\x00", "é" * 50, "$(touch x)", "<script>alert(1)</script>", [], [[]],
    [None], {}, {"": {}}, {"a": [1, {"b": None}]}, "y" * 10_000, list(range(1000)),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One kind of input: the bytes to start from, and what is done with them in a folder of their own.

    Attributes:
        seeds: files as the project writes them.
        use: given a folder and the changed bytes, reads them as users do; returns what was understood.
        form: "json", "lines" (JSON by lines) or "bytes": how a value inside can be replaced.
    """

    seeds: Callable[[], Sequence[bytes]]
    use: Callable[[Path, bytes], object]
    form: str


# ------------------------------------------------------------------------------------------------------ the targets


def _recipe_seeds() -> list[bytes]:
    names = ("demo", "tiny-base", "mistral-7b-64k", "qwen3-8b-128k-pose")
    return [(ROOT / "configs" / f"{name}.yaml").read_bytes() for name in names]


def _read_recipe(folder: Path, data: bytes) -> object:
    from scaled_rope.recipes.files import read_recipe
    from scaled_rope.recipes.steps import shell_assignments

    (folder / "r.yaml").write_bytes(data)
    for name in ("qwen3-8b-128k", "tiny-base"):
        shutil.copy(ROOT / "configs" / f"{name}.yaml", folder / f"{name}.yaml")
    recipe = read_recipe(str(folder / "r.yaml"))
    return shell_assignments(recipe)


def _read_mixture(folder: Path, data: bytes) -> object:
    from scaled_rope.texts.mixtures import read_mixture

    (folder / "m.yaml").write_bytes(data)
    return read_mixture(folder / "m.yaml")


def _config_seeds() -> list[bytes]:
    base = json.loads((MODEL / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    gemma = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
             "num_hidden_layers": 2, "rope_parameters": {"full_attention": yarn, "sliding_attention":
             {"rope_type": "default", "rope_theta": 1e4}}}  # fmt: skip
    old = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e4}
    whole = {"model_type": "llava", "text_config": base, "vision_config": {"model_type": "clip_vision_model"}}
    configs = (base, base | {"rope_parameters": yarn}, base | gemma, {**base, "rope_parameters": None} | old, whole)
    return [json.dumps(config).encode() for config in configs]


def _read_config(folder: Path, data: bytes) -> object:
    from scaled_rope.checkpoint import open_checkpoint
    from scaled_rope.scaling.frequencies import compute_rope

    (folder / "config.json").write_bytes(data)
    checkpoint = open_checkpoint(str(folder))
    inv_freq, factor = compute_rope(checkpoint.settings.scaling, checkpoint.settings.head_dim)
    if not (bool(inv_freq.isfinite().all()) and math.isfinite(float(factor))):
        raise ArithmeticError(f"not finite: {checkpoint.settings.scaling}")
    return float(factor)


def _inspect(folder: Path, data: bytes) -> object:
    from scaled_rope.cli import main

    (folder / "config.json").write_bytes(data)
    return main(["inspect", str(folder), "--json"])


def _export(folder: Path, data: bytes) -> object:
    from scaled_rope.cli import main

    (folder / "config.json").write_bytes(data)
    return [main(["export", str(folder), "--for", target, "--scaling", "yarn:4"]) for target in ("vllm", "llama.cpp")]


def _gguf_seeds() -> list[bytes]:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    keys = [
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"),
        text(b"llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        text(b"llama.context_length") + struct.pack("<II", 4, 256),
        text(b"tokens") + struct.pack("<IIQ", 9, 8, 3) + text(b"a") + text(b"bc") + text(b""),
        text(b"scores") + struct.pack("<IIQ", 9, 6, 4) + struct.pack("<4f", 1, 2, 3, 4),
    ]
    return [b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys)]


def _read_gguf(folder: Path, data: bytes) -> object:
    from scaled_rope.serving.gguf import GgufRope, add_rope, read_gguf_rope

    (folder / "a.gguf").write_bytes(data)
    add_rope(folder / "a.gguf", folder / "b.gguf", GgufRope({"llama.rope.freq_base": 5e5}))
    return read_gguf_rope(folder / "b.gguf")


def _packed_seeds() -> list[bytes]:
    from scaled_rope.texts.packed import PackedWriter

    with tempfile.TemporaryDirectory() as folder:
        with PackedWriter(Path(folder) / "set", 4, 100, weighted=True) as writer:
            for start in range(3):
                writer.append(range(start, start + 4), starts=[0])
            writer.close({"tokenizer": "t"})
        whole = (Path(folder) / "set" / "meta.json").read_bytes()
        record = json.loads(whole)
        del record["hashes"]  # as earlier versions wrote it, so that changes are not found by the hash alone
        return [whole, json.dumps(record).encode()]


def _read_packed(folder: Path, data: bytes) -> object:
    from scaled_rope.texts.packed import PackedWriter, open_packed

    with PackedWriter(folder / "set", 4, 100, weighted=True) as writer:
        for start in range(3):
            writer.append(range(start, start + 4), starts=[0])
        writer.close({"tokenizer": "t"})
    (folder / "set" / "meta.json").write_bytes(data)
    rows = open_packed(folder / "set")
    rows.check(100)
    return [rows.row(index) for index in range(len(rows))], rows.document_starts(0)


def _state_seeds() -> list[bytes]:
    from scaled_rope.training.manifest import NAME, entries, state_files, write_manifest

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(b"weights")
        write_manifest(Path(folder), {"step": 6, "ranks": 1, "engine": "plain"},
                       entries(Path(folder), state_files(Path(folder))))  # fmt: skip
        return [(Path(folder) / NAME).read_bytes(), b'{"step": 6, "ranks": 1, "engine": "plain"}\n']


def _read_state(folder: Path, data: bytes) -> object:
    from scaled_rope.training.manifest import NAME, fault, read_facts

    state = folder / "step-000006"
    state.mkdir()
    (state / "model.safetensors").write_bytes(b"weights")
    (state / NAME).write_bytes(data)
    wrong = fault(state)
    facts = None if wrong is not None else read_facts(state, "state")
    if facts is not None and "files" in facts and facts["step"] != 6:
        raise ArithmeticError(f"step {facts['step']} was believed")
    return wrong


def _row_seeds() -> list[bytes]:
    found = []
    for name in ("base_rows", "training_ways_rows"):
        lines = (ROOT / "data" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        found.append(b"".join(lines[:3] + lines[-2:]))
    return found


def _read_rows(folder: Path, data: bytes) -> object:
    from scaled_rope.report.summary import summarize
    from scaled_rope.report.tables import load_results

    (folder / "rows.jsonl").write_bytes(data)
    results = load_results([str(folder / "rows.jsonl")])
    return summarize(results)


def _weight_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})]


def _read_weights(folder: Path, data: bytes) -> object:
    from scaled_rope.patching.loading import stored_tensors

    (folder / "model.safetensors").write_bytes(data)
    return stored_tensors(str(folder))


def _spec_seeds() -> list[bytes]:
    return [
        b"yarn:8,beta_fast=16,attention_factor=1.1",
        b"dynamic-ntk",
        b"self-extend,group=4,window=64",
        b"longrope:4",
    ]


def _read_spec(folder: Path, data: bytes) -> object:
    from scaled_rope.scaling.frequencies import compute_rope
    from scaled_rope.scaling.record import RopeScaling

    base = RopeScaling("default", original_max_position_embeddings=256, rope_theta=1e4)
    scaling = RopeScaling.from_spec(data.decode("utf-8", errors="replace"), base)
    inv_freq, factor = compute_rope(scaling.of_frequencies, 64)
    if not (bool(inv_freq.isfinite().all()) and math.isfinite(float(factor))):
        raise ArithmeticError(f"not finite: {scaling}")
    return scaling.label


TARGETS = {
    "recipe": Target(_recipe_seeds, _read_recipe, "bytes"),
    "mixture": Target(lambda: [p.read_bytes() for p in (ROOT / "configs" / "mixtures").glob("*.yaml")],
                      _read_mixture, "bytes"),
    "config": Target(_config_seeds, _read_config, "json"),
    "inspect": Target(_config_seeds, _inspect, "json"),
    "export": Target(_config_seeds, _export, "json"),
    "gguf": Target(_gguf_seeds, _read_gguf, "bytes"),
    "packed": Target(_packed_seeds, _read_packed, "json"),
    "state": Target(_state_seeds, _read_state, "json"),
    "rows": Target(_row_seeds, _read_rows, "lines"),
    "weights": Target(_weight_seeds, _read_weights, "bytes"),
    "spec": Target(_spec_seeds, _read_spec, "bytes"),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the mutations


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, each in inner for place in _places(each, (*path, key))]


def _replace_value(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove, double or rename one value of a JSON document."""
    value = json.loads(data)
    place = rng.choice(_places(value))
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    kind = rng.random()
    if kind < 0.1 and isinstance(holder, dict):
        holder[str(place[-1]) + rng.choice(("x", " ", "_"))] = holder.pop(place[-1])
    elif kind < 0.2:
        del holder[place[-1]]
    else:
        holder[place[-1]] = rng.choice(NASTY)
    return json.dumps(value).encode()


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, kind = rng.randrange(len(changed) + 1), rng.randrange(6)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = changed[place : place + rng.randrange(1, 200)]
        elif kind == 3:
            del changed[place : place + rng.randrange(1, 60)]
        elif kind == 4:
            changed[place:place] = str(rng.choice(NASTY)).encode()
        else:
            changed[place : place + 8] = rng.choice(
                (b"\xff" * 8, b"\x00" * 8, b"\n- &a [*a", b"\t: {[", b"!!python/x ")
            )
    return bytes(changed)


def make_input(name: str, seed: int, number: int) -> bytes:
    """Input `number` of a target; the same for the same seed."""
    target, rng = TARGETS[name], random.Random(f"{seed}/{name}/{number}")
    data = rng.choice(list(_seeds(name)))
    if target.form != "bytes" and rng.random() < 0.7:
        if target.form == "lines":
            lines = data.splitlines()
            index = rng.randrange(len(lines))
            lines[index] = _replace_value(lines[index], rng)
            return b"\n".join(lines) + b"\n"
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = _replace_value(data, rng)
        return data
    return _change_bytes(data, rng)


_KEPT: dict[str, Sequence[bytes]] = {}


def _seeds(name: str) -> Sequence[bytes]:
    if name not in _KEPT:
        _KEPT[name] = TARGETS[name].seeds()
    return _KEPT[name]


# ------------------------------------------------------------------------------------------------------- the verdict


def outcome(name: str, data: bytes) -> str:
    """ "value", "refused", or what is wrong: kind of exception and where it was raised."""
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TARGETS[name].use(Path(folder), data)
            found = "value"
        except ConfigError as error:
            found = "refused" if str(error).strip() and "\n" not in str(error).strip() else "refused in several lines"
        except (Exception, SystemExit) as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = "" if place is None else f" at {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
            found = f"{type(error).__name__}{where}"
    if time.process_time() - began > SECONDS:
        return f"more than {SECONDS:g} s"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 > BYTES:
        return "more than 1 GB"
    return found


GOOD = ("value", "refused")


def limit_memory() -> None:
    """Let this process take 3 GB more than now: what wants more is a `MemoryError`, and no harm to the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 3 * BYTES, resource.RLIM_INFINITY))


def smallest(name: str, data: bytes, wrong: str) -> bytes:
    """A smaller input that fails in the same way: parts are left out as long as that is so."""
    size = len(data) // 2
    while size:
        place = 0
        while place < len(data):
            shorter = data[:place] + data[place + size :]
            if outcome(name, shorter) == wrong:
                data = shorter
            else:
                place += size
        size //= 2
    return data


def run(
    names: Sequence[str], seed: int, stop: Callable[[int], bool]
) -> tuple[Counter[tuple[str, str]], dict[str, int]]:
    """Try inputs of all targets in turn until `stop`, which is given how many were tried.

    Returns:
        (counts of target and outcome, number of the first input of each failure, by "target: outcome").
    """
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[str, int] = {}
    tried = 0
    while not stop(tried):
        name, number = names[tried % len(names)], tried // len(names)
        found = outcome(name, make_input(name, seed, number))
        counts[name, found] += 1
        if found not in GOOD:
            first.setdefault(f"{name}: {found}", number)
        tried += 1
    return counts, first


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/fuzz.py", __doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--replay", metavar="TARGET:NUMBER", help="one input again, with its traceback")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise ConfigError(f"--minutes {args.minutes} is not allowed; above 0")
    check_names("target", args.only, TARGETS)
    if args.replay is not None:
        name, _, number = args.replay.partition(":")
        check_names("target", [name], TARGETS)
        if not number.isdigit():
            raise ConfigError(f"--replay {args.replay!r} is not allowed; TARGET:NUMBER")
        data = make_input(name, args.seed, int(number))
        print(repr(data[:2000]))
        with tempfile.TemporaryDirectory() as folder:
            print(TARGETS[name].use(Path(folder), data))
        return 0
    names = args.only or list(TARGETS)
    for name in names:  # once each, so that what they import is there
        outcome(name, _seeds(name)[0])
    limit_memory()
    end = time.monotonic() + 60 * args.minutes
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        counts, first = run(names, args.seed, lambda tried: time.monotonic() > end)
    for name in names:
        of = {found: count for (target, found), count in sorted(counts.items()) if target == name}
        print(f"{name}: {sum(of.values())} inputs: " + ", ".join(f"{count} {found}" for found, count in of.items()))
    for failure, number in first.items():
        name, _, wrong = failure.partition(": ")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            data = smallest(name, make_input(name, args.seed, number), wrong) if "more than" not in wrong else b""
        print(f"FAILED {failure}; --seed {args.seed} --replay {name}:{number}; smallest: {data[:300]!r}")
    print(f"{sum(counts.values())} inputs, {len(first)} kinds of failure")
    return 1 if first else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
