"""The only place that loads models and tokenizers, those that command-line flags name included.

A *job* is one checkpoint read under one scaling. `model_jobs` turns flags into jobs and needs only configuration files,
so bad input is refused before any weights are read; `ModelLoader` then loads each checkpoint once and changes its
scaling in place.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from scaled_rope.backends import ATTENTIONS as ATTENTIONS
from scaled_rope.backends import attention_for as attention_for
from scaled_rope.backends import check_attention
from scaled_rope.backends import resolve_attention as resolve_attention
from scaled_rope.config import LayerPlan, RopeScaling
from scaled_rope.dialects import CUSTOM_ROPE_TYPE, PRIMARY_LAYER_TYPE, RECORD_KEY, nested_types, read_by_attention
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.flags import DEFAULT_MODEL as DEFAULT_MODEL
from scaled_rope.flags import NO_EFFECT, PARAMETERS, check_local, check_model_arguments
from scaled_rope.flags import add_model_arguments as add_model_arguments
from scaled_rope.flags import no_config as no_config
from scaled_rope.formulas import dynamic_ntk_scale
from scaled_rope.fused import resolve_kernel
from scaled_rope.methods import METHODS, compute_scale
from scaled_rope.patch import (
    ADAPTERS,
    computes,
    head_dim_of,
    layer_types_of,
    patch_model,
    patched_kernel,
    patched_plan,
    patched_scaling,
    unpatch_model,
)
from scaled_rope.relocated import check_carrier
from scaled_rope.results import portable_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


# ------------------------------------------------------------------------------------------- names to torch objects


def resolve_device(name: str | None) -> torch.device:
    """The torch device called `name`; None: the first GPU when there is one, else the CPU.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """The full name of a dtype; "auto" is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise unknown("dtype", name, ["auto", *DTYPES])
    return name


# ---------------------------------------------------------------------------------------------- reading checkpoints


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Report any failure to read a checkpoint as bad input in one line.

    transformers, tokenizers, safetensors and the hub client raise a dozen unrelated types for a broken checkpoint and
    log more, so every exception counts here and the log is silenced; the cause stays attached for debugging.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub = logging.getLogger("huggingface_hub")  # it logs every try to reach the hub
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"{what} {name!r} cannot be read: {_first_line(error)}") from error
    except Exception as error:
        raise ConfigError(f"{what} {name!r} cannot be read: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint (directory or hub name), with the RoPE parameters as written.

    Raises:
        ConfigError: nothing there, or not a configuration that transformers knows.
    """
    check_local(name)
    with _reading("model", name):
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
        rope = raw.get("rope_parameters")
        if CUSTOM_ROPE_TYPE not in str(rope) or raw.get("model_type") not in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        # Some config classes reject rope types that they do not know, so that is set behind their back.
        family = transformers.CONFIG_MAPPING[raw["model_type"]]
        config = family.from_dict({**raw, "rope_parameters": _unscaled(rope)})
        config.rope_parameters = rope
        return config


