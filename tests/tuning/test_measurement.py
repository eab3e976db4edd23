"""Windows, and rows that are measured once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tqdm import tqdm

from scaled_rope import RopeScaling, patch_model
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.results import read_rows
from scaled_rope.texts.packed import PackedWriter
from scaled_rope.tuning import measurement
from scaled_rope.tuning.measurement import Answers, RowStore, check_target, cut_windows
from tests.helpers.models import Make
from tests.helpers.tuning import IDENTITY, start


def test_windows(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [np.arange(1, 9), np.arange(100, 125), np.concatenate([[0], np.arange(200, 230)]), np.arange(300, 400)]

    def cut(length: int, **changes: Any) -> list[tuple[int, int, list[int]]]:
        settings: dict[str, Any] = {"bos": 0, "wanted": 2, "each": 2} | changes
        found = cut_windows(iter(texts), length, **settings)
        return [(window.document, window.start, window.tokens.tolist()) for window in found]

    ten = cut(11)
    assert ten == [
        (1, 0, [0, *range(100, 110)]),
        (1, 12, [0, *range(112, 122)]),
        (2, 0, [0, *range(200, 210)]),  # its own BOS is not doubled
        (2, 15, [0, *range(215, 225)]),
    ]
    assert [(doc, start, tokens[:6]) for doc, start, tokens in ten] == cut(6, wanted=3)[1:]  # shorter: beginnings
    assert cut(11, bos=None, each=1)[0] == (1, 0, [*range(100, 111)])
    assert len(cut(11, wanted=None)) == 6
    assert len(cut(11, wanted=None, most=3)) == 4  # a document's windows are not parted
    texts[3:3] = [texts[2][1:].copy()]  # the same without its BOS
    assert [document for document, _, _ in cut(11, wanted=3, each=1)] == [1, 2, 4]
    assert "document 4 has the tokens of document 3 and is left out" in capsys.readouterr().err
    del texts[3]
    with pytest.raises(ConfigError, match="only 3 of 4 documents have 11 tokens; --documents asks for 4"):
        cut(11, wanted=4)
    with pytest.raises(ConfigError, match="only 0 of 4 documents have 200 tokens; at least 1"):
        cut(200, wanted=None)
    with pytest.raises(ConfigError, match="at least 1 is needed: longer texts"):
        cut(200, wanted=None, hint="longer texts")


@pytest.mark.parametrize(("unused", "word"), [(True, "train"), (False, "held")])
def test_the_part_of_a_corpus(unused: bool, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fitted is fitted on text that no test uses."""
    monkeypatch.chdir(tmp_path)
    for part, text in (("train", "train"), ("heldout", "held")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "text.txt").write_text(text)
    monkeypatch.setattr(measurement, "fetch", lambda name, output: tmp_path)
    monkeypatch.setattr(measurement, "encode", lambda tokenizer, text: list(text.encode()))
    args = argparse.Namespace(dataset="books", feature="text", split="test")
    (found,) = measurement.documents(args, None, unused)
    assert bytes(found.tolist()).decode() == word


def test_windows_hold_no_padding(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "set", 8, 100, weighted=True) as writer:
        for first, size in ((10, 8), (20, 5)):
            weights = [int(place < size) for place in range(8)]
            writer.append(
                [first + place if place < size else 2 for place in range(8)], weights, [0, size][: 1 + (size < 8)]
            )
        writer.close({"packing": "best-fit"})
    args = argparse.Namespace(dataset=str(tmp_path / "set"), feature="text", split="test")
    found = cut_windows(measurement.documents(args, None, True), 6, None, None, 1)
    assert [one.tokens.tolist() for one in found] == [[*range(10, 16)]]  # the other row is too short without it


def prompt(seed: int, answer: int = 3) -> PasskeyPrompt:
    ids = np.random.default_rng(seed).integers(1, 60, 40).tolist()
    return PasskeyPrompt(ids[:-answer], ids[-answer:], 123456, 0.5, len(ids), 20)


def test_answers_are_asked_once_and_kept(tmp_path: Path) -> None:
    asked = []

    def ask(scaling: RopeScaling, one: PasskeyPrompt) -> tuple[float, bool]:
        asked.append((scaling.factor, one.input_ids[0]))
        return 3 * len(one.answer_ids) * scaling.factor, scaling.factor == 2

    for _ in range(2):
        answers = Answers(RowStore(tmp_path / "rows.jsonl", {"seed": 0}, tqdm(disable=True)), IDENTITY, ask)
        prompts = [prompt(0), prompt(1)]
        found = {factor: answers.measure(start(factor), prompts) for factor in (2, 4)}
    assert len(asked) == 4 == len(read_rows(tmp_path / "rows.jsonl"))
    assert [one.right for one in found[2] + found[4]] == [True, True, False, False]
    assert [one.probability for one in found[4]] == pytest.approx([np.exp(-12)] * 2)
    answers = Answers(answers.store, IDENTITY, lambda scaling, one: (float("inf"), False))
    with pytest.raises(ConfigError, match="not finite"):
        answers.measure(start(8), [prompt(0)])


@torch.inference_mode()
def test_an_answer_is_scored_as_its_definition_says(tiny_model: Make) -> None:
    scaling, one = start(2), prompt(0)

    class Load:
        def __call__(self, job: Any) -> Any:
            model = tiny_model()
            patch_model(model, job.scaling)
            return model

    job = ModelJob("m", "", scaling, False, 16, "float32", "m")
    nats, right = measurement.model_ask(Load(), job)(scaling, one)  # type: ignore[arg-type]
    model = tiny_model()
    patch_model(model, scaling)
    ids = torch.tensor([one.input_ids + one.answer_ids])
    expected = F.cross_entropy(model(ids).logits[0, -4:-1], ids[0, -3:], reduction="sum")
    assert nats == pytest.approx(float(expected), rel=1e-4)  # float32, another order of operations
    assert right is False
    # Greedy decoding gives what greedy decoding gave.
    greedy = list(one.input_ids)
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    other = PasskeyPrompt(one.input_ids, greedy[-3:], 0, 0.5, len(greedy), 20)
    assert measurement.model_ask(Load(), job)(scaling, other)[1] is True  # type: ignore[arg-type]


def test_targets() -> None:
    assert check_target(64, 65, "m") == 64
    with pytest.raises(ConfigError, match=r"--target 64 is not allowed; m reads 64 tokens as it is, so more than 64"):
        check_target(64, 64, "m")
    with pytest.raises(ConfigError, match="trained length of m is not known"):
        check_target(None, 64, "m")
