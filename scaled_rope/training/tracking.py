"""Records of a run: a row per step in JSON lines, wandb or TensorBoard, and a card for its model."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from scaled_rope.errors import ConfigError
from scaled_rope.files import naming, write_atomic
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.results import Row

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito's palette


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, in GB (10^9 bytes): allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunLog:
    """Writes the rows of a run's steps to `train_log.jsonl` and to the trackers. For the main process."""

    def __init__(self, recipe: Recipe, wandb_project: str | None = None, tensorboard: str | None = None) -> None:
        self._path = Path(recipe.output_dir) / "train_log.jsonl"
        self._wandb = None if wandb_project is None else _wandb(wandb_project, recipe)
        self._tensorboard = None if tensorboard is None else _tensorboard(tensorboard)

    def add(self, row: Mapping[str, Any]) -> None:
        """Log one step."""
        with naming(self._path), self._path.open("a") as log:
            log.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(row), step=row["step"])
        if self._tensorboard is not None:
            for name, value in _flat(row).items():
                self._tensorboard.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Tell the trackers that the run is over."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name; those of a nested entry under entry/name."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in _flat(value).items()}
        elif isinstance(value, (int, float)) and name != "step":
            flat[name] = float(value)
    return flat


def _wandb(project: str, recipe: Recipe) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb needs wandb: pip install 'scaled-rope[wandb]'") from None
    return wandb.init(project=project, name=recipe.name, config=recipe.to_dict())


def _tensorboard(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter(folder)


def environment() -> dict[str, str]:
    """Every installed package and its version."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return dict(sorted((name, version) for name, version in found.items() if name))


def write_records(folder: Path, recipe: Recipe, facts: Mapping[str, Any], log: Sequence[Row], scaling: str) -> None:
    """Write beside a model the records of how it was made: card, resolved recipe, environment, code and machine.

    Args:
        facts: `provenance` of the run.
        log: rows of its steps; none for a model that was not trained.
        scaling: the scaling in words.
    """
    write_atomic(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
    # Not JSON: the hash of a checkpoint covers its JSON files, and it is not to change with the date.
    record = dict(facts) | {"environment": environment()}
    write_atomic(folder / "provenance.yaml", yaml.safe_dump(record, sort_keys=False))
    write_atomic(folder / "README.md", model_card(recipe, facts, log, scaling))


def pose_line(recipe: Recipe) -> list[str]:
    """The line of a card on position ids that jump; none where they don't."""
    if recipe.positions != "pose":
        return []
    text = "from several places of a row" if recipe.skip_text else "consecutive text"
    return [f"| positions | PoSE, {recipe.pose_chunks} chunks per sequence, {text} |"]


def mixed_lines(recipe: Recipe) -> list[str]:
    """The lines of a card on short steps and on weights of the loss; none where there are no such."""
    lines = []
    if recipe.short_share:
        share = f"{recipe.short_share:g} of the steps: windows of the original length, original frequencies"
        lines.append(f"| short steps | {share} |")
    if recipe.loss_weights == "long_ce":
        gain = f"gain of all tokens over the last {recipe.long_ce_context}, at most {recipe.long_ce_cap:g}"
        lines.append(f"| loss weights | LongCE: {gain} |")
    return lines


def continued_line(facts: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The line of a card on the run that another one was continued from; none where it wasn't."""
    if (before := facts.get("continued_from")) is None:
        return []
    old, new = before["recipe"], recipe.to_dict()
    ignored = {"continue_from", "output_dir", "name", "description"}
    changed = [
        f"{name} = {old[name]}" for name in new if name in old and name not in ignored and old[name] != new[name]
    ]
    settings = f" with {', '.join(changed)}" if changed else ""
    return [f"| continued from | {before['state']}: steps 1 to {before['step']} were done{settings} |"]


def model_card(recipe: Recipe, facts: Mapping[str, Any], log: Sequence[Row], scaling: str) -> str:
    """A model card in the hub's format: the base model, the data, the settings, and the losses."""
    base = recipe.model or "random weights"
    header = {"library_name": "transformers", "tags": ["scaled-rope", "long-context"]}
    if recipe.model is not None:
        header["base_model"] = recipe.model
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", f"# {recipe.name}", ""]
    lines += [recipe.description, ""] if recipe.description else []
    lines += ["| | |", "|---|---|", f"| started from | {base} |", f"| scaling | {scaling} |"]
    if log:
        last = log[-1]
        lines += [
            f"| data | {recipe.dataset}, sequences of {recipe.truncate or recipe.sequence_length} tokens |",
            *pose_line(recipe),
            *mixed_lines(recipe),
            f"| steps | {last['step']} of {recipe.global_batch_size} sequences, {last['tokens_seen']} tokens in all |",
            *continued_line(facts, recipe),
            f"| learning rate | {recipe.learning_rate:g}, {recipe.lr_schedule}, {recipe.warmup_steps} warm-up steps |",
            f"| AdamW | betas {tuple(recipe.adam_betas)}, weight decay {recipe.weight_decay:g} |",
            f"| precision | {recipe.precision} |",
            f"| trained | {'low-rank adapters, merged' if recipe.lora else 'all weights'} |",
            f"| loss of the first and the last step | {log[0]['loss']:.4f}, {last['loss']:.4f} nats per token |",
        ]
        heldout = next((row["heldout"] for row in reversed(log) if "heldout" in row), None)
        if heldout:
            found = ", ".join(f"{value:.4g} at {length}" for length, value in heldout.items())
            lines += [f"| held-out perplexity ({recipe.heldout}) | {found} |"]
    else:
        lines += ["| trained | not at all: the scaling was written into the configuration |"]
    lines += [
        f"| made by | scaled-rope, commit {facts.get('commit')}, on {facts.get('device')}, {facts.get('date')} |",
        "",
        "`recipe.yaml` is the resolved recipe; `provenance.yaml` has code, machine and the version of every package.",
        "No evaluation is part of this card.",
        "",
    ]
    return "\n".join(lines)


def plot_losses(logs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the losses of runs, one after the other, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    before = 0
    for (name, log), color in zip(logs.items(), itertools.cycle(_COLORS), strict=False):
        axes.plot([before + row["step"] for row in log], [row["loss"] for row in log], color=color, lw=0.9, label=name)
        before += len(log)
    axes.set(xlabel="optimizer step", ylabel="weighted loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    staged = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(staged, dpi=120)
    pyplot.close(figure)
    os.replace(staged, path)
