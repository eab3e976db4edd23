"""Write the scaling of a patched model into its config, so that the saved model carries it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig, PreTrainedModel

from scaled_rope.checkpoint import quiet_transformers
from scaled_rope.errors import ConfigError
from scaled_rope.patching.base_model import buffer_name, tables_of_text
from scaled_rope.patching.class_exchange import exchange_class
from scaled_rope.patching.patch_request import PatchRequest, Unpatched
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, NATIVE, RECORD_KEY, read_by_attention, unused_types
from scaled_rope.scaling.record import LayerPlan, RopeScaling

CONFIG_FIELDS = ("rope_parameters", "max_position_embeddings", RECORD_KEY)


class ABSENT:
    """Stands for a field that a config does not have. A class, so that copies of a model keep its identity."""


def fields_of(config: Any) -> dict[str, Any]:
    """The values of the fields that a patch may write, `ABSENT` for those that a config does not have; `head_dim` only
    where it is one of them because it is left open."""
    found = {name: getattr(config, name, ABSENT) for name in CONFIG_FIELDS}
    return found | ({"head_dim": None} if vars(config).get("head_dim", ABSENT) is None else {})


def config_fields(request: PatchRequest, unpatched: Unpatched, config: Any, before: dict[str, Any]) -> dict[str, Any]:
    """Return the config's new values by field, `ABSENT` for a field to delete. before: its values without a patch."""
    adapter, scaling, plan = unpatched.adapter, request.scaling, request.plan
    given = before["max_position_embeddings"]
    context = max(given if isinstance(given, int) else 0, scaling.max_position_embeddings or 0)
    # In a family with a default share of its own, leaving out a share of 1 would mean that default.
    says_share = "partial_rotary_factor" in str(before["rope_parameters"])
    form = unpatched.form(unpatched.places[0])
    is_open = before.get("head_dim", ABSENT) is None

    def words(one: RopeScaling, rope_types: Iterable[str], name: str = "") -> dict[str, Any]:
        # Inside a layer type transformers does not see `truncate`.
        unseen = {"yarn"} if adapter.per_layer_type and one.truncate is False else set()
        values = one.to_config(head_dim=form.head_dim(name), rope_types=frozenset(rope_types) - unseen)
        if says_share:
            values.setdefault("partial_rotary_factor", one.partial_rotary_factor)
        if unpatched.softmax is not None and request.softmax_factor != 1.0:
            values |= {"mscale": unpatched.softmax.mscale, "mscale_all_dim": unpatched.softmax.mscale_all_dim}
        rope = before["rope_parameters"]
        return read_by_attention(rope.get(name, rope)) | values

    def said(rope_types: Iterable[str], head_dim: int | None = None) -> dict[str, Any]:
        by_type: dict[str, Any] = {name: words(one, rope_types, name) for name, one in plan.layers.items()}
        if adapter.per_layer_type:  # an entry of null says that layers of a type have no RoPE
            rope = before["rope_parameters"]
            unused = {name: rope[name] for name in unused_types(rope, unpatched.settings.layer_types)}
            by_type = {name: by_type.get(name) for name in rope} | unused
        return {
            "rope_parameters": by_type if adapter.per_layer_type else words(scaling, rope_types),
            "max_position_embeddings": context or given,  # not all families say one
            **({"head_dim": head_dim} if is_open else {}),
        }

    # transformers cannot express such a plan, and so must refuse to build the model.
    beyond_words = bool(plan.drop_layers) or (bool(plan.layers) and not adapter.per_layer_type)
    # Some formulas of transformers read a head_dim that the config leaves open, as that of Mixtral 8x7B does.
    sizes = () if beyond_words else (None, form.head_dim("")) if is_open else (None,)
    ways = (said(NATIVE, size) for size in sizes)
    understood = (way for way in ways if _is_understood(way, scaling, plan, unpatched, config))
    fields = next(understood, None) or said(())
    layers = {name: one.to_dict() for name, one in plan.layers.items()}
    if beyond_words:
        fields[RECORD_KEY] = {"layers": layers, "drop_layers": list(plan.drop_layers)}
    else:
        fields[RECORD_KEY] = _record(scaling, plan, fields, config, layers)
    return fields


def _is_understood(
    fields: dict[str, Any], scaling: RopeScaling, plan: LayerPlan, unpatched: Unpatched, config: Any
) -> bool:
    """Whether transformers, reading a config with these fields, computes the scaling in every rotary module.

    Somebody's own class of rotary modules is asked alike; one that cannot be built from a config alone may do anything.

    It may not: config classes reject or rewrite rope types and take lengths from elsewhere, and some formulas fail on
    some families. So the family's own rotary modules are built from the config and their frequencies are compared.
    """
    if CUSTOM_ROPE_TYPE in str(fields["rope_parameters"]):
        return False
    scalings = plan.layers if unpatched.adapter.per_layer_type else {"": scaling}
    with _disable_current_modes():  # a caller may be tracing a pass, with tensors that hold no numbers
        for place in unpatched.places:
            said = {**copy.deepcopy(config.to_dict()), **copy.deepcopy(_present(fields))}
            try:
                # Our keys are logged, and every key that a rope_type does not use.
                with quiet_transformers(), torch.device("cpu"):  # the default device may be "meta"
                    whole = type(config).from_dict(said)
                    if (theta := unpatched.thetas.get(place.path)) is not None:  # as the model does for each module
                        whole.rope_parameters = {**whole.rope_parameters, "rope_theta": theta}
                    rotary = type(place.module)(config=whole)
            except Exception:  # each family has its own ways to refuse
                return False
            if not all(
                agrees(rotary, name, unpatched.scaling_at(place, one), unpatched) for name, one in scalings.items()
            ):
                return False
    return True


