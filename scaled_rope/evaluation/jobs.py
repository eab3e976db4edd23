"""Jobs: the models and scalings that flags ask for; and the loader that carries them out."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from scaled_rope.attention.backends import resolve_attention
from scaled_rope.checkpoint import DEFAULT_MODEL, Checkpoint, display_name, open_checkpoint, weights_hash
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.failures import Failure, failing_alone, raise_if_same
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.served_model import ServedModel
from scaled_rope.flags.evaluators import NO_EFFECT, check_model_arguments, requested_specs
from scaled_rope.patching.adapter_scaling import adapter_scaling
from scaled_rope.patching.device_maps import Placement, computing_devices
from scaled_rope.patching.loading import apply_scaling, load_model, resolve_device, resolve_dtype, resolve_plan
from scaled_rope.patching.region_attention import check_carrier
from scaled_rope.patching.rotary_kernel import resolve_kernel
from scaled_rope.provenance import portable_model
from scaled_rope.scaling.record import LayerPlan, RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.scaling.spec import Spec

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
    """The differences between layers."""
    choice: str = ""
    """The layers that flags choose, as text; "" for all."""
    checkpoint: Checkpoint | None = field(default=None, compare=False, repr=False)
    """The checkpoint with its config; None: the config is read when the model is loaded."""
    server: ServedModel | None = field(default=None, compare=False, repr=False)
    """The server that is asked instead; None: the model is loaded."""

    @property
    def as_saved(self) -> RopeScaling | None:
        """The scaling that the config itself says, without corrections by flags; None where it has not been read."""
        return None if self.checkpoint is None else self.checkpoint.settings.scaling

    @property
    def made_for(self) -> int | None:
        """The length in tokens that the model is for under the scaling; None when L is not known."""
        if self.checkpoint is None:
            return self.scaling.max_position_embeddings
        return self.checkpoint.settings.length_for(self.scaling)

    @property
    def label(self) -> str:
        """The scaling in a few words: "unscaled", "yarn x8", "yarn x8 (checkpoint)" for a model's own."""
        own = Spec.parse(self.spec).method == "checkpoint" and self.scaling.method != "default"
        label = f"{self.scaling.label} (checkpoint)" if own else self.scaling.label
        return f"{label}, {self.choice}" if self.choice else label

    @property
    def name(self) -> str:
        """The model and its scaling: "tiny-llama-256, yarn x8"."""
        return f"{display_name(self.model)}, {self.label}"

    def fields(self) -> dict[str, Any]:
        """The fields of a result row that describe model and scaling."""
        return {
            "model": portable_model(self.model),
            "model_fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "scaling": self.scaling.to_dict(),
            "label": self.label,
            "carried": self.carried,
            **({} if self.server is None else {"server": self.server.facts()}),
        }


def _fingerprint(args: argparse.Namespace, name: str, config: Any) -> str:
    # A hub name can change its content; the hub's commit identifies it.
    weights = weights_hash(name) if Path(name).is_dir() else [name, getattr(config, "_commit_hash", None)]
    adapter = weights_hash(args.adapter) if args.adapter else None
    options = [args.sliding_window_attention, args.load_in_8bit, args.load_in_4bit]
    if args.layers is not None or args.drop_layers is not None:
        options += [args.layers, args.drop_layers]
    return _hash([weights, adapter, options])


def fingerprint_of(folder: str | Path) -> str:
    """The `model_fingerprint` of rows about a checkpoint that is read as it is, in its own precision."""
    return _hash([weights_hash(folder), None, [None, False, False]])


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def model_jobs(args: argparse.Namespace, failures: list[Failure] | None = None) -> list[ModelJob]:
    """Make a job of every model under every scaling that the flags name; checked as far as possible without weights.

    failures: when given, a model that cannot be read, or not under one of the scalings, is added to it and left out.

    Raises:
        ConfigError: a device, dtype or adapter that cannot be used; a model or scaling that cannot be used, unless
            others can and there are `failures` for it.
    """
    for flag in args.no_effect or ():
        print(f"note: {flag} has no effect: {NO_EFFECT[flag]}", file=sys.stderr)
    placement_of(args)
    device = resolve_device(current().device(args.device))
    dtype = resolve_dtype(args.dtype, device)
    resolve_attention(args.attention, device, dtype)
    resolve_kernel(args.kernel)
    check_model_arguments(args)
    if getattr(args, "server", None) is not None:
        return [_served_job(args)]
    jobs: list[ModelJob] = []
    for name in args.model or [str(DEFAULT_MODEL)]:
        with failing_alone(failures, display_name(name)):
            checkpoint = open_checkpoint(name)
            fingerprint = _fingerprint(args, name, checkpoint.config)
            for spec in requested_specs(args):
                with failing_alone(failures, f"{display_name(name)}, {spec}"):
                    jobs.append(_job(args, name, spec, checkpoint, fingerprint, dtype))
    if failures and not jobs:
        raise_if_same(failures)
    return jobs


