"""Prompts that tasks of lm-eval generate for a context length, such as those of RULER.

lm-eval's generators draw from random states that live as long as the process, so that their prompts depend on what ran
before; some never end, or fail, at a length that is too short for them; and all of a task's lengths fail together.
Here a generator runs in a process of its own, forked for it, one length after the other. Sample number i of a task at a
length is drawn from a state that task, length, i and `SEED` determine. A length that fails, has prompts that don't fit
it, or takes too long, gets a reason, and the next one follows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import itertools
import multiprocessing
import os
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaled_rope.errors import ConfigError, first_line

SEED = 42
"""The seed of generated prompts."""
SECONDS = 600.0
"""The time in seconds that the prompts of a task may take at one length."""

_TASKS = "lm_eval.tasks."
_UNREACHABLE = (
    "ConnectionError",
    "ConnectError",
    "Couldn't reach",
    "Name or service not known",
    "offline mode",
    "outgoing traffic has been disabled",
    "urlopen error",
)
"""Words of libraries that cannot reach a server."""
_STUCK = 100  # measured prompts of one sample without a shorter one: the generator is at its smallest


@dataclass(frozen=True)
class Generated:
    """The prompts of a task."""

    splits: dict[str, Any]
    """Split -> data set, of all lengths that could be generated; empty if none could."""
    reasons: dict[int | None, str] = field(default_factory=dict)
    """Length in tokens -> why there are no prompts of that length; None: of no length."""


# --------------------------------------------------------------------------------------------------------------- seeds


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def seed_everything(name: str, owned: Sequence[random.Random] = ()) -> None:
    """Put Python's and numpy's random states, and those in `owned`, where `name` and `SEED` say."""
    number = _number(f"{SEED}/{name}")
    random.seed(number)
    np.random.seed(number % 2**32)
    for index, state in enumerate(owned):
        state.seed(_number(f"{number}/{index}"))


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Within this context the random states of the process depend on `name` alone; afterwards they are as before."""
    python, arrays = random.getstate(), np.random.get_state()
    seed_everything(name)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


# ---------------------------------------------------------------------------------------------------------- generation


def unreachable(reason: str) -> bool:
    """Whether something failed because the network, or a server, cannot be reached: it would again at once."""
    return any(words in reason for words in _UNREACHABLE)


def generate(
    name: str,
    make: Callable[..., Any],
    given: Mapping[str, Any],
    lengths: Sequence[int] | None,
    limit: int | None = None,
    tokenizer: Callable[[], Any] | None = None,
    seconds: float = SECONDS,
) -> Generated:
    """Run a task's generator of prompts.

    Args:
        name: the task's name.
        make: the generator, `custom_dataset` of the task's configuration; it returns splits.
        given: its arguments.
        lengths: in tokens; None: the generator's own.
        limit: samples for each length; None: as many as the generator makes.
        tokenizer: loads the tokenizer that prompts are measured with, for generators that ask for one.
        seconds: time for each length.
    """
    modules = _modules(make)
    measured = tokenizer() if tokenizer is not None and any("get_tokenizer" in each for each in modules) else None
    work = _Work(name, make, dict(given), limit, modules, measured)
    found: list[dict[str, Any]] = []
    reasons: dict[int | None, str] = {}
    left: list[int | None] = [None] if lengths is None else list(lengths)
    while left:
        for length, splits, reason, _ in _in_own_process(work, list(left), seconds):
            left.remove(length)
            if splits is not None:
                found.append(splits)
                continue
            reasons[length] = str(reason)
            if unreachable(str(reason)):
                reasons |= dict.fromkeys(left, str(reason))
                left = []
                break
    if not found:
        return Generated({}, reasons)
    datasets = importlib.import_module("datasets")
    splits = {split: datasets.concatenate_datasets([each[split] for each in found]) for split in found[0]}
    return Generated(splits, reasons)


@dataclass(frozen=True)
class _Work:
    name: str
    make: Callable[..., Any]
    given: dict[str, Any]
    limit: int | None
    modules: list[dict[str, Any]]
    tokenizer: Any


_Answer = tuple[int | None, dict[str, Any] | None, str | None, bool]
"""A length, its splits or the reason why there are none, and whether the process goes on to the next length."""


def _in_own_process(work: _Work, lengths: Sequence[int | None], seconds: float) -> Iterator[_Answer]:
    """Generate the prompts of some lengths in a forked process; ends early when one length fails to end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, lengths, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        for length in lengths:
            if not ours.poll(seconds):
                yield length, None, f"its prompts were not ready after {seconds:g} s", False
                return
            try:
                answer: _Answer = ours.recv()
            except EOFError:
                yield length, None, "the process that generates its prompts died", False
                return
            yield answer
            if not answer[-1]:
                return
    finally:
        process.kill()
        process.join()
        ours.close()


def _run(work: _Work, lengths: Sequence[int | None], answers: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for length in lengths:
            try:
                answers.send((length, _of_length(work, length, answers), None, True))
            except BaseException as error:
                kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
                answers.send((length, None, f"{kind}{first_line(error)}", True))


def _of_length(work: _Work, length: int | None, answers: Any) -> dict[str, Any]:
    """The splits of one length. In the forked process: what is changed here stays here.

    Raises:
        ConfigError: prompts that are empty, have no answer, or are longer than `length`.
    """
    owned = [value for each in work.modules for value in each.values() if isinstance(value, random.Random)]
    name = f"{work.name}/{length}"
    meter = None if work.tokenizer is None else _Meter(work.tokenizer, length, answers)
    passes = itertools.count()

    def samples(numbers: Any, *_: Any, **__: Any) -> Iterator[Any]:
        """In place of tqdm, around which every generator's loop over samples runs."""
        number = next(passes)
        for index, item in enumerate(itertools.islice(numbers, work.limit)):
            seed_everything(f"{name}/{number}/{index}", owned)
            if meter is not None:
                meter.begin()
            yield item
        if meter is not None:
            meter.end()

    for each in work.modules:
        if "tqdm" in each:
            each["tqdm"] = samples
        if "get_tokenizer" in each and meter is not None:
            each["get_tokenizer"] = lambda *_, **__: meter
        if (draw := each.get("generate_input_output")) is not None:
            each["generate_input_output"] = _ending(draw, length, answers)
    seed_everything(name, owned)
    given = dict(work.given)
    if length is not None:
        given["max_seq_lengths"] = _in_words_of(work.make, length)
    splits: dict[str, Any] = {split: rows for split, rows in work.make(**given).items()}
    if work.limit is not None:
        splits = {split: rows.select(range(min(work.limit, len(rows)))) for split, rows in splits.items()}
    if length is not None and _named_lengths(work.make):
        splits = {split: rows.add_column("max_length", [length] * len(rows)) for split, rows in splits.items()}
    for rows in splits.values():
        _check(rows, length, work.tokenizer)
    return splits


