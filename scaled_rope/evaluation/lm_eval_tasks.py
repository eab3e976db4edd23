"""Benchmarks through lm-eval, for every scaling there is.

lm-eval finds model types by name among those that an import has registered; it knows no entry points. So this module
is lm-eval's command line with our type registered:

    python -m scaled_rope.evaluation.lm_eval_tasks run --model scaled-rope --model_args pretrained=DIR,scaling=yarn:8 \\
        --include_path eval/tasks --tasks passkey --metadata '{"max_seq_lengths": [4096, 8192]}'

A scaling with options is put in quotes: scaling="yarn:8,beta_fast=16". Other programs call `model_class()` first.
`eval/harness.py` does the same with our flags and writes result rows. lm-eval is imported only when it is needed.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from scaled_rope.bundled import bundled
from scaled_rope.checkpoint import load_config, load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError, first_line, unknown
from scaled_rope.evaluation.chat_templates import chat_template_hash
from scaled_rope.evaluation.continuations import NO_LIMIT, context_limit
from scaled_rope.evaluation.failures import is_ours
from scaled_rope.evaluation.generated_prompts import SECONDS, SEED, generate, seeded, takes_lengths, unreachable
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.lm_eval_registration import NAMES
from scaled_rope.evaluation.paper_benchmarks import OFFLINE, PAPER, Benchmark
from scaled_rope.evaluation.statistics import wilson_interval
from scaled_rope.evaluation.task_presets import PRESETS
from scaled_rope.evaluation.task_presets import SOURCES as TASK_SOURCES
from scaled_rope.provenance import package_version
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.benchmarks import SOURCES

TASKS = bundled("eval/tasks")
"""Our own tasks: passkeys, and the offline benchmarks."""

_FEWSHOT_SEED = 1234  # lm-eval's default
_ANSWER_TOKENS = 256  # likewise
_TASK_FOLDERS = (
    "arc",
    "babilong",
    "graphwalks",
    "hellaswag",
    "infinitebench",
    "longbench2",
    "longproc",
    "mmlu/default",
    "ruler",
    "truthfulqa",
)
_PREFERRED_METRICS = ("acc_norm", "exact_match", "acc")
# Shares between 0 and 1, which rows give in %. Metrics named by a length (RULER's tasks, passkeys) are shares as well.
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1")


# ------------------------------------------------------------------------------------------------------ lm-eval's model


def _lm_eval(module: str) -> Any:
    """Import a module of lm-eval. Raises ConfigError when lm-eval is not installed."""
    try:
        return importlib.import_module(f"lm_eval{module and '.'}{module}")
    except ImportError as error:
        raise ConfigError(f"benchmarks need lm-eval: pip install 'scaled-rope[eval]' ({error})") from error


@functools.cache
def model_class() -> Any:
    """lm-eval's model type "scaled-rope", which the first call registers under its `NAMES`.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    _lm_eval("models.huggingface")  # raises the ConfigError
    from scaled_rope.evaluation.lm_eval_model import ScaledRopeLM

    return _lm_eval("api.registry").register_model(*NAMES)(ScaledRopeLM)


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Unit:
    """Tasks of lm-eval that make one row, or one per length."""

    name: str
    tasks: Mapping[str, Any]
    metric: str
    num_fewshot: int
    offline: bool
    limit: int | None
    reasons: Mapping[int | None, str] = field(default_factory=dict)
    """Length -> why there are no prompts of that length."""
    generated: bool = False
    """Whether the prompts are generated, from `SEED`."""
    chat_template: str | None = None
    """Hash of the chat template that prompts are put into; None: they are plain text."""

    @functools.cached_property
    def documents(self) -> dict[str, list[int]]:
        """The indices of the documents used of each task: the first `limit`, or the first `limit` of each length."""
        chosen = {}
        for name, task in self.tasks.items():
            seen: dict[Any, list[int]] = {}
            for index, length in enumerate(_lengths_of(task)):
                seen.setdefault(length, []).append(index)
            chosen[name] = sorted(itertools.chain(*(indices[: self.limit] for indices in seen.values())))
        return chosen

    @functools.cached_property
    def lengths(self) -> list[int | None]:
        """The lengths in tokens that prompts were built for; [None] where a task has none."""
        found: set[int] = set()
        for task in self.tasks.values():
            if "max_length" in task.features:
                found.update(task.eval_docs["max_length"])
        return [*sorted(found)] or [None]

    @functools.cached_property
    def data(self) -> dict[int | None, Row]:
        """A row's description of the documents by length, those of the few-shot examples included."""
        digests = {length: hashlib.sha256() for length in self.lengths}
        counts = dict.fromkeys(self.lengths, 0)
        for name, task in sorted(self.tasks.items()):
            documents, lengths = task.eval_docs, _lengths_of(task)
            examples = task.sampler.df if self.num_fewshot else ()
            for index in self.documents[name]:
                digests[lengths[index]].update(_document_bytes(documents[index]))
                counts[lengths[index]] += 1
            for document, digest in itertools.product(examples, digests.values()):
                digest.update(_document_bytes(document))
        first = next(iter(self.tasks.values()))
        source = SOURCES[self.name].label if self.offline else first.config.dataset_path or "generated"
        shared = {"name": self.name, "source": source}
        return {
            length: {**shared, "documents": counts[length], "fingerprint": digest.hexdigest()[:16]}
            for length, digest in digests.items()
        }

    def cells(self, config: Any, scaling: RopeScaling, max_length: int | None) -> dict[int | None, Row]:
        """Length -> the fields that identify a row for a model with this configuration.

        max_length: longest prompt, to which others are cut; None: the model's context, or no limit if the task sets
            lengths.
        """
        limit = max_length or (context_limit(config, scaling) if self.lengths == [None] else NO_LIMIT)
        version = next(iter(self.tasks.values())).VERSION
        protocol = _protocol(self, version, limit)
        absent = {"name": self.name, "source": "generated", "documents": 0, "fingerprint": None}
        return {
            length: {
                "metric": "benchmark",
                "data": self.data.get(length, absent),
                "protocol": protocol if length is None else {**protocol, "metric": str(length)},
                "length": length,
            }
            for length in [*self.lengths, *self.reasons]
        }

    def prepare(self) -> None:
        """Set the number and the seed of the few-shot examples, so that the tasks always draw the same ones."""
        for task in self.tasks.values():
            task.set_config(key="num_fewshot", value=self.num_fewshot)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    @property
    def version(self) -> str | None:
        """The version of lm-eval, which makes the prompts."""
        return package_version("lm-eval")

    def measure(self, lm: Any, lengths: Sequence[int | None] | None = None) -> dict[int | None, Row]:
        """Run the tasks on a model of lm-eval; return the measured fields by length.

        lengths: those of `self.lengths` to measure; None: all.
        """
        evaluator = _lm_eval("evaluator")
        self.prepare()
        lm.truncated = 0
        lengths = self.lengths if lengths is None else lengths
        everything = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        chosen = {name: indices for name, indices in self._of(lengths).items() if len(indices) < everything[name]}
        with seeded(self.name):  # some tasks draw the order of answers while they are asked
            results = evaluator.evaluate(
                lm=lm,
                task_dict={"tasks": dict(self.tasks)},
                samples=chosen or None,
                bootstrap_iters=1000,
                apply_chat_template=self.chat_template is not None,
                confirm_run_unsafe_code=True,  # a task that needs it was built only where that is allowed
            )
        rows = measured_rows(results, self.metric, lengths)
        asked = {length: _requests(results["samples"], length) for length in rows}
        return {length: {**row, "requests": asked[length], "truncated": lm.truncated} for length, row in rows.items()}

    def _of(self, lengths: Sequence[int | None]) -> dict[str, list[int]]:
        """Those of `documents` that have one of the lengths."""
        found = {}
        for name, task in self.tasks.items():
            known = _lengths_of(task)
            found[name] = [index for index in self.documents[name] if known[index] in lengths]
        return found