def _unscaled(rope: Any) -> Any:
    """RoPE parameters that transformers can build a model from, where they are ours: the model before any scaling."""
    if nested_types(rope):
        return {name: _unscaled(entry) if name in nested_types(rope) else entry for name, entry in rope.items()}
    if rope.get("rope_type") != CUSTOM_ROPE_TYPE:
        return dict(rope)
    return read_by_attention(rope) | RopeScaling.from_spec("default", RopeScaling.from_config(rope)).to_config()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ConfigError: nothing there, or no tokenizer in it.
    """
    if not (Path(name) / "tokenizer_config.json").is_file():  # a folder may hold a tokenizer alone
        check_local(name)
    with _reading("tokenizer of model", name):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def resolve_scaling(spec: str, own: RopeScaling) -> RopeScaling:
    """What `spec` means for a checkpoint that carries `own`.

    Beyond `RopeScaling.from_spec`: "checkpoint" is `own`, "checkpoint:FACTOR" is `own` read with another factor, and
    "METHOD:checkpoint" takes over the factor of `own`.

    Raises:
        ConfigError: not a scaling, or a new factor for a checkpoint that carries none.
    """
    head, comma, fields = spec.partition(",")
    name, colon, factor = head.partition(":")
    if factor == "checkpoint":
        head = f"{name}:{own.factor!r}"
    if name != "checkpoint":
        return RopeScaling.from_spec(head + comma + fields, own)
    if fields:
        raise ConfigError(f"scaling {spec!r} is not allowed; 'checkpoint' takes a factor only: checkpoint[:FACTOR]")
    if not colon:
        return own
    if own.method == "default":
        raise ConfigError(f"scaling {spec!r} is not allowed; the checkpoint carries no scaling, name a method")
    try:
        number = float(factor)
    except ValueError as error:
        raise ConfigError(f"scaling {spec!r} is not allowed; factor {factor!r} is not a number") from error
    return replace(own, factor=number)


def at_length(scaling: RopeScaling, seq_len: int) -> RopeScaling:
    """The scaling that gives every sequence what a length-dependent one gives a sequence of `seq_len` tokens."""
    if not scaling.is_length_dependent:
        return scaling
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    ratio = max(1.0, seq_len / scaling.original_max_position_embeddings)
    if scaling.method == "dynamic-ntk":
        return replace(scaling, method="ntk", factor=dynamic_ntk_scale(scaling.factor, ratio))
    if scaling.method == "longrope":
        used = scaling.params["long_factor" if ratio > 1 else "short_factor"]
        return replace(scaling, params={"short_factor": used, "long_factor": used})
    scale = float(compute_scale(scaling, torch.tensor(float(seq_len), dtype=torch.float64, device="cpu")))
    return replace(scaling, dynamic=False, dynamic_step=None, factor=scale)


def apply_scaling(
    model: nn.Module, scaling: RopeScaling, plan: LayerPlan | None = None, kernel: str | None = None
) -> None:
    """Make a model compute with `scaling`, whatever it computed with before.

    plan: what differs between layers, its primary layer type aside; by default what differs now.
    kernel: what rotates queries and keys, see `patch_model`; by default what does now, or else "auto".

    A model whose config says so and that computes so is left untouched, so any architecture can be read as it is. Only
    a kernel that is asked for by name, or that "auto" has to offer for a family known by name, is put in all the same.
    """
    if kernel is None:
        kernel = patched_kernel(model) or "auto"
    current = patched_plan(model)
    plan = current if plan is None else plan
    layers = with_primary(plan.layers, scaling)
    backend = resolve_kernel(kernel)
    if patched_scaling(model) == scaling and current == LayerPlan(layers, plan.drop_layers):
        if kernel == "auto" or patched_kernel(model) == backend:
            return
    if patched_scaling(model) is not None:
        unpatch_model(model)
    config: Any = model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the config was first read
        own = RopeScaling.from_config(config)
    wants_kernel = backend is not None and (kernel != "auto" or config.get_text_config().model_type in ADAPTERS)
    if layers or plan.drop_layers or own != scaling or not computes(model, scaling) or wants_kernel:
        patch_model(model, layers or scaling, drop_layers=plan.drop_layers, kernel=kernel)


def with_primary(layers: dict[str, RopeScaling], scaling: RopeScaling) -> dict[str, RopeScaling]:
    """Scalings by layer type with that of the full-attention layers (or else the first) replaced; none stay none."""
    if not layers:
        return {}
    return {**layers, (PRIMARY_LAYER_TYPE if PRIMARY_LAYER_TYPE in layers else next(iter(layers))): scaling}


def resolve_plan(
    config: Any, layers: str | None = None, drop_layers: Sequence[int] | None = None, plan: LayerPlan | None = None
) -> LayerPlan:
    """What is to differ between the layers of a model.

    Args:
        config: its configuration.
        layers: the only layer type that a scaling is for; None: as the checkpoint says, or else all layers.
        drop_layers: indices of layers without rotary embedding; None: as the checkpoint says.
        plan: what the checkpoint says; by default read from `config`.

    Raises:
        ConfigError: a layer type that cannot be chosen, or indices that are none.
    """
    text = config.get_text_config()
    plan = LayerPlan.from_config(text) if plan is None else plan
    if layers is not None:
        types = layer_types_of(text)
        if PRIMARY_LAYER_TYPE not in types or len(types) < 2:
            raise ConfigError(
                f"layers={layers!r}: must be left out, the layers of this {text.model_type} model are of one type"
            )
        if layers != PRIMARY_LAYER_TYPE:
            raise ConfigError(
                f"layers={layers!r}: must be {PRIMARY_LAYER_TYPE!r}, others see no more than their window"
            )
        if not plan.layers:
            plan = replace(plan, layers=dict.fromkeys(types, RopeScaling.from_config(text)))
    if drop_layers is not None:
        for index in drop_layers:
            if not 0 <= index < text.num_hidden_layers:
                raise ConfigError(f"drop_layers={index}: must be a layer's index, 0 to {text.num_hidden_layers - 1}")
        plan = replace(plan, drop_layers=tuple(sorted(set(drop_layers))))
    return plan


def _quantization(bits: int, dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"loading in {bits} bits needs: pip install bitsandbytes")
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=DTYPES[dtype])


@contextmanager
def former_names() -> Iterator[None]:
    """Around calls of PEFT: 0.21 asks transformers 5.23 by a name that it has given up, and each time it says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _merge_adapter(model: nn.Module, adapter: str) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("an adapter needs peft: pip install 'scaled-rope[train]'") from error
    with _reading("adapter", adapter), former_names():
        merged: nn.Module = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged


