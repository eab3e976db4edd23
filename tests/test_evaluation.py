"""The evaluators: losses without whole logits, perplexity, passkeys, and the report."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import eval.passkey as passkey
import eval.perplexity as perplexity
import eval.report as report
from scaled_rope import RopeScaling, patch_model
from scaled_rope.checkpoint import encode
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import passkey_evaluator, perplexity_evaluator
from scaled_rope.evaluation.passkey_prompts import FILLER, KEY_LINE, KEY_RANGE, OPENING, QUESTION, build_prompt
from scaled_rope.evaluation.windows import select, truncated
from scaled_rope.patching.loading import apply_scaling, load_model
from scaled_rope.patching.loss import IGNORE, hidden_states, shared_hidden_states, token_nll
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.results import Row, read_rows
from scaled_rope.scaling.frequencies import at_length
from scaled_rope.texts.packed import PackedWriter

ROOT = Path(__file__).parents[1]
Make = Callable[..., PreTrainedModel]
TRAINED = 64
VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the passkey prompt's words, so that prompts are short; digits are single."""
    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([OPENING, FILLER, KEY_LINE, QUESTION] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def new_model(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TRAINED,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("models") / "random"
    new_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three documents of about 1000, 600 and 100 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = [word for line in (OPENING, FILLER, QUESTION) for word in line.split()]
    for name, count in (("a", 700), ("b", 420), ("c", 60)):
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(words, count)))
    return str(folder)


def evaluate(main: Callable[[list[str]], int], output: Path, *argv: str) -> list[Row]:
    """Run an evaluator in this process and read back its rows."""
    assert main([*argv, "--device", "cpu", "--hide-progress", "--output", str(output)]) == 0
    return read_rows(output)


def measured(rows: list[Row]) -> list[Row]:
    """Rows without what differs between two runs of the same thing."""
    differ = ("provenance", "seconds", "tokens_per_second", "peak_memory")
    return [{key: value for key, value in row.items() if key not in differ} for row in rows]


# -------------------------------------------------------------------------------------------------------------- loss


