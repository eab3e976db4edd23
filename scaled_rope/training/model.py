"""Build the model that is trained, install its scaling, wrap it with its loss, and save it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scaled_rope.attention.backends import attention_dropout, attention_for, set_window
from scaled_rope.checkpoint import first_line, load_tokenizer, open_checkpoint
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.patching.adapter_scaling import save_adapter_scaling
from scaled_rope.patching.families import head_dim_of
from scaled_rope.patching.loading import check_tied, former_names, load_model, merge_adapter, resolve_plan
from scaled_rope.patching.loss import token_nll
from scaled_rope.patching.output_head import decoder_of
from scaled_rope.patching.patch import PatchReport, patch_as_read, patched_plan
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.dialects import write_both_dialects
from scaled_rope.scaling.record import RopeScaling, RopeSettings, with_primary
from scaled_rope.scaling.switching import original_up_to_l
from scaled_rope.training.kept_attention import KeptAttention
from scaled_rope.training.long_ce import gain_weights


class SummedLoss(nn.Module):
    """A model together with its loss, so that engines which wrap `forward` wrap both.

    Args:
        model: a causal language model, plain or with adapters.
        offload: keep tensors for the backward pass, such as the inputs of checkpointed layers, in CPU memory.
        loss: a result of `resolve_loss`.
    """

    def __init__(self, model: Any, offload: bool = False, loss: str = "chunked") -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed sizes its buckets by it, Ulysses its heads
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # FSDP wraps these
        self._offload, self._loss = offload, loss
        self.unweighted = torch.zeros(())
        """The last pass's sum without LongCE's weights, in nats; 0-dimensional, without gradient."""
        first: dict[int, str] = {}
        shared = [(n, first.setdefault(id(p), n)) for n, p in model.named_parameters(remove_duplicate=False)]
        self._tied = [(name, source) for name, source in shared if name != source]
        if getattr(model, "is_loaded_in_4bit", False):
            self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_expect_trained)  # type: ignore[no-untyped-call]

    def tie_weights(self) -> None:
        """Share parameters again that were shared at the beginning.

        For FSDP accelerate replaces each parameter by itself, and then calls this. A model's own `tie_weights` fails
        where adapters train its embeddings.
        """
        for name, source in self._tied:
            place, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(place), leaf, self.model.get_parameter(source))

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        separate: bool = False,
        reduce: bool = True,
        near: torch.Tensor | None = None,
        cap: float = 1.0,
    ) -> torch.Tensor:
        """The weighted sum of the negative log-likelihoods, in nats; without `reduce` each of them, [B, T].

        near: those of the last N after nearby tokens alone, [B, N], for LongCE: weights are multiplied by
            `gain_weights`, whose `cap` is given too.
        """
        with offloaded_activations() if self._offload else contextlib.nullcontext():
            nll = token_nll(self.model, input_ids, targets, position_ids, separate=separate, loss=self._loss)
            if not reduce:
                return nll
            self.unweighted = (nll.detach() * weights).sum()
            return (nll * (weights if near is None else weights * gain_weights(nll.detach(), near, cap))).sum()


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave quantised weights, which do not change, out of a state, and with them what their quantisation needs."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]


def _expect_trained(module: nn.Module, incompatible: Any) -> None:
    """Say of no frozen weight that a state lacks it."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name in trained]