def _modules(make: Callable[..., Any]) -> list[dict[str, Any]]:
    """The namespaces of the generator's module and of those of lm-eval's tasks whose functions it uses."""
    found: list[dict[str, Any]] = []
    if isinstance(make, functools.partial):
        return _modules(make.func)
    left = [getattr(make, "__globals__", {})]
    while left:
        space = left.pop()
        if any(space is each for each in found):
            continue
        found.append(space)
        for value in list(space.values()):
            plain = getattr(value, "__wrapped__", value)  # functools.cache
            if isinstance(plain, types.FunctionType) and str(plain.__module__).startswith(_TASKS):
                left.append(plain.__globals__)
    return found


def takes_lengths(make: Any) -> bool:
    """Whether a task's `custom_dataset` generates prompts of given lengths: RULER's, BABILong's, and functions with a
    parameter `max_seq_lengths`."""
    if not callable(make):
        return False
    ruler = str(getattr(make, "__module__", "")).startswith(f"{_TASKS}ruler")
    return ruler or _named_lengths(make) or "max_seq_lengths" in inspect.signature(make).parameters


def _named_lengths(make: Callable[..., Any]) -> bool:
    """Whether a generator takes one length by name: BABILong's, which names a configuration of its data set."""
    return str(getattr(make, "__module__", "")).startswith(f"{_TASKS}babilong")


def _in_words_of(make: Callable[..., Any], length: int) -> list[int] | str:
    if not _named_lengths(make):
        return [length]
    if length % 1024:
        raise ConfigError(f"BABILong has no prompts of {length} tokens; its lengths are 1024, 2048, 4096, ...")
    return f"{length // 2**20}M" if length % 2**20 == 0 else f"{length // 1024}k"


def _check(rows: Any, length: int | None, tokenizer: Any) -> None:
    if len(rows) == 0:
        raise ConfigError("there are no prompts")
    if length is not None and "max_length" not in rows.column_names:
        raise ConfigError("its prompts don't say their length: there is no field max_length")
    if "outputs" in rows.column_names and not all(rows["outputs"]):
        raise ConfigError(f"{length} tokens are too short: there is a prompt without an answer in it")
    if length is None or tokenizer is None or "input" not in rows.column_names:
        return
    longest = max(len(tokenizer(text).input_ids) for text in rows["input"])
    if longest > length:
        raise ConfigError(f"{length} tokens are too short: there is a prompt of {longest}")


def _ending(draw: Callable[..., Any], length: int | None, answers: Any) -> Callable[..., Any]:
    """A generator's function that draws one prompt. It ends the process when it keeps failing, since the loops around
    it catch every exception and try again with the same arguments."""
    failed = 0

    def drawn(*args: Any, **options: Any) -> Any:
        nonlocal failed
        try:
            found = draw(*args, **options)
        except Exception as error:
            failed += 1
            if failed > _STUCK:
                reason = f"{length} tokens are too short: its generator fails on the shortest prompt"
                answers.send((length, None, f"{reason} ({first_line(error)})", False))
                os._exit(0)
            raise
        failed = 0
        return found

    return drawn


class _Meter:
    """The tokenizer of a generator. It ends the process when a prompt stays as long as it is.

    The loops that shorten a sample until it fits catch every exception, so none can end them.
    """

    def __init__(self, tokenizer: Any, length: int | None, answers: Any) -> None:
        self._tokenizer, self._length, self._answers = tokenizer, length, answers
        self._in_sample = False
        self._last: int | None = None  # the shortest of this sample; outside of samples, the one before
        self._tries = 0

    def begin(self) -> None:
        """A sample begins, whose prompt gets shorter until it fits."""
        self._in_sample, self._last, self._tries = True, None, 0

    def end(self) -> None:
        """The last sample ended; a prompt may get longer until it no longer fits."""
        self._in_sample, self._last, self._tries = False, None, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, *args: Any, **options: Any) -> Any:
        encoded = self._tokenizer(text, *args, **options)
        count = len(encoded.input_ids)
        if self._last is None or count < self._last or (not self._in_sample and count != self._last):
            self._last, self._tries = count, 0
        else:
            self._tries += 1
        if self._tries > _STUCK:
            reason = f"{self._length} tokens are too short: the shortest prompt has {self._last}, besides its answer"
            self._answers.send((self._length, None, reason, False))
            os._exit(0)
        return encoded