def full_nll(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The textbook way: all logits at once."""
    return F.cross_entropy(model(ids).logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")


@pytest.mark.parametrize("chunk", [None, 1, 7, 96])
def test_token_nll_and_its_gradients_are_those_of_whole_logits(
    tiny_model: Make, tokens: torch.Tensor, chunk: int | None
) -> None:
    targets = tokens.roll(-1, dims=1)
    targets[0, -5:] = IGNORE
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for function in (full_nll, lambda *args: token_nll(*args, chunk=chunk)):
        model = tiny_model(tie_word_embeddings=True)
        loss = function(model, tokens, targets)
        (loss * weights).sum().backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert losses[1].dtype == torch.float32 and losses[1].shape == tokens.shape
    assert torch.all(losses[1][targets == IGNORE] == 0)
    # Losses of a few nats, gradients summed over 91 targets: float32 noise of a different order of summation.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-5)
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_token_nll_never_holds_more_logits_than_a_chunk(
    tiny_model: Make, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    token_nll(model, tokens, tokens, chunk=10).sum().backward()
    assert max(seen) == 10
    assert sum(seen) == 2 * tokens.numel()  # once forward, once more when the backward pass recomputes it


def test_token_nll_with_positions(tiny_model: Make, tokens: torch.Tensor) -> None:
    model = tiny_model()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) * 2
    expected = F.cross_entropy(model(tokens, position_ids=positions).logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(token_nll(model, tokens, tokens, positions), expected, rtol=1e-6, atol=1e-5)
    assert not torch.allclose(token_nll(model, tokens, tokens), expected, atol=1e-2)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    ],
    ids=["softcap", "logit_scale"],
)
def test_post_processed_logits_are_reproduced(make: Callable[[], PreTrainedModel], tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = make().eval()
    expected = full_nll(model, tokens, tokens)
    torch.testing.assert_close(token_nll(model, tokens, tokens), expected, rtol=1e-5, atol=1e-5)
    plain = F.cross_entropy(model.lm_head(hidden_states(model, tokens)).transpose(1, 2), tokens, reduction="none")
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_unknown_post_processing_is_refused(tokens: torch.Tensor) -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0))
    with pytest.raises(ConfigError, match="logits_scaling"):
        token_nll(model, tokens, tokens)


def test_base_model_alone_is_refused(tiny_model: Make, tokens: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="causal language model"):
        token_nll(tiny_model().model, tokens, tokens)


# -------------------------------------------------------------------------------------------------------- perplexity


def test_uniform_model_has_its_vocabulary_as_perplexity(
    tokenizer: PreTrainedTokenizerFast, texts: str, tmp_path: Path
) -> None:
    model = new_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "uniform")
    tokenizer.save_pretrained(tmp_path / "uniform")
    name = str(tmp_path / "uniform")
    argv = (
        "-m",
        name,
        "--scaling",
        "default",
        "--dynamic-yarn",
        "--dataset",
        texts,
        "--lengths",
        "32,128",
        "--samples",
        "2",
    )
    rows = evaluate(perplexity.main, tmp_path / "rows.jsonl", *argv)
    assert len(rows) == 4
    for row in rows:
        # ln 400 is rounded once to float32 (relative 6e-8), then summed in float64.
        assert row["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
        assert row["perplexity_bucket"] == pytest.approx(VOCABULARY, rel=1e-6)
        assert row["targets"] == 2 * (row["length"] - 1)
    assert [row["bucket_targets"] for row in rows[:2]] == [2 * 31, 2 * 96]


def test_perplexity_is_that_of_whole_logits(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, "--lengths", "16,48", "--samples", "2", "--windows", "3")
    rows = evaluate(perplexity.main, tmp_path / "rows.jsonl", *argv)
    args = perplexity.build_parser().parse_args(list(argv))
    texts_of, _ = perplexity.evaluator_of(args).prepare(checkpoint)
    windows = torch.from_numpy(np.stack([texts_of.ids(window) for window in truncated(texts_of, 48)]))
    assert windows.shape == (6, 48) and torch.all(windows[:, 0] == 0)  # BOS once, in front
    model = load_model(checkpoint, device="cpu")
    with torch.inference_mode():
        nll = full_nll(model, windows[:, :-1], windows[:, 1:]).double()
    for row, (low, high) in zip(rows, ((0, 16), (16, 48)), strict=True):
        assert row["bucket"] == [low, high]
        # Targets are tokens 1 … L-1; the nll of token i stands in column i-1. Float32 noise of the mean: below 1e-6.
        assert row["perplexity"] == pytest.approx(float(nll[:, : high - 1].mean().exp()), rel=1e-5)
        assert row["perplexity_bucket"] == pytest.approx(
            float(nll[:, max(low - 1, 0) : high - 1].mean().exp()), rel=1e-5
        )


@pytest.mark.parametrize("spec", ["default", "yarn:4"])
def test_one_pass_is_many(checkpoint: str, texts: str, tmp_path: Path, spec: str) -> None:
    argv = ("-m", checkpoint, "--scaling", spec, "--dataset", texts, "--samples", "2", "--device", "cpu")
    args = perplexity.build_parser().parse_args([*argv, "--lengths", "32,64,200"])
    evaluator, (job,) = perplexity.evaluator_of(args), perplexity.model_jobs(args)
    model = load_model(checkpoint, scaling=spec, device="cpu")
    assert evaluator.passes(job, [32, 64, 200]) == {200: [32, 64, 200]}
    together = dict(evaluator.measure(model, job, 200, [32, 64, 200], lambda tokens: None))
    for length in (32, 64, 200):
        ((_, alone),) = evaluator.measure(model, job, length, [length], lambda tokens: None)
        for field in ("perplexity", "perplexity_bucket"):
            # Longer passes multiply matrices in other blocks: float32 noise of 1e-6 per token, less in the mean.
            assert math.log(together[length][field]) == pytest.approx(math.log(alone[field]), rel=1e-6)


def test_dynamic_scaling_is_evaluated_at_each_length(checkpoint: str, texts: str, tmp_path: Path) -> None:
    shared = ("-m", checkpoint, "--dataset", texts, "--samples", "2", "--lengths", "32,64,128,200")
    rows = evaluate(perplexity.main, tmp_path / "dynamic.jsonl", *shared, "--scaling", "dynamic-yarn")
    assert [row["length"] for row in rows] == [32, 64, 128, 200]
    for row in rows:
        factor = max(1.0, row["length"] / TRAINED)
        path = tmp_path / f"static-{row['length']}.jsonl"
        static = evaluate(perplexity.main, path, *shared, "--scaling", f"yarn:{factor!r}")
        (same,) = [one for one in static if one["length"] == row["length"]]
        assert same["data"] == row["data"]
        for field in ("perplexity", "perplexity_bucket"):
            assert row[field] == pytest.approx(same[field], rel=1e-5)  # as above; perplexity = exp(about 6 nats)
    assert rows[2]["perplexity"] != pytest.approx(
        evaluate(perplexity.main, tmp_path / "static-200.jsonl", *shared, "--scaling", "yarn:3.125")[2]["perplexity"],
        rel=1e-4,
    )


def test_lengths_with_the_same_dynamic_scale_share_a_pass(checkpoint: str, texts: str, tmp_path: Path) -> None:
    shared = ("-m", checkpoint, "--scaling", "dynamic-yarn", "--dataset", texts, "--samples", "2")
    lengths = [TRAINED // 4, TRAINED // 2, TRAINED, 2 * TRAINED, 3 * TRAINED]
    args = perplexity.build_parser().parse_args([*shared, "--lengths", ",".join(map(str, lengths))])
    evaluator, (job,) = perplexity.evaluator_of(args), perplexity.model_jobs(args)
    assert evaluator.passes(job, lengths) == {n: [n] for n in lengths[3:]} | {TRAINED: lengths[:3]}
    rows = evaluate(perplexity.main, tmp_path / "together.jsonl", *shared, "--lengths", args.lengths)
    for row in rows:
        # Alone, without shorter lengths that could share its pass. The windows are those of the longest length.
        known = evaluator.measure(load_model(checkpoint, scaling=job.scaling, device="cpu"), job, row["length"],
                                  [row["length"]], lambda tokens: None)  # fmt: skip
        ((_, alone),) = known
        for field in ("perplexity", "perplexity_bucket"):
            # Longer passes multiply matrices in other blocks: float32 noise of 1e-6 per token, less in the mean.
            assert math.log(row[field]) == pytest.approx(math.log(alone[field]), rel=1e-6)


def test_batch_size_changes_nothing(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--scaling", "dynamic-yarn", "--dataset", texts, "--windows", "2", "--lengths", "32,100")
    one = evaluate(perplexity.main, tmp_path / "one.jsonl", *argv, "--batch-size", "1")
    three = evaluate(perplexity.main, tmp_path / "three.jsonl", *argv, "--batch-size", "3")
    for ours, others in zip(one, three, strict=True):
        # Other batch shapes, other order of summation: float32 noise, see above.
        assert math.log(ours["perplexity"]) == pytest.approx(math.log(others["perplexity"]), rel=1e-6)


def test_interrupted_run_continues(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    argv = ("-m", checkpoint, "--scaling", "default", "--scaling", "yarn:4", "--dynamic-yarn", "--dataset", texts)
    argv += ("--samples", "2", "--lengths", "32,64,128", "--output-file", str(table))
    whole = evaluate(perplexity.main, tmp_path / "whole.jsonl", *argv)
    expected_table = table.read_text()
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    resumed = evaluate(perplexity.main, cut, *argv)
    assert measured(resumed) == measured(whole)
    assert table.read_text() == expected_table
    assert [row["provenance"] for row in resumed[:4]] == [row["provenance"] for row in whole[:4]]
    monkeypatch.setattr(perplexity_evaluator, "token_nll", None)  # nothing is left to compute
    assert measured(evaluate(perplexity.main, cut, *argv)) == measured(whole)


def test_table_has_the_released_layout(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, "--min-tokens", "32", "--max-tokens", "96", "--tokens-step", "32")
    released = ("--truncate", "--sliding-window", "256", "--aggressive-memory", "--split", "test", "--samples", "2")
    table = tmp_path / "table.csv"
    rows = evaluate(perplexity.main, tmp_path / "rows.jsonl", *argv, *released, "--output-file", str(table))
    with open(table, newline="") as file:
        head, line = csv.reader(file)
    assert head == ["", "32", "64", "96"]
    assert line == [checkpoint, *(str(row["perplexity"]) for row in rows)]


def test_default_lengths_double(checkpoint: str) -> None:
    def lengths(*argv: str) -> list[int]:
        return perplexity.context_lengths(perplexity.build_parser().parse_args(list(argv)))

    assert lengths() == [256, 512, 1024, 2048, 4096, 8192]
    assert lengths("--max-tokens", "1000") == [256, 512, 1000]
    assert lengths("--max-tokens", "256") == [256]
    assert lengths("--tokens-step", "3000") == [256, 3256, 6256]
    assert lengths("--lengths", "64,32,64") == [32, 64]


def test_windows_are_chosen_by_rule() -> None:
    documents = [np.arange(100, 100 + size) for size in (30, 9, 10, 50)]

    def cut(**settings: Any) -> tuple[list[list[int]], int]:
        texts = select(iter(documents), **{"bos": 0, "length": 10, **settings})
        return [texts.ids(window).tolist() for window in truncated(texts, 10)], len(texts.documents)

    starts = [0, *range(100, 109)]
    assert cut() == ([starts] * 4, 4)  # a document of 9 tokens fills a window of 10 with its BOS
    assert cut(bos=None) == ([list(range(100, 110))] * 3, 3)
    assert cut(samples=2) == ([starts] * 2, 2)
    assert cut(min_tokens=30) == ([starts] * 2, 2)
    windows, _ = cut(windows=3, samples=1)
    assert [window[1] for window in windows] == [100, 110, 121]  # 30 tokens, 3 x 9: from start to end, no overlap
    assert windows[-1][-1] == 129
    assert len(cut(windows=3)[0]) == 3 + 1 + 1 + 3  # as many as fit
    brought = select(iter([np.arange(20)]), 0, 10)
    assert [brought.ids(window).tolist() for window in truncated(brought, 10)] == [list(range(10))]
    with pytest.raises(ConfigError, match="only 2 of 4 documents have 30 tokens; --samples asks for 3"):
        cut(min_tokens=30, samples=3)
    with pytest.raises(ConfigError, match="only 0 of 4"):
        cut(length=1000)


def test_packed_sets_are_documents(checkpoint: str, tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "packed", 40, VOCABULARY) as writer:
        for seed in range(3):
            writer.append([0, *np.random.default_rng(seed).integers(2, VOCABULARY, 39)])
        writer.close({})
    for flag in ("--dataset", "--tokenized"):
        rows = evaluate(
            perplexity.main,
            tmp_path / f"{flag}.jsonl",
            "-m",
            checkpoint,
            flag,
            str(tmp_path / "packed"),
            "--lengths",
            "8,40",
        )
        assert rows[1]["targets"] == 3 * 39
        assert rows[1]["data"]["windows"] == 3


# ----------------------------------------------------------------------------------------------------------- passkey

SPECS = ("default", "linear:2", "dynamic-yarn")


@pytest.fixture(scope="module")
def memoriser(tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, list[Any]]:
    """A model that was overfitted, under each of `SPECS`, to half of 6 prompts, and the prompts."""
    prompts = passkey_evaluator.make_prompts(tokenizer, 2 * TRAINED, 6, "grid", seed=0)
    model = new_model()
    own = RopeScaling.from_config(model.config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    sequences = torch.tensor([prompt.input_ids + prompt.answer_ids for prompt in prompts[::2]])
    answer = len(prompts[0].answer_ids)
    for step in range(90):
        scaling = RopeScaling.from_spec(SPECS[step % len(SPECS)], own)
        apply_scaling(model, at_length(scaling, len(prompts[0].input_ids)))
        logits = model(sequences[:, :-1], use_cache=False).logits[:, -answer:]
        loss = F.cross_entropy(logits.transpose(1, 2), sequences[:, -answer:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), prompts


def greedy(model: LlamaForCausalLM, prompt: list[int], steps: int) -> list[int]:
    """Decode without a cache, at whatever scaling the model has."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("spec", [*SPECS, "yarn:2", "dynamic-linear"])
def test_one_pass_agrees_with_greedy_decoding(memoriser: tuple[LlamaForCausalLM, list[Any]], spec: str) -> None:
    model, prompts = memoriser
    apply_scaling(model, RopeScaling("default", original_max_position_embeddings=TRAINED))
    scaling = RopeScaling.from_spec(spec, RopeScaling.from_config(model.config))
    apply_scaling(model, scaling)
    scored = [outcome for batch in passkey_evaluator.score(model, prompts, scaling, 4) for outcome in batch]
    decoded = []
    for prompt in prompts:
        # Greedy decoding sees the scale of its first step, where the sequence is the prompt.
        length = len(prompt.input_ids)
        fixed = scaling
        if scaling.dynamic:
            fixed = RopeScaling(scaling.method, factor=length / TRAINED, original_max_position_embeddings=TRAINED)
            assert patched_scaling(model) == fixed  # not the scale at the end of the answer
        apply_scaling(model, fixed)
        answer = greedy(model, prompt.input_ids, len(prompt.answer_ids))
        if not scaling.dynamic:
            ids = torch.tensor([prompt.input_ids])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False)
            assert made[0, length:].tolist() == answer
        decoded.append(answer == prompt.answer_ids)
    assert scored == decoded
    if spec in SPECS:  # what it was trained on is right, the rest is not
        assert scored == [True, False] * 3


