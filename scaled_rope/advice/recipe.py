"""A recipe that fine-tunes a model under the scaling that was advised, ready to run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.texts.corpora import CORPORA
from scaled_rope.texts.documents import is_local
from scaled_rope.texts.packed import open_rows
from scaled_rope.texts.token_documents import is_tokenized

_SIZES: tuple[tuple[float, dict[str, Any]], ...] = (
    (5e7, {"global_batch_size": 4, "max_train_steps": 60, "warmup_steps": 6, "learning_rate": 3e-4, "precision": "auto",
           "gradient_checkpointing": False}),
    (1e9, {"global_batch_size": 8, "max_train_steps": 100, "warmup_steps": 10, "learning_rate": 1e-4}),
    (float("inf"), {"global_batch_size": 64, "max_train_steps": 400, "warmup_steps": 20, "learning_rate": 2e-5}),
)  # fmt: skip
"""Settings by number of parameters: those of the recipes `demo`, `smollm2-135m-16k` and of the paper."""


def write_recipe(
    path: Path,
    model: str,
    parameters: int,
    spec: str,
    target: int,
    dataset: str,
    lengths: list[int],
    before: str = "default",
    feature: str = "text",
    split: str = "train",
    original: int | None = None,
    context: int | None = None,
) -> Recipe:
    """Write the recipe, and read it back as train.sh will.

    Args:
        parameters: of the model, which decide on batch, steps and rate.
        spec: the scaling to train with.
        target: tokens of a sequence.
        dataset: the texts or the packed set that the advice was measured on.
        lengths: to evaluate at, in tokens.
        before: the scaling of the model as it is, which is evaluated beside it.
        feature: the field of the texts that was read.
        split: the one to train on, of a hub data set or of a saved one that has several.
        original: L in tokens where what the config says was corrected.
        context: tokens that the trained config is to claim, where its scaling does not say them; None: it does.

    Raises:
        ConfigError: what was written is no recipe, or the data set cannot be opened; no file is left then.
    """
    settings = next(values for most, values in _SIZES if parameters < most)
    folder = path.parent
    if is_tokenized(dataset):
        # The folder of a split is a saved table itself, and training reads no split by name.
        prepared = f"{dataset.rstrip('/')}/{split}" if (Path(dataset) / "dataset_dict.json").is_file() else dataset
        prepare, cut = [], {"truncate": target} if open_rows(prepared).longest > target else {}
    else:
        prepared, cut = f"{folder}/rows-{target}", {}
        prepare = _prepare(dataset, feature, split, model, target, prepared)
    fields = {
        "description": f"{Path(model).name} to {target} tokens, under the scaling that scaled-rope advise chose",
        "model": model,
        "scaling": spec,
        **({} if original is None else {"original_max_position_embeddings": original}),
        **({} if context is None else {"max_position_embeddings": context}),
        **({"prepare": prepare} if prepare else {}),
        "dataset": prepared,
        "sequence_length": target,
        **cut,
        **settings,
        "lr_schedule": "linear",
        "grad_norm": 1.0,
        "checkpointing_steps": 20,
        "output_dir": f"{folder}/trained",
        "evaluate": {
            "scalings": [before, spec],
            "passkey": f"--lengths {','.join(map(str, lengths))} --iterations 10",
        },
    }
    write_atomic(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
    try:
        recipe = read_recipe(str(path))
        if recipe.scaling != spec or recipe.sequence_length != target:
            raise ConfigError(f"recipe {path} does not read back as it was written")
    except ConfigError:
        path.unlink()
        raise
    return recipe


def _prepare(dataset: str, feature: str, split: str, model: str, target: int, output: str) -> list[str]:
    """The commands that turn texts into sequences."""
    commands, source = [], dataset
    if dataset in CORPORA and not Path(dataset).exists():
        place = f"data/cache/{dataset}"
        commands.append(shlex.join(["python", "-m", "scaled_rope.texts.corpora", "fetch", dataset, "--output", place]))
        source = f"{place}/train"
    words = ["python", "tokenization.py", "--dataset", source, "--tokenizer", model]
    words += [] if feature == "text" else ["--feature", feature]
    of_hub = source == dataset and not is_local(dataset)
    words += ["--split", split] if of_hub and split != "train" else []
    words += ["--sequence-length", str(target), "--bookend", "chunk", "--output", output]
    return [*commands, shlex.join(words)]
