"""SmolLM2 from 8k to 32k: its dry run where the GPU machine's packages are missing, its plan, time and budget."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import finetune
from benchmarks import smollm2_32k
from benchmarks.smollm2_32k import Costs, Part, Study, TimeOver, call, parts_of, run_all, time_limit
from benchmarks.smollm2_32k_prepare import TEXTS
from eval import harness, longppl, passkey, perplexity
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes.files import read_recipe
from scaled_rope.results import read_rows
from scaled_rope.texts.corpora import CORPORA
from scaled_rope.training.costs import ModelCost
from tests.helpers import ROOT
from tests.helpers.bare_container import absent, variables
from tests.helpers.runs import ENVIRONMENT
from tests.helpers.smollm2 import prepare


def on_gpu_machine(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the GPU's script where what that machine lacks cannot be imported."""
    return subprocess.run(
        [sys.executable, "benchmarks/smollm2_32k.py", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | variables(folder / "site") | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def study_of(work: Path | str, steps: int | None = None) -> Study:
    return Study.of(smollm2_32k.RECIPES, str(work), steps)


def test_the_dry_run_does_all_parts(tmp_path: Path) -> None:
    done = on_gpu_machine(tmp_path, "--dry", "--seconds", "180")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "estimates by FLOPs, not measured" in done.stdout and "0 parts failed" in done.stdout
    assert "3 steps, 0.00154 M tokens for each method" in done.stdout
    for method in ("yarn", "linear", "default"):
        assert re.search(rf"train-{method} +3 of 3 steps, finished", done.stdout)
    # Three models, and the base under three scalings: 4 lengths, and 2 beyond the trained one with a control.
    for text in ("books", "proofs"):
        assert re.search(rf"perplexity-{text} +18 rows of trained models, 18 of the base", done.stdout)
    assert re.search(r"keys +12 rows of trained models, 12 of the base", done.stdout)
    assert re.search(r"keys-beyond +6 rows of trained models, 6 of the base", done.stdout)
    assert re.search(r"longppl +6 rows of trained models, 6 of the base", done.stdout)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """Accelerate allows one precision per process, and other tests train in another."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
def test_from_texts_to_rows(prepared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What was prepared from texts is trained and measured; what is there is not measured again."""
    assert prepare(prepared) == 0
    assert prepare(prepared) == 0 and (prepared / "commands").read_text() == "done\n" * 2
    (prepared / "base").rename(prepared / "elsewhere")  # the other machine has what was prepared, and no model
    monkeypatch.setenv("TMPDIR", str(prepared))
    arguments = ["--recipe", str(prepared / "tiny.yaml"), "--work", str(prepared / "work"), "--seconds", "1e6"]
    chosen = [f"--part={name}" for name in ("train-yarn", "perplexity-addresses", "questions")]
    assert smollm2_32k.main([*arguments, *chosen, "--steps", "2"]) == 0
    rows = read_rows(prepared / "work" / "rows.jsonl")
    found = {(row["metric"], row["label"], row["data"]["name"], row["length"]) for row in rows}
    own = "yarn x4 (checkpoint)"
    assert {("perplexity", own, "addresses", 64), ("perplexity", own, "addresses", 256)} <= found
    assert {("benchmark", own, "truthfulqa_mc2", None), ("benchmark", "unscaled", "truthfulqa_mc2", None)} <= found
    log = read_rows(prepared / "work" / "yarn" / "train_log.jsonl")
    assert [row["step"] for row in log] == [1, 2]
    capfd.readouterr()
    assert smollm2_32k.main([*arguments, *chosen]) == 0
    assert read_rows(prepared / "work" / "rows.jsonl") == rows
    assert "already trained" in capfd.readouterr().out


def test_the_blocker_blocks(tmp_path: Path) -> None:
    """What the dry run relies on."""
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n) is not None])"
    hidden = absent()
    assert "blake3" in hidden
    words = [sys.executable, "-c", code, *hidden, "torch", "transformers"]
    done = subprocess.run(words, env=ENVIRONMENT | variables(tmp_path), capture_output=True, text=True)
    assert done.stdout.strip() == "['torch', 'transformers']", done.stderr


