"""The training loop: one code path for one process, several ranks, DDP and DeepSpeed.

Three choices keep it right on any number of ranks. The learning rate is a function of the step, written into the
optimizer before each step, so no scheduler can be stepped too often. The rows of a step are a function of the step too,
so resuming restores data order without any loader state. The loss is a sum over targets divided by the weight of all
targets of the whole global batch, so neither ranks nor accumulation change what is minimised.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from scaled_rope.config import RopeScaling
from scaled_rope.data import IntArray, TokenRows, open_rows, step_rows
from scaled_rope.errors import ConfigError
from scaled_rope.loading import (
    attention_for,
    load_model,
    load_tokenizer,
    resolve_attention,
    resolve_plan,
    weights_hash,
    with_primary,
)
from scaled_rope.loss import IGNORE, token_nll
from scaled_rope.patch import PatchReport, patch_model, patched_plan
from scaled_rope.recipes import Recipe, is_finished
from scaled_rope.results import Row, provenance, read_rows, write_atomic

KEPT_STATES = 2
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito's palette
LoadedRow = tuple[IntArray, IntArray]  # tokens [T] and their loss weights [T]
#: recipe fields that may differ between a run and its resumption without changing what is computed
_FREE_FIELDS = {
    "name", "description", "output_dir", "prepare", "rebuild", "evaluate", "batch_size", "checkpointing_steps",
}  # fmt: skip


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step number `step`, counted from 0.

    Warm-up rises linearly and reaches the peak at step `warmup_steps` - 1, so that no step is wasted on a rate of 0.
    Then `constant` stays, `linear` falls to 0 just after the last step, `cosine` falls to a tenth of the peak.
    """
    peak, warmup, total = recipe.learning_rate, recipe.warmup_steps, recipe.max_train_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.lr_schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if recipe.lr_schedule == "linear":
        return peak * (1.0 - progress)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def accumulation(recipe: Recipe, ranks: int) -> int:
    """Forward passes per rank and optimizer step.

    Raises:
        ConfigError: the global batch is no multiple of what all ranks do in one pass.
    """
    per_pass = recipe.batch_size * ranks
    if recipe.global_batch_size % per_pass:
        raise ConfigError(
            f"global_batch_size {recipe.global_batch_size} is not allowed; a multiple of batch_size {recipe.batch_size}"
            f" x {ranks} processes = {per_pass}"
        )
    return recipe.global_batch_size // per_pass


def collate(rows: Sequence[LoadedRow], length: int) -> dict[str, torch.Tensor]:
    """Rows of tokens and weights -> `input_ids`, `targets` (next token or -100) and `weights` (of the target), [B, T].

    All are padded on the right to T = `length`, where a causal model cannot see it from any position that counts.
    """
    input_ids = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORE, np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    for place, (tokens, weight) in enumerate(rows):
        input_ids[place, : len(tokens)] = tokens
        targets[place, : len(tokens) - 1] = np.where(weight[1:] > 0, tokens[1:], IGNORE)
        weights[place, : len(tokens) - 1] = weight[1:]
    arrays = {"input_ids": input_ids, "targets": targets, "weights": weights}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def step_batches(
    rows: TokenRows, recipe: Recipe, step: int, rank: int, ranks: int, vocabulary: int | None = None
) -> list[list[LoadedRow]]:
    """This rank's micro-batches of one optimizer step, each a list of `batch_size` rows of tokens and weights.

    Raises:
        ConfigError: a row that is longer than the recipe says, or has a token id outside the model's `vocabulary`.
    """
    indices = step_rows(len(rows), recipe.global_batch_size, step, recipe.seed)
    mine = indices.reshape(-1, ranks, recipe.batch_size)[:, rank]
    limit = recipe.sequence_length

    def fetch(index: int) -> LoadedRow:
        tokens, weight = rows.row(index)
        if recipe.truncate is not None:
            tokens, weight = tokens[: recipe.truncate], weight[: recipe.truncate]
        if len(tokens) > limit:
            raise ConfigError(
                f"row {index} of {recipe.dataset} has {len(tokens)} tokens, more than sequence_length {limit};"
                f" set truncate, or re-cut the data with truncate.py"
            )
        if vocabulary is not None and tokens.max() >= vocabulary:
            raise ConfigError(
                f"row {index} of {recipe.dataset} has token id {tokens.max()}, the model's vocabulary ends at"
                f" {vocabulary - 1}; tokenize with the model's own tokenizer"
            )
        return tokens, weight

    return [[fetch(int(index)) for index in micro] for micro in mine]


