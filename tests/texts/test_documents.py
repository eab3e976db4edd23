"""Documents from files of every kind."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.documents import (
    TextSource,
    check_feature,
    check_split,
    check_there,
    files_hash,
    files_of,
    is_local,
    is_sampled,
    read_documents,
    read_json,
    read_json_lines,
)
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
    for name in ("g.gz", "sub/h.rst", "README", "README.md", "j.tar.zst", "k.bin"):
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
    assert note.startswith(f"note: dataset {folder}: 8 of 12 files are not read (2 no suffix, 1 ")
    assert note.endswith("): README, README.md, g.gz, gone.txt, j.tar.zst, ...")


def test_a_folder_without_texts_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("x")
    (tmp_path / ".b.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"is a folder without .txt, .*or .parquet files; it has a.html$"):
        list(read_documents(str(tmp_path)))


def test_compressed_files_with_upper_case_suffixes(tmp_path: Path) -> None:
    compressed(tmp_path / "a.TXT.ZST", b"text")
    (tmp_path / "b.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "more"}\n'))
    assert list(read_documents(str(tmp_path))) == ["text", "more"]


def test_zeros_are_no_xz_file_and_the_older_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(bytes(100))  # as a crash leaves them
    with pytest.raises(ConfigError, match="is not a whole xz file"):
        list(read_documents(str(path)))
    path.write_bytes(lzma.compress(b"A text.", lzma.FORMAT_ALONE))
    assert list(read_documents(str(path))) == ["A text."]


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".bz2", bz2.compress)])
def test_nothing_is_lost_behind_a_damaged_stream(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    first, second = (compress(json.dumps({"text": text}).encode() + b"\n") for text in ("one", "two"))
    padding = bytes(8) if suffix == ".xz" else b""
    path.write_bytes(first + padding + second + padding)
    assert list(read_documents(str(path))) == ["one", "two"]
    damaged = bytes([second[0] ^ 1]) + second[1:]
    for content in (first + damaged, first + second + b"junk", first + second[:-1], first + second[:1], b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"dataset .*a.jsonl{suffix} is not a whole (xz|bzip2) file: \w"):
            list(read_documents(str(path)))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path) == str(tmp_path / "sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for attempt in (lambda: list(read_documents(str(tmp_path))), lambda: files_hash(str(tmp_path))):
        with pytest.raises(ConfigError, match=rf"dataset {tmp_path}: folder {tmp_path}/sub cannot be read: Permission"):
            attempt()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.txt.bz2"])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_text("one")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=rf"dataset {tmp_path / name} cannot be read: Permission denied"):
        next(read_documents(str(tmp_path / name)))


def test_the_home_folder_is_found_by_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    check_there("~/a.txt")
    assert list(read_documents("~/a.txt")) == ["one"]
    assert files_hash("~/a.txt") == files_hash(str(tmp_path / "a.txt")) is not None
    assert TextSource.parse("~/a.txt,0.5") == TextSource(str(tmp_path / "a.txt"), 0.5)


def test_a_name_with_a_comma_is_a_path_if_it_is_there(tmp_path: Path) -> None:
    for name in ("Austen, Jane.txt", "a,0.5"):
        text = str(tmp_path / name)
        Path(text).write_text("one")
        assert TextSource.parse(text) == TextSource(text)
        assert TextSource.parse(f"{text},0.25") == TextSource(text, 0.25)
    with pytest.raises(ConfigError, match="fraction ' Jane' of 'Dickens' is not allowed; a number in"):
        TextSource.parse("Dickens, Jane")


def test_a_split_of_files_is_what_their_names_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("both/train.txt", "both/test.txt", "one/data/test-00000-of-00001.jsonl", "some/test/a.txt", "some/b.txt")
    for name in (*names, "lines.jsonl", "saved/dataset_dict.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        ConfigError, match="split 'test' does not choose among files, and '.*both' holds train.txt as well"
    ):
        check_split(str(tmp_path / "both"), "test")
    with pytest.raises(
        ConfigError, match="split 'validation' does not .* holds data/test-00000-of-00001.jsonl as well"
    ):
        check_split(str(tmp_path / "one"), "validation")
    for name in ("one", "saved", "nothing"):
        check_split(str(tmp_path / name), "test[:10%]")
    check_split("some/set", "test")
    check_split(str(tmp_path / "lines.jsonl"), None)
    assert capsys.readouterr().err == ""
    for name in (str(tmp_path / "some"), str(tmp_path / "lines.jsonl"), "standin:books"):
        for _ in range(2):  # said once
            check_split(name, "test")
        assert capsys.readouterr().err == f"note: dataset {name} has no splits: all of it is read, not 'test' alone\n"


def test_fields_are_refused_where_no_source_has_any(tmp_path: Path) -> None:
    for name in ("texts/a.txt", "lines.jsonl", "saved/dataset_info.json", "set/meta.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    texts, lines = str(tmp_path / "texts"), str(tmp_path / "lines.jsonl")
    for names in ([texts], [str(tmp_path / "texts" / "a.txt")], ["standin:books"], [str(tmp_path / "set")]):
        with pytest.raises(
            ConfigError, match=f"feature 'body' is for records of JSON or Parquet; '{names[0]}' holds none"
        ):
            check_feature(names, "body")
        check_feature(names, "text")
        check_feature([*names, lines], "body")  # for one of them it says something
        check_feature(names, "body", as_json=True)
    for name in (str(tmp_path), lines, str(tmp_path / "saved"), "some/set", str(tmp_path / "nothing")):
        check_feature([name], "body")


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_files_of_every_compression(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """Also where pieces that were compressed one by one follow each other; a torn file is one line."""
    lines = compress(b'{"text": "one"}\n') + compress(b'{"text": "two"}\n')
    texts = {"a.jsonl": lines, "b.ndjson": lines, "c.json": lines, "d.txt": compress("\ufeffthree".encode())}
    for name, content in texts.items():
        (tmp_path / f"{name}{suffix}").write_bytes(content)
    assert list(read_documents(str(tmp_path))) == ["one", "two"] * 3 + ["three"]
    path = tmp_path / f"a.jsonl{suffix}"
    noise = json.dumps({"text": np.random.default_rng(0).bytes(2000).hex()}).encode()
    for damaged in (compress(noise)[:-9], b"not compressed", b""):
        path.write_bytes(damaged)
        if damaged or suffix == ".xz":
            with pytest.raises(ConfigError, match=f"^dataset {path} is not a whole "):
                list(read_documents(str(path)))


def test_what_tells_about_data_is_not_read_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every one of these lies in copies of hub data sets. Named itself, such a file is read."""
    about = ["README.md", "readme.txt", "README.zh.md", "LICENSE.txt", "LICENSE-MIT.md", "Changelog.md", "LICENSE"]
    about += ["dataset_infos.json", "dataset_info.json", "state.json", "data/README.md"]
    hidden = [".DS_Store", ".gitattributes", "._a.txt", ".ipynb_checkpoints/a.txt"]
    for name in (*about, *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"default": 1}')
    texts = {"data/a.md": "one", "readme_first.txt": "two", "licenses of dogs.txt": "three"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert sorted(read_documents(str(tmp_path))) == sorted(texts.values())
    assert f"{len(about)} of {len(about) + len(texts)} files are not read" in capsys.readouterr().err
    assert list(read_documents(str(tmp_path / "README.md"))) == ['{"default": 1}']


def test_a_file_beside_its_own_archive_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    with pytest.raises(
        ConfigError, match="holds a.jsonl and a.jsonl.gz, which are one text by their names; remove one"
    ):
        list(read_documents(str(tmp_path)))


ONE, TWO = {"text": "one\n{"}, {"text": "two ]"}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ONE, TWO]),
        json.dumps([ONE, TWO], indent=2),
        "\n" + json.dumps([ONE, TWO], indent=2) + "\n",
        json.dumps(ONE, indent=4) + "\n" + json.dumps(TWO, indent=4) + "\n\n",
        json.dumps([ONE]) + "\n" + json.dumps([TWO]) + "\n",
        json.dumps(ONE) + "\r\n\r\n" + json.dumps(TWO),
        json.dumps(ONE) + "\n[]\n" + json.dumps(TWO),
        json.dumps(ONE, indent=1) + json.dumps(TWO),
        f"[\n{json.dumps(ONE)},\n{json.dumps(TWO)}\n]",
        "\ufeff" + json.dumps([ONE, TWO], indent=2),
    ],
)
def test_json_in_every_layout(tmp_path: Path, content: str) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert list(read_documents(str(tmp_path / name))) == ["one\n{", "two ]"]
    assert list(read_json(str(tmp_path / "a.json")))[0][0] == ONE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": null}', "not a text field of {path} line 2; there it is null$"),
        ('{"text": ["one", "two"]}', "not a text field of {path} line 1; there it is a list$"),
        ('{"data": [{"text": "one"}]}', "not a text field of {path} line 1; it has: data$"),
        ('["one", "two"]', "{path} line 1 entry 1; a record there is a str, not an object with fields$"),
        ('[{"text": "one"},\n{"text": 2}]', "{path} line 1 entry 2; there it is a int$"),
        ('[\n{"text": "one"},\n{"text": "two"}\n{"text": "three"}\n]', "{path} is not JSON: .*: line 4 column 1"),
        ('[\n{"text": "one"},\n', "{path} is not JSON: .*line 3"),
        ('{"text": "one"', "{path} line 1 is not JSON: "),
        ('{"text": "one"\n{"text": "two"}', "{path} line 1 is not JSON: "),
        ("text\nmore", "{path} line 1 is not JSON: "),
        ("[" * 100_000, "{path} line 1 is not JSON: "),
        ('{"text": "' + "9" * 5000 + '", "n": ' + "9" * 5000 + "}", "{path} line 1 is not JSON: "),
        ('{"text": "ok"}\n{"text": "a\\ud83d"}',
         "{path} line 2: character 1 of 'text' is U\\+D83D, half of a surrogate pair"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message.format(path=path)) as caught:
        list(read_documents(str(path)))
    assert "\n" not in str(caught.value)