def test_the_recipes_differ_in_method_alone_and_hold_their_texts_out() -> None:
    recipes = [read_recipe(name) for name in smollm2_32k.RECIPES]
    assert [recipe.scaling for recipe in recipes] == ["yarn:4", "linear:4", "default"]
    free = {"name", "description", "scaling", "output_dir"}
    (budget,) = {json.dumps({k: v for k, v in one.to_dict().items() if k not in free}) for one in recipes}
    assert budget and len({recipe.output_dir for recipe in recipes}) == 3
    trained = [command for command in recipes[0].prepare if command.endswith(f"--output {recipes[0].dataset}")]
    words = shlex.split(trained[0])
    sources = [words[place + 1] for place, word in enumerate(words) if word == "--dataset"]
    # Of the folder of books the training part, and of the stand-in one file: no evaluation text is among them.
    assert sources == ["data/cache/books/train", "data/cache/prose/King James Bible.txt"] and len(trained) == 1
    folders = CORPORA["books"].folders
    assert not set(folders["train"]) & set(folders["heldout"])
    for text in TEXTS.values():
        assert not {source for source in text.sources if source.startswith(("data/cache/books/train", *sources))}


SCRIPTS = {
    "eval/perplexity.py": perplexity, "eval/passkey.py": passkey, "eval/harness.py": harness,
    "eval/longppl.py": longppl,
}  # fmt: skip


