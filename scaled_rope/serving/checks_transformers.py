"""Checks for configs that transformers reads as something else than they say.

Only for the model's own scaling: transformers knows nothing of one that was asked for instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope.errors import type_and_line
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import (
    CUSTOM_ROPE_TYPE,
    PRIMARY_LAYER_TYPE,
    head_dim_of,
    nested_types,
    usual_name,
)
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.config_facts import RELEASED_TYPES, ConfigFacts
from scaled_rope.serving.inspect_report import Finding, describe_difference, quiet
from scaled_rope.serving.rotary_module import build_rotary_module, rotary_numbers, shares_one_table

PHI3_TYPES = ("default", "longrope")
"""The rope types that the config class of Phi-3 accepts."""


def rope_type_that_phi3_has_not(facts: ConfigFacts) -> Iterator[Finding]:
    """The config class of Phi-3 knows one scaling only."""
    if not _is_compared(facts) or not _phi3_lacks_type(facts):
        return
    rope_type = facts.rope_type
    said = (
        "is rewritten to 'longrope' by the config class of Phi-3, which then misses its lists of factors"
        if rope_type == "yarn"
        else "is refused by the config class of Phi-3, which takes 'default' and 'longrope' only"
    )
    yield Finding(
        "phi3-rewritten" if rope_type == "yarn" else "phi3-refused",
        "error",
        f"rope_type {rope_type!r} {said}.",
        'Leave the scaling out of the config and patch the loaded model: patch_model(model, "yarn:8").',
    )


def config_that_transformers_refuses(facts: ConfigFacts) -> Iterator[Finding]:
    """A config that this package can read and the config class of the family does not accept."""
    if not _is_compared(facts) or _phi3_lacks_type(facts) or not facts.refusal:
        return
    if facts.rope_error or facts.dimensions_error:
        return  # the same in other words
    yield Finding(
        "transformers-refuses",
        "error",
        f"transformers {transformers.__version__} does not accept this config: {facts.refusal}.",
        "Use a scaling that the family has, or load it with scaled_rope.load_model.",
    )


def theta_dropped_with_rope_parameters(facts: ConfigFacts) -> Iterator[Finding]:
    """rope_scaling replaces the dictionary that holds rope_theta."""
    if not _is_accepted(facts) or facts.own is None:
        return
    written, other = facts.text.get("rope_parameters"), facts.text.get("rope_scaling")
    if not other or not isinstance(written, Mapping) or nested_types(written) or not isinstance(other, Mapping):
        return
    theta = written.get("rope_theta")
    if theta is not None and other.get("rope_theta") is None and facts.text.get("rope_theta") is None:
        yield Finding(
            "theta-dropped",
            "error",
            f"rope_theta={theta!r} is in rope_parameters only, and rope_scaling replaces all of "
            f"rope_parameters: {facts.own.rope_theta:g} is used.",
            "Move the scaling into rope_parameters, beside rope_theta, and delete rope_scaling.",
        )


def rope_type_that_transformers_has_not(facts: ConfigFacts) -> Iterator[Finding]:
    """This package's own rope_type, or one of the code released with YaRN."""
    if not _is_accepted(facts):
        return
    if facts.rope_type == CUSTOM_ROPE_TYPE:
        yield Finding(
            "not-native",
            "info",
            f"rope_type {CUSTOM_ROPE_TYPE!r} is this package's own: other programs refuse to build the model.",
            "Load it with scaled_rope.load_model; `scaled-rope export` looks for words for other programs.",
        )
    elif facts.rope_type in RELEASED_TYPES:
        yield Finding(
            "not-native",
            "warning",
            f"rope_type {facts.rope_type!r} is known to the code that was released with YaRN and to this package; "
            "transformers cannot build the model.",
            "`scaled-rope export` looks for words for the program at hand.",
        )
    elif facts.rope_type in ("mrope", "xdrope", "su") and _rope_type_as_built(facts) == facts.rope_type:
        usual = usual_name(facts.rope_type)
        yield Finding(
            "not-native",
            "error",
            f"rope_type {facts.rope_type!r} is an older name that the configs of some families turn into {usual!r}, "
            f"that of {facts.model_type!r} does not: transformers cannot build the model.",
            f"Write rope_type {usual!r}.",
        )


def other_numbers_in_transformers(facts: ConfigFacts) -> Iterator[Finding]:
    """transformers computes other frequencies or another attention factor than the config means."""
    if not _is_accepted(facts) or facts.rope_type in (CUSTOM_ROPE_TYPE, *RELEASED_TYPES):
        return
    if any(note.code in ("mistral-constants", "stale-record") for note in facts.notes):
        return  # these notes say so
    difference = difference_from_transformers(facts)
    if difference and facts.nested and shares_one_table(facts.built):
        yield _nested_for_one_table(facts, f"reads none of the entries{difference}")
    elif difference:
        yield Finding(
            "computes-otherwise",
            "error",
            f"transformers {transformers.__version__} computes other numbers from this config than it "
            f"says{difference}.",
            "Load it with scaled_rope.load_model, or write what is meant in other words (`scaled-rope export`).",
        )


