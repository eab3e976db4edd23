"""Whether factor, original length L and max_position_embeddings of a config go together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scaled_rope.scaling.record import RopeScaling, length_made_for
from scaled_rope.scaling.registry import METHODS
from scaled_rope.serving.config_facts import RELEASED_TYPES, ConfigFacts
from scaled_rope.serving.inspect_report import Finding


def unsaid_original_length(facts: ConfigFacts) -> Iterator[Finding]:
    """Scalings that work without L leave open which length max_position_embeddings is."""
    own, context = facts.own, facts.context
    if own is None or own.factor <= 1 or METHODS[own.method].factor_times_original != "length":
        return
    if facts.original_is_written or facts.known is not None or not context:
        return
    if METHODS[own.method].needs_original and facts.rope_type not in RELEASED_TYPES:
        return  # a note of the reader says so
    if looks_extended(context, own.factor):
        same = "" if METHODS[own.method].needs_original or own.dynamic else " The frequencies are the same."
        yield Finding(
            "factor-twice",
            "warning",
            f"original_max_position_embeddings is missing, so max_position_embeddings={context} is taken for it and "
            f"the factor leads to {own.factor * context:.0f} tokens. If {context} is the extended length already, as "
            f"by another habit, the original length is {context / own.factor:.0f}.{same}",
            f"Write original_max_position_embeddings: {context / own.factor:.0f} or {context}.",
        )
    elif facts.spec is None:
        yield Finding(
            "unknown-original",
            "info",
            f"The config does not say the original length. max_position_embeddings={context} is taken for it, but "
            f"by another habit that is the extended length, and the original one {context / own.factor:.0f}"
            + ("." if METHODS[own.method].needs_original or own.dynamic else "; the frequencies are the same."),
            "Write original_max_position_embeddings, for programs and people that need it.",
        )


def looks_extended(context: int, factor: float) -> bool:
    """Whether a max_position_embeddings may well be factor times the length of pre-training."""
    assumed = context / factor if factor > 1 else 0.0
    # The lengths that models are pre-trained with are powers of two; extended ones start at 16384.
    return assumed >= 512 and math.log2(assumed).is_integer() and context >= 16384


def original_length_known_otherwise(facts: ConfigFacts) -> Iterator[Finding]:
    """Models whose L is known without `original_max_position_embeddings`."""
    known = facts.known
    if known is None:
        return
    text = f"The original length is {known.original} tokens, which original_max_position_embeddings does not say: "
    yield Finding("known-original", "info", f"{text}{known.source}.", "")


def undeclared_extended_length(facts: ConfigFacts) -> Iterator[Finding]:
    """max_position_embeddings is still L."""
    lengths = _lengths_apart(facts)
    if lengths is None or lengths[0] != lengths[1] or not METHODS[lengths[3]].needs_original:
        return
    context, original, factor, _ = lengths
    yield Finding(
        "undeclared-length",
        "warning",
        f"max_position_embeddings={context} is still the original length, although the factor {factor:g} "
        f"leads to {factor * original:.0f}: programs that take their limit from it stop at {context}. Or {context} is "
        "the extended length, and then the factor counts twice.",
        f"Write max_position_embeddings={factor * original:.0f}, or correct original_max_position_embeddings.",
    )


def length_other_than_factor_times_original(facts: ConfigFacts) -> Iterator[Finding]:
    """max_position_embeddings is neither L nor factor times L."""
    lengths = _lengths_apart(facts)
    if lengths is None or lengths[0] == lengths[1]:
        return
    context, original, factor, _ = lengths
    extended = factor * original
    meaning = "below" if context < extended else "above"
    yield Finding(
        "length-mismatch",
        "warning",
        f"factor {factor:g} times original_max_position_embeddings={original} is {extended:.0f}, "
        f"max_position_embeddings={context} is {meaning} that. transformers only logs it and scales by the factor; "
        "programs that take their limit from max_position_embeddings "
        + ("stop early." if context < extended else "go where the scaling does not reach."),
        f"Write max_position_embeddings={extended:.0f}, or the factor {context / original:g} if the model was "
        "trained so.",
    )


def original_length_that_is_the_extended_one(facts: ConfigFacts) -> Iterator[Finding]:
    """llama3 whose L is max_position_embeddings: its factor is the least that L grows by, so there is nothing left."""
    own, context = facts.own, facts.context
    if own is None or facts.spec is not None or not facts.original_is_written or own.factor <= 1:
        return
    least = METHODS[own.method].factor_times_original == "least"
    if least and context is not None and own.original_max_position_embeddings == context:
        yield Finding(
            "undeclared-length",
            "warning",
            f"original_max_position_embeddings={context} is max_position_embeddings as well, although the factor "
            f"{own.factor:g} extends it at least to {own.factor * context:.0f}. One of the two is wrong: the published "
            "models (Llama 3.1: 8192 and 131072) have the length of pre-training in the first.",
            "Correct original_max_position_embeddings, from which the frequencies follow, or max_position_embeddings.",
        )


def scaling_shorter_than_the_checkpoint(facts: ConfigFacts) -> Iterator[Finding]:
    """A scaling in place of one by which the model reached further."""
    if facts.spec is None or facts.own is None or facts.scaling is None:
        return
    reach = None if facts.known is None else facts.known.extended
    if text := shortening(facts.scaling, facts.own, facts.context or 0, reach):
        remedy = "A factor counts from the original length, whatever the checkpoint carries."
        yield Finding("shortened", "warning", f"{text}.", remedy)


def shortening(scaling: RopeScaling, own: RopeScaling, context: int, reach: int | None = None) -> str:
    """That `scaling` ends before the checkpoint did with its own one, in words; empty where it does not.

    Args:
        scaling: the one that replaces it.
        own: that of the checkpoint.
        context: max_position_embeddings of the checkpoint's config, in tokens; 0: it says none.
        reach: how far the checkpoint reached, in tokens, where that is known not to be factor times L.
    """
    original, made_for = scaling.original_max_position_embeddings, length_made_for(scaling, own, context)
    reached, kind = context, METHODS[scaling.method].factor_times_original
    if original == own.original_max_position_embeddings:  # another one corrects what the config says
        reached = max(reached, reach or own.max_position_embeddings or 0)
    if own.method == "default" or scaling == own or scaling.factor <= 1 or scaling.dynamic:
        return ""
    if original is None or made_for is None or made_for >= reached or kind == "nothing":
        return ""
    text = f"{scaling.label} replaces {own.label}: it is for {made_for} tokens, and the checkpoint reached {reached}"
    if kind == "least":
        return text
    factor = f"{math.ceil(1e3 * reached / original) / 1e3:g}"
    return f"{text}; {f'a factor of {factor}' if scaling.params else f'{scaling.method}:{factor}'} reaches that"


def _lengths_apart(facts: ConfigFacts) -> tuple[int, int, float, str] | None:
    """(max_position_embeddings, L, factor, method) of a config that says all, where the lengths do not go together."""
    own, context = facts.own, facts.context
    if own is None or facts.spec is not None or context is None or not facts.original_is_written:
        return None
    original, factor = own.original_max_position_embeddings, own.factor
    row = METHODS[own.method]
    if row.factor_times_original != "length" or factor <= 1 or original is None:
        return None
    together = abs(context - factor * original) <= 1e-3 * (factor * original)
    return None if together else (context, original, factor, own.method)
