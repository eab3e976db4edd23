"""Resumable states of a run: written in one step, the oldest deleted, and continued only by the run they belong to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from scaled_rope.checkpoint import weights_hash
from scaled_rope.errors import ConfigError, first_line
from scaled_rope.files import folder_lock, write_atomic
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.results import Row, rows_so_far
from scaled_rope.training.engine import engine_name
from scaled_rope.training.manifest import entries, fault, read_facts, state_files, write_manifest
from scaled_rope.training.random_state import RandomState


def gather_object(mine: list[Any]) -> list[Any]:
    """The lists of all ranks, one after another; every rank must call this."""
    from accelerate.utils import gather_object as gathered

    return list(gathered(mine))


@contextlib.contextmanager
def refused_on_all_ranks() -> Iterator[None]:
    """End all ranks with the error that one of them raised inside, said once on each machine. All must enter.

    Otherwise those that wait for it would say that they lost the connection. Nothing inside may call other ranks.

    Raises:
        ConfigError, OSError: as one was raised inside, on the first rank of each machine.
        SystemExit: in its place with code 2, on the others.
    """
    mine: Exception | None = None
    try:
        yield
    except (ConfigError, OSError) as error:
        mine = error
    said = [text for text in gather_object([None if mine is None else str(mine)]) if text is not None]
    if said and os.environ.get("LOCAL_RANK", "0") != "0":
        raise SystemExit(2)
    if said:
        raise mine or ConfigError(said[0])


def sync(path: Path) -> None:
    """Make sure that a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


#: recipe fields that may differ between a run and its resumption without changing what is computed
_FREE_FIELDS = {
    "name", "description", "output_dir", "prepare", "rebuild", "evaluate", "batch_size", "checkpointing_steps",
    "save_dtype", "stop_after", "kept_checkpoints", "offload_activations", "gradient_checkpointing", "loss",
    "keep_attention",
    "sequence_parallel", "context_parallel", "heldout", "heldout_lengths", "heldout_steps", "heldout_rows",
}  # fmt: skip


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Lock a run's output folder against other runs while this context lasts; the folder is created if it is missing.

    Only the first rank takes the lock; see `folder_lock`.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written to.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with folder_lock(output, "output_dir", "--output-dir"):
        yield


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """All that determines the result of a run: the recipe's fields, and the content of local weights and data."""
    fields = {name: value for name, value in recipe.to_dict().items() if name not in _FREE_FIELDS}
    paths = {"model_hash": recipe.model, "dataset_hash": recipe.dataset}
    return fields | {name: weights_hash(path) for name, path in paths.items() if path and Path(path).is_dir()}


#: recipe fields that a state and a run that continues from it must share: what is trained, and the optimizer's layout
_LAYOUT_FIELDS = (
    "model", "model_hash", "init", "scaling", "layers", "drop_layers", "rope_theta", "original_max_position_embeddings",
    "max_position_embeddings", "lora", "lora_embeddings_and_norms", "quantization",
    "precision",
)  # fmt: skip

#: files of a run that every state has a copy of, so that it says by itself where it comes from
_COPIED = ("recipe.yaml", "train_log.jsonl", "provenance.json")

