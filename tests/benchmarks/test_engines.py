"""Engines that are started and certified: what is asked of them, and what becomes of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import run as engines
from benchmarks.engines import starting
from benchmarks.engines.run import Job, Row, as_expected, cache_beside_plan, controls, scalings, shown
from benchmarks.engines.starting import ENGINES, Engine, Served, Start, Started
from benchmarks.engines.vllm_servers import IMPORTED
from scaled_rope.certificate.hypotheses import _equal, _numbers, hypotheses
from scaled_rope.checkpoint import DEFAULT_MODEL, load_config
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.export import export
from scaled_rope.serving.targets.registry import TARGETS
from tests.helpers.completions_server import serving
from tests.helpers.small_models import checkpoint, tokenizer  # noqa: F401

HEAD_DIM, LENGTH = 64, 2048
EXACT: Row = {"export": {"status": "exact"}}
PARTIAL: Row = {"export": {"status": "partial"}}


@pytest.fixture(scope="module")
def own() -> RopeScaling:
    return RopeScaling.from_config(load_config(str(DEFAULT_MODEL)))


def test_every_method_that_a_server_can_have_is_asked_for(own: RopeScaling) -> None:
    asked = [resolve_scaling(spec, own) for spec in scalings(8, HEAD_DIM)]
    assert {one.method for one in asked} == {name for name, row in METHODS.items() if row.kind == "frequency"}
    assert len(set(asked)) == len(asked)
    assert {engine.target for engine in ENGINES.values()} <= TARGETS.keys()


def test_what_controls_serve_is_a_candidate_under_the_name_that_they_expect(own: RopeScaling) -> None:
    for job in controls(8, 256):
        served = _numbers(resolve_scaling(job.served, own), HEAD_DIM, LENGTH)
        known = hypotheses(resolve_scaling(job.claim, own), HEAD_DIM, LENGTH, load_config(str(DEFAULT_MODEL)).to_dict())
        (same,) = [one for one in known if not one.claimed and _equal(_numbers(one.scaling, HEAD_DIM, LENGTH), served)
                   and one.window is None]  # fmt: skip
        assert any(job.named in name for name in (same.name, *same.also)), (job, same)


@pytest.mark.parametrize(
    ("job", "row", "good"),
    [
        (Job("yarn:8"), {"verdict": "right"}, True),
        (Job("yarn:8"), {"verdict": "unclear"}, False),
        (Job("yarn:8", "default", "unscaled"), {"verdict": "other", "named": ["this model unscaled"]}, True),
        (Job("yarn:8", "default", "unscaled"), {"verdict": "other", "named": ["linear x8"]}, False),
        (Job("yarn:8", "default", "unscaled"), {"verdict": "right", "named": []}, False),
        (Job("longrope:8"), {"export": {"status": "partial"}, "verdict": "right", "named": []}, False),
        (
            Job("longrope:8"),
            {"export": {"status": "partial"}, "verdict": "other", "named": ["with the long list"]},
            True,
        ),
        (Job("dynamic-ntk:8"), {"export": {"status": "refused"}}, True),
        # A reader of the older keys alone: right where they are written, and named as unscaled where they are not.
        (Job("yarn:8"), {"export": {"status": "exact", "older_keys": True}, "verdict": "right"}, True),
        (Job("ntk-by-parts:8"), {"export": {"status": "exact", "older_keys": False}, "verdict": "right"}, False),
        (
            Job("ntk-by-parts:8"),
            {
                "export": {"status": "exact", "older_keys": False},
                "verdict": "other",
                "named": ["this model unscaled, with rope_theta=10000"],
            },
            True,
        ),
    ],
)
def test_what_is_expected(job: Job, row: Row, good: bool) -> None:
    assert as_expected(job, EXACT | row) is good


def test_engines_get_the_words_that_export_prints() -> None:
    report = export("linear:8", load_config(str(DEFAULT_MODEL)), "vllm", LENGTH)
    words = starting.vllm_command("bin/vllm", "DIR", report.flags, 7, "float32")
    assert words[:3] == ["bin/vllm", "serve", "DIR"] and words[3:7] == list(report.flags) and "7" in words
    options = starting.vllm_options(Served("DIR", "linear:8", "vllm", LENGTH, "float32", report))
    # The config that export writes also has the older keys, which this engine does not read.
    given = options["hf_overrides"]
    assert given == {name: report.config[name] for name in given} and given["rope_parameters"]["factor"] == 8.0
    assert options["max_model_len"] == LENGTH

    report = export("yarn:8,attention_factor=1", load_config(str(DEFAULT_MODEL)), "llama.cpp", LENGTH)
    flags, metadata = starting.without_overrides(report.flags)
    assert "--override-kv" in report.flags and "--override-kv" not in flags
    assert metadata == {"llama.rope.scaling.attn_factor": pytest.approx(1 / (1 + 0.1 * math.log(8)))}
    long = export("ntk:8", load_config(str(DEFAULT_MODEL)), "llama.cpp", LENGTH)
    assert starting.without_overrides(long.flags)[1] == {"llama.context_length": LENGTH}
    words = starting.llama_cpp_flags(Path("m.gguf"), flags, 7, "float32")
    assert words[:2] == ["-m", "m.gguf"] and words[words.index("-ctk") + 1] == "f32"


def test_rows_say_no_paths_and_no_lists() -> None:
    numbers = json.dumps({"short_factor": [1.5] * 40})
    words = ["/somewhere/bin/llama-server", "-m", "/tmp/scratch/plain.gguf", "--port", "4711", numbers]
    said = shown(words, "/somewhere/models/tiny", "/tmp/scratch")
    assert said == "llama-server -m plain.gguf --port PORT '{\"short_factor\": [...]}'"
    assert (
        shown(["vllm", "serve", "/somewhere/models/tiny"], "/somewhere/models/tiny", "/x") == "vllm serve models/tiny"
    )


def test_the_size_of_vllms_cache_is_read_from_its_log() -> None:
    assert starting.cache_tokens("INFO [kv] GPU KV cache size: 1,398,016 tokens\n") == 1398016
    assert starting.cache_tokens("INFO ready") is None
    config = load_config(str(DEFAULT_MODEL))  # 6 layers of 2 heads of 64, keys and values of 2 bytes: 3072 a token
    found = cache_beside_plan(starting.VLLM_CACHE_GIB * 2**30 // 3072, config, "yarn:8", LENGTH, "bfloat16")
    assert (found["plan_bytes_per_token"], found["plan_tokens"]) == (3072, found["tokens"])
    assert found["sequences"] == pytest.approx(found["plan_sequences"], rel=1e-5)


def test_releases_that_read_the_older_keys_alone() -> None:
    assert ENGINES["transformers"].older_alone("4.57.6") and not ENGINES["transformers"].older_alone("5.24.0")
    assert not ENGINES["vllm"].older_alone("0.32.0")


def arguments(model: str, output: Path) -> argparse.Namespace:
    return argparse.Namespace(model=model, dtype="float32", html=None, output=str(output))


def rows_of(jobs: list[Job], model: str) -> dict[Job, Row]:
    own = RopeScaling.from_config(load_config(model))
    asked = {"engine": "tests", "version": "1"}
    return {
        job: engines.identity(job, resolve_scaling(job.claim, own), {"model": "m"}, asked, [24, 100]) for job in jobs
    }


def test_a_server_is_certified_and_a_control_is_named(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the tests' own server for an engine; in the end one that serves something else than it was told."""

    @contextmanager
    def held(program: str) -> Iterator[Start]:
        @contextmanager
        def start(served: Served, folder: Path) -> Iterator[Started]:
            with serving(checkpoint, program or served.spec) as server:
                yield Started(("server", "--port", "1"), url=server.url)

        yield start

    engine, output = Engine("vllm", lambda program: "1", held), tmp_path / "rows.jsonl"
    plan = rows_of([Job("yarn:2"), Job("yarn:2", "default", "unscaled"), Job("dynamic-yarn:2")], checkpoint)
    assert engines.run(engine, "", plan, arguments(checkpoint, output), {}) == 0
    right, control, refused = read_rows(output)
    assert (right["verdict"], right["exit_code"], right["export"]["status"]) == ("right", 0, "exact")
    assert right["worst"] < 1e-3 < control["worst"] and right["command"] == "server --port PORT"
    assert (control["verdict"], control["exit_code"], control["expected"]) == ("other", 1, True)
    assert refused["export"]["status"] == "refused" and "verdict" not in refused
    assert engines.run(engine, "linear:2", rows_of([Job("yarn:2")], checkpoint), arguments(checkpoint, output), {}) == 1
    assert read_rows(output)[-1]["named"] == ["linear x2"] and "NOT AS EXPECTED: yarn:2" in capsys.readouterr().out


