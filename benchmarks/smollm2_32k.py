"""SmolLM2-135M from 8k to 32k positions by YaRN, PI and no scaling under one budget, in five minutes of one GPU.

    python benchmarks/smollm2_32k_prepare.py             # anywhere, first: model, data, texts, questions
    python benchmarks/smollm2_32k.py --list              # the parts, what each takes by arithmetic, how far each is
    python benchmarks/smollm2_32k.py                     # the most telling parts in 285 seconds; again: what is missing
    python benchmarks/smollm2_32k.py --dry               # the same code on a CPU, on a tiny model and made-up tokens
    python benchmarks/smollm2_32k.py --steps 80 --work out/smollm2-32k-long    # 10 M tokens each, over several calls

All parts run in one process, in the order of what they are worth. Each has a share of the time that is left, and stops
itself when it is over: a training saves a state, an evaluation keeps the rows that it has, and the same command
continues. What is measured is never measured again. The first part trains two steps to see how fast the machine is, and
sets the number of steps that fit for all three trainings alike, in WORK/budget.json (--steps sets it by hand).

Needs torch, transformers, accelerate and einops, and what the preparation wrote. On a machine that keeps nothing, rows
and logs in WORK are what to carry away, and a model is measured where it was trained. Where the source is no git
repository, SCALED_ROPE_COMMIT says for the rows which commit it is. After an error by which this process loses the
GPU, a new one goes on with the next part.

Exit code 1 when a part failed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import check_names, gpu_is_lost, start_again
from benchmarks.smollm2_32k_bundle import assemble
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.provenance import portable_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.recipes.runs import is_finished
from scaled_rope.results import Row, rows_so_far

RECIPES = ("smollm2-135m-yarn-32k", "smollm2-135m-pi-32k", "smollm2-135m-none-32k")
"""In the order in which they are trained."""
MAX_LENGTH = "8192"  # where questions would be cut, for all models alike; none is as long
WINDOWS = 4
"""Windows of each evaluation text: two of each novel, four of the others."""
QUESTION_TOKENS = 0.15e6  # of all questions with their answers; a guess
STARTING = 25.0, 6.0
"""Seconds for importing and unpacking, and for what each part loads and saves: guesses."""
PACE_STEPS = 2
_FAILED = "SMOLLM2_32K_FAILED"  # how many parts failed in processes that lost the GPU
SURE = 0.85
"""Of the time that a training has, what its steps are planned to take."""
UTILISATIONS = 0.15, 0.40
PEAK = 989e12  # dense bf16 FLOP/s of an H100


class TimeOver(BaseException):
    """The time of an evaluation is over. No Exception, lest it be taken for the failure of a model."""


@dataclass(frozen=True)
class Part:
    """A part of the work.

    Attributes:
        name: see --list.
        share: its share of the time in relation to the other core parts; None: it gets what those leave.
        run: does it, in at most so many seconds.
        progress: how far it is, in words.
        pflop: what it takes by arithmetic, in 10^15 FLOP; for a training that of one step.
    """

    name: str
    share: float | None
    run: Callable[[float], None]
    progress: Callable[[], str]
    pflop: float


# ------------------------------------------------------------------------------------------------------- time that ends


@contextmanager
def time_limit(seconds: float, training: bool = False) -> Iterator[None]:
    """Stop what runs within this context when the time is over.

    An evaluation is left by `TimeOver`; its rows are written one at a time, so none is lost. A training is told by
    SIGTERM, again every second until it listens: it saves a state after the pass at work.
    """

    def over(number: int, frame: FrameType | None) -> None:
        if not training:
            raise TimeOver
        os.kill(os.getpid(), signal.SIGTERM)

    def ignored(number: int, frame: FrameType | None) -> None:
        pass  # before the training listens, and after

    before = signal.signal(signal.SIGALRM, over)
    terminated = signal.signal(signal.SIGTERM, ignored) if training else None
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds), 1.0 if training else 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if training:
            signal.signal(signal.SIGTERM, terminated)


def call(command: Sequence[str], seconds: float) -> None:
    """Run one of the project's scripts in this process, for so many seconds at most.

    Raises:
        ConfigError: it failed; what it printed says why.
        TimeOver: its time is over.
    """
    print(shlex.join(["python", *command]), flush=True)
    script, began = importlib.import_module(command[0].removesuffix(".py").replace("/", ".")), time.monotonic()
    training = command[0] == "finetune.py"
    with time_limit(seconds, training):
        code = script.main(list(command[1:]))
    if training and code == 128 + signal.SIGTERM:
        if time.monotonic() - began < seconds:  # it was not us: whoever ends this machine means all of it
            raise SystemExit(code)
        raise TimeOver
    if code:
        raise ConfigError(f"{command[0]} ended with exit code {code}")


def release() -> None:
    """Give back the memory that a part has left."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_all(parts: Sequence[Part], end: float, go_on: Callable[[Sequence[Part]], object] | None = None) -> int:
    """Run parts in order until the time `end`, as `time.monotonic` counts; return how many failed.

    go_on: called with the parts that are left when this process has lost the GPU.
    """
    failed = 0
    for index, part in enumerate(parts):
        left = end - time.monotonic()
        if left < 1:
            print(f"# the time is over before {part.name}; the same command continues")
            break
        if part.share is not None:
            left *= part.share / sum(one.share for one in parts[index:] if one.share is not None)
        print(f"# {part.name}: {left:.0f} s", flush=True)
        try:
            part.run(left)
        except TimeOver:
            print(
                f"# {part.name}: its {left:.0f} s are over ({part.progress()}); the same command continues", flush=True
            )
        except Exception as problem:  # what comes after it is worth measuring all the same
            failed += 1
            said = [*str(problem).splitlines(), ""][0][:300]
            print(f"# {part.name}: failed, {type(problem).__name__}: {said}", flush=True)
            if go_on is not None and gpu_is_lost(problem):
                go_on(parts[index + 1 :])
                break
        release()
    return failed