def _served_job(args: argparse.Namespace) -> ModelJob:
    """The job of a model that a server has loaded; its config says under which scaling.

    Raises:
        ConfigError: no such server or model, or no config; several processes, which would ask the same server.
    """
    if (count := current().count) > 1:
        raise ConfigError(f"--server {args.server} is for one process, not {count}; it gets many requests at once")
    (name,) = args.model
    checkpoint = open_checkpoint(name)
    server = ServedModel.connect(args.server, args.served_name, args.server_timeout or 600.0)
    (spec,) = requested_specs(args)
    job = _job(args, name, spec, checkpoint, server.fingerprint(), "served")
    return replace(job, choice=f"served by {server.title}", server=server)


def _job(
    args: argparse.Namespace, name: str, spec: str, checkpoint: Checkpoint, fingerprint: str, dtype: str
) -> ModelJob:
    """One model under one scaling.

    Raises:
        ConfigError: they don't fit together.
    """
    trained = adapter_scaling(args.adapter) if args.adapter else None
    own, present = (checkpoint.settings.scaling, None) if trained is None else trained
    base = own
    if args.original_max_position_embeddings is not None:
        base = replace(own, original_max_position_embeddings=args.original_max_position_embeddings)
    scaling = resolve_scaling(spec, base)
    if trained is not None and scaling != own:
        print(f"note: {args.adapter} was trained under {own.label}, and is read under {scaling.label}", file=sys.stderr)
    elif trained is not None and not args.scaling:
        print(f"note: {args.adapter} was trained under {own.label}, which is used", file=sys.stderr)
    plan = resolve_plan(checkpoint.settings, args.layers, args.drop_layers, present)
    choice = [f"{args.layers} layers only"] if args.layers is not None else []
    choice += [f"without RoPE in {','.join(map(str, args.drop_layers))}"] if args.drop_layers else []
    if scaling.changes_attention:
        check_carrier(scaling.method, args.attention)
    head_dim, words = checkpoint.settings.head_dim, ", ".join(choice)
    return ModelJob(name, spec, scaling, scaling == own, head_dim, dtype, fingerprint, plan, words, checkpoint)


def placement_of(args: argparse.Namespace) -> Placement | None:
    """How the flags split models over devices.

    Raises:
        ConfigError: values that are not allowed, or not together with others.
    """
    placement = Placement.parse(args.device_map, args.max_memory, args.offload_folder)
    if placement is None:
        return None
    if args.device is not None:
        raise ConfigError(f"--device {args.device} is not allowed with --device-map, which chooses; leave it out")
    if (count := current().count) > 1:
        raise ConfigError(f"--device-map {args.device_map} is for one process, not {count}: they would share the GPUs")
    return placement


class ModelLoader:
    """Loads the models of jobs and sets their scalings; consecutive jobs on one checkpoint load it once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = resolve_device(current().device(args.device))
        self._args = args
        self._name: str | None = None
        self._model: Any = None

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices on which the model that is loaded computes, several where it is split; `device` where none is."""
        return (self.device,) if self._model is None else computing_devices(self._model)

    def __call__(self, job: ModelJob) -> Any:
        """Return the job's model, on the device, in eval mode, computing with the job's scaling; or its server."""
        if job.server is not None:
            return job.server
        if job.model != self._name:
            self._name, self._model = None, None  # free the memory before the next one is read
            self._model = load_model(
                job.checkpoint or job.model,
                dtype=job.dtype,
                device=self.device,
                attn_implementation=self._args.attention,
                adapter=self._args.adapter,
                sliding_window=self._args.sliding_window_attention,
                load_in_8bit=self._args.load_in_8bit,
                load_in_4bit=self._args.load_in_4bit,
                kernel=self._args.kernel,
                placement=placement_of(self._args),
            )
            self._name = job.model
        apply_scaling(self._model, job.scaling, job.plan, self._args.kernel)
        return self._model