class SummedLoss(nn.Module):
    """A model together with its loss, so that engines which wrap `forward` wrap both.

    `forward(input_ids, targets, weights)` -> scalar: the weighted sum of the negative log-likelihoods, in nats.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed sizes its buckets by it

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (token_nll(self.model, input_ids, targets) * weights).sum()


# ------------------------------------------------------------------------------------------------------- the model


def build_model(recipe: Recipe, attention: str = "sdpa") -> tuple[Any, PatchReport | None]:
    """The recipe's model in float32 on the CPU with its scaling installed; `attention` is what it will run with.

    Raises:
        ConfigError: an `init` that is no model, and what `load_model` and `patch_model` raise.
    """
    torch.manual_seed(recipe.seed)
    if recipe.init is not None:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = dict(recipe.init)
        try:
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            attention = attention_for(config, attention)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"init of recipe {recipe.name!r} is no model: {str(error).splitlines()[0]}") from None
    else:
        model = load_model(str(recipe.model), dtype="float32", device="cpu")
        model.set_attn_implementation(attention_for(model.config, attention))
    report = install_scaling(model, recipe)
    if recipe.lora:
        model = add_lora(model)
    model.train()
    return model, report


def install_scaling(model: Any, recipe: Recipe) -> PatchReport | None:
    """Put the recipe's scaling and context length into a model; None where it keeps the checkpoint's own.

    Raises:
        ConfigError: what `patch_model` raises.
    """
    report = None
    own = RopeScaling.from_config(model.config)
    base = dataclasses.replace(
        own,
        rope_theta=recipe.rope_theta or own.rope_theta,
        original_max_position_embeddings=recipe.original_max_position_embeddings
        or own.original_max_position_embeddings,
    )
    plan = resolve_plan(model.config, recipe.layers, recipe.drop_layers, patched_plan(model))
    if recipe.scaling is not None or base != own or plan != patched_plan(model):
        scaling = base if recipe.scaling is None else RopeScaling.from_spec(recipe.scaling, base)
        report = patch_model(model, with_primary(plan.layers, scaling) or scaling, drop_layers=plan.drop_layers)
    if recipe.max_position_embeddings is not None:
        model.config.max_position_embeddings = recipe.max_position_embeddings
    return report


def add_lora(model: Any) -> Any:
    """Low-rank adapters with the released settings: r=16, alpha=64, dropout 0.05, all linear layers but the head."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("lora needs peft: pip install 'scaled-rope[train]'") from None
    settings = LoraConfig(r=16, lora_alpha=64, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    adapted.enable_input_require_grads()  # checkpointed layers need an input with a gradient
    return adapted


def save_model(model: Any, state: dict[str, torch.Tensor], recipe: Recipe, output: Path) -> None:
    """Write checkpoint and tokenizer to `output` in one rename; adapters are merged, and also kept in `adapter/`."""
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    dtype = recipe.save_dtype or recipe.compute_dtype
    if recipe.lora:
        model.save_pretrained(staged / "adapter", state_dict=state)
        model = model.merge_and_unload()
        state = model.state_dict()
    cast: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor and are written once
    state = {k: cast.setdefault(v.data_ptr(), v.to(getattr(torch, dtype)).contiguous()) for k, v in state.items()}
    model.config.dtype = dtype
    model.config.use_cache = True
    model.save_pretrained(staged, state_dict=state)
    load_tokenizer(recipe.tokenizer or str(recipe.model)).save_pretrained(staged)
    shutil.rmtree(output, ignore_errors=True)
    os.rename(staged, output)


# ------------------------------------------------------------------------------------------------------ the engine


def make_accelerator(recipe: Recipe) -> Any:
    """An `Accelerator` for whatever launched this process, with the recipe's batch and clipping given to DeepSpeed.

    Raises:
        ConfigError: accelerate is missing, or it would train unsynchronised copies.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError:
        raise ConfigError("training needs accelerate: pip install 'scaled-rope[train]'") from None
    _quieten()
    # Left to itself accelerate finds no process-group backend on CPU and a launched process believes that it is alone.
    on_cpu = "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
    mixed = "bf16" if recipe.precision == "bf16" else "no"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu and not deepspeed, kwargs_handlers=handlers)
    launched, kind = int(os.environ.get("WORLD_SIZE", "1")), accelerator.distributed_type.value
    if launched != accelerator.num_processes or (launched > 1 and kind == "NO"):
        raise ConfigError(
            f"{launched} processes were launched but accelerate sees {accelerator.num_processes} of type {kind}:"
            f" they would train unsynchronised copies; launch DDP or DeepSpeed on this platform"
        )
    accelerator.gradient_accumulation_steps = accumulation(recipe, accelerator.num_processes)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        settings = plugin.deepspeed_config
        if recipe.lora and plugin.zero_stage == 3:
            raise ConfigError(
                "lora under DeepSpeed ZeRO-3 is not available: adapters cannot be merged from shards; use DDP"
            )
        for field in ("optimizer", "scheduler"):
            if field in settings:
                raise ConfigError(f"DeepSpeed field {field!r} is not allowed; the recipe sets it: remove the block")
        settings["train_micro_batch_size_per_gpu"] = recipe.batch_size
        settings["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
        settings["gradient_clipping"] = recipe.grad_norm or 0.0
    return accelerator


def _quieten() -> None:
    """Silence what the engines say about themselves at every start, so that what matters can be seen."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What decides the result of a run: the recipe's fields, and the content of local weights and data."""
    fields = {name: value for name, value in recipe.to_dict().items() if name not in _FREE_FIELDS}
    paths = {"model_hash": recipe.model, "dataset_hash": recipe.dataset}
    return fields | {name: weights_hash(path) for name, path in paths.items() if path and Path(path).is_dir()}


def _check_same_run(recipe: Recipe, output: Path) -> None:
    """Refuse to continue, or to call finished, what another recipe or other weights began."""
    if latest_state(output) is None and not (output / "model").exists():
        return
    if not (output / "recipe.yaml").exists():
        raise ConfigError(f"output_dir {output} holds a model that no training run wrote; choose another --output-dir")
    before, now = yaml.safe_load((output / "recipe.yaml").read_text()), _fingerprint(recipe)
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"output_dir {output} holds a run with {name} = {before.get(name)!r}, now {value!r};"
                f" choose another --output-dir or remove it"
            )