@pytest.mark.parametrize("depths", ["grid", "random"])
@pytest.mark.parametrize("spec", ["default", "linear:2", "yarn:2", "dynamic-yarn", "rerope,window=16"])
def test_shared_prefill_decides_alike(
    memoriser: tuple[LlamaForCausalLM, list[Any]], tokenizer: PreTrainedTokenizerFast, spec: str, depths: str
) -> None:
    model, prompts = memoriser
    if depths == "random":
        prompts = prompts + passkey_evaluator.make_prompts(tokenizer, 2 * TRAINED, 5, "random", seed=3)
    apply_scaling(model, RopeScaling("default", original_max_position_embeddings=TRAINED))
    scaling = RopeScaling.from_spec(spec, RopeScaling.from_config(model.config))
    apply_scaling(model, scaling)
    each = [
        outcome
        for prompt in prompts
        for batch in passkey_evaluator.score(model, [prompt], scaling, 1)
        for outcome in batch
    ]
    assert [outcome for _, outcome in sorted(passkey_evaluator.score_shared(model, prompts, scaling))] == each


@pytest.mark.parametrize("chunk", [7, 1000])
def test_what_sequences_share_is_read_once(tiny_model: Make, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(1, 60, (40,), generator=generator)
    sequences = []
    for common in (10, 10, 31, 40):  # the second repeats the first but for its end; the last is a prefix of nothing
        ids = whole.clone()
        ids[common:] = torch.randint(1, 60, (40 - common,), generator=generator)
        sequences.append(ids)
    sequences.insert(1, sequences[0])
    starts = [38, 38, 20, 39, 39]
    read = []
    forward = model.model.forward

    def counting(*args: Any, **given: Any) -> Any:
        read.append(given["input_ids"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(model.model, "forward", counting)
    found = list(shared_hidden_states(model, sequences, starts, chunk))
    for ids, start, hidden in zip(sequences, starts, found, strict=True):
        expected = hidden_states(model, ids[None])[:, start:]
        # Float32 sums in another order, through two layers: 1e-6 of states of about 1.
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    counted = sum(read) - sum(40 for _ in sequences)  # without the passes of the comparison
    assert counted == 40 + (40 - 38) + (40 - 10) + (40 - 10) + (40 - 31)


def test_prompts_follow_from_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    def make(length: int = 128, n: int = 5, depths: str = "random", seed: int = 1) -> list[Any]:
        return passkey_evaluator.make_prompts(tokenizer, length, n, depths, seed)

    assert make() == make()
    assert make(n=3) == make(n=5)[:3]
    assert [prompt.key for prompt in make(seed=2)] != [prompt.key for prompt in make()]
    for prompt in make():
        assert len(prompt.input_ids) + len(prompt.answer_ids) == 128
    grid = [prompt.depth for prompt in make(length=512, depths="grid")]
    # A depth is realised in whole filler tokens, of which there are more than 300 here.
    assert grid == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1 / 300)


def test_rows_record_every_prompt(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("-m", checkpoint, "--scaling", "default", "--dynamic-yarn", "--lengths", "100,160", "--iterations", "4")
    table = tmp_path / "table.csv"
    whole = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv, "--length-step", "128", "--output-file", str(table))
    each = [row for row in whole if row["metric"] == "passkey"]
    assert [(row["label"], row["length"]) for row in each] == [
        (label, length) for label in ("unscaled", "dynamic-yarn") for length in (100, 160)
    ]
    for row in each:
        assert row["n"] == len(row["prompts"]) == 4
        assert row["right"] == sum(prompt["right"] for prompt in row["prompts"])
        assert row["prompts"][0]["depth"] == 0 and row["prompts"][-1]["depth"] == 1
    with open(table, newline="") as file:
        assert next(csv.reader(file)) == ["", "100", "160"]
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join((tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)[:3]))
    lengths: list[int] = []
    score = passkey_evaluator.score
    monkeypatch.setattr(
        passkey_evaluator,
        "score",
        lambda model, prompts, *rest: lengths.append(prompts[0].length) or score(model, prompts, *rest),
    )
    assert measured(evaluate(passkey.main, cut, *argv)) == measured(whole)
    assert lengths == [160]


def test_fixed_length_and_shortest(checkpoint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fixed = (OPENING, KEY_LINE, QUESTION + " {key}")
    shortest = 1 + max(sum(len(encode(tokenizer, piece.format(key=key))) for piece in fixed) for key in KEY_RANGE)
    argv = ("-m", checkpoint, "--fixed-length", str(shortest), "--iterations", "1")
    row, _ = evaluate(passkey.main, tmp_path / "rows.jsonl", *argv)
    assert row["length"] == shortest
    with pytest.raises(ConfigError, match=f"at least {shortest}"):
        build_prompt(tokenizer, shortest - 1, 0.5, 12345)


# --------------------------------------------------------------------------------------------------------- bad input

SCORE = ["--lengths", "32", "--dataset", "{texts}"]


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (perplexity.main, ["--no-such-flag"], "--no-such-flag"),
        (perplexity.main, ["-m", "{model}", "--length", "32"], "--length"),  # no abbreviations
        (perplexity.main, ["-m", "{model}"], "--dataset"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--tokenized", "x"], "--dataset"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--protocol", "sliding", "--windows", "2"], "windows"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--sliding-window", "0"], "--sliding-window 0"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--stride", "64"], "--protocol sliding"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--save-tokenized", "{texts}"], "exists"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--subset", "x"], "hub"),
        (perplexity.main, ["-m", "{model}", "--lengths", "32", "--dataset", "standin:boks"], "'books'"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--lengths", "32,x"], "lengths"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--lengths", "1"], "at least 2"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--min-tokens", "9000"], "min-tokens"),
        (perplexity.main, ["-m", "{model}", "--dataset", "{texts}", "--tokens-step", "0"], "tokens-step"),
        (
            perplexity.main,
            ["-m", "{model}", "--dataset", "{texts}", "--max-tokens", "5000"],
            "': only 0 of 3 documents have 5000 tokens; at least 1 is needed: ask for shorter --lengths",
        ),
        (perplexity.main, ["-m", "{model}", *SCORE, "--samples", "7"], "only 3 of 3 documents"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--windows", "0"], "windows"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--batch-size", "0"], "--batch-size 0"),
        (perplexity.main, ["-m", "{model}", "--lengths", "32", "--dataset", "./nowhere"], "nowhere"),
        (perplexity.main, ["-m", "./nowhere", *SCORE], "does not exist"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--yarn", "0.5"], "factor"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--rerope", "512"], "window=512"),
        (perplexity.main, ["-m", "{model}", *SCORE, "--output", "{texts}"], "is a folder; name a file"),
        (passkey.main, ["-m", "{model}", "--lengths", "20"], "too short"),
        (passkey.main, ["-m", "{model}", "--iterations", "0"], "iterations"),
        (report.main, ["{texts}/nowhere", "--output", "{texts}"], "nowhere"),
        (report.main, ["{texts}/a.txt", "--output", "{texts}"], "no rows"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    checkpoint: str,
    texts: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    argv: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [part.format(model=checkpoint, texts=texts) for part in argv]
    assert run_cli(lambda: main(filled)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and says in captured.err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_script_exits_with_2_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "eval" / "perplexity.py"), "-m", "./nowhere", "--dataset", "."]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: model './nowhere' does not exist\n"


def test_tokenizer_and_model_must_fit(texts: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    patch_model(model := new_model(), "yarn:4")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="vocabulary of 100"):
        perplexity.main(["-m", str(tmp_path / "small"), "--dataset", texts, "--lengths", "32"])
