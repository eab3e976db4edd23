"""Every recipe against the paper's table of settings: models on the meta device, so no weights and no network."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import tokenization
import truncate
from scaled_rope import compute_rope
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes import __main__ as command
from scaled_rope.recipes import files
from scaled_rope.recipes.evaluate_flags import EVALUATE_FLAGS
from scaled_rope.recipes.files import available, read_recipe
from scaled_rope.recipes.recipe import make_recipe
from scaled_rope.recipes.runs import is_finished, pending, starts_from
from scaled_rope.recipes.steps import steps
from scaled_rope.scaling.record import RopeSettings
from scaled_rope.training.engine import accumulation, check_sequence_parallel
from scaled_rope.training.model import build_model
from scaled_rope.training.optimizer import learning_rate
from scaled_rope.training.planning import meta_model
from scaled_rope.training.pose import skip_wise
from tests.helpers import ROOT, reference


@dataclass(frozen=True)
class Paper:
    """One column of the paper's settings, with what a model must compute: (rope_theta, s, L, beta, alpha)."""

    parameters: int
    """Of the model, in millions, as its model card counts them."""
    steps: int
    sequence: int
    rate: float
    frequencies: list[float]
    attention_factor: float
    positions: int
    seed: int = 42
    schedule: str = "linear"
    batch: int = 64
    warmup: int = 20
    window: int | None = None


def yarn(s: float, original: int = 4096, beta: float = 32, alpha: float = 1, dim: int = 128, theta: float = 1e4):
    return reference.by_parts_dimension(dim, theta, s, original, beta, alpha)


