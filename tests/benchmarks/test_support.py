"""The rows of benchmarks/support.sh and the page that shows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import support
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows
from scaled_rope.versions import LEAST
from tests.helpers import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_decode" name="test_one[a]" time="1.6"/>
<testcase classname="tests.kernels.test_decode" name="test_two" time="1"><failure message="x">y</failure></testcase>
<testcase classname="tests.test_versions" name="test_three" time="0.1"><skipped message="x"/></testcase>
<testcase classname="tests.test_versions" name="test_four" time="0.1"><error message="x"/></testcase>
</testsuite></testsuites>"""


def test_a_report_of_pytest_is_counted(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    found = support.counts(tmp_path / "report.xml")
    failing = ["kernels.test_decode::test_two", "test_versions::test_four"]
    assert found == {"passed": 1, "skipped": 1, "failed": 2, "failing": failing, "seconds": 3}
    (tmp_path / "report.xml").write_text("<testsuites>")
    for name in ("report.xml", "nothing.xml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            support.counts(tmp_path / name)


def test_the_table_has_the_last_row_of_each_combination_and_names_what_failed() -> None:
    packages = {"transformers": "5.17.0", "torch": "2.13.0", "triton": "3.6.0", "numpy": "2.5.5"}
    source = {"commit": "0123456789", "versions": {"python": "3.12.1"}, "device": "a processor"}
    row = {"name": "old", "packages": packages, "passed": 5, "skipped": 1, "provenance": source}
    rows = [row | {"failed": 1, "failing": ["a::b"]}, row | {"failed": 0, "failing": []}]
    last = "| old | 3.12.1 | 5.17.0 | 2.13.0 | 3.6.0 | 2.5.5 | 5 | 1 | 0 | 0123456, a processor |"
    assert support.table(rows).splitlines()[2:] == [last]
    assert "| 1: a::b |" in support.table(rows[:1])


def test_the_page_shows_the_rows_and_the_versions_that_are_refused() -> None:
    done = subprocess.run([sys.executable, "benchmarks/support.py", "--check"], cwd=ROOT, timeout=60)
    assert done.returncode == 0, "run python benchmarks/support.py"
    page = support.PAGE.read_text(encoding="utf-8")
    for package, version in LEAST.items():
        assert f"{package} {version} or newer" in page
    oldest = next(row for row in reversed(read_rows(support.ROWS)) if row["name"] == "oldest")
    assert oldest["packages"]["transformers"].startswith(LEAST["transformers"] + ".")


@pytest.mark.parametrize("words", [["--help"], ["ancient"]], ids=" ".join)
def test_the_script_explains_itself_and_knows_its_combinations(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/support.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if words == ["--help"]:
        assert done.returncode == 0 and "./benchmarks/support.sh oldest newest" in done.stdout
    else:
        assert (done.returncode, done.stderr) == (2, "error: ancient is not allowed; oldest, newest or gpu-image\n")
