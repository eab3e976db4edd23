"""The recipe that comes with the advice."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaled_rope import ConfigError
from scaled_rope.advice.recipe import write_recipe
from scaled_rope.recipes.files import read_recipe
from scaled_rope.texts.packed import PackedWriter, open_rows
from scaled_rope.training.batches import check_lengths


@pytest.mark.parametrize(("parameters", "steps"), [(5_000_000, 60), (135_000_000, 100), (7_000_000_000, 400)])
def test_it_reads_back_and_fits_the_size(tmp_path: Path, parameters: int, steps: int) -> None:
    path = tmp_path / "recipe.yaml"
    spec = "yarn:8,attention_factor=1.09"
    write_recipe(path, "some/model", parameters, spec, 2048, "my books/", [256, 2048])
    recipe = read_recipe(str(path))
    assert (recipe.model, recipe.scaling, recipe.sequence_length) == ("some/model", spec, 2048)
    assert recipe.max_train_steps == steps and recipe.dataset == f"{tmp_path}/rows-2048"
    (command,) = recipe.prepare
    assert "--dataset 'my books/' --tokenizer some/model --sequence-length 2048" in command
    assert recipe.evaluate["scalings"] == ["default", spec] and "--lengths 256,2048" in recipe.evaluate["passkey"]


def test_it_claims_a_length_that_its_scaling_does_not_say(tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    assert write_recipe(place, "some/model", 1, "llama3:16", 2048, "my", [256]).max_position_embeddings is None
    recipe = write_recipe(place, "some/model", 1, "llama3:16", 2048, "my", [256], context=2048)
    assert recipe.max_position_embeddings == 2048


def test_texts_that_come_with_the_project_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", "some/model", 1, "yarn:8", 2048, "books", [256])
    assert recipe.prepare[0] == "python -m scaled_rope.texts.corpora fetch books --output data/cache/books"
    assert "--dataset data/cache/books/train" in recipe.prepare[1]


def test_a_packed_set_is_trained_on_as_it_is(tmp_path: Path) -> None:
    """Where its rows are longer than the target they are cut: finetune.py refuses longer ones."""
    for length, cut in ((2048, None), (4096, 2048)):
        place = tmp_path / f"set-{length}"
        with PackedWriter(place, length, 10) as writer:
            writer.append([1] * length)
            writer.close({})
        recipe = write_recipe(tmp_path / "recipe.yaml", "some/model", 1, "yarn:8", 2048, str(place), [256])
        assert (recipe.prepare, recipe.dataset, recipe.truncate) == ((), str(place), cut)
        check_lengths(open_rows(recipe.dataset), recipe)


def test_the_split_that_was_read_is_trained_on(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"test": [[1] * 40], "train": [[1] * 20]}
    tables = {name: datasets.Dataset.from_dict({"input_ids": rows}) for name, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    place, saved = tmp_path / "recipe.yaml", str(tmp_path / "saved")
    recipe = write_recipe(place, "some/model", 1, "yarn:8", 32, saved, [4], split="test")
    assert (recipe.prepare, recipe.dataset, recipe.truncate) == ((), f"{saved}/test", 32)
    assert open_rows(recipe.dataset).longest == 40
    # Texts: the split of a hub data set; files and what comes with the project have none.
    for dataset, said in (("some/texts", True), (str(tmp_path), False), ("books", False)):
        recipe = write_recipe(place, "some/model", 1, "yarn:8", 32, dataset, [4], split="test")
        assert ("--split test" in recipe.prepare[-1]) == said


def test_what_is_no_scaling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="yan"):
        write_recipe(tmp_path / "recipe.yaml", "some/model", 1, "yan:8", 2048, "texts", [256])
    assert not (tmp_path / "recipe.yaml").exists()
