"""Models behind a server: the numbers of a model that is read here, and a clear line for what a server does not do."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eval.passkey as passkey
import eval.passkey_hard as passkey_hard
import eval.perplexity as perplexity
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import jobs
from scaled_rope.evaluation.ranks import Ranks
from scaled_rope.evaluation.served_model import KEY, Address, ServedModel
from scaled_rope.report.tables import load_results
from scaled_rope.results import Row, read_rows
from tests.helpers.completions_server import NAME, CompletionsServer, serving
from tests.helpers.evaluators import evaluate

MODEL = str(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def running() -> Iterator[CompletionsServer]:
    with serving(MODEL) as server:
        yield server


@pytest.fixture
def server(running: CompletionsServer, monkeypatch: pytest.MonkeyPatch) -> CompletionsServer:
    """A server that does all it should."""
    monkeypatch.delenv(KEY, raising=False)
    running.ways, running.fault, running.key = {"echo 0", "echo 1", "prompt"}, "", None
    running.listed = [{"id": NAME, "owned_by": "vllm", "max_model_len": 1024, "root": "/m/tiny"}]
    running.asked.clear()
    running.paths.clear()
    return running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "text.jsonl"
    words = "the house by the river was dark and the stone was cold . ".split()
    path.write_text("".join(json.dumps({"text": " ".join(words[index:] * 30)}) + "\n" for index in range(3)))
    return str(path)


def asked(main: Any, server: CompletionsServer, output: Path, *argv: str, code: int = 0) -> list[Row]:
    """Run an evaluator on a server; return its rows."""
    words = ["-m", MODEL, "--server", server.url, *argv, "--hide-progress", "--output", str(output)]
    assert run_cli(lambda: main(words)) == code
    return read_rows(output) if output.exists() else []


@pytest.mark.parametrize("way", ["echo 0", "echo 1", "prompt"])
def test_perplexities_are_those_of_the_model(way: str, server: CompletionsServer, text: str, tmp_path: Path) -> None:
    server.ways = {way}
    argv = ("-d", text, "--lengths", "64,300", "--control", "--batch-size", "3")
    local = evaluate(perplexity.main, tmp_path / "local", "-m", MODEL, *argv)
    rows = asked(perplexity.main, server, tmp_path / "served", *argv)
    assert [row["protocol"] for row in rows] == [row["protocol"] for row in local] and len(rows) == 3
    for one, other in zip(rows, local, strict=True):
        # Float32 losses, summed in float64: rounding of 6e-8 per token, and other matrix shapes in the model's pass.
        for name in ("perplexity", "perplexity_bucket"):
            assert one[name] == pytest.approx(other[name], rel=2e-6)
        assert one["bucket_nats"] == [pytest.approx(of, rel=2e-6) for of in other["bucket_nats"]]
        assert one["targets"] == other["targets"] and one["data"] == other["data"]
    assert rows[0]["server"] == {
        "url": server.url, "name": NAME, "software": "vllm", "version": "0.11.0", "root": "tiny", "max_length": 1024,
    }  # fmt: skip
    assert rows[0]["provenance"]["device"] == "server" and rows[0]["peak_memory"] is None
    assert rows[0]["dtype"] == "served" and rows[0]["label"] == "unscaled, served by vllm 0.11.0"
    for body in server.asked:
        assert (
            body["model"] == NAME and body["temperature"] == 0 and all(isinstance(one, int) for one in body["prompt"])
        )
    assert set(server.paths) == {"/v1/models", "/version"}


def test_sliding_windows_and_losses_on_disk(server: CompletionsServer, text: str, tmp_path: Path) -> None:
    argv = ("-d", text, "--samples", "1", "--lengths", "100", "--sliding-window", "40", "--save-nll")
    (local,) = evaluate(perplexity.main, tmp_path / "local", "-m", MODEL, *argv, str(tmp_path / "nll"))
    (row,) = asked(perplexity.main, server, tmp_path / "served", *argv, str(tmp_path / "nll"))
    assert row["perplexity"] == pytest.approx(local["perplexity"], rel=2e-6) and row["windows"] == local["windows"]
    assert len(list((tmp_path / "nll").iterdir())) == 2  # those of the server by themselves


def test_served_rows_and_local_ones_do_not_mix(server: CompletionsServer, text: str, tmp_path: Path) -> None:
    output = tmp_path / "rows"
    argv = ("-d", text, "--samples", "1", "--lengths", "64")
    evaluate(perplexity.main, output, "-m", MODEL, *argv)
    assert len(asked(perplexity.main, server, output, *argv)) == 2 and server.asked
    server.asked.clear()
    assert len(asked(perplexity.main, server, output, *argv)) == 2 and not server.asked  # it is there
    results = load_results([str(output)])
    assert [series.label for series in results.series] == ["unscaled", "unscaled, served by vllm 0.11.0"]
    server.listed[0]["max_model_len"] = 512  # another server, or the same one started otherwise
    assert len(asked(perplexity.main, server, output, *argv)) == 3


def test_passkeys(server: CompletionsServer, tmp_path: Path) -> None:
    argv = ("--lengths", "150,300", "--iterations", "2", "--wording", "passkey,needle", "--seeds", "1,42")
    local = evaluate(passkey.main, tmp_path / "local", "-m", MODEL, *argv)
    server.ways = set()  # as in llama.cpp's server
    rows = asked(passkey.main, server, tmp_path / "served", *argv)
    found = [[prompt["right"] for prompt in row["prompts"]] for row in rows if row["metric"] == "passkey"]
    assert found == [[prompt["right"] for prompt in row["prompts"]] for row in local if row["metric"] == "passkey"]
    assert any(map(any, found)) and not all(map(all, found))
    assert rows[0]["protocol"]["name"] == "greedy" and rows[0]["server"]["name"] == NAME
    assert rows[-1]["metric"] == "passkey_context"


def test_numbered_keys(server: CompletionsServer, text: str, tmp_path: Path) -> None:
    argv = ("-d", text, "--lengths", "150,250", "--iterations", "3", "--num-keys", "1", "--restrict-tokens", "false")
    local = evaluate(passkey_hard.main, tmp_path / "local", "-m", MODEL, *argv)
    rows = asked(passkey_hard.main, server, tmp_path / "served", *argv)
    for one, other in zip(rows[:2], local[:2], strict=True):
        assert [prompt["right"] for prompt in one["prompts"]] == [prompt["right"] for prompt in other["prompts"]]
    assert any(prompt["right"] for row in rows[:2] for prompt in row["prompts"])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("not JSON", "the answer at /v1/completions is not JSON"),
        ("broken", "fails at a prompt of 4 tokens (status 500): out of memory with None"),
        ("no choice", "an answer without a choice"),
        ("adds a token", "read 5 tokens where 4 were sent"),
        ("drops a value", "gives no log-probabilities of prompts, which perplexity needs: 3 log-probabilities for 4"),
        ("another token", "token 3 came back where"),
        ("no number", "token 2 of 4 has the log-probability None"),
        ("minus infinity", "token 2 of 4 has the log-probability -9999.0"),
        ("above zero", "token 2 of 4 has the log-probability 0.5"),
        ("echo without values", "the answer has none"),
        ("too long", "refuses a prompt of 300 tokens (status 400): maximum context length is 100 tokens"),
        ("slow", "no answer within 0.5 s (--server-timeout)"),
        ("elsewhere", "sends us elsewhere (status 302), which is not followed"),
    ],
)
def test_a_server_that_misbehaves(
    fault: str, said: str, server: CompletionsServer, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault, server.ways = fault, {"echo 0", "echo 1"}
    argv = ("-d", text, "--samples", "1", "--lengths", "300", "--server-timeout", "0.5" if fault == "slow" else "60")
    assert asked(perplexity.main, server, tmp_path / "rows", *argv, code=2) == []
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: server http://127.0.0.1:") and said in line


def test_a_server_without_log_probabilities(
    server: CompletionsServer, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.ways = set()
    assert asked(perplexity.main, server, tmp_path / "rows", "-d", text, "--lengths", "64", code=2) == []
    said = capsys.readouterr().err
    assert "gives no log-probabilities of prompts" in said and "Only no echo is supported" in said


def test_a_prompt_beyond_the_server(
    server: CompletionsServer, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listed[0]["max_model_len"] = 100
    argv = ("-d", text, "--samples", "1", "--lengths")
    assert len(asked(perplexity.main, server, tmp_path / "rows", *argv, "100")) == 1  # as long as it takes
    asked(perplexity.main, server, tmp_path / "rows", *argv, "101", code=2)
    assert "a prompt of 101 tokens is beyond its 100; --lengths" in capsys.readouterr().err
    rows = asked(passkey.main, server, tmp_path / "keys", "--lengths", "95,120", "--iterations", "1", code=2)
    assert [row["length"] for row in rows] == [95]
    assert "is beyond its 100; --lengths" in capsys.readouterr().err


def test_models_of_a_server(server: CompletionsServer) -> None:
    server.listed.append({"id": "other"})
    assert ServedModel.connect(server.url, NAME).max_length == 1024
    other = ServedModel.connect(server.url, "other")
    assert (other.software, other.version, other.max_length, other.title) == (None, None, None, "a server")
    assert other.fingerprint() != ServedModel.connect(server.url, NAME).fingerprint()
    with pytest.raises(ConfigError, match="has several models; --served-name must be one of other, tiny"):
        ServedModel.connect(server.url)
    with pytest.raises(ConfigError, match="--served-name nobody: server .* has only other, tiny"):
        ServedModel.connect(server.url, "nobody")
    server.listed = []
    with pytest.raises(ConfigError, match="lists no models at /v1/models"):
        ServedModel.connect(server.url)
    with pytest.raises(ConfigError, match="has no /v2/models .status 404.: Not Found"):
        ServedModel.connect(server.url.replace("v1", "v2"))


def test_the_key_is_sent_and_not_shown(
    server: CompletionsServer, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server.key = "secret-123"
    argv = ("-d", text, "--samples", "1", "--lengths", "64")
    asked(perplexity.main, server, tmp_path / "rows", *argv, code=2)
    assert f"the key in {KEY} is needed, and is not set (status 401)" in capsys.readouterr().err
    monkeypatch.setenv(KEY, "secret-999")
    asked(perplexity.main, server, tmp_path / "rows", *argv, code=2)
    said = capsys.readouterr().err
    assert f"the key in {KEY} is refused (status 401)" in said and "secret" not in said
    monkeypatch.setenv(KEY, "secret-123")
    assert len(asked(perplexity.main, server, tmp_path / "rows", *argv)) == 1
    assert "secret" not in (tmp_path / "rows").read_text() + "".join(capsys.readouterr())
    server.fault = "broken"  # repeats what it was sent
    asked(perplexity.main, server, tmp_path / "other", *argv, code=2)
    said = capsys.readouterr().err
    assert "out of memory with Bearer [key]" in said and "secret" not in said
    monkeypatch.setenv(KEY, "secret\nsecret")
    asked(perplexity.main, server, tmp_path / "other", *argv, code=2)
    said = capsys.readouterr().err
    assert f"{KEY} cannot be sent" in said and "secret" not in said


def test_nobody_listens(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    argv = ["-m", MODEL, "-d", text, "--lengths", "64", "--output", str(tmp_path / "rows"), "--server", url]
    assert run_cli(lambda: perplexity.main(argv)) == 2
    assert capsys.readouterr().err.strip() == f"error: server {url}: no connection: Connection refused"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "--server localhost:8000 is not allowed"),
        ("ftp://host/v1", "--server ftp://host/v1 is not allowed"),
        ("http:///v1", "--server http:///v1 is not allowed"),
        ("http://host:port/v1", "--server is not an address"),
        ("http://me:secret@host/v1", f"an address alone, .*{KEY}"),
        ("http://host/v1?key=secret", f"an address alone, .*{KEY}"),
    ],
)
def test_addresses(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Address.parse(url)
    assert "secret" not in str(caught.value)
    assert str(Address.parse("https://[::1]:8000/v1/")) == "https://[::1]:8000/v1"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--scaling", "yarn:2"), "--scaling has no effect with --server"),
        (("--dtype", "bfloat16"), "--dtype has no effect with --server"),
        (("--device", "cpu"), "--device has no effect with --server"),
        (("--prefill-chunk", "8"), "--prefill-chunk has no effect with --server"),
        (("-m", MODEL), "takes one -m"),
        (("--server-timeout", "0"), r"--server-timeout 0 is not allowed; above 0, at most 1e\+06 seconds"),
    ],
)
def test_flags_that_are_the_server_s(argv: tuple[str, ...], said: str, text: str) -> None:
    parser = perplexity.build_parser()
    words = ["-m", MODEL, "-d", text, "--lengths", "64", "--server", "http://host/v1", *argv]
    with pytest.raises(ConfigError, match=said):
        perplexity.check_arguments(parser.parse_args(words))


def test_flags_without_a_server(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = perplexity.build_parser()
    with pytest.raises(ConfigError, match="--served-name x goes with --server"):
        perplexity.check_arguments(parser.parse_args(["-d", text, "--served-name", "x", "--lengths", "64"]))
    hard = passkey_hard.build_parser()
    with pytest.raises(ConfigError, match="--restrict-tokens false with --server"):
        passkey_hard.check_arguments(hard.parse_args(["-m", MODEL, "-d", text, "--server", "http://host/v1"]))
    monkeypatch.setattr(jobs, "current", lambda: Ranks(0, 2))
    words = ["-m", MODEL, "-d", text, "--lengths", "64", "--server", "http://host/v1"]
    with pytest.raises(ConfigError, match="is for one process, not 2"):
        jobs.model_jobs(parser.parse_args(words))
