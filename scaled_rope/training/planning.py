"""Estimate memory and time of a training run before it starts: `scaled-rope plan RECIPE --gpus 8 --gpu-memory 80`.

Memory of a pass is found by tracing it on shapes (`traced_memory.py`); that of weights, gradients and optimizer follows
from how each engine divides them. Time is FLOPs over a stated share of a stated peak.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scaled_rope.attention.backends import attention_for
from scaled_rope.bundled import bundled
from scaled_rope.checkpoint import load_config, without_custom_rope
from scaled_rope.errors import ConfigError
from scaled_rope.flags.serving import check_plan_arguments
from scaled_rope.patching.loading import auto_class, build_unscaled
from scaled_rope.patching.loss import logits_bytes
from scaled_rope.patching.output_head import without_adapters
from scaled_rope.patching.patch import PatchReport, patch_as_read
from scaled_rope.progress import Progress
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.recipes.runs import starts_from
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling, RopeSettings
from scaled_rope.scaling.resolve import with_primary
from scaled_rope.training.costs import Flops, ModelCost
from scaled_rope.training.engine import accumulation, allowed_sequence_parallel
from scaled_rope.training.long_ce import near_windows
from scaled_rope.training.mlp_tiles import tile_mlps
from scaled_rope.training.model import (
    SummedLoss,
    add_lora,
    building,
    enable_checkpointing,
    init_config,
    install_scaling,
    set_sliding_window,
)
from scaled_rope.training.ring import check_context_parallel, check_shared_layers, head_dims
from scaled_rope.training.traced_memory import Trace, layers_alike, to_cpu, trace_pass

ARCHITECTURES = bundled("data/architectures.json")
"""Fields from the config.json of the recipes' base models, so that planning needs no network."""


def base_config(recipe: Recipe) -> Any:
    """The configuration of the model that a recipe starts from.

    If another recipe has yet to train that model, its configuration is the one that the other recipe would write.

    Raises:
        ConfigError: the model is neither here, nor in `ARCHITECTURES`, nor on the hub.
    """
    from transformers import AutoConfig

    if recipe.init is not None:
        with building(recipe):
            return init_config(recipe)
    name = str(recipe.model)
    if not Path(name).is_dir():
        known = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
        if name in known:
            fields = dict(known[name])
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        if (before := starts_from(recipe)) is not None:
            config = copy.deepcopy(meta_model(before).config)
            text = text_config(config)
            # On the meta device a change of rope_theta alone is not found to be in transformers' own words.
            if text.rope_parameters.get("method") == "default":
                text.rope_parameters = without_custom_rope(text.rope_parameters)
            return config
    return load_config(name)


def meta_model(recipe: Recipe) -> Any:
    """The model of a recipe with its scaling installed, on the meta device: shapes and frequencies, no weights.

    Raises:
        ConfigError: what `base_config` and `install_scaling` raise, or an `init` that is no model.
    """
    config = base_config(recipe)
    settings = _unscaled(config)
    with building(recipe), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=torch.float32)
    _install(model, recipe, settings)
    return model


def _unscaled(config: Any) -> RopeSettings | None:
    """Change a config with our rope_type, which transformers cannot build, to the unscaled one; what it said, if so."""
    settings = RopeSettings(config)
    return settings if build_unscaled(config) else None


def _install(model: Any, recipe: Recipe, settings: RopeSettings | None) -> PatchReport | None:
    """`install_scaling`; the checkpoint's own scaling, from `_unscaled`, where the recipe keeps it."""
    report = install_scaling(model, recipe, settings)
    if report is not None or settings is None:
        return report
    plan, own = settings.plan, settings.scaling
    return patch_as_read(model, settings, with_primary(plan.layers, own) or own, plan.drop_layers)


# -------------------------------------------------------------------------------------------------------- the plan

