"""The console script: bad input, a closed pipe, and the list of methods."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaled_rope import METHODS
from scaled_rope.cli import main
from tests.helpers import ROOT
from tests.helpers.published_configs import LLAMA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{}/none"], "does not exist"),
        (["inspect", "none.json"], "does not exist"),
        (["inspect", "none"], "does not exist, and a hub name is OWNER/NAME"),
        (["inspect", ""], "must be a folder"),
        (["inspect", "{}/empty.json"], "says nothing about a model"),
        (["inspect", "{}/gguf/model.gguf"], "is a GGUF file"),
        (["inspect", "{}/picture.png"], "is not JSON, and not text"),
        (["inspect", "{}/null.json"], "holds null: must be a dictionary"),
        (["inspect", "{}/gguf"], "holds a GGUF file and no config.json"),
        (["inspect", "{}/adapter"], "holds an adapter and no config.json"),
        (["export", "{}/adapter", "--for", "vllm"], "holds an adapter and no config.json"),
        (["inspect", "{}"], "holds no config.json"),
        (["inspect", "{}/broken.json"], "is not JSON"),
        (["inspect", "{}/list.json"], "holds a list: must be a dictionary"),
        (["inspect", "{}/good.json", "--layer-type", "full"], "tells no layer types apart"),
        (["inspect", "{}/good.json", "--scaling", "yarm:8"], "did you mean 'yarn'?"),
        (["inspect", "{}/good.json", "--length", "0"], "--length 0 is not allowed"),
        (["inspect", "{}/good.json", "--plot", "x.pdf"], "must end in .svg or .png"),
        (["inspect", "{}/good.json", "--pot", "x.svg"], "unrecognized arguments: --pot"),
        (["inspect"], "MODEL_OR_CONFIG"),
        (["inspct", "x"], "unknown command 'inspct'; did you mean 'inspect'?"),
        ([], "a command is missing"),
        (["methods", "yarm"], "unknown method 'yarm'; did you mean 'yarn'?"),
        (["methods", "--figures", "{}", "--factor", "0.5"], "factor=0.5"),
        (["methods", "--figures", "{}", "--head-dim", "7"], "head_dim=7"),
    ],
)
def test_bad_input_is_one_line(arguments, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "good.json").write_text(json.dumps(LLAMA))
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "null.json").write_text("null")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("gguf/model.gguf", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err


def test_a_closed_pipe_is_no_error():
    pipe = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from scaled_rope.cli import main; "
    code = pipe + "sys.exit(main(['methods']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (141, "")  # as of a program that SIGPIPE ended


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["dynamic"] == (METHODS[row["name"]].no_dynamic == "")
    natives = {row["name"]: row["native"] for row in rows}
    assert (natives["yarn"], natives["ntk"], natives["cope"]) == ("yarn", "default", None)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: lines.index("")]] == ["method", *METHODS]
    assert max(map(len, lines)) <= 120
    for method in METHODS:
        assert main(["methods", method]) == 0
        assert METHODS[method].source in capsys.readouterr().out
    for row in rows:
        # A source is something that can be looked up.
        assert re.search(r"arXiv \d{4}\.\d{5}|\w\.\w+/\w", row["source"]), row["source"]
        assert row["formula"]
