"""The comparison of all methods: its plan, and the tables that are made of its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods, methods_cost, methods_report
from benchmarks.methods import FACTORS, STUDIES, Study
from eval import passkey, perplexity
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import CONTROL
from scaled_rope.results import read_rows
from scaled_rope.scaling.registry import METHODS

TINY = STUDIES["tiny-llama-256"]


def test_every_method_is_compared_and_every_command_is_one() -> None:
    named = {
        spec.partition(":")[0].partition(",")[0].removeprefix("dynamic-") for f in FACTORS for spec in TINY.specs(f)
    }
    # Lists of longrope come from a search, which has a page of its own; "dynamic-ntk" is a method and a dynamic form.
    assert named | {"longrope", "dynamic-ntk"} == set(METHODS)
    for study in STUDIES.values():
        for factor in FACTORS:
            labels = [methods_report.label_of(spec, study) for spec in study.specs(factor)]
            assert len(set(labels)) == len(labels)
            for script, *flags in study.commands(factor, "rows.jsonl"):
                evaluator = passkey if "passkey" in script else perplexity
                assert evaluator.build_parser().parse_args(flags).output == "rows.jsonl"


def _row(label: str, length: int, nats: list[float], **more: Any) -> dict[str, Any]:
    row = {"metric": "perplexity", "model": TINY.model, "label": label, "length": length}
    row |= {"data": {"name": "novel", "window_tokens": 512}, "protocol": {"name": "truncate"}}
    row |= {"bucket_nats": [nats], "bucket_targets": 512, "perplexity_bucket": 9.0}
    return row | more


def rows() -> list[dict[str, Any]]:
    control = {"protocol": {"name": CONTROL}}
    found = [_row("unscaled", 512, [700.0, 720.0], **control)]
    for label, within, beyond, right in (("unscaled", 700.0, 900.0, 1), ("yarn x2", 710.0, 690.0, 50)):
        found.append(_row(label, 256, [within, within]))
        found.append(_row(label, 512, [beyond, beyond + 20.0]))
        found.append({"metric": "passkey", "model": TINY.model, "label": label, "length": 512, "right": right, "n": 50})
    cost = {"metric": "cost", "model": TINY.model, "length": 512, "seconds": 2.0, "seconds_per_token": 0.1, "memory": 8}
    return [*found, cost | {"spec": "default"}, cost | {"spec": "yarn:2", "seconds": 3.0}]


def test_a_line_says_what_was_measured_and_the_best_comes_first() -> None:
    yarn, unscaled = methods_report.lines_of(rows(), TINY, 2)
    assert (yarn.spec, unscaled.spec) == ("yarn:2", "default")
    assert (yarn.found, yarn.asked) == (50, 50)
    change, short = yarn.beyond["novel"], yarn.short["novel"]
    assert change is not None and change.share == pytest.approx(2.718281828 ** (-20 / 512) - 1)
    assert short is not None and short.share == pytest.approx(2.718281828 ** (20 / 512) - 1)
    assert yarn.servers == ("vLLM", "SGLang", "llama.cpp", "transformers")
    head, _, first, second = methods_report.table_of([yarn, unscaled])
    assert head.startswith("| | passkeys | novel, against the control | up to L | time | time a token | memory |")
    assert first == "| `yarn:2` | 50/50 | −3.8 % [−3.8, −3.8] | +4.0 % | 1.5× | 1.0× | 1.0× | all |"
    assert second.startswith("| `default` | 1/50 | +118.4 %")


def test_what_is_missing_is_said() -> None:
    some = [row for row in rows() if row["metric"] == "perplexity" and row["protocol"]["name"] != CONTROL]
    for line in methods_report.table_of(methods_report.lines_of(some, TINY, 2))[2:]:
        assert "| not measured | not measured |" in line
    assert methods_report.lines_of([], TINY, 2) == [] and methods_report.page_part([]) == "\n"


def test_the_part_between_the_marks_is_replaced() -> None:
    page = f"a\n{methods_report.BEGIN}old{methods_report.END}b\n"
    new = methods_report.rewritten(page, rows())
    assert new.startswith("a\n") and new.endswith("b\n") and "old" not in new and "`yarn:2`" in new
    assert methods_report.rewritten(new, rows()) == new
    with pytest.raises(ConfigError, match="has no place for this"):
        methods_report.rewritten("a page without marks\n", rows())


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--factors", "3"], "unknown factor '3'"), (["--model", "x"], "unknown model 'x'")):
        assert run_cli(lambda arguments=arguments: methods.main(arguments)) == 2
        assert said in capsys.readouterr().err


def test_rows_go_where_the_caller_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluators are run in another folder."""
    asked: list[Any] = []
    monkeypatch.setattr(methods, "run", asked.append)
    monkeypatch.chdir(tmp_path)
    for output, wanted in ((["--output", "rows.jsonl"], tmp_path / "rows.jsonl"), ([], methods_report.ROWS)):
        asked.clear()
        assert methods.main(["--factors", "2", *output]) == 0 and len(asked) == 3
        assert {command[command.index("--output") + 1] for command in asked} == {str(wanted)}


def test_the_page_is_what_the_rows_say() -> None:
    assert methods_report.main(["--check"]) == 0, "run python benchmarks/methods_report.py"


def test_costs_are_measured_once_and_tell_methods_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that rotates its cached keys at each step takes longer for a token than plain attention."""
    monkeypatch.setattr(methods_cost, "return_what_is_freed", lambda: None)  # it would make later tests slower
    output = str(tmp_path / "rows.jsonl")
    monkeypatch.setattr(Study, "specs", lambda self, factor: ("default", "rerope,window=128"))
    assert methods_cost.main(["--factors", "4", "--rounds", "1", "--output", output]) == 0
    plain, changed = read_rows(output)
    assert (plain["spec"], plain["length"], plain["model"]) == ("default", 1024, TINY.model)
    assert changed["seconds_per_token"] > 1.2 * plain["seconds_per_token"] > 0
    assert plain["seconds"] > 0 and "memory" in plain  # what is resident already is counted as nothing
    assert methods_cost.main(["--factors", "4", "--rounds", "1", "--output", output]) == 0
    assert len(read_rows(output)) == 2


def test_what_is_freed_is_no_longer_resident() -> None:
    """In a process of its own: without the settings, glibc keeps blocks below 128 KiB that lie under a used one."""
    program = """
import torch
from benchmarks.common import resident_bytes
from benchmarks.methods_cost import return_what_is_freed
for settings in (lambda: None, return_what_is_freed):
    settings()
    held = [torch.ones(20_000) for _ in range(1000)]  # 80 KB each
    kept = held[::10]
    before = resident_bytes()[0]
    del held
    print(before - resident_bytes()[0])
    del kept
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=methods.ROOT)
    before, after = map(int, run.stdout.split())
    assert after > 70e6 > 10e6 > before


def test_costs_refuse_no_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: methods_cost.main(["--rounds", "0"])) == 2
    assert "rounds 0 is not allowed; at least 1" in capsys.readouterr().err
