"""Which names of data are local, and the places of records."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.texts.documents import is_local, read_json_lines


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
