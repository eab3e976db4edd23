"""The training loop: one code path for one process, several ranks, DDP and DeepSpeed.

Three choices keep it right on any number of ranks. The learning rate is a function of the step, written into the
optimizer before each step, so no scheduler can be stepped too often. The rows of a step are a function of the step too,
so resuming restores data order without any loader state. The loss is a sum over targets divided by the weight of all
targets of the whole global batch, so neither ranks nor accumulation change what is minimised.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from scaled_rope.attention.backends import resolve_attention
from scaled_rope.checkpoint import load_tokenizer, vocabulary_size
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.patching.loading import resolve_device
from scaled_rope.patching.loss import resolve_loss
from scaled_rope.patching.patch import PatchReport
from scaled_rope.progress import Progress
from scaled_rope.provenance import provenance
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.recipes.runs import has_model, is_finished, stopping_state
from scaled_rope.results import Row
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings
from scaled_rope.texts.conversations import template_note
from scaled_rope.texts.packed import IntArray, TokenRows, open_rows
from scaled_rope.texts.vocabulary import check_tokenizer
from scaled_rope.training.batches import (
    DocumentBorders,
    LoadedRow,
    check_lengths,
    collate,
    own_positions,
    padded_positions,
    places,
    short_rows_note,
    step_batches,
    step_indices,
    step_rows,
)
from scaled_rope.training.costs import ModelCost, device_peak_flops
from scaled_rope.training.engine import (
    Layout,
    StopSignal,
    check_sequence_parallel,
    engine_name,
    has_slow_bfloat16,
    last_pass,
    make_accelerator,
    naming_a_lost_rank,
    place_tables,
    settle_precision,
)
from scaled_rope.training.heldout import Heldout
from scaled_rope.training.host_memory import keep_host_memory, use_huge_pages
from scaled_rope.training.long_ce import check_rows_for_long_ce, near_losses, near_windows
from scaled_rope.training.mixed_lengths import cut_into_windows, is_short_step, short_steps_note
from scaled_rope.training.mlp_tiles import tile_mlps
from scaled_rope.training.model import (
    SummedLoss,
    adapted_share_note,
    build_model,
    enable_checkpointing,
    set_sliding_window,
)
from scaled_rope.training.optimizer import learning_rate, make_optimizer, restore_settings
from scaled_rope.training.pose import SkipWise, skip_wise
from scaled_rope.training.random_state import RandomState
from scaled_rope.training.ring import check_context_parallel, check_shared_layers, ring_attention
from scaled_rope.training.run_state import (
    check_same_run,
    check_space,
    check_there,
    continuation,
    find_state,
    fingerprint,
    latest_state,
    load_state,
    naming_a_lost_disk,
    read_log,
    refused_on_all_ranks,
    run_lock,
    save_state,
    sound_state,
)
from scaled_rope.training.saving import check_save_dtype, make_whole, save_model
from scaled_rope.training.separation import check_separation
from scaled_rope.training.tracking import RunLog, peak_memory, plot_losses, write_records


class Trainer:
    """One run of one recipe. `Trainer(recipe).run()` trains, resumes, or finds that everything is done.

    Args:
        recipe: the run's settings.
        resume: "auto", the newest state of the run if there is one, or the folder of a state of the same recipe.
        wandb_project, tensorboard: where to log beside `train_log.jsonl`: a project, a folder.
    """

    def __init__(
        self, recipe: Recipe, resume: str = "auto", wandb_project: str | None = None, tensorboard: str | None = None
    ) -> None:
        self.recipe = recipe = settle_precision(recipe)
        if resolve_device(None).type == "cpu":
            use_huge_pages()
        self.output = Path(recipe.output_dir)
        self._trackers = (wandb_project, tensorboard)
        check_same_run(recipe, self.output)
        if recipe.stop_after is not None and not is_finished(recipe) and has_model(recipe):
            raise ConfigError(
                f"stop_after {recipe.stop_after} is not possible: the run in {self.output} is finished, and its states"
                f" are deleted; choose another --output-dir"
            )
        self._resume = None if is_finished(recipe) else find_state(recipe, self.output, resume)
        self._named = resume != "auto"
        self._continued: dict[str, Any] | None = None
        self.interrupted = False
        """Whether a signal ended the run before its last step."""

    def run(self) -> list[float]:
        """Train to the end and save; return the loss of every step (nats per token).

        On SIGTERM it saves a state, prints so and returns; the same call continues from there.

        Raises:
            ConfigError: a recipe that cannot be trained, another run at work in the folder, or a loss or gradient that
                is not finite.
        """
        if is_finished(self.recipe):
            end = self.output / "model" if self.recipe.stop_after is None else stopping_state(self.recipe)
            if self.recipe.stop_after is None:
                self._finish()
            print(f"{end}: already trained")
            return [row["loss"] for row in read_log(self.output)]
        with StopSignal() as stop, run_lock(self.output), naming_a_lost_rank():
            return self._run(stop)

    def _finish(self) -> None:
        """Delete the states and draw the losses, after the model is saved."""
        shutil.rmtree(self.output / "checkpoints", ignore_errors=True)
        if not (picture := self.output / "loss.png").exists():
            plot_losses({self.recipe.name: read_log(self.output)}, picture)

    def _run(self, stop: StopSignal) -> list[float]:
        rows, heldout = self._open_data()
        accelerator, attention = self._start_engine()
        model, report = self._build(accelerator, attention)
        scaling = RopeScaling.from_config(model.config) if report is None else report.scaling
        self._check_model(model, scaling)
        chat_template = self._check_texts(accelerator, rows, heldout, model, scaling)
        run = self._prepare(accelerator, rows, heldout, model, report, scaling)
        facts = self._record(accelerator, model)
        loop = Loop(self.recipe, run, stop)
        start = load_state(accelerator, self._resume, self.output)
        restore_settings(run.optimizer, self.recipe)
        losses = loop.run(start, self._trackers, self._continued)
        self.interrupted = loop.interrupted
        if not loop.stopped:
            self._save(run, facts, chat_template)
        # A rank whose process group goes while another still holds its own may wait in it for ever, and a process group
        # that is still there when Python ends may abort the process: its threads are running.
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return losses

    def _open_data(self) -> tuple[TokenRows, Heldout | None]:
        """The rows to train on and those to measure on, refused where they do not fit the recipe."""
        recipe = self.recipe
        rows = open_rows(recipe.dataset)
        check_lengths(rows, recipe)
        check_rows_for_long_ce(recipe, rows.longest)
        return rows, Heldout(recipe) if recipe.heldout is not None else None

    def _start_engine(self) -> tuple[Any, str]:
        """The accelerator, and the attention implementation to build the model with; what can be refused before a model
        is read is refused."""
        recipe = self.recipe
        wanted = "sdpa" if recipe.context_parallel > 1 else recipe.attention
        attention = resolve_attention(wanted, resolve_device(None), recipe.compute_dtype)
        accelerator = make_accelerator(recipe, attention)
        self._resume = sound_state(accelerator, recipe, self._resume, self._named)
        self._continued = continuation(recipe, self._resume)
        resolve_loss(recipe.loss, accelerator.device)
        return accelerator, attention

    def _build(self, accelerator: Any, attention: str) -> tuple[Any, PatchReport | None]:
        recipe = self.recipe
        model, report = build_model(recipe, attention, accelerator.device)
        check_save_dtype(model, recipe)
        if accelerator.device.type == "cpu":
            tokens = recipe.batch_size * (recipe.truncate or recipe.sequence_length)
            keep_host_memory(4 * tokens * text_config(model.config).hidden_size)
        return model, report

    def _check_model(self, model: Any, scaling: RopeScaling) -> None:
        """Refuse a model that ranks could not share a sequence of."""
        attention = model.config._attn_implementation
        check_sequence_parallel(self.recipe, model.config, scaling, attention)
        check_context_parallel(self.recipe, model.config, scaling, attention)
        check_shared_layers(self.recipe, model)

    def _check_texts(
        self, accelerator: Any, rows: TokenRows, heldout: Heldout | None, model: Any, scaling: RopeScaling
    ) -> str | None:
        """Hold rows and tokenizer against the model, and print what is remarkable; return the rows' chat template."""
        recipe, vocabulary = self.recipe, text_config(model.config).vocab_size
        name = recipe.tokenizer or str(recipe.model)
        tokenizer = load_tokenizer(name)  # refused now, not at the end
        largest = vocabulary_size(tokenizer) - 1
        if largest >= vocabulary:
            accelerator.print(
                f"note: tokenizer {name} has ids up to {largest}, the model's vocabulary ends at {vocabulary - 1}; the"
                " model cannot read texts with ids beyond it"
            )
        rows.check(vocabulary)
        notes = [check_tokenizer(rows, recipe.dataset, tokenizer, name)]
        if heldout is not None:
            heldout.check(vocabulary)
            if scaling.is_length_dependent:
                heldout.follow_lengths()
            notes += [heldout.note]
            notes.append(check_tokenizer(heldout.rows, str(recipe.heldout), tokenizer, name))
        notes.append(template_note(rows, recipe.dataset, tokenizer, name))
        for note in filter(None, notes):
            accelerator.print(f"note: {note}")
        template: str | None = getattr(rows, "meta", {}).get("chat_template")
        return template

    def _prepare(
        self,
        accelerator: Any,
        rows: TokenRows,
        heldout: Heldout | None,
        model: Any,
        report: PatchReport | None,
        scaling: RopeScaling,
    ) -> PreparedRun:
        """Wrap the model with its loss, give it to the engine with its optimizer, and print how it will be trained."""
        recipe = self.recipe
        windows = self._windows(accelerator, rows, model, report, scaling)
        loss = resolve_loss(recipe.loss, accelerator.device, model)
        cost = ModelCost.of(model)
        accelerator.print(
            f"{accelerator.device}, {accelerator.num_processes} processes, engine {engine_name(accelerator)},"
            f" attention {model.config._attn_implementation}, loss {loss}"
        )
        if accelerator.device.type == "cpu" and recipe.compute_dtype == "bfloat16" and has_slow_bfloat16():
            accelerator.print(
                "note: this processor has no instructions for bfloat16 and needs about 15 times as long for it as for "
                "float32; --precision fp32 is faster"
            )
        if report is not None and not report.native:
            accelerator.print(
                f"note: transformers cannot express {report.scaling.label}; load the result with scaled_rope"
            )
        enable_checkpointing(model, recipe)
        tile_mlps(model, recipe.mlp_tiles)
        text_config(model.config).use_cache = False
        module = SummedLoss(model, recipe.offload_activations, loss)
        optimizer = make_optimizer(recipe, module)
        module, optimizer = accelerator.prepare(module, optimizer)
        place_tables(module, accelerator.device)
        if recipe.documents == "separate":
            check_separation(accelerator, module, recipe.batch_size)
        patched = report is not None
        return PreparedRun(accelerator, module, optimizer, rows, heldout, cost, windows, scaling, patched)

    def _windows(
        self, accelerator: Any, rows: TokenRows, model: Any, report: PatchReport | None, scaling: RopeScaling
    ) -> SkipWise | None:
        """The drawing of windows from rows, where the recipe wants it; prints notes on adapters, rows and lengths."""
        recipe = self.recipe
        if recipe.lora and (note := adapted_share_note(model)):
            accelerator.print(note)
        plan = LayerPlan.from_config(model.config) if report is None else report.plan
        made_for = RopeSettings(model.config).length_for(scaling)
        windows = skip_wise(recipe, scaling, plan.layers.values(), made_for)
        if recipe.short_share:
            accelerator.print(short_steps_note(recipe, scaling, rows.longest))
        elif note := short_rows_note(recipe, scaling, rows.longest, made_for):
            accelerator.print(note)
        return windows

    def _record(self, accelerator: Any, model: Any) -> dict[str, Any]:
        """Write the recipe and the provenance of the run into its folder; return the provenance."""
        recipe = self.recipe
        facts = provenance(str(accelerator.device), recipe.seed, {"ranks": accelerator.num_processes})
        if self._continued is not None:
            facts["continued_from"] = self._continued
        with refused_on_all_ranks():
            if accelerator.is_main_process:
                self.output.mkdir(parents=True, exist_ok=True)
                # under ZeRO-3 a parameter's own numel() is that of its shard
                check_space(recipe, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))
                record = recipe.to_dict() | fingerprint(recipe)
                write_atomic(self.output / "recipe.yaml", yaml.safe_dump(record, sort_keys=False))
                write_atomic(self.output / "provenance.json", json.dumps(facts, indent=2) + "\n")
        return facts

    def _save(self, run: PreparedRun, facts: dict[str, Any], chat_template: str | None) -> None:
        """Save the trained model and its records, and finish."""
        recipe, accelerator = self.recipe, run.accelerator
        state = accelerator.get_state_dict(run.module)
        with refused_on_all_ranks():
            if not accelerator.is_main_process:
                return
            inner, log = accelerator.unwrap_model(run.module).model, read_log(self.output)
            state = {k.removeprefix("model."): v for k, v in state.items()}
            if recipe.lora and engine_name(accelerator) in ("zero3", "fsdp"):
                make_whole(inner, state)
            place, size = self.output / "model", 4.0 * sum(tensor.numel() for tensor in state.values())

            def write(folder: Path) -> None:
                write_records(folder, recipe, facts, log, run.scaling.label)
                check_there(self.output)

            with naming_a_lost_disk(place, size):
                save_model(inner, state, recipe, place, write, chat_template)
            self._finish()
            print(f"{place}: saved")


