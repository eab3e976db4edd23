"""Mixtures of sources, each with its share of a budget of tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from scaled_rope.errors import ConfigError
from scaled_rope.texts.documents import is_sampled
from scaled_rope.texts.mixtures import read_mixture
from scaled_rope.texts.packed import open_packed
from tests.helpers.packing import tokenize

#: digits are tokens of their own, so a source is known by the digit that its documents are made of
DIGITS = {"short": 1, "long": 2, "middle": 3}


def sources(folder: Path) -> dict[str, list[int]]:
    """Three files of documents and the number of tokens of each of their documents."""
    rng = random.Random(0)
    sizes = {
        "short": [rng.randrange(3, 12) for _ in range(600)],
        "long": [rng.choice([90, 200, 310]) for _ in range(30)],
        "middle": [rng.randrange(20, 60) for _ in range(60)],
    }
    for name, counts in sizes.items():
        lines = [json.dumps({"text": str(DIGITS[name]) * count}) for count in counts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return sizes


def mix(folder: Path, tokenizer_dir, tokens: object, entries: list[dict], *more: object, name: str = "set", **rest):
    content = {"tokens": tokens, "sources": [{"dataset": str(folder / f"{e.pop('of')}.jsonl")} | e for e in entries]}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(content | rest))
    return tokenize("--mixture", folder / "mixture.yaml", "--tokenizer", tokenizer_dir, "--sequence-length", 64,
                    "--num-proc", 1, "--output", folder / name, *more)  # fmt: skip


def tokens_of(data, tokenizer_dir) -> dict[str, int]:
    from scaled_rope.checkpoint import load_tokenizer

    digits = load_tokenizer(str(tokenizer_dir)).convert_tokens_to_ids([str(digit) for digit in DIGITS.values()])
    return {name: int((data.tokens == token).sum()) for name, token in zip(DIGITS, digits, strict=True)}


def test_every_source_gets_its_share_at_every_point(tmp_path, tokenizer_dir, capsys):
    sizes = sources(tmp_path)
    entries = [{"of": "short", "fraction": 0.5}, {"of": "long", "fraction": 0.3}, {"of": "middle", "fraction": 0.2}]
    assert mix(tmp_path, tokenizer_dir, 4000, entries) == 0
    data = open_packed(tmp_path / "set")
    rows = data.meta["per_source"]
    assert 4000 <= data.meta["tokens"] <= 4000 + sum(max(counts) + 2 for counts in sizes.values())
    for row, target in zip(rows, (2000, 1200, 800), strict=True):
        assert target <= row["tokens"] < target + max(sizes[Path(row["dataset"]).stem]) + 2
        assert row["passes"] == 1 and row["documents"] > 0
    # documents in their order, none twice
    starts = [*data.borders.tolist(), data.tokens.size]
    stream = data.tokens.reshape(-1)
    taken = {digit: [] for digit in "123"}
    from scaled_rope.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    for begin, end in zip(starts[:-2], starts[1:-1], strict=True):
        text = tokenizer.decode(stream[begin + 1 : end - 1].tolist())
        taken[text[0]].append(len(text))
    for name, digit in DIGITS.items():
        assert taken[str(digit)] == sizes[name][: len(taken[str(digit)])]
    half = data.tokens[: len(data) // 2]
    share = (half == tokenizer.convert_tokens_to_ids("2")).sum() / half.size
    assert share == pytest.approx(0.3, abs=310 / half.size)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[:4] == ["dataset", "fraction", "share", "documents"] and len(said) == 5
    assert str(rows[1]["tokens"]) in said[3].split()


def test_mixing_again_gives_the_same_and_another_mixture_is_another_set(tmp_path, tokenizer_dir, capsys):
    sources(tmp_path)

    def entries():
        return [{"of": "short", "fraction": 0.4, "keep": 0.8}, {"of": "long", "fraction": 0.6}]

    for name, processes in (("one", 1), ("two", 2)):
        assert mix(tmp_path, tokenizer_dir, 3000, entries(), "--num-proc", processes, name=name) == 0
    one, two = open_packed(tmp_path / "one"), open_packed(tmp_path / "two")
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.borders, two.borders)
    assert one.meta == two.meta
    capsys.readouterr()
    assert mix(tmp_path, tokenizer_dir, 3000, entries(), name="one") == 0
    assert "already there" in capsys.readouterr().out
    assert mix(tmp_path, tokenizer_dir, 3001, entries(), name="one") == 2
    assert "made otherwise" in capsys.readouterr().err
    assert mix(tmp_path, tokenizer_dir, 3000, entries(), name="seed", seed=7) == 0
    assert not np.array_equal(open_packed(tmp_path / "seed").tokens, one.tokens)


def test_length_bins_and_repeats(tmp_path, tokenizer_dir):
    sizes = sources(tmp_path)
    entries = [{"of": "short", "fraction": 0.5, "max_tokens": 8, "repeats": 3},
               {"of": "long", "fraction": 0.5, "min_tokens": 200}]  # fmt: skip
    kept = [size for size in sizes["short"] if size <= 8]
    tokens = 4 * (sum(kept) + 2 * len(kept))  # the half of it is twice the source
    long = [size for size in sizes["long"] if size >= 200]
    assert sum(long) > tokens / 2 * 0.5
    entries[1]["repeats"] = 9
    assert mix(tmp_path, tokenizer_dir, tokens, entries) == 0
    short, far = open_packed(tmp_path / "set").meta["per_source"]
    assert short["passes"] == 2 and short["documents"] == 2 * len(kept) and short["tokens"] == tokens / 2
    assert short["too_long"] == len(sizes["short"]) - len(kept) and short["too_short"] == 0
    assert far["too_short"] >= 1 and far["too_long"] == 0


def test_best_fit_of_long_and_short_documents(tmp_path, tokenizer_dir, capsys):
    sizes = sources(tmp_path)
    entries = [{"of": "short", "fraction": 0.5}, {"of": "long", "fraction": 0.3}, {"of": "middle", "fraction": 0.2}]
    assert mix(tmp_path, tokenizer_dir, 4000, entries, "--packing", "best-fit") == 0
    meta = open_packed(tmp_path / "set").meta
    short, long, middle = meta["per_source"]
    assert (short["cut_documents"], middle["cut_documents"]) == (0, 0)
    assert long["cut_documents"] == long["documents"]  # each is longer than a row
    assert meta["dropped_tokens"] == 0 and meta["padding_tokens"] == meta["rows"] * 64 - meta["tokens"]
    assert meta["rows"] <= -(-meta["tokens"] // 64) + 1  # one more than there must be
    counted = tokens_of(open_packed(tmp_path / "set"), tokenizer_dir)
    for name, row in zip(("short", "long", "middle"), (short, long, middle), strict=True):
        assert counted[name] == row["tokens"] - 2 * row["documents"] == sum(sizes[name][: row["documents"]])
    assert "of padding beside them" in capsys.readouterr().out


def test_keep_is_a_share_of_documents_by_the_seed(tmp_path, tokenizer_dir):
    sizes = sources(tmp_path)
    assert mix(tmp_path, tokenizer_dir, 1500, [{"of": "short", "fraction": 1, "keep": 0.5}], seed=3) == 0
    (row,) = open_packed(tmp_path / "set").meta["per_source"]
    kept = [size + 2 for number, size in enumerate(sizes["short"]) if is_sampled(3, 0, number, 0.5)]
    assert row["tokens"] == sum(kept[: row["documents"]])


def test_a_chat_can_be_a_source(tmp_path, tokenizer_dir):
    sources(tmp_path)
    rows = [json.dumps({"p": "There is", "c": " an info"})] * 50
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    entries = [{"of": "pairs", "fraction": 0.2, "prompt": "p", "completion": "c"}, {"of": "short", "fraction": 0.8}]
    assert mix(tmp_path, tokenizer_dir, 2000, entries) == 0
    data = open_packed(tmp_path / "set")
    assert data.weighted and 0 < (data.loss_weight == 0).mean() < 0.2


def test_a_source_with_too_few_tokens_is_refused_with_what_would_do(tmp_path, tokenizer_dir, capsys):
    sizes = sources(tmp_path)
    total = sum(sizes["long"]) + 2 * len(sizes["long"])
    entries = [{"of": "long", "fraction": 0.5}, {"of": "short", "fraction": 0.5, "repeats": 20}]
    assert mix(tmp_path, tokenizer_dir, 5 * total, [dict(e) for e in entries]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"long.jsonl has {total} tokens" in said
    assert f"repeats 3, or tokens {2 * total} at most" in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []  # nothing is left of it
    entries[0]["repeats"] = 3
    assert mix(tmp_path, tokenizer_dir, 5 * total, [dict(e) for e in entries]) == 0
    assert mix(tmp_path, tokenizer_dir, 100, [{"of": "short", "fraction": 1, "min_tokens": 99}], name="no") == 2
    assert "has 0 tokens in documents of 99 to any number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokens: 0\n", "tokens = 0 is not allowed; a whole number above 0"),
        ("tokens: 1.5\n", "tokens = 1.5 is not allowed"),
        ("tokens: many\n", "tokens = 'many' is not allowed"),
        ("tokens: .inf\n", "tokens = inf is not allowed"),
        ("seed: -1\n", "seed = -1 is not allowed"),
        ("sources: []\n", "sources = [] is not allowed; a list of sources"),
        ("sources: [a]\n", "source 1 = 'a' is not allowed; a block"),
        ("sources: [{dataset: a}]\n", "source 1: fraction = None is not allowed"),
        ("sources: [{dataset: a, fraction: 0}]\n", "source 1: fraction = 0 is not allowed; a share of the tokens"),
        ("sources: [{dataset: a, fraction: 2}]\n", "to read a source several times, give it repeats"),
        ("sources: [{dataset: a, fraction: 0.5}]\n", "the fractions sum to 0.5; they are shares of the tokens, so 1"),
        ("sources: [{fraction: 1}]\n", "dataset = None is not allowed"),
        ("sources: [{dataset: a, fraction: 1, min_tokens: 5, max_tokens: 4}]\n", "no less than min_tokens (5)"),
        ("sources: [{dataset: a, fraction: 1, min_tokens: -5}]\n", "min_tokens = -5 is not allowed; 0 or more"),
        ("sources: [{dataset: a, fraction: 1, repeats: 0}]\n", "repeats = 0 is not allowed"),
        ("sources: [{dataset: a, fraction: 1, keep: 1.5}]\n", "keep = 1.5 is not allowed"),
        ("sources: [{dataset: a, fraction: 1, prompt: p}]\n", "source 1: completion is missing"),
        ("sources: [{dataset: a, fraction: 1, messages: m, feature: t}]\n", "it is for texts, and this source has m"),
        ("sources: [{dataset: a, fraction: 1, minimum: 2}]\n", "unknown field of mixture"),
        ("token: 5\n", "did you mean 'tokens'?"),
    ],
)
def test_what_is_wrong_in_a_mixture_is_said_in_one_line(tmp_path, change, message):
    name = change.partition(":")[0]
    default = {"tokens": "tokens: 20e9\n", "sources": "sources: [{dataset: a, fraction: 1}]\n"}
    (tmp_path / "m.yaml").write_text("".join(line for key, line in default.items() if key != name) + change)
    with pytest.raises(ConfigError) as caught:
        read_mixture(tmp_path / "m.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_may_be_written_short(tmp_path):
    (tmp_path / "m.yaml").write_text("tokens: 20e9\nsources: [{dataset: a, fraction: 1, min_tokens: 64e3}]\n")
    mixture = read_mixture(tmp_path / "m.yaml")
    assert (mixture.tokens, mixture.sources[0].min_tokens) == (20_000_000_000, 64_000)
    with pytest.raises(ConfigError, match="nothing.yaml does not exist"):
        read_mixture(tmp_path / "nothing.yaml")


def test_flags_that_do_not_go_with_a_mixture(tmp_path, tokenizer_dir, capsys):
    sources(tmp_path)
    whole = [{"of": "short", "fraction": 1}]
    assert mix(tmp_path, tokenizer_dir, 500, [dict(whole[0])], "--messages", "m") == 2
    assert "--messages is not allowed with --mixture" in capsys.readouterr().err
    assert mix(tmp_path, tokenizer_dir, 500, whole, "--dataset", tmp_path / "short.jsonl") == 2
    assert "name either --dataset or --mixture" in capsys.readouterr().err


def test_a_source_on_disk_has_no_split(tmp_path: Path, tokenizer_dir, capsys) -> None:
    sources(tmp_path)
    assert mix(tmp_path, tokenizer_dir, 100, [{"of": "short", "fraction": 1.0, "split": "test"}]) == 0
    assert "short.jsonl has no splits: all of it is read, not 'test' alone" in capsys.readouterr().err
