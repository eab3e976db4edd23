"""Load the weights of a checkpoint, and give the model its scaling, attention implementation and adapter.

All that can be refused by the config alone is refused before any weights are read. Configs and tokenizers are read in
`scaled_rope.checkpoint`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from scaled_rope.attention.backends import attention_for, check_attention, resolve_attention, set_window
from scaled_rope.checkpoint import Checkpoint, open_checkpoint, reading, without_custom_rope
from scaled_rope.errors import ConfigError, first_line, shortened, unknown
from scaled_rope.patching.adapter_scaling import adapter_scaling
from scaled_rope.patching.device_maps import Placement, is_offloaded
from scaled_rope.patching.families import ADAPTERS
from scaled_rope.patching.patch import (
    computes,
    lost_part,
    patch_as_read,
    patched_kernel,
    patched_plan,
    patched_scaling,
    settings_without_patch,
    unpatch_model,
)
from scaled_rope.patching.patch_request import layer_indices
from scaled_rope.patching.region_attention import check_carrier
from scaled_rope.patching.rotary_kernel import resolve_kernel
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, PRIMARY_LAYER_TYPE, RECORD_KEY, text_config
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings
from scaled_rope.scaling.resolve import resolve_scaling, with_primary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


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
        raise ConfigError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """The full name of a dtype; "auto" is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    name = DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise unknown("dtype", name, ["auto", *DTYPES])
    return name


def apply_scaling(
    model: nn.Module,
    scaling: RopeScaling,
    plan: LayerPlan | None = None,
    kernel: str | None = None,
    settings: RopeSettings | None = None,
) -> None:
    """Make a model compute with `scaling`, whatever it computed with before.

    plan: differences between layers; the primary layer type gets `scaling` instead. By default, the present ones.
    kernel: the implementation that rotates queries and keys, see `patch_model`; by default the present one, or "auto".
    settings: the RoPE settings in the config of an unpatched model, if they have been read already.

    A model whose config has this scaling and that computes it is left untouched, so an architecture that is not
    understood can be read unscaled. The exception is a kernel: it is installed if it is asked for by name, or if "auto"
    selects it for a family in `ADAPTERS`.

    Raises:
        ConfigError: as `patch_model`, and a scaling in the config of a model that has no rotary module for it.
    """
    if kernel is None:
        kernel = patched_kernel(model) or "auto"
    current = patched_plan(model)
    plan = current if plan is None else plan
    layers = with_primary(plan.layers, scaling)
    backend = resolve_kernel(kernel)
    if patched_scaling(model) == scaling and current == LayerPlan(layers, plan.drop_layers):
        if (kernel == "auto" or patched_kernel(model) == backend) and not lost_part(model):
            return
    if patched_scaling(model) is not None:
        settings = settings_without_patch(model)
        unpatch_model(model)
    config: Any = model.config
    settings = settings or RopeSettings(config)
    wants_kernel = backend is not None and (kernel != "auto" or settings.model_type in ADAPTERS)
    if (
        layers
        or plan.drop_layers
        or settings.scaling != scaling
        or not computes(model, scaling, settings)
        or wants_kernel
    ):
        patch_as_read(model, settings, layers or scaling, plan.drop_layers, kernel)


def resolve_plan(
    settings: RopeSettings,
    layers: str | None = None,
    drop_layers: Sequence[int] | None = None,
    plan: LayerPlan | None = None,
) -> LayerPlan:
    """Return the wanted differences between the layers of a model.

    Args:
        settings: the RoPE settings in its config.
        layers: the only layer type that a scaling is for; None: as the checkpoint says, or else all layers.
        drop_layers: indices of layers without rotary embedding; None: as the checkpoint says.
        plan: the present differences; by default those in the config.

    Raises:
        ConfigError: a layer type that cannot be chosen, or an index that no layer has.
    """
    plan = settings.plan if plan is None else plan
    if layers is not None:
        types = settings.layer_types
        if PRIMARY_LAYER_TYPE not in types or len(types) < 2:
            raise ConfigError(
                f"layers={layers!r}: must be left out, the layers of this {settings.model_type} model are of one type"
            )
        if layers != PRIMARY_LAYER_TYPE:
            raise ConfigError(
                f"layers={layers!r}: must be {PRIMARY_LAYER_TYPE!r}, others see no more than their window"
            )
        if not plan.layers:
            plan = replace(plan, layers=dict.fromkeys(types, settings.scaling))
    if drop_layers is not None:
        plan = replace(plan, drop_layers=layer_indices(drop_layers, settings.num_hidden_layers))
    return plan


def _quantization(bits: int, dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"loading in {bits} bits needs: pip install 'scaled-rope[qlora]'")
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


@contextmanager
def former_names() -> Iterator[None]:
    """Silence a warning during calls of PEFT: its version 0.21 uses an attribute that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def merge_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """The model with a LoRA adapter merged into its weights.

    Raises:
        ConfigError: no PEFT, no such adapter, or one whose weights aren't those that its config asks for in this model.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("an adapter needs peft: pip install 'scaled-rope[train]'") from error
    with reading("adapter", adapter), former_names():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # refused below
            wrapped: Any = peft.PeftModel.from_pretrained(model, adapter)
        _check_complete(wrapped, adapter)
        merged: nn.Module = wrapped.merge_and_unload()
    return merged


