"""Prompts in chat templates, against the tokenizer's own rendering of the same messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import eval.passkey as passkey
import eval.passkey_hard as passkey_hard
import eval.prompt_loop as prompt_loop
import eval.quality as quality
from scaled_rope.checkpoint import DEFAULT_MODEL, encode
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.chat_templates import chat_template_hash, chat_text, chat_turn
from scaled_rope.evaluation.choice_prompts import OMITTED, Question, build_choice_prompt
from scaled_rope.evaluation.passkey_prompts import WORDINGS, build_hard_prompt, build_prompt
from scaled_rope.evaluation.streamed_answers import prompt_tokens
from scaled_rope.results import read_rows

# As most templates are: the beginning, trimmed messages between marks, and the mark of the answer.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }} [end]\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def with_template(folder: Path, template: str | None = TEMPLATE) -> str:
    """The embedded model, with a chat template."""
    folder.mkdir()
    for path in Path(DEFAULT_MODEL).iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    tokenizer.chat_template = template
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(with_template(tmp_path / "chat"))


def message_of(text: str, beginning: str) -> str:
    """The user's message in a rendered prompt, whose answer begins with `beginning`."""
    assert text.endswith(f" [end]\n[assistant] {beginning}"), text[-80:]
    return text.partition("[user] ")[2].rpartition(" [end]\n[assistant] ")[0]


def test_passkeys_are_what_the_tokenizer_renders(tokenizer: Any) -> None:
    turn = chat_turn(tokenizer)
    for length, depth in ((200, 0.0), (257, 0.5), (400, 1.0)):
        prompt = build_prompt(tokenizer, length, depth, 54321, chat=turn)
        assert len(prompt.input_ids) + len(prompt.answer_ids) == prompt.length == length
        text = tokenizer.decode(prompt.input_ids)
        message = message_of(text, "The pass key is")
        assert text == chat_text(tokenizer, message) + "The pass key is"
        assert text == tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        ) + "The pass key is"  # fmt: skip
        assert message.endswith("What is the pass key?") and message.startswith("There is an important info")
        assert tokenizer.decode(prompt.answer_ids).strip() == "54321"
        assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
        seen = tokenizer.decode([*prompt.input_ids, *prompt.answer_ids][-prompt.distance :])
        assert seen.startswith("\nThe pass key is 54321.")


def test_other_wordings_are_what_the_tokenizer_renders(tokenizer: Any) -> None:
    needle = WORDINGS["needle"]
    prompt = build_prompt(tokenizer, 257, 0.5, 54321, chat=chat_turn(tokenizer), wording=needle)
    assert len(prompt.input_ids) + len(prompt.answer_ids) == 257
    text = tokenizer.decode(prompt.input_ids)
    message = message_of(text, needle.answer)
    assert text == chat_text(tokenizer, message) + needle.answer
    assert message.startswith(needle.opening) and message.endswith(needle.question.strip())


def test_numbered_passkeys_are_what_the_tokenizer_renders(tokenizer: Any) -> None:
    words = encode(tokenizer, "The sea was calm and the wind was low. " * 80)
    prompt = build_hard_prompt(tokenizer, 300, [0.2, 0.7], [12345, 67890], 2, words, chat_turn(tokenizer))
    assert len(prompt.input_ids) + len(prompt.answer_ids) == 300
    text = tokenizer.decode(prompt.input_ids)
    message = message_of(text, "The 2nd pass key is")
    assert text == chat_text(tokenizer, message) + "The 2nd pass key is"
    assert message.endswith("What is the 2nd pass key?")


@pytest.mark.parametrize("limit", [None, 150])
def test_questions_are_what_the_tokenizer_renders(tokenizer: Any, limit: int | None) -> None:
    story = "The cat sat by the window and watched the rain. " * 10
    question = Question(story, "What sat?", ("The cat", "The rain", "The sea", "Nobody "), 0)
    prompt = build_choice_prompt(tokenizer, question, limit, chat_turn(tokenizer))
    text = tokenizer.decode([*prompt.context, *prompt.letters[0]])
    message = message_of(text.removesuffix("A"), "Answer: (")
    assert text == chat_text(tokenizer, message) + "Answer: (A"
    assert message.endswith("(D) Nobody") and prompt.cut == (limit is not None) == (OMITTED in message)
    assert limit is None or prompt.length <= limit
    assert prompt.context.count(tokenizer.bos_token_id) == 1


def test_typed_prompts_are_what_the_tokenizer_renders(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "  Who sang? "}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(tokenizer, "  Who sang? ", chat_template=True) == list(ids)
    assert prompt_tokens(tokenizer, "Who sang?") == [tokenizer.bos_token_id, *encode(tokenizer, "Who sang?")]


def test_templates_that_cannot_be_used(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ConfigError, match="does not keep a message as it is"):
        chat_turn(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ConfigError, match="fails: no users here"):
        chat_turn(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        chat_turn(tokenizer)


COMMANDS = {
    "passkey": (passkey, ["--lengths", "128", "--iterations", "2"]),
    "passkey_hard": (passkey_hard, ["--lengths", "200", "--iterations", "2", "--dataset", "TEXT"]),
    "quality": (quality, ["--dataset", "QUESTIONS", "--limit", "1", "--max-tokens", "200"]),
    "prompt_loop": (prompt_loop, ["--input-file", "TEXT", "--max-new-tokens", "2"]),
}


def flags_of(name: str, folder: Path) -> list[str]:
    (folder / "text.txt").write_text("The sea was calm. " * 300)
    (folder / "questions.jsonl").write_text(
        '{"article": "A cat sat.", "question": "What?", "options": ["a", "b", "c", "d"], "answer": 0}\n'
    )
    places = {"TEXT": str(folder / "text.txt"), "QUESTIONS": str(folder / "questions.jsonl")}
    return [places.get(flag, flag) for flag in COMMANDS[name][1]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_without_a_template_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["-m", str(DEFAULT_MODEL), "--chat-template", *flags_of(name, tmp_path)]
    monkeypatch.setattr("sys.argv", [f"eval/{name}.py", *flags])
    assert run_cli(COMMANDS[name][0].main) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: chat_template: the tokenizer of ") and len(lines) == 1


@pytest.mark.parametrize("name", ["passkey", "passkey_hard", "quality"])
def test_rows_say_which_template(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_template(tmp_path / "chat")
    output = str(tmp_path / "rows.jsonl")
    flags = ["-m", model, "--output", output, "--hide-progress", *flags_of(name, tmp_path)]
    assert COMMANDS[name][0].main(flags) == 0
    plain = read_rows(output)
    assert all("chat_template" not in row["protocol"] for row in plain)
    assert f"note: {model} has a chat template and is asked without it" in capsys.readouterr().err
    assert COMMANDS[name][0].main([*flags, "--chat-template"]) == 0
    assert "has a chat template" not in capsys.readouterr().err
    more = read_rows(output)[len(plain) :]
    assert more and all(row["protocol"]["chat_template"] == chat_template_hash(model) for row in more)
    assert more[0]["data"]["fingerprint"] != plain[0]["data"]["fingerprint"]
