"""The GPU benchmark without a GPU: what it refuses, that it finds wrong kernels, its plumbing."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention_methods, gpu
from benchmarks.gpu_parts import (
    attention,
    decode,
    dry,
    models,
    prefill,
    rotary,
    rotary_backward,
    rotary_cases,
    timing,
    train,
)
from benchmarks.gpu_parts import rows as rows_module
from benchmarks.gpu_parts.rows import KNOWN, NO_TIME, TOLERANCE, WRONG, complete, key, known_rows, show, source_hash
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.results import read_rows
from tests.helpers import ROOT, bare_container

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
TINY = (rotary_cases.Shape("small", 3, 1, 16, 8), rotary_cases.Shape("packed", 2, 2, 8, 8, documents=True))


@needs_no_gpu
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "no GPU" in done.stderr


@needs_no_gpu
@needs_triton
def test_interpret_checks_every_variant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rotary_cases, "SHAPES", TINY)
    assert gpu.main(["--interpret"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 3 * 2 + len(decode.DECODE_SHAPES) and all(line.startswith("ok ") for line in lines)


def test_a_wrong_variant_is_found() -> None:
    """Wrong angles, a factor, a missing rotation, an element that is not written: all far over the tolerance."""
    from scaled_rope.kernels import apply_rotary

    def unwritten(q: Tensor, k: Tensor, x: Any) -> Any:
        out = torch.full_like(q, math.nan)
        out[..., 1:, :] = apply_rotary(q, k, x.cos, x.sin, backend="torch")[0][..., 1:, :]
        return out, k

    wrong = {
        "angles": lambda q, k, x: apply_rotary(q, k, x.sin, x.cos, backend="torch"),
        "factor": lambda q, k, x: apply_rotary(q, k, x.cos * 1.02, x.sin * 1.02, backend="torch"),
        "nothing": lambda q, k, x: (q.clone(), k.clone()),
        "unwritten": unwritten,
    }
    right = rotary.forward_error(rotary_cases.our_variants("torch")["ours, tables"], *_case())
    assert right < TOLERANCE
    for name, variant in wrong.items():
        error = rotary.forward_error(variant, *_case())
        assert not error < TOLERANCE, name


def _case() -> tuple[Any, ...]:
    return TINY[0], 64, torch.bfloat16, torch.device("cpu")


def test_what_is_not_timed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free", lambda: None)
    clock = timing.Clock(600)

    def raising(error: Exception) -> Any:
        def run() -> Any:
            raise error

        return run

    timed = {"error": 0.001, "seconds": 1.0}
    assert complete({}, clock, 20, lambda: {"seconds": 1.0}, lambda: 0.001) == timed
    unused = raising(AssertionError("must not be called"))
    assert complete({}, timing.Clock(0), 20, unused, unused) == {"skipped": "no time left"}
    for error in (0.1, math.nan):
        assert complete({}, clock, 20, unused, lambda error=error: error)["skipped"] == "wrong"
    full = complete({}, clock, 20, raising(torch.OutOfMemoryError()), lambda: 0.001, refusals=(RuntimeError,))
    assert full == {"error": 0.001, "skipped": "out of memory"}
    refused = raising(RuntimeError("no kernel\nfor this shape"))
    assert complete({}, clock, 20, refused, refusals=(RuntimeError,)) == {"skipped": "no kernel"}
    with pytest.raises(RuntimeError, match="no kernel"):
        complete({}, clock, 20, refused)


def test_document_lengths_are_uneven_and_fill_the_row() -> None:
    for tokens in (5, 41, 4096, 131072):
        bounds = rotary_cases.document_positions(tokens)
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        assert sum(lengths) == tokens and min(lengths) == 1 and max(lengths) < max(tokens / 3, 2)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the parts of the benchmark on the CPU, with small shapes and without compiling."""
    dry.stand_in(monkeypatch.setattr)
    monkeypatch.setattr(timing, "copy_seconds", timing.copy_seconds.__wrapped__)  # sizes are other ones in each test
    monkeypatch.setattr(rotary_cases, "SHAPES", TINY)
    monkeypatch.setattr(rotary_cases, "TOKENS", (16,))


