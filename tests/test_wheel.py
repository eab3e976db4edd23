"""A wheel in an environment that has third-party packages, and nothing of the checkout, has what its commands need.

`benchmarks/support.sh` does the same in an environment that is empty, where pip installs what the wheel asks for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from scaled_rope.bundled import FOLDERS
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with the installed wheel."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("scaled_rope", *FOLDERS):
        # "benchmarks" and "cache" are large and no part of the package
        ignored = shutil.ignore_patterns("__pycache__", "benchmarks" if name == "data" else "", "cache", "*.jsonl")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    venv.create(target, with_pip=False)
    # A folder that a .pth file adds is searched for modules, but its own .pth files are not read: the one by which
    # an editable installation makes the checkout importable has no effect here.
    (packages_of(target) / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(target / "bin" / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", str(source)]
    subprocess.run([*pip, *options], check=True, timeout=300, env=plain_environment())
    return target


def packages_of(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder of its own."""
    program = [str(installed / "bin" / command[0]), *command[1:]]
    return subprocess.run(program, cwd=folder, env=plain_environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["scaled-rope", "inspect", "MODEL"], "tiny-llama-256", marks=pytest.mark.slow),
        (["scaled-rope", "export", "MODEL", "--for", "vllm", "--scaling", "yarn:8"], "yarn"),
        pytest.param(["scaled-rope", "plan", "demo"], "demo", marks=pytest.mark.slow),
        (["scaled-rope", "methods"], "dual-chunk"),
        (["python", "-m", "scaled_rope.report.paper", "table2", "--shell"], "models"),
        (["python", "-m", "scaled_rope.recipes", "--list"], "llama-2-7b-64k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_of_the_wheel(installed: Path, tmp_path: Path, words: list[str], said: str) -> None:
    model = str(packages_of(installed) / "scaled_rope/_files/models/tiny-llama-256")
    done = run(installed, tmp_path, *(model if word == "MODEL" else word for word in words))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert str(ROOT) not in done.stdout


def test_the_wheel_is_what_was_run_and_nothing_of_the_checkout_can_be_imported(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.util as u, scaled_rope; from scaled_rope.bundled import bundled\n"
        "print(scaled_rope.__file__, bundled('configs'))\n"
        "print([name for name in ('finetune', 'tokenization', 'truncate') if u.find_spec(name)])"
    )
    done = run(installed, tmp_path, "python", "-c", program)
    places, importable = done.stdout.splitlines()
    assert all(place.startswith(str(packages_of(installed))) for place in places.split())
    assert importable == "[]"
