"""Checks of a scaling in use: the prompts that it changes, its effect under caches, and additions of attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scaled_rope.errors import is_number
from scaled_rope.scaling.constants import constants_note
from scaled_rope.scaling.hf_config import SOFTMAX_MSCALE_FAMILIES
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Finding

_TRAINED_WITH_THEIRS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "gemma3_text", "gpt_oss", "ministral3", "mistral4", "olmo3"),
)
"""Families whose published models were trained with the scaling in their configs."""
_FOUR_TIMES = ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
_CHANGES_SHORT_PROMPTS = ("linear", "ntk", "ntk-by-parts", "part-ntk", "yarn", "ntk-mixed")


def cached_keys_of_dynamic_ntk(facts: ConfigFacts) -> Iterator[Finding]:
    """transformers' own dynamic type, whose cached and new keys disagree."""
    if facts.scaling is not None and facts.scaling.method == "dynamic-ntk":
        yield Finding(
            "dynamic-cache",
            "warning",
            "The base grows with the sequence, but transformers and most servers cache keys that are rotated "
            "already: cached and new keys then disagree, and what the model says depends on earlier inputs.",
            "Use a static scaling for generation, or load with scaled_rope.load_model, which caches keys "
            "before rotation.",
        )


def cached_keys_of_dynamic_scaling(facts: ConfigFacts) -> Iterator[Finding]:
    """A scaling that follows the length of each sequence, which this package alone runs."""
    scaling = facts.scaling
    if scaling is not None and scaling.dynamic and scaling.method != "dynamic-ntk":
        yield Finding(
            "dynamic-cache",
            "info",
            f"{scaling.label}: frequencies depend on the length of each sequence, so keys must be cached before "
            "rotation. This package does so; other programs do not run this scaling.",
            "Nothing to do here; for servers, export a static scaling for one length.",
        )


def longrope_switches_tables(facts: ConfigFacts) -> Iterator[Finding]:
    """longrope has two tables, and keys that were cached with the first."""
    scaling = facts.scaling
    if scaling is not None and scaling.method == "longrope" and not scaling.dynamic:
        yield Finding(
            "longrope-switch",
            "info",
            f"longrope changes its table at {scaling.original_max_position_embeddings} tokens: within one "
            "generation that crosses it, keys cached before are rotated by the other one.",
            "Decide by the final length: prompt and new tokens together.",
        )


def longrope_lists_swapped(facts: ConfigFacts) -> Iterator[Finding]:
    """longrope whose list for short sequences divides by more than that for long ones."""
    scaling = facts.scaling
    if scaling is None or scaling.method != "longrope":
        return
    short, long = scaling.params.get("short_factor"), scaling.params.get("long_factor")
    if not short or not long or len(short) != len(long):
        return
    if all(a >= b for a, b in zip(short, long, strict=True)) and sum(short) > sum(long):
        yield Finding(
            "longrope-swapped",
            "warning",
            f"short_factor ({min(short):g} to {max(short):g}) divides frequencies by more than long_factor "
            f"({min(long):g} to {max(long):g}) does: sequences up to L would be interpolated, and longer ones less.",
            "Most likely the two lists are swapped; compare with the model's own config.",
        )


def constants_of_another_length(facts: ConfigFacts) -> Iterator[Finding]:
    """The paper's constants where they leave hardly a pair unscaled."""
    if facts.scaling is None or facts.head_dim is None or not facts.dimensions:
        return
    if (note := constants_note(facts.scaling, facts.head_dim)) is not None:
        text, _, remedy = note.partition("; ")
        yield Finding("constants", "info", f"{text}.", f"{remedy[:1].upper()}{remedy[1:]}.")


def static_scaling_of_short_prompts(facts: ConfigFacts) -> Iterator[Finding]:
    """A scaling in effect at every length, of a model that was not trained with it as far as one can tell."""
    scaling = facts.scaling
    if scaling is None or scaling.method not in _CHANGES_SHORT_PROMPTS or scaling.factor <= 1 or scaling.dynamic:
        return
    finetuned = bool(facts.entry.get("finetuned")) and facts.spec is None
    trained = facts.model_type in _TRAINED_WITH_THEIRS and facts.spec is None
    if not finetuned and not trained:
        yield Finding(
            "static-scaling",
            "info",
            f"{scaling.label} is in effect at every length: a model that was not fine-tuned with it does worse on "
            "prompts that fit the original length than without it.",
            f'Use "dynamic-{scaling.method}", or serve short prompts from an unscaled endpoint; nothing to do if '
            "the model was trained with it.",
        )


def ramp_of_several_axes_in_vllm(facts: ConfigFacts) -> Iterator[Finding]:
    """YaRN beside mrope_section, which vLLM runs with another L."""
    scaling = facts.scaling
    if scaling is None or scaling.method != "yarn" or facts.model_type not in _FOUR_TIMES or facts.spec is not None:
        return
    if "mrope_section" in facts.entry:
        yield Finding(
            "vllm-axes",
            "info",
            f"vLLM 0.33 takes 4·L = {4 * (scaling.original_max_position_embeddings or 0)} for the L of YaRN's ramp in "
            "this family, so it blends other frequencies than transformers and this report.",
            "Serve it with the settings that `scaled-rope export --for vllm` prints.",
        )


def softmax_scale(facts: ConfigFacts) -> float:
    """The multiplier of the softmax scale in a family's attention, from mscale_all_dim; 1 for most families."""
    scaling, given = facts.scaling, facts.entry.get("mscale_all_dim")
    if scaling is None or facts.model_type not in SOFTMAX_MSCALE_FAMILIES or scaling.method == "default":
        return 1.0
    if not given or not is_number(given):
        return 1.0
    return float((0.1 * given * math.log(max(scaling.factor, 1.0)) + 1) ** 2)


def softmax_scale_from_mscale(facts: ConfigFacts) -> Iterator[Finding]:
    """Families whose attention takes a part of YaRN's temperature into its softmax scale."""
    value = softmax_scale(facts)
    if value == 1 or not facts.entry.get("mscale"):
        return  # `lone_mscale` says what mscale_all_dim does by itself
    yield Finding(
        "mscale-softmax",
        "info",
        f"Models of type {facts.model_type} multiply the softmax scale by (0.1·mscale_all_dim·ln s + 1)² = "
        f"{value:.4g} in their attention; the attention factor of cos and sin here is only the ratio of both "
        "mscales.",
        "To change the scaling use patch_model: it carries that scale to the factor of another YaRN, and takes it out "
        "under any other method.",
    )
