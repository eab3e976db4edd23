"""Engines that run training steps on one process or many: accelerate with DDP, DeepSpeed or FSDP, and their settings.

Everything that an engine could get wrong about batch, schedule or synchronisation is either set here or refused here.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from scaled_rope.errors import ConfigError, first_line
from scaled_rope.patching.loading import resolve_device
from scaled_rope.patching.rotary import ScaledRotaryEmbedding
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.training.ring import check_machine, ring_parallelism


@dataclass(frozen=True)
class Layout:
    """This process's place among all of them. Ranks that share a sequence are neighbours."""

    rank: int
    ranks: int
    sequence_parallel: int = 1
    context_parallel: int = 1

    @property
    def shared(self) -> int:
        """The number of ranks that share a sequence."""
        return self.sequence_parallel * self.context_parallel

    @property
    def multiple(self) -> int:
        """The multiple that a batch's length must be, to be cut into parts."""
        return self.sequence_parallel if self.context_parallel == 1 else 2 * self.context_parallel

    @property
    def data_rank(self) -> int:
        """Index of this rank's part of a batch, of `data_ranks` parts."""
        return self.rank // self.shared

    @property
    def data_ranks(self) -> int:
        """The number of ranks, or of groups of ranks that share sequences, that get different rows."""
        return self.ranks // self.shared

    def shard(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's stretch [B, T / sequence_parallel] of tensors [B, T]; under context_parallel they stay whole."""
        part = self.rank % self.sequence_parallel
        return {name: tensor.chunk(self.sequence_parallel, dim=1)[part] for name, tensor in tensors.items()}


def accumulation(recipe: Recipe, ranks: int) -> int:
    """The number of forward passes per rank and optimizer step.

    Raises:
        ConfigError: the global batch is no multiple of the sequences of all ranks in one pass.
    """
    for name in ("sequence_parallel", "context_parallel"):
        if ranks % (size := getattr(recipe, name)):
            raise ConfigError(f"{name} {size} is not allowed; a divisor of the {ranks} processes")
    size = recipe.sequence_parallel * recipe.context_parallel
    per_pass = recipe.batch_size * (ranks // size)
    if recipe.global_batch_size % per_pass:
        shared = "" if size == 1 else f" that share {size} to a sequence"
        raise ConfigError(
            f"global_batch_size {recipe.global_batch_size} is not allowed; a multiple of batch_size {recipe.batch_size}"
            f" x {ranks} processes{shared} = {per_pass}"
        )
    return recipe.global_batch_size // per_pass


def allowed_sequence_parallel(heads: int, kv_heads: int) -> list[int]:
    """The numbers of ranks over which Ulysses can spread attention heads.

    Each rank gets as many query heads as the others, and either as many key/value heads or a copy of one.
    """
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return [n for n in divisors if kv_heads % n == 0 or n % kv_heads == 0]


def check_sequence_parallel(recipe: Recipe, config: Any, scaling: RopeScaling, attention: str) -> None:
    """Raise an error for settings that would go wrong, or crash, with `recipe.sequence_parallel` ranks to a sequence.

    Raises:
        ConfigError: heads that cannot be divided, dynamic scaling, a method that changes attention, windows, separate
            documents, eager attention.
    """
    size = recipe.sequence_parallel
    if size == 1:
        return
    text = text_config(config)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if size not in (allowed := allowed_sequence_parallel(heads, kv_heads)):
        raise ConfigError(
            f"sequence_parallel {size} is not allowed for {heads} heads and {kv_heads} key/value heads;"
            f" one of: {', '.join(map(str, allowed))}"
        )
    if scaling.is_length_dependent:
        raise ConfigError(
            f"sequence_parallel {size} is not allowed with {scaling.label}: no rank sees the length of the sequence"
        )
    if scaling.beyond_tables:
        why = "its attention" if scaling.changes_attention else "its attention_temperature"
        raise ConfigError(
            f"sequence_parallel {size} is not allowed with {scaling.label}: {why} needs the whole sequence"
        )
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"sequence_parallel {size} is not allowed with layers of type {', '.join(sorted(others))}: a rank would"
            f" compute them from its own part of a sequence, or attend to all of it"
        )
    windows = recipe.sliding_window_attention_schedule or (getattr(text, "sliding_window", None),)
    longest = recipe.truncate or recipe.sequence_length
    if any(window is not None and window < longest for window in windows):
        raise ConfigError(
            f"sequence_parallel {size} is not allowed with a sliding window below {longest} tokens: it would be ignored"
        )
    if recipe.documents != "joined":
        raise ConfigError(f"sequence_parallel {size} is not allowed with documents: {recipe.documents}")
    if attention == "eager":
        raise ConfigError(f"sequence_parallel {size} is not allowed with eager attention; use sdpa or flash attention")


PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others. NCCL's own ten minutes are over while rank 0 alone hashes a base or writes the
finished model to a slow disk, and then it ends them all."""

_GROUPS: list[object] = []
"""Process groups, held until the process ends. Where DDP's reducer is the last to let go of a group, torch joins the
group's thread while it holds Python's lock, and that thread may wait for this lock: runs hung after their end.
Python's own reference lets go of the lock first."""
atexit.register(_GROUPS.clear)


def check_gpus() -> None:
    """Refuse more processes on this machine than it has GPUs: NCCL lets two share one only to fail.

    A process that sees one GPU may have been given its own by a scheduler, so of these nothing is known.

    Raises:
        ConfigError: there are.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = int(said) if said.isdecimal() else 1
    if torch.cuda.is_available() and here > (there := torch.cuda.device_count()) > 1:
        raise ConfigError(f"{here} processes on this machine are not allowed, it has {there} GPUs; start so many")


def make_accelerator(recipe: Recipe, attention_name: str) -> Any:
    """Make an `Accelerator` that suits this process's launcher; DeepSpeed gets the recipe's batch and clipping.

    Args:
        attention_name: the attention implementation that the model will be built with, which Ulysses must know.

    Raises:
        ConfigError: accelerate is missing, or it would train unsynchronised copies.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError:
        raise ConfigError("training needs accelerate: pip install 'scaled-rope[train]'") from None
    _quieten()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if recipe.quantization is not None and (deepspeed or fsdp):
        raise ConfigError(
            f"quantization {recipe.quantization!r} is not allowed under {'DeepSpeed' if deepspeed else 'FSDP'}, which"
            f" would shard 4-bit weights; use one process or torchrun (DDP)"
        )
    if fsdp:
        check_fsdp()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.sequence_parallel > 1 and not deepspeed:
        raise ConfigError(
            f"sequence_parallel {recipe.sequence_parallel} needs DeepSpeed, since accelerate shares sequences under its"
            f" ZeRO-3 only, not under FSDP or DDP: accelerate launch --config_file configs/accelerate/zero3.yaml"
        )
    check_machine(recipe)
    passes = accumulation(recipe, launched)
    if deepspeed and not torch.cuda.is_available():
        leave_out_collective_of_inference()
    # On CPU accelerate 1.15 needs both the gloo backend and cpu=True, or launched processes train without each other.
    on_cpu = "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
    check_gpus()
    handlers: list[Any] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=PATIENCE),
    ]
    options: dict[str, Any] = {}
    if recipe.sequence_parallel > 1:
        options["parallelism_config"] = _ulysses(recipe, launched, attention_name)
    if recipe.context_parallel > 1:
        options["parallelism_config"] = ring_parallelism(recipe, launched)
    mixed = "bf16" if recipe.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu and not deepspeed, kwargs_handlers=handlers, **options)
    if torch.distributed.is_initialized():
        _GROUPS.append(torch.distributed.group.WORLD)
    kind = accelerator.distributed_type.value
    if launched != accelerator.num_processes or (launched > 1 and kind == "NO"):
        raise ConfigError(
            f"{launched} processes were launched but accelerate sees {accelerator.num_processes} of type {kind}:"
            f" they would train unsynchronised copies; launch DDP or DeepSpeed on this platform"
        )
    accelerator.gradient_accumulation_steps = passes
    if kind == "FSDP":
        configure_fsdp(accelerator.state.fsdp_plugin, recipe)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        settings = plugin.deepspeed_config
        if recipe.sequence_parallel > 1 and plugin.zero_stage != 3:
            raise ConfigError(
                f"sequence_parallel {recipe.sequence_parallel} needs ZeRO-3, this is stage {plugin.zero_stage}"
            )
        zero = settings["zero_optimization"]
        offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        if offloads and settings.get("zero_force_ds_cpu_optimizer", True):
            check_can_build("cpu_adam")
        # With it DeepSpeed 0.19.8 averages over all ranks, which the loss is scaled for; without it over data ranks.
        if zero.get("reduce_scatter", True) is False:
            raise ConfigError(
                "DeepSpeed field reduce_scatter = false is not allowed: without it gradients are averaged otherwise"
            )
        for field in ("optimizer", "scheduler"):
            if field in settings:
                raise ConfigError(f"DeepSpeed field {field!r} is not allowed; the recipe sets it: remove the block")
        settings["train_micro_batch_size_per_gpu"] = recipe.batch_size
        settings["gradient_accumulation_steps"] = passes
        settings["gradient_clipping"] = recipe.grad_norm or 0.0
    return accelerator