@needs_no_gpu
@needs_triton
@pytest.mark.parametrize("part", [rotary, rotary_backward])
def test_rotary_parts_on_the_cpu(on_cpu: None, part: Any) -> None:
    rows = list(part.measure(timing.Clock(600)))
    names = {row["variant"] for row in rows}
    assert {"ours, tables", "ours, no tables", "transformers, eager", "transformers, compiled"} <= names
    for row in rows:
        assert row["error"] < TOLERANCE and "skipped" not in row, show(row)
        wide = row["shape"] == "small"  # 16 wide, of which 8 are rotated; the other one is 8 wide
        moved = 2 * 2 * 16 * 4 * (16 if wide and row["variant"] != "ours, in place" else 8)
        # Tables in float32 of half the width, or wide ones in bf16.
        tables = {"ours, no tables": 0, "ours, tables": 512, "ours, in place": 512}.get(row["variant"], 512)
        assert row["bytes"] == moved + tables, show(row)
        assert row["share_of_copy"] > 0 and row["host_seconds"] > 0 and row["seconds_without_graph"] > 0
        assert row["seconds_quartiles"][0] <= row["seconds"] <= row["seconds_quartiles"][1]
        json.dumps(row, allow_nan=False)
    assert all(row["skipped"] == "no time left" for row in part.measure(timing.Clock(0)))


@needs_no_gpu
@needs_triton
def test_decode_part_on_the_cpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "DECODED", (70,))
    monkeypatch.setattr(decode, "DECODE_SHAPES", ((1, 2, 1, 16),))
    rows = list(decode.measure(timing.Clock(600), torch.float32))  # bf16 is beyond the interpreter
    by_name = {row["variant"]: row for row in rows}
    assert {"ours, rotates while it reads", "rotated in memory, then sdpa", "sdpa, no rotation"} <= set(by_name)
    for name, row in by_name.items():
        if name in [f"sdpa {backend}, no rotation" for backend in decode.NAMED]:  # not all of which a CPU has
            continue
        assert "skipped" not in row and row["bytes"] == 2 * 70 * 16 * 4 and row["share_of_copy"] > 0
        # Angles of up to 70 are rounded to 2^-24 of themselves in the reference.
        assert row["error"] < 2e-6 if "no rotation" not in name else "error" not in row
        assert show(row) and json.dumps(row, allow_nan=False)
    # Without rotation the result is another one, so it is not compared.
    plain = decode.decode_variants()["sdpa, no rotation"]
    assert decode.decode_error(plain, (1, 2, 1, 16), 70, torch.float32, torch.device("cpu")) > 0.1


