"""Models under scalings, as flags name them."""

from __future__ import annotations

import argparse
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaled_rope import LayerPlan, patch_model
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import ModelLoader, model_jobs
from scaled_rope.flags.evaluators import add_model_arguments
from scaled_rope.patching.adapter_scaling import save_adapter_scaling
from scaled_rope.patching.patch import patched_plan, patched_scaling
from tests.helpers.checkpoints import (
    _truncate,
    adapter,  # noqa: F401
    checkpoint,  # noqa: F401
    logits,
    sliding,  # noqa: F401
)
from tests.helpers.models import Make


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_model_arguments(parser)
    return parser.parse_args(argv)


def test_flags_for_layers(sliding: Path, checkpoint: Path) -> None:
    flags = ["--yarn", "4", "--layers", "full_attention", "--drop-layers", "1"]
    args = parse("-m", str(sliding), *flags)
    (job,) = model_jobs(args)
    assert job.label == "yarn x4, full_attention layers only, without RoPE in 1"
    (plain,) = model_jobs(parse("-m", str(sliding), "--yarn", "4"))
    assert plain.fingerprint != job.fingerprint and plain.plan == LayerPlan()
    assert patched_plan(ModelLoader(args)(job)).drop_layers == (1,)
    for bad in (["--layers", "sliding_attention"], ["--layers", "full"], ["--drop-layers", "2"]):
        with pytest.raises(ConfigError, match="must be"):
            model_jobs(parse("-m", str(sliding), *bad))
    with pytest.raises(ConfigError, match="must be left out"):
        model_jobs(parse("-m", str(checkpoint), "--layers", "full_attention"))


@pytest.mark.parametrize(
    ("flags", "labels"),
    [
        ([], ["unscaled"]),
        (["--yarn", "8", "--linear", "4", "--ntk", "2"], ["yarn x8", "linear x4", "ntk x2"]),
        (["--dynamic-linear", "--dynamic-yarn"], ["dynamic-linear", "dynamic-yarn"]),
        (["--dynamic-yarn", "--factor", "4"], ["dynamic-yarn x4"]),
        (["--dynamic-yarn", "--factor", "4", "--finetuned"], ["dynamic-yarn x4"]),
        (["--scaling", "yarn:2", "--scaling", "linear", "--factor", "4"], ["yarn x2", "linear x4"]),
        (["--scaling", "default", "--scaling", "yarn:8", "--yarn", "8"], ["unscaled", "yarn x8"]),
    ],
)
def test_released_flags_are_scalings(checkpoint: Path, flags: list[str], labels: list[str]) -> None:
    jobs = model_jobs(parse("-m", str(checkpoint), *flags))
    assert [job.label for job in jobs] == labels


