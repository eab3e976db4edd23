"""eval/prompt_loop.py in a pipe and at a keyboard."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import eval.prompt_loop as prompt_loop
from scaled_rope import patch_model
from scaled_rope.checkpoint import encode
from scaled_rope.command_line import run_cli
from scaled_rope.evaluation import streamed_answers
from tests.helpers import ROOT
from tests.helpers.retrieval import (
    STORY,
    checkpoint,  # noqa: F401
    generated,
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
)


class Keyboard(io.StringIO):
    """Standard input that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def answered(model: LlamaForCausalLM, tokenizer: Any, prompt: str, steps: int, cached: bool) -> str:
    made = generated(model, [0, *encode(tokenizer, prompt)], None, steps, cached)
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_prompt_loop_in_a_pipe(checkpoint: str, tokenizer: PreTrainedTokenizerFast) -> None:
    command = [sys.executable, str(ROOT / "eval" / "prompt_loop.py"), "-m", checkpoint, "--yarn", "4"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "5", "--device", "cpu"],
        input="The sea\n\nThe grass is green\n",
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0 and done.stderr == ""
    patch_model(model := LlamaForCausalLM.from_pretrained(checkpoint).eval(), "yarn:4")
    expected = [answered(model, tokenizer, prompt, 5, True) for prompt in ("The sea", "The grass is green")]
    assert done.stdout == "".join(f"{one}\n" for one in expected)


def loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: io.StringIO, *argv: str
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert prompt_loop.main([*argv, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_dynamic_prompts_are_answered_through_a_cache(
    checkpoint: str,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("-m", checkpoint, "--dynamic-yarn", "--max-new-tokens", "3")
    long = STORY * 4
    out, err = loop(monkeypatch, capsys, io.StringIO(f"The sea\n{long}\n"), *argv)
    assert err == ""
    patch_model(model := LlamaForCausalLM.from_pretrained(checkpoint).eval(), "dynamic-yarn")
    assert out == "".join(answered(model, tokenizer, one, 3, cached=True) + "\n" for one in ("The sea", long))
    # A family that cannot rotate late is asked without, and that is said once.
    monkeypatch.setattr(streamed_answers, "cache_obstacle", lambda model: "its attention is its own")
    _, err = loop(monkeypatch, capsys, io.StringIO("The sea\nThe sea\n"), *argv)
    assert err.count("use_cache=False") == 1


def test_long_prompts_warn_and_files_are_read(
    checkpoint: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "story.txt").write_text(STORY * 8 + "\n")
    argv = ("-m", checkpoint, "--scaling", "default", "--max-new-tokens", "3")
    with_file = (*argv, "--input-file", str(tmp_path / "story.txt"))
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    out, err = loop(monkeypatch, capsys, io.StringIO(""), *with_file)
    assert re.search(r"warning: the prompt has \d+ tokens, unscaled is made for 64", err)
    alone = answered(model, tokenizer, STORY * 8 + "\n", 3, True)
    assert out == f"{alone}\n"
    out, _ = loop(monkeypatch, capsys, io.StringIO("Who sang?\n\n"), *with_file)
    asked = answered(model, tokenizer, (STORY * 8).rstrip() + "\nWho sang?", 3, True)
    assert out == f"{asked}\n{alone}\n"
    _, err = loop(monkeypatch, capsys, io.StringIO("The sea\n"), *argv)
    assert err == ""
    _, err = loop(monkeypatch, capsys, io.StringIO("The sea\n"), *argv[:-1], "80")
    assert "may pass the end of the context, 64 tokens" in err


def test_drawing_follows_from_the_seed(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str) -> str:
        argv = ("-m", checkpoint, "--max-new-tokens", "20", *more)
        return loop(monkeypatch, capsys, io.StringIO("The sea\n"), *argv)[0]

    greedy = said()
    assert said("--top-k", "1") == said("--temperature", "0") == greedy
    hot = said("--temperature", "5")
    assert hot == said("--temperature", "5") != said("--temperature", "5", "--seed", "1")
    assert hot != greedy != said("--repetition-penalty", "5")


def test_interrupt_stops_the_answer_only(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = LlamaForCausalLM.generate
    asked = []

    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", once)
    argv = ("-m", checkpoint, "--max-new-tokens", "3")
    _, err = loop(monkeypatch, capsys, Keyboard("The sea\nThe sea\n"), *argv)
    assert len(asked) == 2 and err.count("[stopped]") == 1
    asked.clear()
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea\n"))  # in a pipe it ends the program
    assert run_cli(lambda: prompt_loop.main([*argv])) == 130