def check_fsdp() -> None:
    """Raise an error for FSDP on a machine where accelerate does not shard.

    Raises:
        ConfigError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "FSDP is not available on this platform: accelerate would train unsynchronised copies on CPU;"
            " launch DDP (torchrun) or DeepSpeed"
        )


_NO_DEEPSPEED = "DeepSpeed is not installed: pip install 'scaled-rope[train]'"


def leave_out_collective_of_inference() -> None:
    """Keep DeepSpeed from compiling `deepspeed_shm_comm`, as it does on machines without a GPU before the first step.

    A compiler needs a minute for it, and training never calls it: DeepSpeed 0.19.8 has it for `inference_all_reduce`
    (deepspeed/comm/torch.py), for inference under tensor parallelism.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    try:
        from deepspeed import ops
    except ImportError:
        raise ConfigError(_NO_DEEPSPEED) from None
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_can_build(operation: str) -> None:
    """Raise an error if DeepSpeed cannot compile `operation`, which it does on first use.

    Raises:
        ConfigError: DeepSpeed itself, ninja or a C++ compiler is missing.
    """
    try:
        from deepspeed.git_version_info import installed_ops
    except ImportError:
        raise ConfigError(_NO_DEEPSPEED) from None
    if installed_ops.get(operation):
        return
    if shutil.which("ninja") is None:  # pip puts it beside Python, where PATH leads in an activated environment only
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    missing = [tool for tool in ("ninja", os.environ.get("CXX", "c++")) if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"DeepSpeed has to compile {operation} and finds no {' and no '.join(missing)}: install ninja (pip) and a"
            f" C++ compiler, or launch DDP"
        )
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob(f"{operation}/lock"), *root.glob(f"*/{operation}/lock")]:
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > 2:  # ranks of one run begin within seconds, and a compiler needs a minute
            print(
                f"{lock} is {minutes:.0f} minutes old: another run compiles {operation}, or one was killed while it"
                f" did; this run waits until the file is gone, so remove it if nothing compiles",
                file=sys.stderr,
                flush=True,
            )


