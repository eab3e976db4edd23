"""The checks of a config, in the order in which their findings are listed.

A check is a function of `ConfigFacts` that yields findings. To add one, write it in the module of its subject and add a
row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scaled_rope.serving.checks_keys import (
    keys_unknown_to_the_rope_type,
    misspelt_top_level_keys,
    rope_keys_outside_the_text_part,
)
from scaled_rope.serving.checks_layers import (
    alibi_instead_of_rope,
    attention_in_chunks,
    family_without_rope,
    layers_that_do_not_rotate,
    window_shorter_than_context,
)
from scaled_rope.serving.checks_lengths import (
    length_other_than_factor_times_original,
    original_length_known_otherwise,
    original_length_that_is_the_extended_one,
    scaling_shorter_than_the_checkpoint,
    undeclared_extended_length,
    unsaid_original_length,
)
from scaled_rope.serving.checks_notes import remarks_of_the_reader
from scaled_rope.serving.checks_origin import code_in_the_checkpoint, family_unknown_to_transformers, finetuned_flag
from scaled_rope.serving.checks_reading import (
    rope_of_images,
    rope_that_is_no_dictionary,
    uncomputable_frequencies,
    unreadable_layer_types,
    unreadable_scaling,
)
from scaled_rope.serving.checks_transformers import (
    config_that_transformers_refuses,
    long_list_that_transformers_does_not_use,
    other_numbers_in_transformers,
    rope_type_that_phi3_has_not,
    rope_type_that_transformers_has_not,
    rotary_module_that_transformers_cannot_build,
    theta_dropped_with_rope_parameters,
)
from scaled_rope.serving.checks_use import (
    cached_keys_of_dynamic_ntk,
    cached_keys_of_dynamic_scaling,
    constants_of_another_length,
    longrope_lists_swapped,
    longrope_switches_tables,
    ramp_of_several_axes_in_vllm,
    softmax_scale_from_mscale,
    static_scaling_of_short_prompts,
)
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import LEVELS, Finding

Check = Callable[[ConfigFacts], Iterable[Finding]]
CHECKS: tuple[Check, ...] = (
    rope_that_is_no_dictionary,
    misspelt_top_level_keys,
    rope_keys_outside_the_text_part,
    family_without_rope,
    rope_of_images,
    keys_unknown_to_the_rope_type,
    unreadable_scaling,
    remarks_of_the_reader,
    unsaid_original_length,
    original_length_known_otherwise,
    undeclared_extended_length,
    length_other_than_factor_times_original,
    original_length_that_is_the_extended_one,
    scaling_shorter_than_the_checkpoint,
    cached_keys_of_dynamic_ntk,
    cached_keys_of_dynamic_scaling,
    longrope_switches_tables,
    longrope_lists_swapped,
    ramp_of_several_axes_in_vllm,
    constants_of_another_length,
    static_scaling_of_short_prompts,
    window_shorter_than_context,
    layers_that_do_not_rotate,
    alibi_instead_of_rope,
    attention_in_chunks,
    softmax_scale_from_mscale,
    uncomputable_frequencies,
    rope_type_that_phi3_has_not,
    config_that_transformers_refuses,
    theta_dropped_with_rope_parameters,
    rope_type_that_transformers_has_not,
    other_numbers_in_transformers,
    rotary_module_that_transformers_cannot_build,
    long_list_that_transformers_does_not_use,
    finetuned_flag,
    code_in_the_checkpoint,
    family_unknown_to_transformers,
    unreadable_layer_types,
)


def run_checks(facts: ConfigFacts) -> tuple[Finding, ...]:
    """The findings of all checks, each once: errors first, then warnings, in the order of `CHECKS` within a level."""
    findings = dict.fromkeys(finding for check in CHECKS for finding in check(facts))
    return tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level)))
