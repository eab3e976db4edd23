"""Benchmark questions as plain files of token ids, so that machines without lm-eval score what lm-eval asks.

`eval/harness.py --save-requests DIR` writes them where lm-eval is, `--requests DIR` scores them. A file holds one
benchmark as JSON lines: a header, then a line per question,

    {"task": "arc_challenge", "contexts": [[…]], "choices": [[0, […], 5.0], …], "target": 2}

where a choice is (index of its context, token ids of the continuation, its length in characters) and the target is the
index of the right choice, or, of benchmarks that ask for the share of probability on true answers, a 0 or 1 for each.
Rows have the identity of lm-eval's own, so the two ways fill the same tables.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from scaled_rope.checkpoint import encode, load_tokenizer
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.evaluation.continuations import NO_LIMIT, Continuation, context_limit, score
from scaled_rope.evaluation.lm_eval_tasks import Unit, measured_rows
from scaled_rope.files import write_atomic
from scaled_rope.results import Row, read_rows
from scaled_rope.scaling.record import RopeScaling

_PROBE = 2000  # characters of a prompt that tell tokenizers apart


# ------------------------------------------------------------------------------------------------------------- answers


def outcomes(choices: Sequence[tuple[float, float]], target: int | Sequence[int]) -> dict[str, float]:
    """The values of one question for a benchmark's metrics, which are means over questions.

    Args:
        choices: log-likelihood in nats and length in characters of each choice.
        target: index of the right one: 1 or 0 for having found it by likelihood ("acc") and by likelihood per character
            ("acc_norm"). A 0 or 1 for each choice: "acc" is the share of the probability on those that are true.
    """
    if not isinstance(target, int):
        top = max(value for value, _ in choices)
        masses = [math.exp(value - top) for value, _ in choices]
        return {"acc": sum(mass for mass, true in zip(masses, target, strict=True) if true) / sum(masses)}
    likeliest = max(range(len(choices)), key=lambda index: choices[index][0])
    per_character = max(range(len(choices)), key=lambda index: choices[index][0] / choices[index][1])
    return {"acc": float(likeliest == target), "acc_norm": float(per_character == target)}


# ------------------------------------------------------------------------------------------------------------- writing


def save_requests(unit: Unit, lm: Any, folder: str | Path) -> Path:
    """Write the questions of a unit, tokenized by lm-eval for `lm` (an lm-eval model; nothing is computed with it).

    For every question, `outcomes` and lm-eval's own rule are both given made-up log-likelihoods and must agree.

    Raises:
        ConfigError: a task that is not multiple choice, or whose answers are judged otherwise.
    """
    unit.prepare()
    lines: list[Row] = []
    probe = ""
    for name, task in unit.tasks.items():
        task.build_all_requests(samples=unit.documents[name])
        if task.OUTPUT_TYPE != "multiple_choice" or unit.lengths != [None]:
            raise ConfigError(f"task {name!r} cannot be saved as requests: it is not multiple choice")
        instances = sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx))
        probe = probe or instances[0].args[0][:_PROBE]
        tokens = iter(_tokenized(lm, instances))
        for _, group in groupby(instances, key=lambda instance: instance.doc_id):
            of = list(group)
            line = _question(name, task, of[0].doc, [next(tokens) for _ in of])
            _compare(task, of[0].doc, line, unit.metric)
            lines.append(line)
    cell = next(iter(unit.cells(lm.config, lm.scaling, None).values()))
    cell["protocol"]["max_length"] = None
    header = {
        "cell": cell,
        "metric": unit.metric,
        "version": unit.version,
        "probe": {"text": probe, "input_ids": encode(lm.tokenizer, probe)},
    }
    path = Path(folder) / f"{unit.name}.jsonl"
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [header, *lines]))
    return path


def _tokenized(lm: Any, instances: Sequence[Any]) -> list[Continuation]:
    """The continuations that lm-eval would have `lm` score, caught on their way to it."""
    found: list[Continuation] = []

    def note(requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        found.extend(Continuation(context, continuation) for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    lm._loglikelihood_tokens = note
    try:
        lm.loglikelihood(instances, disable_tqdm=True)
    finally:
        del lm._loglikelihood_tokens
    return found


def _question(name: str, task: Any, document: Any, requests: Sequence[Continuation]) -> Row:
    texts = task.doc_to_choice(document)
    if len(texts) != len(requests):
        raise ConfigError(
            f"task {name!r} cannot be saved as requests: it asks {len(requests)} for {len(texts)} choices"
        )
    contexts: list[list[int]] = []
    choices = []
    for text, request in zip(texts, requests, strict=True):
        context = list(request.context)
        if context not in contexts:
            contexts.append(context)
        choices.append([contexts.index(context), list(request.continuation), float(len(text))])
    target = document["mc2_targets"]["labels"] if "mc2_targets" in document else task.doc_to_target(document)
    if isinstance(target, str) and target in texts:
        target = texts.index(target)
    return {"task": name, "contexts": contexts, "choices": choices, "target": target}


def _compare(task: Any, document: Any, line: Row, metric: str) -> None:
    rng = random.Random(json.dumps(line["choices"]))
    values = [rng.uniform(-20.0, -1.0) for _ in line["choices"]]
    theirs = task.process_results(document, [(value, False) for value in values])
    ours = outcomes(_answers(line, values), line["target"])
    # not equal to the last bit: the two sum exponentials in different orders
    if metric not in theirs or metric not in ours or not math.isclose(theirs[metric], ours[metric], abs_tol=1e-9):
        raise ConfigError(
            f"task {line['task']!r} cannot be saved as requests: its {metric} is {theirs.get(metric)} where the rule"
            f" for multiple choice says {ours.get(metric)}"
        )


def _answers(line: Row, values: Sequence[float]) -> list[tuple[float, float]]:
    return [(value, length) for value, (_, _, length) in zip(values, line["choices"], strict=True)]


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scorer:
    """A model and the other arguments of `score` that a saved benchmark is measured with."""

    model: Any
    scaling: RopeScaling
    max_length: int = NO_LIMIT
    rows: int | None = None
    hide_progress: bool = True


@dataclass(frozen=True)
class SavedUnit:
    """One benchmark of a folder of requests; `cells` and `measure` are those of `lm_eval_tasks.Unit`."""

    name: str
    header: Row
    questions: tuple[Row, ...]

    @property
    def version(self) -> str | None:
        """The version of lm-eval that made the prompts."""
        version: str | None = self.header["version"]
        return version

    def check_tokenizer(self, model: str) -> None:
        """Raise ConfigError when the tokenizer of a checkpoint is not the one that the requests were made with."""
        probe = self.header["probe"]
        if encode(load_tokenizer(model), probe["text"]) != probe["input_ids"]:
            raise ConfigError(f"requests of {self.name!r} were made with another tokenizer than that of {model!r}")

    def cells(self, config: Any, scaling: RopeScaling, max_length: int | None) -> dict[int | None, Row]:
        """{None: the fields that identify the row}; `max_length` as for `lm_eval_tasks.Unit`."""
        limit = max_length or context_limit(config, scaling)
        cell = self.header["cell"]
        protocol = cell["protocol"] | {"max_length": None if limit == NO_LIMIT else limit}
        return {None: cell | {"protocol": protocol}}

    def requests(self) -> Iterator[Continuation]:
        """All choices of all questions, in order."""
        for line in self.questions:
            for context, continuation, _ in line["choices"]:
                yield Continuation(line["contexts"][context], continuation)

    def measure(self, scorer: Scorer, lengths: Sequence[int | None] | None = None) -> dict[int | None, Row]:
        """Score all questions; return the measured fields as `lm_eval_tasks.Unit.measure` does.

        lengths: [None] at most, since questions have no lengths.
        """
        requests = list(self.requests())
        limit = scorer.max_length
        found = score(scorer.model, scorer.scaling, requests, limit, scorer.rows, scorer.hide_progress)
        values = iter(value for value, _ in found)
        judged: dict[str, list[Mapping[str, float]]] = {}
        for line in self.questions:
            answers = _answers(line, [next(values) for _ in line["choices"]])
            judged.setdefault(line["task"], []).append(outcomes(answers, line["target"]))
        results = {
            "results": {task: _summary(of) for task, of in judged.items()},
            "samples": {task: [{"filter": "none", **one} for one in of] for task, of in judged.items()},
        }
        (row,) = measured_rows(results, self.header["metric"], [None]).values()
        cut = sum(len(request.context) + len(request.continuation) > limit + 1 for request in requests)
        return {None: {**row, "requests": len(requests), "truncated": cut}}


def _summary(judged: Sequence[Mapping[str, float]]) -> Row:
    """Means and standard errors under lm-eval's names."""
    count = len(judged)
    found: Row = {"sample_len": count}
    for metric in judged[0]:
        values = [one[metric] for one in judged]
        mean = sum(values) / count
        found[f"{metric},none"] = mean
        if count > 1:
            variance = sum((value - mean) ** 2 for value in values) / (count - 1)
            found[f"{metric}_stderr,none"] = math.sqrt(variance / count)
    return found


def read_requests(folder: str | Path, names: Sequence[str] | None = None) -> list[SavedUnit]:
    """Read the benchmarks called `names` from a folder of requests; by default all that are there.

    Raises:
        ConfigError: no such folder or benchmark, or a file that holds no requests.
    """
    files = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))}
    if not files:
        raise ConfigError(f"requests {str(folder)!r} is no folder with saved requests; make it with --save-requests")
    units = []
    for name in dict.fromkeys(files if names is None else names):
        if name not in files:
            raise unknown(f"task in {folder}:", name, files)
        lines = read_rows(files[name])
        if len(lines) < 2 or "cell" not in lines[0] or not all("choices" in line for line in lines[1:]):
            raise ConfigError(f"requests {str(files[name])!r} holds no requests; make it anew with --save-requests")
        units.append(SavedUnit(name, lines[0], tuple(lines[1:])))
    return units