def configure_fsdp(plugin: Any, recipe: Recipe) -> None:
    """Refuse FSDP settings that are untested, and keep float32 where accelerate would round to bfloat16.

    accelerate's own policy under bf16 also sums gradients over ranks in bfloat16, and casts the loss and the weights of
    targets to it.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`, not used yet.

    Raises:
        ConfigError: FSDP 1, or FSDP's own activation checkpointing.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if plugin.fsdp_version != 2:
        raise ConfigError(f"FSDP field fsdp_version = {plugin.fsdp_version} is not allowed; 2")
    if plugin.activation_checkpointing:
        raise ConfigError(
            "FSDP field fsdp_activation_checkpointing = true is not allowed; the recipe's gradient_checkpointing does"
            " it"
        )
    if recipe.precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def _ulysses(recipe: Recipe, ranks: int, attention: str) -> Any:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation=attention)
    size = recipe.sequence_parallel
    return ParallelismConfig(sp_size=size, dp_shard_size=ranks // size, sp_backend="deepspeed", sp_handler=handler)


def place_tables(module: torch.nn.Module, device: torch.device) -> None:
    """Move rotary frequencies to the device that a model trains on.

    accelerate moves a model to "meta" and back around FSDP2's sharding, and restores only parameters and buffers;
    rotary frequencies are neither.
    """
    for part in module.modules():
        if isinstance(part, ScaledRotaryEmbedding):
            part.to_empty(device=device)  # the module computes its frequencies anew


def restore_heads(model: Any) -> None:
    """Reset the grouping of attention heads to the config's, for passes in which no sequence is shared.

    Where ranks outnumber key/value heads Ulysses changes the grouping in every training pass and does not restore it.
    """
    config = text_config(model.config)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = config.num_attention_heads // kv_heads


def _quieten() -> None:
    """Silence the engines' routine messages at start, so that important ones are seen."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def has_slow_bfloat16() -> bool:
    """Whether the CPU has to take bfloat16 apart in float32 registers: x86 without AVX-512."""
    return platform.machine() in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith(
        "AVX512"
    )