@needs_no_gpu
def test_attention_part_on_the_cpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All methods past their windows, both ways; what is wrong is not timed."""
    monkeypatch.setattr(attention_methods, "ORIGINAL", 32)
    specs = ("rerope,window=16", "leaky-rerope,window=16,k=8", "self-extend,group=8,window=8", "dual-chunk,chunk=24")
    monkeypatch.setattr(attention_methods, "SPECS", specs)
    monkeypatch.setattr(attention, "ATTENDED", (100,))
    monkeypatch.setattr(attention, "ATTENTION_SHAPES", ((4, 2, 16),))
    rows = list(attention.measure(timing.Clock(600)))
    names = [f"ours, {spec}, {way}" for spec in specs for way in ("composed", "by blocks")]
    backends = [f"sdpa {name}, no rotation" for name in decode.NAMED]
    assert [row["variant"] for row in rows] == ["sdpa, no rotation", *backends, *names]
    for row in rows:
        if row["variant"] in backends[1:]:  # which a CPU has not
            assert "skipped" in row
            continue
        assert "skipped" not in row, show(row)
        assert row["flops"] == 4 * 2 * 2 * 16 * 100**2 / 2 and row["tokens_per_second"] > 0 and row["peak_bytes"] > 0
        assert 0 < row["error"] < TOLERANCE if "ours" in row["variant"] else "error" not in row
        assert show(row) and json.dumps(row, allow_nan=False)
    found = attention.attention_variants(16)
    (rerope, _), (_, leaky) = found[names[0]], found[names[2]]
    assert leaky is not None
    assert attention.attention_error(rerope, leaky, (4, 2, 16), 100, torch.bfloat16) > 5 * TOLERANCE, "another method"
    assert all(row["skipped"] == NO_TIME for row in attention.measure(timing.Clock(0)))


SMALL = {"small": dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)}
SMALL["small"] |= dict(num_attention_heads=2, num_key_value_heads=1)


@needs_no_gpu
def test_prefill_part_on_the_cpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", SMALL)
    monkeypatch.setattr(prefill, "LENGTHS", (24, 32, 40))
    monkeypatch.setattr(models, "CHECKED", 16)
    monkeypatch.setattr(prefill, "KERNELS", ("none", "torch"))
    monkeypatch.setattr(prefill, "EAGER_LIMIT", 24)
    rows = list(prefill.measure(timing.Clock(600)))
    good = [row for row in rows if "skipped" not in row]
    for row in good:
        assert row["error"] < models.NOISE * row["noise"] and row["mfu"] > 0
        json.dumps(row, allow_nan=False)
    kinds = {(row["attention"], row["kernel"], row["tokens"]) for row in good}
    assert {("eager", "none", 24), ("eager", "torch", 24), ("sdpa_blocked", "torch", 32)} <= kinds
    assert not any(row["attention"] == "eager" and row["tokens"] > 24 for row in rows)
    assert len([row for row in rows if row["tokens"] == 40]) == 2  # the two fastest
    assert all("kernel" in str(row["skipped"]) for row in rows if "skipped" in row)  # cuDNN


@needs_no_gpu
def test_training_part_on_the_cpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every variant at two lengths; what does not fit is a row; what is wrong is not timed; and it goes on."""
    monkeypatch.setattr(models, "MODELS", SMALL)
    monkeypatch.setattr(train, "TRAINED", (24, 40))
    monkeypatch.setattr(models, "CHECKED", 16)
    assert all(row["skipped"] == NO_TIME for row in train.measure(timing.Clock(0)))
    original = timing.time_model

    def full(run: Any) -> Any:
        original(run)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(timing, "time_model", full)
        patch.setattr(train, "OURS", {"ours": {}})
        rows = list(train.measure(timing.Clock(600)))
        kinds = [(row["tokens"], row["variant"], row.get("skipped")) for row in rows]
        expected = [("ours", "out of memory"), (train.STOCK, None)]
        assert kinds == [(tokens, *one) for tokens in train.TRAINED for one in expected]
    done = {key(row) for row in rows}
    rest = [row for row in train.measure(timing.Clock(600, done)) if row.get("skipped") != KNOWN]
    assert [row["variant"] for row in rest] == [name for name in train.OURS if name != "ours"] * len(train.TRAINED)
    for row in rest + rows[1::2]:
        assert "skipped" not in row, show(row)
        assert (
            row["mfu"] > 0 and row["seconds"] > 0 and row["peak_bytes"] == 2**20 and row["loss"] in ("chunked", "whole")
        )
        assert row["variant"] in ("ours, lora", train.STOCK) or row["error"] < models.NOISE * row["noise"]
        assert show(row) and json.dumps(row, allow_nan=False)
    stock = train.reference_gradient("small", torch.arange(16)[None])
    module, _, _ = train.training_module(train.training_recipe("small", 24, scaling="yarn:4"))
    found = train.first_gradient(train.summed_loss(module, torch.arange(16)[None]), module.model)
    assert (found - stock[0]).norm() > models.NOISE * stock[1] * stock[0].norm(), "another scaling is not noise"


