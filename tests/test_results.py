"""Result rows: what survives crashes, concurrent writers and bad files."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest

from scaled_rope import results
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.results import append_row, finished_keys, read_rows, row_key


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"metric": "perplexity", "length": n, "value": 1 / 3, "name": "Ω\n"} for n in (1, 2)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_torn_last_line_is_ignored_then_cut_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"n": 1})
    torn = json.dumps({"n": 2, "text": "x" * 50}).encode()[:keep]
    with open(path, "ab") as file:
        file.write(torn)
    assert read_rows(path) == [{"n": 1}]
    append_row(path, {"n": 3})
    assert read_rows(path) == [{"n": 1}, {"n": 3}]
    assert torn not in path.read_bytes().splitlines()


@pytest.mark.parametrize("left", [b"", b"  ", b"\n ", b"\0" * 40, b'{"metric": "per'])
def test_a_file_with_no_whole_row_yet_is_continued(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(left)
    assert read_rows(path) == []
    append_row(path, {"metric": "perplexity"})
    assert read_rows(path) == [{"metric": "perplexity"}]


def test_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}')
    assert read_rows(path) == [{"n": 1}, {"n": 2}]
    append_row(path, {"n": 3})
    assert [row["n"] for row in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "null"])
def test_corrupt_line_in_the_middle_is_reported_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n{{"n": 3}}\n')
    with pytest.raises(ConfigError, match="line 2 "):
        read_rows(path)


def _append_many(path: Path, writer: int, count: int) -> None:
    for index in range(count):
        append_row(path, {"writer": writer, "index": index, "padding": "x" * 5000})


def test_concurrent_writers_lose_and_mix_nothing(tmp_path: Path) -> None:
    # Rows longer than a page, so that writes that were not atomic would interleave.
    path, writers, count = tmp_path / "rows.jsonl", 4, 25
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_many, args=(path, writer, count)) for writer in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = read_rows(path)
    assert len(rows) == writers * count
    for writer in range(writers):
        assert [row["index"] for row in rows if row["writer"] == writer] == list(range(count))


def test_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"n": 1})
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(results.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    with pytest.raises(OSError, match="No space left"):
        append_row(path, {"n": 2})
    assert path.read_bytes() == before


def test_unusable_paths_and_numbers_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (
        lambda: append_row(tmp_path, {"n": 1}),
        lambda: append_row(tmp_path / "file" / "rows.jsonl", {"n": 1}),
        lambda: append_row(tmp_path / "rows.jsonl", {"n": math.nan}),
        lambda: read_rows(tmp_path / "missing.jsonl"),
        lambda: write_atomic(tmp_path, "text"),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "rows.jsonl").exists()


def test_row_key_is_what_was_measured(tmp_path: Path) -> None:
    row = {
        "metric": "perplexity",
        "model_fingerprint": "f",
        "dtype": "float32",
        "scaling": {"method": "yarn", "factor": 8.0},
        "data": {"fingerprint": "d"},
        "protocol": {"name": "truncate"},
        "length": 256,
    }
    same = {**dict(reversed(row.items())), "perplexity": 3.0, "provenance": {"date": "today"}, "model": "elsewhere"}
    assert row_key(row) == row_key(same)
    others = [{**row, field: "other"} for field in row]
    assert len({row_key(other) for other in [row, *others]}) == len(row) + 1
    path = tmp_path / "rows.jsonl"
    assert finished_keys(path) == set()
    append_row(path, same)
    assert finished_keys(path) == {row_key(row)}


def test_a_file_that_holds_no_rows_is_said_to_be_none(tmp_path: Path) -> None:
    for text in ("# A heading\n\nand text\n", "[1, 2]\n{}\n"):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ConfigError, match=r"file '.*file' holds no rows: its line 1 is not a JSON object"):
            read_rows(tmp_path / "file")


@pytest.mark.parametrize(("text", "line"), [("word " * 3000, 1), ('{\n "a": 1\n}', 3), ("\n\nword", 3)])
def test_a_file_of_something_else_is_left_alone_also_without_its_last_newline(
    tmp_path: Path, text: str, line: int
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text)
    for attempt in (lambda: append_row(file, {"n": 1}), lambda: read_rows(file)):
        with pytest.raises(ConfigError, match=r"a.txt' holds no rows: its line \d is not a JSON object"):
            attempt()
    assert file.read_text() == text
    with pytest.raises(ConfigError, match=f"its line {line} "):
        append_row(file, {"n": 1})
    for torn in ("{", '{"met'):  # of the first row that was to be written
        file.write_text(torn)
        assert read_rows(file) == []
        append_row(file, {"n": 1})
        assert read_rows(file) == [{"n": 1}]


def test_a_row_that_another_process_wrote_meanwhile_is_left_out(tmp_path: Path) -> None:
    row = {"metric": "perplexity", "model": "m", "length": 8, "value": 2.0}
    path = tmp_path / "rows.jsonl"
    assert append_row(path, row, once=True)
    assert not append_row(path, {**row, "value": 3.0}, once=True)  # the same measurement
    assert append_row(path, {**row, "length": 16}, once=True)
    assert append_row(path, row)
    assert [one["length"] for one in read_rows(path)] == [8, 16, 8]
    failed = {**row, "length": 32, "error": "out of memory"}
    assert append_row(path, failed, once=True) and append_row(path, {**row, "length": 32}, once=True)
    assert not append_row(path, {**row, "length": 32}, once=True)
    # Another file in its place is read anew, also where it is longer, and one that was cut or changed as well.
    other = "".join(json.dumps({**row, "length": length}) + "\n" for length in range(100, 200))
    path.write_text(other)
    assert append_row(path, row, once=True) and not append_row(path, {**row, "length": 150}, once=True)
    path.write_text(other.splitlines(keepends=True)[0])
    assert append_row(path, {**row, "length": 150}, once=True) and not append_row(
        path, {**row, "length": 100}, once=True
    )
    with open(path, "a") as file:  # another process
        file.write(json.dumps({**row, "length": 300}) + "\n")
    assert not append_row(path, {**row, "length": 300}, once=True)