_DEFAULTS = {name: getattr(Recipe, name) for name in Recipe.__dataclass_fields__ if hasattr(Recipe, name)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of `now`, of a fingerprint, that were different before -> both values.

    A run that was begun before a field existed had what is its default now.
    """
    old = {name: before.get(name, _DEFAULTS.get(name)) for name in now}
    return {name: (old[name], value) for name, value in now.items() if old[name] != value}


def check_same_run(recipe: Recipe, output: Path) -> None:
    """Raise an error if the folder holds a run of another recipe or of other weights, which must not be continued.

    Raises:
        ConfigError: a field differs, or the folder holds a model that no run wrote.
    """
    if latest_state(output) is None and not (output / "model").exists():
        return
    if not (output / "recipe.yaml").exists():
        raise ConfigError(
            f"output_dir {output} holds a model or states, and no recipe.yaml that says of which run; choose another"
            f" --output-dir"
        )
    for name, (old, new) in differences(_recorded(output / "recipe.yaml"), fingerprint(recipe)).items():
        raise ConfigError(
            f"output_dir {output} holds a run with {name} = {old!r}, now {new!r};"
            f" choose another --output-dir or remove it"
        )


def _recorded(path: Path) -> dict[str, Any]:
    """The recipe and fingerprint that a run wrote."""
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} is not the record of a run: it cannot be read")
    return record


def latest_state(output: Path) -> Path | None:
    """The newest complete resumable state of a run, if any."""
    states = sorted((output / "checkpoints").glob("step-*"))
    return states[-1] if states else None


def find_state(recipe: Recipe, output: Path, resume: str) -> Path | None:
    """The state that a run starts from; None for a new run.

    resume: "auto" is the newest of the run's own states, or else the recipe's `continue_from`; otherwise a folder
        checkpoints/step-N, of this run or of one of the same recipe.

    Raises:
        ConfigError: no state there, or one of another run: a field of the recipe differs.
    """
    if resume != "auto":
        state = Path(resume)
        for name, (old, new) in differences(state_recipe(state, "resume"), fingerprint(recipe)).items():
            deliberate = "" if name in _LAYOUT_FIELDS else ", or take --continue-from"
            raise ConfigError(
                f"resume {resume} is a state of a run with {name} = {old!r}, now {new!r}; resume with the same"
                f" settings{deliberate}"
            )
        return state
    if (own := latest_state(output)) is not None or recipe.continue_from is None:
        return own
    state = Path(recipe.continue_from)
    before, now = state_recipe(state, "continue_from"), fingerprint(recipe)
    shared = {name: now.get(name) for name in _LAYOUT_FIELDS if name in now or name in before}
    for name, (old, new) in differences(before, shared).items():
        raise ConfigError(
            f"continue_from {state} is a state of a run with {name} = {old!r}, now {new!r}; model, scaling, adapters"
            f" and precision must be the same"
        )
    if (done := read_facts(state, "continue_from")["step"]) >= recipe.max_train_steps:
        raise ConfigError(
            f"max_train_steps {recipe.max_train_steps} is not allowed with continue_from {state}; more than {done}, the"
            f" steps that are done there"
        )
    return state


def state_recipe(state: Path, field: str) -> dict[str, Any]:
    """The recipe and fingerprint of the run that saved a state, which was named by `field`.

    Raises:
        ConfigError: there is no such state, or no record of its run in it or in the run's folder above it.
    """
    read_facts(state, field)
    found = _beside(state, "recipe.yaml")
    if found is None:
        raise ConfigError(f"{field} {state} does not say which run it is of: recipe.yaml is missing there")
    return _recorded(found)


def _beside(state: Path, name: str) -> Path | None:
    """A file of a state's run: the copy in the state, or the run's own where an older version made no copies."""
    places = [state / name, *([state.parent.parent / name] if state.parent.name == "checkpoints" else [])]
    return next((path for path in places if path.is_file()), None)


def continuation(recipe: Recipe, state: Path | None) -> dict[str, Any] | None:
    """The run that one with `continue_from` was continued from, for its records; `state` is where it starts now.

    Returns:
        None where it wasn't; "state", "step", "recipe", and "continued_from" where that run was continued itself.
    """
    if state is None or recipe.continue_from is None:
        return None
    path = _beside(state, "provenance.json")
    before = json.loads(path.read_text(encoding="utf-8")).get("continued_from") if path is not None else None
    if state_recipe(state, "resume").get("continue_from") == recipe.continue_from:
        found: dict[str, Any] | None = before  # one of the continued run's own states
        return found
    record = {"state": str(state), "step": read_facts(state, "continue_from")["step"]}
    record["recipe"] = state_recipe(state, "continue_from")
    return record | ({"continued_from": before} if before else {})


def read_log(output: Path) -> list[Row]:
    """The per-step rows of a run."""
    return rows_so_far(output / "train_log.jsonl")


def steps_of(log: Path, last: int) -> list[Row]:
    """The rows of a log up to a step: each once, in order.

    Raises:
        ConfigError: a step is missing, doubled or out of order; it names the line.
    """
    rows = rows_so_far(log)
    for number, row in enumerate(rows[:last], 1):
        if row.get("step") != number:
            raise ConfigError(f"{log}, line {number}: step {row.get('step')!r} is not allowed; {number} comes here")
    if len(rows) < last:
        raise ConfigError(f"{log} ends with step {len(rows)}, and the state is of step {last}")
    return rows[:last]


def check_space(recipe: Recipe, parameters: int) -> None:
    """Raise an error for a run whose model and states would not fit on the disk.

    A state holds weights and two moments in float32; while one is written, there is one more than is kept.

    Raises:
        ConfigError: there is less room than that.
    """
    # Bytes per parameter: 12 for a state, 4 for the model.
    states = (recipe.kept_checkpoints + 1) * 12 if recipe.checkpointing_steps else 0
    needed, free = (states + 4) * parameters, shutil.disk_usage(recipe.output_dir).free
    if free < needed:
        raise ConfigError(
            f"output_dir {recipe.output_dir} has {size_text(free)} free, the run needs up to {size_text(needed)};"
            f" free some, or save fewer states with --checkpointing-steps"
        )


_FULL = re.compile(r"no space left|os error (28|27|122)\b|unexpected pos|file too large|quota exceeded", re.IGNORECASE)
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = re.compile(r"no such file|os error (2|13|20|30)\b|does not exist|read-only|not a directory", re.IGNORECASE)
_GONE_NUMBERS = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS)


@contextlib.contextmanager
def naming_a_lost_disk(folder: Path, needed: float) -> Iterator[None]:
    """Report a disk that fills up, or a folder that was removed or made read-only while the run was at work.

    It is one line, whatever torch, safetensors and DeepSpeed raise then.

    needed: bytes that are to be written.

    Raises:
        ConfigError: in place of these exceptions.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if number in _FULL_NUMBERS or _FULL.search(str(error)) is not None:
            free = shutil.disk_usage(place).free
            why = f"no space left, or a limit for a file's size ({size_text(free)} free, about"
            why += f" {size_text(needed)} needed)"
        elif number in _GONE_NUMBERS or _GONE.search(str(error)) is not None:
            why = f"it was removed or made read-only meanwhile ({first_line(error)})"
        else:
            raise
        raise ConfigError(
            f"{folder} cannot be written: {why}; what was saved before is whole, and the same command continues"
        ) from error


def check_there(output: Path) -> None:
    """Raise an error where the records that a run wrote at its begin are gone, before anything is saved beside them.

    A state or model without them could not be continued: nobody would know whose it is.

    Raises:
        ConfigError: the folder, or one of them, was removed.
    """
    for name in _COPIED:
        if not (output / name).is_file():
            raise ConfigError(
                f"output_dir {output} was changed while the run was at work: {name} is gone; the same command continues"
                f" from what is left"
            )


def size_text(size: float) -> str:
    """A number of bytes for people: "80.7 kB", "13.5 GB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def _random_name(rank: int) -> str:
    return f"random-state-{rank}.json"


def save_state(accelerator: Any, recipe: Recipe, step: int) -> Path:
    """Write the state after `step` steps and return its folder, which gets its name only when it is complete.

    Every rank must call this.
    """
    check_there(Path(recipe.output_dir))
    folder = Path(recipe.output_dir) / "checkpoints"
    staged, final = folder / f".step-{step:06d}.partial", folder / f"step-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(staged, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staged))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    RandomState().save(staged / _random_name(rank))
    (staged / f"random_states_{rank}.pkl").unlink(missing_ok=True)  # accelerate's, a pickle with the same content
    if accelerator.is_main_process:
        for name in _COPIED:
            shutil.copyfile(Path(recipe.output_dir) / name, staged / name)
    accelerator.wait_for_everyone()
    own = state_files(staged)[rank::ranks]
    with ThreadPoolExecutor(1) as pool:  # hashes cost nearly nothing while the disk is waited for
        hashing = pool.submit(entries, staged, own)
        for name in own:
            sync(staged / name)
        mine = hashing.result()
    files = {name: entry for part in gather_object([mine]) for name, entry in part.items()}
    if accelerator.is_main_process:
        facts = {"step": step, "ranks": ranks, "engine": engine_name(accelerator)}
        write_manifest(staged, facts, files)
        shutil.rmtree(final, ignore_errors=True)  # there when an older state was resumed
        os.rename(staged, final)
        put_aside(accelerator, folder, final.name)
        for old in sorted(folder.glob("step-*"))[: -recipe.kept_checkpoints]:
            shutil.rmtree(old)
    return final


def put_aside(accelerator: Any, folder: Path, newest: str) -> None:
    """Rename the states of later steps than `newest`: a run that was resumed at an older state has left them.

    Otherwise they would count as the newest, and those that follow now as the oldest, which are deleted.
    """
    for left in sorted(path for path in folder.glob("step-*") if path.name > newest):
        aside = left.with_name(f"before-resuming-{left.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(left, aside)
        accelerator.print(
            f"state {left} is of the course before this run was resumed; it is called {aside.name} until the run ends"
        )


def sound_state(accelerator: Any, recipe: Recipe, state: Path | None, named: bool) -> Path | None:
    """The state to start from, after all its files were held against its manifest. Every rank must call this.

    A damaged one of the run's own is put aside as `damaged-step-N` with a line that says what is wrong, and the newest
    good one is taken, or else the recipe's `continue_from`, or None.

    named: whether the user named this state; then nothing else is taken.

    Raises:
        ConfigError: a state that was named, or `continue_from`, is damaged.
    """
    while state is not None:
        mine = fault(state, accelerator.process_index, accelerator.num_processes)
        wrong = next((text for text in gather_object([mine]) if text is not None), None)
        if wrong is None:
            return state
        own = state.parent == Path(recipe.output_dir) / "checkpoints"
        if named or not own:
            raise ConfigError(f"{'resume' if named else 'continue_from'} {state} {wrong}")
        aside = state.with_name(f"damaged-{state.name}")
        accelerator.print(f"state {state} {wrong}; it is kept as {aside.name} and not used")
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(state, aside)
        accelerator.wait_for_everyone()
        state = latest_state(Path(recipe.output_dir)) or (Path(recipe.continue_from) if recipe.continue_from else None)
    return None


def load_state(accelerator: Any, state: Path | None, output: Path) -> int:
    """Load a state and give the run the log up to it; return the first step to do. Every rank must call this.

    Raises:
        ConfigError: a state that this engine, or this number of processes, cannot continue, or that is damaged.
    """
    step, log = 0, output / "train_log.jsonl"
    if state is not None:
        saved = read_facts(state, "resume")
        engine, ranks = engine_name(accelerator), accelerator.num_processes
        if saved.get("engine", engine) != engine:
            raise ConfigError(
                f"state {state} was saved by engine {saved['engine']}, this is {engine}: their optimizer states differ;"
                f" resume with the same launcher"
            )
        if saved["ranks"] != ranks and engine != "plain":
            raise ConfigError(
                f"state {state} was saved by {saved['ranks']} {engine} processes, now there are {ranks}: each holds a"
                f" shard of the optimizer; resume on the same number"
            )
        try:
            accelerator.load_state(str(state))
        except Exception as error:  # torch, safetensors, pickle and DeepSpeed raise unrelated types
            raise ConfigError(f"state {state} cannot be loaded: {first_line(error)}") from error
        # States of earlier versions hold a pickle instead, which accelerate has loaded; and a rank that was not there
        # when the state was saved has none.
        if (place := state / _random_name(accelerator.process_index)).exists():
            RandomState.load(place).restore()
        step, log = saved["step"], _beside(state, "train_log.jsonl") or log
        if accelerator.is_main_process and state.parent.resolve() == (output / "checkpoints").resolve():
            put_aside(accelerator, state.parent, state.name)  # or a run that ends before it saves would go back to them
        accelerator.print(f"resuming after step {step} from {state}")
    kept = steps_of(log, step)
    if accelerator.is_main_process:
        write_atomic(output / "train_log.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    accelerator.wait_for_everyone()
    return step