def settle_precision(recipe: Recipe) -> Recipe:
    """The recipe with a precision that is named: "auto" is bf16, or fp32 on a CPU that is slow with bfloat16."""
    if recipe.precision != "auto":
        return recipe
    slow = resolve_device(None).type == "cpu" and has_slow_bfloat16()
    return replace(recipe, precision="fp32" if slow else "bf16")


def engine_name(accelerator: Any) -> str:
    """The engine, which a resumable state depends on: "plain" (one process and DDP), "fsdp", "zero2" or "zero3"."""
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        return f"zero{plugin.zero_stage}"
    return "fsdp" if accelerator.distributed_type.value == "FSDP" else "plain"


@contextlib.contextmanager
def last_pass(accelerator: Any, module: Any, last: bool) -> Iterator[None]:
    """The context of one pass of a step: gradients are reduced, and the optimizer steps, in the last pass only.

    `Accelerator.accumulate` counts passes from the beginning of the run, which goes wrong when a run is resumed with
    another number of passes per step.

    Ranks that share a sequence by ring attention reduce gradients in every pass: else each would hold those of all
    weights from pass to pass, which FSDP2 had spread over ranks.
    """
    accelerator.sync_gradients = last
    config = accelerator.parallelism_config
    reduce = last or (config is not None and config.cp_enabled)
    with contextlib.nullcontext() if reduce else accelerator.no_sync(module):
        yield


_LOST = re.compile(
    r"gloo/|ncclRemoteError|remote process exited|NCCL communicator (was|has been) aborted|collective operation timeout"
    r"|connection (closed|reset) by peer|connection was likely closed|failed to recv|broken pipe|connection refused"
    r"|socket timeout|wait timeout after",
    re.IGNORECASE,
)
_NCCL = re.compile(r"\bNCCL error|\bncclUniqueId|\bnccl\w*(Error|InvalidUsage|InvalidArgument)\b")


@contextlib.contextmanager
def naming_a_lost_rank() -> Iterator[None]:
    """Report that another rank of this run has ended, which gloo and NCCL raise as errors of many lines, in one; of
    NCCL's other errors the line says what NCCL gives as the cause.

    Raises:
        ConfigError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        rank, said = os.environ.get("RANK", "0"), str(error)
        if _LOST.search(said) is not None:
            raise ConfigError(
                f"rank {rank} lost the connection to another process of this run, which has ended or"
                f" cannot be reached ({first_line(error)}); the same command continues from the last state"
            ) from error
        if _NCCL.search(said) is None:
            raise
        said = said.partition("Exception raised from")[0]  # frames of C++ follow
        before, _, cause = said.partition("Last error:")
        facts = [line.strip() for line in (cause if cause.strip() else before).splitlines() if line.strip()]
        raise ConfigError(f"rank {rank}: NCCL failed: {' '.join(facts)}; NCCL_DEBUG=WARN tells more") from error


class StopSignal:
    """Remembers SIGTERM (a scheduler's pre-emption) until all ranks can act on it together. A context manager."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def anywhere(self, accelerator: Any) -> bool:
        """Whether any rank was asked to stop; every rank must call this, and all get the same answer."""
        mine = torch.tensor([int(self._requested)], device=accelerator.device)
        return bool(accelerator.gather(mine).any())