GB = 1e9
_MARGIN = 0.08  # of a GPU's memory: CUDA's own, the allocator's gaps, collectives' buffers
_PREFETCHED_LAYERS = 2  # of ZeRO-3: the layer at work and the next
_TRACED_LAYERS = (3, 4)  # of a model whose layers are alike
_BUCKETS = 4 * 5e8  # elements of ZeRO-2's buckets: gradients and weights, each twice so that they overlap with work
_NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight in NF4: four bits, a scale of one byte for 64 weights, a float32 scale of 256 of those."""
_FIELDS = (
    "gradient_checkpointing", "keep_attention", "offload_activations", "sequence_parallel", "context_parallel", "lora",
    "quantization",
)  # fmt: skip
"""Fields that `Options` and recipes share."""


@dataclass(frozen=True)
class Options:
    """Ways to run a recipe that change memory and time; all but `lora` leave the result as it is."""

    ranks: int = 1
    engine: str = "plain"
    gradient_checkpointing: bool = True
    keep_attention: bool = False
    offload_activations: bool = False
    sequence_parallel: int = 1
    context_parallel: int = 1
    lora: bool = False
    quantization: str | None = None

    def __str__(self) -> str:
        words = [self.engine]
        words += [] if self.gradient_checkpointing else ["no gradient checkpointing"]
        words += ["attention kept"] if self.keep_attention else []
        words += ["activations offloaded"] if self.offload_activations else []
        words += [f"{self.sequence_parallel} ranks to a sequence"] if self.sequence_parallel > 1 else []
        words += [f"{self.context_parallel} ranks to a ring"] if self.context_parallel > 1 else []
        words += ["lora"] if self.lora else []
        words += [f"{self.quantization} base"] if self.quantization else []
        return ", ".join(words)

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with these options."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return replace(recipe, **fields, lora_embeddings_and_norms=self.lora and recipe.lora_embeddings_and_norms)

    def command(self, name: str, recipe: Recipe) -> str:
        """The command line that runs a recipe, by its name, with these options."""
        parts, wanted = ["finetune.py", name], self.applied_to(recipe)
        for field in (*_FIELDS, "lora_embeddings_and_norms"):
            if (value := getattr(wanted, field)) != getattr(recipe, field):
                flag = field.replace("_", "-")
                plain = {True: f"--{flag}", False: f"--no-{flag}", None: f"--{flag} none"}
                parts.append(plain[value] if value is None or isinstance(value, bool) else f"--{flag} {value}")
        if self.engine != "plain":
            return " ".join(["accelerate launch --config_file", f"configs/accelerate/{self.engine}.yaml", *parts])
        return " ".join([f"torchrun --nproc_per_node {self.ranks}" if self.ranks > 1 else "python", *parts])


@dataclass(frozen=True)
class Memory:
    """Bytes per rank, by purpose; those of the pass and those of the optimizer's step are not needed at once."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """The most that a pass holds besides the three above."""
    logits: float
    """The most that logits take while the loss is computed; counted in `activations` if that is when it is largest."""
    gathered: float
    """Weights and gradients that the engine gathers or buffers in a pass."""
    step_workspace: float
    """Temporary tensors of the optimizer's step."""
    host: float
    """In CPU memory: everything that is offloaded."""

    cache = 0.0
    """Training keeps no key/value cache."""

    @property
    def total(self) -> float:
        """The most that is on the device at once."""
        in_pass = self.activations + self.gathered
        return self.weights + self.gradients + self.optimizer + max(in_pass, self.step_workspace)

    def terms(self) -> dict[str, float]:
        """Name -> GB."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "step_workspace", "cache")
        return {name: getattr(self, name) / GB for name in names} | {"total": self.total / GB, "host": self.host / GB}


class Planner:
    """Memory and time of a recipe under different options. Building it reads shapes; each new pass is traced once."""

    def __init__(self, recipe: Recipe, on_gpu: bool = True) -> None:
        self.recipe, self.on_gpu = recipe, on_gpu
        self._config = base_config(recipe)
        self._settings = _unscaled(self._config)
        self._traces: dict[tuple[Any, ...], tuple[Trace, Counts]] = {}
        self._flops: dict[bool, Flops] = {}
        self._ring: tuple[Any, RopeScaling] | None = None
        text = text_config(self._config)
        self.heads = text.num_attention_heads
        self.kv_heads = getattr(text, "num_key_value_heads", None) or self.heads

    def flops(self, lora: bool | None = None) -> Flops:
        """FLOPs of one optimizer step over the global batch of full rows."""
        adapters = self.recipe.lora if lora is None else lora
        if adapters not in self._flops:
            recipe = replace(self.recipe, lora=adapters, quantization=None)
            cost, length = ModelCost.of(self._build(recipe, torch.float32)), _length(recipe)
            whole = cost.sequence(length)
            if recipe.loss_weights == "long_ce":
                for first, _, end in near_windows(length, recipe.long_ce_context, recipe.long_ce_step):
                    whole += cost.reading(end - first)
            self._flops[adapters] = whole * recipe.global_batch_size
        return self._flops[adapters]

    def seconds(self, options: Options, peak: float, utilisation: float) -> float:
        """Seconds of one optimizer step, where `utilisation` of the ranks' `peak` FLOP/s is model FLOPs."""
        return self.flops(options.lora).total / (options.ranks * peak * utilisation)

    def memory(self, options: Options) -> Memory:
        """Memory per rank.

        Raises:
            ConfigError: a batch or a sequence that the ranks cannot share.
        """
        recipe = options.applied_to(self.recipe)
        passes = accumulation(recipe, options.ranks)
        self._check_ring(recipe)
        shards = 1 if options.engine == "plain" else options.ranks
        half = recipe.compute_dtype == "bfloat16"
        cast = half and options.engine != "plain"  # a pass of DeepSpeed and FSDP2 has bfloat16 copies of weights
        length = -(-_length(recipe) // (options.sequence_parallel * options.context_parallel))
        trace, counts = self._trace(recipe, length, cast, passes > 1 or options.engine != "plain")
        all_, trained, width = counts.parameters, counts.trained, 2 if half else 4
        # Bytes per parameter in float32: weight 4, gradient 4, two moments 8; DeepSpeed adds a copy of weights.
        if options.engine == "plain":
            weights, gradients, optimizer = 4.0 * all_, 4.0 * trained, 8.0 * trained
            gathered, host = 0.0, 0.0
            if options.quantization is not None:
                matrices = counts.matrices
                weights = _NF4_BYTES * matrices + width * (all_ - trained - matrices) + 4.0 * trained
                gathered = 2.0 * width * counts.largest_matrix  # a matrix at work, in the dtype of the pass
        elif options.engine == "fsdp2":
            weights, gradients, optimizer = 4.0 * all_ / shards, 4.0 * trained / shards, 8.0 * trained / shards
            # Whole from the first layer to the last: weights outside layers and their gradients. Layers come one after
            # another; gradients of a layer, then those of the rest, are copied to float32 to be summed over ranks.
            rest = all_ - counts.layers * counts.layer
            gathered = width * (2.0 * rest + (_PREFETCHED_LAYERS + 1) * counts.layer) + 4.0 * max(rest, counts.layer)
            gathered, host = gathered + self._ring_buffers(recipe, length, width), 0.0
        else:
            weights = width * all_ / (shards if options.engine.startswith("zero3") else 1)
            gradients, optimizer = 4.0 * trained / shards, 12.0 * trained / shards
            # ZeRO-3: layers at work and the projection, whole; and the largest gradient on its way to the others.
            layers = _PREFETCHED_LAYERS * counts.layer + counts.head
            gathered = min(width * layers, width * all_) + width * counts.largest
            if options.engine == "zero2":
                gathered = min(_BUCKETS * width, width * all_)
            host = 0.0
            if options.engine == "zero3_offload":
                host, weights, gradients, optimizer = weights + gradients + optimizer, 0.0, 0.0, 0.0
        inside = trace.peak if passes > 1 or options.engine != "plain" else max(0.0, trace.peak - gradients)
        if options.offload_activations:
            moved = counts.layer_input(recipe, length, 2 if cast else 4)
            inside = max(0.0, inside - counts.layers * moved)
            # Of memory that a GPU copies from, torch takes a power of two for each tensor.
            host += counts.layers * (2.0 ** math.ceil(math.log2(moved)) if self.on_gpu else moved)
        logits = 3 * 4 * recipe.batch_size * length * counts.vocabulary
        logits = logits if recipe.loss == "whole" else min(logits_bytes(), logits)
        # AdamW makes a list of square roots as large as the weights at once on a GPU, one by one on a CPU.
        workspace = 4.0 * trained / shards if self.on_gpu else 8.0 * counts.largest
        if options.engine == "zero3_offload":
            workspace = 0.0
        return Memory(weights, gradients, optimizer, inside, float(logits), gathered, workspace, host)

    def _check_ring(self, recipe: Recipe) -> None:
        """Raise a ConfigError if ranks cannot share the recipe's sequences by ring attention as it says."""
        if recipe.context_parallel == 1:
            return
        if self._ring is None:
            model = self._build(recipe, torch.float32)
            report = _install(model, recipe, self._settings)
            self._ring = model, RopeScaling.from_config(model.config) if report is None else report.scaling
        model, scaling = self._ring
        check_context_parallel(recipe, model.config, scaling, attention_for(self._config, "sdpa"))
        check_shared_layers(recipe, model)

    def _ring_buffers(self, recipe: Recipe, length: int, width: int) -> float:
        """Bytes of ring attention over `length` tokens per rank beyond those of attention, for the layer at work.

        Keys and values on their way out and in; in the forward pass three float32 results of queries (so far, of a
        part, of both), in the backward pass three float32 gradients of keys and values (summed, on their way out, in)
        and two of queries.
        """
        one = recipe.batch_size * length * head_dims(text_config(self._config))[0]
        queries, both = float(one * self.heads), float(2 * one * self.kv_heads)
        return 2.0 * width * both + 4.0 * max(3 * queries, 3 * both + 2 * queries)

    def _build(self, recipe: Recipe, dtype: torch.dtype) -> Any:
        """The recipe's model on the meta device, without its scaling.

        Windowed attention is traced as one operator like other attention: block by block it would take minutes, and
        its blocks are small.
        """
        attention = attention_for(self._config, "sdpa")
        attention = "sdpa" if attention == "sdpa_blocked" else attention
        with torch.device("meta"):
            model = auto_class(self._config).from_config(
                copy.deepcopy(self._config), dtype=dtype, attn_implementation=attention
            )
            return add_lora(model, recipe.lora_embeddings_and_norms) if recipe.lora else model

    def _trace(self, recipe: Recipe, length: int, cast: bool, accumulating: bool) -> tuple[Trace, Counts]:
        kept = recipe.gradient_checkpointing, recipe.keep_attention, recipe.mlp_tiles
        key = (length, *kept, recipe.lora, cast, accumulating)
        if key not in self._traces:
            model = self._build(recipe, torch.bfloat16 if cast else torch.float32).train()
            with FakeTensorMode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                to_cpu(model)
                _install(model.get_base_model() if recipe.lora else model, recipe, self._settings)
                enable_checkpointing(model, recipe)
                tile_mlps(model, recipe.mlp_tiles)
                text_config(model.config).use_cache = False
                if recipe.sliding_window_attention_schedule is not None:
                    set_sliding_window(model, min(recipe.sliding_window_attention_schedule))
                counts = Counts.of(model)
                # There is no trace of a fused loss, whose pieces can be larger (docs/training.md).
                module = SummedLoss(model, loss="whole" if recipe.loss == "whole" else "outlined")
                autocast = recipe.compute_dtype == "bfloat16" and not cast
                base = model.get_base_model() if recipe.lora else model
                self._traces[key] = (
                    _trace_layers(module, base, recipe.batch_size, length, autocast, accumulating),
                    counts,
                )
        return self._traces[key]

    def alternatives(self, ranks: int) -> list[Options]:
        """Ways to run the recipe on so many ranks, from the fastest and largest to the slowest and smallest."""
        first = Options(ranks, "plain", False)
        checkpointed = replace(first, gradient_checkpointing=True)
        ways = [first, replace(checkpointed, keep_attention=True), checkpointed]
        for engine in ("zero2", "zero3") if ranks > 1 else ():
            sharded = replace(checkpointed, engine=engine)
            ways += [replace(sharded, keep_attention=True), sharded]
        sharded = ways[-1]
        shared = ranks > 1 and self.recipe.documents == "joined"  # what check_sequence_parallel allows
        for size in allowed_sequence_parallel(self.heads, self.kv_heads) if shared else ():
            if size > 1 and ranks % size == 0:
                ways.append(replace(sharded, sequence_parallel=size))
        smallest = ways[-1]
        if smallest != sharded:
            ways.insert(-1, replace(smallest, keep_attention=True))
        ways.append(replace(smallest, offload_activations=True))
        ways += self._rings(replace(checkpointed, engine="fsdp2"))
        if ranks > 1:
            ways.append(replace(smallest, engine="zero3_offload", offload_activations=True))
        ways += [replace(checkpointed, lora=True), replace(checkpointed, lora=True, offload_activations=True)]
        quantized = replace(checkpointed, lora=True, quantization="nf4")
        ways += [quantized, replace(quantized, offload_activations=True)]
        if ranks > 1:
            ways += [replace(sharded, lora=True), replace(smallest, lora=True, offload_activations=True)]
        return ways

    def _rings(self, sharded: Options) -> list[Options]:
        """Ways to share sequences by ring attention; if there is none, one that `memory` refuses with the reason."""
        sizes = [size for size in range(2, sharded.ranks + 1) if sharded.ranks % size == 0]
        ways, possible = [replace(sharded, context_parallel=size) for size in sizes], []
        for options in ways:
            try:
                self._check_ring(options.applied_to(self.recipe))
            except ConfigError:
                continue
            possible.append(options)
        return possible or ways[:1]


def _trace_layers(module: Any, model: Any, batch: int, length: int, autocast: bool, accumulating: bool) -> Trace:
    """The trace of a training module; where the model's layers are alike, only a few of them are run.

    The model has fewer layers afterwards.
    """
    place = layers_alike(model) if model.config._attn_implementation == "sdpa" else None  # others may differ by layer
    layers = [] if place is None else getattr(*place)
    if place is None or len(layers) <= sum(_TRACED_LAYERS):
        return trace_pass(module, batch, length, autocast, accumulating)
    traces = []
    for count in sorted(_TRACED_LAYERS, reverse=True):
        setattr(*place, getattr(*place)[:count])
        for parameter in module.parameters():
            parameter.grad = None
        traces.append(trace_pass(module, batch, length, autocast, accumulating, getattr(*place)))
    more, fewer = traces
    return fewer.with_layers(min(_TRACED_LAYERS), more, max(_TRACED_LAYERS), len(layers))


@dataclass(frozen=True)
class Counts:
    """Sizes of a model in parameters; `largest` is the largest trained tensor."""

    parameters: int
    trained: int
    largest: int
    layer: int
    head: int
    layers: int
    hidden: int
    vocabulary: int
    matrices: int
    """In frozen matrices of layers, which can be quantised."""
    largest_matrix: int

    @classmethod
    def of(cls, model: Any) -> Counts:
        config = text_config(model.config)
        sizes = [parameter.numel() for parameter in model.parameters()]
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        base = without_adapters(model)
        head = base.get_output_embeddings().weight.numel()
        outside = sum(
            p.numel() for p in {*base.get_input_embeddings().parameters(), base.get_output_embeddings().weight}
        )
        apart = base.get_output_embeddings()
        matrices = [
            module.weight.numel() for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not apart and not module.weight.requires_grad
        ]  # fmt: skip
        layers = config.num_hidden_layers
        layer = (sum(sizes) - outside) // layers
        return cls(sum(sizes), sum(trained), max(trained), layer, head, layers, config.hidden_size,
                   config.vocab_size, sum(matrices), max(matrices, default=0))  # fmt: skip

    def layer_input(self, recipe: Recipe, length: int, width: int) -> float:
        """Bytes of the input of a layer, which gradient checkpointing keeps."""
        return float(recipe.batch_size * length * self.hidden * width)


def _length(recipe: Recipe) -> int:
    return recipe.truncate or recipe.sequence_length


def run(args: argparse.Namespace) -> int:
    """Print the memory and time of a recipe, and the flags that make it fit."""
    check_plan_arguments(args)
    recipe = read_recipe(args.recipe)
    planner, room = Planner(recipe), args.gpu_memory * (1 - _MARGIN)
    found, refused = [], []
    ways = planner.alternatives(args.gpus)
    for options in Progress(ways, desc=f"plan of {recipe.name}", unit="way", leave=False):
        try:
            terms = planner.memory(options).terms()
        except ConfigError as error:
            refused.append((str(options), str(error)))
            continue
        seconds = planner.seconds(options, args.peak_tflops * 1e12, args.utilisation)
        hours = seconds * recipe.max_train_steps / 3600
        found.append((options, terms, seconds, hours, terms["total"] <= room))
    if not found:
        raise ConfigError(f"recipe {recipe.name!r} cannot run on {args.gpus} ranks: {refused[0][1]}")
    if args.json:
        rows = [
            {"options": str(o), "command": o.command(args.recipe, recipe),
             "memory_gb": {k: round(v, 3) for k, v in t.items()}, "step_seconds": round(s, 2), "hours": round(h, 2),
             "fits": fits} for o, t, s, h, fits in found
        ]  # fmt: skip
        flops = planner.flops()
        print(json.dumps({"recipe": recipe.name, "gpus": args.gpus, "gpu_memory_gb": args.gpu_memory,
                          "flops_per_step": {"linear": flops.linear, "attention": flops.attention},
                          "alternatives": rows}, indent=1))  # fmt: skip
        return 0
    _print(planner, args, found, refused, room)
    return 0


Found = tuple[Options, dict[str, float], float, float, bool]


def _print(
    planner: Planner, args: argparse.Namespace, found: Sequence[Found], refused: Sequence[tuple[str, str]], room: float
) -> None:
    recipe, flops = planner.recipe, planner.flops()
    print(
        f"{recipe.name}: {recipe.max_train_steps} steps of {recipe.global_batch_size} sequences of {_length(recipe)}"
        f" tokens, {recipe.tokens_per_step * recipe.max_train_steps / 1e9:.3g} B tokens"
        + (f"; position ids jump (PoSE, {recipe.pose_chunks} chunks)" if recipe.positions == "pose" else "")
        + (f"; {recipe.short_share:g} of the steps are short and cheaper than this" if recipe.short_share else "")
        + ("; LongCE reads windows before each pass" if recipe.loss_weights == "long_ce" else "")
    )
    print(
        f"one step: {flops.total / 1e15:.4g} PFLOP, {flops.linear / flops.total:.0%} in matrices,"
        f" {flops.attention / flops.total:.0%} in causal attention (recomputation not counted)\n"
    )
    terms = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "step_workspace", "cache")
    head = ("GB per rank", *(term.replace("step_workspace", "Adam's") for term in terms), "total", "host", "fits")
    table = [head]
    for options, memory, _, _, fits in found:
        cells = [f"{memory[term]:.1f}" for term in (*terms, "total", "host")]
        table.append((str(options), *cells, "yes" if fits else "no"))
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    print(
        f"\nfits: at most {room:.1f} of {args.gpu_memory:g} GB."
        f" Adam's workspace and what a pass needs are not there at once; logits are part of the pass."
    )
    for name, reason in refused:
        print(f"not possible: {name}: {reason}")
    best = next((entry for entry in found if entry[4]), None)
    if best is None:
        print("nothing fits: more GPUs (--gpus), or larger ones (--gpu-memory)")
        return
    options, _, seconds, hours, _ = best
    print(f"\nfirst that fits: {options.command(args.recipe, recipe)}")
    print(
        f"at {args.utilisation:.0%} of {args.peak_tflops:g} TFLOP/s: {seconds:.4g} s a step, {hours:.4g} hours,"
        f" {hours * args.gpus:.4g} GPU-hours"
    )
