"""tokenization.py."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tokenization
from scaled_rope.checkpoint import vocabulary_size
from scaled_rope.texts import tokenizing
from scaled_rope.texts.documents import is_sampled
from scaled_rope.texts.packed import PackedWriter, open_packed
from tests.helpers import ROOT
from tests.helpers.packing import BOS, documents, packed, tokenize, write_corpus


def test_tokenization_does_not_depend_on_processes_and_records_provenance(tmp_path, tokenizer_dir, capsys, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.setattr(tokenizing, "BATCH", 300)  # several batches per worker
    source = ("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 64)
    for processes in (1, 2):
        assert tokenize(*source, "--num-proc", processes, "--output", tmp_path / f"by{processes}") == 0
    one, two = open_packed(tmp_path / "by1"), open_packed(tmp_path / "by2")
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert one.meta == two.meta
    assert one.meta["documents"] == 30
    assert one.meta["tokens"] == len(one) * 64 + one.meta["dropped_tokens"]
    assert one.meta["sources"] == [[str(tmp_path / "txt"), 1.0]]
    assert (one.tokens == BOS).sum() == pytest.approx(30, abs=1)
    before = (tmp_path / "by1" / "tokens.bin").stat().st_mtime_ns
    assert tokenize(*source, "--num-proc", 1, "--output", tmp_path / "by1") == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "by1" / "tokens.bin").stat().st_mtime_ns == before


def test_a_set_of_other_texts_is_not_taken_for_this_one(tmp_path, tokenizer_dir, capsys, monkeypatch):
    write_corpus(tmp_path)
    source = ("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 64, "--num-proc", 1)
    assert tokenize(*source, "--output", tmp_path / "set") == 0
    (tmp_path / "txt" / "LICENSE").write_text("not read")
    assert tokenize(*source, "--output", tmp_path / "set") == 0
    for same in (f"{tmp_path / 'txt'}/", str(tmp_path / "here" / ".." / "txt")):
        (tmp_path / "here").mkdir(exist_ok=True)
        assert tokenize("--dataset", same, *source[2:], "--output", tmp_path / "set") == 0
    assert tokenize(*source, "--output", tmp_path / "txt" / "set") == 2
    assert f"set is inside dataset {tmp_path / 'txt'}, which would then hold the set" in capsys.readouterr().err
    (tmp_path / "txt" / "more.txt").write_text("A document that came later. " * 30)
    capsys.readouterr()
    assert tokenize(*source, "--output", tmp_path / "set") == 2
    said = capsys.readouterr().err
    assert f"set was made from {tmp_path / 'txt'}, which holds other texts now; remove it" in said
    meta = {name: value for name, value in open_packed(tmp_path / "set").meta.items() if name != "source_hashes"}
    monkeypatch.setattr(tokenization, "open_packed", lambda output: SimpleNamespace(meta=meta))
    assert tokenize(*source, "--output", tmp_path / "set") == 0
    assert "already there" in (said := capsys.readouterr().out) and "did not record what its sources held" in said


def test_mixing_and_json_flags(tmp_path, tokenizer_dir):
    write_corpus(tmp_path)
    (tmp_path / "lines.data").write_bytes((tmp_path / "lines.jsonl").read_bytes())
    common = ("--tokenizer", tokenizer_dir, "--sequence-length", 32, "--feature", "body", "--num-proc", 1, "--json")
    data = tmp_path / "lines.data"
    assert tokenize("--dataset", data, "--dataset", f"{data},0.5", *common, "--output", tmp_path / "mixed") == 0
    kept = sum(is_sampled(42, 1, number, 0.5) for number in range(30))
    assert 0 < kept < 30
    assert open_packed(tmp_path / "mixed").meta["documents"] == 30 + kept


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer_dir, capsys, monkeypatch):
    write_corpus(tmp_path)

    def full(self: PackedWriter, *rows: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "tokens.bin")

    monkeypatch.setattr(PackedWriter, "append", full)
    code = tokenize("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 32,
                    "--num-proc", 1, "--output", tmp_path / "out" / "set")  # fmt: skip
    assert code == 2
    assert "no space left" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--dataset": "{tmp}/nothing"}, "does not exist"),
        ({"--dataset": "{tmp}/txt,1.5"}, "fraction"),
        ({"--dataset": "{tmp}/lines.jsonl"}, "feature 'text'"),
        ({"--tokenizer": "{tmp}/txt"}, "config.json"),
        ({"--sequence-length": "1"}, "at least 2"),
        ({"--sequence-length": "1000000"}, "no full sequence"),
        ({"--num-proc": "0"}, "at least 1"),
        ({"--dataset": "{tmp}/empty.jsonl"}, "no full sequence of 32 tokens"),
        ({"--dataset": "{tmp}/half.jsonl"}, "half.jsonl line 2: character 3 of 'text' is U+DE00, half of a surrogate"),
    ],
)
def test_tokenization_refuses_bad_input_in_one_line(tmp_path, tokenizer_dir, capsys, change, message):
    write_corpus(tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 300)
    (tmp_path / "half.jsonl").write_text('{"text": "fine"}\n{"text": "bad\\ude00"}\n')
    flags = {"--dataset": f"{tmp_path}/txt", "--tokenizer": str(tokenizer_dir), "--sequence-length": "32",
             "--num-proc": "1", "--output": f"{tmp_path}/new"}  # fmt: skip
    flags |= {name: value.replace("{tmp}", str(tmp_path)) for name, value in change.items()}
    assert tokenize(*[part for pair in flags.items() for part in pair]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("new", ".partial"))]


@pytest.mark.parametrize("spoil", ["meta.json", "tokens.bin", "borders.bin", "cut", "no json", "empty"])
def test_a_set_that_lacks_a_part_is_made_again(tmp_path, tokenizer_dir, capsys, spoil):
    write_corpus(tmp_path)
    output = tmp_path / "set"
    flags = ("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 32, "--num-proc", 1)
    assert tokenize(*flags, "--output", output) == 0
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    if spoil == "cut":
        (output / "tokens.bin").write_bytes(whole["tokens.bin"][:-2])
    elif spoil == "no json":
        (output / "meta.json").write_text("{")
    else:
        for name in whole if spoil == "empty" else [spoil]:
            (output / name).unlink()
    assert tokenize(*flags, "--output", output) == 0
    assert "it is made again" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    (output / "meta.json").unlink()
    (output / "mine.txt").write_text("mine")
    assert tokenize(*flags, "--output", output) == 2
    assert "exists and is no packed set; remove it" in capsys.readouterr().err and (output / "mine.txt").exists()


def test_pushing_to_the_hub_hands_over_every_row(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data, _ = packed(tmp_path, documents(5), 16, "document")
    pushed = {}
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name: pushed.update({name: self}))
    tokenization.push_to_hub(tmp_path / "set", "someone/set")
    assert pushed["someone/set"]["input_ids"][:] == data.tokens.tolist()


def test_pushing_to_the_hub_hands_over_what_is_learnt(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with PackedWriter(tmp_path / "set", 4, 10, weighted=True) as writer:
        writer.append([1, 2, 3, 4], [0, 0, 1, 1])
        writer.close({})
    pushed = {}
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name: pushed.update({name: self}))
    tokenization.push_to_hub(tmp_path / "set", "someone/set")
    assert pushed["someone/set"][:] == {"input_ids": [[1, 2, 3, 4]], "loss_weights": [[0, 0, 1, 1]]}


@pytest.mark.parametrize("flags", [("--feature", "body"), ("--split", "test"), ("--seed", 7), ("--messages", "m")])
def test_a_mixture_says_its_fields_itself(tmp_path, tokenizer_dir, capsys, flags):
    write_corpus(tmp_path)
    (tmp_path / "mix.yaml").write_text(f"sources:\n  - {{dataset: {tmp_path}/txt, fraction: 1.0}}\n")
    common = ("--mixture", tmp_path / "mix.yaml", "--tokenizer", tokenizer_dir, "--sequence-length", 32)
    assert tokenize(*common, *flags, "--output", tmp_path / "set") == 2
    assert capsys.readouterr().err == f"error: {flags[0]} is not allowed with --mixture, whose file says it\n"


def test_flags_for_other_data_are_refused(tmp_path, tokenizer_dir, capsys):
    write_corpus(tmp_path)
    common = ("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 32, "--num-proc", 1,
              "--output", tmp_path / "set")  # fmt: skip
    for flags, said in (
        (("--skip-refused",), "--skip-refused is for chats"),
        (("--chat-template", tmp_path / "lines.jsonl"), "--chat-template is for chats"),
        (("--messages", "m", "--feature", "text"), "--feature is not allowed with --messages: it is for texts"),
        (("--feature", "body"), f"feature 'body' is for records of JSON or Parquet; '{tmp_path}/txt' holds none"),
    ):
        assert tokenize(*common, *flags) == 2
        assert said in capsys.readouterr().err
    data = ("--dataset", tmp_path / "lines.jsonl", "--feature", "body", *common[2:])
    assert tokenize(*data) == 0
    assert tokenize(*data, "--json") == 2  # files are read otherwise
    assert "holds a set made otherwise" in capsys.readouterr().err


def test_lone_surrogates_are_replaced_on_demand_and_on_record(tmp_path, tokenizer_dir, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "Find it and memorize \\ud83d them."}\n' * 9)
    (tmp_path / "b.txt").write_text("Find it and memorize \ufffd them.")
    same = ("--tokenizer", tokenizer_dir, "--sequence-length", 16, "--num-proc", 2)
    first = ("--dataset", tmp_path / "a.jsonl", "--output", tmp_path / "a", *same)
    assert tokenize(*first, "--replace-surrogates") == 0
    assert tokenize("--dataset", tmp_path / "b.txt", "--output", tmp_path / "b", *same) == 0
    one, two = (open_packed(tmp_path / name).tokens.reshape(-1) for name in "ab")
    np.testing.assert_array_equal(one[: len(two)], two)
    assert tokenize(*first) == 2 and "made otherwise" in capsys.readouterr().err


def test_a_tokenizer_whose_ids_have_gaps(tmp_path):
    """As where tokens were removed or ids reserved: its largest id is not its number of tokens less one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 300}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(tmp_path / "tokenizer")
    assert len(made) < vocabulary_size(made) == 301
    (tmp_path / "a.txt").write_text("a b b a b a " * 9)
    assert tokenize("--dataset", tmp_path / "a.txt", "--tokenizer", tmp_path / "tokenizer", "--sequence-length", 8,
                    "--num-proc", 1, "--output", tmp_path / "set") == 0  # fmt: skip
    packed = open_packed(tmp_path / "set")
    assert packed.meta["vocabulary"] == 301 and packed.tokens.max() == 300