@contextlib.contextmanager
def offloaded_activations() -> Iterator[None]:
    """Within this context, tensors that autograd saves, except weights, stay in CPU memory until they are needed.

    On a GPU they are copied on a stream of their own, both ways, while the model goes on computing. The backward pass
    asks for them in the reverse order, so with each one the one before it sets out.
    """
    kept: list[weakref.ref[_Offloaded]] = []

    def pack(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or not _is_on_accelerator(tensor):
            return tensor
        offloaded = _Offloaded(tensor, len(kept))
        kept.append(weakref.ref(offloaded))
        return offloaded

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        offloaded: _Offloaded = packed
        found = offloaded.back()
        before = kept[offloaded.index - 1]() if offloaded.index else None
        if before is not None:
            before.set_out()
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Offloaded:
    """A tensor in CPU memory, and its copy on the way back."""

    def __init__(self, tensor: torch.Tensor, index: int) -> None:
        self.device, self.index = tensor.device, index
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self.coming: torch.Tensor | None = None
        with _copying(self.device) as stream:
            self.host.copy_(tensor, non_blocking=True)
            if stream is not None:
                tensor.record_stream(stream)  # its memory must not be used again before the copy is made

    def set_out(self) -> None:
        """Begin to copy it back, unless that has begun."""
        if self.coming is None:
            with _copying(self.device):
                self.coming = self.host.to(self.device, non_blocking=True)

    def back(self) -> torch.Tensor:
        """The tensor on its device, for whatever comes next on the current stream."""
        self.set_out()
        found, self.coming = self.coming, None
        assert found is not None
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(_copy_stream(self.device))
            found.record_stream(current)
        return found


@contextlib.contextmanager
def _copying(device: torch.device) -> Iterator[Any]:
    """Make copies on a stream of their own, behind what is queued so far; yields the stream, None without a GPU."""
    if device.type != "cuda":
        yield None
        return
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _is_on_accelerator(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


# ------------------------------------------------------------------------------------------------------- the model


def build_model(
    recipe: Recipe, attention: str = "sdpa", device: torch.device | None = None
) -> tuple[Any, PatchReport | None]:
    """Build the recipe's model with its scaling installed, to run with `attention`.

    It is in float32 on the CPU. With `quantization` it is on `device`, its matrices in 4 bits and what else is frozen
    in the dtype of `precision`.

    Raises:
        ConfigError: an `init` that is no model, and what `load_model`, `check_tied` and `patch_model` raise.
    """
    torch.manual_seed(recipe.seed)
    settings = None
    if recipe.init is not None:
        from transformers import AutoModelForCausalLM

        with building(recipe):
            config = init_config(recipe)
            attention = attention_for(config, attention)
            with torch.device("meta"):  # a mistake is found before memory is taken
                AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            torch.manual_seed(recipe.seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    else:
        checkpoint = open_checkpoint(str(recipe.model))
        settings = checkpoint.settings
        model = load_model(
            checkpoint,
            dtype="float32" if recipe.quantization is None else recipe.compute_dtype,
            device="cpu" if recipe.quantization is None else device,
            load_in_4bit=recipe.quantization is not None,
        )
        check_tied(checkpoint)
        model.set_attn_implementation(attention_for(model.config, attention))
    report = install_scaling(model, recipe, settings)
    if recipe.lora:
        model = add_lora(model, recipe.lora_embeddings_and_norms)
        for parameter in model.parameters():
            if parameter.requires_grad:  # a small step would not change a bfloat16 weight
                parameter.data = parameter.data.float()
    model.train()
    return model, report


@contextlib.contextmanager
def building(recipe: Recipe) -> Iterator[None]:
    """Report whatever configurations and models raise about a recipe's fields as one line that names the recipe."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # architectures raise unrelated types
        what = "init" if recipe.init is not None else "model"
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__} "
        raise ConfigError(f"{what} of recipe {recipe.name!r} is no model: {kind}{first_line(error)}") from None


def init_config(recipe: Recipe) -> Any:
    """The configuration that a recipe's `init` describes; within `building`."""
    from transformers import AutoConfig

    fields = dict(recipe.init or {})
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def install_scaling(model: Any, recipe: Recipe, settings: RopeSettings | None = None) -> PatchReport | None:
    """Put the recipe's scaling and context length into a model; None where it keeps the checkpoint's own.

    settings: the RoPE settings in the checkpoint's config; None: the model's config is read.

    Raises:
        ConfigError: as `patch_model`; a `max_position_embeddings` below the original length.
    """
    report = None
    if settings is None:
        settings = RopeSettings(model.config)
        settings.warn()
    own = settings.scaling
    base = dataclasses.replace(
        own,
        rope_theta=recipe.rope_theta or own.rope_theta,
        original_max_position_embeddings=recipe.original_max_position_embeddings
        or own.original_max_position_embeddings,
    )
    plan = resolve_plan(settings, recipe.layers, recipe.drop_layers, patched_plan(model))
    scaling = base if recipe.scaling is None else RopeScaling.from_spec(recipe.scaling, base)
    wanted, original = recipe.max_position_embeddings, scaling.original_max_position_embeddings
    if wanted is not None and original is not None and wanted < original:
        raise ConfigError(
            f"max_position_embeddings = {wanted} is not allowed; at least the original length, {original}"
        )
    if recipe.scaling is not None or base != own or plan != patched_plan(model):
        if recipe.short_share:
            scaling = original_up_to_l(scaling, head_dim_of(_text(model)))
        report = patch_as_read(model, settings, with_primary(plan.layers, scaling) or scaling, plan.drop_layers)
    if wanted is not None:
        _text(model).max_position_embeddings = wanted
    return report


def _text(model: Any) -> Any:
    """The part of a model's config that describes its decoder of text."""
    return model.config.get_text_config(decoder=True)


def enable_checkpointing(model: Any, recipe: Recipe) -> None:
    """Switch gradient checkpointing on where the recipe says so.

    With `keep_attention` the first forward pass raises a ConfigError if there was nothing to keep.

    Raises:
        ConfigError: `keep_attention`, and the model has dropout of attention.
    """
    if not recipe.gradient_checkpointing:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if recipe.keep_attention:
        if dropout := attention_dropout(_text(model)):
            raise ConfigError(
                f"keep_attention true is not allowed with {dropout}: dropout in the rest of a layer would draw other"
                " numbers in the backward pass"
            )
        settings["context_fn"] = kept = KeptAttention()
        kept.check_first_pass(decoder_of(_whole(model)), model.config._attn_implementation)
    # The method was renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def _whole(model: Any) -> Any:
    """The model that adapters were added to, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_MLPS = ("mlp", "feed_forward", "ffn")
"""Names of the MLP in a decoder layer."""


def tile_mlps(model: Any, tiles: int) -> None:
    """Let each MLP work on `tiles` stretches of a sequence, one after another, and again in the backward pass.

    An MLP looks at each token by itself, so the result is the same to rounding, but its inner activations, the largest
    of a layer, are there for one stretch at a time. Each stretch is a checkpoint of torch, which the hooks of DDP, FSDP
    and ZeRO know, unlike the functions of DeepSpeed and Liger that sum gradients by themselves.

    tiles: 1 leaves the model as it is.

    Raises:
        ConfigError: a model without such MLPs, or with one that does not treat tokens alike, such as experts behind a
            router.
    """
    if tiles == 1:
        return
    layers = decoder_of(_whole(model)).layers
    found = [getattr(layer, name) for layer in layers for name in _MLPS if hasattr(layer, name)]
    if len(found) != len(layers):
        family = model.config.model_type
        raise ConfigError(f"mlp_tiles {tiles} is not possible: layers of {family} have no MLP of a known name")
    checked: set[type] = set()
    for mlp in found:
        if type(mlp) not in checked:
            with _gathered(mlp):
                _check_tokenwise(mlp, model.config, tiles)
            checked.add(type(mlp))
        mlp.forward = functools.partial(_tiled, mlp.forward, tiles)


def _tiled(forward: Callable[[torch.Tensor], torch.Tensor], tiles: int, hidden: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return torch.cat([forward(part) for part in hidden.chunk(tiles, dim=-2)], dim=-2)
    parts = [checkpoint(forward, part, use_reentrant=False) for part in hidden.chunk(tiles, dim=-2)]
    return torch.cat(parts, dim=-2)


def _gathered(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within this context, weights that ZeRO-3 has spread over ranks are whole. Every rank must enter it."""
    spread = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        return contextlib.nullcontext()
    import deepspeed

    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(spread)
    return context


@torch.no_grad()
def _check_tokenwise(mlp: Any, config: Any, tiles: int) -> None:
    """Raise a ConfigError unless the output for some tokens is that for these tokens alone."""
    weight = next(mlp.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 6, config.get_text_config().hidden_size, generator=generator, device="cpu")
    hidden = hidden.to(weight.device, weight.dtype)
    try:
        whole, part = mlp(hidden), mlp(hidden[:, 4:])
        alike = isinstance(whole, torch.Tensor) and whole.shape == hidden.shape
        # While planning, tensors have shapes and no values.
        if alike and type(whole) is torch.Tensor and not whole.is_meta:
            alike = torch.allclose(whole[:, 4:], part, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    except (TypeError, ValueError, RuntimeError):
        alike = False
    if not alike:
        name = type(mlp).__name__
        raise ConfigError(f"mlp_tiles {tiles} is not possible: {name} does not treat each token by itself")


def add_lora(model: Any, embeddings_and_norms: bool = False) -> Any:
    """Add low-rank adapters with the released settings: r=16, alpha=64, dropout 0.05, all linear layers but the head.

    embeddings_and_norms: also train input embeddings, output projection and norms in full.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("lora needs peft: pip install 'scaled-rope[train]'") from None
    full: list[str] | None = None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if embeddings_and_norms:
        head = () if tied else (model.get_output_embeddings(),)
        whole = {id(module) for module in (model.get_input_embeddings(), *head)}
        names = [
            name for name, module in model.named_modules()
            if id(module) in whole or type(module).__name__.endswith("Norm")
        ]  # fmt: skip
        full = sorted({name.rpartition(".")[2] for name in names})
    settings = LoraConfig(
        r=16, lora_alpha=64, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM",
        modules_to_save=full, ensure_weight_tying=embeddings_and_norms and tied,
    )  # fmt: skip
    try:
        with former_names():
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"lora is not possible for {model.config.model_type} models; PEFT says: {first_line(error)}"
        ) from None
    adapted.enable_input_require_grads()  # checkpointed layers need an input with a gradient
    return adapted


def adapted_share_note(model: Any) -> str:
    """A line that says which matrices of a model's layers have no adapter, if those are a tenth or more; else "".

    Experts that one tensor holds together are no linear layers, and get none.
    """
    base = decoder_of(model.get_base_model())
    sizes, bare = 0, Counter[str]()
    for name, parameter in base.layers.named_parameters():
        if "lora_" in name or name.endswith("bias") or len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
            continue
        size = getattr(parameter, "ds_numel", parameter.numel())
        sizes += size
        if ".base_layer." not in f".{name}" and not parameter.requires_grad:
            bare[re.sub(r"^\d+\.|(?<=\.)\d+\.", "", name)] += size
    if not sizes or (without := bare.total() / sizes) < 0.1:
        return ""
    named = ", ".join(name for name, _ in bare.most_common(3))
    return f"note: {without:.0%} of the layers' weights have no adapter and are not trained: {named}"


def make_whole(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Replace the parameters of a model, which hold shards, by the whole ones in `state`, to merge adapters into them.

    The engine that sharded the model must not run it again after this.
    """
    whole: dict[int, nn.Parameter] = {}  # by identity, so that tied parameters stay tied
    for place, module in model.named_modules(remove_duplicate=False):
        for leaf, shard in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(shard) not in whole:
                whole[id(shard)] = nn.Parameter(state[f"{place}.{leaf}"], requires_grad=False)
            setattr(module, leaf, whole[id(shard)])


def save_model(
    model: Any,
    state: dict[str, torch.Tensor],
    recipe: Recipe,
    output: Path,
    records: Callable[[Path], None],
    chat_template: str | None = None,
) -> None:
    """Write checkpoint and tokenizer to `output` in one rename; adapters are merged, and also kept in `adapter/`.

    Parameters get the recipe's dtype. Buffers, and parameters that the architecture keeps in float32, stay as they are.

    records: writes the other files of the folder.
    chat_template: the one that the model was trained on, in place of the tokenizer's own.

    If a weight has grown beyond what that dtype holds, the model is saved in float32, with a warning.
    """
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        _write_model(model, state, recipe, staged, chat_template)
        records(staged)
        shutil.rmtree(output, ignore_errors=True)
        os.rename(staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # gone already after a success


def _write_model(
    model: Any, state: dict[str, torch.Tensor], recipe: Recipe, staged: Path, chat_template: str | None
) -> None:
    """`save_model` without the records, under the name that the folder has until it is whole."""
    dtype = recipe.save_dtype or recipe.compute_dtype
    if recipe.lora:
        model.save_pretrained(staged / "adapter", state_dict=state)
        save_adapter_scaling(model, staged / "adapter")
        if recipe.quantization is None:
            model = model.merge_and_unload()
        else:  # merged into the weights as they were, since merging into 4 bits would round the adapters away
            model = merged_unquantised(recipe, str(staged / "adapter"))
        state = model.state_dict()
    names: dict[int, str] = {}  # first name of each weight: FSDP gathers a tied one once for every name
    for name, weight in model.named_parameters(remove_duplicate=False):
        state[name] = state[names.setdefault(id(weight), name)]
    cast: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor and are written once
    own = _kept_precise(model, dtype)
    if (lost := _too_large({name: value for name, value in state.items() if name not in own}, dtype)) is not None:
        print(f"warning: save_dtype {dtype!r} was not used: {lost}; saved in float32", file=sys.stderr, flush=True)
        dtype = "float32"
    for name, value in state.items():
        wanted = value if name in own else value.to(getattr(torch, dtype))
        state[name] = cast.setdefault(value.data_ptr(), wanted.contiguous())
    _text(model).use_cache = True
    model.save_pretrained(staged, state_dict=state)
    _record_dtype(staged / "config.json", dtype)
    write_both_dialects(staged)
    tokenizer = load_tokenizer(recipe.tokenizer or str(recipe.model))
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if (length := getattr(_text(model), "max_position_embeddings", None)) is not None:
        tokenizer.model_max_length = length  # programs cut texts there, and the model's own may be the shorter one
    tokenizer.save_pretrained(staged)


def check_save_dtype(model: Any, recipe: Recipe) -> None:
    """Refuse a dtype to save in that cannot hold the weights as they are before training.

    Raises:
        ConfigError: a weight has a number that would become infinite.
    """
    dtype = recipe.save_dtype or recipe.compute_dtype
    own = _kept_precise(model, dtype)
    if lost := _too_large({name: value for name, value in model.named_parameters() if name not in own}, dtype):
        raise ConfigError(f"save_dtype = {dtype!r} is not allowed: {lost}; save_dtype: float32")


def _too_large(weights: Mapping[str, torch.Tensor], dtype: str) -> str | None:
    """Which finite number of which weight would become infinite in a dtype, in words; None if none would."""
    if dtype != "float16":  # the others have the range of float32
        return None
    largest = torch.finfo(torch.float16).max
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.is_meta:
            continue
        lost = weight.isfinite() & ~weight.to(getattr(torch, dtype)).isfinite()
        if lost.any():
            return (
                f"weight {name} has {weight[lost].abs().max().item():g}, and the largest number of {dtype} is"
                f" {largest:g}"
            )
    return None


def _record_dtype(file: Path, dtype: str) -> None:
    """Have a saved config say `dtype`, its nested configs too: transformers writes that of the weights in memory."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = dtype
    write_atomic(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _kept_precise(model: Any, dtype: str) -> set[str]:
    """Names in a model's state that are not rounded to `dtype`: transformers loads them in float32 in any case."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == "float16":
        patterns += getattr(model, "_keep_in_fp32_modules", None) or ()
    names = {name for name, _ in model.named_buffers()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in patterns):
            names.add(name)
    return names


def merged_unquantised(recipe: Recipe, adapter: str) -> Any:
    """The recipe's model on the CPU, an adapter merged into the weights as the checkpoint has them."""
    checkpoint = open_checkpoint(str(recipe.model))
    dtype = recipe.save_dtype or recipe.compute_dtype
    # In float16 a number that is too large for it would be infinite already, and nobody could tell.
    model = load_model(checkpoint, dtype="float32" if dtype == "float16" else dtype, device="cpu")
    install_scaling(model, recipe, checkpoint.settings)
    return merge_adapter(model, adapter)


def set_sliding_window(model: Any, window: int) -> None:
    """Make every attention layer of a model that has a sliding window use `window` tokens; others see all.

    Raises:
        ConfigError: no layer of the model has one.
    """
    config = _text(model)
    try:
        set_window(config, window)
    except ConfigError as error:
        raise ConfigError(f"sliding_window_attention_schedule is not allowed: {error}") from error
    types = getattr(config, "layer_types", None)
    for layer in model.modules():
        if hasattr(layer, "sliding_window"):
            index = getattr(layer, "layer_idx", None)
            if not types or (layer.sliding_window is not None if index is None else "sliding" in types[index]):
                layer.sliding_window = window