def test_a_model_for_training_is_built_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its patch, which looks at numbers on the CPU, is made under that default device."""
    monkeypatch.setattr(timing, "DEVICE", "meta")
    monkeypatch.setattr(models, "MODELS", SMALL)
    module, _, _ = train.training_module(train.training_recipe("small", 24), "none")
    scaling = patched_scaling(module.model)
    assert scaling is not None and (scaling.method, scaling.factor) == ("yarn", 32)
    assert all(weight.is_meta for weight in module.parameters())


def test_rows_of_other_code_are_measured_again() -> None:
    about = {"source": "a", "device": "b", "driver": "c"}
    row = {"metric": "decode", "shape": "s", "tokens": 8, "variant": "ours"}
    for other in ({"source": "other"}, {"device": "other"}, {"skipped": NO_TIME}, {"skipped": WRONG}):
        assert known_rows([row | about | other], about) == set()
    for same in ({"seconds": 1.0}, {"skipped": "out of memory"}, {"skipped": WRONG, "variant": "liger"}):
        done = known_rows([row | about | same], about)
        case = row | {"variant": same.get("variant", "ours")}
        assert complete(dict(case), timing.Clock(600, done), 0, lambda: {}) == case | {"skipped": KNOWN}
        assert complete(case | {"tokens": 9}, timing.Clock(600, done), 0, lambda: {}) == case | {"tokens": 9}
    assert known_rows([row | about | {"skipped": WRONG}], about, failed=True) == {key(row)}


def test_the_source_is_what_a_row_was_measured_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_hash()
    for folder in ("scaled_rope", "benchmarks/gpu_parts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rows_module, "ROOT", tmp_path)
    assert source_hash() == before
    with (tmp_path / "scaled_rope" / "kernels" / "rotary_triton.py").open("a") as file:
        file.write("# mended\n")
    assert source_hash() != before


def test_a_gpu_that_is_lost_costs_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An illegal access in one case, and then one outside of all cases, each ending all use of the GPU by a process."""
    names = {"fine": None, "breaks": None, "later": None}
    faults = {"breaks": torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")}

    def part(clock: timing.Clock) -> Any:
        for name in names:

            def time_it(name: str = name) -> dict[str, Any]:
                if name in faults:
                    raise faults[name]
                return {"seconds": 1.0, "bytes_per_second": 1e9}

            yield complete({"metric": "m", "tokens": 1, "variant": f"ours, {name}"}, clock, 0, time_it)
        if "outside" in faults:
            raise faults["outside"]

    def last(clock: timing.Clock) -> Any:
        yield complete({"metric": "n", "tokens": 1, "variant": "ours"}, clock, 0, lambda: {"seconds": 1.0, "mfu": None})

    def lost() -> None:
        if faults:
            raise faults["breaks"]

    parts = [("one", lambda: 600.0, part), ("two", lambda: 600.0, last)]
    monkeypatch.setattr(gpu, "parts_of", lambda args: parts)
    monkeypatch.setattr(dry, "stand_in", lambda: None)
    monkeypatch.setattr(dry, "shrink", lambda: None)
    monkeypatch.setattr(rows_module, "show", lambda row: row["variant"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: lost())
    monkeypatch.setattr("os.closerange", lambda *_: None)
    begun: list[list[str]] = []

    def execute(program: str, words: list[str]) -> None:
        begun.append(words[2:])
        raise SystemExit

    monkeypatch.setattr("os.execv", execute)
    output = tmp_path / "rows.jsonl"
    words = ["--dry", "--plan", "first", "--output", str(output), "--seconds", "10000"]
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert [row["variant"] for row in read_rows(output)] == ["ours, fine", "ours, breaks"]
    assert "illegal memory access" in read_rows(output)[-1]["skipped"]
    faults["outside"] = faults["breaks"]
    with pytest.raises(SystemExit):
        gpu.main(begun[0])
    assert gpu.main(begun[1]) == 1
    assert [row["metric"] + row["variant"] for row in read_rows(output)[2:]] == ["mours, later", "nours"]
    assert begun[1][begun[1].index("--without") + 1] == "one" and float(begun[1][begun[1].index("--seconds") + 1]) > 5e3
    del faults["breaks"], faults["outside"]
    assert gpu.main(words) == 0  # a run of its own tries again what failed
    assert [row["variant"] for row in read_rows(output)[4:]] == ["ours, breaks"]


@pytest.mark.parametrize("refusals", [(), (Exception,)])
def test_a_case_that_memory_is_not_enough_for_is_skipped(refusals: tuple[type[Exception], ...]) -> None:
    """Also where it is a library's own memory, of which PyTorch makes an error of the common kind."""
    row = {"metric": "decode", "shape": "s", "tokens": 8, "variant": "ours"}

    def fail(error: Exception) -> Any:
        raise error

    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (cublas, torch.OutOfMemoryError("CUDA out of memory")):
        found = complete(dict(row), timing.Clock(600), 0, lambda error=error: fail(error), refusals=refusals)
        assert found["skipped"] == "out of memory"
    if not refusals:
        with pytest.raises(RuntimeError, match="of another kind"):
            complete(dict(row), timing.Clock(600), 0, lambda: fail(RuntimeError("of another kind")))


def test_a_part_expects_the_next_case_to_take_as_long_as_the_last() -> None:
    clock = timing.Clock(600)
    assert clock.needed("a", 5) == 5
    clock.took("a", 10)
    assert clock.needed("a", 5) == 15 and clock.needed("b", 5) == 5
    clock.forget()
    assert clock.needed("a", 5) == 5


@pytest.mark.slow  # the dry run of the training study imports most of it, in the same way
@needs_triton
def test_all_parts_can_be_imported_where_little_is_installed(tmp_path: Path) -> None:
    code = "from benchmarks import gpu, gpu_report; from benchmarks.gpu_parts import plan; print(plan.PLANS['first']())"
    environment = os.environ | bare_container.variables(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "rotary" in done.stdout, done.stderr


@pytest.mark.slow
@needs_no_gpu
@needs_triton
def test_dry_run_of_the_first_script(tmp_path: Path) -> None:
    """Every part, in one process that has no GPU; a second run measures nothing again."""
    command = ["bash", "benchmarks/gpu_first.sh", str(tmp_path), "--dry"]
    environment = os.environ | {"PYTHON": sys.executable, "SECONDS_AT_MOST": "3000", "COMMIT": "abc"}
    environment |= bare_container.variables(tmp_path / "site")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["device"] for row in rows} == {"dry run on a CPU"}
    metrics = {"correctness", "copy", "matmul", "rotary forward", "rotary backward", "decode", "attention", "prefill"}
    assert {row["metric"] for row in rows} == metrics | {"training step", "sweep"}
    for row in rows:
        ours = str(row.get("variant", "ours")).startswith("ours") and row.get("kernel") != "none"
        assert not ours or "skipped" not in row or row["metric"] == "prefill", row
    assert len(list(tmp_path.iterdir())) <= 8 and "Ahead: " in (tmp_path / "gpu_report.md").read_text()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == len(rows)


def test_operations_of_a_known_model() -> None:
    """Llama-2-7B at 128k, by hand: 1.73 PFLOP in 6.5 G weights, 4.50 in attention."""
    from transformers import LlamaConfig

    tokens = 131072
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert models.flops(LlamaConfig(), tokens) == 2 * weights * tokens + 32 * 2 * 4096 * tokens**2
    assert abs(models.flops(LlamaConfig(), tokens) / 1e15 - 6.2) < 0.05