# ---------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Study:
    """The models that are trained and measured, and where.

    Attributes:
        recipes: by method, the name or file that a recipe was read from, and the recipe with its folder in `work`.
        work: folder of models, rows, logs and the budget.
        steps: what --steps says; None: as many as fit.
    """

    recipes: dict[str, tuple[str, Recipe]]
    work: Path
    steps: int | None = None

    @classmethod
    def of(cls, sources: Sequence[str], work: str, steps: int | None) -> Study:
        """Read the recipes.

        Raises:
            ConfigError: two recipes of one method, one without a model or `evaluate`, or with another model or data.
        """
        recipes: dict[str, tuple[str, Recipe]] = {}
        for source in sources:
            recipe = read_recipe(source)
            method = str(recipe.scaling).partition(":")[0]
            if (
                method in recipes
                or recipe.model is None
                or {"scalings", "perplexity", "passkey"} - set(recipe.evaluate)
            ):
                raise ConfigError(f"recipe {source!r} is not allowed; a model under one method each, with `evaluate`")
            recipes[method] = source, replace(recipe, output_dir=f"{work}/{method}")
        first = next(iter(recipes.values()))[1]
        for source, recipe in recipes.values():
            for name in ("model", "dataset", "global_batch_size", "sequence_length", "seed", "evaluate"):
                if getattr(recipe, name) != getattr(first, name):
                    raise ConfigError(f"recipe {source!r}: {name} = {getattr(recipe, name)!r} differs from the others")
        if not str(first.scaling).partition(":")[2]:
            raise ConfigError(f"recipe {sources[0]!r} is not allowed as the first; its scaling must have a factor")
        if steps is not None and not PACE_STEPS <= steps <= first.max_train_steps:
            raise ConfigError(f"steps {steps} is not allowed; {PACE_STEPS} to {first.max_train_steps}")
        return cls(recipes, Path(work), steps)

    @property
    def first(self) -> Recipe:
        return next(iter(self.recipes.values()))[1]

    @property
    def bundle(self) -> Path:
        return Path(self.first.dataset).parent

    @property
    def trained_length(self) -> int:
        """Tokens that the base was trained on, by the factor of the first recipe: configs of runs without scaling say
        the extended length."""
        factor = str(self.first.scaling).partition(":")[2].partition(",")[0]
        return int((self.first.truncate or self.first.sequence_length) / float(factor))

    @property
    def rows(self) -> Path:
        return self.work / "rows.jsonl"

    @property
    def budget_path(self) -> Path:
        return self.work / "budget.json"

    def budget(self) -> int | None:
        """The number of steps of all trainings, if it is set.

        Raises:
            ConfigError: a damaged file, one of other recipes, or another number than --steps.
        """
        if not self.budget_path.exists():
            return self.steps
        try:
            found = json.loads(self.budget_path.read_text())
            steps, tokens = int(found["steps"]), int(found["tokens_per_step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.budget_path} cannot be read ({error}); remove it, or choose another --work"
            ) from None
        if tokens != self.first.tokens_per_step:
            raise ConfigError(
                f"{self.budget_path} is for steps of {tokens} tokens, the recipes have {self.first.tokens_per_step};"
                " choose another --work"
            )
        if self.steps not in (None, steps):
            raise ConfigError(
                f"steps {self.steps} is not allowed; {self.budget_path} says {steps}; choose another --work"
            )
        return steps

    def save_budget(self, steps: int, **facts: Any) -> None:
        said = {"steps": steps, "tokens_per_step": self.first.tokens_per_step} | facts
        write_atomic(self.budget_path, json.dumps(said, indent=1) + "\n")

    def trained(self) -> list[str]:
        """The models that are there."""
        return [f"{recipe.output_dir}/model" for recipe in self._runs() if is_finished(recipe)]

    def run_of(self, method: str) -> Recipe:
        """The recipe of a training, with as many steps as the budget says."""
        recipe, steps = self.recipes[method][1], self.budget()
        return recipe if steps is None else replace(recipe, **_shortened(recipe, steps))

    def _runs(self) -> list[Recipe]:
        return [self.run_of(method) for method in self.recipes]


def _shortened(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Fields of a recipe that trains fewer steps: warm-up and held-out measurements keep their share."""
    return {
        "max_train_steps": steps,
        "warmup_steps": max(1, recipe.warmup_steps * steps // recipe.max_train_steps),
        "heldout_steps": max(1, steps // 2),
    }


def parts_of(study: Study) -> dict[str, Part]:
    """All parts by name, in the order of what they are worth."""
    first = study.first
    words = shlex.split(first.evaluate["perplexity"])
    texts = [words[place + 1] for place, word in enumerate(words) if word == "--dataset"]
    lengths = [int(one) for one in words[words.index("--lengths") + 1].split(",")]
    key_words = shlex.split(first.evaluate["passkey"])
    key_lengths = [int(one) for one in key_words[key_words.index("--lengths") + 1].split(",")]
    extended = first.truncate or first.sequence_length
    control = f"window={study.trained_length},stride={study.trained_length // 4}"
    costs = Costs(first, len(first.evaluate["scalings"]) + len(study.recipes))
    cost_of_text = costs.perplexity(lengths, study.trained_length)
    found = [Part("pace", 15, lambda seconds: pace(study, seconds), lambda: _paced(study), costs.step * PACE_STEPS)]
    for method in study.recipes:
        found.append(Part(f"train-{method}", 45, _training(study, method), _steps(study, method), costs.step))

    def perplexity(text: str, share: float | None) -> Part:
        command = [
            "eval/perplexity.py",
            "--dataset",
            text,
            "--lengths",
            ",".join(map(str, lengths)),
            "--control",
            control,
        ]
        measured = "perplexity", Path(text).name
        return _measurement(study, "-".join(measured), share, command, cost_of_text,
                            lambda row: (row["metric"], row["data"]["name"]) == measured)  # fmt: skip

    def keys(name: str, share: float | None, chosen: Sequence[int]) -> Part:
        command = ["eval/passkey.py", *key_words]
        command[command.index("--lengths") + 1] = ",".join(map(str, chosen))
        return _measurement(study, name, share, command, costs.keys(chosen, key_words),
                            lambda row: row["metric"] == "passkey" and row["length"] in chosen)  # fmt: skip

    near, far = ([one for one in key_lengths if (one <= extended) == wanted] for wanted in (True, False))
    found.append(perplexity(texts[0], 50))
    found.append(keys("keys", 30, near))
    found += [perplexity(text, None) for text in texts[1:]]
    if far:
        found.append(keys("keys-beyond", None, far))
    requests = study.bundle / "requests"
    if tasks := sorted(path.stem for path in requests.glob("*.jsonl")):
        command = [
            "eval/harness.py",
            "--requests",
            str(requests),
            "--tasks",
            ",".join(tasks),
            "--max-length",
            MAX_LENGTH,
        ]
        found.append(
            _measurement(study, "questions", None, command, costs.questions(), lambda row: row["metric"] == "benchmark")
        )
    evaluator = ["--evaluator", str(first.model), "--evaluator-scaling", first.evaluate["scalings"][-1]]
    chosen = [one for one in lengths if one >= extended]
    at = ["--key-window", str(lengths[0]), "--lengths", ",".join(map(str, chosen))]
    command = ["eval/longppl.py", "--dataset", texts[0], *evaluator, *at]
    found.append(_measurement(study, "longppl", None, command, cost_of_text, lambda row: row["metric"] == "longppl"))
    return {part.name: part for part in found}


def _measurement(
    study: Study,
    name: str,
    share: float | None,
    command: Sequence[str],
    pflop: float,
    is_of: Callable[[Row], bool],
) -> Part:
    """The same measurement of the trained models and of the base under its scalings."""
    common = ["--output", str(study.rows), "--hide-progress"]

    def run(seconds: float) -> None:
        end = time.monotonic() + seconds
        if trained := study.trained():
            call([*command, *(word for model in trained for word in ("-m", model)), *common], end - time.monotonic())
        scalings = [word for spec in study.first.evaluate["scalings"] for word in ("--scaling", spec)]
        call([*command, "-m", str(study.first.model), *scalings, *common], end - time.monotonic())

    def progress() -> str:
        base = portable_model(str(study.first.model))
        rows = [row for row in rows_so_far(study.rows) if is_of(row)]
        of_base = sum(row["model"] == base for row in rows)
        return f"{len(rows) - of_base} rows of trained models, {of_base} of the base"

    return Part(name, share, run, progress, pflop)


def _training(study: Study, method: str) -> Callable[[float], None]:
    def run(seconds: float) -> None:
        steps = study.budget()
        if steps is None:
            raise ConfigError("the number of steps is not set: part pace sets it, or --steps")
        if not study.budget_path.exists():
            study.save_budget(steps, said_by="--steps")
        source, recipe = study.recipes[method]
        call(["finetune.py", source, *_flags({"output_dir": recipe.output_dir} | _shortened(recipe, steps))], seconds)

    return run


def _flags(fields: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


def _steps(study: Study, method: str) -> Callable[[], str]:
    def progress() -> str:
        recipe = study.run_of(method)
        done = rows_so_far(Path(recipe.output_dir) / "train_log.jsonl")[-1:]
        steps = done[0]["step"] if done else 0
        most = "?" if study.budget() is None else recipe.max_train_steps
        return f"{steps} of {most} steps{', finished' if is_finished(recipe) else ''}"

    return progress


def pace(study: Study, seconds: float) -> None:
    """Train two steps, and set the number of steps of all trainings by the time that the second one took.

    seconds: what this part has; the trainings have as much more as their shares say.
    """
    if study.budget() is not None:
        return
    source, recipe = next(iter(study.recipes.values()))
    folder = study.work / "pace"
    fields = {"output_dir": folder} | _shortened(recipe, PACE_STEPS) | {"heldout_steps": PACE_STEPS}
    call(["finetune.py", source, *_flags(fields)], seconds)
    took = rows_so_far(folder / "train_log.jsonl")[-1]["seconds"]
    facts = json.loads((folder / "provenance.json").read_text())
    own, training = (next(p.share for p in parts_of(study).values() if p.name.startswith(n)) for n in ("pace", "train"))
    share = seconds * (training or 0) / (own or 1) - STARTING[1]
    steps = max(PACE_STEPS, min(recipe.max_train_steps, int(SURE * share / took)))
    study.save_budget(steps, seconds_per_step=took, device=facts["device"], commit=facts["commit"])
    shutil.rmtree(folder)
    print(f"{took:.3g} s a step: {steps} steps, {steps * recipe.tokens_per_step / 1e6:.3g} M tokens for each method")


def _paced(study: Study) -> str:
    steps = study.budget()
    if steps is None:
        return "the number of steps is not set"
    return f"{steps} steps, {steps * study.first.tokens_per_step / 1e6:.3g} M tokens for each method"


# ------------------------------------------------------------------------------------------------------------ estimates


class Costs:
    """FLOPs by arithmetic, of SmolLM2-135M: 30 layers, 576 wide, 9 heads of 64, a vocabulary of 49152.

    models: how many are measured, the base once for each of its scalings.
    """

    MATRICES = 134_479_872  # weights that every token is multiplied by, the tied embedding once
    HEADS_WIDTH = 30 * 576

    def __init__(self, recipe: Recipe, models: int) -> None:
        from scaled_rope.training.costs import ModelCost

        self._cost = ModelCost(self.MATRICES, self.MATRICES, {None: self.HEADS_WIDTH})
        self._recipe, self._models = recipe, models

    @property
    def step(self) -> float:
        """PFLOP of a training step."""
        length = self._recipe.truncate or self._recipe.sequence_length
        return self._cost.sequence(length).total * self._recipe.global_batch_size / 1e15

    def _reading(self, length: int) -> float:
        return self._models * self._cost.reading(length).total / 1e15

    def perplexity(self, lengths: Sequence[int], trained: int) -> float:
        """PFLOP of one text: each window whole, and in windows of the trained length every quarter of it."""
        cuts = max(0, (lengths[-1] - trained) // (trained // 4))
        return WINDOWS * (self._reading(lengths[-1]) + cuts * self._reading(trained))

    def keys(self, lengths: Sequence[int], words: Sequence[str]) -> float:
        prompts = int(words[words.index("--iterations") + 1])
        wordings = words[words.index("--wording") + 1].count(",") + 1 if "--wording" in words else 1
        return prompts * wordings * sum(map(self._reading, lengths))

    def questions(self) -> float:
        return self._reading(1) * QUESTION_TOKENS


def show(study: Study, parts: Sequence[Part]) -> None:
    """Print the parts with what they take by arithmetic, and how far each has come."""
    peaks = [PEAK * share / 1e15 for share in UTILISATIONS]
    print(f"estimates by FLOPs, not measured: seconds at {' and '.join(f'{100 * u:.0f} %' for u in UTILISATIONS)} of "
          f"{PEAK / 1e12:.0f} TFLOP/s, without the {STARTING[0]:.0f} s of starting")  # fmt: skip
    for part in parts:
        core = "further" if part.share is None else f"{part.share:.0f} s"
        unit = " a step" if part.name.startswith("train") else ""
        times = " and ".join(f"{part.pflop / peak:.3g}" for peak in peaks)
        print(f"{part.name:<22} {core:>8}  {part.pflop:.3g} PFLOP{unit}, {times} s{unit}; {part.progress()}")


# -------------------------------------------------------------------------------------------------------------- dry run


def dry_study(folder: Path, steps: int | None) -> Study:
    """A tiny study of the same parts: a random model of two layers, made-up tokens, lengths of a few hundred."""
    import numpy as np
    import torch
    import transformers
    import yaml

    from benchmarks.smollm2_32k_bundle import WEIGHTS, complete
    from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
    from scaled_rope.texts.packed import PackedWriter

    bundle, made, trained, extended, longest = folder / "bundle", folder / "made", 64, 256, 384
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=trained, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    rng = np.random.default_rng(0)
    for name, length, rows in (
        ("train", extended, 8),
        ("novel", extended, 1),
        ("books", longest, 2),
        ("proofs", longest, 1),
    ):
        with PackedWriter(bundle / name, length, len(tokenizer)) as writer:
            for _ in range(rows):
                writer.append([tokenizer.bos_token_id, *rng.integers(10, len(tokenizer), length - 1)])
            writer.close({})
    (bundle / "model").mkdir()
    for path in (*made.glob("*.json"), *Path(DEFAULT_MODEL).glob("tokenizer*.json")):
        shutil.copy(path, bundle / "model" / path.name)
    complete(bundle, made / WEIGHTS, 2**20)
    sources = []
    for name, scaling in (("yarn", "yarn:4"), ("pi", "linear:4"), ("none", "default")):
        fields: dict[str, Any] = {
            "model": str(folder / "model"), "scaling": scaling, "dataset": str(bundle / "train"), "precision": "auto",
            "sequence_length": extended, "max_position_embeddings": extended, "global_batch_size": 2,
            "max_train_steps": 3, "warmup_steps": 1, "learning_rate": 1e-3, "gradient_checkpointing": False,
            "heldout": str(bundle / "novel"), "heldout_lengths": [trained, extended], "heldout_rows": 1,
            "output_dir": str(folder / name),
            "evaluate": {
                "scalings": ["default", "linear:4", "yarn:4"],
                "perplexity": f"--dataset {bundle}/books --dataset {bundle}/proofs --lengths 32,64,256,384",
                "passkey": f"--lengths 192,{extended},{longest} --iterations 2 --wording passkey,needle",
            },
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        sources.append(str(folder / f"{name}.yaml"))
    return Study.of(sources, str(folder / "work"), steps)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/smollm2_32k.py", __doc__)
    add = parser.add_argument
    add("--part", action="append", metavar="NAME", help="see --list; repeatable (default: all)")
    add("--list", action="store_true", help="the parts, what each takes by arithmetic, and how far each has come")
    add("--seconds", type=float, default=285, metavar="N", help="stop after N, starting included (default %(default)s)")
    add("--steps", type=int, metavar="N", help="steps of each training (default: as many as fit)")
    add("--recipe", action="append", metavar="NAME", help=f"repeatable (default: {', '.join(RECIPES)})")
    add("--work", default="out/smollm2-32k", metavar="FOLDER", help="models, rows, budget (default %(default)s)")
    add("--dry", action="store_true", help="on a CPU: a tiny model and made-up tokens, in a temporary folder")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        raise ConfigError(f"seconds {args.seconds} is not allowed; above 0")
    if args.dry:
        if args.recipe:
            raise ConfigError("--dry and --recipe exclude each other: the dry run has recipes of its own")
        real = Study.of(RECIPES, args.work, None)
        show(real, list(parts_of(real).values()))
        with tempfile.TemporaryDirectory() as folder:
            study = dry_study(Path(folder), args.steps)
            return _run(study, args.part, STARTED + args.seconds)
    study = Study.of(args.recipe or RECIPES, args.work, args.steps)
    if args.list:
        known = parts_of(study)
        check_names("part", args.part, known)
        show(study, [known[name] for name in args.part or known])
        return 0
    repeated = [word for recipe in args.recipe or () for word in ("--recipe", recipe)] + ["--work", args.work]
    repeated += [] if args.steps is None else ["--steps", str(args.steps)]
    return _run(study, args.part, STARTED + args.seconds, repeated)


def _run(study: Study, names: Sequence[str] | None, end: float, repeated: Sequence[str] = ()) -> int:
    """repeated: the flags of a process that goes on, but for parts and seconds."""
    known = parts_of(study)
    check_names("part", names, known)
    study.budget()  # refused before anything is computed
    assemble(study.bundle, Path(str(study.first.model)))
    wanted = [known[name] for name in names or known]

    def go_on(parts: Sequence[Part]) -> None:
        if parts:
            print("# the GPU is lost to this process; a new one goes on", flush=True)
            os.environ[_FAILED] = str(int(os.environ.get(_FAILED, 0)) + 1)
            more = [word for part in parts for word in ("--part", part.name)]
            seconds = f"{max(1.0, end - time.monotonic()):.0f}"
            start_again([*repeated, *more, "--seconds", seconds])

    failed = int(os.environ.get(_FAILED, 0)) + run_all(wanted, end, go_on)
    for part in wanted:
        print(f"{part.name:<22} {part.progress()}")
    print(f"# {time.monotonic() - STARTED:.0f} s in all, {failed} parts failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
