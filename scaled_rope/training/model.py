"""Build the model that is trained, install its scaling, and wrap it with its loss."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from scaled_rope.attention.backends import attention_dropout, attention_for, set_window
from scaled_rope.checkpoint import open_checkpoint
from scaled_rope.errors import ConfigError, first_line
from scaled_rope.patching.loading import check_tied, former_names, load_model, resolve_plan
from scaled_rope.patching.loss import token_nll
from scaled_rope.patching.output_head import decoder_of, without_adapters
from scaled_rope.patching.patch import PatchReport, patch_as_read, patched_plan
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.hf_config import head_dim_of, text_config
from scaled_rope.scaling.record import RopeScaling, RopeSettings
from scaled_rope.scaling.resolve import with_primary
from scaled_rope.scaling.switching import original_up_to_l
from scaled_rope.training.kept_attention import KeptAttention
from scaled_rope.training.long_ce import gain_weights
from scaled_rope.training.offload import offloaded_activations


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


def install_scaling(model: Any, recipe: Recipe, settings: RopeSettings | None) -> PatchReport | None:
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
            scaling = original_up_to_l(scaling, head_dim_of(text_config(model.config)))
        report = patch_as_read(model, settings, with_primary(plan.layers, scaling) or scaling, plan.drop_layers)
    if wanted is not None:
        text_config(model.config).max_position_embeddings = wanted
    return report


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
        if dropout := attention_dropout(text_config(model.config)):
            raise ConfigError(
                f"keep_attention true is not allowed with {dropout}: dropout in the rest of a layer would draw other"
                " numbers in the backward pass"
            )
        settings["context_fn"] = kept = KeptAttention()
        kept.check_first_pass(decoder_of(without_adapters(model)), model.config._attn_implementation)
    # The method was renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


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


def set_sliding_window(model: Any, window: int) -> None:
    """Make every attention layer of a model that has a sliding window use `window` tokens; others see all.

    Raises:
        ConfigError: no layer of the model has one.
    """
    config = text_config(model.config)
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
