"""Fine-tune a model to a longer context.

    python finetune.py demo                                   # a recipe of configs/
    accelerate launch --config_file configs/accelerate/zero3.yaml finetune.py llama-2-7b-64k
    python finetune.py --model NousResearch/Llama-2-7b-hf --dataset data/pg19-64k --output-dir out/mine \
        --scaling-type yarn --scaling-factor 16
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scaled_rope.checkpoint import check_local
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.files import check_writable
from scaled_rope.flags.shared import ATTENTIONS
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import (
    DOCUMENTS,
    LOSSES,
    LR_DECAYS,
    LR_SCHEDULES,
    POSITIONS,
    PRECISIONS,
    QUANTIZATIONS,
    Recipe,
    make_recipe,
)
from scaled_rope.recipes.runs import is_finished, starts_from
from scaled_rope.scaling.spec import rescale

#: defaults of a run without a recipe, besides the recipe's own: those of the released script
RELEASED_DEFAULTS: dict[str, Any] = {
    "name": "custom",
    "model": "NousResearch/Llama-2-7b-hf",
    "dataset": "emozilla/pg_books-tokenized-bos-eos-chunked-65536",
    "scaling": "yarn:16",
    "sequence_length": 65536,
}
RELEASED_ACCUMULATION = 8
_NUMBER_LISTS = ("sliding_window_attention_schedule", "heldout_lengths")
"""Recipe fields whose flags take numbers with commas between them."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("finetune.py", __doc__)
    parser.add_argument("recipe", nargs="?", help="name in configs/ or path of a YAML file; flags override its fields")
    parser.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    parser.add_argument("--model", help="checkpoint to start from")
    parser.add_argument("--tokenizer", help="default: the model's")
    parser.add_argument("--dataset", help="packed set, saved datasets folder or hub name with input_ids")
    parser.add_argument("--output-dir")
    parser.add_argument("--sequence-length", type=int, help="longest row accepted, in tokens")
    parser.add_argument("--truncate", type=int, help="cut every row to this many tokens")
    parser.add_argument("--scaling", help="scaling as METHOD:FACTOR[,field=value...]")
    parser.add_argument("--scaling-type", help="method alone; with --scaling-factor")
    parser.add_argument("--scaling-factor", type=float)
    parser.add_argument("--rope-theta", type=float, help="default: the checkpoint's own")
    parser.add_argument("--original-max-position-embeddings", type=int, help="default: the checkpoint's own")
    parser.add_argument("--max-position-embeddings", type=int, help="default: factor x original")
    parser.add_argument("--batch-size", type=int, help="sequences per process and pass")
    parser.add_argument("--gradient-accumulate-every", type=int, help="passes per step; sets the global batch")
    parser.add_argument("--global-batch-size", type=int, help="sequences per step over all processes")
    parser.add_argument("--max-train-steps", type=int)
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="end there with a state; the model comes later")
    parser.add_argument("--warmup-steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--lr-schedule", choices=LR_SCHEDULES)
    parser.add_argument("--lr-floor", type=float, help="where the schedule ends, as a share of the peak")
    parser.add_argument("--lr-decay-share", type=float, help="share of the steps over which wsd decays (default: 0.1)")
    parser.add_argument("--lr-decay", choices=LR_DECAYS, help="how wsd decays (default: linear)")
    parser.add_argument("--grad-norm", type=float, help="clip the gradient's norm to this")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision", choices=PRECISIONS)
    choice: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--lora", **choice, help="train low-rank adapters only")
    parser.add_argument("--lora-embeddings-and-norms", **choice,
                        help="with --lora: train embeddings, output projection and norms in full as well")  # fmt: skip
    parser.add_argument("--quantization", choices=(*QUANTIZATIONS, "none"),
                        help="with --lora: keep the frozen matrices in 4 bits (QLoRA)")  # fmt: skip
    parser.add_argument("--gradient-checkpointing", **choice,
                        help="compute activations twice instead of keeping them (default: on)")  # fmt: skip
    parser.add_argument("--keep-attention", **choice,
                        help="with gradient checkpointing: compute all but attention again")  # fmt: skip
    parser.add_argument("--loss", choices=LOSSES, help="logits: some at a time, fused with the loss (Liger), or whole")
    parser.add_argument("--mlp-tiles", type=int, metavar="N",
                        help="stretches of a sequence that MLPs work on one after another (default: 1)")  # fmt: skip
    parser.add_argument("--offload-activations", **choice,
                        help="keep the inputs of checkpointed layers in CPU memory")  # fmt: skip
    parser.add_argument("--sequence-parallel", type=int, metavar="N",
                        help="ranks that share one sequence (Ulysses, under DeepSpeed ZeRO-3)")  # fmt: skip
    parser.add_argument("--context-parallel", type=int, metavar="N",
                        help="ranks that share one sequence by ring attention (FSDP2, GPUs)")  # fmt: skip
    parser.add_argument("--attention", help=f"one of: {', '.join(ATTENTIONS)}")
    parser.add_argument("--documents", choices=DOCUMENTS, help="separate: packed documents do not see each other")
    parser.add_argument("--positions", choices=POSITIONS,
                        help="pose: position ids jump, so that short windows train long positions")  # fmt: skip
    parser.add_argument("--pose-chunks", type=int, metavar="N", help="chunks of a window of pose (default: 2)")
    parser.add_argument(
        "--short-share", type=float, metavar="X", help="of the steps, with L tokens and L's frequencies"
    )
    parser.add_argument("--loss-weights", metavar="NAME", help="data or long_ce: more where far context helps")
    parser.add_argument("--long-ce-cap", type=float, metavar="X", help="the largest weight of long_ce (default: 5)")
    parser.add_argument("--long-ce-context", type=int, metavar="N", help="tokens that count as near (default: 4096)")
    parser.add_argument("--long-ce-step", type=int, metavar="N", help="targets per such window (default: 1024)")
    parser.add_argument("--skip-text", **choice,
                        help="with pose: text jumps too, in rows longer than a window (default: on)")  # fmt: skip
    parser.add_argument(
        "--sliding-window-attention-schedule", metavar="A,B,C", help="window at step i is entry i mod n"
    )
    parser.add_argument("--checkpointing-steps", type=int, help="save a resumable state every N steps")
    parser.add_argument("--kept-checkpoints", type=int, metavar="N", help="how many of the newest states are kept")
    parser.add_argument(
        "--resume", "--resume-from-checkpoint", dest="resume", metavar="auto|PATH", default="auto",
        help="folder of a state of the same recipe; auto, the default, is the newest of the run",
    )  # fmt: skip
    parser.add_argument("--continue-from", metavar="PATH",
                        help="begin a run of other data, steps or rates from the folder of a state")  # fmt: skip
    parser.add_argument("--save-only", action="store_true", help="apply the scaling and save without training")
    parser.add_argument("--log-loss", type=Path, metavar="FILE", help="write the losses, comma-separated")
    parser.add_argument("--wandb", metavar="PROJECT", help="log there too (WANDB_MODE=offline: to files)")
    parser.add_argument("--tensorboard", metavar="DIR", help="log there too")
    parser.add_argument("--heldout", metavar="SET", help="packed set whose perplexity is measured during training")
    parser.add_argument("--heldout-lengths", metavar="A,B,C", help="at these lengths, in tokens")
    parser.add_argument("--heldout-steps", type=int, metavar="N", help="every N steps")
    parser.add_argument("--deepspeed", action="store_true", help="insist on DeepSpeed; the launcher selects it")
    parser.add_argument("--architecture", help="model type, as llama; checked against the checkpoint")
    parser.add_argument("--num-proc", type=int, help="accepted for old scripts; data is memory-mapped")
    return parser.parse_args(argv)