def _check_complete(wrapped: Any, adapter: str) -> None:
    """Raise a ConfigError that names the weights of an adapter that it lacks for this model, and those that no module
    takes. PEFT leaves the former at values that change nothing, and the latter out; modules that are saved whole it
    misses by itself."""
    import peft

    mapping = getattr(wrapped.get_base_model(), "_checkpoint_conversion_mapping", {})  # as PEFT reads it
    weights = peft.utils.load_peft_weights(adapter, device="cpu", key_mapping=mapping)
    result = peft.set_peft_model_state_dict(wrapped, weights, adapter_name="default")
    prefix = getattr(wrapped.base_model, "prefix", "lora_")
    missing = [name for name in result.missing_keys if prefix in name and "default" in name.split(".")]
    said = [("it holds no", missing), ("no module takes its", result.unexpected_keys)]
    if found := [f"{what} {_listed(names)}" for what, names in said if names]:
        kind = type(wrapped.get_base_model()).__name__
        raise ConfigError(f"adapter {adapter!r} does not fit this {kind}: {'; '.join(found)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@torch.no_grad()
def check_finite(model: nn.Module, what: str) -> None:
    """Raise a ConfigError that names the weights that are not finite; results of such a model mean nothing.

    Weights that are not in memory, and those that are quantised, are not looked at.
    """
    bad = []
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and weight.numel():
            low, high = torch.aminmax(weight)  # NaN is the result of both where one is there
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(f"{name} ({int((~torch.isfinite(weight)).sum())} of {weight.numel()})")
    if bad:
        raise ConfigError(f"{what} has weights that are NaN or infinite: {_listed(bad)}")


def load_model(
    name: str | os.PathLike[str] | Checkpoint,
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
    placement: Placement | None = None,
) -> Any:
    """Load a causal language model for inference, with a scaling installed; also one saved after `patch_model`.

    Args:
        name: directory or hub name, or a checkpoint whose config has been read. Only safetensors are read, never
            pickles.
        scaling: None or "checkpoint": as the checkpoint says, or in its place the adapter (`adapter_scaling`);
            otherwise a record or a spec (`resolve_scaling`).
        dtype: float32, bfloat16, float16, or "auto" (bfloat16 on a GPU). Frequencies stay in float32 in any case.
        device: default: the first GPU when there is one.
        attn_implementation: "auto" chooses one that can run here and suits the architecture (`attention.backends`).
        adapter: a LoRA adapter that is merged into the weights.
        sliding_window: replaces the configuration's attention window (tokens), for models of which a layer has one.
        layers, drop_layers: which layers are scaled and which lose their rotary embedding, see `resolve_plan`.
        kernel: the implementation that rotates queries and keys, see `patch_model`.
        placement: how the model is split over devices, instead of `device`; None: it is not.

    Raises:
        ConfigError: no such checkpoint, damaged files, weights of another architecture, an option that cannot be met.
    """
    if not isinstance(scaling, RopeScaling | str | None):
        raise ConfigError(
            f"scaling={shortened(repr(scaling), 80)}: must be a RopeScaling or a text such as 'yarn:8'; patch_model"
            f" takes one for each layer type"
        )
    if load_in_8bit and load_in_4bit:
        raise ConfigError("load_in_8bit with load_in_4bit is not allowed; one of them")
    device = resolve_device(None if device is None else str(device))
    dtype = resolve_dtype(dtype, device)
    checkpoint = name if isinstance(name, Checkpoint) else open_checkpoint(name, trust_remote_code)
    attention = resolve_attention(attn_implementation, device, dtype)
    settings = checkpoint.settings
    trained = None if adapter is None else adapter_scaling(adapter)
    own, present = (settings.scaling, None) if trained is None else trained
    wanted = scaling if isinstance(scaling, RopeScaling) else resolve_scaling(scaling or "checkpoint", own)
    if wanted.changes_attention:
        check_carrier(wanted.method, attn_implementation)
    plan = resolve_plan(settings, layers, drop_layers, present)
    config = copy.deepcopy(checkpoint.config)
    if build_unscaled(config):
        settings = RopeSettings(config)
    if sliding_window is not None:
        set_window(text_config(config), sliding_window)
    if attn_implementation == "auto":
        attention = attention_for(config, attention, device)
    else:
        check_attention(config, attention, device, dtype)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    if load_in_8bit or load_in_4bit:
        options["quantization_config"] = _quantization(8 if load_in_8bit else 4, dtype)
        options["device_map"] = {"": device}
    if placement is not None:
        options |= placement.options()
    model = _read_weights(checkpoint.name, config, trust_remote_code=trust_remote_code, **options)
    check_finite(model, f"model {checkpoint.name!r}")
    if adapter is not None and is_offloaded(model):
        raise ConfigError(f"adapter {adapter!r} cannot be merged into weights that are offloaded; merge it first")
    if adapter is not None:
        model = merge_adapter(model, adapter)
        check_finite(model, f"adapter {adapter!r} in model {checkpoint.name!r}")
    if "device_map" not in options:
        model = model.to(device)
    apply_scaling(model, wanted, plan, kernel, settings)
    return model.eval()


def stored_tensors(name: str) -> dict[str, Path]:
    """Name of each tensor of a checkpoint -> its safetensors file; a hub checkpoint must be in the cache already.

    Raises:
        ConfigError: a file that is damaged.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", local_files_only=True)
        folder = Path(str(found)).parent
    stored: dict[str, Path] = {}
    with reading("model", name):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                stored |= dict.fromkeys(file.keys(), path)
    return stored


def check_tied(checkpoint: Checkpoint) -> None:
    """Raise an error for a checkpoint that says its embeddings are tied, and stores two that differ.

    transformers unties them on one process, and under ZeRO-3, where it compares shards that are empty, it does not: so
    the same run would train two different models.

    Raises:
        ConfigError: as above.
    """
    if not getattr(checkpoint.config, "tie_word_embeddings", False):
        return
    from safetensors import safe_open

    stored = stored_tensors(checkpoint.name)

    def read(key: str) -> torch.Tensor:
        with safe_open(str(stored[key]), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    heads = [key for key in stored if key.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"])]
    inputs = [key for key in stored if key.split(".")[-2:] in (["embed_tokens", "weight"], ["embed_in", "weight"])]
    for head in heads:
        if inputs and not any(torch.equal(read(head), read(key)) for key in inputs):
            raise ConfigError(
                f"model {checkpoint.name!r} says tie_word_embeddings and stores {head} with other values than"
                f" {inputs[0]}; set tie_word_embeddings to false in its config.json to train both, or remove {head}"
            )


_WITHOUT_DEFAULT = ("mistral4",)
"""Families of which transformers 5.24 makes tables for the whole head under rope_type "default", which do not fit."""


def build_unscaled(config: Any) -> bool:
    """If a config's rope_type is ours, change it to that of the unscaled model; return whether it was ours.

    transformers refuses to build a rope_type that it does not know; `apply_scaling` installs the scaling later.
    """
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None)
    if CUSTOM_ROPE_TYPE not in str(rope):
        return False
    text.rope_parameters = without_custom_rope(rope)
    if text.model_type in _WITHOUT_DEFAULT and text.rope_parameters.get("rope_type") == "default":
        text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": 1.0}
    if hasattr(text, RECORD_KEY):
        delattr(text, RECORD_KEY)
    return True


def auto_class(config: Any) -> Any:
    """The class of transformers that builds the model of a config: of those for text, or for images and text, the one
    that knows the architecture that the config names, or else the config's class."""
    kinds = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    known = {kind: _class_names(kind, config) for kind in kinds}
    named = [kind for kind in kinds if known[kind] & set(config.architectures or ())]
    # Some parts of multimodal models are models of text that no automatic class knows (Emu 3's).
    by_name = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    fitting = [each for each in by_name if getattr(each, "config_class", None) is type(config)]
    return next(iter([*named, *(kind for kind in kinds if known[kind]), *fitting]), kinds[0])


def _class_names(kind: Any, config: Any) -> set[str]:
    """The names of the models that one of transformers' automatic classes builds from configs of a class."""
    if type(config) not in kind._model_mapping:
        return set()
    found = kind._model_mapping[type(config)]
    return {each.__name__ for each in (found if isinstance(found, tuple | list) else [found])}


def _check_index(name: str) -> None:
    """Raise ConfigError for a folder whose list of weights is empty: transformers fails on it without saying why."""
    file = Path(name) / "model.safetensors.index.json"
    if (Path(name) / "model.safetensors").exists():  # which is read, and no list
        return
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError):  # there is none, or transformers says what is wrong with it
        return
    if isinstance(index, dict) and index.get("weight_map") == {}:
        raise ConfigError(f"model {name!r} cannot be read: weight_map of {file.name} is empty")


def _generates(name: str) -> bool:
    """Whether a class of transformers, by its name, is one for text generation; one that is not known may be."""
    found = getattr(transformers, name, None)
    return found is None or bool(found.can_generate())


def _read_weights(name: str, config: Any, **options: Any) -> Any:
    """Build the model of a checkpoint with all of its weights.

    Raises:
        ConfigError: damaged files; weights that are missing, too many or of another shape.
    """
    _check_index(name)
    named = [str(each) for each in config.architectures or ()]  # before transformers names the class that it builds
    with reading("model", name):
        model, info = auto_class(config).from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    # transformers only logs these, and fills what is missing with random numbers.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            if named and type(model).__name__ not in named and not _generates(named[0]):
                raise ConfigError(
                    f"model {name!r} is a {named[0]}, and load_model reads models for text generation; use "
                    f"{named[0]}.from_pretrained(), under a scaling that transformers does not know as docs/models.md "
                    "shows"
                )
            raise ConfigError(
                f"model {name!r} does not fit {type(model).__name__}: {len(keys)} {kind.replace('_', ' ')}, "
                f"for example {keys[0]}"
            )
    return model