def latest_state(output: Path) -> Path | None:
    """The newest complete resumable state of a run, if any."""
    states = sorted((output / "checkpoints").glob("step-*"))
    return states[-1] if states else None


def read_log(output: Path) -> list[Row]:
    """The per-step rows of a run."""
    path = output / "train_log.jsonl"
    return read_rows(path) if path.exists() else []


class Trainer:
    """One run of one recipe. `Trainer(recipe).run()` trains, resumes, or finds that everything is done."""

    def __init__(self, recipe: Recipe, resume: str = "auto", wandb_project: str | None = None) -> None:
        self.recipe = recipe
        self.output = Path(recipe.output_dir)
        self.wandb_project = wandb_project
        _check_same_run(recipe, self.output)
        if resume == "auto":
            self.resume = latest_state(self.output)
        else:
            self.resume = Path(resume)
            if not (self.resume / "state.json").is_file():
                raise ConfigError(f"resume_from_checkpoint {resume} is no saved state; a folder checkpoints/step-N")

    def run(self) -> list[float]:
        """Train to the end and save; returns the loss of every step (nats per token)."""
        if is_finished(self.recipe):
            print(f"{self.output / 'model'}: already trained")
            return [row["loss"] for row in read_log(self.output)]
        recipe = self.recipe
        rows = open_rows(recipe.dataset)
        accelerator = make_accelerator(recipe)
        attention = resolve_attention(recipe.attention, accelerator.device, recipe.compute_dtype)
        model, report = build_model(recipe, attention)
        accelerator.print(f"{accelerator.device}, {accelerator.num_processes} processes, attention {attention}")
        if report is not None and not report.native:
            accelerator.print(
                f"note: transformers cannot express {report.scaling.label}; load the result with scaled_rope"
            )
        if recipe.gradient_checkpointing:
            # renamed in transformers 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.config.use_cache = False
        module = SummedLoss(model)
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=recipe.learning_rate,
            betas=(recipe.adam_betas[0], recipe.adam_betas[1]),
            weight_decay=recipe.weight_decay,
        )
        module, optimizer = accelerator.prepare(module, optimizer)
        if accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            # under ZeRO-3 a parameter's own numel() is that of its shard
            self._check_space(sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))
            record = recipe.to_dict() | _fingerprint(recipe)
            write_atomic(self.output / "recipe.yaml", yaml.safe_dump(record, sort_keys=False))
            facts = provenance(str(accelerator.device), recipe.seed, {"ranks": accelerator.num_processes})
            write_atomic(self.output / "provenance.json", json.dumps(facts, indent=2) + "\n")
        start = self._restore(accelerator)
        losses = self._steps(accelerator, module, optimizer, rows, start)
        state = accelerator.get_state_dict(module)
        if accelerator.is_main_process:
            inner = accelerator.unwrap_model(module).model
            save_model(inner, {k.removeprefix("model."): v for k, v in state.items()}, recipe, self.output / "model")
            shutil.rmtree(self.output / "checkpoints", ignore_errors=True)
            plot_losses({recipe.name: read_log(self.output)}, self.output / "loss.png")
            print(f"{self.output / 'model'}: saved")
        accelerator.wait_for_everyone()
        return losses

    def _check_space(self, parameters: int) -> None:
        """Refuse to start a run whose model and states would not fit on the disk.

        A state holds weights and two moments in float32; one more than is kept exists while it is written.
        """
        states = (KEPT_STATES + 1) * 12 if self.recipe.checkpointing_steps else 0
        needed, free = (states + 4) * parameters, shutil.disk_usage(self.output).free
        if free < needed:
            raise ConfigError(
                f"output_dir {self.output} has {free / 1e9:.1f} GB free, the run needs up to {needed / 1e9:.1f} GB;"
                f" free some, or save fewer states with --checkpointing-steps"
            )

    def _restore(self, accelerator: Any) -> int:
        """Load the state to resume from and cut the log back to it; returns the first step to do."""
        step = 0
        if self.resume is not None:
            saved = json.loads((self.resume / "state.json").read_text())
            if saved["ranks"] != accelerator.num_processes and accelerator.state.deepspeed_plugin is not None:
                raise ConfigError(
                    f"state {self.resume} was saved by {saved['ranks']} DeepSpeed processes, now there are"
                    f" {accelerator.num_processes}; resume on the same number"
                )
            accelerator.load_state(str(self.resume))
            step = saved["step"]
            accelerator.print(f"resuming after step {step} from {self.resume}")
        if accelerator.is_main_process:
            kept = [json.dumps(row) + "\n" for row in read_log(self.output) if row["step"] <= step]
            write_atomic(self.output / "train_log.jsonl", "".join(kept))
        accelerator.wait_for_everyone()
        return step

    def _save_state(self, accelerator: Any, step: int) -> None:
        """Write a resumable state; it gets its name only when it is complete."""
        folder = self.output / "checkpoints"
        staged, final = folder / f".step-{step:06d}.partial", folder / f"step-{step:06d}"
        if accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(staged))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {"step": step, "ranks": accelerator.num_processes}
            write_atomic(staged / "state.json", json.dumps(state) + "\n")
            shutil.rmtree(final, ignore_errors=True)  # there when an older state was resumed
            os.rename(staged, final)
            for old in sorted(folder.glob("step-*"))[:-KEPT_STATES]:
                shutil.rmtree(old)

    def _steps(self, accelerator: Any, module: Any, optimizer: Any, rows: TokenRows, start: int) -> list[float]:
        """Do the steps from `start` to the end, logging each and saving states; returns all losses."""
        from tqdm import tqdm

        recipe, main = self.recipe, accelerator.is_main_process
        tracker = _wandb(self.wandb_project, recipe) if main else None
        seen = sum(row["tokens"] for row in read_log(self.output)) if start else 0
        total, every = recipe.max_train_steps, recipe.checkpointing_steps
        with tqdm(total=total, initial=start, unit="step", desc=recipe.name, mininterval=1.0, disable=not main) as bar:
            for step in range(start, total):
                began = time.perf_counter()
                row = self._step(accelerator, module, optimizer, rows, step)
                seen, elapsed = seen + row["tokens"], time.perf_counter() - began
                row |= {"tokens_seen": seen, "seconds": round(elapsed, 4)}
                if main:
                    with (self.output / "train_log.jsonl").open("a") as log:
                        log.write(json.dumps(row) + "\n")
                    if tracker is not None:
                        tracker.log(row, step=row["step"])
                bar.set_postfix(
                    {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens'] / elapsed:.0f}"}, refresh=False
                )
                bar.update(1)
                if every and (step + 1) % every == 0 and step + 1 < total:
                    self._save_state(accelerator, step + 1)
        if tracker is not None:
            tracker.finish()
        return [row["loss"] for row in read_log(self.output)]

    def _step(self, accelerator: Any, module: Any, optimizer: Any, rows: TokenRows, step: int) -> dict[str, Any]:
        """One optimizer step over the global batch; returns its log row."""
        recipe, ranks, device = self.recipe, accelerator.num_processes, accelerator.device
        rate = learning_rate(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if (windows := recipe.sliding_window_attention_schedule) is not None:
            set_sliding_window(accelerator.unwrap_model(module).model, windows[step % len(windows)])
        vocabulary = accelerator.unwrap_model(module).config.vocab_size
        batches = step_batches(rows, recipe, step, accelerator.process_index, ranks, vocabulary)
        mine = [row for batch in batches for row in batch]
        sizes = [sum(weight[1:].sum() for _, weight in mine), *(f(len(t) for t, _ in mine) for f in (sum, max))]
        exact = torch.float32 if device.type == "mps" else torch.float64
        everyone = accelerator.gather(torch.tensor([sizes], device=device, dtype=exact))
        weight, tokens = everyone[:, :2].sum(dim=0).tolist()
        # One length for all ranks: under ZeRO-3 each pass is made of collectives, whose number must agree.
        length = int(everyone[:, 2].max())
        total, norm = torch.zeros((), device=device), math.nan
        for batch in batches:
            with accelerator.accumulate(module):
                # Engines average over ranks and over accumulated passes; undo both, then divide once.
                tensors = {name: value.to(device) for name, value in collate(batch, length).items()}
                loss = module(**tensors) / weight
                accelerator.backward(loss * (ranks * len(batches)))
                total += loss.detach()
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(module.parameters(), recipe.grad_norm or math.inf))
                optimizer.step()
                optimizer.zero_grad()
        mean = float(accelerator.reduce(total, "sum"))
        if not math.isfinite(mean):
            raise ConfigError(f"loss of step {step + 1} is {mean}; the last saved state is {latest_state(self.output)}")
        return {"step": step + 1, "loss": mean, "learning_rate": rate, "grad_norm": norm, "tokens": int(tokens)}


def set_sliding_window(model: Any, window: int) -> None:
    """Make every attention layer of a model with sliding windows (Mistral) use `window` tokens.

    Raises:
        ConfigError: the model has no sliding window.
    """
    if not hasattr(model.config, "sliding_window"):
        raise ConfigError(
            f"sliding_window_attention_schedule is not allowed for {model.config.model_type}; Mistral only"
        )
    model.config.sliding_window = window
    for layer in model.modules():
        if hasattr(layer, "sliding_window"):
            layer.sliding_window = window


def _wandb(project: str | None, recipe: Recipe) -> Any:
    if project is None:
        return None
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb needs wandb: pip install 'scaled-rope[wandb]'") from None
    return wandb.init(project=project, name=recipe.name, config=recipe.to_dict())


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
