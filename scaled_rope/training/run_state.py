"""Resumable states of a run: written in one step, the oldest deleted, and continued only by the run they belong to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scaled_rope.checkpoint import weights_hash
from scaled_rope.errors import ConfigError
from scaled_rope.recipes import Recipe
from scaled_rope.results import Row, rows_so_far, write_atomic
from scaled_rope.training.engine import engine_name

#: recipe fields that may differ between a run and its resumption without changing what is computed
_FREE_FIELDS = {
    "name", "description", "output_dir", "prepare", "rebuild", "evaluate", "batch_size", "checkpointing_steps",
    "kept_checkpoints", "offload_activations", "gradient_checkpointing", "loss", "sequence_parallel", "heldout",
    "heldout_lengths", "heldout_steps", "heldout_rows",
}  # fmt: skip


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Lock a run's output folder against other runs while this context lasts; the folder is created if it is missing.

    Only the first rank takes the lock. The kernel releases it when that process ends, for whatever reason. A run that
    is refused before it has written anything leaves no folder behind.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written to.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    path, is_new = output / ".lock", not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(f"output_dir {output} cannot be written to: {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"output_dir {output} cannot be locked: {error.strerror or error}") from None
            file.seek(0)
            holder = " ".join(file.read().split()) or "unknown"
            raise ConfigError(
                f"output_dir {output} is being written by another run, process {holder}; choose another --output-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        except ConfigError:
            if is_new and list(output.iterdir()) == [path]:
                path.unlink()
                output.rmdir()
            raise


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """All that determines the result of a run: the recipe's fields, and the content of local weights and data."""
    fields = {name: value for name, value in recipe.to_dict().items() if name not in _FREE_FIELDS}
    paths = {"model_hash": recipe.model, "dataset_hash": recipe.dataset}
    return fields | {name: weights_hash(path) for name, path in paths.items() if path and Path(path).is_dir()}


def check_same_run(recipe: Recipe, output: Path) -> None:
    """Raise an error if the folder holds a run of another recipe or of other weights, which must not be continued.

    Raises:
        ConfigError: a field differs, or the folder holds a model that no run wrote.
    """
    if latest_state(output) is None and not (output / "model").exists():
        return
    if not (output / "recipe.yaml").exists():
        raise ConfigError(f"output_dir {output} holds a model that no training run wrote; choose another --output-dir")
    before, now = yaml.safe_load((output / "recipe.yaml").read_text()), fingerprint(recipe)
    defaults = {name: getattr(Recipe, name) for name in Recipe.__dataclass_fields__ if hasattr(Recipe, name)}
    for name, value in now.items():
        # A run that was begun before a field existed had what is its default now.
        if before.get(name, defaults.get(name)) != value:
            raise ConfigError(
                f"output_dir {output} holds a run with {name} = {before.get(name)!r}, now {value!r};"
                f" choose another --output-dir or remove it"
            )


def latest_state(output: Path) -> Path | None:
    """The newest complete resumable state of a run, if any."""
    states = sorted((output / "checkpoints").glob("step-*"))
    return states[-1] if states else None


def find_state(output: Path, resume: str) -> Path | None:
    """The state that `resume` names: "auto" is the newest of the run, if any; otherwise a folder checkpoints/step-N.

    Raises:
        ConfigError: no state there.
    """
    if resume == "auto":
        return latest_state(output)
    if not (Path(resume) / "state.json").is_file():
        raise ConfigError(f"resume_from_checkpoint {resume} is no saved state; a folder checkpoints/step-N")
    return Path(resume)


def read_log(output: Path) -> list[Row]:
    """The per-step rows of a run."""
    return rows_so_far(output / "train_log.jsonl")


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
            f"output_dir {recipe.output_dir} has {free / 1e9:.1f} GB free, the run needs up to {needed / 1e9:.1f} GB;"
            f" free some, or save fewer states with --checkpointing-steps"
        )


def save_state(accelerator: Any, recipe: Recipe, step: int) -> Path:
    """Write the state after `step` steps and return its folder, which gets its name only when it is complete.

    Every rank must call this.
    """
    folder = Path(recipe.output_dir) / "checkpoints"
    staged, final = folder / f".step-{step:06d}.partial", folder / f"step-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(staged, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staged))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        facts = {"step": step, "ranks": accelerator.num_processes, "engine": engine_name(accelerator)}
        write_atomic(staged / "state.json", json.dumps(facts) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # there when an older state was resumed
        os.rename(staged, final)
        for old in sorted(folder.glob("step-*"))[: -recipe.kept_checkpoints]:
            shutil.rmtree(old)
    return final


def load_state(accelerator: Any, state: Path | None, output: Path) -> int:
    """Load a state and cut the run's log back to it; return the first step to do. Every rank must call this.

    Raises:
        ConfigError: a state that this engine, or this number of processes, cannot continue.
    """
    step = 0
    if state is not None:
        saved = json.loads((state / "state.json").read_text())
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
        accelerator.load_state(str(state))
        step = saved["step"]
        accelerator.print(f"resuming after step {step} from {state}")
    if accelerator.is_main_process:
        kept = [json.dumps(row) + "\n" for row in read_log(output) if row["step"] <= step]
        write_atomic(output / "train_log.jsonl", "".join(kept))
    accelerator.wait_for_everyone()
    return step