def test_no_worker_outlives_its_parent(tmp_path, tokenizer_dir):
    (tmp_path / "txt").mkdir()
    for index in range(40):
        (tmp_path / "txt" / f"{index}.txt").write_text("t3 t4 t5 " * 200_000)
    words = [sys.executable, "tokenization.py", "--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir]
    words += ["--sequence-length", "32", "--num-proc", "2", "--output", tmp_path / "set"]
    begun = subprocess.Popen([*map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def group() -> list[int]:
        members = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(") ")[2].split()
                if int(fields[2]) == begun.pid and fields[0] != "Z":
                    members.append(int(stat.parent.name))
        return members

    def until(condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < limit
            time.sleep(0.05)

    until(lambda: len(group()) >= 3 and any(tmp_path.glob(".set.*.partial")))
    begun.kill()
    begun.communicate(timeout=60)
    until(lambda: not group())


def test_a_dataset_that_is_given_twice_is_refused(tmp_path, tokenizer_dir, capsys):
    write_corpus(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "txt")
    common = ("--tokenizer", tokenizer_dir, "--sequence-length", 32, "--num-proc", 1, "--output", tmp_path / "set")
    for first, second in (("txt", "txt"), ("txt", "link"), ("txt,0.5", "txt,0.5"), ("txt", "./txt,1")):
        flags = ("--dataset", f"{tmp_path}/{first}", "--dataset", f"{tmp_path}/{second}")
        assert tokenize(*flags, *common) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --dataset ") and "is given twice; to read texts several times" in said
        assert said.count("\n") == 1 and str(tmp_path / "txt") in said
    assert not (tmp_path / "set").exists()


def test_copies_of_documents_are_told_and_recorded(tmp_path, tokenizer_dir, capsys):
    texts = ["one text " * 50, "another text " * 50, "one text " * 50]
    common = ("--tokenizer", tokenizer_dir, "--sequence-length", 32, "--num-proc", 1)

    def told(name: str, texts: list[str]) -> str:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert tokenize("--dataset", tmp_path / f"{name}.jsonl", *common, "--output", tmp_path / name) == 0
        assert open_packed(tmp_path / name).meta["copies"] == len(texts) - len(set(texts))
        return capsys.readouterr().err

    assert "note:" not in told("none", texts[:2])
    assert "note: document 3 has the tokens of document 1 and is packed as well\n" in told("one", texts)
    said = "2 copies of other documents (the first: document 3 has the tokens of document 2) are packed as well"
    assert f"note: {said}\n" in told("two", [texts[0], texts[1], texts[1], texts[0]])
    # A mixture that reads a source twice has asked for it.
    (tmp_path / "mixture.yaml").write_text(
        f"tokens: 3000\nsources: [{{dataset: {tmp_path}/none.jsonl, fraction: 1, repeats: 9}}]\n"
    )
    assert tokenize("--mixture", tmp_path / "mixture.yaml", *common, "--output", tmp_path / "again") == 0
    meta = open_packed(tmp_path / "again").meta
    assert meta["documents"] > 2 and meta["copies"] == 0 and "copies" not in capsys.readouterr().err
