"""The command against servers of this process, and the page."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from scaled_rope.certificate.observed import Observed
from scaled_rope.certificate.page import page
from scaled_rope.certificate.reference import chosen
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.cli import main
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.served_model import KEY
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.scaling.record import RopeScaling
from tests.helpers.completions_server import NAME, CompletionsServer, serving
from tests.helpers.small_models import TRAINED, checkpoint, tokenizer  # noqa: F401

BASE = RopeScaling("default", original_max_position_embeddings=TRAINED)


@pytest.fixture(scope="module")
def running(checkpoint: str) -> Iterator[CompletionsServer]:
    with serving(checkpoint, "yarn:2") as server:
        server.folder = checkpoint  # type: ignore[attr-defined]
        yield server


@pytest.fixture
def server(running: CompletionsServer, monkeypatch: pytest.MonkeyPatch) -> CompletionsServer:
    """A server of YaRN with factor 2 that does all it should."""
    monkeypatch.delenv(KEY, raising=False)
    running.ways, running.fault, running.key = {"echo 0", "echo 1", "prompt"}, "", None
    running.top, running.as_ids, running.most = None, True, None
    running.listed = [{"id": NAME, "owned_by": "vllm", "max_model_len": 1024, "root": "/m/tiny"}]
    running.asked.clear()
    running.paths.clear()
    serve(running, "yarn:2")
    return running


def serve(server: CompletionsServer, spec: str) -> None:
    apply_scaling(server.model, RopeScaling.from_spec(spec, BASE))


def asked(server: CompletionsServer, *argv: str) -> list[str]:
    return ["certify", server.folder, "--server", server.url, "--scaling", "yarn:2", "--lengths", "24,100", *argv]


def test_text_and_page(server: CompletionsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pages" / "certificate.html"
    assert main(asked(server, "--html", str(path))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("serves yarn x2 as claimed (worst difference ") and "up to 100 tokens" in lines[0]
    assert lines[2].startswith("asked: vllm 0.11.0; by its prompts of one token it computes in float32")
    assert any(line.split()[:2] == ["100", "64"] for line in lines)
    assert any("this model unscaled, or this model unscaled, with rope_theta=10000" in line for line in lines)
    text = path.read_text()
    assert "RIGHT" in text and text.count("<circle") == 23 + 64 and "http" not in text.replace("http-equiv", "")
    sent = [body for body in server.asked if "prompt" in body]
    assert all(isinstance(one, int) for body in sent for one in body["prompt"])


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("default", 1, "serves this model unscaled, not yarn x2"),
        ("yarn:2,attention_factor=1", 1, "serves yarn x2 without the attention factor, not yarn x2"),
        ("linear:2", 1, "serves linear x2, not yarn x2"),
        ("yarn:2.2", 3, "unclear: none of"),
    ],
)
def test_other_scalings(
    spec: str, code: int, words: str, server: CompletionsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(server, spec)
    assert main(asked(server, "--json")) == code
    found = json.loads(capsys.readouterr().out)
    assert words in found["sentence"] and found["exit_code"] == code


@pytest.mark.parametrize("protocol", ["prompt_logprobs", "echo", "next", "sglang", "llama.cpp"])
def test_protocols(protocol: str, server: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.ways = {"prompt_logprobs": {"prompt"}, "echo": {"echo 1"}}.get(protocol, set())
    server.listed[0]["owned_by"] = {"sglang": "sglang", "llama.cpp": "llamacpp"}.get(protocol, "vllm")
    assert main(asked(server, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    positions = {row["length"]: row["positions"] for row in found["lengths"]}
    assert positions == ({24: 3, 100: 3} if protocol in ("next", "llama.cpp") else {24: 23, 100: 64})
    used = set(server.paths) | ({"/generate"} if protocol == "sglang" else set())
    assert "/v1/models" in used
    serve(server, "default")
    assert main(asked(server, "--json")) == 1


@pytest.mark.parametrize("top", [5, 1])
def test_few_log_probabilities(top: int, server: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.top, server.ways = top, set()
    assert main(asked(server)) == 0
    serve(server, "default")
    assert main(asked(server)) == 1


def test_tokens_as_texts(server: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.as_ids, server.ways = False, set()
    assert main(asked(server)) == 0


def test_bfloat16(server: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    whole = server.model
    try:
        server.model = copy.deepcopy(whole).to(torch.bfloat16)
        assert main(asked(server, "--json")) == 0
        assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
        serve(server, "yarn:2,attention_factor=1")
        assert main(asked(server)) == 1
    finally:
        server.model = whole


@pytest.mark.parametrize(
    ("fault", "argv", "message"),
    [
        ("broken", (), "fails at a prompt of 6 tokens (status 500): out of memory with Bearer [key]"),
        ("not JSON", (), "the answer at /v1/completions is not JSON"),
        ("deep", (), "the answer at /v1/completions is not JSON"),
        ("no log-probabilities", (), "gives no log-probabilities of the next token"),
        ("numbers", (), "gives no log-probabilities of the next token"),
        ("another vocabulary", (), "gives token 123456 a probability, and this model has tokens 0 to "),
        ("endless", (), "it names token 999"),
        ("adds a token", (), "read 7 tokens where 6 were sent; it adds or drops some"),
        ("elsewhere", (), "sends us elsewhere (status 302), which is not followed"),
        ("slow", ("--server-timeout", "0.3"), "no answer within 0.3 s (--server-timeout)"),
        ("", ("--name", "other"), "--served-name other: server"),
        ("", ("--lengths", "1024"), "--lengths 1024 is not allowed; vllm 0.11.0 takes 1024 tokens, answer included"),
    ],
)
def test_what_goes_wrong_is_one_line(
    fault: str, argv: tuple[str, ...], message: str, server: CompletionsServer,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(KEY, "a-secret")
    server.fault = fault
    assert main(asked(server, *argv)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err and "a-secret" not in said.err


def test_tokens_that_no_model_has() -> None:
    """Negative ones would be counted from the end."""
    logits = torch.zeros(1, 8)
    for token in (-1, 8):
        seen = Observed((1, 2), (1,), (np.array([3, token]),), (np.zeros(2),))
        with pytest.raises(ConfigError, match=rf"gives token {token} a probability, .* tokens 0 to 7: it is another"):
            chosen(logits, seen)


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["certify", str(DEFAULT_MODEL), "--server", f"http://127.0.0.1:{port}/v1"]) == 2
    assert "no connection: Connection refused" in capsys.readouterr().err


def test_a_prompt_that_llama_cpp_cuts_off(server: CompletionsServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.listed[0]["owned_by"], server.most = "llamacpp", 50
    assert main(asked(server)) == 2
    assert "cut off a prompt of 100 tokens, which is beyond its context" in capsys.readouterr().err


def test_a_prompt_that_fills_llama_cpps_context(server: CompletionsServer) -> None:
    """It was read as a whole; that the answer was cut off is no matter."""
    server.listed[0]["owned_by"], server.fault = "llamacpp", "the context ends"
    assert main(asked(server)) == 0


def test_lengths_follow_the_server_and_the_target(
    server: CompletionsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listed[0]["max_model_len"] = 51
    argv = [argument for argument in asked(server, "--json") if argument not in ("--lengths", "24,100")]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in found["lengths"]] == [12, 25, 32, 50]
    assert found["notes"][0] == "prompts end at 50 tokens: the server takes 51, and the scaling is for 128"
    assert "no prompt is longer than L, 64 tokens" in found["notes"][1]


def test_a_server_that_was_started_for_the_target(
    server: CompletionsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest prompt leaves room for the answer; it is not left out."""
    server.listed[0]["max_model_len"] = 128
    argv = [argument for argument in asked(server, "--json") if argument not in ("--lengths", "24,100")]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["length"] for row in found["lengths"]] == [32, 64, 96, 127]


def test_llama_cpp_says_its_limit_in_another_place(
    server: CompletionsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listed = [{"id": NAME, "owned_by": "llamacpp", "meta": {"n_ctx": 64, "n_ctx_train": 64}}]
    assert main(asked(server)) == 2
    assert "--lengths 100 is not allowed; llamacpp takes 64 tokens" in capsys.readouterr().err


def test_the_page_escapes_names() -> None:
    from scaled_rope.certificate.certify import CandidateRow, Certificate, LengthRow

    row = LengthRow(8, 1, 1e-3, 1e-4, 2e-4, "", float("nan"))
    one = CandidateRow("<b>", (), 1e-4, 2e-4, 0.0, (8,), "best")
    text = page(Certificate("right", "serves <b> as claimed", "<b>", "<i>", ("<b>",), "float32", 0.0, (row,), (one,),
                            ((8, 7, 1e-4, float("nan")),)), "m/<u>")  # fmt: skip
    assert "<b> as" not in text and "<i>" not in text and "<u>" not in text and "&lt;b&gt;" in text
