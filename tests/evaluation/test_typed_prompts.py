"""Prompts from lines and a file."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.typed_prompts import prompts, read_file, typed_lines


def test_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  \ntwo"))
    assert list(prompts(None, typed_lines())) == ["one", "two"]


def test_lines_behind_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "story.txt"
    path.write_text("A story.\n\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    found = prompts(str(path), iter(["Who?", "", "Why?"]))
    assert [next(found), next(found)] == ["A story.\nWho?", "A story.\n\n"]
    path.write_text("Another.")  # it is read again every time
    assert list(found) == ["Another.\nWhy?"]
    assert list(prompts(str(path), iter([]))) == ["Another."]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=r"bytes' is not UTF-8 text \(byte 2\)"):
        read_file(str(tmp_path / "bytes"))
    with pytest.raises(ConfigError, match="nowhere' cannot be read: No such file"):
        read_file(str(tmp_path / "nowhere"))
