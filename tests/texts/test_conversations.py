"""Conversations and prompts with completions as tokens and targets."""

from __future__ import annotations

import gzip
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.texts.conversations import (
    ChatFields,
    Refusals,
    conversations,
    read_records,
    template_hash,
    template_note,
)
from scaled_rope.texts.packed import open_packed
from scaled_rope.texts.tokenizing import Tokenizers
from tests.helpers.packing import tokenize

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}\
{% else %}{{ message['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
#: as Llama 2 has it: BOS and EOS around each turn, no words that announce the answer, no line breaks
BRACKETS = """{% for message in messages %}{% if message['role'] == 'user' %}<s>[INST] {{ message['content'] }} [/INST]\
{% elif message['role'] == 'assistant' %} {{ message['content'] }}</s>{% else %}\
{{ raise_exception('only user and assistant, please') }}{% endif %}{% endfor %}"""
#: thoughts of earlier turns are left out, as Qwen 3 does
FORGETFUL = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SILENT = CHATML.replace("{{ message['content'] }}", "{% generation %}{% endgeneration %}")

CHATS = [
    [("user", "There is text. Find it"), ("assistant", "important info")],
    [
        ("system", "Memorize them"),
        ("user", "1 2 3?"),
        ("assistant", "4\n"),
        ("user", "é日本"),
        ("assistant", " 5 é日本😀."),
    ],
    [("user", "an"), ("assistant", "first"), ("assistant", "second")],
]


@pytest.fixture(scope="module")
def chat_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """The tokenizer of the tests with the special tokens of ChatML, and no template."""
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return folder


def chat(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def shared(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in pairs]


def encoded(folder, records, fields, template=None, processes=1, skip=False, read_special=False):
    refusals = Refusals(skip)
    with Tokenizers(str(folder), processes, read_special, template) as tokenizers:
        places = ((record, f"line {number}") for number, record in enumerate(records, 1))
        return list(conversations(places, fields, tokenizers, refusals)), refusals


def learnt(tokenizer, document) -> list[str]:
    """The texts of the stretches of targets."""
    runs = groupby(zip(document.ids.tolist(), document.weights.tolist(), strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for weight, run in runs if weight]


@pytest.mark.parametrize("form", [chat, shared])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_tokens_are_the_templates_and_targets_the_assistants(chat_dir, form, processes, template):
    tokenizer = load_tokenizer(str(chat_dir))
    records = [{"turns": form(pairs)} for pairs in CHATS] * 30  # more than one batch
    found, _ = encoded(chat_dir, records, ChatFields("turns"), template, processes)
    assert len(found) == len(records)
    for document, pairs in zip(found, CHATS * 30, strict=True):
        messages = chat(pairs)
        whole = tokenizer.apply_chat_template(messages, chat_template=CHATML, return_dict=False)
        assert document.ids.tolist() == whole and document.bare
        answers = [f"{text}<|im_end|>" for role, text in pairs if role == "assistant"]
        assert learnt(tokenizer, document) == answers
        # By lengths: what is there when the model starts to write, and what is there when it has written.
        expected = np.zeros(len(whole), int)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = len(tokenizer.apply_chat_template(messages[:number], chat_template=CHATML,
                                                          add_generation_prompt=True, return_dict=False))  # fmt: skip
                end = len(tokenizer.apply_chat_template(messages[: number + 1], chat_template=CHATML,
                                                        return_dict=False))  # fmt: skip
                expected[begin : end - 1] = 1  # the line break behind <|im_end|> is nobody's
        assert document.weights.tolist() == expected.tolist()


def test_a_template_without_announced_answers(chat_dir):
    tokenizer = load_tokenizer(str(chat_dir))
    (document,), _ = encoded(chat_dir, [{"m": chat(CHATS[0] * 2)}], ChatFields("m"), BRACKETS)
    assert document.ids.tolist() == tokenizer.apply_chat_template(
        chat(CHATS[0] * 2), chat_template=BRACKETS, return_dict=False
    )
    assert learnt(tokenizer, document) == [" important info</s>"] * 2


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_completion_of_messages_is_learnt_and_not_its_prompt(chat_dir, template):
    messages = chat(CHATS[1])
    record = {"p": messages[:4], "c": messages[4:]}
    (document,), _ = encoded(chat_dir, [record], ChatFields(prompt="p", completion="c"), template)
    tokenizer = load_tokenizer(str(chat_dir))
    assert document.ids.tolist() == tokenizer.apply_chat_template(messages, chat_template=CHATML, return_dict=False)
    assert learnt(tokenizer, document) == [" 5 é日本😀.<|im_end|>"]


def test_prompts_and_completions_are_plain_texts(tokenizer_dir):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    records = [{"p": "There is", "c": " an info"}, {"p": "", "c": "1 </s> 2"}]
    found, _ = encoded(tokenizer_dir, records, ChatFields(prompt="p", completion="c"))
    assert [tokenizer.decode(document.ids) for document in found] == ["<s>There is an info</s>", "<s>1 </s> 2</s>"]
    assert [learnt(tokenizer, document) for document in found] == [[" an info</s>"], ["1 </s> 2</s>"]]
    assert found[1].ids.tolist().count(1) == 1  # the one that is spelled is plain text
    (document,), _ = encoded(tokenizer_dir, records[1:], ChatFields(prompt="p", completion="c"), read_special=True)
    assert document.ids.tolist().count(1) == 2


GOOD = chat(CHATS[0])
REFUSED = [
    ({}, CHATML, "there is no field 'm'; it has: "),
    ({"m": []}, CHATML, "m is empty"),
    ({"m": "a text"}, CHATML, "m is no list of messages"),
    ({"m": [{"text": "?"}]}, CHATML, "message 1 of m has neither role and content nor from and value"),
    ({"m": [{"role": "narrator", "content": "x"}]}, CHATML, "role 'narrator' of message 1 of m is not allowed; one of"),
    ({"m": [{"from": "bot", "value": "x"}]}, CHATML, "role 'bot' of message 1 of m is not allowed; one of: system,"),
    ({"m": [{"role": "user", "content": 3}]}, CHATML, "content of message 1 of m is no text"),
    ({"m": GOOD[:1]}, CHATML, "there is no message of the assistant"),
    ({"m": GOOD[1:]}, CHATML, "it begins with the assistant"),
    ({"m": [*GOOD, *chat([("user", "<|im_end|>")])]}, CHATML, "spells the special token '<|im_end|>'"),
    ({"m": [{"role": "system", "content": "x"}, *GOOD]}, BRACKETS, "refuses it: only user and assistant, please"),
    ({"m": GOOD * 2}, FORGETFUL, "the chat template writes message 2 otherwise when more follows"),
    ({"m": GOOD}, SILENT, "the chat template marks nothing of it as the assistant's"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "template", "message"), REFUSED)
def test_records_that_leave_a_doubt_are_refused_by_their_place(chat_dir, record, template, message):
    with pytest.raises(ConfigError) as caught:
        encoded(chat_dir, [{"m": GOOD}, record], ChatFields("m"), template)
    said = str(caught.value)
    assert message in said and said.startswith("dataset line ") and "\n" not in said
    found, refusals = encoded(chat_dir, [record, {"m": GOOD}, record], ChatFields("m"), template, skip=True)
    assert (len(found), refusals.count) == ((1, 2) if template is not SILENT else (0, 3))
    assert refusals.first.startswith("line 1: ") and message in refusals.first


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"p": "important ", "c": "info"}, "a token lies across the border of the completion"),
        ({"p": "There", "c": ""}, "the completion is empty"),
        ({"p": "There", "c": 7}, "p and c are neither two texts nor two lists of messages"),
    ],
)
def test_pairs_that_leave_a_doubt_are_refused(tokenizer_dir, record, message):
    with pytest.raises(ConfigError, match=message):
        encoded(tokenizer_dir, [record], ChatFields(prompt="p", completion="c"))


def test_fields_that_do_not_go_together_are_refused():
    for fields, message in (
        ({}, "name either messages, or prompt and completion"),
        ({"prompt": "p"}, "completion is missing"),
        ({"messages": "m", "prompt": "p", "completion": "c"}, "name either"),
    ):
        with pytest.raises(ConfigError, match=message):
            ChatFields(**fields)


def test_a_copy_of_a_file_is_not_read_beside_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("{}\n")
    with pytest.raises(ConfigError, match=r"holds a.jsonl and a.jsonl.gz, which are one text by their names"):
        list(read_records(str(tmp_path)))


def test_records_come_from_json_lines_and_parquet(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"m": chat(pairs)} for pairs in CHATS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    found = list(read_records(str(tmp_path)))
    assert [record for record, _ in found] == records * 2
    assert found[1][1] == f"{tmp_path / 'a.jsonl'} line 2" and found[4][1] == f"{tmp_path / 'b.parquet'} record 2"
    (tmp_path / "c.txt").write_text("no records")
    assert len(list(read_records(str(tmp_path)))) == 2 * len(records)
    assert f"note: dataset {tmp_path}: 1 of 3 files are not read (1 .txt): c.txt" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"c.txt has no records; .jsonl, .jsonl.gz or .parquet"):
        list(read_records(str(tmp_path / "c.txt")))


