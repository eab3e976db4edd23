"""Too old a torch or transformers is refused in one line by what needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaled_rope import versions
from scaled_rope.errors import ConfigError
from tests.helpers import ROOT

TOO_OLD = [("transformers", "4.57.3"), ("transformers", "5.0.0rc1"), ("torch", "2.6.0+cu124")]


@pytest.fixture
def pretending(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """An environment in which a package says that it has another version."""
    package, version = request.param
    folder = tmp_path / f"{package}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    said = f"scaled-rope needs {package} >= {versions.LEAST[package]}, this is {version}"
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SAID": said}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("pretending", TOO_OLD, ids=str, indirect=True)
def test_a_command_that_cannot_work_says_so_in_one_line(pretending: dict[str, str]) -> None:
    for words in (("-m", "scaled_rope", "inspect", "models/tiny-llama-256"), ("eval/passkey.py", "--lengths", "128")):
        done = run(pretending, *words)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {pretending['SAID']}\n"), words


@pytest.mark.parametrize("pretending", TOO_OLD, ids=str, indirect=True)
def test_an_import_says_so_and_what_needs_neither_works(pretending: dict[str, str]) -> None:
    done = run(pretending, "-c", "from scaled_rope import patch_model")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(pretending["SAID"])
    assert run(pretending, "-m", "scaled_rope", "methods").returncode == 0
    assert run(pretending, "-m", "scaled_rope.recipes", "--list").returncode == 0


def test_what_is_installed_here_is_new_enough_and_what_is_not_installed_is_left_to_the_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions.check_versions(*versions.LEAST)
    monkeypatch.setitem(versions.LEAST, "no-such-package", "9.9")
    versions.check_versions("no-such-package")
    for version, fits in (("2.9", True), ("2.10.0.dev1", True), ("3.0", True), ("2.8.9", False), ("1.13", False)):
        monkeypatch.setattr(versions.importlib.metadata, "version", lambda _, version=version: version)
        if fits:
            versions.check_versions("torch")
        else:
            with pytest.raises(ConfigError, match=re.escape(f"needs torch >= 2.9, this is {version}")):
                versions.check_versions("torch")
