"""Documents from files of every kind."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.documents import TextSource, files_of, is_local, is_sampled, read_documents, read_json_lines
from tests.helpers.packing import write_corpus


def test_fraction_keeps_a_stable_share_of_the_documents():
    kept = [is_sampled(7, 0, document, 0.3) for document in range(4000)]
    # Binomial: 4000 draws at 0.3 have a standard deviation of 0.0072; four of them.
    assert abs(np.mean(kept) - 0.3) < 0.029
    assert kept == [is_sampled(7, 0, document, 0.3) for document in range(4000)]
    larger = [is_sampled(7, 0, document, 0.6) for document in range(4000)]
    assert all(b for a, b in zip(kept, larger, strict=True) if a)
    assert TextSource.parse("a,b/c.txt,0.25") == TextSource("a,b/c.txt", 0.25)


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


def test_a_folder_of_a_hub_dataset_is_a_source(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_documents("someone/set:fine-tune")) == ["one", "two"]
    assert list(read_documents("someone/set")) == ["one", "two"]
    assert asked == [
        ("someone/set", {"data_dir": "fine-tune", "split": "train", "streaming": True}),
        ("someone/set", {"data_dir": None, "split": "train", "streaming": True}),
    ]


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("owner/name", False),
        ("name", False),
        ("owner/name:folder", False),
        ("owner/name-v1.1", False),
        ("./name", True),
        ("/tmp", True),
        ("~/name", True),
        ("a/b/c", True),
        ("name.jsonl", True),
        ("owner/name.txt.zst", True),
        ("data/name", True),
        ("out/name", True),
        ("standin:books", True),
        ("here", True),
        ("here/name", True),
    ],
)
def test_names_of_this_disk(name: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local(name) is local


def test_records_come_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[2]\nnonsense\n')
    records = read_json_lines(str(path))
    assert [next(records), next(records)] == [({"a": 1}, f"{path} line 1"), ([2], f"{path} line 3")]
    with pytest.raises(ConfigError, match=f"^dataset {path} line 4 is not JSON: "):
        next(records)


def test_what_a_folder_holds_beside_texts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    for name in ("a.txt", "B.TXT", "sub/c.Txt", ".hidden.txt", ".git/d.txt", "sub/.cache/e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "f.JSONL").write_text('{"text": "f.JSONL"}\n')
    for name in ("g.gz", "sub/h.md", "README", "i.md", "j.tar.zst", "k.bin"):
        (folder / name).write_text("no text")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/l.txt").write_text("behind a link")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    read, others = files_of(folder)
    assert [str(path.relative_to(folder)) for path in read] == ["B.TXT", "a.txt", "f.JSONL", "sub/c.Txt"]
    assert len(others) == 8
    for _ in range(2):  # told once
        assert list(read_documents(str(folder))) == ["B.TXT", "a.txt", "f.JSONL", "sub/c.Txt"]
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: dataset {folder}: 8 of 12 files are not read (2 no suffix, 2 .md, ")
    assert note.endswith("): README, g.gz, gone.txt, i.md, j.tar.zst, ...")


def test_a_folder_without_texts_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    (tmp_path / ".b.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"is a folder without .txt, .jsonl or .parquet files; it has a.md$"):
        list(read_documents(str(tmp_path)))


def test_compressed_files_with_upper_case_suffixes(tmp_path: Path) -> None:
    compressed(tmp_path / "a.TXT.ZST", b"text")
    assert list(read_documents(str(tmp_path))) == ["text"]