def load_model(
    name: str,
    *,
    scaling: RopeScaling | str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str = "auto",
    adapter: str | None = None,
    trust_remote_code: bool = False,
    sliding_window: int | None = None,
    layers: str | None = None,
    drop_layers: Sequence[int] | None = None,
    kernel: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
) -> Any:
    """Load a causal language model for inference, with a scaling installed; whatever `patch_model` has put into it.

    Args:
        name: directory or hub name. Only safetensors are read, never pickles.
        scaling: None or "checkpoint": as the checkpoint says; otherwise a record or a spec (`resolve_scaling`).
        dtype: float32, bfloat16, float16, or "auto" (bfloat16 on a GPU). Frequencies stay in float32 in any case.
        device: default: the first GPU when there is one.
        attn_implementation: "auto" is what can run here and suits the architecture, see `scaled_rope.backends`.
        adapter: a LoRA adapter that is merged into the weights.
        sliding_window: replaces the configuration's attention window (tokens), for architectures that have one.
        layers, drop_layers: which layers are scaled and which lose their rotary embedding, see `resolve_plan`.
        kernel: what rotates queries and keys, see `patch_model`.

    Raises:
        ConfigError: nothing there, damaged files, weights of another architecture, an option that cannot be met.
    """
    device = resolve_device(None if device is None else str(device))
    dtype = resolve_dtype(dtype, device)
    config = load_config(name, trust_remote_code)
    attention = resolve_attention(attn_implementation, device, dtype)
    own = RopeScaling.from_config(config)
    wanted = scaling if isinstance(scaling, RopeScaling) else resolve_scaling(scaling or "checkpoint", own)
    if wanted.changes_attention:
        check_carrier(wanted.method, attn_implementation)
    plan = resolve_plan(config, layers, drop_layers)
    text = config.get_text_config()
    if CUSTOM_ROPE_TYPE in str(rope := getattr(text, "rope_parameters", None)):
        # transformers refuses to build what it does not know: build it unscaled, `apply_scaling` does the rest.
        text.rope_parameters = _unscaled(rope)
        if hasattr(text, RECORD_KEY):
            delattr(text, RECORD_KEY)
    if sliding_window is not None:
        if not hasattr(config, "sliding_window"):
            raise ConfigError(f"model_type {config.model_type!r} has no sliding window; leave sliding_window out")
        config.sliding_window = sliding_window
    if attn_implementation == "auto":
        attention = attention_for(config, attention, device)
    else:
        check_attention(config, attention, device, dtype)
    options: dict[str, Any] = {"attn_implementation": attention}
    if load_in_8bit or load_in_4bit:
        options["quantization_config"] = _quantization(8 if load_in_8bit else 4, dtype)
        options["device_map"] = {"": device}
    with _reading("model", name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    # transformers only logs these, and fills what is missing with random numbers.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise ConfigError(
                f"model {name!r} does not fit {type(model).__name__}: {len(keys)} {kind.replace('_', ' ')}, "
                f"for example {keys[0]}"
            )
    if adapter is not None:
        model = _merge_adapter(model, adapter)
    if "device_map" not in options:
        model = model.to(device)
    apply_scaling(model, wanted, plan, kernel)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class ModelJob:
    """One checkpoint read under one scaling."""

    model: str
    """Directory or hub name, as given."""
    spec: str
    scaling: RopeScaling
    carried: bool
    """Whether the scaling is the checkpoint's own."""
    head_dim: int
    dtype: str
    fingerprint: str
    """Hash of the weights and of everything but scaling and dtype that changes what the model computes."""
    plan: LayerPlan = LayerPlan()
    """What differs between layers."""
    choice: str = ""
    """The layers that were chosen by flags, in words."""

    @property
    def label(self) -> str:
        """The scaling in a few words: "unscaled", "yarn x8", "yarn x8 (checkpoint)" for a model's own."""
        own = self.spec.partition(":")[0] == "checkpoint" and self.scaling.method != "default"
        label = f"{self.scaling.label} (checkpoint)" if own else self.scaling.label
        return f"{label}, {self.choice}" if self.choice else label

    @property
    def name(self) -> str:
        """The model and its scaling: "tiny-llama-256, yarn x8"."""
        return f"{display_name(self.model)}, {self.label}"

    def fields(self) -> dict[str, Any]:
        """What a result row says about model and scaling."""
        return {
            "model": portable_model(self.model),
            "model_fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "scaling": self.scaling.to_dict(),
            "label": self.label,
            "carried": self.carried,
        }


def display_name(model: str) -> str:
    """The directory name of a checkpoint; training runs keep theirs in RUN/model, so RUN is more telling there."""
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