def test_parts_are_commands_that_the_scripts_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trained models and the base are measured alike but for the scalings; trainings differ in recipe and folder."""
    study, called = study_of(tmp_path, steps=10), list[list[str]]()
    monkeypatch.setattr(smollm2_32k, "call", lambda command, seconds: called.append(list(command)))
    monkeypatch.setattr(Study, "trained", lambda self: ["a/model", "b/model"])
    parts = parts_of(study)
    core = ["pace", "train-yarn", "train-linear", "train-default", "perplexity-books", "keys"]
    assert list(parts) == [*core, "perplexity-proofs", "perplexity-addresses", "keys-beyond", "longppl"]
    assert [name for name, part in parts.items() if part.share is not None] == core
    for name in list(parts)[4:]:
        called.clear()
        parts[name].run(1.0)
        assert len(called) == 2
        given = [vars(SCRIPTS[script].build_parser().parse_args(flags)) for script, *flags in called]
        assert [one.pop("model") for one in given] == [["a/model", "b/model"], ["models/smollm2-135m"]]
        assert [one.pop("scaling") for one in given] == [None, ["default", "linear:4", "yarn:4"]]
        assert given[0] == given[1] and given[0]["output"] == str(tmp_path / "rows.jsonl")
        if name.startswith("perplexity"):
            assert given[0]["control"] == "window=8192,stride=2048" and given[0]["lengths"].endswith(
                "32768,49152,65536"
            )
    for method, source in zip(("yarn", "linear", "default"), smollm2_32k.RECIPES, strict=True):
        called.clear()
        parts[f"train-{method}"].run(1.0)
        ((script, name, *flags),) = called
        args = finetune.parse_args([name, *flags])
        changed = finetune.overrides(args, read_recipe(name), 1)
        assert (script, name) == ("finetune.py", source) and changed == {
            "output_dir": str(tmp_path / method), "max_train_steps": 10, "warmup_steps": 1, "heldout_steps": 5,
        }  # fmt: skip
    assert json.loads((tmp_path / "budget.json").read_text())["steps"] == 10


def test_the_arithmetic_is_that_of_the_model() -> None:
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        cost = ModelCost.of(transformers.LlamaForCausalLM(config))
    assert cost == ModelCost(Costs.MATRICES, Costs.MATRICES, {None: Costs.HEADS_WIDTH})
    costs = Costs(read_recipe(smollm2_32k.RECIPES[0]), 6)
    # docs/reproduction.md has these
    assert costs.step == pytest.approx(0.551, abs=5e-4)
    assert costs.perplexity([65536], 8192) == pytest.approx(7.02, abs=0.01)
    assert costs.keys([8192, 16384, 32768], ["--iterations", "5", "--wording", "a,b"]) == pytest.approx(3.85, abs=0.01)
    assert TEXTS["books"].windows * 2 == TEXTS["proofs"].windows == TEXTS["addresses"].windows == smollm2_32k.WINDOWS


def test_the_pace_sets_the_steps_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """3.7 s a step, and 17 s for this part: 51 for a training, less 6 of loading, of which 85 % are planned."""
    study = study_of(tmp_path)

    def train(command: list[str], seconds: float) -> None:
        (tmp_path / "pace").mkdir()
        (tmp_path / "pace" / "train_log.jsonl").write_text('{"seconds": 9.0}\n{"seconds": 3.7}\n')
        (tmp_path / "pace" / "provenance.json").write_text('{"device": "H", "commit": "c"}')

    monkeypatch.setattr(smollm2_32k, "call", train)
    smollm2_32k.pace(study, 17.0)
    assert study.budget() == int(0.85 * (51 - 6) / 3.7) == 10 and not (tmp_path / "pace").exists()
    smollm2_32k.pace(study, 1000.0)  # a later call has more time; the budget stays
    assert study.budget() == 10 and study_of(tmp_path, steps=10).budget() == 10
    with pytest.raises(ConfigError, match=r"steps 12 is not allowed; .* says 10; choose another --work"):
        study_of(tmp_path, steps=12).budget()
    first = study.recipes["yarn"]
    other = replace(study, recipes={"yarn": (first[0], replace(first[1], global_batch_size=8))})
    with pytest.raises(ConfigError, match="is for steps of 131072 tokens, the recipes have 262144"):
        other.budget()
    study.budget_path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        study.budget()


def _part(name: str, share: float | None, run: Callable[[float], None]) -> Part:
    return Part(name, share, run, lambda: "half", 0.0)


def test_parts_share_the_time_and_fail_alone(capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, float] = {}

    def over(seconds: float) -> None:
        given["b"] = seconds
        raise TimeOver

    def fails(seconds: float) -> None:
        given["c"] = seconds
        raise ConfigError("no such text")

    parts = [
        _part("a", 10, lambda seconds: given.update(a=seconds)),
        _part("b", 30, over),
        _part("c", 60, fails),
        _part("d", None, lambda seconds: given.update(d=seconds)),
    ]
    assert run_all(parts, time.monotonic() + 1000) == 1
    # What a part leaves is for those after it; a further part gets all that is left.
    assert given == pytest.approx({"a": 100, "b": 1000 * 30 / 90, "c": 1000, "d": 1000}, rel=0.05)
    said = capsys.readouterr().out
    assert "# b: its 333 s are over (half); the same command continues" in said.replace("332", "333")
    assert "# c: failed, ConfigError: no such text" in said
    assert run_all(parts, time.monotonic() + 0.5) == 0
    assert "the time is over before a" in capsys.readouterr().out


def test_a_process_that_lost_the_gpu_hands_over_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def access(seconds: float) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    parts = {one.name: one for one in (_part("a", None, access), _part("b", None, None), _part("c", None, None))}
    monkeypatch.setattr(smollm2_32k, "parts_of", lambda study: parts)
    monkeypatch.setattr(smollm2_32k, "assemble", lambda *_: None)
    monkeypatch.delenv("SMOLLM2_32K_FAILED", raising=False)
    monkeypatch.setattr(smollm2_32k, "gpu_is_lost", lambda error: isinstance(error, torch.AcceleratorError))
    begun: list[list[str]] = []

    def execute(program: str, words: list[str]) -> None:
        begun.append(words[2:])
        raise SystemExit

    monkeypatch.setattr("os.closerange", lambda *_: None)
    monkeypatch.setattr("os.execv", execute)
    with pytest.raises(SystemExit):
        smollm2_32k.main(["--work", str(tmp_path), "--steps", "3", "--seconds", "10000"])
    (words,) = begun
    assert words[:-1] == ["--work", str(tmp_path), "--steps", "3", "--part", "b", "--part", "c", "--seconds"]
    assert 5000 < int(words[-1]) <= 10000
    for name in parts:
        parts[name] = _part(name, None, lambda seconds: None)
    assert smollm2_32k.main(words) == 1  # one part had failed before


def test_time_ends_an_evaluation_and_tells_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TimeOver), time_limit(0.05):
        time.sleep(30)
    heard: list[int] = []

    def train(argv: list[str]) -> int:
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        deadline = time.monotonic() + 30
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        return 128 + signal.SIGTERM

    monkeypatch.setattr(finetune, "main", train)
    with pytest.raises(TimeOver):
        call(["finetune.py"], 0.05)
    assert heard
    monkeypatch.setattr(finetune, "main", lambda argv: 128 + signal.SIGTERM)
    with pytest.raises(SystemExit):  # a signal from outside ends everything
        call(["finetune.py"], 100.0)
    monkeypatch.setattr(finetune, "main", lambda argv: 3)
    with pytest.raises(ConfigError, match="ended with exit code 3"):
        call(["finetune.py"], 100.0)
    assert before == (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ["--work", str(tmp_path)]
    for arguments, message in (
        (["--part", "train-yern", *work], "did you mean 'train-yarn'"),
        (["--seconds", "0"], "seconds 0.0 is not allowed"),
        (["--steps", "81"], "steps 81 is not allowed; 2 to 80"),
        (["--recipe", "smollm2-135m-yarn-32k", "--recipe", "smollm2-135m-16k"], "one method each"),
        (["--recipe", "smollm2-135m-yarn-32k", "--recipe", "smollm2-135m-none-32k", "--dry"], "exclude each other"),
        (["--recipe", "smollm2-135m-16k", "--recipe", "smollm2-135m-none-32k"], "differs from the others"),
    ):
        assert run_cli(lambda arguments=arguments: smollm2_32k.main(arguments)) == 2
        assert message in capsys.readouterr().err