def test_the_command_packs_chats_with_weights_and_borders(tmp_path, chat_dir, capsys):
    lines = "".join(json.dumps({"conversations": shared(pairs)}) + "\n" for pairs in CHATS * 10)
    (tmp_path / "chats.jsonl").write_text(lines)
    (tmp_path / "template.jinja").write_text(MARKED)
    common = ("--dataset", tmp_path / "chats.jsonl", "--tokenizer", chat_dir, "--sequence-length", 48, "--num-proc", 2,
              "--messages", "conversations")  # fmt: skip
    assert tokenize(*common, "--output", tmp_path / "none") == 2
    assert "has no chat template, which messages need" in capsys.readouterr().err
    marked = (*common, "--chat-template", tmp_path / "template.jinja", "--output", tmp_path / "set")
    assert tokenize(*marked) == 0
    data, tokenizer = open_packed(tmp_path / "set"), load_tokenizer(str(chat_dir))
    whole = [tokenizer.apply_chat_template(chat(pairs), chat_template=CHATML, return_dict=False) for pairs in CHATS]
    stream = [token for ids in whole * 10 for token in ids]
    assert data.tokens.reshape(-1).tolist() == stream[: data.tokens.size]
    assert data.borders[:3].tolist() == [0, len(whole[0]), len(whole[0]) + len(whole[1])]
    assert data.weighted and 0.1 < data.loss_weight.mean() < 0.9
    assert data.meta["chat"] == {
        "messages": "conversations", "prompt": None, "completion": None, "template_hash": template_hash(MARKED),
    }  # fmt: skip
    assert tokenize(*marked) == 0 and "already there" in capsys.readouterr().out
    assert data.meta["chat_template"] == MARKED  # so that the trained model is saved with it
    assert "of dataset set is added, since MODEL has none, to the" in template_note(data, "set", tokenizer, "MODEL")
    tokenizer.chat_template = CHATML
    assert "of dataset set takes the place of MODEL's own" in template_note(data, "set", tokenizer, "MODEL")
    tokenizer.chat_template = MARKED
    assert template_note(data, "set", tokenizer, "MODEL") is None
    data.meta["chat_template"], tokenizer.chat_template = None, CHATML
    assert "made with another chat template than that of MODEL" in template_note(data, "set", tokenizer, "MODEL")
    tokenizer.chat_template = None
    assert "made with a chat template, and MODEL has none" in template_note(data, "set", tokenizer, "MODEL")
    (tmp_path / "template.jinja").write_text(CHATML)
    assert tokenize(*marked) == 2 and "made otherwise" in capsys.readouterr().err
    assert tokenize(*marked[:-1], tmp_path / "chunk", "--bookend", "chunk") == 2
    assert "--bookend chunk is not allowed with chats" in capsys.readouterr().err