@dataclass(frozen=True)
class UnbuiltUnit:
    """A task that could not be built: its data cannot be read, say."""

    name: str
    reasons: Mapping[int | None, str]
    """Length, or None for a task without lengths -> why."""
    version: Any
    metric: str
    num_fewshot: int
    limit: int | None
    generated: bool
    chat_template: str | None = None

    def cells(self, config: Any, scaling: RopeScaling, max_length: int | None) -> dict[int | None, Row]:
        """As those of `Unit`, of documents that are not known."""
        limit = max_length or (context_limit(config, scaling) if list(self.reasons) == [None] else NO_LIMIT)
        protocol = _protocol(self, self.version, limit)
        return {
            length: {
                "metric": "benchmark",
                "data": {"name": self.name, "source": None, "documents": 0, "fingerprint": None},
                "protocol": protocol if length is None else {**protocol, "metric": str(length)},
                "length": length,
            }
            for length in self.reasons
        }


def _protocol(unit: Unit | UnbuiltUnit, version: Any, max_length: int) -> Row:
    """A row's protocol; the seed and the chat template only where there are any."""
    protocol = {
        "name": "lm-eval",
        "task": unit.name,
        "version": version,
        "num_fewshot": unit.num_fewshot,
        "limit": unit.limit,
        "metric": unit.metric,
        "max_length": None if max_length == NO_LIMIT else max_length,
    }
    if unit.generated:
        protocol["seed"] = SEED
    if unit.chat_template is not None:
        protocol["chat_template"] = unit.chat_template
    return protocol


