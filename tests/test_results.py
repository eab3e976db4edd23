"""Result rows: what survives crashes, concurrent writers and bad files."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import re
from pathlib import Path

import pytest

from scaled_rope import results
from scaled_rope.errors import ConfigError, check_name
from scaled_rope.results import (
    append_row,
    check_writable,
    finished_keys,
    folder_lock,
    portable,
    portable_command,
    portable_model,
    provenance,
    read_rows,
    row_key,
    write_atomic,
)


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


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there/a/b/c", "there"):
        with pytest.raises(ConfigError, match="refused"), folder_lock(tmp_path / name):
            raise ConfigError("refused")
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["there"]


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


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "table.csv"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_text() == "new"

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "newest")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["table.csv"]


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


def test_provenance_says_where_a_number_is_from() -> None:
    record = provenance("cpu", 42, {"lengths": [256], "output": Path("rows.jsonl")})
    assert json.loads(json.dumps(record)) == record
    assert record["seed"] == 42 and record["cpu_count"] == os.cpu_count()
    assert record["arguments"] == {"lengths": [256], "output": "rows.jsonl"}
    assert record["versions"]["torch"] and record["device"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])


def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("abc123", None):
        results._commit.cache_clear()
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(results, "_git", lambda *_: None)
            elsewhere.setenv("SCALED_ROPE_COMMIT", "abc123") if said else elsewhere.delenv("SCALED_ROPE_COMMIT", False)
            assert provenance("cpu", None, {})["commit"] == said
    results._commit.cache_clear()  # in the repository it is git's word that counts
    if (head := results._git("rev-parse", "HEAD")) is not None:
        monkeypatch.setenv("SCALED_ROPE_COMMIT", "abc123")
        assert str(provenance("cpu", None, {})["commit"]).startswith(head)


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


def test_rows_name_no_path_of_this_machine(tmp_path: Path) -> None:
    root = Path(results.__file__).parents[1]
    assert portable(f"{root}/out/mine/model") == "out/mine/model"
    assert portable_model("/scratch/me/run/model") == "run/model"
    assert portable_model("/model") == "model" and portable_model("org/name") == "org/name"
    assert portable("/scratch/me/rows.jsonl") == "rows.jsonl"
    for text in ("out/rows.jsonl", "NousResearch/Llama-2-7b-hf", "yarn:8,ramp=rotations", "standin:books", ""):
        assert portable(text) == text
    words = ["python", "eval/perplexity.py", "-m", f"{root}/models/tiny-llama-256", f"--output={tmp_path}/a b.jsonl"]
    assert portable_command(words) == "python eval/perplexity.py -m models/tiny-llama-256 '--output=a b.jsonl'"
    given = {"output": tmp_path / "rows.jsonl", "model": [str(root / "out"), "org/name"], "lengths": "5", "factor": 2.5}
    record = provenance("cpu", None, given)["arguments"]
    assert record == {"output": "rows.jsonl", "model": ["out", "org/name"], "lengths": "5", "factor": 2.5}
    # Folders of models keep two names: the last is often the same for all.
    given = {"adapter": "/scratch/me/long/adapter", "model": ["/scratch/me/run/model"], "evaluator": None}
    record = provenance("cpu", None, given)["arguments"]
    assert record == {"adapter": "long/adapter", "model": ["run/model"], "evaluator": None}


def test_a_place_where_no_file_can_be_made_is_told_from_one_where_it_can(tmp_path: Path) -> None:
    there = tmp_path / "rows.jsonl"
    there.write_text("{}\n")
    for path in (there, tmp_path / "new.jsonl", tmp_path / "new" / "folder" / "rows.jsonl", "/dev/null"):
        check_writable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"] and there.read_text() == "{}\n"
    with pytest.raises(ConfigError, match="rows.jsonl is no folder that can be written to"):
        check_writable(there / "x.jsonl")
    with pytest.raises(ConfigError, match="cannot be used: Is a directory"):
        check_writable(tmp_path)
    if Path("/proc/self").exists():  # all may write there, by its permissions, if root asks
        with pytest.raises(ConfigError, match="/proc is no folder that can be written to"):
            check_writable("/proc/rows.jsonl")


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


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x1b[2Jb", "x" * 300, "out/" + "é" * 150])
def test_names_that_would_be_traps_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--output .* is not allowed; a name without line breaks") as raised:
        check_name(name, "--output")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300
    for good in ("out/my runs/rows.jsonl", "Ergebnisse/größer.jsonl", "x" * 255, "/tmp/a//b"):
        check_name(good, "--output")


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_tidied", set())
    node, dead = results._process_place(), 2**22 + 5  # beyond the largest process id
    other = f".set.{platform.node()}-0123abcd-{dead}.partial"  # of a container whose name is the same
    (tmp_path / other).mkdir()
    for name in (f".a.json.{node}-{dead}.tmp", f".a.json.{node}-{os.getppid()}.tmp", f".a.json.other-{dead}.tmp", "b"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".set.{node}-{dead}.partial").mkdir()
    (tmp_path / f".set.{node}-{dead}.partial" / "tokens.bin").write_text("x")
    write_atomic(tmp_path / "a.json", "whole")
    left = {f".a.json.{node}-{os.getppid()}.tmp", f".a.json.other-{dead}.tmp", "a.json", "b", other}
    assert {path.name for path in tmp_path.iterdir()} == left
