"""A wheel, installed away from the checkout, has what its commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scaled_rope.bundled import FOLDERS
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, and nothing else of this project."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("scaled_rope", *FOLDERS):
        # "benchmarks" and "cache" are large and no part of the package
        ignored = shutil.ignore_patterns("__pycache__", "benchmarks" if name == "data" else "", "cache", "*.jsonl")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=300)
    return target


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect"], "tiny-llama-256"),
        (["export", "--for", "vllm", "--scaling", "yarn:8"], "yarn"),
        (["plan", "demo"], "demo"),
        (["methods"], "dual-chunk"),
        (["-m", "scaled_rope.report.paper", "table2", "--shell"], "models"),
        (["-m", "scaled_rope.recipes", "--list"], "llama-2-7b-64k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_of_the_wheel(installed: Path, tmp_path: Path, words: list[str], said: str) -> None:
    command = words if words[0] == "-m" else ["-m", "scaled_rope", *words]
    if words[0] in ("export", "inspect"):
        command.insert(3, str(installed / "scaled_rope/_files/models/tiny-llama-256"))
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert str(ROOT) not in done.stdout


def test_the_wheel_is_what_was_run(installed: Path, tmp_path: Path) -> None:
    program = (
        "import scaled_rope; from scaled_rope.bundled import bundled; print(scaled_rope.__file__, bundled('configs'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert all(place.startswith(str(installed)) for place in done.stdout.split())