def _lengths_of(task: Any) -> list[int | None]:
    """The length in tokens of each document, or None where a task has no lengths."""
    return list(task.eval_docs["max_length"]) if "max_length" in task.features else [None] * len(task.eval_docs)


def _document_bytes(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, default=str).encode()


def measured_rows(results: Mapping[str, Any], metric: str, lengths: Sequence[int | None]) -> dict[int | None, Row]:
    """Convert lm-eval's results to row fields by length: value, standard error and 95 % interval, in % for shares; n.

    The value of several tasks is the plain mean of their values. Right-or-wrong outcomes have a score interval, which
    is sensible at 0 and 100 %, others a normal one. "outcomes" has the outcome of every document of each task, in order
    of the documents, so that models can be compared question by question; it is left out where a metric has none.
    """
    tasks: Mapping[str, Any] = results["results"]
    if lengths != [None]:
        return {length: _length_row(results["samples"], length, metric) for length in lengths}
    found = {name: _aggregate(task, metric) for name, task in tasks.items()}
    value = sum(value for value, _ in found.values()) / len(found)
    errors = [error for _, error in found.values() if error is not None]
    error = math.sqrt(sum(error**2 for error in errors)) / len(found) if len(errors) == len(found) else None
    row = _row(value, error, sum(task["sample_len"] for task in tasks.values()), share=metric in _SHARES)
    outcomes = {name: _outcomes(results["samples"].get(name, ()), metric) for name in found}
    if all(outcomes.values()):
        row["outcomes"] = {name: [round(value, 6) for value in values] for name, values in outcomes.items()}
    if len(found) > 1:
        return {None: {**row, "tasks": {name: round(value, 6) for name, (value, _) in found.items()}}}
    ((name, task),) = tasks.items()
    row["metrics"] = {key: value for key, value in task.items() if "," in key and isinstance(value, float)}
    return {None: row | _score_interval(outcomes[name])}