def test_jobs_of_a_fine_tuned_checkpoint(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model()
    patch_model(model, "yarn:8")
    model.save_pretrained(tmp_path / "run" / "model")
    name = str(tmp_path / "run" / "model")
    flags = ["--scaling", "checkpoint", "--scaling", "checkpoint:16", "--scaling", "default", "--dynamic-yarn"]
    jobs = model_jobs(parse("-m", name, *flags, "--finetuned"))
    labels = ["yarn x8 (checkpoint)", "yarn x16 (checkpoint)", "unscaled", "dynamic-yarn x8"]
    assert [job.label for job in jobs] == labels
    assert [job.carried for job in jobs] == [True, False, False, False]
    assert jobs[0].name == "run, yarn x8 (checkpoint)"
    job = model_jobs(parse("-m", name, "--original-max-position-embeddings", "16"))[0]
    assert job.scaling.max_position_embeddings == 128 and not job.carried


def test_flags_without_meaning_are_accepted_with_a_note(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--custom-model", "--no-use-cache", "--max-position-embeddings", "9", "--gpt-neox-max-length", "9"]
    assert len(model_jobs(parse("-m", str(checkpoint), *flags))) == 1
    assert capsys.readouterr().err.count("has no effect") == 4


def test_flags_of_the_released_scripts_name_methods(checkpoint: Path) -> None:
    flags = ["--part-ntk", "4", "--dynamic-ntk", "2", "--dynamic-part-ntk", "--dynamic-linear", "--ntk", "8"]
    scalings = [job.scaling for job in model_jobs(parse("-m", str(checkpoint), *flags))]
    assert [(one.method, one.factor, one.dynamic) for one in scalings] == [
        ("part-ntk", 4.0, False),
        ("dynamic-ntk", 2.0, False),
        ("part-ntk", 1.0, True),
        ("linear", 1.0, True),
        ("ntk", 8.0, False),
    ]


def test_bad_jobs_are_refused_before_weights_are_read(checkpoint: Path) -> None:
    _truncate(checkpoint)
    assert model_jobs(parse("-m", str(checkpoint)))  # weights are only sampled here
    for flags in (["--yarn", "0"], ["--scaling", "yam:8"], ["--dtype", "int3"], ["--adapter", "nowhere"]):
        with pytest.raises(ConfigError):
            model_jobs(parse("-m", str(checkpoint), *flags))


def test_fingerprint_follows_the_weights_only(checkpoint: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, *flags: str) -> str:
        return model_jobs(parse("-m", str(path), *flags))[0].fingerprint

    first = fingerprint(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    assert fingerprint(checkpoint, "--sliding-window-attention", "8") != first
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] *= 1.001  # same names, shapes and file size
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(checkpoint) != first


def test_loader_reads_a_checkpoint_once(checkpoint: Path, tiny_model: Make, tokens: torch.Tensor) -> None:
    args = parse("-m", str(checkpoint), "--scaling", "yarn:4", "--scaling", "default", "--device", "cpu")
    loader = ModelLoader(args)
    yarn, plain = model_jobs(args)
    reference = tiny_model()
    assert torch.equal(logits(loader(plain), tokens), logits(reference, tokens))
    shutil.rmtree(checkpoint)  # a second read would fail
    patch_model(reference, "yarn:4")
    assert torch.equal(logits(loader(yarn), tokens), logits(reference, tokens))


def test_flags(tiny_model: Make, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)

    def labels(*flags: str) -> list[str]:
        parser = ArgumentParser()
        add_model_arguments(parser)
        return [job.label for job in model_jobs(parser.parse_args(["-m", str(tmp_path), *flags]))]

    assert labels("--method", "rerope", "--window", "8") == labels("--rerope", "8") == ["rerope (window=8)"]
    assert labels("--scaling", "yarn:2", "--method", "leaky-rerope", "--window", "8", "--k", "4", "--logn") == [
        "yarn x2",
        "leaky-rerope (attention_temperature=log, window=8, k=4)",
    ]
    assert labels("--method", "self-extend", "--scaling", "rerope,window=5", "--group", "2", "--window", "8") == [
        "self-extend (group=2, window=8)",
        "rerope (window=5)",
    ]
    with pytest.raises(ConfigError, match="flag --window: is for a scaling that takes window"):
        labels("--method", "yarn:2", "--window", "8")
    with pytest.raises(ConfigError, match="attention 'eager': cannot carry method 'rerope'"):
        labels("--rerope", "8", "--attention", "eager")


def test_an_adapter_brings_its_scaling(
    checkpoint: Path,  # noqa: F811
    adapter: Path,  # noqa: F811
    tiny_model: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model()
    patch_model(model, "yarn:4", drop_layers=[1])
    flags = ["-m", str(checkpoint), "--adapter", str(adapter)]
    (job,) = model_jobs(parse(*flags))
    assert job.scaling.method == "default" and not capsys.readouterr().err
    save_adapter_scaling(model, adapter)
    (job,) = model_jobs(parse(*flags))
    assert (job.scaling, job.plan, job.carried) == (patched_scaling(model), patched_plan(model), True)
    assert job.label == "yarn x4 (checkpoint)" and "was trained under yarn x4, which is used" in capsys.readouterr().err
    (job,) = model_jobs(parse(*flags, "--scaling", "yarn:2"))
    assert job.scaling.factor == 2 and not job.carried and job.plan.drop_layers == (1,)  # as of the merged model
    assert "was trained under yarn x4, and is read under yarn x2" in capsys.readouterr().err