def overrides(args: argparse.Namespace, base: Recipe, ranks: int) -> dict[str, Any]:
    """Fields of the recipe `base` that the command line sets."""
    names = {field.name for field in dataclasses.fields(Recipe)} - set(_NUMBER_LISTS)
    fields = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if args.quantization == "none":
        fields["quantization"] = None
    if args.scaling_type is not None or args.scaling_factor is not None:
        if args.scaling is not None:
            raise ConfigError("--scaling and --scaling-type/--scaling-factor exclude each other")
        fields["scaling"] = rescale(
            base.scaling or RELEASED_DEFAULTS["scaling"], args.scaling_type, args.scaling_factor
        )
    if args.gradient_accumulate_every is not None:
        if args.global_batch_size is not None:
            raise ConfigError("--gradient-accumulate-every and --global-batch-size exclude each other")
        apart = _ranks_apart(args, base, ranks)
        fields["global_batch_size"] = args.gradient_accumulate_every * (args.batch_size or base.batch_size) * apart
    for name in _NUMBER_LISTS:
        if (text := getattr(args, name)) is not None:
            try:
                fields[name] = [int(entry) for entry in text.split(",")]
            except ValueError:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {text!r} is not allowed; numbers a,b,c") from None
    return fields


def _ranks_apart(args: argparse.Namespace, base: Recipe | None, ranks: int) -> int:
    """How many ranks work on rows of their own, where several may share one."""
    shared = 1
    for name in ("sequence_parallel", "context_parallel"):
        given = getattr(args, name)
        shared *= max(1, getattr(base, name, 1) if given is None else given)
    return max(1, ranks // shared)


def resolve(args: argparse.Namespace, ranks: int) -> Recipe:
    """The recipe to run: a named one or the released defaults, with the command line's changes."""
    if args.recipe is not None:
        base = read_recipe(args.recipe)
    elif args.output_dir is None:
        raise ConfigError("--output-dir is missing: name a recipe or a folder to write to")
    else:
        batch = RELEASED_ACCUMULATION * (args.batch_size or 1) * _ranks_apart(args, None, ranks)
        base = make_recipe(RELEASED_DEFAULTS | {"output_dir": args.output_dir, "global_batch_size": batch}, "defaults")
    return make_recipe(base.to_dict() | overrides(args, base, ranks), "command line")


def save_scaled(recipe: Recipe) -> None:
    """Apply the recipe's scaling to its model and save that without training.

    Raises:
        ConfigError: several processes, or a run or a model is in the output folder already.
    """
    from scaled_rope.provenance import provenance
    from scaled_rope.training.model import build_model
    from scaled_rope.training.run_state import naming_a_lost_disk, run_lock
    from scaled_rope.training.saving import check_save_dtype, save_model
    from scaled_rope.training.tracking import write_records

    folder = Path(recipe.output_dir)
    if recipe.continue_from is not None:
        raise ConfigError("--save-only and continue_from exclude each other: nothing is trained")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--save-only needs no training processes; run it without a launcher")
    if (folder / "model").exists() or (folder / "recipe.yaml").exists():
        raise ConfigError(f"output_dir {folder} holds a run or a model already; choose another --output-dir")
    with run_lock(folder):
        model, report = build_model(recipe)
        check_save_dtype(model, recipe)
        facts = provenance("cpu", recipe.seed, {})
        label = "the checkpoint's own" if report is None else report.scaling.label
        records = functools.partial(write_records, recipe=recipe, facts=facts, log=[], scaling=label)
        state = model.state_dict()
        with naming_a_lost_disk(folder / "model", 4.0 * sum(tensor.numel() for tensor in state.values())):
            save_model(model, state, recipe, folder / "model", records)
    print(f"{folder / 'model'}: saved without training")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)

    recipe = resolve(args, int(os.environ.get("WORLD_SIZE", "1")))
    if args.print:
        print(yaml.safe_dump(recipe.to_dict(), sort_keys=False), end="")
        return 0
    if Path(recipe.output_dir).is_file():
        raise ConfigError(f"output_dir {recipe.output_dir} is a file; name a folder with --output-dir")
    if recipe.attention not in ATTENTIONS:
        raise unknown("attention", recipe.attention, ATTENTIONS)
    if args.deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        raise ConfigError("--deepspeed needs a launcher: accelerate launch --config_file configs/accelerate/zero3.yaml")
    if args.log_loss is not None:
        if not (folder := args.log_loss.parent).is_dir():
            raise ConfigError(f"--log-loss {args.log_loss} is not allowed; folder {folder} does not exist")
        check_writable(args.log_loss)
    if args.architecture is not None and recipe.model is not None:
        from scaled_rope.checkpoint import load_config

        found = load_config(recipe.model).model_type
        if found != args.architecture:
            raise ConfigError(f"--architecture {args.architecture!r}: {recipe.model} is {found!r}")
    start = recipe.model or recipe.continue_from
    if start is not None and (before := starts_from(recipe)) is not None and not Path(start).exists():
        if not is_finished(recipe):
            raise ConfigError(f"{start} is not there yet; train {before.name} first: ./train.sh {before.name}")
    if recipe.model is not None and not is_finished(recipe):
        check_local(recipe.model)
    if args.save_only:
        save_scaled(recipe)
        return 0
    made_here = any(recipe.dataset in command for command in recipe.prepare)
    if made_here and not Path(recipe.dataset).exists() and not is_finished(recipe):
        raise ConfigError(f"dataset {recipe.dataset} is not there yet; ./train.sh {args.recipe} makes it, then trains")
    from scaled_rope.training.loop import Trainer

    trainer = Trainer(recipe, args.resume, args.wandb, args.tensorboard)
    losses = trainer.run()
    if trainer.interrupted:
        return (
            128 + signal.SIGTERM
        )  # as shells report a program that died of it: what follows must not take it for done
    if args.log_loss is not None and int(os.environ.get("RANK", "0")) == 0:
        args.log_loss.write_text(",".join(map(str, losses)))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