def test_a_process_that_gives_logits_is_certified(checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    plan = rows_of([Job("yarn:2"), Job("yarn:2", "default", "unscaled")], checkpoint)
    assert engines.run(ENGINES["transformers"], sys.executable, plan, arguments(checkpoint, output), {}) == 0
    right, control = read_rows(output)
    assert right["verdict"] == "right" and control["verdict"] == "other"
    assert right["command"] == "python benchmarks/engines/transformers_worker.py served".replace(
        "python ", f"{Path(sys.executable).name} ", 1
    )


ROTARY = """
import torch
from a_kernel_that_is_not_there.ops import fast_rotation

def get_rope(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling):
    factor = rope_scaling.get("factor", 1.0)
    angles = torch.arange(max_position)[:, None] / factor / base ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    module = torch.nn.Module()
    module.cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1)
    return module
"""


@pytest.mark.slow  # the next one certifies logits
def test_tables_of_an_engine_are_certified_in_a_model_of_transformers(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for SGLang's package that knows linear scaling alone, and imports a kernel that nobody has."""
    package = tmp_path / "sglang" / "srt" / "layers" / "rotary_embedding"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(ROTARY)
    given = starting.environment()
    monkeypatch.setattr(starting, "environment", lambda **more: given | more | {"PYTHONPATH": str(tmp_path)})
    output = tmp_path / "rows.jsonl"
    plan = rows_of([Job("linear:2"), Job("linear:2", "default", "unscaled"), Job("yarn:2")], checkpoint)
    assert engines.run(ENGINES["sglang"], sys.executable, plan, arguments(checkpoint, output), {}) == 1
    right, control, yarn = read_rows(output)
    assert (right["verdict"], control["verdict"], yarn["verdict"]) == ("right", "other", "other")
    assert yarn["named"] == ["linear x2"] and not yarn["expected"]


def as_vllm(checkpoint: str) -> Served:
    report: Any = export("yarn:2", load_config(checkpoint), "vllm")
    return Served(checkpoint, "yarn:2", "vllm", 128, "float32", report)


STAND_IN = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def main():
    print("argv", sys.argv)
    if "TestFails" in sys.argv[2]:
        sys.exit("no such model")
    print("KV cache size: 1,024 tokens", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package by the name of vllm in front of this environment; the program of an engine."""
    for name in IMPORTED:
        file = tmp_path / "vllm" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STAND_IN if name.endswith("main") else "")
    monkeypatch.setattr(starting, "VLLM_ON_CPU", {"PYTHONPATH": str(tmp_path)})
    return str(Path(sys.executable).with_name("vllm"))


def test_servers_are_forks_of_one_process(stand_in: str, checkpoint: str, tmp_path: Path) -> None:
    """Each has its own command line and is gone afterwards; one that ends before it answers is one line."""
    served, found = as_vllm(checkpoint), []
    with starting.vllm_servers(stand_in) as start:
        for number in (1, 2):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            with start(served, folder) as started:
                assert started.url is not None and starting.answers(started.url.removesuffix("/v1") + "/health")
                assert started.cache_tokens == 1024 and str(started.command[1]) == "serve"
                found.append(started)
            assert not starting.answers(started.url.removesuffix("/v1") + "/health")
            assert str(list(started.command[1:])) in (folder / "log").read_text().replace("['vllm', ", "[")
        with pytest.raises(ConfigError, match="vllm did not start: .*no such model"):
            with start(replace(served, model="TestFails"), tmp_path):
                pass
    assert found[0].url != found[1].url


def test_what_cannot_be_started_is_one_line(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        with starting.vllm_servers(str(tmp_path / "vllm")):
            pass
    with pytest.raises(ConfigError, match="false did not start"):
        with starting.serving(["/bin/false"], starting.free_port(), "/health", tmp_path / "log"):
            pass