# Attention factors are the paper's rounded check values (0.1 ln s + 1); Mistral's code has 0.07 ln s + 1.
LLAMA_64K, LLAMA_128K = (400, 65536, 2e-5, yarn(16), 1.2773, 65536), (200, 65536, 2e-5, yarn(32), 1.3466, 131072)
SECOND = {"seed": 31337}
MISTRAL = {"schedule": "constant"}
SMOL = {"schedule": "cosine", "batch": 4, "warmup": 8}
PAPER = {
    "llama-2-7b-64k": Paper(6738, *LLAMA_64K),
    "llama-2-7b-128k": Paper(6738, *LLAMA_128K, **SECOND),
    "llama-2-13b-64k": Paper(13016, *LLAMA_64K),
    "llama-2-13b-128k": Paper(13016, *LLAMA_128K, **SECOND),
    "llama-2-70b-32k": Paper(68977, 400, 8192, 1e-5, yarn(8), 1.2079, 32768, schedule="constant"),
    "llama-2-7b-pi-8k": Paper(6738, 400, 8192, 2e-5, reference.linear(128, 1e4, 2), 1.0, 8192),
    "llama-2-7b-ntk-8k": Paper(6738, 400, 8192, 2e-5, reference.unscaled(128, 2e4), 1.0, 8192),
    "llama-2-7b-yarn-8k": Paper(6738, 400, 8192, 2e-5, yarn(2), 1.0693, 8192),
    "mistral-7b-64k": Paper(7242, 1000, 16384, 1e-6, yarn(8, 8192, 128, 2), 1.1456, 65536, window=65536, **MISTRAL),
    "mistral-7b-128k": Paper(
        7242, 500, 16384, 1e-6, yarn(16, 8192, 128, 2), 1.1941, 131072, window=131072, **MISTRAL, **SECOND
    ),
    # Not in the paper: SOLAR by assumption as Mistral, SmolLM2 our own.
    "solar-10.7b-32k": Paper(10732, 1000, 16384, 1e-6, yarn(8), 1.2079, 32768, **MISTRAL),
    "solar-10.7b-64k": Paper(10732, 500, 16384, 1e-6, yarn(16), 1.2773, 65536, **MISTRAL, **SECOND),
    "smollm2-135m-16k": Paper(
        135, 100, 16384, 1e-4, yarn(2, 8192, dim=64, theta=1e5), 1.0693, 16384, schedule="cosine", batch=8, warmup=10
    ),
    "smollm2-135m-32k": Paper(
        135, 50, 32768, 1e-4, yarn(4, 8192, dim=64, theta=1e5), 1.1386, 32768, schedule="cosine", batch=4, warmup=10,
        **SECOND,
    ),
    "smollm2-135m-pi-32k": Paper(135, 80, 32768, 1e-4, reference.linear(64, 1e5, 4), 1.0, 32768, **SMOL),
    "smollm2-135m-none-32k": Paper(135, 80, 32768, 1e-4, reference.unscaled(64, 1e5), 1.0, 32768, **SMOL),
    "smollm2-135m-yarn-32k": Paper(
        135, 80, 32768, 1e-4, yarn(4, 8192, dim=64, theta=1e5), 1.1386, 32768, **SMOL
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Current:
    """A model that is extended now: parameters in millions, frequencies, attention factor, the length it is for, and
    the layers that the scaling changes out of all."""

    parameters: int
    frequencies: list[float]
    attention_factor: float
    positions: int
    scaled_layers: tuple[int, int]
    head_dim: int = 128


CURRENT = {
    "llama-3.1-8b-512k": Current(8030, reference.llama3(128, 5e5, 32, 8192, 1, 4), 1.0, 524288, (32, 32)),
    "qwen3-4b-128k": Current(4022, yarn(4, 32768, theta=1e6), 1.1386, 131072, (36, 36)),
    "qwen3-8b-128k": Current(8191, yarn(4, 32768, theta=1e6), 1.1386, 131072, (36, 36)),
    "gemma-3-1b-128k": Current(1000, yarn(4, 32768, dim=256, theta=1e6), 1.1386, 131072, (4, 26), 256),
    "smollm3-3b-256k": Current(3075, yarn(4, 65536, theta=5e6), 1.1386, 262144, (27, 36)),
    "mistral-small-24b-128k": Current(23572, yarn(4, 32768, theta=1e8), 1.1386, 131072, (40, 40)),
}
OWN = {
    "demo",
    "smollm2-135m-16k-cpu",
    "tiny-drope",
    "tiny-base",
    "tiny-base-retrieval",
    "tiny-base-mixed",
    "tiny-base-text",
}


@dataclass(frozen=True)
class After:
    """Another project's recipe, from its scripts: tokens of a step, learning rates and what the model computes."""

    parameters: int
    tokens_per_step: int
    steps: int
    warmup: int
    rate: float
    last: float  # of the peak, in the end
    frequencies: list[float]
    attention_factor: float
    positions: int
    shares: list[float]


SHORT = [0.1, 0.1, 0.04, 0.04, 0.03, 0.03, 0.03, 0.03]
AFTER = {
    "llama-3-8b-prolong-64k": After(
        8030, 2**22, 5000, 500, 1e-5, 0.1, reference.unscaled(128, 8e6), 1.0, 65536, [0.3, 0.3, *SHORT]
    ),
    "llama-3-8b-prolong-512k": After(
        8030, 2**23, 2500, 250, 5e-6, 0.1, reference.unscaled(128, 1.28e8), 1.0, 524288,
        [0.15, 0.15, 0.05, 0.25, *SHORT],
    ),
    "olmo-3-7b-64k": After(
        7298, 2**22, 11921, 200, 0.00020712352850360292, 0.0, yarn(8, 8192, theta=5e5), 1.2079, 65536, [0.34, 0.66]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_recipes_after_other_projects_are_theirs(name, monkeypatch):
    recipe, after = read_recipe(name), AFTER[name]
    model = meta_model(recipe)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == after.parameters
    rotary = model.model.rotary_emb
    if name == "olmo-3-7b-64k":
        sliding = rotary.by_type["sliding_attention"].scaling
        assert (sliding.method, sliding.rope_theta) == ("default", 5e5)
        rotary = rotary.by_type["full_attention"]
    inv_freq, attention_factor = compute_rope(rotary.scaling, rotary.head_dim)
    torch.testing.assert_close(
        inv_freq.double(), torch.tensor(after.frequencies, dtype=torch.float64), rtol=6e-8, atol=0
    )
    assert float(attention_factor) == pytest.approx(after.attention_factor, abs=5e-5)
    assert model.config.max_position_embeddings == after.positions
    assert (recipe.tokens_per_step, recipe.max_train_steps, recipe.documents) == (
        after.tokens_per_step, after.steps, "joined" if after.positions > 65536 else "separate",
    )  # fmt: skip
    assert (recipe.adam_betas, recipe.weight_decay, recipe.grad_norm) == ((0.9, 0.95), 0.1, 1.0)
    rates = [learning_rate(recipe, step) for step in range(after.steps)]
    assert max(rates) == rates[after.warmup - 1] == after.rate and rates[0] == after.rate / after.warmup
    assert rates[-1] == pytest.approx(after.last * after.rate, abs=1e-3 * after.rate)
    (command,) = recipe.prepare
    args = tokenization.parse_args(words(command)[1:])
    monkeypatch.chdir(ROOT)
    sources, mixture = tokenization.sources_of(args)
    assert [source.fraction for source in sources] == after.shares
    assert mixture.tokens == pytest.approx(after.tokens_per_step * after.steps, rel=1e-5)
    assert str(args.output) == recipe.dataset and args.sequence_length == recipe.sequence_length == 2**16 * (
        8 if after.positions > 65536 else 1
    )


def test_every_recipe_is_checked_here():
    assert set(available()) == set(PAPER) | set(AFTER) | set(CURRENT) | {f"{name}-pose" for name in CURRENT} | OWN
    for name in available():
        assert read_recipe(name).description, name


@pytest.mark.parametrize("name", PAPER)
def test_the_model_of_a_recipe_computes_what_the_paper_says(name):
    recipe, paper = read_recipe(name), PAPER[name]
    model = meta_model(recipe)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == pytest.approx(
        paper.parameters, abs=1
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    rotary = model.model.rotary_emb
    inv_freq, attention_factor = compute_rope(rotary.scaling, rotary.head_dim)  # the module's own are on "meta"
    # one rounding of float64 to float32: 2^-24
    torch.testing.assert_close(
        inv_freq.double(), torch.tensor(paper.frequencies, dtype=torch.float64), rtol=6e-8, atol=0
    )
    assert float(attention_factor) == pytest.approx(paper.attention_factor, abs=5e-5)
    assert model.config.max_position_embeddings == paper.positions


@pytest.mark.parametrize("name", PAPER)
def test_schedule_batch_and_tokens_of_a_recipe_are_the_papers(name):
    recipe, paper = read_recipe(name), PAPER[name]
    assert (recipe.max_train_steps, recipe.seed) == (paper.steps, paper.seed)
    assert recipe.tokens_per_step * recipe.max_train_steps == paper.steps * paper.batch * paper.sequence
    assert recipe.adam_betas == (0.9, 0.95) and recipe.weight_decay == 0.0
    # the released batch on 8 nodes of 8 GPUs, on one node, and on one GPU
    for ranks in {64, 8, 1} if paper.batch == 64 else {1}:
        assert accumulation(recipe, ranks) * ranks * recipe.batch_size == paper.batch
    rates = [learning_rate(recipe, step) for step in range(paper.steps)]
    assert rates[: paper.warmup] == pytest.approx([paper.rate * (i + 1) / paper.warmup for i in range(paper.warmup)])
    rest = paper.steps - paper.warmup
    last = {
        "linear": paper.rate / rest,
        "constant": paper.rate,
        "cosine": paper.rate * 0.1,
    }[paper.schedule]
    # a cosine ends within (π/2n)² of its floor
    assert rates[-1] == pytest.approx(last, rel=0.02) and max(rates) == pytest.approx(paper.rate)
    windows = recipe.sliding_window_attention_schedule
    assert windows == (None if paper.window is None else (paper.window,))


@pytest.mark.parametrize("name", CURRENT)
@pytest.mark.parametrize("kind", ["", "-pose"])
def test_models_that_are_extended_now(name, kind):
    recipe, current = read_recipe(name + kind), CURRENT[name]
    model = meta_model(recipe)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == current.parameters
    assert model.config.max_position_embeddings == current.positions
    rotary = model.model.rotary_emb
    scaling = RopeSettings(model.config).scaling
    inv_freq, factor = compute_rope(scaling, current.head_dim)
    wanted = torch.tensor(current.frequencies, dtype=torch.float64)
    torch.testing.assert_close(inv_freq.double(), wanted, rtol=6e-8, atol=0)  # one rounding to float32
    assert float(factor) == pytest.approx(current.attention_factor, abs=5e-5)
    types = getattr(model.config, "layer_types", None) or ["full_attention"]
    layers = len(model.model.layers)
    scaled = types.count("full_attention") if recipe.layers else layers
    dropped = sum(not rotates for rotates in getattr(model.config, "no_rope_layers", None) or [])
    assert (scaled - dropped, layers) == current.scaled_layers and type(rotary).__name__
    if kind:
        windows = skip_wise(recipe, scaling)
        assert windows is not None and (windows.window, windows.target) == (8192, current.positions)
        assert recipe.lora and read_recipe(name).dataset == recipe.dataset and accumulation(recipe, 1) == 32
    else:
        assert accumulation(recipe, 8) * 8 // recipe.sequence_parallel == recipe.global_batch_size
        check_sequence_parallel(recipe, model.config, scaling, "flash_attention_2")


def test_tokens_of_the_papers_runs():
    tokens = {name: recipe.tokens_per_step * recipe.max_train_steps for name, recipe in
              ((name, read_recipe(name)) for name in PAPER)}  # fmt: skip
    assert tokens["llama-2-7b-64k"] == tokens["llama-2-13b-64k"] == 1_677_721_600
    assert {tokens[f"llama-2-7b-{method}-8k"] for method in ("pi", "ntk", "yarn")} == {209_715_200}


def words(command: str) -> list[str]:
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    return [script, *arguments]


@pytest.mark.parametrize("name", PAPER)
def test_each_recipe_has_a_data_recipe_whose_commands_exist(name):
    recipe = read_recipe(name)
    local = Path(recipe.dataset).parts[:2] == ("data", "cache")
    assert recipe.prepare or recipe.rebuild or starts_from(recipe)
    for commands in (recipe.prepare, recipe.rebuild):
        outputs, lengths = [], []
        for script, *arguments in map(words, commands):
            if script == "tokenization.py":
                args = tokenization.parse_args(arguments)
                outputs, lengths = [*outputs, str(args.output)], [*lengths, args.sequence_length]
                # its own tokens, not those of another model
                start = recipe
                while (before := starts_from(start)) is not None:
                    start = before
                assert args.tokenizer == start.model or (args.tokenizer, start.model) in LLAMA_TOKENS
            elif script == "truncate.py":
                args = truncate.parse_args(arguments)
                outputs, lengths = [*outputs, str(args.output)], [*lengths, args.length]
            else:
                assert (script, arguments[0]) in {
                    ("-m", "scaled_rope.texts.corpora"),
                    ("-m", "scaled_rope.texts.fetched_models"),
                }
        if commands:
            assert lengths[-1] == recipe.sequence_length
            assert (outputs[-1] == recipe.dataset) == (commands is recipe.prepare)
    assert local == bool(recipe.prepare) or starts_from(recipe)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_evaluators_take_the_flags_of_a_recipe(name):
    import eval.passkey
    import eval.perplexity

    evaluate = read_recipe(name).evaluate
    for flags, evaluator in ((evaluate["perplexity"], eval.perplexity), (evaluate["passkey"], eval.passkey)):
        args = evaluator.build_parser().parse_args(["-m", "model", *shlex.split(flags), "--output", "rows.jsonl"])
        assert args.model == ["model"]


def test_flags_that_recipes_restate_are_those_of_the_scripts():
    import eval.passkey
    import eval.perplexity
    import eval.report

    scripts = {"perplexity": eval.perplexity, "passkey": eval.passkey, "report": eval.report}
    assert list(scripts) == list(EVALUATE_FLAGS)
    for name, script in scripts.items():
        taken = {flag for action in script.build_parser()._actions for flag in action.option_strings}
        assert set(EVALUATE_FLAGS[name]) == taken - {"-h", "--help"}


def test_flags_may_complete_scalings():
    fields = {
        "name": "a",
        "output_dir": "o",
        "dataset": "d",
        "sequence_length": 8,
        "global_batch_size": 1,
        "model": "m",
    }
    evaluate = {"scalings": ["linear", "rerope"], "passkey": "--factor 4 --window=8 -1 --lengths 64"}
    assert make_recipe(fields | {"evaluate": evaluate}, "a").evaluate == evaluate
    evaluate["scalings"] = ["linaer"]
    with pytest.raises(ConfigError, match="unknown method 'linaer'"):
        make_recipe(fields | {"evaluate": evaluate}, "a")


#: the two sizes share their tokens
LLAMA_TOKENS = {("NousResearch/Llama-2-7b-hf", "NousResearch/Llama-2-13b-hf")}


# ---------------------------------------------------------------------------------------------------------- chains


def finish(folder: Path, steps: int) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "train_log.jsonl").write_text("".join(json.dumps({"step": n + 1}) + "\n" for n in range(steps)))


def test_a_chain_trains_what_is_missing_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    longer = read_recipe("llama-2-7b-128k")
    assert [recipe.name for recipe in pending(longer)] == ["llama-2-7b-64k", "llama-2-7b-128k"]
    finish(tmp_path / "out/llama-2-7b-64k", 399)
    assert len(pending(longer)) == 2, "a run that is one step short is not finished"
    finish_again = tmp_path / "out/llama-2-7b-64k/train_log.jsonl"
    finish_again.write_text(finish_again.read_text() + '{"step": 400}\n')
    assert is_finished(read_recipe("llama-2-7b-64k"))
    assert [command.main([name, "--finished"]) for name in ("llama-2-7b-64k", "llama-2-7b-128k")] == [0, 1]
    assert [recipe.name for recipe in pending(longer)] == ["llama-2-7b-128k"]
    finish(tmp_path / "out/llama-2-7b-128k", 200)
    assert pending(longer) == []
    assert [recipe.name for recipe in pending(read_recipe("tiny-base-text"))] == [
        "tiny-base", "tiny-base-retrieval", "tiny-base-mixed", "tiny-base-text",
    ]  # fmt: skip


def test_a_recipe_cannot_run_before_the_one_it_starts_from(tmp_path, monkeypatch, capsys):
    import finetune

    monkeypatch.chdir(tmp_path)
    assert run_cli(lambda: finetune.main(["mistral-7b-128k"])) == 2
    assert "is not there yet; train mistral-7b-64k first" in capsys.readouterr().err


def test_inheritance_has_one_level(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: c\n")
    (tmp_path / "c.yaml").write_text("model: m\n")
    monkeypatch.setattr(files, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match="base 'b' is not allowed; a recipe beside it that has no base itself"):
        read_recipe("a")


def test_what_is_pending_of_a_file_is_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(read_recipe("llama-2-7b-128k").to_dict()))  # which is YAML too
    assert command.main(["mine.yaml", "--pending"]) == 0
    assert capsys.readouterr().out.split() == ["llama-2-7b-64k", "mine.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", ", line 2: seed stands there again, after line 1; keep one"),
        ("evaluate:\n  report: x\n  perplexity: y\n  report: z\n", ", line 4: report stands there again, after line 2"),
        ("{seed: 1, model: a, seed: 2}\n", "seed stands there again, after line 1"),
        ("learning_rate: fast\n", "learning_rate = 'fast' is not allowed; a number"),
        ("learning_rate: .inf\n", "learning_rate = inf is not allowed; a number"),
        ("lora: 1\n", "lora = 1 is not allowed; true or false"),
        ("model: 7\n", "model = 7 is not allowed; text"),
        ("drop_layers: 3\n", "drop_layers = 3 is not allowed; a list of whole numbers"),
        ("drop_layers: [1.5]\n", "drop_layers = [1.5] is not allowed; a list of whole numbers"),
        ("adam_betas: [a, b]\n", "adam_betas = ['a', 'b'] is not allowed; a list of numbers"),
        ("prepare: make it\n", "prepare = 'make it' is not allowed; a list of texts"),
        ("init: llama\n", "init = 'llama' is not allowed; a block of `field: value` lines"),
        (
            "evaluate: {perplexty: x}\n",
            "unknown field of `evaluate` in recipe 'a' 'perplexty'; did you mean 'perplexity'",
        ),
        (
            "evaluate: {passkey_zero_shot: --lengths 64}\n",
            "evaluate: passkey_zero_shot without passkey is not allowed",
        ),
        ("evaluate: {scalings: yarn:8}\n", "evaluate: scalings = 'yarn:8' is not allowed; a list of scalings"),
        (
            'evaluate: {scalings: [default, "yran:4"]}\n',
            "recipe 'a': evaluate: scalings: unknown method 'yran'; did you mean 'yarn'?",
        ),
        ("evaluate: {scalings: [yarn]}\n", "recipe 'a': evaluate: scalings: scaling 'yarn': factor is missing"),
        (
            "evaluate: {passkey: --lenghts 128}\n",
            "evaluate: passkey = '--lenghts 128' is not allowed: unknown flag --lenghts; did you mean '--lengths'",
        ),
        (
            "evaluate: {perplexity: -d x, perplexity_zero_shot: --dataset=x -x y}\n",
            "unknown flag -x; ",
        ),
        ("evaluate: {report: --verdit demo}\n", "unknown flag --verdit; did you mean '--verdict'?"),
        ("evaluate: {report: '--title \"x'}\n", "is not allowed; flags, in one text as a shell splits it"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_the_words_of_the_file(tmp_path, text, message):
    given = [line.partition(":")[0] for line in text.splitlines()]
    needed = {"output_dir": "o", "dataset": "d", "sequence_length": 8, "global_batch_size": 1, "model": "m"}
    if not text.startswith("{"):
        text += "".join(f"{name}: {value}\n" for name, value in needed.items() if name not in given)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(str(tmp_path / "a.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_recipe_fields_and_types_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        read_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("max_train_steps: many\n")
    with pytest.raises(ConfigError, match="max_train_steps = 'many' is not allowed; a whole number"):
        read_recipe(str(tmp_path / "b.yaml"))


def test_names_that_no_file_can_have_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="recipe file y+.yaml does not exist"):
        read_recipe("y" * 300 + ".yaml")
    file = tmp_path / "a.yaml"
    file.write_text(f"base: {'y' * 300}\n")
    with pytest.raises(ConfigError, match="base 'y+' is not allowed; a recipe beside it"):
        read_recipe(str(file))
    file.write_text(f"model: {'y' * 5000}\n")
    with pytest.raises(ConfigError, match="field output_dir is missing"):
        read_recipe(str(file))


def test_the_work_of_a_recipes_steps(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: m\nscaling: yarn:4\noutput_dir: out\ndataset: d\nsequence_length: 64\nglobal_batch_size: 2\n"
        "max_train_steps: 5\nwarmup_steps: 0\nprepare: ['true']\n"
        "evaluate: {scalings: [default, dynamic-yarn], "
        "perplexity: '--dataset x --dataset=y --windows 3 --lengths 8,16', passkey: "
        " '--lengths 64,128 --iterations 10 --seeds 1,2,3 --wording passkey,needle'}\n"
    )
    assert steps(read_recipe(str(file))) == {
        "texts": 0,
        "training": 3 * 5 * 2 * 64,
        "perplexity before training": 2 * 3 * (16 + 4 * 16) + 2 * 3 * (8 + 16 + 4 * 16),
        "perplexity after training": 2 * 3 * (16 + 4 * 16),
        "passkeys before training": 2 * 10 * 3 * 2 * (64 + 128),
        "passkeys after training": 10 * 3 * 2 * (64 + 128),
        "report": 0,
    }
    file.write_text(
        file.read_text().replace("passkey: ", "passkey_zero_shot: '--lengths 64 --iterations 2', passkey: ")
    )
    fewer = steps(read_recipe(str(file)))
    assert list(fewer)[4:] == [
        "passkeys before training", "passkeys of scalings without training", "passkeys after training", "report",
    ]  # fmt: skip
    assert fewer["passkeys before training"] == fewer["passkeys after training"] == 10 * 3 * 2 * (64 + 128)
    assert fewer["passkeys of scalings without training"] == 2 * 64
    file.write_text(
        file.read_text().replace("perplexity: ", "perplexity_zero_shot: '--windows 2 --lengths 8,16', perplexity: ")
    )
    fewer = steps(read_recipe(str(file)))
    assert fewer["perplexity before training"] == 2 * 3 * (16 + 4 * 16)
    assert fewer["perplexity of scalings without training"] == 2 * (8 + 16)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"save_dtype": "float99"},
            "save_dtype = 'float99' is not allowed; one of: float32, bfloat16, float16, or none",
        ),
        ({"seed": 10**22}, "seed = 10000000000000000000000 is not allowed; 0 to 4294967295"),
        ({"init": {"num_hidden_layers": 10**9}}, "init.num_hidden_layers = 1000000000 is not allowed; 1 to 4096"),
        ({"init": {"num_attention_heads": 0}}, "init.num_attention_heads = 0 is not allowed; 1 to 4096"),
        ({"init": {"num_hidden_layers": "x"}}, "is no model: "),
        ({"init": {"hidden_act": "nope"}}, "is no model: KeyError 'nope'"),
        ({"init": {"hidden_size": 33, "head_dim": None}}, "is no model: "),
    ],
)
def test_a_mistake_is_found_before_the_first_step(fields, said):
    base = read_recipe("tiny-base")
    changed = fields | ({"init": {**base.init, **fields["init"]}} if "init" in fields else {})
    with pytest.raises(ConfigError, match=re.escape(said)):
        build_model(replace(base, **changed))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a {b: *a}\n", "line 1: *a is not allowed; write the value again"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 2: *a is not allowed"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: more than 20 blocks within each other are not allowed"),
        ("seed: " + "9" * 5000, "line 1: a number of 5000 digits is not allowed"),
        ("learning_rate: " + "9" * 401, "line 1: a number of 401 digits is not allowed"),
        ("base: ../..\n", "base '../..' is not allowed; a recipe beside it"),
        ("base: [1]\n", "base [1] is not allowed; a recipe beside it"),
        ("description: " + "x" * 2**20, "has 1048589 bytes; a recipe has at most 1048576"),
        ("seed: !!python/object:os.system 1\n", "is not YAML"),
        ("a: b\0", "is not YAML"),
    ],
)
def test_files_that_only_look_small_are_refused_at_once(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_recipe(str(tmp_path / "r.yaml"))


def test_assignments_for_a_shell_are_never_a_listing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--list is not allowed with --shell"):
        command.main(["demo", "--shell", "--list"])
    with pytest.raises(ConfigError, match="unknown recipe '--list'"):
        command.main(["--shell", "--also", "table1", "--", "--list"])
    assert capsys.readouterr().out == ""