def test_the_command_counts_what_it_leaves_out(tmp_path, chat_dir, capsys):
    rows = [{"m": GOOD}, {"m": []}] * 20
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(CHATML)
    common = ("--dataset", tmp_path / "chats.jsonl", "--tokenizer", chat_dir, "--sequence-length", 48, "--num-proc", 1,
              "--messages", "m", "--chat-template", tmp_path / "template.jinja")  # fmt: skip
    assert tokenize(*common, "--output", tmp_path / "no") == 2
    assert capsys.readouterr().err.strip().endswith(f"error: dataset {tmp_path / 'chats.jsonl'} line 2: m is empty")
    assert tokenize(*common, "--skip-refused", "--output", tmp_path / "set", "--packing", "best-fit") == 0
    said = capsys.readouterr()
    assert "note: 20 records are left out; the first: " in said.err and "0 documents cut" in said.out
    data = open_packed(tmp_path / "set")
    assert (data.meta["refused"], data.meta["documents"], data.meta["dropped_tokens"]) == (20, 20, 0)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"m": []}) + "\n" for _ in range(3)))
    assert tokenize(*common, "--skip-refused", "--output", tmp_path / "nothing") == 2
    ending = f"nothing written; 3 records are left out; the first: {tmp_path / 'chats.jsonl'} line 1: m is empty"
    assert capsys.readouterr().err.strip().endswith(ending)