def _outcomes(samples: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """The outcome of each document under the first of a task's filters, in order of the documents; [] where the metric
    is not a mean of numbers."""
    chosen = [sample for sample in _in_order(samples) if sample["filter"] == samples[0]["filter"] and metric in sample]
    values = [sample[metric] for sample in chosen]
    return [float(value) for value in values] if all(isinstance(value, (bool, int, float)) for value in values) else []


def _in_order(samples: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(samples, key=lambda sample: sample.get("doc_id", 0))


def _length_row(samples: Mapping[str, Sequence[Mapping[str, Any]]], length: int | None, metric: str) -> Row:
    """The row of one length: of tasks whose metrics are named by lengths (RULER's, passkeys), or of documents of it."""
    by_task: dict[str, list[float]] = {}
    for name, of in samples.items():
        for sample in _in_order(of):
            if str(length) in sample:
                value = sample[str(length)]
            elif sample.get("doc", {}).get("max_length") == length and metric in sample:
                value = sample[metric]
            else:
                continue
            if value != -1:  # RULER's tasks put -1 where a document is of another length
                by_task.setdefault(name, []).append(value)
    found = list(itertools.chain(*by_task.values()))
    if not found:
        raise ConfigError(f"no document of {length} tokens has an outcome")
    n, mean = len(found), sum(found) / len(found)
    error = math.sqrt(sum((value - mean) ** 2 for value in found) / (n - 1) / n) if n > 1 else None
    outcomes = {name: [round(float(value), 6) for value in values] for name, values in by_task.items()}
    return _row(mean, error, n, share=True) | {"outcomes": outcomes} | _score_interval(found)


def _requests(samples: Mapping[str, Sequence[Mapping[str, Any]]], length: int | None) -> int:
    """The requests that the documents of a length were, of all documents where it is None; four endings are four."""
    return sum(
        len(answers)
        for of in samples.values()
        for sample in of
        if sample["filter"] == of[0]["filter"] and length in (None, sample["doc"].get("max_length"))
        for answers in sample["resps"]
    )


def _score_interval(outcomes: Sequence[Any]) -> Row:
    if not outcomes or not all(outcome in (0, 1) for outcome in outcomes):
        return {}
    return {"interval": [100 * end for end in wilson_interval(int(sum(outcomes)), len(outcomes))]}


def _aggregate(task: Mapping[str, Any], metric: str) -> tuple[float, float | None]:
    """Value and standard error of a metric, under the first of the task's filters."""
    key = next(key for key in task if key.partition(",")[0] == metric)
    error = task.get(key.replace(metric, f"{metric}_stderr", 1))
    return float(task[key]), float(error) if isinstance(error, (int, float)) else None


def _row(value: float, error: float | None, n: int, share: bool) -> Row:
    scale, unit = (100.0, "%") if share else (1.0, None)
    row: Row = {"value": scale * value, "unit": unit, "standard_error": None, "interval": None, "n": n}
    if error is not None:
        low, high = scale * (value - 1.959964 * error), scale * (value + 1.959964 * error)
        row |= {
            "standard_error": scale * error,
            "interval": [max(0.0, low), min(100.0, high)] if share else [low, high],
        }
    return row


class Catalogue:
    """lm-eval's tasks and ours, built for one model.

    Args:
        offline: read the paper's benchmarks from package archives.
        lengths: lengths in tokens, for tasks that build prompts of given lengths.
        limit: documents per task, or per length; None: all.
        include: more folders of task files.
        seconds: time that generating the prompts of a task may take at one length.
        chat_template: put prompts into the chat template of the model's tokenizer.
        unsafe_code: run programs that the model writes, where a task asks for it.
    """

    def __init__(
        self,
        offline: bool = False,
        lengths: Sequence[int] | None = None,
        limit: int | None = None,
        include: Sequence[str | Path] = (),
        seconds: float = SECONDS,
        chat_template: bool = False,
        unsafe_code: bool = False,
    ) -> None:
        self.chat_template, self.unsafe_code = chat_template, unsafe_code
        self.offline, self.lengths, self.limit, self.include = offline, lengths, limit, list(include)
        self.seconds = seconds
        self._everything = False
        self._loaded: dict[tuple[str, str, int | None], list[Unit | UnbuiltUnit]] = {}
        self._absent: dict[str, str] = {}
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def _manager(self, everything: bool, model: str | None = None) -> Any:
        """lm-eval's index of tasks. Reading all 14 000 task files takes half a minute, so usually a part is read."""
        tasks = _lm_eval("tasks")
        root = Path(tasks.__file__).parent
        parts = [] if everything else [root / name for name in _TASK_FOLDERS]
        metadata = {} if model is None else {"pretrained": model, "tokenizer": model}
        return tasks.TaskManager(
            include_path=[*parts, TASKS, *self.include],
            include_defaults=everything,
            metadata=metadata | ({"max_seq_lengths": list(self.lengths)} if self.lengths else {}),
        )

    def _target(self, name: str) -> str:
        return Benchmark.offline_name(name) if self.offline and name in OFFLINE else name

    def check(self, names: Sequence[str]) -> None:
        """Raise a ConfigError, with the nearest names, for names that are no tasks, groups or tags."""
        known = set(self._manager(False).all_tasks)
        absent = {self._target(name) for name in names} - known
        self._everything = bool(absent)
        if not absent:
            return
        stems = set()
        for path in Path(_lm_eval("tasks").__file__).parent.rglob("*.yaml"):  # far faster than to parse them
            stems.add(path.stem)
            text = path.read_text(encoding="utf-8", errors="replace")
            absent -= {name for name in absent if name in text}
        if not absent:
            known = set(self._manager(True).all_tasks)
        for name in names:
            if self._target(name) in absent or (not absent and self._target(name) not in known):
                # lm-eval has 14 000 names: only near ones are worth showing.
                near = difflib.get_close_matches(name, sorted(known | stems), n=5)
                raise unknown("task", name, {*PAPER, *PRESETS, "passkey", *near})

    def facts(self, names: Sequence[str]) -> list[TaskFacts]:
        """The parts of tasks, groups or tags, from their definitions alone: nothing is read or made.

        Raises:
            ConfigError: unknown names.
        """
        self.check(names)
        manager = self._manager(self._everything)
        reader = _Reader(manager)
        # Modules of RULER's tasks print what they fail to download.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            for name in dict.fromkeys(names):
                manager.load([self._target(name)])
        return list(reader.found.values())

    def units(self, names: Sequence[str], model: str, num_fewshot: int | None = None) -> list[Unit | UnbuiltUnit]:
        """The units to measure for tasks, groups or tags, with prompts sized for `model`; the last model's are kept.
        Names can be given one by one, so that the first are measured before the prompts of the last are made.

        A task that cannot be built, because its data cannot be read, say, is an `UnbuiltUnit`.

        Raises:
            ConfigError: unknown names, or no chat template where one is asked for.
        """
        key = (",".join(names), model, num_fewshot)
        if key not in self._loaded:
            if any(loaded != model for _, loaded, _ in self._loaded):
                self._loaded = {}
            self.check(names)
            template = chat_template_hash(model) if self.chat_template else None
            importlib.import_module("datasets").disable_progress_bars()
            manager = self._manager(self._everything, model)
            builder = _Builder(manager, self.lengths, self.limit, functools.cache(lambda: load_tokenizer(model)))
            builder.seconds, builder.unsafe_code, builder.absent = self.seconds, self.unsafe_code, self._absent
            units: dict[str, Unit | UnbuiltUnit] = {}
            for name in dict.fromkeys(names):
                for unit in self._units(manager, builder, name, num_fewshot):
                    units.setdefault(unit.name, replace(unit, chat_template=template))
            self._loaded[key] = [*units.values()]
        return self._loaded[key]

    def _units(
        self, manager: Any, builder: _Builder, name: str, num_fewshot: int | None
    ) -> Iterator[Unit | UnbuiltUnit]:
        builder.together = name in PAPER
        try:
            tasks = manager.load([self._target(name)])["tasks"]
        except ConfigError:
            raise
        except Exception as error:  # a group that is no group, say
            raise ConfigError(f"task {name!r} cannot be loaded: {first_line(error)}") from error
        # A group leaves out what is no task, so those that were not built are asked of the builder.
        unbuilt, builder.unbuilt = builder.unbuilt, {}
        tasks = {one: task for one, task in tasks.items() if not isinstance(task, _Unbuilt)}
        if name in PAPER:
            together = {name: tasks} if not unbuilt else {}
            unbuilt = {name: next(iter(unbuilt.values()))} if unbuilt else {}
        else:
            together = {one: {one: task} for one, task in tasks.items()}
        for title, part in together.items():
            task = next(iter(part.values()))
            paper = PAPER.get(title)
            shots = self._shots(title, task.get_config("num_fewshot"), num_fewshot)
            metric = paper.metric if paper else _main_metric(task)
            offline = self.offline and title in OFFLINE
            reasons = builder.reasons.get(title, {})
            yield Unit(title, part, metric, shots, offline, self.limit, reasons, title in builder.generated)
        for title, absent in unbuilt.items():
            hint = "" if self.offline or title not in OFFLINE else "; --offline reads it from a package archive"
            lengths = self.lengths if self.lengths and absent.generated else [None]
            config = absent.config
            metrics = [str(entry.get("metric")) for entry in config.get("metric_list") or [{}]]
            yield UnbuiltUnit(
                title,
                {length: builder.reasons.get(title, {}).get(length, absent.reason) + hint for length in lengths},
                (config.get("metadata") or {}).get("version"),
                PAPER[title].metric if title in PAPER else metrics[0],
                self._shots(title, config.get("num_fewshot"), num_fewshot),
                self.limit,
                absent.generated,
            )

    @staticmethod
    def _shots(title: str, own: int | None, asked: int | None) -> int:
        """The number of examples in a prompt."""
        if own == 0:  # the prompt has its examples already
            return 0
        if asked is not None:
            return asked
        return PAPER[title].num_fewshot if title in PAPER else own or 0


@dataclass(frozen=True)
class TaskFacts:
    """A task as its definition describes it.

    Attributes:
        name: of the task.
        source: the data set or the text that it needs from the network; None where it runs offline.
        takes_lengths: whether its prompts are made for given lengths.
        answer_tokens: longest answer in tokens that the model is asked to generate; 0 where choices are scored.
        unsafe: whether its answers are run as a program.
        own_shots: the number of examples that its definition puts into a prompt, if it says one. 0 always holds.
    """

    name: str
    source: str | None
    takes_lengths: bool
    answer_tokens: int
    unsafe: bool
    own_shots: int | None = None


class _Reader:
    """Stands for the builder of a task manager: it reads the definitions of tasks and builds none."""

    def __init__(self, manager: Any) -> None:
        self._factory = manager._factory
        self._factory._build_task = self
        self.found: dict[str, TaskFacts] = {}

    def __call__(self, entry: Any, overrides: Mapping[str, Any] | None) -> Any:
        config = self._factory._load_full_config(entry, overrides)
        name = str(config["task"])
        path = config.get("dataset_path") or None
        local = path == "json" or (path is None and name not in TASK_SOURCES)
        answer = 0
        if config.get("output_type") == "generate_until":
            answer = int((config.get("generation_kwargs") or {}).get("max_gen_toks", _ANSWER_TOKENS))
        self.found.setdefault(
            name,
            TaskFacts(
                name,
                None if local else TASK_SOURCES.get(name, path),
                takes_lengths(config.get("custom_dataset")),
                answer,
                bool(config.get("unsafe_code")),
                config.get("num_fewshot"),
            ),
        )
        return _Unbuilt(name, "", config, False)


@dataclass(frozen=True)
class _Unbuilt:
    """Stands for a task that could not be built, among those that lm-eval's task manager returns."""

    task_name: str
    reason: str
    config: Mapping[str, Any]
    generated: bool


class _Builder:
    """Builds the tasks of a task manager one by one: a task that cannot be built leaves the others as they are.

    Its prompts, if they are generated, come from `generate`.
    """

    seconds = SECONDS
    unsafe_code = False
    together = False
    """Whether the tasks make one unit: after the first that cannot be built, others are not tried."""

    def __init__(
        self, manager: Any, lengths: Sequence[int] | None, limit: int | None, tokenizer: Callable[[], Any]
    ) -> None:
        self._factory = manager._factory
        self._build = self._factory._build_task
        self._factory._build_task = self
        self._lengths, self._limit, self._tokenizer = lengths, limit, tokenizer
        self.unbuilt: dict[str, _Unbuilt] = {}
        self.reasons: dict[str, Mapping[int | None, str]] = {}
        """Task -> length -> why there are no prompts of that length."""
        self.absent: dict[str, str] = {}
        """Data set or text -> why it cannot be read: a network that is not there is waited for once."""
        self.generated: set[str] = set()
        """The tasks whose prompts are generated."""

    def __call__(self, entry: Any, overrides: Mapping[str, Any] | None) -> Any:
        if self.together and self.unbuilt:
            return next(iter(self.unbuilt.values()))
        config = self._factory._load_full_config(entry, overrides)
        name, make = config["task"], config.get("custom_dataset")
        source = TASK_SOURCES.get(name) or config.get("dataset_path") or ""
        if takes_lengths(make):
            overrides = {**(overrides or {}), "custom_dataset": functools.partial(self._generate, name, make)}
        try:
            if config.get("unsafe_code") and not self.unsafe_code:
                raise ConfigError(
                    "lm-eval marks it as running programs that the model writes; allow that with "
                    "--confirm-run-unsafe-code"
                )
            if source in self.absent:
                raise ConfigError(self.absent[source])
            with seeded(name):
                return self._build(entry, overrides)
        except Exception as error:  # data sets fail in many ways
            if not is_ours(error):
                raise
            if source and unreachable(f"{type(error).__name__}: {error}"):
                self.absent[source] = f"{source} cannot be reached: {first_line(error)}"
            reason = str(error) if isinstance(error, ConfigError) else f"it cannot be loaded: {first_line(error)}"
            absent = _Unbuilt(name, reason, config, takes_lengths(make))
            self.unbuilt[name] = absent
            return absent

    def _generate(self, name: str, make: Callable[..., Any], **given: Any) -> dict[str, Any]:
        given.pop("max_seq_lengths", None)
        lengths = list(self._lengths) if self._lengths else None
        found = generate(name, make, given, lengths, self._limit, self._tokenizer, self.seconds)
        self.reasons[name] = found.reasons
        if not found.splits:
            raise ConfigError("; ".join(dict.fromkeys(found.reasons.values())))
        self.generated.add(name)
        return found.splits


def _main_metric(task: Any) -> str:
    metrics = list(task.aggregation())
    return next((metric for metric in _PREFERRED_METRICS if metric in metrics), metrics[0])


def model_of_job(
    model: Any, job: ModelJob, max_length: int, batch_size: int | None, hide_progress: bool = False
) -> Any:
    """Wrap a loaded model for lm-eval."""
    lm = model_class()(
        pretrained=model,
        scaling=job.scaling,
        tokenizer=load_tokenizer(job.model),
        batch_size=batch_size,
        max_length=max_length,
        hide_progress=hide_progress,
    )
    lm.pretrained = job.model
    return lm


class Measurable(Protocol):
    """The interface that `Unit` and `saved_questions.SavedUnit` share: rows by length, or by None."""

    @property
    def name(self) -> str: ...

    def cells(self, config: Any, scaling: RopeScaling, max_length: int | None) -> dict[int | None, Row]: ...


def job_cells(unit: Measurable, job: ModelJob, max_length: int | None) -> dict[int | None, Row]:
    """Length -> the fields that identify a row of `job`."""
    cells = unit.cells(load_config(job.model), job.scaling, max_length)
    return {length: {**job.fields(), **cell} for length, cell in cells.items()}


def main() -> int:
    """lm-eval's command line with the model type "scaled-rope"."""
    model_class()
    _lm_eval("__main__").cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