@dataclass(frozen=True)
class PreparedRun:
    """Everything that the steps of a run work with, as the engine has prepared it."""

    accelerator: Any
    module: Any
    """A `SummedLoss`, wrapped by the engine."""
    optimizer: Any
    rows: TokenRows
    heldout: Heldout | None
    cost: ModelCost
    windows: SkipWise | None
    scaling: RopeScaling
    patched: bool
    """Whether the model has this package's rotary module; else its own code computes the scaling."""


_NAMED = 8  # rows that an error names


class Loop:
    """The steps of a run. `stopped`: it ended before the last one; `interrupted`: and that was by a signal."""

    def __init__(self, recipe: Recipe, run: PreparedRun, stop: StopSignal) -> None:
        self.recipe, self.stop = recipe, stop
        accelerator, rows, scaling = run.accelerator, run.rows, run.scaling
        self.accelerator, self.module, self.optimizer = accelerator, run.module, run.optimizer
        self.rows, self.cost, self.heldout = rows, run.cost, run.heldout
        self.layout = Layout(
            accelerator.process_index, accelerator.num_processes, recipe.sequence_parallel, recipe.context_parallel
        )
        self.documents = None if recipe.documents == "joined" else DocumentBorders.of(rows, recipe.dataset)
        if self.documents is not None and self.documents.note:
            accelerator.print(self.documents.note)
        self.windows, self.scaling = run.windows, scaling
        self._follows_length = scaling.is_length_dependent
        self._one_length = self._follows_length and not run.patched
        """Whether the model takes one length for all rows of a batch, as transformers' own modules do."""
        if self._follows_length and self.documents is not None:
            accelerator.print(
                f"note: {scaling.label} follows the length: all documents of a row get the frequencies of the longest"
            )
        self.stopped = self.interrupted = False

    def run(
        self, start: int, trackers: tuple[str | None, str | None], continued: Mapping[str, Any] | None = None
    ) -> list[float]:
        """Do the steps from `start` to the end, log each and save states; return all losses.

        continued: what the run was continued from, a result of `continuation`; the log's first row after it says so.
        """
        recipe, main, output = self.recipe, self.accelerator.is_main_process, Path(self.recipe.output_dir)
        log = RunLog(recipe, *trackers) if main else None
        seen = sum(row["tokens"] for row in read_log(output)) if start else 0
        total, every = recipe.max_train_steps, recipe.checkpointing_steps
        if recipe.stop_after is not None and start > recipe.stop_after:
            raise ConfigError(f"stop_after {recipe.stop_after} is not possible: the run is at step {start} already")
        last = recipe.stop_after or total
        with Progress(total=last, initial=start, unit="step", desc=recipe.name, disable=not main) as bar:
            for step in range(start, total):
                random, began = RandomState(), time.perf_counter()
                row = self.optimizer_step(step)
                if row is None:
                    self._save_and_stop(step, random)
                    break
                row = self._measure(row, time.perf_counter() - began)
                seen += row["tokens"]
                row["tokens_seen"] = seen
                if self.heldout is not None and ((step + 1) % recipe.heldout_steps == 0 or step + 1 == total):
                    row["heldout"] = self.heldout.perplexity(self.accelerator, self.module)
                if continued is not None and step == continued["step"]:
                    row["continued_from"] = continued["state"]
                if log is not None:
                    log.add(row)
                bar.set_postfix(_shown(row), refresh=False)
                bar.update(1)
                stopping = step + 1 == recipe.stop_after
                if stopping or (every and (step + 1) % every == 0 and step + 1 < total):
                    saved = self._save(step + 1)
                if stopping:
                    self.stopped = True
                    self.accelerator.print(f"stop_after {step + 1}: saved {saved}")
                    break
        if log is not None:
            log.close()
        return [row["loss"] for row in read_log(output)]

    def _save(self, step: int) -> Path:
        """Save the state after `step` steps and return its folder."""
        size = 12.0 * sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        with naming_a_lost_disk(Path(self.recipe.output_dir) / "checkpoints", size):
            return save_state(self.accelerator, self.recipe, step)

    def _save_and_stop(self, step: int, random: RandomState) -> None:
        """Save the state before step number `step`, as if its passes had not begun."""
        self.stopped = self.interrupted = True
        random.restore()
        self.optimizer.zero_grad()
        saved = "nothing was to be saved"
        if step > 0:
            saved = f"saved {self._save(step)}"
        self.accelerator.print(f"SIGTERM after step {step}: {saved}; the same command continues")

    def _measure(self, row: Row, seconds: float) -> Row:
        """Return a step's row with its time, speed and memory on this machine."""
        flops, device = row.pop("flops"), self.accelerator.device
        peak = device_peak_flops(device)
        used = None if peak is None else round(flops / seconds / self.layout.ranks / peak, 4)
        memory = torch.tensor([peak_memory(device)], device=device)
        return row | {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(row["tokens"] / seconds, 1),
            "mfu": used,
            "peak_memory_gb": round(float(self.accelerator.gather(memory).max()), 3),
        }

    def optimizer_step(self, step: int) -> Row | None:
        """Do step number `step`, from 0, of the optimizer over the global batch.

        Returns its row of the log, with "flops" and without time and memory; None when a signal interrupted it.
        """
        recipe, accelerator, layout = self.recipe, self.accelerator, self.layout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        inner = accelerator.unwrap_model(self.module)
        if (windows := recipe.sliding_window_attention_schedule) is not None:
            set_sliding_window(inner.model, windows[step % len(windows)])
        vocabulary = text_config(inner.config).vocab_size
        batches = step_batches(self.rows, recipe, step, layout.data_rank, layout.data_ranks, vocabulary)
        if is_short_step(recipe.short_share, step):
            original = self.scaling.original_max_position_embeddings
            assert original is not None  # `original_up_to_l` refuses a model without
            batches = [cut_into_windows(batch, original) for batch in batches]
        positions = self._draw(batches, step) if self.documents is None else self._separate(batches, step)
        weight, tokens, flops, length = self._sizes([row for batch in batches for row in batch])
        if self._follows_length:
            positions = self._own_lengths(batches, positions, length)
        if weight == 0:
            chosen = step_rows(len(self.rows), recipe.global_batch_size, step, recipe.seed)
            shown = ", ".join(map(str, chosen[:_NAMED])) + (", ..." if len(chosen) > _NAMED else "")
            raise ConfigError(
                f"step {step + 1} has nothing to learn: labels are -100 or loss masks 0 throughout rows {shown} of"
                f" {recipe.dataset}, or these rows are cut before their targets"
            )
        long_ce = recipe.loss_weights == "long_ce"
        total, mean, plain, norm = torch.zeros(2, device=accelerator.device), math.nan, math.nan, math.nan
        for number, batch in enumerate(batches, 1):
            if self.stop.anywhere(accelerator):
                return None
            with last_pass(accelerator, self.module, number == len(batches)):
                tensors = collate(batch, length)
                if positions is not None:
                    tensors["position_ids"] = torch.from_numpy(
                        padded_positions(positions[number - 1], length, self._follows_length)
                    )
                elif layout.shared > 1:
                    tensors["position_ids"] = torch.arange(length).expand(len(batch), length)
                tensors = {name: value.to(accelerator.device) for name, value in layout.shard(tensors).items()}
                if long_ce:
                    tensors |= {"near": self._near(tensors)}
                with ring_attention(accelerator, tensors, layout.context_parallel) as part:
                    loss = self.module(**part, separate=self.documents is not None, cap=recipe.long_ce_cap) / weight
                    total += torch.stack([loss.detach(), inner.unweighted / weight])
                    if accelerator.sync_gradients:
                        mean, plain = accelerator.reduce(total, "sum").tolist()
                        self._check_finite(step, "loss", mean)
                    # Engines average over ranks and over passes; undo both. (DeepSpeed's reduce-scatter and FSDP2
                    # average over the ranks that share a sequence as well.)
                    accelerator.backward(loss * (layout.ranks * len(batches)))
                if accelerator.sync_gradients:
                    norm = self._clip(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = float(self.optimizer.param_groups[0]["lr"])  # what the engine used, not what it was told
        row = {"step": step + 1, "loss": mean, "learning_rate": rate, "grad_norm": norm, "tokens": round(tokens)}
        if long_ce:
            row["unweighted_loss"] = plain
        if recipe.short_share:
            row["window"] = length
        return row | {"flops": flops}

    def _near(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The losses of a batch's later targets after nearby tokens alone, for LongCE; see `near_losses`."""

        def losses(input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.module(input_ids, targets, torch.ones_like(targets), reduce=False)
            return found

        recipe = self.recipe
        return near_losses(
            losses, tensors["input_ids"], tensors["targets"], recipe.long_ce_context, recipe.long_ce_step
        )

    def _separate(self, batches: list[list[LoadedRow]], step: int) -> list[list[IntArray]]:
        """Take the first tokens of documents out of the targets of `batches`; return the position ids of each row."""
        assert self.documents is not None
        layout, positions = self.layout, []
        indices = step_indices(len(self.rows), self.recipe, step, layout.data_rank, layout.data_ranks)
        for batch, numbers in zip(batches, indices.tolist(), strict=True):
            found = [self.documents.separate(index, row) for index, row in zip(numbers, batch, strict=True)]
            batch[:] = [row for row, _ in found]
            positions.append([ids for _, ids in found])
        return positions

    def _own_lengths(
        self, batches: list[list[LoadedRow]], positions: list[list[IntArray]] | None, length: int
    ) -> list[list[IntArray]] | None:
        """The position ids of each row that is padded to `length`, so that a scaling that follows the length sees how
        long it is; `positions` where no row has padding, of its own or from here.

        Raises:
            ConfigError: rows of several lengths in a batch of a model that takes one for all of them.
        """
        if all(len(tokens) == length and weights[-1] for batch in batches for tokens, weights in batch):
            return positions
        found = [
            [
                own_positions(row, None if positions is None else positions[number][place])
                for place, row in enumerate(batch)
            ]
            for number, batch in enumerate(batches)
        ]
        for batch in found if self._one_length else ():
            sizes = sorted({int(ids.max()) + 1 for ids in batch})
            if len(sizes) > 1:
                raise ConfigError(
                    f"batch_size {self.recipe.batch_size} is not allowed with rows of {sizes[0]} and {sizes[-1]}"
                    f" tokens: {self.scaling.label} follows the length, and transformers' own code takes the longest"
                    f" of a batch for all its rows; 1"
                )
        return found

    def _draw(self, batches: list[list[LoadedRow]], step: int) -> list[list[IntArray]] | None:
        """Replace the rows of `batches` by windows of them; return the position ids of each. None without windows."""
        if self.windows is None:
            return None
        rank, ranks = self.layout.data_rank, self.layout.data_ranks
        positions: list[list[IntArray]] = []
        for micro, batch in enumerate(batches):
            positions.append([])
            for index, place in enumerate(places(self.recipe, micro, rank, ranks)):
                tokens, weights = batch[index]
                chosen, ids = self.windows.draw(len(tokens), step, place)
                batch[index] = tokens[chosen], weights[chosen]
                positions[-1].append(ids)
        return positions

    def _sizes(self, mine: Sequence[LoadedRow]) -> tuple[float, float, float, int]:
        """Sums over the step's rows on all ranks: target weights, tokens, FLOPs; and the length to pad each row to."""
        device = self.accelerator.device
        lengths = [len(tokens) for tokens, _ in mine]
        flops = sum(self.cost.sequence(length).total for length in lengths)
        if self.recipe.loss_weights == "long_ce":
            context, stride = self.recipe.long_ce_context, self.recipe.long_ce_step
            windows = [end - first for n in lengths for first, _, end in near_windows(n, context, stride)]
            flops += sum(self.cost.reading(size).total for size in windows)
        sizes = [sum(weight[1:].sum() for _, weight in mine), sum(lengths), flops, max(lengths)]
        exact = torch.float32 if device.type == "mps" else torch.float64
        everyone = self.accelerator.gather(torch.tensor([sizes], device=device, dtype=exact))
        # Ranks that share a sequence have all counted it.
        weight, tokens, flops = (everyone[:, :3].sum(dim=0) / self.layout.shared).tolist()
        # One length for all ranks: under ZeRO-3 each pass is made of collectives, whose number must agree.
        longest = int(everyone[:, 3].max())
        return weight, tokens, flops, -(-longest // self.layout.multiple) * self.layout.multiple

    def _clip(self, step: int) -> float:
        """Clip the gradient of the whole step; return its norm before clipping."""
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.grad_norm or math.inf))
        self._check_finite(step, "gradient", norm)
        return norm

    def _check_finite(self, step: int, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        state = latest_state(Path(self.recipe.output_dir))
        kept = f"the last state, {state}, is intact" if state is not None else "no state was saved yet"
        raise ConfigError(
            f"{what} of step {step + 1} is {value}; {kept}. Lower learning_rate, clip with grad_norm, or look at"
            f" the rows of this step"
        )


def _shown(row: Row) -> dict[str, str]:
    """The values of a row that the progress bar shows."""
    shown = {
        "loss": f"{row['loss']:.3f}", "lr": f"{row['learning_rate']:.1e}", "norm": f"{row['grad_norm']:.2f}",
        "tok/s": f"{row['tokens_per_second']:.0f}", "GB": f"{row['peak_memory_gb']:.1f}",
    }  # fmt: skip
    return shown | ({} if row["mfu"] is None else {"mfu": f"{row['mfu']:.2f}"})
