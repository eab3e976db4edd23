"""Models for images and text are evaluated, trained and saved on text like any other."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import eval.passkey as passkey
import eval.perplexity as perplexity
import finetune
from benchmarks.small_models import small_model
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.patch import patch_model, patched_scaling
from scaled_rope.texts.packed import PackedWriter
from tests.helpers.evaluators import evaluate
from tests.helpers.small_models import VOCABULARY, texts, tokenizer  # noqa: F401

TYPES = ["llava", "qwen3_vl"]
SETTINGS = {"vocab_size": VOCABULARY + 64, "bos_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    found = {}
    for model_type in TYPES:
        found[model_type] = tmp_path_factory.mktemp(model_type) / "model"
        small_model(model_type, **SETTINGS).save_pretrained(found[model_type])
        tokenizer.save_pretrained(found[model_type])
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_perplexity_of_three_scalings(
    folders: dict[str, Path],
    texts: str,  # noqa: F811
    tmp_path: Path,
    model_type: str,
) -> None:
    scalings = ("none", "yarn:4", "dynamic-yarn")
    flags = [word for spec in scalings for word in ("--scaling", spec)]
    rows = evaluate(
        perplexity.main, tmp_path / "rows.jsonl", "-m", str(folders[model_type]), *flags, "--dataset", texts,
        "--lengths", "32,160",
    )  # fmt: skip
    longest = [row for row in rows if row["length"] == 160]
    assert len(longest) == 3 and len({round(row["perplexity"], 2) for row in longest}) == 3
    model = load_model(str(folders[model_type]), device="cpu", scaling="yarn:4")
    assert patched_scaling(model) is not None and type(model).__name__.endswith("ForConditionalGeneration")


@pytest.mark.parametrize("spec", ["yarn:4", "yarn:4,ramp=rotations", "dynamic-yarn"])
def test_a_saved_patch_is_read_again(folders: dict[str, Path], tmp_path: Path, spec: str) -> None:
    model = load_model(str(folders["qwen3_vl"]), device="cpu")
    ids = torch.randint(3, 200, (1, 160), generator=torch.Generator().manual_seed(0))
    report = patch_model(model, spec)
    assert report.modules == ("model.language_model.rotary_emb",) and report.native == (spec == "yarn:4")
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = load_model(str(tmp_path), device="cpu")
        assert patched_scaling(again) in (None, report.scaling)
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=0, atol=1e-4)


def test_passkeys_are_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = evaluate(
        passkey.main, tmp_path / "rows.jsonl", "-m", str(folders["llava"]), "--scaling", "dynamic-yarn",
        "--lengths", "160", "--iterations", "2",
    )  # fmt: skip
    assert rows and all(0 <= row["accuracy"] <= 1 for row in rows if row["metric"] == "passkey")


def test_fine_tuning_on_text(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(3, 200, (4, 128))
    writer = PackedWriter(tmp_path / "packed", 128, VOCABULARY)
    for row in rows:
        writer.append(row)
    writer.close({})
    arguments = [
        "--model", str(folders["qwen3_vl"]), "--dataset", str(tmp_path / "packed"),
        "--output-dir", str(tmp_path / "out"),
        "--scaling", "yarn:2", "--sequence-length", "128", "--max-train-steps", "1", "--batch-size", "4",
        "--gradient-accumulate-every", "1", "--learning-rate", "1e-3", "--precision", "fp32", "--warmup-steps", "0",
    ]  # fmt: skip
    assert finetune.main(arguments) in (0, None)
    trained = load_model(str(tmp_path / "out" / "model"), device="cpu")
    text = trained.config.text_config
    assert text.rope_parameters["rope_type"] == "yarn" and text.rope_parameters["mrope_section"] == [4, 2, 2]
    before = load_model(str(folders["qwen3_vl"]), device="cpu", scaling="yarn:2")
    ids = torch.as_tensor(rows)
    with torch.no_grad():
        losses = [float(F.cross_entropy(m(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
                  for m in (before, trained)]  # fmt: skip
    assert math.isfinite(losses[1]) and losses[1] < losses[0]