def test_lone_surrogates_are_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b\\ude00 \\ud83d\\ude00"}\n')
    assert list(read_documents(str(path), replace_surrogates=True)) == ["a\ufffd b\ufffd \U0001f600"]


def test_text_of_parquet_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    bad = pyarrow.array([b"one", b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="a.parquet after row 0 has text that is not UTF-8"):
        list(read_documents(str(tmp_path / "a.parquet")))


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["", "one", " \n\t", "", "two\n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("")
    assert list(read_documents(str(tmp_path))) == ["one", "two\n"]
    assert capsys.readouterr().err == f"note: dataset {tmp_path}: 4 empty documents are left out\n"


def test_documents_of_control_characters_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["a\x00b", "one\n\n\n\n\n\n", "\t\t\t1\t2\r\n", "page\f"]
    texts = ["\x00" * 5000, *kept, "P\x89\x1a\x00\x7f", "U\x00T\x00F\x00-\x001\x006\x00"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(read_documents(str(tmp_path))) == kept
    said = "3 documents are left out: most of their characters are control characters"
    assert capsys.readouterr().err == f"note: dataset {tmp_path}: {said}\n"


def test_a_file_of_another_kind_that_is_named_is_one_text_and_said_to_be(tmp_path: Path, capsys: Any) -> None:
    for name in ("a.csv", "a.jsonl.bak", "a"):
        (tmp_path / name).write_text("x,y")
        assert list(read_documents(str(tmp_path / name))) == ["x,y"]
        assert f"note: dataset {tmp_path / name} is read as one text; its suffix" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("x,y")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["x,y"]
    assert capsys.readouterr().err == ""
