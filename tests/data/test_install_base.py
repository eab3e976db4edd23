"""Installing a trained base as the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import install_base
from scaled_rope.command_line import run_cli


def test_files_and_log_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = tmp_path / "run", tmp_path / "models"
    (run / "model").mkdir(parents=True)
    words = [str(run), "--output", str(output)]
    assert run_cli(lambda: install_base.main(words)) == 2
    assert "is not there or not finished" in capsys.readouterr().err
    rows = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "tokens": 10} for step in (1, 2, 3)]
    (run / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in install_base.FILES:
        (run / "model" / name).write_text(name)
    save_file({"weight": torch.tensor([1.0, 1 / 3])}, run / "model" / install_base.WEIGHTS)
    (run / "model" / "README.md").write_text("the run's card")
    assert install_base.main(words) == 0
    assert sorted(file.name for file in output.iterdir()) == sorted(
        [*install_base.FILES, "training.jsonl", "training.png"]
    )
    assert (output / "training.jsonl").read_text() == (run / "train_log.jsonl").read_text()
    stored = load_file(output / install_base.WEIGHTS)["weight"]
    assert stored.dtype == torch.bfloat16 and stored.tolist() == [1.0, 0.333984375]
    (run / "model" / "config.json").unlink()
    assert run_cli(lambda: install_base.main(words)) == 2
    assert "not finished: no config.json" in capsys.readouterr().err
