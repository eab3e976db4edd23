"""How an inspection is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scaled_rope import RopeScaling
from scaled_rope.cli import main
from tests.helpers.published_configs import PUBLISHED, QWEN, written


def test_json_holds_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(written(tmp_path, QWEN)), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["label"] == "yarn x4" and RopeScaling.from_dict(said["scaling"]) == RopeScaling("yarn", 4, 32768, 1e6)
    assert (
        len(said["dimensions"]) == 64
        and {f["code"] for f in said["findings"]} == PUBLISHED["Qwen2.5 with the YaRN of its card"][2]
    )
    assert set(said["findings"][0]) == {"code", "level", "text", "remedy"}


def test_the_table_is_abbreviated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(written(tmp_path, QWEN))

    def rows(*flags: str) -> int:
        main(["inspect", path, *flags])
        return len(re.findall(r"^ +\d+ .* (kept|blended|interpolated)$", capsys.readouterr().out, re.MULTILINE))

    assert rows() == 16
    assert rows("--full") == 64
