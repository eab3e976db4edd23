"""Tests of registry."""

from __future__ import annotations

import json

import pytest

from scaled_rope.serving.targets.registry import TARGETS
from tests.helpers.exports import command_line


@pytest.mark.parametrize("target", TARGETS)
def test_json_output_parses(target: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(folder, "--for", target, "--scaling", "yarn:4", "--json")[1]() == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["status"], report["label"]) == ("exact", "yarn x4")
    assert report["comparisons"][0]["matches"] is True
    assert report["written"] == []