def agrees(rotary: Any, layer_type: str, scaling: RopeScaling, unpatched: Unpatched) -> bool:
    """Whether a rotary module of transformers has a scaling's frequencies, for short texts and beyond L; on the CPU.

    A module that fails has not.
    """
    original = scaling.original_max_position_embeddings or 1
    form = unpatched.form(unpatched.places[0])
    for length in (1, original, 3 * original + 1) if scaling.is_length_dependent else (1,):
        try:
            inv_freq, their_factor = _their_numbers(rotary, layer_type, length)
        except Exception:  # each family has its own ways to refuse
            return False
        with torch.device("cpu"):  # whatever the default device is
            wanted, factor = form.frequencies(scaling, layer_type, length)
        # Computed in float32, off by some ln(b) + 3·s units of 6e-8.
        if inv_freq.shape != wanted.shape or not torch.allclose(inv_freq, wanted, rtol=1e-3, atol=0):
            return False
        if abs(their_factor - factor) > 1e-6 * factor:
            return False
    return True


def _their_numbers(rotary: Any, layer_type: str, length: int) -> tuple[Tensor, float]:
    """Frequencies [D/2] and attention factor of a rotary module of transformers after a text of `length` tokens."""
    more = (layer_type,) if layer_type else ()
    with quiet_transformers(), torch.device("cpu"):
        tables_of_text(rotary, torch.zeros(1, 1, 1), torch.tensor([[length - 1]]), *more)
    inv_freq, factor = (getattr(rotary, buffer_name(name, layer_type)) for name in ("inv_freq", "attention_scaling"))
    return inv_freq.float(), float(factor)


def _record(scaling: RopeScaling, plan: LayerPlan, fields: dict[str, Any], config: Any, layers: dict[str, Any]) -> Any:
    """The record as a dictionary if the written `rope_parameters` would be read back as another one; else ABSENT."""
    said = {"model_type": config.model_type, **_present({name: fields[name] for name in CONFIG_FIELDS[:2]})}
    if hasattr(config, "original_max_position_embeddings"):
        said["original_max_position_embeddings"] = config.original_max_position_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.layers:
            same = all(RopeScaling.from_config(said, name) == one for name, one in plan.layers.items())
            return ABSENT if same else {"layers": layers}
        return ABSENT if RopeScaling.from_config(said) == scaling else scaling.to_dict()


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not ABSENT}


def write_config(config: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if value is not ABSENT:
            setattr(config, name, value)
        elif hasattr(config, name):
            delattr(config, name)


def let_save(config: Any) -> None:
    """Let a config be saved that its own class rejects: transformers validates configs before it writes them, too."""
    if CUSTOM_ROPE_TYPE not in str(config.rope_parameters):
        return
    try:
        with quiet_transformers():
            copy.deepcopy(config).validate()  # some change what they check
    except Exception:  # each family has its own ways to refuse
        exchange_class(config, _Unvalidated)


class _Unvalidated:
    """A method that comes before that of a config's class, where the class rejects our rope type. The config was valid
    before ours was written into it. Reading a saved one is still left to the class, so transformers refuses it."""

    def validate(self) -> None:
        pass


def detach_config(model: nn.Module, base: PreTrainedModel) -> Any:
    """Give every part of `model` that uses the base model's config one private copy of it.

    Configs that hold it, at any depth, are copied as well, and only these: parts that shared a config still do.

    Raises:
        ConfigError: the config that is saved with the model does not hold the base model's. Nothing is changed then.
    """
    shared = base.config
    whole = next(part for part in model.modules() if isinstance(part, PreTrainedModel) and base in set(part.modules()))
    if not _holds(whole.config, shared):
        raise ConfigError(
            f"architecture {whole.config.model_type!r}: its config does not hold that of its {type(base).__name__}, so "
            "a saved model would lose the scaling; patch that part alone"
        )
    private = copy.deepcopy(shared)
    copies = {id(shared): (shared, private)}
    for module in model.modules():
        own: Any = vars(module).get("config")  # vars: wrappers forward attributes that they do not have
        if isinstance(own, PreTrainedConfig) and (copied := _with_copies(own, copies)) is not own:
            module.config = copied
    return private


def _parts(config: Any) -> dict[str, Any]:
    return {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}


def _holds(config: Any, part: Any) -> bool:
    return config is part or any(_holds(each, part) for each in _parts(config).values())


def _with_copies(config: Any, copies: dict[int, tuple[Any, Any]]) -> Any:
    """The config itself, or, where it holds one that has a copy, a copy of it that holds that one's copy.

    copies: identity of a config -> the config, so that it lives on, and its copy or itself; added to.
    """
    if id(config) not in copies:
        parts = _parts(config)
        changed = {name: new for name, part in parts.items() if (new := _with_copies(part, copies)) is not part}
        found = copy.copy(config) if changed else config
        for name, part in changed.items():
            setattr(found, name, part)
        copies[id(config)] = (config, found)
    return copies[id(config)][1]