def rotary_module_that_transformers_cannot_build(facts: ConfigFacts) -> Iterator[Finding]:
    """A config that its class accepts, and the model's own rotary module does not."""
    if not _is_accepted(facts) or facts.rope_type in (CUSTOM_ROPE_TYPE, *RELEASED_TYPES) or facts.dimensions_error:
        return
    if any(finding.code == "not-native" for finding in rope_type_that_transformers_has_not(facts)):
        return  # the same in other words
    try:
        if facts.built is not None:
            build_rotary_module(facts.built)
    except Exception as error:  # whatever the family's code raises for a config that it cannot use
        if facts.nested and shares_one_table(facts.built):
            yield _nested_for_one_table(facts, f"cannot build this ({type_and_line(error)})")
        elif shares_one_table(facts.built) or _builds_by_default(facts.built):
            yield Finding(
                "transformers-refuses",
                "error",
                f"transformers {transformers.__version__} cannot build this: the rotary module of "
                f"{facts.model_type!r} models raises {type_and_line(error)}.",
                "Use a scaling that the family has, or load it with scaled_rope.load_model.",
            )


def _nested_for_one_table(facts: ConfigFacts, what: str) -> Finding:
    """The finding about entries per layer type in a family that has one table. what: what transformers does of it."""
    return Finding(
        "nested-parameters",
        "error",
        f"The RoPE dictionary has entries for {', '.join(facts.nested)}, but all layers of {facts.model_type!r} models "
        f"share one table, and transformers {transformers.__version__} {what}.",
        "Write the entry itself in place of the dictionary of entries; `scaled-rope repair` does.",
    )


def _builds_by_default(config: Any) -> bool:
    """Whether the rotary module of a family can be built from the config that its class makes when told nothing."""
    try:
        return build_rotary_module(type(config)()) is not None
    except Exception:  # some defaults make no model
        return False


def long_list_that_transformers_does_not_use(facts: ConfigFacts) -> Iterator[Finding]:
    """Phi-3.5-MoE's rotary module asks for its frequencies without saying how long the sequence is."""
    if _is_accepted(facts) and facts.model_type == "phimoe" and usual_name(facts.rope_type) == "longrope":
        yield Finding(
            "long-list-unused",
            "warning",
            f"transformers {transformers.__version__} computes models of type 'phimoe' with short_factor at every "
            "length; long_factor has no effect there.",
            "For sequences beyond the original length, patch the loaded model with scaled_rope.",
        )


def _is_compared(facts: ConfigFacts) -> bool:
    """Whether the report is about the model's own scaling."""
    return facts.own is not None and facts.spec is None


def _is_accepted(facts: ConfigFacts) -> bool:
    """Whether the config class of the family, if there is one, takes the model's own scaling as it is."""
    return _is_compared(facts) and not _phi3_lacks_type(facts) and not facts.refusal


def _rope_type_as_built(facts: ConfigFacts) -> Any:
    """The rope_type of the config object, where all layers share a RoPE dictionary."""
    rope = getattr(facts.built, "rope_parameters", None)
    return rope.get("rope_type") if isinstance(rope, Mapping) else None


def _phi3_lacks_type(facts: ConfigFacts) -> bool:
    return facts.model_type == "phi3" and facts.rope_type not in (*PHI3_TYPES, "su", CUSTOM_ROPE_TYPE)


def difference_from_transformers(facts: ConfigFacts) -> str:
    """How transformers' numbers differ from ours, in words to go on with; empty when they don't."""
    if facts.own is None or facts.built is None or facts.head_dim is None or facts.dimensions_error:
        return ""
    try:
        with quiet():
            theirs, their_factor = _their_rope(facts.built, facts.layer_type)
    except Exception:  # not comparable: another finding says why, or the family computes by itself
        return ""
    ours, our_factor = compute_rope(facts.own.of_frequencies, facts.head_dim)
    return describe_difference(theirs, their_factor, ours, our_factor, "transformers", "meant")


def _their_rope(config: Any, layer_type: str | None) -> tuple[Tensor, float]:
    """Frequencies [D/2] and attention factor of the family's own rotary module, or else of the common formulas."""
    rotary = build_rotary_module(config)
    if rotary is not None:
        nested = nested_types(config.rope_parameters)
        numbers = rotary_numbers(rotary, (layer_type or PRIMARY_LAYER_TYPE) if nested else None)
        if numbers is None and nested:  # entries of a family whose layers share one table
            numbers = rotary_numbers(rotary)
        if numbers is not None:
            return numbers
    return _vanilla_rope(config, layer_type)


def _vanilla_rope(config: Any, layer_type: str | None) -> tuple[Tensor, float]:
    """Frequencies [D/2] and attention factor that transformers computes from a config object, without a length."""
    rope = config.rope_parameters
    nested = nested_types(rope)
    layer_type = (layer_type or PRIMARY_LAYER_TYPE) if nested else None
    entry = rope[layer_type] if nested else rope
    if entry["rope_type"] != "default":
        inv_freq, factor = ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, torch.device("cpu"), layer_type=layer_type)
        return inv_freq, float(factor)
    partial = entry.get("partial_rotary_factor", 1.0)
    plain = RopeScaling("default", rope_theta=float(entry["rope_theta"]), partial_rotary_factor=partial)
    return compute_rope(plain, head_dim_of(config))