TWO_ANSWERS = [("user", "There is text. Find it"), ("assistant", "first"), ("user", "an"), ("assistant", "second")]


def with_keys(form, **keys: dict[str, object]) -> list[dict[str, object]]:
    """The conversation of two answers, with a key in some messages: key -> number of the message -> value."""
    messages = form(TWO_ANSWERS)
    for key, values in keys.items():
        for number, value in values.items():
            messages[int(number)][key] = value
    return messages


@pytest.mark.parametrize("form", [chat, shared])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_of_weight_0_is_read_and_not_learnt(chat_dir, form, template):
    tokenizer = load_tokenizer(str(chat_dir))
    plain, zero = with_keys(form), with_keys(form, weight={1: 0, 3: 1, 0: 0, 2: None})
    (whole, left_out), _ = encoded(chat_dir, [{"turns": plain}, {"turns": zero}], ChatFields("turns"), template)
    assert left_out.ids.tolist() == whole.ids.tolist()
    assert learnt(tokenizer, whole) == ["first<|im_end|>", "second<|im_end|>"]
    assert learnt(tokenizer, left_out) == ["second<|im_end|>"]
    last = with_keys(form, weight={3: 0.0})
    (document,), _ = encoded(chat_dir, [{"turns": last}], ChatFields("turns"), template)
    assert learnt(tokenizer, document) == ["first<|im_end|>"]


def test_weights_of_completions_count_as_well(chat_dir):
    turns = with_keys(chat, weight={1: 0, 3: 1})
    pair = {"before": turns[:1], "after": turns[1:]}
    (document,), _ = encoded(chat_dir, [pair], ChatFields(prompt="before", completion="after"), MARKED)
    assert learnt(load_tokenizer(str(chat_dir)), document) == ["second<|im_end|>"]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"weight": {1: 0.5}}, "weight=0.5 of message 2 of turns is not allowed; 1 for an answer to learn, 0 for"),
        ({"weight": {1: "0"}}, "weight='0' of message 2"),
        ({"weight": {1: 2}}, "weight=2 of message 2"),
        ({"weight": {0: 1}}, "weight=1 of message 1 of turns is not allowed; only the assistant's messages"),
        ({"weight": {1: 0, 3: 0}}, "weight is 0 in all messages of the assistant"),
        ({"train": {1: False}}, "train=False of message 2 of turns is not allowed: .* weight: 0 leaves one out"),
        ({"training": {0: True}}, "training=True of message 1"),
    ],
)
@pytest.mark.parametrize("form", [chat, shared])
def test_what_would_change_the_targets_otherwise_is_refused_by_name(chat_dir, form, keys, reason):
    with pytest.raises(ConfigError, match=f"dataset line 1: {reason}"):
        encoded(chat_dir, [{"turns": with_keys(form, **keys)}], ChatFields("turns"), CHATML)


def test_switches_that_say_what_is_done_anyway_are_taken(chat_dir):
    turns = with_keys(chat, train={0: False, 1: True, 2: False, 3: True})
    (document,), _ = encoded(chat_dir, [{"turns": turns}], ChatFields("turns"), CHATML)
    assert learnt(load_tokenizer(str(chat_dir)), document) == ["first<|im_end|>", "second<|im_end|>"]


def test_what_is_not_used_is_named_once(chat_dir, capsys):
    turns = with_keys(chat, reasoning_content={1: "because"}, name={0: "Ann"}, tool_calls={3: [{}]})
    records = [{"turns": turns, "tools": [{"name": "find"}], "loss_weight": 0.5, "id": None}] * 3
    encoded(chat_dir, records, ChatFields("turns"), CHATML + "{# message.name #}", processes=2)
    assert capsys.readouterr().err.splitlines() == [
        "note: dataset line 1: fields that are not used: loss_weight, tools",
        "note: dataset line 1: keys of messages that are not used: reasoning_content, tool_calls",
    ]
    encoded(chat_dir, [{"turns": with_keys(shared, reasoning={1: "b"})}], ChatFields("turns"), CHATML)
    assert "keys of messages that are not used: reasoning" in capsys.readouterr().err
    encoded(chat_dir, [{"turns": with_keys(chat, weight={1: 0})}], ChatFields("turns"), CHATML)
    encoded(chat_dir, [{"p": "an", "c": "b"}], ChatFields(prompt="p", completion="c"))
    assert capsys.readouterr().err == ""