# A checkpoint is too large to hash whole and too regular to hash by its header: retraining changes neither names nor
# sizes, but it does change every weight. So each file is sampled.
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def _sample_hash(path: Path) -> str:
    """A hash of a file's size, beginning and evenly spaced pieces (all of it up to 4 MiB)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for index in range(_SAMPLES):
            file.seek(index * max(_SAMPLE_BYTES, size // _SAMPLES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def weights_hash(folder: str | Path) -> str:
    """A short hash of the weights, packed tokens and JSON files in a local folder."""
    paths = sorted(path for pattern in ("*.safetensors", "*.bin", "*.json") for path in Path(folder).glob(pattern))
    files = [(path.name, _sample_hash(path)) for path in paths]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _fingerprint(args: argparse.Namespace, name: str, config: Any) -> str:
    # The hub's commit says what a hub name meant at this moment.
    weights = weights_hash(name) if Path(name).is_dir() else [name, getattr(config, "_commit_hash", None)]
    adapter = weights_hash(args.adapter) if args.adapter else None
    options = [args.sliding_window_attention, args.load_in_8bit, args.load_in_4bit]
    if args.layers is not None or args.drop_layers is not None:
        options += [args.layers, args.drop_layers]
    return hashlib.sha256(json.dumps([weights, adapter, options]).encode()).hexdigest()[:16]


def _specs(args: argparse.Namespace) -> list[str]:
    """The scalings that the flags ask for, with `--factor`, `--finetuned` and parameters written into them."""
    specs = []
    unused = {name for name in PARAMETERS if getattr(args, name) is not None}
    for spec in args.scaling or ["checkpoint"]:
        head, comma, fields = spec.partition(",")
        if ":" not in head and head not in ("default", "none"):
            if args.factor is not None:
                head = f"{head}:{args.factor}"
            elif args.finetuned and head.startswith("dynamic-"):
                head = f"{head}:checkpoint"
        given = [field.partition("=")[0] for field in fields.split(",")]
        row = METHODS.get(head.partition(":")[0])
        for name in (f.name for f in dataclasses.fields(row.params_type)) if row and row.params_type else ():
            if name in PARAMETERS and name not in given and getattr(args, name) is not None:
                comma, fields = ",", ",".join(filter(None, [fields, f"{name}={getattr(args, name)}"]))
                unused.discard(name)
        specs.append(head + comma + fields)
    if unused:
        raise ConfigError(f"flag --{min(unused)}: is for a scaling that takes {min(unused)}, none of these does")
    return list(dict.fromkeys(specs))


def model_jobs(args: argparse.Namespace) -> list[ModelJob]:
    """Every model under every scaling that the flags name, checked as far as possible without reading weights.

    Raises:
        ConfigError: a model, scaling, device, dtype or adapter that cannot be used.
    """
    for flag in args.no_effect or ():
        print(f"note: {flag} has no effect: {NO_EFFECT[flag]}", file=sys.stderr)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    resolve_attention(args.attention, device, dtype)
    resolve_kernel(args.kernel)
    check_model_arguments(args)
    jobs = []
    for name in args.model or [str(DEFAULT_MODEL)]:
        config = load_config(name)
        own = base = RopeScaling.from_config(config)
        if args.original_max_position_embeddings is not None:
            base = replace(own, original_max_position_embeddings=args.original_max_position_embeddings)
        fingerprint, head_dim = _fingerprint(args, name, config), head_dim_of(config.get_text_config())
        plan = resolve_plan(config, args.layers, args.drop_layers)
        choice = [f"{args.layers} layers only"] if args.layers is not None else []
        choice += [f"without RoPE in {','.join(map(str, args.drop_layers))}"] if args.drop_layers else []
        for spec in _specs(args):
            scaling = resolve_scaling(spec, base)
            if scaling.changes_attention:
                check_carrier(scaling.method, args.attention)
            carried = scaling == own
            words = ", ".join(choice)
            jobs.append(ModelJob(name, spec, scaling, carried, head_dim, dtype, fingerprint, plan, words))
    return jobs


class ModelLoader:
    """Gives out models under the scalings of jobs; consecutive jobs on one checkpoint load it once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = resolve_device(args.device)
        self._args = args
        self._name: str | None = None
        self._model: Any = None

    def __call__(self, job: ModelJob) -> Any:
        """The job's model, on the device, in eval mode, computing with the job's scaling."""
        if job.model != self._name:
            self._name, self._model = None, None  # free the memory before the next one is read
            self._model = load_model(
                job.model,
                dtype=job.dtype,
                device=self.device,
                attn_implementation=self._args.attention,
                adapter=self._args.adapter,
                sliding_window=self._args.sliding_window_attention,
                load_in_8bit=self._args.load_in_8bit,
                load_in_4bit=self._args.load_in_4bit,
                kernel=self._args.kernel,
            )
            self._name = job.model
        apply_scaling(self._model, job.scaling, job.plan, self._args.kernel)
        return self._model
